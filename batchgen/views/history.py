"""The snapshots of an output: which there are, and which go."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import OutputError
from batchgen.storage import LocalStorage
from batchgen.store.books import STATE
from batchgen.store.ledger import Ledger
from batchgen.store.runs import RunLock, new_run_id, utc_now
from batchgen.store.snapshot import beyond, prune_snapshots
from batchgen.store.visible import Fault, faults

if TYPE_CHECKING:
    from pathlib import Path

    from batchgen.store.books import Manifest


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

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def listed(root: Path) -> list[Listed]:
    """List the snapshots under an output folder, newest last.

    Raises:
        OutputError: The folder was written by another version.
    """
    ledger = Ledger(LocalStorage(root))
    return [_line(ledger, manifest) for manifest in ledger.manifests()]


def _line(ledger: Ledger, manifest: Manifest) -> Listed:
    entries = [*manifest.files, *([manifest.index] if manifest.index is not None else [])]
    return Listed(
        number=manifest.number,
        published_at=manifest.created_at,
        run_id=manifest.run_id,
        num_ok=manifest.num_ok,
        num_errors=manifest.num_errors,
        num_files=len(manifest.files),
        size_bytes=sum(entry.size_bytes for entry in entries),
        recipe=ledger.plan(manifest.number).recipe_fingerprint,
        is_shown=_is_shown(ledger.storage, manifest),
        overridden=[entry["name"] for entry in manifest.gate if entry.get("overridden")],
    )


def _is_shown(storage: LocalStorage, manifest: Manifest) -> bool:
    """The manifest is the commit point, but a run may have died before it exposed the files."""
    return not {*faults(storage, manifest.files).values()} - {Fault.FOREIGN}


def prune(root: Path, keep: int, *, dry_run: bool = False) -> list[Listed]:
    """Remove all but the newest snapshots under an output folder.

    Args:
        root: The output folder.
        keep: So many stay; at least 1.
        dry_run: Only tell what would go.

    Returns:
        What was removed, oldest first.

    Raises:
        BusyError: A run is at work on the job.
        OutputError: There is no job, or it is of another version.
    """
    storage = LocalStorage(root)
    if not storage.path(STATE).is_dir():
        msg = f"{root}: there is no job here to prune"
        raise OutputError(msg)
    ledger = Ledger(storage)
    if dry_run:
        return [_line(ledger, manifest) for manifest in beyond(ledger, keep)]
    lock = RunLock(storage, f"prune-{new_run_id(utc_now())}")
    lock.acquire(advice="prune when it has ended")
    try:
        lines = {found.number: _line(ledger, found) for found in ledger.manifests()}
        return [lines[manifest.number] for manifest in prune_snapshots(ledger, keep)]
    finally:
        lock.release()
