"""What a night costs on the echo engine, in one code or in two side by side.

    python -m tests.bench.nights --rows 2000000
    python -m tests.bench.nights --case each --rows 2000000
    python -m tests.bench.nights --case together --rows 20000 --files 4 --against ../before
    python -m tests.bench.nights --case first --rows 1000000 --against ../before
    python -m tests.bench.nights --case scale --rows 100000 1000000 10000000

Cases: `one` row edited; 1 % of the rows of one `file` edited; 1 % of all rows edited at `random`
places; `each` of these, a night after the other; the `first` run, five times; 30 nights of 200
edits, those of a night `together` or `anywhere`; `scale`, what each step costs, and of three or
more sizes what it would cost at `--fit` rows by a straight line. `--against` names a checkout of
another version: it gets the same input and the same edits, step by step, and the last lines say how
many times as long each step took it, as a median.

Each step is a process of its own, measured from outside: wall, user and system time, peak memory
of it and its children, bytes written (as the kernel counts them). Disk: blocks of the output
folder, each file once however many names it has. Rows are of equal length, so that some can be
edited in place.
Prints a JSON line for each step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import batchgen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Steps = Iterator[tuple[str, "Code", dict[str, Any]]]

SPREAD = 1 << 20
"""Texts are slices of so many characters of random words."""
NUM_NIGHTS, NUM_EDITS, NUM_FIRST = 30, 200, 5
JOB = """
[input]
path = "data/*.jsonl"
[prompt]
system = "Repeat."
user = "{{ lang }}: {{ text }}"
[model]
backend = "echo"
[sampling]
max_tokens = 64
temperature = 0
[checks]
allow_truncated = true
[output]
path = "OUT"
"""


class World(NamedTuple):
    """Input files of equal rows."""

    folder: Path
    num_rows: int
    num_files: int
    row_bytes: int

    @property
    def edges(self) -> list[int]:
        """First row of each file, and the end."""
        return [self.num_rows * number // self.num_files for number in range(self.num_files + 1)]

    def path(self, number: int) -> Path:
        """An input file."""
        return self.folder / "data" / f"rows-{number:03}.jsonl"

    def make(self) -> None:
        """Write all rows, in a process of its own: what this one ever held, its children count."""
        words = "from tests.bench import nights; nights.make_rows()"
        subprocess.run([sys.executable, "-c", words, *map(str, self)], check=True)

    def write(self) -> None:
        """Write all rows."""
        rng = random.Random(0)
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(5000)]
        text = " ".join(rng.choices(words, k=SPREAD // 5))
        (self.folder / "data").mkdir()
        for number, (start, stop) in enumerate(itertools.pairwise(self.edges)):
            with self.path(number).open("wb", buffering=1 << 20) as out:
                for row in range(start, stop):
                    head = f'{{"id": "r{row:010}", "lang": "en", "text": "{row:010} '
                    at = rng.randrange(len(text) - self.row_bytes)
                    tail = text[at : at + self.row_bytes - len(head) - 3]
                    out.write(f'{head}{tail}"}}\n'.encode())

    def edit(self, rows: Iterable[int], night: int = 0) -> None:
        """Change rows in place, otherwise than any night before."""
        edges, mark = self.edges, f'{night:04}EDIT"}}\n'.encode()
        for row in rows:
            number = bisect_right(edges, row) - 1
            with self.path(number).open("r+b") as file:
                file.seek((row - edges[number] + 1) * self.row_bytes - len(mark))
                file.write(mark)


def make_rows() -> None:
    """Write a world: its folder, rows, files and bytes of a row are in `sys.argv`."""
    folder, *numbers = sys.argv[1:]
    World(Path(folder), *map(int, numbers)).write()


class Code(NamedTuple):
    """A version of batchgen with an output of its own."""

    name: str
    path: Path
    folder: Path

    @property
    def job(self) -> Path:
        """Its job file."""
        return self.folder / f"{self.name}.toml"

    @property
    def out(self) -> Path:
        """Its output."""
        return self.folder / f"out-{self.name}"

    def begin(self) -> dict[str, Any]:
        """Write the job file and run it for the first time."""
        self.job.write_text(JOB.replace("OUT", self.out.name), encoding="utf-8")
        return self.step("run")

    def step(self, *command: str, kill_s: float | None = None) -> dict[str, Any]:
        """Run a command of its own, and tell what it cost."""
        before, begun_s = disk_bytes(self.out), time.monotonic()
        said = self.folder / "said.json"
        where = self.job if command[0] in {"run", "plan"} else self.out
        words = [sys.executable, "-m", "batchgen", command[0], str(where), *command[1:], "--json"]
        env = {**os.environ, "PYTHONPATH": str(self.path)}
        with said.open("wb") as out:
            process = subprocess.Popen(
                words, stdout=out, stderr=subprocess.DEVNULL, env=env, cwd=self.folder
            )
            if kill_s is not None:
                time.sleep(kill_s)
                process.send_signal(signal.SIGKILL)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        found = {
            "s": round(time.monotonic() - begun_s, 2),
            "user_s": round(usage.ru_utime, 2),
            "system_s": round(usage.ru_stime, 2),
            "peak_mib": usage.ru_maxrss // 1024,
            "disk_mib": round((disk_bytes(self.out) - before) / 2**20, 2),
            "written_mib": round(usage.ru_oublock * 512 / 2**20, 1),
        }
        if kill_s is not None:
            return found
        told = json.loads(said.read_bytes())
        assert process.returncode == 0, told
        if command[0] == "run":
            found["planned_s"] = round(told["planned_s"], 2)
            found["computed"] = told["run"]["num_ok"] + told["run"]["num_errors"]
            found["carried"] = told["num_carried"]
        return found


def disk_bytes(folder: Path) -> int:
    """What a folder takes on the disk, each file once however many names it has."""
    stats = (path.stat() for path in folder.rglob("*") if path.is_file())
    return sum({stat.st_ino: stat.st_blocks * 512 for stat in stats}.values())


def one(world: World) -> Sequence[int]:
    """One row."""
    return [world.num_rows // 3]


def scattered(world: World) -> Sequence[int]:
    """1 % of all rows, at random places."""
    return random.Random(1).sample(range(world.num_rows), world.num_rows // 100)


def in_file(world: World) -> Sequence[int]:
    """1 % of the rows of one file."""
    start, stop = world.edges[world.num_files // 2 :][:2]
    return range(start, stop, 100)


EDITS = {"one": one, "file": in_file, "random": scattered}


def each(world: World, codes: Sequence[Code]) -> Steps:
    """A first run, and a night with each kind of edits, one after the other."""
    for code in codes:
        yield "first", code, code.begin()
    for night, (name, edits) in enumerate(EDITS.items(), 1):
        rows = edits(world)
        world.edit(rows, night)
        for code in codes:
            found = code.step("run")
            assert found["computed"] == len(rows), found
            yield f"{name} edited", code, found


def first(world: World, codes: Sequence[Code]) -> Steps:
    """First runs, in turn."""
    assert world.num_rows
    for _ in range(NUM_FIRST):
        for code in codes:
            yield "first", code, code.begin()
            shutil.rmtree(code.out)


def night(world: World, codes: Sequence[Code], rows: Sequence[int]) -> Steps:
    """A first run, a night with these rows edited, one with nothing to do, and what they differ."""
    for code in codes:
        yield "first", code, code.begin()
    world.edit(rows)
    for code in codes:
        found = code.step("run")
        assert found["computed"] == len(rows), found
        yield "edited", code, found
    for command in ("run", "diff", "verify"):
        for code in codes:
            yield f"then {command}", code, code.step(command)


def night_of(edits: Callable[[World], Sequence[int]], world: World, codes: Sequence[Code]) -> Steps:
    """The same with edits of one kind."""
    return night(world, codes, edits(world))


def together(world: World, codes: Sequence[Code]) -> Steps:
    """Nights of 200 edits each, one beside the other."""
    rng = random.Random(2)
    starts = [rng.randrange(world.num_rows - NUM_EDITS) for _ in range(NUM_NIGHTS)]
    return nights(world, codes, [range(start, start + NUM_EDITS) for start in starts])


def anywhere(world: World, codes: Sequence[Code]) -> Steps:
    """Nights of 200 edits each, at random places."""
    rng = random.Random(3)
    rows = range(world.num_rows)
    return nights(world, codes, [rng.sample(rows, NUM_EDITS) for _ in range(NUM_NIGHTS)])


def nights(world: World, codes: Sequence[Code], edits: Sequence[Sequence[int]]) -> Steps:
    """A first run and a night for each of `edits`; what all nights cost together."""
    for code in codes:
        code.begin()
    costs: dict[str, list[dict[str, Any]]] = {code.name: [] for code in codes}
    for number, rows in enumerate(edits):
        world.edit(rows, number + 1)
        for code in codes:
            costs[code.name].append(code.step("run"))
    for code in codes:
        found = costs[code.name]
        total = {key: round(sum(one[key] for one in found), 2) for key in found[0]}
        peak = max(one["peak_mib"] for one in found)
        yield f"{len(edits)} nights", code, {**total, "peak_mib": peak}


def scale(world: World, codes: Sequence[Code]) -> Steps:
    """Each step once: of a run that is killed, `resumed` is what comes after."""
    for code in codes:
        yield "first", code, (first := code.begin())
        shutil.rmtree(code.out)
        yield "plan", code, code.step("plan")
        code.step("run", kill_s=first["s"] * 0.7)
        yield "resume", code, code.step("run")
    rows = random.Random(4).sample(range(world.num_rows), min(1000, world.num_rows))
    world.edit(rows)
    for code in codes:
        yield "night of 1,000 edits", code, code.step("run")
    for command in ("verify", "diff"):
        for code in codes:
            yield command, code, code.step(command)


CASES: dict[str, Callable[[World, Sequence[Code]], Steps]] = {
    **{name: partial(night_of, edits) for name, edits in EDITS.items()},
    "each": each,
    "first": first,
    "together": together,
    "anywhere": anywhere,
    "scale": scale,
}


def line(sizes: Sequence[float], values: Sequence[float], at: float) -> tuple[float, float]:
    """Value of a straight line through points, and its standard error; errors grow with size."""
    weights = [1 / size**2 for size in sizes]
    mean_x, mean_y = (
        sum(w * v for w, v in zip(weights, those, strict=True)) / sum(weights)
        for those in (sizes, values)
    )
    points = list(zip(weights, sizes, values, strict=True))
    spread = sum(w * (x - mean_x) ** 2 for w, x, _ in points)
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, x, y in points) / spread
    rest = sum(w * (y - mean_y - slope * (x - mean_x)) ** 2 for w, x, y in points)
    freedom = max(len(points) - 2, 1)
    error = math.sqrt(rest / freedom * (1 / sum(weights) + (at - mean_x) ** 2 / spread))
    return mean_y + slope * (at - mean_x), error


def main() -> None:
    """Make the rows, run the nights, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, default="one")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000], help="sizes")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--row-bytes", type=int, default=950, help="with the line break; >= 100")
    parser.add_argument("--against", type=Path, help="a checkout of another version")
    parser.add_argument("--fit", type=float, default=1e9, help="rows to foretell, of several sizes")
    parser.add_argument("--folder", help="where to work; default: a temp folder")
    args = parser.parse_args()
    about = {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "batchgen": batchgen.__version__,
        "command": " ".join(["python -m tests.bench.nights", *sys.argv[1:]]),
    }
    print(json.dumps(about))
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for num_rows in args.rows:
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="nights-") as name:
            folder = Path(name)
            codes = [Code("here", Path(batchgen.__file__).parents[1], folder)]
            if args.against is not None:
                codes.append(Code("against", args.against.resolve(), folder))
            world = World(folder, num_rows, args.files, args.row_bytes)
            world.make()
            for step, code, cost in CASES[args.case](world, codes):
                told = {"case": args.case, "rows": num_rows, "step": step, "code": code.name}
                print(json.dumps({**told, **cost}), flush=True)
                found.setdefault((step, code.name), []).append(cost)
    for step in {step: 1 for step, name in found if name == "against"}:
        pairs = zip(found[step, "against"], found[step, "here"], strict=True)
        ratios = [there["s"] / here["s"] for there, here in pairs]
        print(json.dumps({"step": step, "ratio": round(median(ratios), 2), "pairs": len(ratios)}))
    for (step, name), costs in found.items() if len(args.rows) > 2 else ():
        for key in ("s", "planned_s", "peak_mib"):
            if key in costs[0]:
                values = [cost[key] for cost in costs]
                value, error = line(args.rows, values, args.fit)
                told = {"fit": args.fit, "step": step, "code": name}
                print(json.dumps({**told, key: round(value), "error": round(error)}))


if __name__ == "__main__":
    main()
