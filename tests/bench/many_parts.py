"""What resuming a job with very many parts costs: the claim, and which rows are left.

    python -m tests.bench.many_parts --parts 1000000

Parts are made by a script: real files with the footers of 1,000 rows each and no bytes of rows, as
the books never read rows. The first claim opens them all; a second one finds what they said rolled
up, and so do the rows that are missing. Each in a process of its own, of which the time and the
peak memory are measured. Prints a JSON line for each.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.core.records import Ranges, RowSet
from batchgen.pipeline.rows import missing
from batchgen.storage import LocalStorage
from batchgen.store.books import FOOTER_KEY, PARTS, PartFooter, Plan, Segment
from batchgen.store.footers import FOOTERS
from batchgen.store.ledger import Ledger
from tests.fakes import plan

ROWS = 1000
SEGMENTS = 100


def main() -> None:
    """Make the parts, claim twice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=int, default=100_000)
    parser.add_argument("--folder", help="where to work; default: a temp folder")
    parser.add_argument("--step", choices=["make", "claim"], help="this one only, in the folder")
    args = parser.parse_args()
    if args.step is not None:
        root = Path(args.folder) / "out"
        print(json.dumps({"make": make, "claim": claim}[args.step](root, args.parts)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="parts-") as folder:
        words = [sys.executable, "-m", "tests.bench.many_parts", "--parts", str(args.parts)]
        for step in ("make", "claim", "claim"):
            subprocess.run([*words, "--folder", folder, "--step", step], check=True)


def planned(num_parts: int) -> Plan:
    """A job of as many rows as the parts hold, and one more."""
    per_segment = ROWS * -(-num_parts // SEGMENTS)
    segment = Segment("/in/a.jsonl", 1, "1", "d", per_segment)
    return replace(plan(1), carried=["id"], segments=[segment] * SEGMENTS)


def make(root: Path, num_parts: int) -> dict[str, object]:
    """Write parts whose footers say what those of a real run do."""
    begun_s = time.monotonic()
    job = planned(num_parts)
    ledger = Ledger(LocalStorage(root))
    ledger.put_plan(job)
    ledger.claim(job, "run-1", {"host": "h", "pid": 1})
    folder = root / PARTS
    folder.mkdir()
    data, mark = template(job), b'"0":[111111111111,222222222222]'
    at = data.index(mark)
    per_segment = job.segments[0].num_rows // ROWS
    for number in range(num_parts):
        segment, start = number // per_segment, number % per_segment * ROWS
        done = f'"{segment}":[{start},{start + ROWS}]'.encode()
        name = folder / f"e000001-w00-s{number:06d}.parquet"
        name.write_bytes(data[:at] + done.ljust(len(mark)) + data[at + len(mark) :])
    return {"step": "make", "s": round(time.monotonic() - begun_s, 1), "bytes": len(data)}


def template(job: Plan) -> bytes:
    """A part of `ROWS` rows in one column, which compress to nothing."""
    footer = PartFooter(
        plan=job.plan_id,
        epoch=1,
        run_id="run-1",
        done=RowSet({0: Ranges([(0, ROWS)])}),
        num_ok=ROWS - 8,
        num_errors=8,
        num_skipped=0,
        engine={
            "engine": "vllm",
            "version": "0.32.0",
            "device": "NVIDIA H200",
            "batchgen": "0.1.0",
        },
        tally={"verdict": {"ok": ROWS - 8, "error": 8}, "attempts": {"1": ROWS}},
    )
    text = footer.to_metadata()[FOOTER_KEY].replace(b"[0,1000]", b"[111111111111,222222222222]")
    table = pa.table({"id": pa.nulls(ROWS, pa.string())})
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({FOOTER_KEY: text}), sink)
    return sink.getvalue()


def claim(root: Path, num_parts: int) -> dict[str, object]:
    """Claim as the next run does, and find what is left."""
    begun_s = time.monotonic()
    job, ledger = planned(num_parts), Ledger(LocalStorage(root))
    is_rolled_up = bool(ledger.storage.list(FOOTERS))
    epoch = ledger.claim(job, "run-2", {"host": "h", "pid": 1})
    claimed_s = time.monotonic()
    left = missing(job, epoch.durable)
    assert len(epoch.durable.parts) == num_parts, epoch.durable.rejected
    return {
        "step": "claim",
        "parts": num_parts,
        "rolled_up": is_rolled_up,
        "claim_s": round(claimed_s - begun_s, 1),
        "missing_s": round(time.monotonic() - claimed_s, 1),
        "rows_left": left.num_rows,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "cpus": os.cpu_count(),
    }


if __name__ == "__main__":
    main()
