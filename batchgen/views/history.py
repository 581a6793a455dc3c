"""The snapshots of an output: which there are, and which go."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from batchgen.core.errors import OutputError
from batchgen.core.places import Root
from batchgen.storage.remote import storage_at
from batchgen.store.books import STATE, Manifest, PublishedFile
from batchgen.store.ledger import Ledger
from batchgen.store.prune import Keep, Outdated, outdated
from batchgen.store.prune import prune as remove_outdated
from batchgen.store.runs import RunLock, new_run_id, utc_now
from batchgen.store.visible import Fault, faults

if TYPE_CHECKING:
    from batchgen.storage import LocalStorage


@dataclass(frozen=True, slots=True)
class Listed:
    """What is listed of a snapshot."""

    number: int
    """Number of its plan, which `--snapshot` and `diff` take."""
    published_at: str
    run_id: str
    """The run that published it."""
    num_ok: int
    num_errors: int
    num_files: int
    size_bytes: int
    """Size of its files and its index; hard links in the output folder cost nothing more."""
    recipe: str
    """Fingerprint of the recipe, 32 hex digits."""
    is_shown: bool
    """Whether `part-*.parquet` in the output folder are its files."""
    overridden: list[str]
    """Limits of the gate that it exceeds and was published over."""


def listed(root: Root) -> list[Listed]:
    """List the snapshots under an output folder, newest last.

    Raises:
        OutputError: The folder was written by another version.
    """
    ledger = Ledger(storage_at(root))
    manifests = ledger.manifests()
    return [_line(ledger, one, is_newest=one is manifests[-1]) for one in manifests]


def _entries(manifest: Manifest) -> Sequence[PublishedFile]:
    """All files of a snapshot."""
    return [*manifest.files, *([manifest.index] if manifest.index is not None else [])]


def _line(ledger: Ledger, manifest: Manifest, *, is_newest: bool = False) -> Listed:
    return Listed(
        number=manifest.number,
        published_at=manifest.created_at,
        run_id=manifest.run_id,
        num_ok=manifest.num_ok,
        num_errors=manifest.num_errors,
        num_files=len(manifest.files),
        size_bytes=sum(entry.size_bytes for entry in _entries(manifest)),
        recipe=ledger.plan(manifest.number).recipe_fingerprint,
        is_shown=_is_shown(ledger.storage, manifest) if ledger.storage.shows else is_newest,
        overridden=[entry["name"] for entry in manifest.gate if entry.get("overridden")],
    )


def _is_shown(storage: LocalStorage, manifest: Manifest) -> bool:
    """The manifest is the commit point, but a run may have died before it exposed the files."""
    return not {*faults(storage, manifest.files).values()} - {Fault.FOREIGN}


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed, or would be."""

    removed: list[Listed]
    """Snapshots, the oldest first."""
    runs: list[str]
    """Runs whose logs and figures went."""
    freed_bytes: int
    """Size of the files that no other snapshot shares, and of those runs' folders."""


def prune(
    root: Root, keep: int = 1, *, older_than_s: float | None = None, dry_run: bool = False
) -> Pruned:
    """Remove old snapshots under an output folder, and what only they needed.

    Args:
        root: The output folder.
        keep: So many of the newest stay; at least 1.
        older_than_s: Only what is older than so many seconds goes; None: whatever its age.
        dry_run: Only tell what would go.

    Raises:
        BusyError: A run is at work on the job.
        OutputError: There is no job, or it is of another version.
    """
    storage = storage_at(root)
    if STATE not in storage.list(""):
        raise OutputError(f"{root}: there is no job here to prune")
    ledger = Ledger(storage)
    since = None if older_than_s is None else utc_now() - timedelta(seconds=older_than_s)
    what = Keep(keep, since)
    lock = RunLock(storage, f"prune-{new_run_id(utc_now())}")
    if not dry_run:
        lock.acquire(advice="prune when it has ended")
    try:
        found = outdated(ledger, what)
        pruned = Pruned(
            [_line(ledger, manifest) for manifest in found.manifests],
            [folder.rpartition("/")[2] for folder in found.runs],
            _freed_bytes(ledger, found),
        )
        if not dry_run:
            remove_outdated(ledger, what)
    finally:
        lock.release()
    return pruned


def _freed_bytes(ledger: Ledger, found: Outdated) -> int:
    gone = {one.number for one in found.manifests}
    sizes = {entry.name: entry.size_bytes for one in found.manifests for entry in _entries(one)}
    for manifest in ledger.manifests():
        if manifest.number not in gone:
            for entry in _entries(manifest):
                sizes.pop(entry.name, None)
    freed = sum(sizes.values())
    for run in found.runs:
        with suppress(OSError):  # Gone meanwhile, or another user's.
            freed += ledger.storage.num_bytes(run)
    return freed
