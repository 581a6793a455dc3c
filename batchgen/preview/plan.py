"""`batchgen plan`: what a run would do, told by the run's own beginning.

The run's code decides, plans and takes over, up to the point where it would claim the job; below
it lies a view of the output that drops what is written. So a plan says what the run then does.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.answers.json_schema import row_validator
from batchgen.core.errors import BatchgenError, OutputError
from batchgen.core.records import RowSet
from batchgen.engine.vllm.settings import gpus_of
from batchgen.job.recipe import Seeds
from batchgen.pipeline.decide import Begun, Hooks, begin, decide, refuse_foreign
from batchgen.pipeline.interface import RunOptions
from batchgen.pipeline.job_run import tuned_notes
from batchgen.pipeline.reuse import (
    answered_keys,
    base_sources,
    missing,
    new_rows,
    rejected_notes,
    takeovers,
)
from batchgen.preview.estimate import BLOCK_TOKENS, Estimate, Price, Rate, Work, estimate, last_run
from batchgen.preview.report import Forecast, Rows
from batchgen.preview.sample import SAMPLE_ROWS, How, load_tokenize, max_model_len, survey
from batchgen.prompt.requests import RequestBuilder
from batchgen.storage import LocalStorage
from batchgen.store.ledger import Ledger
from batchgen.store.matching import has_digests, is_same_reading
from batchgen.store.reuse import Source
from batchgen.store.runs import RunLock

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchgen.core.records import EngineSpec
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.prepare import Prepared
    from batchgen.pipeline.reuse import Takeover
    from batchgen.preview.estimate import PastRun
    from batchgen.preview.sample import Survey
    from batchgen.store.books import Durable, Plan
    from batchgen.store.dedupe import KnownKeys

ONLY_PUBLISH = "every row has ended: a run would only publish, if the gate lets it"


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The options of `batchgen plan`."""

    run: RunOptions = field(default_factory=RunOptions)
    """Options of the run that is foretold."""
    is_exact: bool = False
    """Look at every row that is to do."""
    rate: Rate | None = None
    """How fast rows come; None: as in the last run."""
    price: Price | None = None
    sample_rows: int = SAMPLE_ROWS


class Overlay(LocalStorage):
    """An output that is read and stays as it is: what is written goes to a scratch folder."""

    def __init__(self, root: Path, scratch: Path) -> None:
        """Bind; `scratch` is empty and the caller's to remove."""
        super().__init__(scratch)
        self._below = LocalStorage(root)

    @property
    def where(self) -> str:
        """The output folder."""
        return self._below.where

    def path(self, name: str) -> Path:
        """Return where a file can be read."""
        here = super().path(name)
        return here if here.exists() else self._below.path(name)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """See `Storage`; kept in the scratch folder."""
        found = self._below.read(name)
        return found == data if found is not None else super().put_if_absent(name, data)

    def list(self, folder: str) -> list[str]:
        """See `Storage`."""
        return sorted({*self._below.list(folder), *super().list(folder)})

    def replace(self, name: str, data: bytes) -> None:
        """Do nothing, as everything here that would change a file."""

    def expose(
        self, name: str, alias: str, is_wanted: Callable[[Path], bool] = lambda _: True
    ) -> bool:
        """See `LocalStorage`; says what it would do."""
        return is_wanted(self.path(name))

    def protect(self, name: str) -> None:
        """Do nothing."""

    def settle(self, folder: str) -> None:
        """Do nothing."""

    def remove(self, name: str) -> None:
        """Do nothing."""

    def remove_folder(self, name: str) -> None:
        """Do nothing."""


def foresee(load: Callable[[], JobConfig], options: PlanOptions) -> Forecast:
    """Say what a run would do, and touch nothing.

    Reads the files that changed once, to count and hash; the digests of their rows go to a
    temporary folder, 16 bytes a row.

    Args:
        load: Loads the job; what it raises is a refusal like any other.
        options: What to look at.

    Returns:
        A forecast also where a run would refuse to start: `state` is then `refused`, and
        `exit_code` the run's.
    """
    warnings: list[str] = []
    try:
        job = load()
        options.run.check()
        warnings += tuned_notes(job)
        root = Path(job.output.path)
        refuse_foreign(root)
        refuse_unwritable(root)
        warnings += _who_holds(LocalStorage(root))
        with tempfile.TemporaryDirectory(prefix="batchgen-plan-") as scratch:
            return _foresee(job, Ledger(Overlay(root, Path(scratch))), options, warnings)
    except BatchgenError as error:
        code = int(error.exit_code)
        return Forecast("refused", code, str(error), warnings=warnings)


def _foresee(job: JobConfig, ledger: Ledger, options: PlanOptions, warnings: list[str]) -> Forecast:
    ahead = _look_ahead(job, ledger, options.run, warnings)
    prepared, plan = ahead.prepared, ahead.begun.plan
    spec = prepared.engine_spec(None)
    past = last_run(ledger.storage, prepared)
    max_len, source = max_model_len(spec, past)
    found = _survey(ahead, spec, options, max_len) if ahead.todo else None
    reason = ahead.begun.nothing_to_do
    return Forecast(
        state="ready" if reason is None else "nothing_to_do",
        reason=reason,
        output=job.output.path,
        plan_number=plan.number,
        is_continued=ahead.is_continued,
        rows=ahead.rows,
        num_leaving=ahead.begun.leaving.num_rows,
        survey=found,
        block_tokens=_block_tokens(spec),
        max_model_len=max_len,
        max_model_len_source=source,
        past=past,
        estimate=_estimate(found, spec, past, options) if found is not None else None,
        warnings=warnings,
    )


@dataclass(frozen=True, slots=True)
class _Ahead:
    """How a run would begin."""

    prepared: Prepared
    begun: Begun
    is_continued: bool
    """Whether the run would go on with a plan that is there."""
    rows: Rows
    todo: RowSet
    """Segment -> rows that the run would read."""
    known: KnownKeys | None
    """Requests whose answer the run would copy."""


def _look_ahead(job: JobConfig, ledger: Ledger, options: RunOptions, warnings: list[str]) -> _Ahead:
    """Begin the run, up to its claim, and count the rows that would be left to it.

    Raises:
        BatchgenError: What a run would refuse to start with.
    """

    def tell(text: str) -> None:
        if text not in warnings:
            warnings.append(text)

    decision = decide(ledger, job, options)
    for note in (*decision.prepared.notes, *decision.notes):
        tell(note)
    digests = ledger.storage if decision.before.seen is not None else None
    begun = begin(ledger, options, decision, Hooks(tell, lambda: None, digests))
    plan, prepared = begun.plan, decision.prepared
    is_continued = plan is decision.plan
    if begun.nothing_to_do is not None:
        rows = Rows(plan.num_rows, num_done=plan.num_rows)
        return _Ahead(prepared, begun, is_continued, rows, RowSet(), None)
    durable = ledger.durable(plan)
    for note in rejected_notes(durable):
        tell(note)
    todo = missing(plan, durable)
    sources = takeovers(ledger, prepared, plan, todo, tell)
    left = todo
    for source in sources:
        left -= source.wanted_rows()
    rows = _count_rows(ledger, plan, sources, todo, left)
    if is_continued and not todo:
        tell(ONLY_PUBLISH)
    known = _known(ledger, prepared, plan, durable, tell) if left else None
    return _Ahead(prepared, begun, is_continued, rows, left, known)


def _known(
    ledger: Ledger, prepared: Prepared, plan: Plan, durable: Durable, tell: Callable[[str], None]
) -> KnownKeys | None:
    sources = base_sources(ledger, plan)
    if prepared.job.run.dedupe != "never":
        sources += [Source(part.name, takes_errors=True) for part in durable.parts]
    if not sources:
        return None
    return answered_keys(ledger.storage, sources, prepared.job.output.prefix, tell)


def _count_rows(
    ledger: Ledger,
    plan: Plan,
    sources: list[Takeover],
    todo: RowSet,
    left: RowSet,
) -> Rows:
    """Say of each physical row what a run would do with it, before it reads any.

    Args:
        ledger: The job's books, with the digests of rows.
        plan: The plan.
        sources: What it takes from its bases, the newest first.
        todo: Segment -> rows that are not done.
        left: Segment -> rows that are not taken over either.
    """
    num_left, num_todo = left.num_rows, todo.num_rows
    num_done = plan.num_rows - num_todo
    if not sources:
        return Rows(plan.num_rows, num_new=num_left, num_done=num_done)
    newest = sources[0]
    fresh = left - new_rows(newest.matched)
    num_unread, num_edited = 0, 0
    numbers = {segment.path: number for number, segment in enumerate(plan.segments)}
    is_same = is_same_reading(newest.old, plan)
    for at, before in enumerate(newest.old.segments):
        if (number := numbers.get(before.path)) is None:
            continue
        after, num_fresh = plan.segments[number], len(fresh[number])
        is_told = before.digest == after.digest or has_digests(ledger.storage, before, after)
        if is_same and is_told:
            kept = (span.length for span in newest.matched if span.old_segment == at)
            num_edited += min(num_fresh, before.num_rows - sum(kept))
        else:
            num_unread += num_fresh
    num_fresh = fresh.num_rows
    return Rows(
        num_rows=plan.num_rows,
        num_new=num_fresh - num_edited - num_unread,
        num_edited=num_edited,
        num_unread=num_unread,
        num_again=num_left - num_fresh,
        num_reused=num_todo - num_left,
        num_done=num_done,
    )


def _survey(ahead: _Ahead, spec: EngineSpec, options: PlanOptions, max_len: int | None) -> Survey:
    prepared, plan, sampling = ahead.prepared, ahead.begun.plan, ahead.prepared.job.sampling
    builder = RequestBuilder(
        prepared.builder,
        prepared.job,
        plan.recipe_fingerprint,
        seeds=Seeds(sampling, plan.seed_generation),
        ids=itertools.count(),
        check_schema=row_validator,
    )
    how = How(
        max_tokens=sampling.max_tokens,
        n=sampling.n,
        max_model_len=max_len,
        known=ahead.known,
        dedupe=prepared.job.run.dedupe,
        is_exact=options.is_exact,
        sample_rows=options.sample_rows,
        block_tokens=_block_tokens(spec),
    )
    return survey(plan, ahead.todo, prepared, builder, load_tokenize(spec), how)


def _estimate(
    found: Survey, spec: EngineSpec, past: PastRun | None, options: PlanOptions
) -> Estimate | None:
    work = Work(found.num_to_compute, found.prompt_tokens, found.max_output_tokens)
    is_cpu = not spec.is_vllm or (past is not None and past.device == "cpu")
    num_gpus = gpus_of(spec.model_kwargs, is_cpu=is_cpu)
    return estimate(work, options.rate, past, num_gpus, options.price)


def _block_tokens(spec: EngineSpec) -> int:
    given: Any = spec.model_kwargs.get("block_size")
    return given if isinstance(given, int) and given > 0 else BLOCK_TOKENS


def _who_holds(storage: LocalStorage) -> list[str]:
    """Another run that is at work: a run would exit 75, a plan can be made all the same."""
    lock = RunLock(storage)
    if not lock.is_held():
        return []
    holder = lock.holder() or {}
    return [
        f"run {holder.get('run_id')} (process {holder.get('pid')} on {holder.get('host')}, since "
        f"{holder.get('since')}) is at work on this job: a run would exit 75 now, and what is "
        "told here changes while it works"
    ]


def refuse_unwritable(root: Path) -> None:
    """Refuse an output that could not be made or written to.

    Raises:
        OutputError: The folder, or the first one above it that exists, cannot be written to.
    """
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        msg = f"{there}: cannot be written to; mend its rights, or choose another output.path"
        raise OutputError(msg)
