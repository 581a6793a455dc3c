"""`python -m tests.acting UID GID UMASK VERB ARGS...`: batchgen's command line as another user.

All is used once before, and so imported: that user need not be able to read where Python is.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

import polars as pl

import batchgen
from batchgen import cli
from tests.e2e.support import write_job, write_rows


def read(root: str | Path) -> None:
    """Print how many rows readers find, by Python and by the folder's names."""
    by_name = pl.read_parquet(f"{root}/part-*.parquet").height
    print(batchgen.read(root).select(pl.len()).collect().item(), by_name)


def warm(asked: str) -> None:
    """Do once what is asked, after a run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "in.jsonl", 60)
        job = str(write_job(folder, "in.jsonl"))
        for number, verb in enumerate(("run", *({asked} - {"read"}))):
            write_rows(folder / "in.jsonl", 60 + number)
            args = [verb, job, *(["--keep", "1"] if verb == "prune" else [])]
            with contextlib.suppress(SystemExit):
                cli.cli.main(args, standalone_mode=False)
        read(folder / "out")


if __name__ == "__main__":
    uid, gid, umask, *args = sys.argv[1:]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warm(args[0])
    os.umask(int(umask, 8))
    os.setgroups([])
    os.setgid(int(gid))
    os.setuid(int(uid))
    if args[0] == "read":
        read(args[1])
    else:
        sys.argv = ["batchgen", *args]
        cli.main()
