"""The command line that all proofs share: an amount, a seed, and workers started fresh."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from tests.torture.support import ProofError

if TYPE_CHECKING:
    from collections.abc import Callable

REPO = Path(__file__).parents[2]


def main(
    module: str,
    unit: str,
    shard: Callable[[Path, str, int], Counter[str]],
    amount: int,
    *,
    is_split: bool = True,
    in_memory: bool = False,
) -> None:
    """Run `amount` in several fresh processes, print the sums; exit 1 on a broken promise.

    Args:
        module: To start the workers by.
        unit: What is counted: names the option.
        shard: Does its share in a folder with a seed; returns counts.
        amount: Default of the option.
        is_split: Give each worker its share of the amount; else all of it, and the worker's
            number, the last word of its seed, says which share is its.
        in_memory: Work in /dev/shm where there is one: what is proven does not depend on the disk.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument(f"--{unit}", dest="amount", type=int, default=amount)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temp folder")
    parser.add_argument("--shard", action="store_true", help="be one worker")
    args = parser.parse_args()
    if args.shard:
        _one(args.folder, args.seed, args.amount, shard)
        return
    began_s = time.monotonic()
    if args.folder is None and in_memory and os.access("/dev/shm", os.W_OK):
        args.folder = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="torture-") as folder:
        counts, failed = _all(module, unit, args, Path(folder), is_split=is_split)
    sys.stdout.write(f"{module}: seed {args.seed}, {time.monotonic() - began_s:.0f} s\n")
    for name, count in sorted(counts.items()):
        sys.stdout.write(f"  {count:8,}  {name}\n")
    for text in failed:
        sys.stdout.write(f"BROKEN: {text}\n")
    sys.exit(bool(failed))


def _one(
    folder: Path, seed: str, amount: int, shard: Callable[[Path, str, int], Counter[str]]
) -> None:
    try:
        counts = shard(folder, seed, amount)
    except ProofError as error:
        sys.stdout.write(json.dumps({"failed": str(error)}))
        sys.exit(1)
    except BaseException:
        sys.stdout.write(json.dumps({"failed": traceback.format_exc()}))
        raise
    sys.stdout.write(json.dumps({"counts": counts}))


def _all(
    module: str, unit: str, args: argparse.Namespace, folder: Path, *, is_split: bool
) -> tuple[Counter[str], list[str]]:
    workers = []
    for number in range(args.workers):
        here = folder / str(number)
        here.mkdir()
        share = args.amount
        if is_split:
            share = args.amount // args.workers + (number < args.amount % args.workers)
        command = [sys.executable, "-m", module, "--shard", f"--{unit}", str(share)]
        command += ["--seed", f"{args.seed}.{number}", "--folder", str(here)]
        workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    counts: Counter[str] = Counter()
    failed = []
    for worker in workers:
        out, _ = worker.communicate()
        told = json.loads(out) if out.startswith("{") else {"failed": f"a worker died: {out}"}
        counts.update(told.get("counts", {}))
        failed += [told["failed"]] if "failed" in told else []
    return counts, failed


def prove(module: str, *args: str, timeout_s: float = 280) -> str:
    """Run a proof from pytest, in a process of its own; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", module, *args],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return done.stdout
