"""Back to an older snapshot: a new plan and a new manifest that name its files again.

No row is read, computed or written. The manifest is put last, as by any run, so a rollback that is
killed has happened or has not; one that got no further than its plan leaves that to the next run,
which goes on from the same snapshot.
"""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import OutputError
from batchgen.core.runtime import Told, command, option
from batchgen.pipeline.decide import bases_of, has_come_to_nothing
from batchgen.store.books import Base, Epoch, Manifest, Plan
from batchgen.store.ledger import Ledger
from batchgen.store.runs import RunLock, new_run_id, utc_now
from batchgen.store.snapshot import find_snapshot
from batchgen.store.visible import damage, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchgen.storage import LocalStorage


@dataclass(frozen=True, slots=True, repr=False)
class RolledBack(Told):
    """What a rollback has published."""

    output: str
    snapshot: int
    """Number of the new snapshot."""
    rolled_back_to: int
    """Number of the one that has the same rows."""
    instead_of: int
    """Number of the one that readers saw before."""
    num_ok: int
    num_errors: int
    next_run_from: int
    """Number of the plan that the next run compares its input with."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """The line that a person reads."""
        return (
            f"snapshot {self.snapshot} is what snapshot {self.rolled_back_to} was, instead of "
            f"{self.instead_of}: {self.num_ok:,} ok, {self.num_errors:,} errors; the next run goes "
            f"on from {self.next_run_from}"
        )


def roll_back(
    storage: LocalStorage, number: int | None = None, *, for_now: bool = False
) -> RolledBack:
    """Publish an older snapshot again, as a new one.

    Args:
        storage: The output folder.
        number: Of the snapshot; None: the one before the newest.
        for_now: The next run goes on from what was newest before, as if there had been no
            rollback. Else it compares its input with the snapshot that was rolled back to, so that
            whatever has changed since is computed again.

    Raises:
        BusyError: A run is at work on the job.
        FencedError: Another run has taken the job over meanwhile.
        OutputError: There is no such snapshot, or it is damaged.
        StorageError: It cannot be written.
    """
    ledger = Ledger(storage)
    find_snapshot(ledger, number)  # Before a lock is made, where there is no job.
    run_id = f"rollback-{new_run_id(utc_now())}"
    lock = RunLock(storage, run_id)
    lock.acquire(advice="stop it, or roll back when it has ended")
    try:
        with ledger.telling_late(run_id, ledger.at_work()):
            ledger.settle()
            newest = find_snapshot(ledger, None)
            old = _target(ledger, newest, number)
            plan = _plan_again(ledger, old, for_now=for_now)
            ledger.put_plan(plan)
            epoch = ledger.claim(plan, run_id, {"host": socket.gethostname(), "pid": os.getpid()})
            ledger.check_fence(epoch)
            manifest = ledger.put_manifest(_manifest_again(old, epoch), old.number)
            show(ledger, manifest)
    finally:
        lock.release()
    return RolledBack(
        storage.where,
        manifest.number,
        old.number,
        newest.number,
        manifest.num_ok,
        manifest.num_errors,
        plan.continues[0].plan if plan.continues else manifest.number,
    )


def _target(ledger: Ledger, newest: Manifest, number: int | None) -> Manifest:
    """The snapshot to go back to; it is whole."""
    where = ledger.storage.where
    before = ledger.manifest_before(newest.number) if number is None else None
    if number is None and before is None:
        msg = f"{where}: snapshot {newest.number} is the only one, there is none to go back to"
        raise OutputError(msg)
    old = before or find_snapshot(ledger, number)
    if old.number == newest.number:
        raise OutputError(f"{where}: snapshot {old.number} is the newest, readers see it already")
    for name, why in damage(ledger.storage, old.files).items():
        raise OutputError(
            f"{where}/{name}: {why}, so there is no way back to snapshot {old.number}; bring the "
            "file back from a backup, or choose another snapshot"
        )
    return old


def _plan_again(ledger: Ledger, old: Manifest, *, for_now: bool) -> Plan:
    """The plan of an old snapshot, as a new one that keeps all its files."""
    number = ledger.latest_plan_number()
    last = ledger.plan(number)
    manifest = ledger.manifest(number)
    if manifest is None and not for_now and not has_come_to_nothing(ledger, last):
        raise OutputError(
            f"{ledger.storage.where}: plan {number} is not published yet and has answers, which "
            f"this would drop; finish it with `{command('run')}`, or roll back with "
            f"{option('--for-now')}, which leaves them to the next run"
        )
    continues: Sequence[Base] = bases_of(ledger, last, manifest) if for_now else ()
    return replace(
        ledger.plan(old.number),
        number=number + 1,
        plan_id=secrets.token_hex(8),
        created_at=utc_now().isoformat(timespec="seconds"),
        bases=(Base(old.number),),
        takes_errors=True,
        kept=((0, len(old.files), 0),) if old.is_tiled else (),
        kept_of=old.number if old.is_tiled else 0,
        keeps=last.keeps,
        rolled_back=old.number,
        continues=tuple(continues),
    )


def _manifest_again(old: Manifest, epoch: Epoch) -> Manifest:
    """The same files under a new number; those of version 1 get places, and shown names by them."""
    files = [
        file if file.order is not None else replace(file, order=at * 1000)
        for at, file in enumerate(old.files, 1)
    ]
    return replace(
        old,
        number=epoch.plan.number,
        plan_id=epoch.plan.plan_id,
        epoch=epoch.number,
        run_id=epoch.run_id,
        created_at=utc_now().isoformat(timespec="seconds"),
        files=files,
    )
