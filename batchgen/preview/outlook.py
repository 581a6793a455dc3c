"""What a run would begin with: its plan, not put anywhere, and the rows that are left to do."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from batchgen.pipeline.decide import decide, retry_plan
from batchgen.pipeline.frozen import freeze
from batchgen.pipeline.reuse import missing
from batchgen.preview.report import Rows
from batchgen.preview.reuse import count, known_keys, take_over
from batchgen.storage import LocalStorage
from batchgen.store.books import Durable
from batchgen.store.ledger import Ledger
from batchgen.store.row_digests import name_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from batchgen.core.ranges import Ranges
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.decide import Decision
    from batchgen.pipeline.interface import RunOptions
    from batchgen.pipeline.prepare import Prepared
    from batchgen.store.books import Plan
    from batchgen.store.dedupe import KnownKeys

ONLY_PUBLISH = "every row has ended: a run would only publish, if the gate lets it"


@dataclass(frozen=True, slots=True)
class Outlook:
    """The beginning of a run."""

    prepared: Prepared
    plan: Plan
    is_continued: bool
    """The plan is there already."""
    nothing_to_do: str | None
    """Why, if there is nothing."""
    rows: Rows
    todo: Mapping[int, Ranges]
    """Segment -> rows that would be read."""
    known: KnownKeys | None
    """Requests whose answer would be copied."""
    warnings: Sequence[str] = field(default_factory=list)


def look_ahead(job: JobConfig, storage: LocalStorage, options: RunOptions) -> Outlook:
    """Find out what a run would do, without touching the output.

    Reads the files that changed once, to count and hash; the digests of their rows go to a
    temporary folder, 16 bytes a row.

    Raises:
        BatchgenError: What a run would refuse to start with.
    """
    ledger = Ledger(storage)
    found = decide(ledger, job, options)
    plan, notes = found.plan, [*found.prepared.notes, *found.notes]
    if plan is not None:
        manifest = ledger.manifest(plan.number)
        again = retry_plan(ledger, plan, manifest) if options.retry_errors else ""
        if not isinstance(again, str):
            return _outlook(ledger, found, again, storage, notes)
        if manifest is not None:
            done = f"already complete, published by run {manifest.run_id}"
            reason = f"{again}; {done}" if again else done
            rows = Rows(plan.num_rows, num_done=plan.num_rows)
            return Outlook(found.prepared, plan, True, reason, rows, {}, None, notes)  # noqa: FBT003
        return _outlook(ledger, found, plan, storage, [*notes, again] if again else notes)
    number = ledger.latest_plan_number() + 1
    if not found.before.bases:
        plan = freeze(found.prepared, number, found.before)
        return _outlook(ledger, found, plan, storage, notes)
    with scratch(ledger, [base.plan for base in found.before.bases]) as digests:
        plan = freeze(found.prepared, number, found.before, digests)
        return _outlook(ledger, found, plan, digests, notes)


def _outlook(
    ledger: Ledger, found: Decision, plan: Plan, digests: LocalStorage, notes: list[str]
) -> Outlook:
    is_continued = found.plan is plan
    durable = ledger.durable(plan) if is_continued else Durable()
    todo: Mapping[int, Ranges] = missing(plan, durable)
    num_done = plan.num_rows - count(todo)
    rows = Rows(plan.num_rows, num_new=count(todo), num_done=num_done)
    if plan.bases:
        reuse = take_over(ledger, plan, todo, digests)
        rows = Rows(
            num_rows=plan.num_rows,
            num_new=reuse.num_new,
            num_edited=reuse.num_edited,
            num_unread=reuse.num_unread,
            num_again=reuse.num_again,
            num_reused=reuse.num_taken,
            num_done=num_done,
        )
        todo = reuse.todo
    known = None
    if todo:
        is_shared = found.prepared.job.run.dedupe != "never"
        own = [part.name for part in durable.parts] if is_shared else []
        known = known_keys(ledger, plan, own, notes.append)
    if is_continued and num_done == plan.num_rows:
        notes.append(ONLY_PUBLISH)
    return Outlook(found.prepared, plan, is_continued, None, rows, todo, known, notes)


@contextmanager
def scratch(ledger: Ledger, plans: Sequence[int]) -> Iterator[LocalStorage]:
    """A place for digests of rows, beside those that earlier plans have left."""
    with tempfile.TemporaryDirectory(prefix="batchgen-plan-") as folder:
        storage = LocalStorage(Path(folder), temp_tag="plan")
        for number in plans:
            for segment in ledger.plan(number).segments:
                name = name_of(segment.digest)
                there, here = ledger.storage.path(name), storage.path(name)
                if there.exists() and not here.is_symlink():
                    here.parent.mkdir(parents=True, exist_ok=True)
                    here.symlink_to(there.absolute())
        yield storage
