"""What is removed of an output's past: old snapshots, and what only they needed.

There is one snapshot for each plan that was published and not pruned since. Its manifest goes
first, then the files that no manifest names any more. A crash in between leaves files without a
manifest. Nothing reads them, and the next pruning, like the end of the next run, removes them.

The floor: the highest plan, claim and manifest stay whatever is asked. So no number is used twice,
and a run that wakes up when all that it knew is gone still finds a later claim, which fences it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from batchgen.core.errors import OutputError
from batchgen.storage import LocalStorage
from batchgen.store.books import STATE, TRIES, Manifest, Plan, is_numbered, number_of, numbered
from batchgen.store.ledger import Ledger
from batchgen.store.matching import DIGESTS, digests_of
from batchgen.store.runs import RunLock


@dataclass(frozen=True, slots=True)
class Keep:
    """What stays: the newest, and what is younger."""

    num: int = 1
    """So many of the newest of each kind; at least 1."""
    since: datetime | None = None
    """And all that was made since then; None: no more."""

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"keep is {self.num}, expected 1 or more")

    def is_old(self, made: datetime) -> bool:
        """Whether what was made then is not kept for its age."""
        return self.since is None or made < self.since


@dataclass(frozen=True, slots=True)
class Outdated:
    """What goes."""

    manifests: Sequence[Manifest]
    """The oldest first."""
    runs: Sequence[str]
    """Folders of runs."""
    books: Sequence[str]
    """Claims, plans and digests of rows."""


def outdated(ledger: Ledger, keep: Keep) -> Outdated:
    """Look up what pruning would remove.

    Never the newest snapshot, nor one that the newest plan takes rows over from while it is
    unpublished; with each snapshot stay its plan, its claim and its run.

    Raises:
        OutputError: The books are damaged.
        StorageError: Something cannot be read right now.
    """
    work = list(_in_work(ledger))
    needed = {plan.number for plan in work}
    manifests = ledger.manifests()
    gone = [
        one
        for one in manifests[: -keep.num]
        if one.number not in needed and keep.is_old(datetime.fromisoformat(one.created_at))
    ]
    left = [one for one in manifests if one not in gone]
    there = {number_of(name) for name in _numbered(ledger.storage, "plan")}
    # A run that slept and was killed at once may have left a manifest whose plan is gone.
    plans = [*work, *(ledger.plan(one.number) for one in left if one.number in there)]
    books = _old_books(ledger.storage, keep, left, plans)
    return Outdated(gone, _old_runs(ledger.storage, keep, left), list(books))


def prune(ledger: Ledger, keep: Keep) -> Outdated:
    """Remove what is outdated. Idempotent; finishes what a crash left.

    Only for who holds the job's lock: a run that has just planned must not lose what its plan is
    about to be compared with. It would cost that run work, not rows.

    Returns:
        What was removed.

    Raises:
        OutputError: The books are damaged.
        StorageError: Something cannot be removed; what is left goes next time.
    """
    storage = ledger.storage
    found = outdated(ledger, keep)
    for manifest in found.manifests:
        storage.remove(numbered("manifests", manifest.number))
    storage.settle(f"{STATE}/manifests")  # Or a power loss brings back names without files.
    newest = ledger.latest_manifest()
    if newest is not None:
        ledger.tidy(newest)
        _remove_tries(storage, newest)
    for name in found.books:
        storage.remove(name)
    for folder in found.runs:
        storage.remove_folder(folder)
    return found


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
        numbers += [base.plan for base in plan.continues]
        if ledger.manifest(number) is None:  # A published plan has taken over what it needed.
            numbers += [base.plan for base in plan.bases]


def _old_runs(storage: LocalStorage, keep: Keep, left: Sequence[Manifest]) -> Sequence[str]:
    published = {manifest.run_id for manifest in left}

    def begun(folder: str) -> tuple[str, datetime]:
        """When a run began: its name tells the second."""
        return folder.rpartition("-")[0], _changed(storage, folder)

    folders = sorted(storage.list(f"{STATE}/runs"), key=begun)
    return [
        folder
        for folder in folders[: -keep.num]
        if folder.rpartition("/")[2] not in published and keep.is_old(_changed(storage, folder))
    ]


def _old_books(
    storage: LocalStorage, keep: Keep, left: Sequence[Manifest], plans: Sequence[Plan]
) -> Iterator[str]:
    claimed = {manifest.epoch for manifest in left}
    for name in _numbered(storage, "epochs")[: -keep.num]:
        if number_of(name) not in claimed and keep.is_old(_changed(storage, name)):
            yield name
    planned = {plan.number for plan in plans}
    newest = max((manifest.number for manifest in left), default=0)
    for name in _numbered(storage, "plan"):
        # A run that sleeps may still publish a later one, which is the newest snapshot then.
        if number_of(name) not in planned and number_of(name) < newest:
            yield name
    named = {digests_of(segment.digest) for plan in plans for segment in plan.segments}
    for name in storage.list(DIGESTS):
        if name.endswith(".bin") and name not in named:
            yield name


def _numbered(storage: LocalStorage, kind: str) -> Sequence[str]:
    """Names of plans or claims, the oldest first."""
    return [name for name in storage.list(f"{STATE}/{kind}") if is_numbered(name)]


def _changed(storage: LocalStorage, name: str) -> datetime:
    """When a file or folder was changed last; long ago if it is gone."""
    with suppress(OSError):
        if mark := storage.mark(name):
            return datetime.fromtimestamp(mark[1] / 1e9, tz=UTC)
    return datetime.fromtimestamp(0, tz=UTC)


def _remove_tries(storage: LocalStorage, newest: Manifest) -> None:
    """Remove try-outs that are older than what is published, which has what it wanted of them.

    Books tell the second: those of the same one go too, since what they said may have been deleted.
    """
    tries = LocalStorage(storage.path(TRIES))
    try:
        tried = Ledger(tries).latest_plan()
        is_past = tried is not None and tried.created_at <= newest.created_at
    except OutputError:  # Its books are damaged, and of no use to anybody.
        is_past = True
    if is_past and not RunLock(tries).is_held():
        storage.remove_folder(TRIES)
