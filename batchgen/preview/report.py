"""What `batchgen plan` found: one record for programs, and the lines that a person reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchgen.pipeline.progress import duration
from batchgen.preview.estimate import bars

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from batchgen.preview.estimate import Estimate, PastRun
    from batchgen.preview.sample import Survey

NO_RATE = (
    "cannot be told: no run of this model has been here; give --rate 250rows/s or "
    "--rate 12000tokens/s, or measure with `batchgen run JOB --set input.limit=1000 "
    "--set output.path=trial`"
)


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


@dataclass(frozen=True, slots=True)
class Forecast:
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
    num_leaving: int = 0
    """Rows of the last snapshot that the plan has no row for; the warnings say why."""
    survey: Survey | None = None
    block_tokens: int = 0
    max_model_len: int | None = None
    max_model_len_source: str = ""
    past: PastRun | None = None
    estimate: Estimate | None = None
    warnings: Sequence[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        names = (
            *("state", "exit_code", "reason", "output", "plan_number", "is_continued"),
            *("num_leaving", "max_model_len", "max_model_len_source"),
        )
        fields: dict[str, Any] = {name: getattr(self, name) for name in names}
        rows = {name: getattr(self.rows, name) for name in Rows.__slots__} if self.rows else None
        return {
            **fields,
            "rows": rows,
            "todo": _survey_dict(self.survey) if self.survey else None,
            "last_run": self.past.as_dict() if self.past else None,
            "estimate": self.estimate.as_dict() if self.estimate else None,
            "warnings": list(self.warnings),
        }


def _survey_dict(survey: Survey) -> dict[str, Any]:
    names = (
        *("is_exact", "num_rows", "num_looked", "num_skipped", "num_bad", "num_known"),
        *("num_duplicates", "num_repeats", "num_too_long", "num_tight", "num_unknown"),
        *("num_to_compute", "max_output_tokens", "prompt_tokens", "prefix_share"),
        "num_prefix_prompts",
    )
    lengths = survey.lengths.as_dict() if survey.lengths else None
    fields = {name: getattr(survey, name) for name in names}
    return {**fields, "bad": dict(survey.bad), "lengths": lengths}


def forecast_text(forecast: Forecast) -> str:
    """Write a forecast as the lines that a person reads."""
    lines = [f"warning: {text}" for text in forecast.warnings]
    if forecast.state == "refused":
        return "\n".join([*lines, f"refused: {forecast.reason}"])
    lines.append(_head(forecast))
    if forecast.rows is not None:
        lines.append(f"  rows     {_rows(forecast.rows)}")
    survey = forecast.survey
    if survey is not None and survey.num_rows:
        lines += _todo(survey)
        lines += _tokens(forecast, survey)
        lines += _answers(forecast, survey)
        lines += _cost(forecast.estimate)
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
    if survey.prefix_share is not None:
        yield (
            f"    shared prefixes: {survey.prefix_share:.1%} of the tokens of "
            f"{survey.num_prefix_prompts:,} prompts, in whole blocks of {forecast.block_tokens} "
            "as vLLM's cache shares them"
            + ("; at least, since only these were compared" if _is_part(survey) else "")
        )


def _is_part(survey: Survey) -> bool:
    return survey.num_prefix_prompts < survey.num_to_compute


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


def _cost(estimate: Estimate | None) -> Iterator[str]:
    if estimate is None:
        yield f"  time     {NO_RATE}"
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
