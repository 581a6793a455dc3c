"""The snapshots that there are: one for each plan that was published and not pruned since."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen.core.errors import OutputError

if TYPE_CHECKING:
    from batchgen.store.books import Manifest
    from batchgen.store.ledger import Ledger


def snapshots(ledger: Ledger) -> list[Manifest]:
    """All of them, oldest first.

    Raises:
        OutputError: A manifest is not one that this version understands.
    """
    found = []
    manifest = ledger.latest_manifest()
    while manifest is not None:
        found.append(manifest)
        manifest = ledger.manifest_before(manifest.number)
    return found[::-1]


def snapshot(ledger: Ledger, number: int | None) -> Manifest:
    """A snapshot by number; None: the newest.

    Raises:
        OutputError: There is none, or not that one; the text says which there are.
    """
    manifest = ledger.latest_manifest() if number is None else ledger.manifest(number)
    if manifest is not None:
        return manifest
    numbers = ", ".join(str(manifest.number) for manifest in snapshots(ledger))
    if numbers:
        msg = f"{ledger.storage.where}: there is no snapshot {number}, expected one of: {numbers}"
    else:
        msg = (
            f"{ledger.storage.where}: nothing is published here; `batchgen status` tells how far "
            "the job is"
        )
    raise OutputError(msg)
