"""The snapshots that there are: one for each plan that was published and not pruned since.

Pruning removes the oldest first: the manifest, and then the files that nobody names any more. A
crash in between leaves files without a manifest. Nothing reads them, and the next pruning, like
the end of the next run, removes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen.core.errors import OutputError
from batchgen.store.books import STATE
from batchgen.store.matching import DIGESTS, digests_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from batchgen.store.books import Manifest, Plan, Segment
    from batchgen.store.ledger import Ledger


def snapshot(ledger: Ledger, number: int | None) -> Manifest:
    """A snapshot by number; None: the newest.

    Raises:
        OutputError: There is none, or not that one; the text says which there are.
    """
    manifest = ledger.latest_manifest() if number is None else ledger.manifest(number)
    if manifest is not None:
        return manifest
    numbers = ", ".join(str(manifest.number) for manifest in ledger.manifests())
    if numbers:
        msg = f"{ledger.storage.where}: there is no snapshot {number}, expected one of: {numbers}"
    else:
        msg = (
            f"{ledger.storage.where}: nothing is published here; `batchgen status` tells how far "
            "the job is"
        )
    raise OutputError(msg)


def beyond(ledger: Ledger, keep: int) -> list[Manifest]:
    """The snapshots that pruning would remove, oldest first.

    Never the newest, and never one that the newest plan takes rows over from while it is
    unpublished.

    Args:
        ledger: The job's books.
        keep: So many of the newest stay; at least 1.
    """
    if keep < 1:
        msg = f"keep is {keep}, expected 1 or more"
        raise ValueError(msg)
    needed = {plan.number for plan in _in_work(ledger)}
    return [found for found in ledger.manifests()[:-keep] if found.number not in needed]


def prune(ledger: Ledger, keep: int) -> list[Manifest]:
    """Remove old snapshots and what only they needed. Idempotent; finishes what a crash left.

    Only for who holds the job's lock: a run that has just planned must not lose what its plan is
    about to be compared with. It would cost that run work, not rows.

    Args:
        ledger: The job's books.
        keep: So many of the newest stay; at least 1.

    Returns:
        What was removed, oldest first.

    Raises:
        StorageError: Something cannot be removed; what is left goes next time.
    """
    removed = beyond(ledger, keep)
    for manifest in removed:
        ledger.storage.remove(f"{STATE}/manifests/{manifest.number:06d}.json")
    ledger.storage.settle(f"{STATE}/manifests")  # Or a power loss brings back names without files.
    newest = ledger.latest_manifest()
    if newest is not None:
        ledger.tidy(newest)
        _remove_digests(ledger)
    return removed


def _in_work(ledger: Ledger) -> Iterable[Plan]:
    """The newest plan and, while it is unpublished, the plans that it takes rows over from."""
    numbers = [ledger.latest_plan_number()]
    seen: set[int] = {0}
    while numbers:
        number = numbers.pop()
        if number in seen:
            continue
        seen.add(number)
        plan = ledger.plan(number)
        yield plan
        if ledger.manifest(number) is None:  # A published plan has taken over what it needed.
            numbers += [base.plan for base in plan.bases]


def _remove_digests(ledger: Ledger) -> None:
    """Remove digests of rows of files that no snapshot and no plan in work is made of."""
    plans = [*_in_work(ledger), *(ledger.plan(found.number) for found in ledger.manifests())]
    named = {digests_of(segment.digest) for segment in _segments(plans)}
    for name in ledger.storage.list(DIGESTS):
        if name.endswith(".bin") and name not in named:
            ledger.storage.remove(name)


def _segments(plans: Sequence[Plan]) -> Iterable[Segment]:
    return (segment for plan in plans for segment in plan.segments)
