"""What `batchgen tune` found: one record for programs, a table for people, the file's comments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchgen.pipeline.progress import duration

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.tuning.gauge import Measure
    from batchgen.tuning.trial import Trial

OWN = "the job's own settings"
_HEADS = ("", "settings", "tokens/s in", "out", "rows/s", "speed", "preempted", "KV cache")
_REASON_WIDTH = 70


@dataclass(frozen=True, slots=True)
class Report:
    """One search."""

    state: str
    """tuned, unconfirmed, too_few_rows, nothing_to_do, stopped."""
    exit_code: int
    reason: str | None
    """For every state but tuned."""
    job: str
    settings: Mapping[str, Any]
    """The best, as changes of the job's own; empty where these are."""
    gain: float
    """How many times as fast as the job's own."""
    is_confirmed: bool
    """Measured twice, beside the job's own."""
    trials: Sequence[Trial]
    own: Measure | None
    best: Measure | None
    fp8: Trial | None
    """With a KV cache in FP8, whose answers are not kept."""
    num_answered: int
    """Rows that were answered on the way, and are kept."""
    is_answered: bool
    """No row of the job is left without an answer."""
    keeps_rows: bool
    elapsed_s: float
    notes: Sequence[str] = field(default_factory=list)
    tuned_file: str | None = None
    """Where the settings stand now."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        names = (
            *("state", "exit_code", "reason", "job", "gain", "is_confirmed", "num_answered"),
            *("is_answered", "keeps_rows", "elapsed_s", "tuned_file"),
        )
        return {
            **{name: getattr(self, name) for name in names},
            "settings": dict(self.settings),
            "trials": [trial_dict(trial, self.own) for trial in self.trials],
            "notes": list(self.notes),
        }


def settings_text(settings: Mapping[str, Any]) -> str:
    """`max_num_seqs = 512, enable_prefix_caching = false`."""
    if not settings:
        return OWN
    shown = {True: "true", False: "false"}
    return ", ".join(
        f"{name} = {shown[value] if isinstance(value, bool) else value}"
        for name, value in settings.items()
    )


def trial_dict(trial: Trial, own: Measure | None) -> dict[str, Any]:
    """Plain values; None where nothing was measured."""
    found = trial.measure
    fields: dict[str, Any] = {
        "settings": settings_text(trial.settings),
        "failure": trial.failure,
        "wall_s": trial.wall_s,
    }
    if found is None:
        return fields
    return fields | {
        "measured_s": found.seconds,
        "speed": found.speed / own.speed if own else None,
        "error": found.error,
        "rows_per_s": found.rows_per_s,
        "prompt_tokens_per_s": found.prompt_tokens_per_s,
        "output_tokens_per_s": found.output_tokens_per_s,
        "num_preemptions": found.num_preemptions,
        "kv_cache_usage": found.kv_cache_usage,
        "num_running": found.num_running,
        "num_waiting": found.num_waiting,
        "tokens_per_step": found.tokens_per_step,
        "cached_share": found.cached_share,
    }


def file_head(report: Report) -> list[str]:
    """Comments at the top of the tuned file."""
    gain = f"{report.gain:.2f} times as fast as the job's own settings, measured twice."
    lines = [
        "Written by `batchgen tune`; used by `batchgen run` while all of [key] but the versions",
        "fits. What the job file or --set says wins. Remove the file to do without.",
        gain if report.settings else "No other settings were faster than the job's own.",
    ]
    if (told := _fp8_text(report)) is not None:
        lines.append(told)
    return lines


def _fp8_text(report: Report) -> str | None:
    """What a KV cache in FP8 would bring, which no file may decide."""
    trial = report.fp8
    if trial is None:
        return None
    if trial.measure is None:
        return f"A KV cache in FP8 could not be measured: {trial.failure or 'too few rows'}."
    if report.best is None or (gain := trial.measure.score / report.best.score) < 1.03:
        return "A KV cache in FP8 brings nothing more."
    return (
        f"A KV cache in FP8 was {gain:.2f} times as fast as the best above, in one trial. It "
        "changes answers and so the recipe: if that may be, set kv_cache_dtype = 'fp8' in the "
        "job's [model.engine] and run with --accept-recipe."
    )


def told(report: Report) -> str:
    """Table and verdict for a person."""
    lines = _table(report) if report.trials else []
    if report.settings:
        twice = "measured twice" if report.is_confirmed else "not confirmed"
        lines += ["", f"best     {settings_text(report.settings)}"]
        lines.append(f"gain     {report.gain:.2f} times the job's own settings, {twice}")
    elif report.tuned_file is not None:
        lines += ["", f"best     {OWN}"]
    if (text := _fp8_text(report)) is not None:
        lines.append(f"FP8      {text}")
    if report.tuned_file is not None:
        use = f"`batchgen run {report.job}` uses it" if report.settings else "nothing to use in it"
        lines.append(f"written  {report.tuned_file}; {use}")
    if report.reason is not None:
        lines.append(f"state    {report.state.replace('_', ' ')}: {report.reason}")
    lines += [f"note     {note}" for note in report.notes]
    lines.append(f"rows     {_rows_text(report)}")
    lines.append(f"time     {duration(report.elapsed_s)}, {len(report.trials)} trials")
    return "\n".join(lines)


def _rows_text(report: Report) -> str:
    if not report.keeps_rows:
        return "answered in a temporary output, none kept"
    kept = f"{report.num_answered:,} answered on the way, and kept"
    if report.state == "nothing_to_do":
        return "none was left to answer"
    if report.is_answered:
        return f"{kept}; none is left: `batchgen run {report.job}` publishes"
    return f"{kept}: `batchgen run {report.job}` goes on from there"


def _table(report: Report) -> list[str]:
    rows = [_HEADS, *(_cells(at, trial, report.own) for at, trial in enumerate(report.trials, 1))]
    # A trial that failed has its reason where the figures would be.
    widths = [
        max((len(row[at]) for row in rows if at < len(row) and len(row) == len(_HEADS)), default=0)
        for at in range(len(_HEADS))
    ]
    widths[1] = max(len(row[1]) for row in rows)
    return [
        "  ".join(
            cell.ljust(widths[at]) if at == 1 or len(row) < len(_HEADS) else cell.rjust(widths[at])
            for at, cell in enumerate(row)
        ).rstrip()
        for row in rows
    ]


def _cells(number: int, trial: Trial, own: Measure | None) -> tuple[str, ...]:
    head = (f"{number}", settings_text(trial.settings))
    found = trial.measure
    if found is None:
        why = f"failed: {trial.failure}" if trial.failure else "too few rows"
        return (*head, why if len(why) <= _REASON_WIDTH else f"{why[: _REASON_WIDTH - 3]}...")
    usage = found.kv_cache_usage
    return (
        *head,
        f"{found.prompt_tokens_per_s:,.0f}",
        f"{found.output_tokens_per_s:,.0f}",
        f"{found.rows_per_s:,.1f}",
        f"{found.speed / own.speed:.2f}" if own else "",
        f"{found.num_preemptions:,}",
        "" if usage is None else f"{usage:.0%}",
    )
