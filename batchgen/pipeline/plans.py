"""Which plan a run works on, and what of the last one is put right before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen.core.errors import FencedError
from batchgen.pipeline.freezing import freeze, has_new_rows
from batchgen.pipeline.nights import has_come_to_nothing
from batchgen.pipeline.retry import UNFINISHED, retry_plan
from batchgen.pipeline.snapshot import gate_figures, show

if TYPE_CHECKING:
    from batchgen.pipeline.context import RunContext
    from batchgen.pipeline.nights import Decision
    from batchgen.pipeline.options import RunOptions
    from batchgen.pipeline.planning import Prepared
    from batchgen.storage import LocalStorage
    from batchgen.store.books import Manifest, Plan


def plan_of(
    context: RunContext, options: RunOptions, decision: Decision
) -> tuple[Plan, Manifest | None]:
    """The plan to work on, put if it is new; and its manifest, if there is nothing to do."""
    if decision.plan is not None:
        return _go_on_with(decision.plan, context, options, decision.prepared)
    ledger, before, prepared = context.ledger, decision.before, decision.prepared
    if decision.replaces is not None and not has_come_to_nothing(ledger, decision.replaces):
        msg = f"{context.storage.where}: another run has just worked on this job; run again"
        raise FencedError(msg)
    ledger.settle()
    newest = ledger.latest_manifest()
    if newest is not None and before.bases and not _is_gone(newest, context.storage):
        for note in show(ledger, newest):
            context.notes.add(note)
    if options.retry_errors and before.seen is None:
        context.notes.add(UNFINISHED)
    if not before.bases or before.seen is None or has_new_rows(prepared.files, before.seen):
        # Before the input is scanned: both take long, and neither needs the other.
        context.engine.start()
    number = ledger.latest_plan_number() + 1
    plan = freeze(prepared, number, before, context.storage)
    ledger.put_plan(plan)
    return plan, None


def _go_on_with(
    plan: Plan, context: RunContext, options: RunOptions, prepared: Prepared
) -> tuple[Plan, Manifest | None]:
    """The newest plan, or one that tries its errors again; and its manifest, if it has one."""
    ledger, retry_errors = context.ledger, options.retry_errors
    manifest = ledger.manifest(plan.number)
    ledger.settle()
    # What is to be repaired cannot be shown.
    if manifest is not None and not (retry_errors and _is_gone(manifest, context.storage)):
        for note in show(ledger, manifest):
            context.notes.add(note)
    if not retry_errors or (manifest is None and _is_retried(plan, context, prepared)):
        return plan, manifest
    again = retry_plan(ledger, plan, manifest)
    if isinstance(again, str):
        if manifest is None:
            context.notes.add(again)
        return plan, manifest
    ledger.put_plan(again)
    return again, None


def _is_retried(plan: Plan, context: RunContext, prepared: Prepared) -> bool:
    """Whether errors have just been tried again, with an end that only has to be published."""
    durable = context.ledger.durable(plan)
    if plan.takes_errors or durable.num_done != plan.num_rows:
        return False
    limits = gate_figures(context.ledger, prepared, plan, durable)
    return not any(limit.is_exceeded for limit in limits)


def _is_gone(manifest: Manifest, storage: LocalStorage) -> bool:
    """Whether a published file is missing."""
    return not all(storage.path(file["name"]).exists() for file in manifest.files)
