"""A sample of rows through a job as it stands, side by side with what is published.

A try-out is an ordinary run, of some rows, into an output of its own: `_batchgen/try` below the
job's. It has books of its own, so that nothing of the job is bound, planned or published by it; a
run of the job looks there for answers of its recipe, see `pipeline.sources`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.compute as pc

from batchgen.core.errors import ConfigError, OutputError, StorageError
from batchgen.core.places import folder_of
from batchgen.core.records import RowError, RowSet
from batchgen.core.runtime import Told, command, option
from batchgen.job.model import GateConfig, JobConfig
from batchgen.pipeline.context import RunOptions, StopSwitch, Summary
from batchgen.pipeline.frozen import read_rows
from batchgen.pipeline.job_run import JobRun
from batchgen.pipeline.keeping import kept_rows
from batchgen.pipeline.prepare import Prepared, as_text
from batchgen.pipeline.publish import total_variation
from batchgen.pipeline.sources import NUM_TRIES, ended_rows
from batchgen.preview.sample import sampled
from batchgen.storage import LocalStorage
from batchgen.store.books import STATE, TRIES, Durable, Plan
from batchgen.store.ledger import Ledger
from batchgen.store.matching import Renumbering, Span
from batchgen.store.result_files import ROW, SEGMENT, rows_of
from batchgen.views.pairing import paired
from batchgen.views.rows import readable
from batchgen.views.sides import ANSWER, OLD, LabelMoves, Side, counted_moves

_SHOWN_CHARS = 2000
_LABEL, _ERROR = "_batchgen_label ", "_batchgen_error"
"""Columns of rows that are read beside their answers: their labels as texts, and the error."""


@dataclass(frozen=True, slots=True)
class TryOptions:
    """Which rows are tried: the first so many of those that it is about."""

    num_rows: int = 100
    is_random: bool = False
    """Drawn at random, each with the same chance, instead of the first ones."""
    seed: int = 0
    """Another seed, other random rows."""
    where: str | None = None
    """Only rows for which this SQL expression is true, as `input.where`."""
    errors: bool = False
    """Only rows that ended as errors last."""

    def check(self) -> None:
        """Refuse a number of rows that is none.

        Raises:
            ConfigError: It is.
        """
        if self.num_rows < 1:
            raise ConfigError("num_rows", [f"{self.num_rows} is wrong, expected 1 or more"])


@dataclass(frozen=True, slots=True, repr=False)
class Tried(Told):
    """What came of a sample."""

    summary: Summary
    """Of the run; rows that were not asked count as skipped."""
    snapshot: int | None
    """Number of the published snapshot that it is compared with, None without one."""
    rows: Sequence[Mapping[str, Any]] = ()
    """In input order: `where`, `prompt`, `error` (a text or None), `answer` and `published`, column
    -> value each; `published` is None of a row that is not."""
    is_new_recipe: bool = False
    """A run is refused without a word on the recipe, which is not that of the job's last plan."""
    labels: Sequence[LabelMoves] = ()
    """From the published labels to those of now, of rows that have both."""
    notes: Sequence[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """As of a run; errors among the rows do not count."""
        return self.summary.exit_code

    @property
    def num_published(self) -> int:
        """Rows that have a published answer."""
        return sum(row["published"] is not None for row in self.rows)

    @property
    def num_same(self) -> int:
        """Rows whose answer is the published one."""
        return sum(row["published"] == row["answer"] for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        run = self.summary
        return {
            "state": run.state,
            "exit_code": run.exit_code,
            "reason": run.reason,
            "output": run.output,
            "num_ok": run.num_ok,
            "num_errors": run.num_errors,
            "snapshot": self.snapshot,
            "num_published": self.num_published,
            "num_same": self.num_same,
            "labels": [moves.as_dict() for moves in self.labels],
            "rows": list(self.rows),
            "notes": list(self.notes),
        }

    def as_text(self, num_rows: int = 5) -> str:
        """Write figures and some rows for a person: those first that differ, then errors."""
        run = self.summary
        lines = [f"note: {text}" for text in self.notes]
        if run.state != "complete":
            return "\n".join([*lines, f"{run.state}: {run.reason}"])
        num = run.num_ok + run.num_errors
        lines.append(f"tried {num:,} rows: {run.num_ok:,} ok, {run.num_errors:,} errors")
        if self.snapshot is not None:
            lines.append(
                f"of {self.num_published:,} that snapshot {self.snapshot} has, "
                f"{self.num_same:,} have the same answer"
            )
        for moves in self.labels:
            lines += [moves.agreement_line(), *moves.lines()]
        shown = sorted(self.rows, key=_interest)[:num_rows]
        lines += [line for row in shown for line in _row_lines(row)]
        if len(shown) < num:
            lines.append(f"{num - len(shown):,} more rows, see {option('--json')}")
        return "\n".join([*lines, f"nothing is published; {self._next()}"])

    def _next(self) -> str:
        if not Path(self.summary.output).is_dir():
            return "these answers are not kept"
        run = command("run", *(["--accept-recipe"] if self.is_new_recipe else []))
        return f"`{run}` takes these answers over, if the recipe stays as it is now"


def _interest(row: Mapping[str, Any]) -> int:
    is_other = row["published"] is not None and row["published"] != row["answer"]
    return 0 if is_other else 2 - (row["error"] is not None)


def _row_lines(row: Mapping[str, Any]) -> Iterator[str]:
    yield f"--- {row['where']}"
    yield from [text[:_SHOWN_CHARS] for text in (row["prompt"], row["error"]) if text]
    was = row["published"] or {}
    for name, value in row["answer"].items():
        if value is None and was.get(name) is None:
            continue
        is_other = name in was and was[name] != value
        old = f"   (published: {str(was[name])[:_SHOWN_CHARS]})" if is_other else ""
        yield f"{name:24} {str(value)[:_SHOWN_CHARS]}{old}"


def try_out(job: JobConfig, options: TryOptions, stop: StopSwitch | None = None) -> Tried:
    """Run a sample of a job's rows, and show them beside what is published.

    The answers are kept below the output, apart from the job's, where the next run by the same
    recipe finds them; where that cannot be written, they are not kept.

    Args:
        job: As loaded.
        options: Which rows.
        stop: Asked by whoever wants it to end early.

    Raises:
        BatchgenError: As of a run; where the last snapshot has no error rows to try, ConfigError.
    """
    options.check()
    output = folder_of(job.root)
    LocalStorage(output).check(STATE)
    notes: list[str] = []
    with ExitStack() as stack:
        place = _place(output)
        if place is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="batchgen-try-")))
            notes.append(f"{output} cannot be written: the answers are not kept")
        sample = _Sample(output, place, options)
        run = JobRun(
            _job_of(job, place, options),
            stop=stop or StopSwitch(),
            options=RunOptions(fresh=True),
            sample=sample,
        )
        summary = run.run()
        notes += summary.warnings
        if summary.state != "complete":
            return Tried(summary, None, notes=notes)
        old, new = _published(output, notes), _newest(Ledger(LocalStorage(place)))
        return _side_by_side(summary, sample, old, new, notes)


def _place(output: Path) -> Path | None:
    """Make the folder of try-outs; None where it cannot be written."""
    storage = LocalStorage(output)
    try:
        storage.make_folder(storage.path(TRIES))
        storage.begin(f"{TRIES}/probe").discard()
    except (OSError, OutputError, StorageError):
        return None
    return storage.path(TRIES)


def _job_of(job: JobConfig, place: Path, options: TryOptions) -> JobConfig:
    """Make the job of a try-out: elsewhere, held back by nothing, over rows that are wanted."""
    wanted: dict[str, Any] = {}
    if options.where is not None:
        both = [f"({text})" for text in (job.input.where, options.where) if text is not None]
        wanted["where"] = " AND ".join(both)
    if not (options.is_random or options.errors):
        wanted["limit"] = min(options.num_rows, job.input.limit or options.num_rows)
    output = {"path": str(place), "keep_snapshots": NUM_TRIES}
    elsewhere = job.quiet().changed(input=wanted, output=output)
    return elsewhere.model_copy(update={"gate": GateConfig(max_error_rate=1.0, max_shrink=1.0)})


class _Sample:
    """Chooses the rows; knows then what they are rows of."""

    def __init__(self, output: Path, place: Path, options: TryOptions) -> None:
        """Look for the errors, if they are wanted.

        Raises:
            ConfigError: There are none.
            BatchgenError: They cannot be read.
        """
        self._options = options
        self._place = LocalStorage(place)
        self._ledger = Ledger(LocalStorage(output))
        self._old: Plan | None = None
        self._errors = RowSet()
        if options.errors:
            self._old, self._errors = self._find_errors()
        self.prepared: Prepared | None = None
        self.plan: Plan | None = None

    def _find_errors(self) -> tuple[Plan, RowSet]:
        ledger, where = self._ledger, option("--errors")
        plan = ledger.latest_plan()
        if plan is not None:
            manifest = ledger.manifest(plan.number)
            durable = ledger.durable(plan) if manifest is None else Durable()
            status = [f"{plan.prefix}status"]
            tables = ended_rows(ledger.storage, durable, (manifest, plan), status)
            errors = (table.filter(pc.equal(table.column(2), "error")) for table in tables)
            if found := RowSet.of_spans(span for one in errors for span in rows_of(one).spans()):
                return plan, found
        raise ConfigError(where, [f"{ledger.storage.where} has no error rows to try"])

    def __call__(self, prepared: Prepared, plan: Plan) -> RowSet:
        """Choose rows of a plan."""
        self.prepared, self.plan = prepared, plan
        options, rows = self._options, plan.rows
        if self._old is not None:
            spans = paired((self._ledger.storage, self._old), (self._place, plan))
            rows = Renumbering(spans, self._old, plan).ranges(self._errors)
        if options.is_random or options.errors:
            kept = (
                (number, kept_rows(prepared, number, plan.segments[number], found))
                for number, found in rows.items()
            )
            rows = RowSet(kept)
        if options.is_random:
            rows = sampled(rows, options.num_rows, options.seed)
        elif options.errors:
            rows = _first(rows, options.num_rows)
        return rows

    @property
    def is_new_recipe(self) -> bool:
        """Whether the job's last plan was for another recipe."""
        last = self._ledger.latest_plan()
        if last is None or self.prepared is None:
            return False
        return not self.prepared.answers_alike(last)

    def prompts(self, rows: RowSet) -> Iterator[tuple[tuple[int, int], str]]:
        """Read rows again, and say with what each was asked; "" for one that has no prompt."""
        assert self.prepared is not None  # noqa: S101 - rows have been chosen
        assert self.plan is not None  # noqa: S101
        prepared, spec = self.prepared, self.prepared.spec()
        for batch in read_rows(self.plan, rows, prepared.reader, replace(spec, carried=())):
            for row, values in zip(batch.rows, batch.values, strict=True):
                asked = "" if values is None else prepared.builder.build(values)
                text = "" if isinstance(asked, RowError) else as_text(asked, prepared.job)
                yield (batch.segment, row), text


def _first(rows: RowSet, num_rows: int) -> RowSet:
    each = ((at, row) for at, start, stop in rows.spans() for row in range(start, stop))
    return RowSet.of(islice(each, num_rows))


def _newest(ledger: Ledger) -> Side:
    manifest = ledger.latest_manifest()
    assert manifest is not None  # noqa: S101 - a run has just published it
    return Side(ledger, manifest.number)


def _published(output: Path, notes: list[str]) -> Side | None:
    """Look at the last snapshot; None where there is none, or none that can be read."""
    ledger = Ledger(LocalStorage(output))
    try:
        return _newest(ledger) if ledger.latest_manifest() is not None else None
    except (OutputError, StorageError) as error:
        notes.append(f"not compared with what is published: {error}")
        return None


def _side_by_side(
    summary: Summary, sample: _Sample, old: Side | None, new: Side, notes: list[str]
) -> Tried:
    prefix = new.plan.prefix
    rows = _answers(new, prefix)
    ordinals = rows_of(rows.select(SEGMENT, ROW).to_arrow())
    was = rows.clear()
    if old is not None:
        spans = paired(old.place, new.place)
        back = [Span(s.old_segment, s.old_start, s.segment, s.start, s.length) for s in spans]
        wanted = Renumbering(back, new.plan, old.plan).ranges(ordinals)
        was = _answers(old, prefix, wanted, Renumbering(spans, old.plan, new.plan))
    published = dict(_by_ordinal(was))
    prompts = dict(sample.prompts(ordinals))
    number = None if old is None else old.manifest.number
    shown = []
    for place, answer in _by_ordinal(rows):
        error = answer.pop(_ERROR)
        before = published.get(place)
        if before is not None:
            del before[_ERROR]
        where = f"{new.plan.segments[place[0]].path} row {place[1]}"
        told = {"where": where, "prompt": prompts.get(place, ""), "error": error}
        shown.append({**told, "answer": answer, "published": before})
    return Tried(summary, number, shown, sample.is_new_recipe, _moved(rows, was), notes)


def _answers(
    side: Side, prefix: str, wanted: RowSet | None = None, moves: Renumbering | None = None
) -> pl.DataFrame:
    """Read what became of rows: their ordinals, answers by the names of now, labels as texts.

    Args:
        side: The snapshot.
        prefix: What the names of answers are to begin with.
        wanted: Which rows, few enough for memory; None: all.
        moves: To the ordinals that they have now; None: they have those.
    """
    own, ordinal = side.plan.prefix, {SEGMENT: pl.Int32, ROW: pl.Int64}
    names = {name: prefix + base for (kind, base), name in side.columns.items() if kind == ANSWER}
    columns = [
        *(pl.col(name).alias(now) for name, now in names.items()),
        pl.col(f"{own}error").alias(_ERROR),
        *(label.alias(_LABEL + prefix + base) for base, label in side.labels.items()),
    ]
    found = [pl.DataFrame(schema=ordinal)]
    read = [*names, f"{own}error", f"{own}request_key"]
    for table in ended_rows(side.storage, Durable(), (side.manifest, side.plan), read, wanted):
        frame = pl.DataFrame(table)
        if wanted is not None:
            each = ((at, row) for at, start, stop in wanted.spans() for row in range(start, stop))
            here = pl.DataFrame(list(each), schema=ordinal, orient="row")
            frame = frame.join(here, on=[SEGMENT, ROW], how="semi", maintain_order="left")
        if moves is not None:
            frame = pl.DataFrame(moves.table(frame.to_arrow(), own, takes_errors=True))
        found.append(frame.select(SEGMENT, ROW, *columns))
    return pl.concat(found, how="diagonal")


def _by_ordinal(rows: pl.DataFrame) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Yield where each row stands, and what became of it."""
    answers = rows.drop(name for name in rows.columns if name.startswith(_LABEL))
    for row in readable(answers):
        yield (row.pop(SEGMENT), row.pop(ROW)), row


def _moved(rows: pl.DataFrame, was: pl.DataFrame) -> list[LabelMoves]:
    """Count how the labels of rows moved that are in both."""
    both = rows.join(was, on=[SEGMENT, ROW], suffix=OLD)
    found = []
    for name in rows.columns:
        if name.startswith(_LABEL) and name + OLD in both.columns:
            before, after = (
                dict(sorted(both[column].drop_nulls().value_counts().iter_rows()))
                for column in (name + OLD, name)
            )
            moves = counted_moves(both.lazy(), name)
            drift = total_variation(after, before)
            found.append(LabelMoves(name.removeprefix(_LABEL), before, after, drift, moves))
    return found
