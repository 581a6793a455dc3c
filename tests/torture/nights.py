"""Proof 8: random worlds of input files, edited at random night after night, crashed at random.

Every published night must equal a first run over the same input into a new folder. And no answer
is computed that was durable already: a run computes each text that nobody has answered, once. Files
that are written again although their input files are as they were are counted.

Files, rows and edits are few and alike on purpose: equal texts, equal lines, files that swap names
and files that come back are what reuse can get wrong.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections import Counter
from contextlib import redirect_stderr
from io import StringIO
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from batchgen.storage import LocalStorage
from batchgen.store import keys, matching, snapshot
from batchgen.store.books import STATE, Places
from batchgen.store.ledger import Ledger
from tests.e2e.support import as_vectors
from tests.torture.disks import CrashError, CrashingDisk
from tests.torture.harness import main
from tests.torture.support import (
    Job,
    ProofError,
    manifest_of,
    published,
    replayable,
    run_here,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

NIGHTS = 3
TEXTS = 30
"""Different texts that good rows have."""
MOST_CALLS = 90
"""A run crashes at one of so many calls of its disk, if it comes so far."""
BAD = ('{"text": ', "7", "", " ", '{"id": 7, "note": 3}', '{"id": "x", "text": "t1"}')
JOB = """
[input]
path = "data/*"
{input}
[prompt]
user = "{{{{ text }}}}{mark}"
[model]
backend = "echo"
[model.engine]
max_num_seqs = 4
max_steps = 3
max_model_len = 40
[sampling]
max_tokens = 100
temperature = {temperature}
[checks]
rules = {rules}
[gate]
max_error_rate = 1.0
max_shrink = 1.0
[output]
path = "out"
rows_per_file = 15
[run]
flush_rows = 4
max_in_flight = 8
disk_grace_s = 20.0
dedupe = "{dedupe}"
"""

TYPES = 'types = { id = "int64", text = "string", note = "string" }'
INPUTS = ("where = \"note <> 'n1' or note is null\"", 'columns = ["note", "text"]', "limit = 13")
RULES = """["note <> 'n2' or note is null"]"""

Files = dict[str, list[str]]
Input = tuple[str, str]
"""Path and content hash."""
_EDGE = ("", "")
"""Before the first input file, and after the last."""


def shard(folder: Path, seed: str, amount: int) -> Counter[str]:
    """So many worlds."""
    counts: Counter[str] = Counter()
    for number in range(amount):
        with replayable(f"seed {seed!r}, world {number}"), redirect_stderr(StringIO()):
            _set_sizes(number)
            World(folder / f"world-{number}", random.Random(f"{seed}/{number}"), counts).live()
        counts["worlds: every night equals a full recompute"] += 1
    return counts


def _set_sizes(number: int) -> None:
    """In some worlds, blocks so small that a dozen lines are several, and keys that collide.

    In most, published files are of some rows each, so that snapshots share them.
    """
    matching._BLOCK_ROWS = matching._AHEAD_ROWS = 3 if number % 2 else 2**18
    matching.MAX_SPANS = 4 if number % 6 == 1 else 500_000
    keys._HEX = 1 if number % 4 == 3 else 16
    snapshot.LEAST_BYTES = 128 * 2**10 if number % 5 == 4 else 2**9


class World:
    """A folder of input files, and a job over them."""

    def __init__(self, folder: Path, chance: random.Random, counts: Counter[str]) -> None:
        self.folder = folder
        self.chance = chance
        self.counts = counts
        self.out = folder / "out"
        self.data = folder / "data"
        self.data.mkdir(parents=True)
        self.files: Files = {}
        self.past: list[list[str]] = []
        self.dedupe = chance.choice(("auto", "always", "never"))
        self.is_vectors = chance.random() < 0.2
        self.temperature = 0 if self.is_vectors else chance.choice((0, 0, 0, 1))
        self.suffix = chance.choice((".jsonl", ".jsonl", ".jsonl.gz"))
        self.is_typed = chance.random() < 0.8
        self.rules = RULES if chance.random() < 0.2 else "[]"
        """A rule reads a carried column: the same answer may be refused for one row of two."""
        self.mark = ""
        """Of the recipe: a text has other answers by another one."""
        self.is_new_recipe = False
        self.is_selected = False
        """Rows or columns were chosen since the last run that came to its end."""
        self.job = Job(folder / "job.toml", 0)
        self.select()
        self.is_unfinished = False
        self._clock_ns = 10**18
        self._num_nights = 0

    def select(self) -> None:
        """Write the job, with a choice of rows and columns; no part of the recipe."""
        self.is_selected = True
        keys = [key for key in INPUTS if self.chance.random() < 0.2]
        text = "\n".join([*keys, TYPES] if self.is_typed else keys)
        job = JOB.format(
            input=text,
            mark=self.mark,
            temperature=self.temperature,
            dedupe=self.dedupe,
            rules=self.rules,
        )
        job = as_vectors(job) if self.is_vectors else job
        self.job.path.write_text(job, encoding="utf-8")

    def live(self) -> None:
        """Some nights; each may crash, and the input edited, before it comes to its end."""
        for name in ("a", "b", "c")[: self.chance.randint(1, 3)]:
            self.files[name] = self.lines(self.chance.randint(0, 12))
        for _ in range(NIGHTS):
            self.write()
            while self.chance.random() < 0.4:
                self.crash()
                if self.chance.random() < 0.7:
                    self.edit()
                    self.write()
            self.finish()
            self.edit()
            if self.chance.random() < 0.1:
                self.mark += "!"
                self.is_new_recipe = True
            if self.is_new_recipe or self.chance.random() < 0.2:
                self.select()
        shutil.rmtree(self.folder)

    def crash(self) -> None:
        """A run that dies at one of its calls, unless it ends before."""
        self.is_unfinished = True
        disk = CrashingDisk(self.chance.randrange(MOST_CALLS))
        try:
            run_here(self.job, self.out, disk=disk, **self.options())
            self.counts["runs that ended before their crash"] += 1
        except CrashError:
            disk.bury()
            self.counts["crashes"] += 1

    def options(self) -> dict[str, bool]:
        """What a run may be told and must come to the same with."""
        is_retry = not self.is_new_recipe and self.chance.random() < 0.15
        return {"retry_errors": is_retry, "accept_recipe": self.is_new_recipe}

    def finish(self) -> None:
        """Run to the end, and compare with a first run."""
        if not self.is_typed and not self.is_accepted():
            return
        self.run_to_the_end()
        rows = published(self.out)
        self._num_nights += 1
        whole = self.folder / f"whole-{self._num_nights}"
        self.run(whole)
        if rows != (expected := published(whole)):
            raise ProofError(_difference(rows, expected))
        shutil.rmtree(whole)
        self.counts["nights"] += 1
        self.counts["nights of vectors"] += self.is_vectors
        self.count_written()

    def count_written(self) -> None:
        """Count rows of the newest snapshot by whether its own run wrote their files."""
        manifest = manifest_of(self.out)
        assert manifest is not None
        for file in manifest["files"]:
            is_new = f"/e{manifest['epoch']:06d}-" in file["name"]
            self.counts["rows written" if is_new else "rows shared"] += file["num_rows"]

    def is_accepted(self) -> bool:
        """Whether columns can be made of the input, which only its rows tell."""
        told = run_here(self.job, self.folder / "refused")
        shutil.rmtree(self.folder / "refused", ignore_errors=True)
        self.counts["inputs without types"] += 1
        return bool(told["code"] == 0)

    def run_to_the_end(self) -> None:
        """Run until there is nothing to do.

        The first run may finish a plan that was begun before some file came: that one is the
        second run's.
        """
        for options in (self.options(), {}, {}):
            shown, durable, was_unfinished = self.shown(), self.durable(), self.is_unfinished
            is_other = was_unfinished or self.is_selected or any(options.values())
            tiles = self.tiles()
            told = self.run(self.out, **options)
            if told["text"] == "nothing_to_do":
                return
            self.check_computed(told["computed"], shown, durable, is_whole=not was_unfinished)
            if not is_other and self.is_typed and matching.MAX_SPANS > 4:
                self.check_written(*tiles)
            self.is_unfinished = self.is_new_recipe = self.is_selected = False
            if not was_unfinished and self.chance.random() < 0.7:
                return
        msg = "three runs over the same input, and there is still something to do"
        raise ProofError(msg)

    def run(self, out: Path, **options: bool) -> dict[str, Any]:
        """One run that nothing disturbs."""
        told = run_here(self.job, out, **options)
        if told["code"] != 0:
            msg = f"a run ended with {told}"
            raise ProofError(msg)
        return told

    def check_computed(
        self, computed: int, shown: set[str], durable: set[str], *, is_whole: bool
    ) -> None:
        """Every text that nobody had answered once, and no other.

        Args:
            computed: What the run says.
            shown: Texts whose answers were published before it.
            durable: Those that unfinished runs had left.
            is_whole: There was none.
        """
        texts = [row["text"] for row in published(self.out) if is_ok(row)]
        new = [text for text in texts if text not in shown | durable]
        least = most = len(set(new))
        if self.temperature and self.dedupe != "always":
            most = len(texts)  # Each has its own draw, but for what was taken over.
        elif self.dedupe == "never":
            # What an unfinished run left answers for equal rows only in another plan.
            least = len(new) if is_whole else least
            most = sum(text not in shown for text in texts)
        if keys._HEX < 16:
            most = len(texts)  # Whose key meets another's may be computed once more.
        if self.rules != "[]":
            least, most = 0, len(texts)  # The same text may stand in an error row.
        if not least <= computed <= most:
            msg = f"{computed} answers computed, expected {least} to {most}; new: {new}"
            raise ProofError(msg)
        self.counts["answers computed"] += computed
        self.counts["answers reused"] += len(texts) - computed

    def tiles(self) -> tuple[list[Input], list[tuple[str, int, int]]]:
        """Input files of the newest snapshot, and for each published file those that it is of."""
        ledger = Ledger(LocalStorage(self.out))
        if (manifest := ledger.latest_manifest()) is None:
            return [], []
        plan = ledger.plan(manifest.number)
        places, found = Places(plan), []
        for file, start in manifest.tiles():
            if numbers := [at for at, _, _ in places.spans(start, start + file.num_done)]:
                found.append((file.name, numbers[0], numbers[-1]))
        return [(one.path, one.digest) for one in plan.segments], found

    def check_written(self, inputs: list[Input], files: list[tuple[str, int, int]]) -> None:
        """Count files whose input files, and those of their neighbors, follow each other still.

        Beside others it may be written together with what changed.
        """
        now, after = self.tiles()
        new, names = [_EDGE, *now, _EDGE], {name for name, _, _ in after}
        edges = [("", -1, -1), *files, ("", len(inputs), len(inputs))]
        for (_, first, _), (name, _, _), (_, _, last) in zip(
            edges, edges[1:], edges[2:], strict=False
        ):
            around = [
                _EDGE if at in {-1, len(inputs)} else inputs[at] for at in range(first, last + 1)
            ]
            if any(new[at : at + len(around)] == around for at in range(len(new))):
                self.counts["files that had to be shared"] += 1
                # Counted only: seed 0.1, world 21 writes three of them again.
                self.counts["of these, written again"] += name not in names

    def shown(self) -> set[str]:
        """Texts whose answers by the recipe are published."""
        manifest = None if self.is_new_recipe else manifest_of(self.out)
        return answered(self.out / file["name"] for file in (manifest or {"files": ()})["files"])

    def durable(self) -> set[str]:
        """Texts whose answers are in parts."""
        return answered((self.out / STATE / "parts").glob("*.parquet"))

    # --- what people do to files -----------------------------------------------------------

    def line(self) -> str:
        """A row; some bad, blank, refused by the engine."""
        if self.chance.random() < 0.12:
            return self.chance.choice(BAD)
        text = f"t{self.chance.randrange(TEXTS)}"
        if self.chance.random() < 0.05:
            text = "long " * 10
        row = {"id": self.chance.randrange(9), "text": text, "note": self.note()}
        return json.dumps(row)

    def note(self) -> str | None:
        return self.chance.choice((None, "n1", "n2", "n3"))

    def lines(self, num: int) -> list[str]:
        return [self.line() for _ in range(num)]

    def edit(self) -> None:
        """One to five edits, or none."""
        self.past += [list(lines) for lines in self.files.values()]
        for _ in range(self.chance.choice((0, 1, 1, 2, 3, 5))):
            name = self.chance.choice(EDITS)
            getattr(self, f"edit_{name}")(self.chance.choice([*self.files]))
            self.counts[f"edits: {name}"] += 1

    def edit_line(self, name: str) -> None:
        """In place."""
        if lines := self.files[name]:
            lines[self.chance.randrange(len(lines))] = self.line()

    def edit_note(self, name: str) -> None:
        """A carried column, not the prompt."""
        lines = self.files[name]
        good = [at for at, line in enumerate(lines) if line.startswith("{") and line.endswith("}")]
        if good:
            at = self.chance.choice(good)
            lines[at] = json.dumps({**json.loads(lines[at]), "note": self.note()})

    def edit_insert(self, name: str) -> None:
        lines = self.files[name]
        at = self.chance.randint(0, len(lines))
        lines[at:at] = self.lines(self.chance.randint(1, 4))

    def edit_delete(self, name: str) -> None:
        lines = self.files[name]
        at = self.chance.randint(0, len(lines))
        del lines[at : at + self.chance.randint(1, 4)]

    def edit_duplicate(self, name: str) -> None:
        if lines := self.files[name]:
            lines.insert(self.chance.randint(0, len(lines)), self.chance.choice(lines))

    def edit_move(self, name: str) -> None:
        """Within the file or to another one."""
        if lines := self.files[name]:
            line = lines.pop(self.chance.randrange(len(lines)))
            other = self.files[self.chance.choice([*self.files])]
            other.insert(self.chance.randint(0, len(other)), line)

    def edit_shuffle(self, name: str) -> None:
        self.chance.shuffle(self.files[name])

    def edit_rename(self, name: str) -> None:
        self.files[self.free_name()] = self.files.pop(name)

    def edit_swap(self, name: str) -> None:
        other = self.chance.choice([*self.files])
        self.files[name], self.files[other] = self.files[other], self.files[name]

    def edit_copy(self, name: str) -> None:
        self.files[self.free_name()] = list(self.files[name])

    def edit_truncate(self, name: str) -> None:
        """Cut in the middle of a line."""
        if lines := self.files[name]:
            del lines[self.chance.randrange(len(lines)) + 1 :]
            at = self.chance.randint(min(5, len(lines[-1])), len(lines[-1]))  # Not mere braces.
            lines[-1] = lines[-1][:at]

    def edit_add_file(self, _: str) -> None:
        self.files[self.free_name()] = self.lines(self.chance.randint(0, 8))

    def edit_remove_file(self, name: str) -> None:
        if len(self.files) > 1:
            del self.files[name]

    def edit_bring_back(self, name: str) -> None:
        """A file as it was some time ago."""
        self.files[name] = list(self.chance.choice(self.past))

    def edit_touch(self, name: str) -> None:
        self.stamp(self.path(name))

    def free_name(self) -> str:
        """One that sorts anywhere among the others."""
        free = [name for name in "abcdefghijklmnopqrstuvwxyz" if name not in self.files]
        return self.chance.choice(free)

    # --- the disk --------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        return self.data / f"{name}{self.suffix}"

    def write(self) -> None:
        """Bring the folder to `files`; what is there already is not touched."""
        wanted = {self.path(name): self.encoded(lines) for name, lines in self.files.items()}
        for path in self.data.iterdir():
            if path not in wanted:
                path.unlink()
        for path, data in wanted.items():
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)
                self.stamp(path)

    def encoded(self, lines: list[str]) -> bytes:
        """Mostly with a line break at the end."""
        end = "" if self.chance.random() < 0.2 else "\n"
        data = ("\n".join(lines) + end).encode() if lines else b""
        return gzip.compress(data, mtime=0) if self.suffix.endswith(".gz") else data

    def stamp(self, path: Path) -> None:
        """Give a file a time that it never had: the kernel's clock may stand still meanwhile."""
        if path.exists():
            self._clock_ns += 10**6
            os.utime(path, ns=(self._clock_ns, self._clock_ns))


EDITS = [name.removeprefix("edit_") for name in vars(World) if name.startswith("edit_")]


def _difference(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> str:
    if len(rows) != len(expected):
        texts = [[row["text"] for row in found] for found in (rows, expected)]
        return f"{len(rows)} rows published, {len(expected)} expected: {texts}"
    found = [
        f"row {at}: {name} is {row[name]!r}, expected {other[name]!r}"
        for at, (row, other) in enumerate(zip(rows, expected, strict=True))
        for name in other
        if row[name] != other[name]
    ]
    return "; ".join(found[:6])


def answered(paths: Iterable[Path]) -> set[str]:
    """Texts that have an answer in these files."""
    found = set()
    for path in paths:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            rows = file.read(columns=["text", "gen_status"], use_threads=False).to_pylist()
        found |= {row["text"] for row in rows if is_ok(row)}
    return found


def is_ok(row: dict[str, Any]) -> bool:
    """Whether a published row has an answer."""
    return bool(row["gen_status"] == "ok")


if __name__ == "__main__":
    main("tests.torture.nights", "worlds", shard, 3000, in_memory=True)
