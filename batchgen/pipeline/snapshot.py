"""The end of a job: prove the books, write the snapshot, put the manifest, show the files.

The manifest is the commit point. Before it, a crash leaves files that nobody names; after it,
`expose` and the clean-up are repeated by the next run until they are through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen import __version__
from batchgen.core.errors import AccountingError, DamagedPartError, GateError, OutputError
from batchgen.pipeline import frozen
from batchgen.pipeline.examples import NUM_EXAMPLES, example_rows
from batchgen.pipeline.gate import Limit, judge_gate, told
from batchgen.store.books import Durable, Epoch, Manifest
from batchgen.store.names import STATE
from batchgen.store.publish import SnapshotFormat, write_snapshot
from batchgen.store.runlog import utc_now
from batchgen.store.shown import Fault, alias_of, faults, is_alias

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchgen.pipeline.planning import Prepared
    from batchgen.storage import LocalStorage
    from batchgen.store.books import Plan
    from batchgen.store.ledger import Ledger

_MOST_TOLD = 5


def publish(ledger: Ledger, prepared: Prepared, epoch: Epoch, *, anyway: bool = False) -> Manifest:
    """Publish a job whose every row is durable, and show the snapshot.

    Args:
        ledger: The job's books.
        prepared: The job.
        epoch: This run's claim.
        anyway: Let it pass the gate whatever its figures are; the manifest tells.

    Returns:
        The plan's manifest: ours, or that of a run that was faster; they hold the same rows.

    Raises:
        AccountingError: The durable rows are not the planned rows.
        GateError: A limit of `[gate]` is exceeded; the parts stay.
        DamagedPartError: A part is not what was written; the next run redoes its rows.
        InputChangedError: An input file is no longer what was planned.
        FencedError: Another run has taken over.
    """
    try:
        manifest = _put_snapshot(ledger, prepared, epoch, anyway=anyway)
    except (AccountingError, GateError, OutputError):
        # A faster run publishes and then removes the parts that we were reading; its gate decided.
        published = ledger.manifest(epoch.plan.number)
        if published is None:
            raise
        ledger.settle()
        manifest = published
    show(ledger, manifest)
    return manifest


def _put_snapshot(ledger: Ledger, prepared: Prepared, epoch: Epoch, *, anyway: bool) -> Manifest:
    plan = epoch.plan
    durable = ledger.durable(plan)
    if durable.num_done != plan.num_rows:
        ledger.check_fence(epoch)
        msg = f"{plan.num_rows} rows planned, {durable.num_done} durable; not published"
        raise AccountingError(msg)
    limits = _pass_gate(ledger, prepared, plan, durable, anyway=anyway)
    for segment in plan.segments:
        frozen.check_unchanged(segment, prepared.reader)
    try:
        snapshot = write_snapshot(
            ledger.storage,
            f"{STATE}/snapshots/e{epoch.number:06d}",
            [(part.name, part.footer) for part in durable.parts],
            _snapshot_format(prepared, epoch, durable),
        )
    except DamagedPartError as error:
        ledger.check_fence(epoch)
        ledger.reject(error.name, error.problem)
        raise
    ledger.check_fence(epoch)
    manifest = Manifest(
        number=plan.number,
        plan_id=plan.plan_id,
        epoch=epoch.number,
        run_id=epoch.run_id,
        created_at=utc_now().isoformat(timespec="seconds"),
        files=snapshot.files,
        num_planned=plan.num_rows,
        num_ok=durable.num_ok,
        num_errors=durable.num_errors,
        num_skipped=durable.num_skipped,
        index=snapshot.index,
        tally=durable.tally,
        gate=[limit.as_dict(is_overridden=anyway) for limit in limits],
    )
    return ledger.put_manifest(manifest)


def show(ledger: Ledger, manifest: Manifest) -> list[str]:
    """Show the newest snapshot in the output folder and remove what nobody needs. Idempotent.

    The newest, which need not be `manifest`: a run that was frozen before this point must not
    bring an old snapshot back.

    Returns:
        What was not shown as it should be, for a warning where the snapshot is no new one.
    """
    newest, shown = ledger.latest_manifest() or manifest, None
    mended = _mended(ledger.storage, newest)
    while newest != shown:  # Frozen inside `expose`, it puts right what it then overwrote.
        expose(ledger.storage, newest)
        newest, shown = ledger.latest_manifest() or newest, newest
    ledger.tidy(newest)
    return mended


def _mended(storage: LocalStorage, manifest: Manifest) -> list[str]:
    """One line on what showing this snapshot puts right, none if there is nothing."""
    found = [
        f"{name} {fault.value}"
        for name, fault in faults(storage, manifest.files).items()
        if fault is not Fault.FOREIGN
    ]
    if not found:
        return []
    more = f" and {len(found) - _MOST_TOLD} more" if len(found) > _MOST_TOLD else ""
    told = ", ".join(found[:_MOST_TOLD])
    return [
        f"{storage.where}: did not show snapshot {manifest.number} as it was published ({told}"
        f"{more}); its files are shown again"
    ]


def gate_figures(
    ledger: Ledger, prepared: Prepared, plan: Plan, durable: Durable
) -> Sequence[Limit]:
    """Every figure of the gate, for a plan whose rows have all ended."""
    last = ledger.manifest_before(plan.number)
    counts = (durable.num_ok, durable.num_errors)
    tally = last.tally if last is not None else None
    num_last = last.num_ok + last.num_errors if last is not None else None
    return judge_gate(prepared.job.gate, counts, durable.tally, tally, num_last)


def _pass_gate(
    ledger: Ledger, prepared: Prepared, plan: Plan, durable: Durable, *, anyway: bool
) -> Sequence[Limit]:
    """The gate's figures.

    Raises:
        GateError: Over a limit; the parts stay, so that a higher limit publishes at once.
    """
    limits = gate_figures(ledger, prepared, plan, durable)
    exceeded = [limit for limit in limits if limit.is_exceeded]
    if not exceeded or anyway:
        return limits
    prefix = prepared.job.output.prefix
    rows = [
        text
        for limit in exceeded
        if limit.column is None and limit.name != "max_shrink"
        for text in example_rows(ledger.storage, plan, durable, prefix, limit.name)
    ]
    examples = list(dict.fromkeys(rows))[:NUM_EXAMPLES]
    raise GateError(told(limits), [limit.as_dict() for limit in limits], examples)


def overridden(manifest: Manifest) -> list[str]:
    """What a snapshot's readers should know: limits that were exceeded and let through."""
    return [
        f"published over a limit of the gate: {entry['text']}, over "
        f"gate.{entry['name']} = {entry['limit']:g}"
        for entry in manifest.gate
        if entry.get("overridden")
    ]


def expose(storage: LocalStorage, manifest: Manifest) -> None:
    """Show a snapshot as `part-*.parquet` in the output folder itself.

    Each name is replaced atomically. A reader that lists the folder in between several files may
    see two snapshots; `batchgen.read` goes by the manifest and never does.
    """
    aliases = [alias_of(file) for file in manifest.files]
    for file, alias in zip(manifest.files, aliases, strict=True):
        storage.expose(file["name"], alias)
    for name in storage.list(""):
        if is_alias(name) and name not in aliases:
            storage.remove(name)


def _snapshot_format(prepared: Prepared, epoch: Epoch, durable: Durable) -> SnapshotFormat:
    plan = epoch.plan
    by = [part.footer.engine for part in durable.parts]
    told_of = {f"{facts.get('engine', '')} {facts.get('version', '')}".strip() for facts in by}
    # A part that was carried over may name several.
    engines = {engine for names in told_of for engine in names.split(", ")}
    metadata = {
        "batchgen.version": __version__,
        "batchgen.plan": plan.plan_id,
        "batchgen.recipe": plan.recipe_fingerprint,
        "batchgen.run": epoch.run_id,
        "batchgen.model": prepared.job.model.name,
        "batchgen.engine": ", ".join(sorted(engines - {""})),
    }
    output = prepared.job.output
    return SnapshotFormat(
        schema=prepared.part_schema,
        prefix=output.prefix,
        compression=output.compression,
        rows_per_file=output.rows_per_file,
        labels=prepared.answer.labels,
        metadata={key.encode(): value.encode() for key, value in metadata.items()},
    )
