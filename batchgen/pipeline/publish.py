"""The end of a job: prove the books, pass the gate, write the snapshot, put the manifest, show it.

The manifest is the commit point. Before it, a crash leaves files that nobody names; after it,
`expose` and the clean-up are repeated by the next run until they are through. The gate's figures
come from the parts' footers: no row is read for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum
from typing import TYPE_CHECKING, Any

from batchgen import __version__
from batchgen.core.errors import (
    AccountingError,
    DamagedPartError,
    GateError,
    OutputError,
    StorageError,
)
from batchgen.core.runtime import command
from batchgen.pipeline.frozen import check_unchanged
from batchgen.pipeline.gold import answer_path, count_gold
from batchgen.pipeline.keeping import leave_damaged
from batchgen.pipeline.sources import ended_rows
from batchgen.store.books import FILES, Durable, Epoch, Manifest, Plan
from batchgen.store.parts import Parts
from batchgen.store.result_files import ATTEMPTS, VERDICT, num_unasked, schema_digest
from batchgen.store.runs import utc_now
from batchgen.store.snapshot import SnapshotFormat, write_snapshot
from batchgen.store.visible import note_as_published, show

if TYPE_CHECKING:
    from batchgen.job.model import GateConfig
    from batchgen.pipeline.prepare import Prepared
    from batchgen.store.ledger import Ledger


_NUM_MOVED = 3
_TRUNCATED = "are cut off at max_tokens"
_SHRINK_TO_NOTHING = 0.999
"""Holds without `max_shrink` where no row is left: a filter that matches nothing, an empty file."""
_MEND_INPUT = "unless it is set: look at input.path, input.where and input.limit"
_MEND_NOTHING = (
    f"where no row at all is left, gate.max_shrink is {_SHRINK_TO_NOTHING} {_MEND_INPUT}"
)
MAX_SHRINK = 0.5
"""Limit where none is set, in outputs that began with it: a manifest of theirs has a limit, whose
absence in older ones keeps them as they were.

Half: what an input loses by itself from night to night (rows that are done, a weekend's file that
is smaller) is less, and what people lose it by (a limit that was left in, one folder of two that
did not arrive, an export that broke off) mostly is more. A tighter default would hold back nights
that are right; who knows the input sets one."""


def _mend_input() -> str:
    shows = f"`{command('show', '--errors')}` shows them"
    return f"no error row has reached the engine: mend the input ({shows}) and run again"


@dataclass(frozen=True, slots=True)
class Limit:
    """One figure, and whether it is over its limit."""

    name: str
    """The key in `[gate]`."""
    figure: float | None
    """0 to 1; None: there is nothing to compare with."""
    limit: float | None
    """None: none is set."""
    text: str
    """The figure in words."""
    column: str | None = None
    """Whose labels, for drift."""
    hint: str | None = None
    """What to do where it is exceeded, if that is not what helps with most."""

    @property
    def is_exceeded(self) -> bool:
        """Whether the figure holds the job back."""
        if self.limit is None or self.figure is None:
            return False
        return self.figure < self.limit if is_least(self.name) else self.figure > self.limit

    def as_dict(self, *, is_overridden: bool = False) -> dict[str, Any]:
        """Plain values, for JSON; `overridden` if it was exceeded and let through."""
        told = {"column": self.column, "hint": self.hint if self.is_exceeded else None}
        return {
            "name": self.name,
            "figure": self.figure,
            "limit": self.limit,
            "text": self.text,
            **{name: value for name, value in told.items() if value is not None},
            "exceeded": self.is_exceeded,
            **({"overridden": True} if is_overridden and self.is_exceeded else {}),
        }


def is_least(name: str) -> bool:
    """Whether a limit is for the least that a figure may be, not for the most."""
    return name.startswith("min_")


def _beyond(name: str) -> str:
    return "below" if is_least(name) else "over"


def judge_gate(
    gate: GateConfig,
    counts: tuple[int, int],
    tally: Mapping[str, Mapping[str, int]],
    last: Mapping[str, Mapping[str, int]] | None,
    num_last: int | None = None,
) -> list[Limit]:
    """Return every figure of the gate, whether a limit is set for it or not.

    Args:
        gate: The limits.
        counts: Results that are ok, and that are errors.
        tally: Of all results, see `result_files.tally`.
        last: The same of the last published snapshot of an earlier plan, None if there is none.
        num_last: How many results that snapshot has, ok and errors.
    """
    num_ok, num_errors = counts
    num_results = num_ok + num_errors
    attempts = tally.get(ATTEMPTS, {})
    num_truncated = tally.get(VERDICT, {}).get("truncated", 0)
    num_retried = sum(n for times, n in attempts.items() if int(times) > 1)
    limits = [
        _rate(name, limit, num, num_results, what)
        for name, limit, num, what in (
            ("max_error_rate", gate.max_error_rate, num_errors, "are errors"),
            ("max_truncated_rate", gate.max_truncated_rate, num_truncated, _TRUNCATED),
            ("max_retry_rate", gate.max_retry_rate, num_retried, "needed more than one attempt"),
        )
    ]
    if 0 < num_errors == num_unasked(tally):
        limits[0] = replace(limits[0], hint=_mend_input())
    columns = [name for name in tally if name not in (VERDICT, ATTEMPTS)]
    for column in columns if gate.drift_column is None else [gate.drift_column]:
        before = None if last is None else last.get(column)
        limits.append(_drift(column, gate.max_drift, tally.get(column, {}), before))
    if num_last is not None or gate.max_shrink is not None:
        limits.append(_shrink(gate.max_shrink, num_results, num_last))
    return limits


def _rate(name: str, limit: float | None, count: int, num_results: int, what: str) -> Limit:
    figure = count / num_results if num_results else 0.0
    return Limit(name, figure, limit, f"{count:,} of {num_results:,} rows {what}")


def _shrink(limit: float | None, num_now: int, num_last: int | None) -> Limit:
    """Judge by how much fewer the rows are, as where files went missing."""
    if num_last is None:
        return Limit("max_shrink", None, limit, "there is no last snapshot to compare with")
    hint = None
    if limit is None and not num_now:
        limit, hint = _SHRINK_TO_NOTHING, _MEND_NOTHING
    num_gone = max(num_last - num_now, 0)
    text = f"{num_now:,} rows are {num_gone:,} fewer than the {num_last:,} of the last snapshot"
    return Limit("max_shrink", num_gone / num_last if num_last else 0.0, limit, text, hint=hint)


def _drift(
    column: str, limit: float | None, now: Mapping[str, int], last: Mapping[str, int] | None
) -> Limit:
    figure = None if last is None else total_variation(now, last)
    if figure is None or last is None:
        text = f"{column} has no labels, or had none in the last snapshot, to compare"
        return Limit("max_drift", None, limit, text, column)
    moved = ", ".join(_most_moved(now, last))
    text = f"{column} has drifted by {figure:.3g} from the last snapshot" + (
        f" ({moved})" if moved else ""
    )
    return Limit("max_drift", figure, limit, text, column)


def total_variation(now: Mapping[str, int], last: Mapping[str, int]) -> float | None:
    """Half the sum of the differences between two sets of shares: 0 alike, 1 nothing in common.

    None if one of them counts nothing.
    """
    p, q = _shares(now), _shares(last)
    if not p or not q:
        return None
    return 0.5 * fsum(abs(p.get(name, 0.0) - q.get(name, 0.0)) for name in p.keys() | q.keys())


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()} if total else {}


def _most_moved(now: Mapping[str, int], last: Mapping[str, int]) -> Iterator[str]:
    """Yield the labels whose shares differ most, as `refund 12.0 % -> 31.5 %`."""
    p, q = _shares(now), _shares(last)
    moves = {name: abs(p.get(name, 0.0) - q.get(name, 0.0)) for name in p.keys() | q.keys()}
    for name in sorted(moves, key=lambda n: (-round(moves[n], 9), n))[:_NUM_MOVED]:
        if moves[name]:
            was, is_now = q.get(name, 0.0), p.get(name, 0.0)
            yield f"{name} {was:.1%} -> {is_now:.1%}".replace("%", " %")


def exceeded_text(limits: Sequence[Limit]) -> str:
    """Name the exceeded limits in one sentence; empty if there are none."""
    return "; ".join(
        f"{limit.text}, {_beyond(limit.name)} gate.{limit.name} = {limit.limit:g}"
        for limit in limits
        if limit.is_exceeded
    )


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
    except (AccountingError, GateError, OutputError, StorageError):
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
    for name, why in leave_damaged(ledger, plan):
        ledger.check_fence(epoch)
        raise DamagedPartError(name, why)
    limits = _pass_gate(ledger, prepared, plan, durable, anyway=anyway)
    for segment in plan.segments:
        check_unchanged(segment)
    form = _snapshot_format(prepared, epoch, durable)
    try:
        files = write_snapshot(
            Parts(
                ledger.storage,
                [(part.name, part.footer) for part in durable.parts],
                prepared.part_schema,
            ),
            plan,
            durable.kept,
            form,
            f"{FILES}/e{epoch.number:06d}",
        )
    except DamagedPartError as error:
        ledger.check_fence(epoch)
        ledger.reject(error.name, error.problem)
        raise
    ledger.check_fence(epoch)
    note_as_published(ledger.storage, files)
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
        schema=schema_digest(form.published),
        tally=durable.tally,
        gate=[limit.as_dict(is_overridden=anyway) for limit in limits],
    )
    return ledger.put_manifest(manifest, plan.kept_of)


def gate_figures(
    ledger: Ledger, prepared: Prepared, plan: Plan, durable: Durable
) -> Sequence[Limit]:
    """Work out every figure of the gate, for a plan whose rows have all ended."""
    last = ledger.manifest_before(plan.number)
    counts = (durable.num_ok, durable.num_errors)
    tally = last.tally if last is not None else None
    num_last = last.num_ok + last.num_errors if last is not None else None
    gate, is_new = prepared.job.gate, last is None or _had_limit(last)
    is_default = gate.max_shrink is None and is_new
    if is_default:
        gate = gate.model_copy(update={"max_shrink": MAX_SHRINK})
    limits = judge_gate(gate, counts, durable.tally, tally, num_last)
    if is_default:
        hint = f"gate.max_shrink is {MAX_SHRINK} {_MEND_INPUT}"
        limits = [
            replace(limit, hint=hint) if limit.name == "max_shrink" else limit for limit in limits
        ]
    if prepared.job.score.gold is not None:
        limits.append(_accuracy(ledger, prepared, plan, durable))
    return limits


def _accuracy(ledger: Ledger, prepared: Prepared, plan: Plan, durable: Durable) -> Limit:
    """Count the answers that are right; those of error rows are not."""
    job, path = prepared.job, answer_path(prepared.job, prepared.answer)
    gold, column = job.score.gold, job.score.column
    assert column is not None  # noqa: S101 - asked only then
    assert path is not None  # noqa: S101 - see `check_score`
    prefix = job.output.prefix
    columns = list(dict.fromkeys((column, prefix + path[0], f"{prefix}status")))
    tables = ended_rows(ledger.storage, durable, (None, plan), columns)
    counts = count_gold(tables, job.score, path, prefix)
    num, num_right = counts.total(), sum(n for (right, told), n in counts.items() if right == told)
    text = f"{num_right:,} of {num:,} rows with a label in {gold!r} have it in their answer"
    figure = num_right / num if num else None
    return Limit("min_accuracy", figure, job.gate.min_accuracy, text)


def _had_limit(last: Manifest) -> bool:
    """Tell whether a snapshot was held against a limit of `max_shrink`, set or not."""
    found = (entry["limit"] for entry in last.gate if entry["name"] == "max_shrink")
    return any(limit is not None for limit in found)


def _pass_gate(
    ledger: Ledger, prepared: Prepared, plan: Plan, durable: Durable, *, anyway: bool
) -> Sequence[Limit]:
    """Return the gate's figures, or hold the job back.

    Raises:
        GateError: Over a limit; the parts stay, so that a higher limit publishes at once.
    """
    limits = gate_figures(ledger, prepared, plan, durable)
    if anyway or not any(limit.is_exceeded for limit in limits):
        return limits
    raise GateError(exceeded_text(limits), [limit.as_dict() for limit in limits])


def overridden(manifest: Manifest) -> list[str]:
    """List the limits that a snapshot exceeded and was let through, for its readers."""
    return [
        f"published over a limit of the gate: {entry['text']}, {_beyond(entry['name'])} "
        f"gate.{entry['name']} = {entry['limit']:g}"
        for entry in manifest.gate
        if entry.get("overridden")
    ]


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
        labels=prepared.answer.label_paths,
        metadata={
            key.encode(): value.encode(errors="backslashreplace") for key, value in metadata.items()
        },
    )
