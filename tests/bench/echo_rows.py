"""What the pipeline around the engine can do: rows of about 1 KB through the echo engine.

    python -m tests.bench.echo_rows --rows 1000000

Reads, renders, hashes, commits and publishes for real; the engine answers at once. Prints one
JSON line: rows per second over the whole run (planning and publishing included), peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import tempfile
import time
from pathlib import Path

import orjson

import batchgen


def main() -> None:
    """Make the rows, run the job, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_bytes = _write_rows(folder / "in.jsonl", args.rows)
        started = time.monotonic()
        summary = batchgen.run(
            {
                "input": {"path": str(folder / "in.jsonl")},
                "prompt": {"system": "Repeat.", "user": "{{ lang }}: {{ text }}"},
                "model": {"backend": "echo"},
                "sampling": {"max_tokens": 64, "temperature": 0},
                "output": {"path": str(folder / "out")},
                "checks": {"allow_truncated": True},
            }
        )
        elapsed_s = time.monotonic() - started
    report = {
        "state": summary.state,
        "rows": summary.num_ok,
        "bytes_per_row": num_bytes // args.rows,
        "elapsed_s": round(elapsed_s, 1),
        "rows_per_s": round(summary.num_ok / elapsed_s),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "batchgen": batchgen.__version__,
    }
    print(json.dumps(report))


def _write_rows(path: Path, num_rows: int) -> int:
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(5000)]
    with path.open("wb") as out:
        for number in range(num_rows):
            text = " ".join(rng.choices(words, k=140))
            row = {"id": f"r{number}", "n": number, "text": text, "lang": "en"}
            out.write(orjson.dumps(row) + b"\n")
    return path.stat().st_size


if __name__ == "__main__":
    main()
