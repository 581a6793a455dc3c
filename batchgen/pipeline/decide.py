"""What a run has to do, and which plan it works on.

    nothing is planned here yet, or --fresh      a new plan
    nothing has changed                          the newest plan, finished or not
    files have changed                           a new plan that takes over what it can
    the recipe has changed                       refused, unless --accept-recipe
    ... and the newest plan has come to nothing  as if that plan had never been
    --retry-errors                               a plan for the same rows, based on the finished one
    --rerender                                   likewise, if some were made with an old rendering

A plan that takes rows over is an ordinary plan: it only has bases, earlier plans whose answers it
may use. So a night that is killed goes on like every run, and an unfinished plan whose input
moved on is itself a base, so that nothing it has computed is computed again.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from batchgen.core.errors import (
    FencedError,
    RecipeChangedError,
    StorageError,
)
from batchgen.core.records import RowSet, Verdict
from batchgen.core.runtime import option
from batchgen.pipeline.frozen import (
    Before,
    difference,
    freeze,
    has_new_rows,
    input_changes,
    same_files,
)
from batchgen.pipeline.keeping import (
    NOTHING_LEAVES,
    Leaving,
    leave_damaged,
    leaving_rows,
    with_kept,
)
from batchgen.pipeline.prepare import Checked, Prepared, check
from batchgen.pipeline.publish import gate_figures
from batchgen.pipeline.rendering import RENDERING, OldRows, changes_since, recalled, remember
from batchgen.pipeline.rows import Takeover, missing, new_rows, takeovers, unread_rows
from batchgen.source.columns import read_schema
from batchgen.store.books import PARTS, Base, Manifest, PartFooter, Plan, epoch_of
from batchgen.store.matching import (
    digest_reader,
)
from batchgen.store.published import PublishedRows
from batchgen.store.result_files import VERDICT, ResultFile
from batchgen.store.runs import utc_now
from batchgen.store.visible import is_switching, raise_if_damaged, show

if TYPE_CHECKING:
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.context import RunOptions
    from batchgen.storage import LocalStorage
    from batchgen.store.ledger import Ledger


class Decision(NamedTuple):
    """Says what a run is to do."""

    prepared: Prepared
    plan: Plan | None
    """The plan to go on with, None for a new one."""
    before: Before
    """What a new plan goes back to."""
    notes: Sequence[str] = ()
    """Worth a warning."""
    replaces: Plan | None = None
    """The newest plan, if the new one is for another job only because it has come to nothing: to
    be looked at once more under the lock, see `has_come_to_nothing`."""


def decide(ledger: Ledger, job: JobConfig, options: RunOptions) -> Decision:
    """Look at job, input and output; reads no row.

    Raises:
        ConfigError: The job does not fit itself or its input.
        SourceError: The input does not exist or is not what its name says.
        RecipeChangedError: The job is not the newest plan's, and nobody said that it may be.
        OutputError: The output is not one that this version understands.
    """
    checked = check(job)
    plan = ledger.latest_plan()
    if plan is None or options.fresh:
        return Decision(checked.with_input(plan), None, Before(seen=plan))
    if plan.continues:  # Rolled back for now: as if the plan before were the newest.
        plan = replace(ledger.plan(plan.continues[0].plan), continues=plan.continues)
    checked = checked.by_recipe_of(plan)
    changes = checked.changes(plan)
    manifest = ledger.manifest(plan.number)
    if plan.continues:
        return _after(ledger, checked, plan, manifest, options)
    is_outgrown = options.retry_errors and manifest is not None and _has_old_misfits(plan, manifest)
    if not changes and not is_outgrown and (found := same_files(plan, job)) is not None:
        prepared = checked.with_plan(plan)
        prepared = replace(prepared, notes=[*prepared.notes, *found.notes])
        if not input_changes(plan):
            return Decision(prepared, plan, Before())
    # A run whose job is stolen may be at work on a plan that has come to nothing so far.
    if changes and not options.steal and has_come_to_nothing(ledger, plan):
        return _instead_of(ledger, checked, plan, options)
    return _after(ledger, checked, plan, manifest, options)


def _has_old_misfits(plan: Plan, manifest: Manifest) -> bool:
    """Tell whether errors may be of columns that were narrower than their values, before 0.2."""
    segments = plan.segments if plan.input_format in ("jsonl", "openai") else ()
    return bool(manifest.num_errors) and any(segment.keys is None for segment in segments)


def has_come_to_nothing(ledger: Ledger, plan: Plan) -> bool:
    """Tell whether the newest plan may be put aside: no snapshot, and no engine's answer since.

    Every part since the last snapshot counts, accepted or not, of whatever plan; what cannot be
    read counts too. Rows that were skipped, or have no answer, are no loss, and what was taken over
    is where it was taken from.
    """
    if ledger.manifest(plan.number) is not None:
        return False
    newest = ledger.latest_manifest()
    last_epoch = newest.epoch if newest is not None else 0
    since = (name for name in ledger.storage.list(PARTS) if epoch_of(name) > last_epoch)
    return not any(_may_hold_answers(ledger, name) for name in since)


def _may_hold_answers(ledger: Ledger, name: str) -> bool:
    with ResultFile(ledger.storage.path(name)) as file:
        try:
            footer = PartFooter.from_metadata(file.metadata)
        except (ValueError, StorageError):
            return True
    # See `footer_facts`, and `Commits.taken` for those that are taken over.
    is_taken = "batchgen" in footer.engine and "device" not in footer.engine
    num_unanswered = footer.tally.get(VERDICT, {}).get(Verdict.ERROR, 0)
    return not is_taken and footer.num_results > num_unanswered


def _instead_of(ledger: Ledger, checked: Checked, plan: Plan, options: RunOptions) -> Decision:
    """Decide as if a plan had never been; what was published before it still guards its recipe."""
    manifest = ledger.latest_manifest()
    if manifest is None:
        decision = Decision(checked.with_input(plan), None, Before(seen=plan))
    else:
        decision = _after(ledger, checked, ledger.plan(manifest.number), manifest, options)
    note = f"plan {plan.number} came to nothing, and the job is another now: a new plan replaces it"
    return decision._replace(notes=(*decision.notes, note), replaces=plan)


def _after(
    ledger: Ledger, checked: Checked, plan: Plan, manifest: Manifest | None, options: RunOptions
) -> Decision:
    """A new plan that goes back to this one."""
    if not checked.answers_alike(plan):
        return _with_new_recipe(ledger, checked, plan, manifest, options)
    before = Before(
        seen=plan,
        bases=bases_of(ledger, plan, manifest),
        takes_errors=not options.retry_errors and (manifest is not None or plan.takes_errors),
        generation=plan.generation + options.retry_errors,
    )
    return Decision(checked.with_input(plan), None, before)


def _with_new_recipe(
    ledger: Ledger,
    checked: Checked,
    plan: Plan,
    manifest: Manifest | None,
    options: RunOptions,
) -> Decision:
    output, changes = checked.job.output.path, checked.changes(plan)
    if not options.accept_recipe:
        raise RecipeChangedError(output, changes, is_finished=manifest is not None)
    prepared = checked.with_input(plan)
    if not options.only_errors:
        return Decision(prepared, None, Before(seen=plan))
    if wrong := _other_columns(plan, prepared):
        raise RecipeChangedError(output, [*changes, wrong], is_finished=manifest is not None)
    bases = bases_of(ledger, plan, manifest)
    before = Before(plan, bases, takes_errors=False, generation=plan.generation + 1)
    return Decision(prepared, None, before, _run_whole(ledger, plan, prepared))


def _run_whole(ledger: Ledger, plan: Plan, prepared: Prepared) -> list[str]:
    """Warn of changed files whose rows only keys could tell apart, which hold the recipe."""
    files = set(prepared.files)
    wholes = [
        segment
        for segment in plan.segments
        if segment.num_rows
        and segment.path in files
        and digest_reader(ledger.storage, segment.digest, segment.num_rows) is None
        and difference(segment)
    ]
    if not wholes:
        return []
    num_rows = sum(segment.num_rows for segment in wholes)
    more = f" and {len(wholes) - 1} more files" if len(wholes) > 1 else ""
    name = option("--only-errors")
    return [
        f"{name}: {num_rows:,} rows of {wholes[0].path}{more} run again, edited or not: "
        f"which rows of a {plan.input_format} file were edited cannot be told across recipes"
    ]


def _other_columns(plan: Plan, prepared: Prepared) -> str | None:
    """Return why the plan's rows cannot stand beside those of a new recipe; None if they can."""
    now = prepared.frozen_job
    if all(pick(plan.job) == pick(now) for pick in _DECIDE_COLUMNS):
        return None
    name = option("--only-errors")
    return f"{name}: answers would have other columns than those that are taken over"


_DECIDE_COLUMNS: Sequence[Callable[[Mapping[str, Any]], Any]] = (
    lambda job: job["output"],
    lambda job: job["recipe"].get("form"),
    lambda job: job["recipe"]["sampling"].get("n"),
    lambda job: job["recipe"]["sampling"].get("logprobs"),
    lambda job: job["recipe"]["model"].get("reasoning_parser"),
    lambda job: job["recipe"]["model"].get("tool_call_parser"),
)


def bases_of(ledger: Ledger, plan: Plan, manifest: Manifest | None) -> Sequence[Base]:
    """List the plans to take rows from: the newest first, then the bases of an unfinished one."""
    if plan.continues:
        return plan.continues
    if manifest is not None:
        return (Base(plan.number),)
    parts = tuple(part.name for part in ledger.durable(plan).parts)
    return (Base(plan.number, parts), *plan.bases)


NO_ERRORS = "there are no error rows to try again"


def unfinished() -> str:
    """Say when error rows are tried again, while others are still to be computed."""
    again = option("--retry-errors")
    return f"error rows are tried again once every row has ended: run with {again} then"


def retry_plan(ledger: Ledger, plan: Plan, manifest: Manifest | None) -> Plan | str:
    """Make the plan that tries the error rows of `plan` again, not yet put; or say why not.

    Args:
        ledger: The job's books.
        plan: The newest one.
        manifest: Its snapshot, None if it is not published.

    Raises:
        OutputError: The snapshot cannot be taken over from.
        StorageError: It cannot be read right now.
    """
    if manifest is not None:
        with PublishedRows(ledger.storage, manifest, plan):
            pass  # Without it, rows cannot be told apart.
        if not manifest.num_errors and not has_damage(ledger, manifest):
            return NO_ERRORS
    else:
        durable = ledger.durable(plan)
        if durable.num_done != plan.num_rows:
            return unfinished()
        if not durable.num_errors:
            return NO_ERRORS
    return _plan_after(plan, bases_of(ledger, plan, manifest), retries=True)


def _plan_after(plan: Plan, bases: Sequence[Base], *, retries: bool) -> Plan:
    """Make a plan for the same rows, which takes over what it can; `retries`: but no errors."""
    return replace(
        plan,
        number=plan.number + 1,
        plan_id=secrets.token_hex(8),
        created_at=utc_now().isoformat(timespec="seconds"),
        bases=tuple(bases),
        takes_errors=not retries,
        generation=plan.generation + retries,
        rolled_back=0,
        continues=(),
    )


def _old_rows(ledger: Ledger, prepared: Prepared, plan: Plan, hooks: Hooks) -> OldRows:
    """Count them among the rows that a plan has ended or is to take over."""
    of = changes_since(plan.rendering, prepared)
    if not of:
        return OldRows()
    durable, manifest = ledger.durable(plan), ledger.manifest(plan.number)
    if manifest is not None and (known := recalled(ledger.storage, plan, of)) is not None:
        return known
    # Rows of files that are kept are taken over like others, as far as this is concerned.
    num_unread, sources, todo = 0, [], missing(plan, replace(durable, kept_rows=RowSet()))
    if manifest is not None or durable.parts:
        own = Base(plan.number, tuple(part.name for part in durable.parts))
        sources = [Takeover(ledger, prepared, plan, own, hooks.tell)]
    if manifest is None and plan.bases:
        newest, *others = takeovers(ledger, prepared, plan, todo, hooks.tell)
        fresh = todo - new_rows(newest.matched)
        num_unread = unread_rows(ledger.storage, plan, newest, fresh).num_rows
        sources += [newest, *others]
    num = sum(one.old_rows(hooks.on_block).num_rows for one in sources)
    old = OldRows(num, of, num_unread=num_unread)
    if manifest is not None:
        remember(ledger.storage, plan, old)
    return old


def has_damage(ledger: Ledger, manifest: Manifest) -> bool:
    """Tell whether a published file is not what was written. Reads them all.

    Raises:
        StorageError: One cannot be read right now.
    """
    return not all(entry.is_intact(ledger.storage.path(entry.name)) for entry in manifest.files)


class Hooks(NamedTuple):
    """What a run does beside deciding on its plan, and whoever foretells it does not."""

    tell: Callable[[str], None]
    """Hears what is worth a warning."""
    start_engine: Callable[[], object]
    """Called as soon as it is nearly certain that rows need it."""
    digests: LocalStorage | None
    """Gets the digests of rows of files that are scanned; None: nobody will ask for them."""
    on_block: Callable[[], object] = int
    """Called now and then while files are read; what it raises ends the work."""


class Begun(NamedTuple):
    """The plan that a run works on."""

    prepared: Prepared
    """The job with the columns of the plan."""
    plan: Plan
    manifest: Manifest | None = None
    """The plan's snapshot, where there is nothing to do."""
    nothing_to_do: str | None = None
    """Why there is nothing to do, for people."""
    leaving: Leaving = NOTHING_LEAVES
    """Published rows that the plan has no row for."""
    old: OldRows = OldRows()
    """Rows of an old rendering, kept or run again."""


def begin(ledger: Ledger, options: RunOptions, decision: Decision, hooks: Hooks) -> Begun:
    """Settle on the plan to work on; put it if it is new.

    The whole of a run before its claim: over a storage that drops what is written, this foretells
    what a run would do.

    Raises:
        SourceError: A file cannot be read to its end, or changed while it was read.
        FencedError: Another run has just planned this job.
        OutputError: The books are damaged, or cannot be written.
    """
    plan, prepared, manifest = decision.plan, decision.prepared, None
    newest = ledger.latest_manifest()
    if newest is not None and is_switching(ledger.storage):  # Readers need not wait for this run.
        for note in show(ledger, newest).mended:
            hooks.tell(note)
    if plan is None:
        plan, old = _new_plan(ledger, options, decision, hooks)
        prepared = replace(prepared, columns=read_schema(plan.schema), carried=plan.carried)
    else:
        old = _old_rows(ledger, prepared, plan, hooks)
        old = old._replace(is_again=options.rerender)
        manifest, again = _gone_on_with(ledger, options, decision, plan, old, hooks.tell)
        if again is not None:
            plan, manifest = again, None
    for text in old.texts:
        hooks.tell(text)
    if manifest is not None:
        return Begun(prepared, plan, manifest, _nothing_to_do(manifest, options), old=old)
    leaving = leaving_rows(ledger, prepared, plan)
    if leaving.num_rows:
        hooks.tell(leaving.text)
    return Begun(prepared, plan, leaving=leaving, old=old)


def _nothing_to_do(manifest: Manifest, options: RunOptions) -> str:
    reasons = [NO_ERRORS] if options.retry_errors else []
    reasons += ["no row was made with an old rendering"] if options.rerender else []
    return "; ".join([*reasons, f"already complete, published by run {manifest.run_id}"])


def _new_plan(
    ledger: Ledger, options: RunOptions, decision: Decision, hooks: Hooks
) -> tuple[Plan, OldRows]:
    before, prepared = decision.before, decision.prepared
    if decision.replaces is not None and not has_come_to_nothing(ledger, decision.replaces):
        msg = f"{ledger.storage.where}: another run has just worked on this job; run again"
        raise FencedError(msg)
    ledger.settle()
    newest = ledger.latest_manifest()
    if newest is not None and before.bases:  # Damaged rows are not taken over, and told then.
        for note in show(ledger, newest).mended:
            hooks.tell(note)
    if options.retry_errors and before.seen is None:
        hooks.tell(unfinished())
    is_new = not before.bases or before.seen is None or has_new_rows(prepared.files, before.seen)
    if is_new and not prepared.late:
        # Before the input is scanned: both take long, and neither needs the other.
        hooks.start_engine()
    number = ledger.latest_plan_number() + 1
    plan = freeze(prepared, number, before, hooks.digests, hooks.tell, hooks.on_block)
    least = min((ledger.plan(base.plan).rendering for base in plan.bases), default=RENDERING)
    settled = replace(prepared, columns=read_schema(plan.schema), carried=plan.carried)
    old = _old_rows(ledger, settled, replace(plan, rendering=least), hooks)
    keeps = old.num > 0 and not options.rerender
    plan = replace(plan, rendering=least if keeps else RENDERING)
    plan = with_kept(ledger, settled, plan)
    ledger.put_plan(plan)
    return plan, old._replace(is_again=options.rerender)


def _gone_on_with(
    ledger: Ledger,
    options: RunOptions,
    decision: Decision,
    plan: Plan,
    old: OldRows,
    tell: Callable[[str], None],
) -> tuple[Manifest | None, Plan | None]:
    """Return the newest plan's manifest, and the plan that runs rows of it again, if any."""
    retry_errors = options.retry_errors
    manifest = ledger.manifest(plan.number)
    ledger.settle()
    if manifest is not None:
        shown = show(ledger, manifest)
        for note in shown.mended:
            tell(note)
        if not retry_errors:
            raise_if_damaged(shown, ledger.storage)
    else:
        for name, why in leave_damaged(ledger, plan):
            tell(f"{name}: {why}; its rows are done again")
    again: Plan | str
    if old.num and options.rerender:
        bases = bases_of(ledger, plan, manifest)
        again = replace(_plan_after(plan, bases, retries=retry_errors), rendering=RENDERING)
    elif not retry_errors or (manifest is None and _is_retried(ledger, plan, decision.prepared)):
        return manifest, None
    else:
        again = retry_plan(ledger, plan, manifest)
    if isinstance(again, str):
        if manifest is None:
            tell(again)
        return manifest, None
    again = with_kept(ledger, decision.prepared, again)
    ledger.put_plan(again)
    return manifest, again


def _is_retried(ledger: Ledger, plan: Plan, prepared: Prepared) -> bool:
    """Tell whether errors were just tried again, with an end that only has to be published."""
    durable = ledger.durable(plan)
    if plan.takes_errors or durable.num_done != plan.num_rows:
        return False
    limits = gate_figures(ledger, prepared, plan, durable)
    return not any(limit.is_exceeded for limit in limits)
