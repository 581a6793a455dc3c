"""Where the ledger's files are, under the output folder."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchgen.store.books import Manifest

STATE = "_batchgen"
PARTS = f"{STATE}/parts"
_NUMBERED = re.compile(r"\d{6}\.json")
_WORKER = re.compile(r"e\d+-w(\d+)")


def folder_of(manifest: Manifest) -> str:
    """Where the snapshot's files are."""
    return f"{STATE}/snapshots/e{manifest.epoch:06d}"


def numbered(kind: str, number: int) -> str:
    """A plan, a claim or a manifest."""
    return f"{STATE}/{kind}/{number:06d}.json"


def rejection_of(part: str) -> str:
    """The mark that leaves a part out."""
    return f"{STATE}/rejected/{part.rpartition('/')[2]}.json"


def seal_of(epoch: int, worker: int) -> str:
    """What says which parts of a worker count."""
    return f"{STATE}/seals/e{epoch:06d}-w{worker:02d}.json"


def worker_of(name: str) -> int:
    """Worker of a part or of a seal; -1 for what is neither."""
    match = _WORKER.match(name.rpartition("/")[2])
    return int(match.group(1)) if match else -1


def epoch_of(name: str) -> int:
    """Epoch of a part or of its temp file, from `e000003-w00-s000012.parquet`."""
    digits = name.rpartition("/")[2].lstrip(".")[1:7]
    return int(digits) if digits.isdigit() else 0


def number_of(name: str) -> int:
    """Of a numbered file."""
    return int(name.rpartition("/")[2].partition(".")[0])


def is_numbered(name: str) -> bool:
    """Whether it is a plan, a claim or a manifest, and no other file beside them."""
    return _NUMBERED.fullmatch(name.rpartition("/")[2]) is not None
