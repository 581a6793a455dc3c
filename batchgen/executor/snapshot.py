"""The end of a job: prove the books, write the snapshot, put the manifest, show the files.

The manifest is the commit point. Before it, a crash leaves files that nobody names; after it,
`expose` and the clean-up are repeated by the next run until they are through.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from batchgen import __version__, frozen
from batchgen.books import Durable, Epoch, Manifest
from batchgen.errors import AccountingError, DamagedPartError, GateError, OutputError
from batchgen.ledger import STATE, Ledger
from batchgen.runlog import utc_now
from batchgen.sink.publish import SnapshotFormat, write_snapshot

if TYPE_CHECKING:
    from batchgen.planning import Prepared
    from batchgen.storage import LocalStorage

_ALIAS = re.compile(r"part-\d{5,}\.parquet")


def publish(ledger: Ledger, prepared: Prepared, epoch: Epoch) -> Manifest:
    """Publish a job whose every row is durable, and show the snapshot.

    Args:
        ledger: The job's books.
        prepared: The job.
        epoch: This run's claim.

    Returns:
        The plan's manifest: ours, or that of a run that was faster; they hold the same rows.

    Raises:
        AccountingError: The durable rows are not the planned rows.
        GateError: Too many of them are errors.
        DamagedPartError: A part is not what was written; the next run redoes its rows.
        InputChangedError: An input file is no longer what was planned.
        FencedError: Another run has taken over.
    """
    try:
        manifest = _put_snapshot(ledger, prepared, epoch)
    except (AccountingError, OutputError):
        # A faster run publishes and then removes the parts that we were reading.
        published = ledger.manifest(epoch.plan.number)
        if published is None:
            raise
        ledger.settle()
        manifest = published
    show(ledger, manifest)
    return manifest


def _put_snapshot(ledger: Ledger, prepared: Prepared, epoch: Epoch) -> Manifest:
    plan = epoch.plan
    durable = ledger.durable(plan)
    if durable.num_done != plan.num_rows:
        ledger.check_fence(epoch)
        msg = f"{plan.num_rows} rows planned, {durable.num_done} durable; not published"
        raise AccountingError(msg)
    check_error_limit(durable, prepared.job.run.max_error_rate)
    for segment in plan.segments:
        frozen.check_unchanged(segment, prepared.reader)
    try:
        files = write_snapshot(
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
        files=files,
        num_planned=plan.num_rows,
        num_ok=durable.num_ok,
        num_errors=durable.num_errors,
        num_skipped=durable.num_skipped,
    )
    return ledger.put_manifest(manifest)


def show(ledger: Ledger, manifest: Manifest) -> None:
    """Show the newest snapshot in the output folder and remove what nobody needs. Idempotent.

    The newest, which need not be `manifest`: a run that was frozen before this point must not
    bring an old snapshot back.
    """
    newest, shown = ledger.latest_manifest() or manifest, None
    while newest != shown:  # Frozen inside `expose`, it puts right what it then overwrote.
        expose(ledger.storage, newest)
        newest, shown = ledger.latest_manifest() or newest, newest
    ledger.tidy(newest)


def check_error_limit(durable: Durable, limit: float) -> None:
    """Hold a job back that failed too often.

    Raises:
        GateError: Over the limit; the parts stay, so that a higher limit publishes at once.
    """
    num_results = durable.num_ok + durable.num_errors
    if num_results and durable.num_errors / num_results > limit:
        msg = (
            f"{durable.num_errors:,} of {num_results:,} rows are errors, over "
            f"run.max_error_rate = {limit:g}; nothing published. See them with "
            "`batchgen show JOB --errors`; to publish all the same, raise the limit and run again"
        )
        raise GateError(msg)


def expose(storage: LocalStorage, manifest: Manifest) -> None:
    """Show a snapshot as `part-*.parquet` in the output folder itself.

    Each name is replaced atomically. A reader that lists the folder in between several files may
    see two snapshots; `batchgen.read` goes by the manifest and never does.
    """
    aliases = [file["name"].rpartition("/")[2] for file in manifest.files]
    for file, alias in zip(manifest.files, aliases, strict=True):
        storage.expose(file["name"], alias)
    for name in storage.list(""):
        if _ALIAS.fullmatch(name) and name not in aliases:
            storage.remove(name)


def _snapshot_format(prepared: Prepared, epoch: Epoch, durable: Durable) -> SnapshotFormat:
    plan = epoch.plan
    by = [part.footer.engine for part in durable.parts]
    engines = {f"{facts.get('engine', '')} {facts.get('version', '')}".strip() for facts in by}
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
        metadata={key.encode(): value.encode() for key, value in metadata.items()},
    )
