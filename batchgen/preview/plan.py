"""`batchgen plan`: what a run would do, told by the run's own beginning.

The run's code decides, plans and takes over, up to the point where it would claim the job; below
it lies a view of the output that drops what is written. So a plan says what the run then does.
What is found is one record for programs, and the lines that a person reads.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import BatchgenError
from batchgen.core.records import EngineSpec, RowSet, WorkLeft
from batchgen.core.runtime import Told, command, option, read_json
from batchgen.engine.vllm.settings import choose_settings, gpus_of, settings_text
from batchgen.engine.vllm.shares import engines_for, is_enough
from batchgen.pipeline.compute import lengths_of, work_of
from batchgen.pipeline.context import RunOptions
from batchgen.pipeline.decide import Begun, Hooks, begin, decide
from batchgen.pipeline.frozen import request_builder
from batchgen.pipeline.job_run import tuned_notes
from batchgen.pipeline.rows import missing, new_rows, rejected_notes, takeovers, unread_rows
from batchgen.pipeline.sources import answered_keys, base_sources, tried_sources
from batchgen.pipeline.stats import duration
from batchgen.preview.estimate import (
    Estimate,
    Price,
    Rate,
    Work,
    bars,
    estimate,
    last_run,
    read_price,
)
from batchgen.preview.sample import SAMPLE_ROWS, Survey, load_tokenize, max_model_len, survey
from batchgen.storage import LocalStorage
from batchgen.storage.remote import storage_at
from batchgen.store.books import STATE, TRIES, Durable, Plan
from batchgen.store.ledger import Ledger
from batchgen.store.reuse import Source
from batchgen.store.runs import RunLock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from batchgen.job.model import JobConfig
    from batchgen.pipeline.prepare import Prepared
    from batchgen.pipeline.rows import Takeover
    from batchgen.preview.estimate import Estimate, PastRun
    from batchgen.store.keys import KeySet


@dataclass(frozen=True, slots=True)
class Rows:
    """What a run would do with each physical row, before it reads any."""

    num_rows: int
    num_new: int = 0
    """That no earlier plan has seen."""
    num_edited: int = 0
    """In place of others that an earlier plan has seen."""
    num_unread: int = 0
    """Of files that changed and whose rows can only be told apart by reading them."""
    num_again: int = 0
    """Seen before, but without an answer, or with an error that is tried again."""
    num_reused: int = 0
    """Taken over from an earlier plan."""
    num_done: int = 0
    """Of this plan, by an earlier run."""


@dataclass(frozen=True, slots=True, repr=False)
class Forecast(Told):
    """A plan, told. Counts of rows to do are estimates where `survey` is not exact."""

    state: str
    """`ready`, `nothing_to_do` or `refused`."""
    exit_code: int = 0
    reason: str | None = None
    """Why a run would refuse to start, or has nothing to do."""
    output: str = ""
    plan_number: int | None = None
    is_continued: bool = False
    """A run goes on with a plan that is there."""
    rows: Rows | None = None
    num_old_rendering: int = 0
    """Rows that were made with an old rendering, kept or, if asked for, run again."""
    num_leaving: int = 0
    """Rows of the last snapshot that the plan has no row for; the warnings say why."""
    survey: Survey | None = None
    max_model_len: int | None = None
    max_model_len_source: str = ""
    temperature: str = ""
    """Of the rows, and who says so; empty where a server does, or nothing is generated."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """That a run would choose for its engine, as far as that is known without it."""
    past: PastRun | None = None
    estimate: Estimate | None = None
    warnings: Sequence[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found = asdict(replace(self, survey=None, estimate=None))
        del found["survey"], found["past"], found["settings"]
        return {
            **found,
            "todo": self.survey.as_dict() if self.survey else None,
            "engine_settings": dict(self.settings),
            "last_run": asdict(self.past) if self.past else None,
            "estimate": self.estimate.as_dict() if self.estimate else None,
        }

    def as_text(self) -> str:
        """The lines that a person reads."""
        lines = [f"warning: {text}" for text in self.warnings]
        if self.state == "refused":
            return "\n".join([*lines, f"refused: {self.reason}"])
        lines.append(_head(self))
        if self.rows is not None:
            lines.append(f"  rows     {_rows(self.rows)}")
        survey = self.survey
        if survey is not None and survey.num_rows:
            lines += _todo(survey)
            lines += _tokens(self, survey)
            lines += _answers(self, survey)
            if chosen := settings_text(self.settings):
                lines.append(f"  engine   {chosen}")
            lines += _cost(self.estimate)
        return "\n".join(lines)


def _head(forecast: Forecast) -> str:
    if forecast.state == "nothing_to_do":
        return f"nothing to do: {forecast.reason}"
    if forecast.is_continued:
        return f"a run would go on with plan {forecast.plan_number} in {forecast.output}"
    return f"a run would begin plan {forecast.plan_number} in {forecast.output}"


def _rows(rows: Rows) -> str:
    counts = [
        (rows.num_new, "new"),
        (rows.num_edited, "edited"),
        (rows.num_unread, "of changed files, to be compared by request"),
        (rows.num_again, "again"),
        (rows.num_reused, "reused"),
        (rows.num_done, "done already"),
    ]
    parts = [f"{num:,} {word}" for num, word in counts if num or word == "new"]
    return f"{rows.num_rows:,} planned: {', '.join(parts)}"


def _todo(survey: Survey) -> Iterator[str]:
    about = "" if survey.is_exact else "~"
    looked = f"of a sample of {survey.num_looked:,} of {survey.num_rows:,} rows (~: estimated)"
    yield f"  to do    {survey.num_rows:,} rows, told {'of all' if survey.is_exact else looked}"
    yield f"    compute    {about}{survey.num_to_compute:,}"
    kinds = ", ".join(f"{kind} {about}{num:,}" for kind, num in survey.bad.items())
    counts = [
        (survey.num_known, "reused", "the same request has an answer"),
        (survey.num_duplicates, "duplicate", "equal to another row, whose answer they get"),
        (survey.num_too_long, "too long", "the prompt leaves no room for an answer: errors"),
        (survey.num_bad, "bad", f"errors before the engine: {kinds}"),
        (survey.num_skipped, "skipped", "blank, or left out by input.where"),
    ]
    for num, word, meaning in counts:
        if num:
            yield f"    {word:10} {about}{num:,} ({meaning})"
    if survey.num_repeats:
        yield (
            f"               {about}{survey.num_repeats:,} are equal to another row and computed "
            "all the same: sampling is random, see run.dedupe"
        )


def _tokens(forecast: Forecast, survey: Survey) -> Iterator[str]:
    lengths = survey.lengths
    if lengths is None:
        return
    about = "" if survey.is_exact else "~"
    of = "of all" if survey.is_exact else f"from a sample of {lengths.num:,}"
    yield (
        f"  prompts  {about}{survey.prompt_tokens:,} tokens ({of}): mean {lengths.mean:,.0f}, "
        f"p50 {lengths.p50:,}, p95 {lengths.p95:,}, longest {lengths.longest:,}"
    )
    for line in bars(lengths.buckets):
        yield f"    {line}"
    if survey.num_unknown:
        yield f"    {about}{survey.num_unknown:,} rows have images: only the engine can count them"
    if forecast.max_model_len is not None:
        tight = f", ~{survey.num_tight:,} rows" if about else f", {survey.num_tight:,} rows"
        yield (
            f"    max_model_len {forecast.max_model_len:,} ({forecast.max_model_len_source})"
            + (f"{tight} have less room than max_tokens" if survey.num_tight else "")
        )


def _answers(forecast: Forecast, survey: Survey) -> Iterator[str]:
    about = "" if survey.is_exact else "~"
    line = f"  answers  at most {about}{survey.max_output_tokens:,} tokens, retries not counted"
    estimate = forecast.estimate
    if estimate is not None and estimate.output_tokens is not None and forecast.past is not None:
        mean = forecast.past.output_tokens / forecast.past.num_rows
        line += (
            f"; ~{estimate.output_tokens:,.0f} expected, at {mean:,.1f} a row as in run "
            f"{forecast.past.run_id}"
        )
    yield line
    if forecast.temperature:
        yield f"    temperature {forecast.temperature}"


def _cost(estimate: Estimate | None) -> Iterator[str]:
    if estimate is None:
        measure = command("run", "--set", "input.limit=1000", "--set", "output.path=trial")
        yield (
            "  time     cannot be told: no run of this model has been here; give "
            f"{option('--rate', '250rows/s')} or {option('--rate', '12000tokens/s')}, or measure "
            f"with `{measure}`"
        )
        return
    start = f"engine start {duration(estimate.start_s)}, " if estimate.start_s else ""
    most = "at most " if estimate.is_upper_bound else "~"
    rate = f"{estimate.rate.per_s:,.4g} {estimate.rate.unit}/s ({estimate.rate.source})"
    yield (
        f"  time     {most}{duration(estimate.total_s)}: {start}work "
        f"{duration(estimate.work_s)} at {rate}"
    )
    if not estimate.num_gpus:
        yield "  GPUs     none"
        return
    cost = ""
    if estimate.cost is not None and estimate.price is not None:
        unit = f" {estimate.price.currency}" if estimate.price.currency else ""
        cost = f", {most}{estimate.cost:,.2f}{unit} at {estimate.price.per_hour:g}{unit} an hour"
    yield f"  GPUs     {estimate.num_gpus}, {most}{estimate.gpu_hours:,.3g} GPU-hours{cost}"


ONLY_PUBLISH = "every row has ended: a run would only publish, if the gate lets it"


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The options of `batchgen plan`."""

    run: RunOptions = field(default_factory=RunOptions)
    """Options of the run that is foretold."""
    sample_rows: int | None = SAMPLE_ROWS
    """Look at so many of the rows that are to do; None: at all of them."""
    rate: Rate | None = None
    """How fast rows come; None: as in the last run."""
    price: Price | None = None


class Overlay(LocalStorage):
    """An output that is read and stays as it is: what is written goes to a scratch folder."""

    def __init__(self, below: LocalStorage, scratch: Path) -> None:
        """Bind; `scratch` is empty and the caller's to remove."""
        super().__init__(scratch)
        self._below = below
        self.shows = below.shows

    @property
    def where(self) -> str:
        """The output folder."""
        return self._below.where

    def path(self, name: str) -> Path:
        """Return where a file can be read."""
        here = super().path(name)
        return here if here.exists() else self._below.path(name)

    def mark(self, name: str) -> Sequence[int] | None:
        """See `LocalStorage`."""
        return super().mark(name) or self._below.mark(name)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """See `Storage`; kept in the scratch folder."""
        found = self._below.read(name)
        return found == data if found is not None else super().put_if_absent(name, data)

    def list(self, folder: str) -> list[str]:
        """See `Storage`."""
        return sorted({*self._below.list(folder), *super().list(folder)})

    def expose(
        self, name: str, alias: str, is_wanted: Callable[[Path], bool] = lambda _: True
    ) -> bool:
        """See `LocalStorage`; says what it would do, as everything here that changes a file."""
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
        if options.price is None and job.run.gpu_cost is not None:
            options = replace(options, price=read_price(job.run.gpu_cost))
        warnings += tuned_notes(job)
        if job.model.urls and not job.model.is_auto:
            warnings.append("tokens of prompts are told as bytes: the tokenizer is the server's")
        if job.prompt.continuation is not None:
            text = "each continuation pays for its whole prompt, also if others have the same:"
            warnings.append(f"{text} vLLM's prefix cache does not serve likelihoods")
        storage = storage_at(job.root)
        storage.check(STATE, is_dry=True)
        warnings += _who_holds(storage)
        with tempfile.TemporaryDirectory(prefix="batchgen-plan-") as scratch:
            return _foresee(job, Ledger(Overlay(storage, Path(scratch))), options, warnings)
    except BatchgenError as error:
        code = int(error.exit_code)
        return Forecast("refused", code, str(error), warnings=warnings)


def _foresee(job: JobConfig, ledger: Ledger, options: PlanOptions, warnings: list[str]) -> Forecast:
    ahead = _look_ahead(job, ledger, options.run, warnings)
    prepared, plan = ahead.prepared, ahead.begun.plan
    spec = prepared.engine_spec(None)
    past = last_run(ledger.storage, prepared)
    max_len, source = max_model_len(spec, past)
    work = work_of(ahead.todo.num_rows, job, lengths_of(job, ledger), ledger)
    found = _survey(ahead, spec, options, max_len) if ahead.todo else None
    reason = ahead.begun.nothing_to_do
    return Forecast(
        state="ready" if reason is None else "nothing_to_do",
        reason=reason,
        output=job.output.path,
        plan_number=plan.number,
        is_continued=ahead.is_continued,
        rows=ahead.rows,
        num_old_rendering=ahead.begun.old.num,
        num_leaving=ahead.begun.leaving.num_rows,
        survey=found,
        max_model_len=max_len,
        max_model_len_source=source,
        temperature=temperature_of(spec),
        settings=_settings(job, spec, past, work),
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
    known: KeySet | None
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
    plan, prepared = begun.plan, begun.prepared
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
    num_kept = 0 if is_continued else durable.num_done
    rows = _count_rows(ledger, plan, sources, todo, left)
    rows = replace(rows, num_reused=rows.num_reused + num_kept, num_done=rows.num_done - num_kept)
    if is_continued and not todo:
        tell(ONLY_PUBLISH)
    tries = None if options.fresh else TRIES
    tried = tried_sources(ledger.storage, tries, prepared) if left else []
    known = _known(ledger, prepared, plan, durable, tried, tell) if left else None
    return _Ahead(prepared, begun, is_continued, rows, left, known)


def _known(
    ledger: Ledger,
    prepared: Prepared,
    plan: Plan,
    durable: Durable,
    tried: Sequence[Source],
    tell: Callable[[str], None],
) -> KeySet | None:
    sources = [*base_sources(ledger, plan), *tried]
    if prepared.job.run.dedupe != "never":
        sources += [Source(part.name, takes_errors=True) for part in durable.parts]
    if not sources:
        return None
    return answered_keys(ledger.storage, sources, prepared.job.output.prefix, tell)


def _count_rows(
    ledger: Ledger, plan: Plan, sources: list[Takeover], todo: RowSet, left: RowSet
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
    unread = unread_rows(ledger.storage, plan, newest, fresh)
    numbers = {segment.path: number for number, segment in enumerate(plan.segments)}
    num_edited = 0
    for at, before in enumerate(newest.old.segments):
        number = numbers.get(before.path)
        if number is not None and number not in unread:
            kept = (span.length for span in newest.matched if span.old_segment == at)
            num_edited += min(len(fresh[number]), before.num_rows - sum(kept))
    num_fresh, num_unread = fresh.num_rows, unread.num_rows
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
    prepared, plan = ahead.prepared, ahead.begun.plan
    builder = request_builder(prepared, plan)
    return survey(
        plan,
        ahead.todo,
        prepared,
        builder,
        load_tokenize(spec),
        max_model_len=max_len,
        known=ahead.known,
        sample_rows=options.sample_rows,
    )


def _estimate(
    found: Survey, spec: EngineSpec, past: PastRun | None, options: PlanOptions
) -> Estimate | None:
    work = Work(found.num_to_compute, found.prompt_tokens, found.max_output_tokens)
    is_cpu = not spec.is_vllm or (past is not None and past.device == "cpu")
    num_gpus = gpus_of(spec.model_kwargs, is_cpu=is_cpu)
    return estimate(work, options.rate, past, num_gpus, options.price)


def _settings(
    job: JobConfig, spec: EngineSpec, past: PastRun | None, work: WorkLeft
) -> Mapping[str, Any]:
    """What a run would choose for its engine, as far as that is known without vLLM."""
    num = job.run.engines_per_gpu
    if num == "auto":
        # As `OneEngine` does; a worker of a cluster has one.
        is_open = not (job.run.is_cluster or (job.tuned and job.tuned.settings))
        num = engines_for(spec) if is_open else 1
        num = num if num > 1 and is_enough(spec, work) else 1
    share = replace(spec, work=work.share(num), num_sharing=num)
    found = choose_settings(share, past.max_num_seqs if past else None)
    return {**found, "engines_per_gpu": num} if num > 1 else found


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


def temperature_of(spec: EngineSpec) -> str:
    """Return the temperature of the job's rows and who says so; empty where a server does.

    Source:
        ModelConfig.get_diff_sampling_param: vllm/config/model.py, 0.26 to 0.32; what nobody says
        is 1 (SamplingParams.from_optional, vllm/sampling_params.py).
    """
    if not spec.is_vllm or spec.task != "generate":
        return ""
    given, kwargs = spec.sampling_params.get("temperature"), spec.model_kwargs
    if given is not None:
        return f"{given} (sampling.temperature)"
    place = kwargs.get("generation_config", "auto")
    folder = Path(spec.model if place == "auto" else place)
    found = {} if place == "vllm" else read_json(folder / "generation_config.json", dict)
    found |= kwargs.get("override_generation_config") or {}
    value, by = found.get("temperature"), "the model's generation_config.json"
    return "1.0 (vLLM's default)" if value is None else f"{value} ({by})"
