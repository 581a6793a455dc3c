"""What the output folder shows, `part-*.parquet`, beside what a manifest names.

A shown file is a hard link to the snapshot's own, so that mostly no byte must be read to know it.
It is one file with two names, so that whoever writes over the one changes the other. Therefore a
run looks at the snapshot's own files: another size is damage, and a file with another time or
inode number than noted is read once and noted anew.

A name tells the content, so it never stands for other bytes: what a reader has listed is what he
opens, or is gone. While names come and go, there is a file beside them that is no Parquet, so that
whoever lists the folder then gets an error, and never files of two snapshots.

    _batchgen/seen.json      name -> size, mtime in ns, inode number, when it was as published
"""

from __future__ import annotations

import json
import re
import secrets
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from batchgen.core.data import parse_state
from batchgen.core.errors import DamagedSnapshotError, StorageError
from batchgen.core.runtime import option
from batchgen.storage import LocalStorage, raise_if_not_damage
from batchgen.store.books import STATE, Manifest, PublishedFile
from batchgen.store.runs import RunLock

if TYPE_CHECKING:
    from batchgen.store.ledger import Ledger

_NOTES = f"{STATE}/seen.json"
_MOST_TOLD = 5
_MISSING = "is missing"
_ALIAS = re.compile(r"part-(\d{5,}|\d{8}-[0-9a-f]{8})\.parquet")
_READ_AS = "part-*.parquet"
"""How readers ask for the files."""
SWITCHING = "part-00000-switching.parquet"
"""What makes readers fail. It sorts before all others: many look at the first file only."""
_SWITCHING_TEXT = (
    "This is no Parquet, so that nobody reads the files beside it right now: a run is about to "
    "replace them by those of another snapshot. Try again in a moment. If this file stays, the run "
    "was killed, and the next one puts it right.\n"
)
_LOOK_S = 0.05
_SEEN = "readers of part-*.parquet get its rows too"
_BY_HAND = "remove it or give it another name"
_NO_FILES: Sequence[PublishedFile] = ()


class Fault(Enum):
    """How a name in the output folder is not what the manifest says, in words for a warning."""

    MISSING = "was missing"
    OTHER = "was another file or a copy"
    """Its bytes may be the snapshot's all the same: whoever wants to know reads it."""
    SURPLUS = "was there beside them"
    SWITCHING = "was left by a run that was stopped here"
    FOREIGN = "is not batchgen's"
    """Readers take it for output, and no run touches it."""
    FOLDER = "is a folder"
    """No run can put a file in its place."""


_STRANGERS = {
    Fault.SURPLUS: f"is no file of the newest snapshot, {_SEEN}; {{run}} removes it",
    Fault.SWITCHING: "keeps readers away since a run was stopped here; {run} removes it",
    Fault.FOREIGN: f"is no file of batchgen's, {_SEEN}; {_BY_HAND}",
    Fault.FOLDER: f"is a folder, where only files belong; {_BY_HAND}",
}
"""What is to be told of names that no file of the snapshot is behind."""


def is_switching(storage: LocalStorage) -> bool:
    """Whether readers are kept away: by a run at work, or by one that was killed."""
    return storage.shows and storage.read(SWITCHING) is not None


def is_alias(name: str) -> bool:
    """Whether a snapshot's file may be shown under that name, so that a run removes others'."""
    return _ALIAS.fullmatch(name) is not None


def faults(storage: LocalStorage, files: Sequence[PublishedFile]) -> dict[str, Fault]:
    """Shown name -> what is wrong with it; empty if all is as it should be. Reads no file.

    Args:
        storage: The output folder.
        files: The manifest's; none while nothing is published.

    Raises:
        StorageError: The folder cannot be listed.
    """
    found: dict[str, Fault] = {}
    if not storage.shows:
        return found
    names = {file.alias: file.name for file in files}
    noted = _noted(storage)
    for alias, name in names.items():
        if (fault := _fault(storage, alias, name, noted.get(alias))) is not None:
            found[alias] = fault
    for alias in storage.list(""):
        if fnmatchcase(alias, _READ_AS) and alias not in names:
            found[alias] = _stranger(storage, alias)
    return found


def _fault(
    storage: LocalStorage, alias: str, name: str, noted: Sequence[int] | None
) -> Fault | None:
    shown = storage.path(alias)
    try:
        mode = shown.lstat().st_mode
    except FileNotFoundError:
        return Fault.MISSING
    if stat.S_ISDIR(mode):
        return Fault.FOLDER
    is_right = False
    with suppress(OSError):  # The snapshot's is gone, or this one is a link to nowhere.
        is_right = shown.samefile(storage.path(name)) or storage.mark(alias) == noted
    return None if is_right else Fault.OTHER


def _stranger(storage: LocalStorage, alias: str) -> Fault:
    path = storage.path(alias)
    if path.is_dir() and not path.is_symlink():
        return Fault.FOLDER
    if alias == SWITCHING:
        return Fault.SWITCHING
    return Fault.SURPLUS if is_alias(alias) else Fault.FOREIGN


def damage(storage: LocalStorage, files: Sequence[PublishedFile]) -> dict[str, str]:
    """Own name -> how a snapshot's file is not what was published; notes those that are.

    Reads a file only if its time or inode number is not the noted one, as after a copy.

    Args:
        storage: The output folder.
        files: The manifest's.

    Raises:
        StorageError: A file cannot be read right now.
    """
    noted = _noted(storage)
    seen = {alias: noted[alias] for file in files if (alias := file.alias) in noted}
    found: dict[str, str] = {}
    for file in files:
        name = file.name
        try:
            mark = storage.mark(name)
            wrong = _wrong_kind(mark)
            if wrong is None and mark != noted.get(name):
                wrong = file.difference(storage.path(name))
        except OSError as error:
            raise_if_not_damage(storage.path(name), error)
            wrong = _MISSING
        if wrong is None and mark is not None:
            seen[name] = mark
        elif wrong is not None:
            found[name] = wrong
    if seen != noted:
        _note(storage, seen)
    return found


def note_as_published(storage: LocalStorage, files: Sequence[PublishedFile]) -> None:
    """Note files that were hashed while they were written, so that no run has to read them."""
    with suppress(OSError, StorageError):
        found = {file.name: storage.mark(file.name) for file in files}
        marks = {name: mark for name, mark in found.items() if mark is not None}
        _note(storage, {**_noted(storage), **marks})


def _noted(storage: LocalStorage) -> Mapping[str, Sequence[int]]:
    # Never synced: a power loss may have torn it. What cannot be read, the files tell as well.
    with suppress(ValueError, StorageError):
        found = parse_state(storage.read(_NOTES) or b"{}")
        return found if isinstance(found, dict) else {}
    return {}


def _note(storage: LocalStorage, seen: Mapping[str, Sequence[int]]) -> None:
    with suppress(StorageError):  # Lost notes cost a reading, no more.
        storage.replace(_NOTES, json.dumps(seen).encode())


def _wrong_kind(mark: Sequence[int] | None) -> str | None:
    """How there is no file under a snapshot's own name."""
    if mark is None:
        return _MISSING
    return "is a link or a folder, a file was published" if mark[0] < 0 else None


def told_difference(path: Path, file: PublishedFile) -> str | None:
    """How a file is not the one that the manifest names, or why it cannot be read; None if it is.

    Args:
        path: Where it is now.
        file: The manifest's entry.
    """
    try:
        return file.difference(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _is_whole(file: PublishedFile, path: Path) -> bool:
    return told_difference(path, file) is None


def lost_or_cut(storage: LocalStorage, files: Sequence[PublishedFile]) -> list[str]:
    """`name: how` for files of a snapshot that are not what was published. Reads no file."""
    found = []
    for file in files:
        mark = storage.mark(file.name)
        wrong = _wrong_kind(mark) or (file.other_size(mark[0]) if mark else None)
        if wrong:
            found.append(f"{file.name}: {wrong}")
    return found


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
    files = {file.alias: file for file in (manifest.files if manifest else _NO_FILES)}
    is_last = manifest is not None and manifest.number == ledger.latest_plan_number()
    # A run that goes on with an unfinished plan shows nothing before it publishes.
    mends = "the next run" if is_last else "the next run that completes"
    found = _lasting(ledger, list(files.values()), patience_s)
    told: list[str] = []
    for name, fault in found.items():
        if fault in _STRANGERS:
            told.append(f"{name}: {_STRANGERS[fault].format(run=mends)}")
            continue
        file = files[name]
        missing = "is missing in the output folder" if fault is Fault.MISSING else None
        if wrong := missing or told_difference(ledger.storage.path(name), file):
            is_damaged = file.name in damaged
            remedy = f"mend {file.name} first" if is_damaged else f"{mends} puts it right"
            told.append(f"{name}: {wrong}; {remedy}")
    return told


def _lasting(ledger: Ledger, files: Sequence[PublishedFile], patience_s: float) -> dict[str, Fault]:
    """The faults that stay: a run that publishes puts its files there one after the other."""
    lock = RunLock(ledger.storage)
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


class Shown(NamedTuple):
    """How the newest snapshot was found when it was shown."""

    mended: Sequence[str]
    """What was put right, for a warning where the snapshot is no new one."""
    damaged: Mapping[str, str]
    """Name of a file that is not what was published and was left as it is -> how it differs."""


def show(ledger: Ledger, manifest: Manifest) -> Shown:
    """Show the newest snapshot in the output folder and remove what nobody needs. Idempotent.

    The newest, which need not be `manifest`: a run that was frozen before this point must not
    bring an old snapshot back. A damaged file is brought back if the folder shows its bytes still.
    """
    storage = ledger.storage
    newest = ledger.latest_manifest() or manifest
    damaged = damage(storage, newest.files)
    mended = _brought_back(storage, newest, damaged) if damaged else []
    mended += _mended(storage, newest, damaged)
    newest = expose(ledger, newest, damaged)
    ledger.tidy(newest)
    return Shown(mended, damaged)


def raise_if_damaged(shown: Shown, storage: LocalStorage) -> None:
    """A job is not complete whose published rows are not there any more.

    Raises:
        DamagedSnapshotError: A file is damaged; the text says which, and what to do.
    """
    if not shown.damaged:
        return
    name, why = next(iter(shown.damaged.items()))
    more = (
        f", and {len(shown.damaged) - 1} more files are damaged" if len(shown.damaged) > 1 else ""
    )
    msg = (
        f"{storage.where}/{name}: {why}, expected the file that was published; so readers of "
        f"{name.rpartition('/')[2]} do not see its rows{more}: run with {option('--retry-errors')} "
        "to compute them again, or bring the file back from a backup"
    )
    raise DamagedSnapshotError(msg)


def _brought_back(storage: LocalStorage, manifest: Manifest, damaged: dict[str, str]) -> list[str]:
    """Take damaged files from the folder, if it shows others with their bytes; one line on each."""
    return [
        f"{file.name}: {damaged.pop(file.name)}; {told}"
        for file in manifest.files
        if file.name in damaged and (told := bring_back(storage, file))
    ]


def bring_back(storage: LocalStorage, file: PublishedFile) -> str:
    """Take a damaged file of a snapshot from the folder, if that has another with its bytes.

    Returns:
        What was done, in words; empty if there is none.

    Raises:
        StorageError: It cannot be taken.
    """
    if not storage.shows:
        return ""
    alias = file.alias
    shown = storage.path(alias)
    if shown.is_symlink() or not shown.is_file():
        return ""
    if not storage.expose(alias, file.name, partial(_is_whole, file)):
        return ""
    storage.settle(file.name.rpartition("/")[0])
    return f"brought back from {alias}, which is whole"


def _mended(storage: LocalStorage, manifest: Manifest, damaged: Collection[str]) -> list[str]:
    """One line on what showing this snapshot puts right, none if there is nothing."""
    left = {file.alias for file in manifest.files if file.name in damaged}
    found = [
        f"{name} {fault.value}"
        for name, fault in faults(storage, manifest.files).items()
        if fault is not Fault.FOREIGN and name not in left
    ]
    if not found:
        return []
    more = f" and {len(found) - _MOST_TOLD} more" if len(found) > _MOST_TOLD else ""
    told = ", ".join(found[:_MOST_TOLD])
    return [
        f"{storage.where}: did not show snapshot {manifest.number} as it was published ({told}"
        f"{more}); its files are shown again"
    ]


def expose(ledger: Ledger, manifest: Manifest, damaged: Collection[str] = ()) -> Manifest:
    """Show the newest snapshot as `part-*.parquet` in the output folder, but for damaged files.

    A run may be frozen at any step of it, and wake when another has shown a newer snapshot. So each
    step is made only while the file that keeps readers away is this run's own; else all begins
    anew. Two runs at a time take it from each other, and the one that has it last is through.

    Args:
        ledger: The job's books.
        manifest: The newest snapshot, as far as is known.
        damaged: Own names of files that are not what was published.

    Returns:
        What is shown.

    Raises:
        StorageError: A name cannot be given or removed; readers are kept away until a run can.
    """
    storage = ledger.storage
    if not storage.shows:
        return manifest
    for file in manifest.files:
        storage.protect(file.name)
    marker = f"{_SWITCHING_TEXT}{secrets.token_hex(8)}\n".encode()
    while True:
        manifest = ledger.latest_manifest() or manifest
        steps = list(_steps(storage, manifest, damaged))
        if not steps and not is_switching(storage):
            return manifest
        storage.replace(SWITCHING, marker)
        storage.settle("")
        is_through = all(_take(storage, step, marker) for step in steps)
        storage.settle("")
        newest = ledger.latest_manifest() or manifest
        if is_through and newest.number == manifest.number:
            if storage.read(SWITCHING) == marker:
                storage.remove(SWITCHING)
                storage.settle("")
            return manifest


def _steps(
    storage: LocalStorage, manifest: Manifest, damaged: Collection[str]
) -> Iterator[Callable[[], object]]:
    """Yield what gives a name or removes one, the new names first."""
    files = {file.alias: file for file in manifest.files}
    surplus = []
    for alias, fault in faults(storage, manifest.files).items():
        if fault is Fault.SURPLUS:
            surplus.append(alias)
        elif alias in files and files[alias].name not in damaged:
            yield partial(_give, storage, files[alias])
    for alias in surplus:
        yield partial(storage.remove, alias)


def _give(storage: LocalStorage, file: PublishedFile) -> None:
    storage.expose(file.name, file.alias)
    with suppress(FileNotFoundError):  # Whoever foretells a run gives no names.
        is_copy = not storage.path(file.alias).samefile(storage.path(file.name))
        if is_copy and (mark := storage.mark(file.alias)) is not None:
            _note(storage, {**_noted(storage), file.alias: mark})


def _take(storage: LocalStorage, step: Callable[[], object], marker: bytes) -> bool:
    """Take a step if nobody else has begun meanwhile; whether it was taken."""
    is_ours = storage.read(SWITCHING) == marker
    if is_ours:
        step()
    return is_ours
