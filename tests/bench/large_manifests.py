"""What a snapshot of very many files costs: to publish it, to open it, to plan on it, to read one.

    python -m tests.bench.large_manifests --files 100000

Files are made by a script: one real file of 1,000 rows under so many names, each as if it had other
content. `publish` puts a manifest of them; `share` one that has another file in the middle; `open`
reads that; `plan` tells which of its files a night keeps if one row was edited, with a look at each
file's size and time; `read` finds the file that has one row, and reads it. Each in a process of its
own, of which the time and the peak memory are measured. Prints a JSON line for each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.core.records import Ranges, RowSet
from batchgen.pipeline.keeping import _keepable
from batchgen.storage import LocalStorage
from batchgen.store.books import FILES, LISTS, STATE, PublishedFile
from batchgen.store.ledger import Ledger
from batchgen.store.matching import Span
from batchgen.store.published import row_groups
from batchgen.store.visible import damage, note_as_published
from tests.fakes import manifest_of, plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchgen.pipeline.rows import Takeover

ROWS = 1000
READ = 500
"""Number of the file that is read."""


def main() -> None:
    """Make the files, then take each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--folder", help="where to work; default: a temp folder")
    parser.add_argument("--step", choices=STEPS, help="this one only, in the folder")
    args = parser.parse_args()
    if args.step is None:
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="manifests-") as folder:
            words = [sys.executable, "-m", "tests.bench.large_manifests"]
            for step in STEPS:
                asked = ["--files", str(args.files), "--folder", folder, "--step", step]
                subprocess.run([*words, *asked], check=True)
        return
    begun_s = time.monotonic()
    storage = LocalStorage(Path(args.folder) / "out")
    more = STEPS[args.step](storage, args.files)
    told = {
        "step": args.step,
        "files": args.files,
        "s": round(time.monotonic() - begun_s, 2),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "cpus": os.cpu_count(),
    }
    print(json.dumps({**told, **more}), flush=True)


def entry(number: int, size: int, epoch: int = 1) -> PublishedFile:
    """A file's line in the manifest, of about the length that it has in a real one."""
    digest = hashlib.sha256(f"{epoch}/{number}".encode()).hexdigest()
    return PublishedFile(
        f"{FILES}/e{epoch:06d}-{number:06d}-{digest[:16]}.parquet",
        ROWS,
        size,
        digest,
        footer_bytes=2000,
        footer_sha256=digest if number != READ else "",  # Whose bytes are believed, then.
        tally={"verdict": {"ok": ROWS}, "attempts": {"1": ROWS}},
        order=(number + 1) * 500,
    )


def make(storage: LocalStorage, num: int) -> dict[str, Any]:
    """Link one file under all names, and put the plans."""
    first = storage.path(f"{FILES}/any.parquet")
    first.parent.mkdir(parents=True)
    pq.write_table(pa.table({"id": range(ROWS)}), first)
    size = first.stat().st_size
    files = [entry(number, size) for number in range(num)]
    for file in (*files, entry(num // 2, size, epoch=2)):
        os.link(first, storage.path(file.name))
        if (file.order or 0) % 5_000_000 == 0:  # A file may have so many names, and no more.
            first = Path(shutil.copy(first, first.with_name(f"any-{file.order}.parquet")))
    note_as_published(storage, files)
    for number in (1, 2):
        Ledger(storage).put_plan(plan(num * ROWS, number=number, plan_id=f"plan-{number}"))
    return {"size": size}


def publish(storage: LocalStorage, num: int) -> dict[str, Any]:
    """Put the first manifest."""
    size = storage.path(f"{FILES}/any.parquet").stat().st_size
    files = [entry(number, size) for number in range(num)]
    Ledger(storage).put_manifest(manifest_of(files, plan_id="plan-1"))
    return {"lists": len(storage.list(LISTS))}


def share(storage: LocalStorage, num: int) -> dict[str, Any]:
    """Put one that has another file in the middle."""
    before, ledger = set(storage.list(LISTS)), Ledger(storage)
    old = ledger.manifest(1)
    assert old is not None
    files = list(old.files)
    files[num // 2] = replace(entry(num // 2, files[0].size_bytes, epoch=2))
    ledger.put_manifest(manifest_of(files, number=2, plan_id="plan-2", epoch=2), 1)
    new = [storage.path(name) for name in set(storage.list(LISTS)) - before]
    new.append(storage.path(f"{STATE}/manifests/000002.json"))
    return {"new_bytes": sum(path.stat().st_size for path in new)}


def open_newest(storage: LocalStorage, num: int) -> dict[str, Any]:
    """Read the newest manifest, as each command does."""
    found = Ledger(storage).latest_manifest()
    assert found is not None
    assert len(found.files) == num
    return {}


def keep(storage: LocalStorage, num: int) -> dict[str, Any]:
    """Tell which files a night keeps."""
    ledger = Ledger(storage)
    manifest, old = ledger.manifest(1), ledger.plan(1)
    assert manifest is not None
    assert not damage(storage, manifest.files)
    row = num * ROWS // 3
    spans = [Span(0, 0, 0, 0, row), Span(0, row + 1, 0, row + 1, num * ROWS - row - 1)]
    source = cast("Takeover", SimpleNamespace(spans=spans, old=old))
    kept = list(_keepable(source, manifest, old))
    assert len(kept) == num - 1
    return {"kept": len(kept)}


def read_one(storage: LocalStorage, _: int) -> dict[str, Any]:
    """Read one row's group."""
    ledger = Ledger(storage)
    row = READ * ROWS + 7
    wanted = RowSet({0: Ranges([(row, row + 1)])})
    groups = row_groups(storage, ledger.latest_manifest(), ledger.plan(2), wanted)
    (rows,) = [pq.ParquetFile(file.path).read_row_group(at) for file, at, _ in groups]
    assert rows.num_rows == ROWS
    return {}


STEPS: dict[str, Callable[[LocalStorage, int], dict[str, Any]]] = {
    "make": make,
    "publish": publish,
    "share": share,
    "open": open_newest,
    "plan": keep,
    "read": read_one,
}


if __name__ == "__main__":
    main()
