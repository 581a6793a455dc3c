"""`--retry-errors`: the plan that runs only the error rows of a finished job again.

It is an ordinary plan for the same rows of the same files. What it has beside them is a base: an
earlier plan, published or held back by the gate, whose ok rows are carried over instead of being
computed. What counts is what this plan's own parts hold, as for every plan; so whatever happens
to the base (another run publishes it, a disk eats it) can cost work, never a row.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

from batchgen.runlog import utc_now
from batchgen.sink.carry import Piece, Wanted, from_parts, gathered
from batchgen.sink.hashed import is_as_published
from batchgen.sink.published import Index, from_snapshot
from batchgen.storage import raise_if_not_damage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchgen.books import Manifest, Plan
    from batchgen.config.model import RunConfig
    from batchgen.ledger import Ledger

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
    parts: list[str] = []
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
        parts = [part.name for part in durable.parts]
    return replace(
        plan,
        number=plan.number + 1,
        plan_id=secrets.token_hex(8),
        created_at=utc_now().isoformat(timespec="seconds"),
        base={"plan": plan.number, "parts": parts, "generation": plan.generation + 1},
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


def carried_over(ledger: Ledger, plan: Plan, wanted: Wanted, run: RunConfig) -> Iterator[Piece]:
    """Yield what a plan takes over from its base, each piece as large as a part may be.

    Raises:
        OutputError: The base is gone, or damaged beyond telling rows apart.
        StorageError: It cannot be read right now.
    """
    base = plan.base
    assert base is not None  # noqa: S101 - asked only of plans that have one
    manifest = ledger.manifest(base["plan"])
    if manifest is not None:
        num_rows = [segment.num_rows for segment in plan.segments]
        pieces = from_snapshot(ledger.storage, manifest, num_rows, wanted)
    else:
        durable = ledger.parts(ledger.plan(base["plan"]), base["parts"])
        for name, why in durable.rejected.items():
            wanted.tell(f"{name} cannot be taken over ({why}); its rows are done again")
        pieces = from_parts(ledger.storage, durable.parts, wanted)
    return gathered(pieces, run.flush_rows, run.flush_mib * 2**20)
