"""`--retry-errors`: the plan that runs only the error rows of a finished job again.

It is a plan for the same rows of the same files, whose base is the finished one, published or held
back by the gate: ok rows are taken over from it, error rows are not.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

from batchgen.storage import raise_if_not_damage
from batchgen.store.books import Base
from batchgen.store.hashed import is_as_published
from batchgen.store.published import Index
from batchgen.store.runlog import utc_now

if TYPE_CHECKING:
    from batchgen.store.books import Manifest, Plan
    from batchgen.store.ledger import Ledger

UNFINISHED = "error rows are tried again once every row has ended: run with --retry-errors then"
NO_ERRORS = "there are no error rows to try again"


def retry_plan(ledger: Ledger, plan: Plan, manifest: Manifest | None) -> Plan | str:
    """The plan that tries the error rows of `plan` again, not yet put; or why there is none.

    Args:
        ledger: The job's books.
        plan: The newest one.
        manifest: Its snapshot, None if it is not published.

    Raises:
        OutputError: The snapshot cannot be taken over from.
        StorageError: It cannot be read right now.
    """
    parts: tuple[str, ...] = ()
    if manifest is not None:
        Index(ledger.storage, manifest).close()
        if not manifest.num_errors and not has_damage(ledger, manifest):
            return NO_ERRORS
    else:
        durable = ledger.durable(plan)
        if durable.num_done != plan.num_rows:
            return UNFINISHED
        if not durable.num_errors:
            return NO_ERRORS
        parts = tuple(part.name for part in durable.parts)
    return replace(
        plan,
        number=plan.number + 1,
        plan_id=secrets.token_hex(8),
        created_at=utc_now().isoformat(timespec="seconds"),
        bases=(Base(plan.number, parts),),
        takes_errors=False,
        generation=plan.generation + 1,
    )


def has_damage(ledger: Ledger, manifest: Manifest) -> bool:
    """Whether a published file is not what was written. Reads them all.

    Raises:
        StorageError: One cannot be read right now.
    """
    for entry in manifest.files:
        path = ledger.storage.path(entry["name"])
        try:
            if not is_as_published(path, entry):
                return True
        except OSError as error:
            raise_if_not_damage(path, error)
            return True
    return False
