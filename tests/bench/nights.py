"""What a night costs on the echo engine: nothing changed, and 1 % of the rows edited in place.

    python -m tests.bench.nights --rows 1000000 --row-bytes 1000 --edited 0.01

Each night is a process of its own, measured from outside: wall time from its start to its end,
and the peak memory of it and its children. The rows are of equal length, so that some can be
edited in place. Prints one JSON line.

`planned_s` is what the run says of itself: until it was known which rows have to be computed. A
night with edits reads all rows of the files that changed by then, and compares them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import batchgen

NUM_FILES = 8
SPREAD = 1 << 20
"""Texts are slices of so many characters of random words."""
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
path = "out"
"""


def main() -> None:
    """Make the rows, run the nights, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--row-bytes", type=int, default=1000, help="with the line break; >= 100")
    parser.add_argument("--edited", type=float, default=0.01, help="share of the rows, 0 to 1")
    parser.add_argument("--folder", help="where to work; default: a temp folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="nights-") as name:
        report = _measure(Path(name), args)
    report |= {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "batchgen": batchgen.__version__,
        "command": " ".join(["python -m tests.bench.nights", *sys.argv[1:]]),
    }
    print(json.dumps(report))


def _measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    # In a process of its own: what this one ever held would count as its children's peak.
    (folder / "job.toml").write_text(JOB, encoding="utf-8")
    words = (sys.executable, "-c", "from tests.bench import nights; nights.make_rows()")
    subprocess.run([*words, str(folder), str(args.rows), str(args.row_bytes)], check=True)
    report = {"rows": args.rows, "row_bytes": args.row_bytes}
    report["first"] = first = _night(folder)
    assert first["computed"] == args.rows, first
    report["unchanged"] = unchanged = _night(folder)
    assert unchanged["state"] == "nothing_to_do", unchanged
    num_edited = edit_rows(folder, args.rows, args.row_bytes, args.edited)
    report["edited"] = edited = _night(folder)
    assert edited["computed"] == num_edited, edited
    edited["found_rows_per_s"] = round(args.rows / max(edited["planned_s"], 0.01))
    return report


def _night(folder: Path) -> dict[str, Any]:
    """Run the job in a process of its own; its summary and what it cost."""
    begun_s = time.monotonic()
    with (folder / "summary.json").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "batchgen", "run", str(folder / "job.toml"), "--json"],
            stdout=out,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
    elapsed_s = time.monotonic() - begun_s
    process.returncode = os.waitstatus_to_exitcode(status)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert process.returncode == 0, summary
    return {
        "state": summary["state"],
        "computed": summary["run"]["num_ok"] + summary["run"]["num_errors"],
        "carried": summary["num_carried"],
        "elapsed_s": round(elapsed_s, 2),
        "planned_s": round(summary["planned_s"], 2),
        "peak_mib": usage.ru_maxrss // 1024,
    }


def make_rows() -> None:
    """Write the input files: folder, number of rows and bytes of each are in `sys.argv`."""
    folder, num_rows, row_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(5000)]
    text = " ".join(rng.choices(words, k=SPREAD // 5))
    (folder / "data").mkdir()
    for number, (start, stop) in enumerate(_shares(num_rows)):
        with _path(folder, number).open("wb", buffering=1 << 20) as out:
            for row in range(start, stop):
                head = f'{{"id": "r{row:010}", "lang": "en", "text": "{row:010} '
                at = rng.randrange(len(text) - row_bytes)
                tail = text[at : at + row_bytes - len(head) - 3]
                out.write(f'{head}{tail}"}}\n'.encode())


def edit_rows(folder: Path, num_rows: int, row_bytes: int, share: float) -> int:
    """Change so many rows in place, spread over all files; return how many."""
    rows = range(0, num_rows, round(1 / share))
    for number, (start, stop) in enumerate(_shares(num_rows)):
        with _path(folder, number).open("r+b") as file:
            for row in rows:
                if start <= row < stop:
                    file.seek((row - start + 1) * row_bytes - len('EDIT"}\n'))
                    file.write(b"EDIT")
    return len(rows)


def _shares(num_rows: int) -> list[tuple[int, int]]:
    edges = [num_rows * number // NUM_FILES for number in range(NUM_FILES + 1)]
    return list(itertools.pairwise(edges))


def _path(folder: Path, number: int) -> Path:
    return folder / "data" / f"rows-{number}.jsonl"


if __name__ == "__main__":
    main()
