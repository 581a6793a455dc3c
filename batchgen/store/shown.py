"""What the output folder shows, `part-*.parquet`, beside what a manifest names.

A shown file is a hard link to the snapshot's own, so that mostly no byte must be read to know it.
"""

from __future__ import annotations

import re
import stat
import time
from enum import Enum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from batchgen.store.hashed import is_as_published
from batchgen.store.lock import RunLock
from batchgen.store.names import STATE

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from batchgen.storage import LocalStorage
    from batchgen.store.books import Manifest
    from batchgen.store.ledger import Ledger

_ALIAS = re.compile(r"part-\d{5,}\.parquet")
_READ_AS = "part-*.parquet"
"""How readers ask for the files."""
_LOOK_S = 0.05
_SEEN = "readers of part-*.parquet get its rows too"
_BY_HAND = "remove it or give it another name"
_NO_FILES: Sequence[Mapping[str, Any]] = ()


class Fault(Enum):
    """How a name in the output folder is not what the manifest says, in words for a warning."""

    MISSING = "was missing"
    OTHER = "was another file or a copy"
    """Its bytes may be the snapshot's all the same: whoever wants to know reads it."""
    SURPLUS = "was there beside them"
    FOREIGN = "is not batchgen's"
    """Readers take it for output, and no run touches it."""
    FOLDER = "is a folder"
    """No run can put a file in its place."""


_STRANGERS = {
    Fault.SURPLUS: f"is no file of the newest snapshot, {_SEEN}; {{run}} removes it",
    Fault.FOREIGN: f"is no file of batchgen's, {_SEEN}; {_BY_HAND}",
    Fault.FOLDER: f"is a folder, where only files belong; {_BY_HAND}",
}
"""What is to be told of names that no file of the snapshot is behind."""


def alias_of(file: Mapping[str, Any]) -> str:
    """The name under which a manifest's file is shown."""
    return str(file["name"]).rpartition("/")[2]


def is_alias(name: str) -> bool:
    """Whether a snapshot's file may be shown under that name, so that a run removes others'."""
    return _ALIAS.fullmatch(name) is not None


def faults(storage: LocalStorage, files: Sequence[Mapping[str, Any]]) -> dict[str, Fault]:
    """Shown name -> what is wrong with it; empty if all is as it should be. Reads no file.

    Args:
        storage: The output folder.
        files: The manifest's; none while nothing is published.

    Raises:
        StorageError: The folder cannot be listed.
    """
    found: dict[str, Fault] = {}
    names = {alias_of(file): str(file["name"]) for file in files}
    for alias, name in names.items():
        if (fault := _fault(storage, alias, name)) is not None:
            found[alias] = fault
    for alias in storage.list(""):
        if fnmatchcase(alias, _READ_AS) and alias not in names:
            found[alias] = _stranger(storage, alias)
    return found


def _fault(storage: LocalStorage, alias: str, name: str) -> Fault | None:
    shown = storage.path(alias)
    try:
        mode = shown.lstat().st_mode
    except FileNotFoundError:
        return Fault.MISSING
    if stat.S_ISDIR(mode):
        return Fault.FOLDER
    try:
        return None if shown.samefile(storage.path(name)) else Fault.OTHER
    except OSError:  # The snapshot's is gone, or this one is a link to nowhere.
        return Fault.OTHER


def _stranger(storage: LocalStorage, alias: str) -> Fault:
    path = storage.path(alias)
    if path.is_dir() and not path.is_symlink():
        return Fault.FOLDER
    return Fault.SURPLUS if is_alias(alias) else Fault.FOREIGN


def difference(path: Path, file: Mapping[str, Any]) -> str | None:
    """How a file is not the one that the manifest names; None if every byte is. Reads it.

    Args:
        path: Where it is now.
        file: The manifest's entry.
    """
    try:
        num_bytes = path.stat().st_size
        if num_bytes != file["size_bytes"]:
            return f"has {num_bytes:,} bytes, {file['size_bytes']:,} were published"
        is_same = is_as_published(path, file)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if is_same else "has other bytes than were published (sha256 differs)"


def shown_problems(
    ledger: Ledger, manifest: Manifest | None, damaged: Collection[str], patience_s: float
) -> list[str]:
    """`file: what is wrong; what to do` for what readers of the output folder see.

    Args:
        ledger: The job's books.
        manifest: The newest; None while nothing is published.
        damaged: Names of those of the snapshot's own files that are not what was published.
        patience_s: How long a run at work may stand still while it shows its files.
    """
    files = {alias_of(file): file for file in (manifest.files if manifest else _NO_FILES)}
    is_last = manifest is not None and manifest.number == ledger.latest_plan_number()
    # A run that goes on with an unfinished plan shows nothing before it publishes.
    mends = "the next `batchgen run`" if is_last else "the next `batchgen run` that completes"
    found = _lasting(ledger, list(files.values()), patience_s)
    told: list[str] = []
    for name, fault in found.items():
        if fault in _STRANGERS:
            told.append(f"{name}: {_STRANGERS[fault].format(run=mends)}")
            continue
        file = files[name]
        missing = "is missing in the output folder" if fault is Fault.MISSING else None
        if wrong := missing or difference(ledger.storage.path(name), file):
            is_damaged = file["name"] in damaged
            remedy = f"mend {file['name']} first" if is_damaged else f"{mends} puts it right"
            told.append(f"{name}: {wrong}; {remedy}")
    return told


def _lasting(
    ledger: Ledger, files: Sequence[Mapping[str, Any]], patience_s: float
) -> dict[str, Fault]:
    """The faults that stay: a run that publishes puts its files there one after the other."""
    lock = RunLock(ledger.storage, f"{STATE}/lock", "")
    found: dict[str, Fault] | None = None
    changed_s = time.monotonic()
    while True:
        # In this order: what a run left that has let go since, it has left for good.
        is_at_work = lock.is_held()
        before, found = found, faults(ledger.storage, files)
        if found != before:
            changed_s = time.monotonic()
        if not found or not is_at_work or time.monotonic() - changed_s >= patience_s:
            return found
        time.sleep(_LOOK_S)
