"""Whether a job has a plan, and in words if not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen.store.lock import RunLock
from batchgen.store.names import STATE

if TYPE_CHECKING:
    from batchgen.store.ledger import Ledger


def why_no_plan(ledger: Ledger) -> str | None:
    """What to tell of a job that has no plan yet; None if it has one."""
    if ledger.latest_plan_number():
        return None
    storage = ledger.storage
    if RunLock(storage, f"{STATE}/lock", "").is_held():
        return "its first run is at work and has not planned it yet"
    if storage.path(STATE).is_dir():
        return "no run has planned the job yet; start one with `batchgen run`"
    return "the job has not been run yet; start it with `batchgen run`"
