"""Published rows per second by one process and by several.

    python -m tests.bench.publishing --rows 2000000 --processes 1 4 16

Parts are made once, of rows with a text of about 1 KB and an answer; then a snapshot is written of
them by each number of processes, pinned to as many cores, with nothing else of a run. Prints a JSON
line for each: `of_linear` is the speed over that of one process times as many.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.storage import LocalStorage
from batchgen.store.books import FILES, PARTS, PartFooter, Plan
from batchgen.store.parts import Parts
from batchgen.store.result_files import PartContext, PartWriter, part_schema
from batchgen.store.snapshot import SnapshotFormat, write_snapshot
from tests.fakes import plan

PART_ROWS = 10_000
CARRIED = pa.schema([("id", pa.string()), ("text", pa.string())])
SCHEMA = part_schema(CARRIED, [pa.field("text", pa.string())], "gen_")


def main() -> None:
    """Make the parts, publish them by each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", help="where to work; default: a temp folder")
    parser.add_argument("--publish", help="publish the parts in this folder, no more")
    args = parser.parse_args()
    if args.publish is not None:
        print(publish(LocalStorage(Path(args.publish)), args.rows))
        return
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="publishing-") as name:
        make_parts(LocalStorage(Path(name)), plan(args.rows))
        words = [sys.executable, "-m", "tests.bench.publishing", "--rows", str(args.rows)]
        speed_of_one = 0.0
        for num in args.processes:
            os.sched_setaffinity(0, cores[:num])  # Of what is started from here: all its threads.
            told = subprocess.run([*words, "--publish", name], check=True, capture_output=True)
            os.sched_setaffinity(0, cores)
            seconds = float(told.stdout)
            speed = args.rows / seconds
            speed_of_one = speed_of_one or speed / num
            report = {
                "processes": num,
                "rows": args.rows,
                "s": round(seconds, 2),
                "rows_per_s": round(speed),
                "of_linear": round(speed / num / speed_of_one, 2),
                "cpus": len(cores),
                "machine": platform.machine(),
            }
            print(json.dumps(report), flush=True)


def publish(storage: LocalStorage, num_rows: int) -> float:
    """Write a snapshot of parts; return how many seconds it took."""
    names = storage.list(PARTS)
    footers = [pq.read_metadata(storage.path(name)).metadata for name in names]
    parts = list(zip(names, map(PartFooter.from_metadata, footers), strict=True))
    form = SnapshotFormat(SCHEMA, "gen_", "zstd", 1_000_000, {})
    begun_s = time.monotonic()
    readers = Parts(storage, parts, SCHEMA)
    files = write_snapshot(readers, plan(num_rows), (), form, f"{FILES}/e000001", worth_bytes=0)
    seconds = time.monotonic() - begun_s
    assert sum(file.num_rows for file in files) == num_rows
    shutil.rmtree(storage.path(FILES))
    return seconds


def make_parts(storage: LocalStorage, made: Plan) -> None:
    """Parts of a finished job."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(5000)]
    spread = " ".join(rng.choices(words, k=200_000))
    starts = [rng.randrange(len(spread) - 1000) for _ in range(PART_ROWS)]
    writer = PartWriter(storage, PARTS, PartContext(made.plan_id, 1, 0, "run-1", SCHEMA, "gen_"))
    for first in range(0, made.num_rows, PART_ROWS):
        num = min(PART_ROWS, made.num_rows - first)
        rows = range(first, first + num)
        texts = [f"{row} {spread[at : at + 900]}" for row, at in zip(rows, starts, strict=False)]
        columns = {
            "_batchgen_segment": [0] * num,
            "_batchgen_row": rows,
            "id": [f"r{row}" for row in rows],
            "text": texts,
            "gen_text": [text[:200] for text in texts],
            "gen_request_key": [f"{rng.getrandbits(128):032x}" for _ in rows],
        }
        for field in SCHEMA:
            is_text = pa.types.is_string(field.type)
            value = None if field.nullable else "ok" if is_text else 1
            columns.setdefault(field.name, [value] * num)
        table = pa.table([pa.array(columns[one.name], one.type) for one in SCHEMA], schema=SCHEMA)
        writer.commit_table(table, {}, {"engine": "echo", "version": "1"})


if __name__ == "__main__":
    main()
