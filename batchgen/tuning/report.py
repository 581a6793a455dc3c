"""What `batchgen tune` found: for programs, as a table for people, and as JOB.tuned.toml."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import BatchgenError, OutputError
from batchgen.job.tuned import PLACES
from batchgen.pipeline.progress import duration
from batchgen.storage import LocalStorage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from batchgen.tuning.gauge import Measure
    from batchgen.tuning.trial import Trial

OWN = "the job's own settings"
_ROW = "{:>2}  {:<{width}}  {:>11}  {:>8}  {:>8}  {:>5}  {:>9}  {:>8}"
_HEADS = ("", "settings", "tokens/s in", "out", "rows/s", "speed", "preempted", "KV cache")
_MEASURED = (
    *("error", "rows_per_s", "prompt_tokens_per_s", "output_tokens_per_s", "num_preemptions"),
    *("kv_cache_usage", "num_running", "num_waiting", "tokens_per_step", "cached_share"),
)
"""Figures of a `Measure` that are reported as they are."""
_REASON_WIDTH = 70
_WORTH_FP8 = 1.03


@dataclass(frozen=True, slots=True)
class Report:
    """Outcome of one search."""

    state: str
    """tuned, unconfirmed, too_few_rows, nothing_to_do, stopped."""
    exit_code: int
    reason: str | None
    """Why the state is not `tuned`; None if it is."""
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
    """The trial with a KV cache in FP8, whose answers are not kept."""
    num_answered: int
    """Rows that were answered on the way, and are kept."""
    is_answered: bool
    """No row of the job is left without an answer."""
    keeps_rows: bool
    elapsed_s: float
    notes: Sequence[str] = field(default_factory=list)
    tuned_file: str | None = None
    """Path of the file with the settings; None if none was written."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        for name in ("own", "best", "fp8"):  # Trials have their figures.
            del found[name]
        return found | {"trials": [trial_dict(trial, self.own) for trial in self.trials]}

    def as_text(self) -> str:
        """Table and verdict for a person."""
        lines = [*self._table(), ""] if self.trials else []
        if self.settings:
            twice = "measured twice" if self.is_confirmed else "not confirmed"
            lines.append(f"best     {settings_text(self.settings)}")
            lines.append(f"gain     {self.gain:.2f} times the job's own settings, {twice}")
        elif self.tuned_file is not None:
            lines.append(f"best     {OWN}")
        if (text := self._fp8_text()) is not None:
            lines.append(f"FP8      {text}")
        if self.tuned_file is not None:
            use = f"`batchgen run {self.job}` uses it" if self.settings else "nothing to use in it"
            lines.append(f"written  {self.tuned_file}; {use}")
        if self.reason is not None:
            lines.append(f"state    {self.state.replace('_', ' ')}: {self.reason}")
        lines += [f"note     {note}" for note in self.notes]
        lines.append(f"rows     {self._rows_text()}")
        lines.append(f"time     {duration(self.elapsed_s)}, {len(self.trials)} trials")
        return "\n".join(lines)

    def _rows_text(self) -> str:
        if not self.keeps_rows:
            return "answered in a temporary output, none kept"
        if self.state == "nothing_to_do":
            return "none was left to answer"
        kept = f"{self.num_answered:,} answered on the way, and kept"
        if self.is_answered:
            return f"{kept}; none is left: `batchgen run {self.job}` publishes"
        return f"{kept}: `batchgen run {self.job}` goes on from there"

    def _table(self) -> list[str]:
        texts = [settings_text(trial.settings) for trial in self.trials]
        width = max(map(len, texts))
        lines = [_ROW.format(*_HEADS, width=width)]
        for number, (text, trial) in enumerate(zip(texts, self.trials, strict=True), 1):
            if (found := trial.measure) is None:
                why = f"failed: {trial.failure}" if trial.failure else "too few rows"
                why = why if len(why) <= _REASON_WIDTH else f"{why[: _REASON_WIDTH - 3]}..."
                lines.append(f"{number:>2}  {text:<{width}}  {why}")
                continue
            usage, own = found.kv_cache_usage, self.own
            cells = (
                f"{found.prompt_tokens_per_s:,.0f}",
                f"{found.output_tokens_per_s:,.0f}",
                f"{found.rows_per_s:,.1f}",
                f"{found.speed / own.speed:.2f}" if own else "",
                f"{found.num_preemptions:,}",
                "" if usage is None else f"{usage:.0%}",
            )
            lines.append(_ROW.format(number, text, *cells, width=width).rstrip())
        return lines

    def _fp8_text(self) -> str | None:
        """What a KV cache in FP8 would bring, which no file may decide."""
        trial = self.fp8
        if trial is None:
            return None
        if trial.measure is None:
            return f"A KV cache in FP8 could not be measured: {trial.failure or 'too few rows'}."
        gain = trial.measure.score / self.best.score if self.best is not None else 0.0
        if gain < _WORTH_FP8:
            return "A KV cache in FP8 brings nothing more."
        return (
            f"A KV cache in FP8 was {gain:.2f} times as fast as the best above, in one trial. It "
            "changes answers and so the recipe: if that may be, set kv_cache_dtype = 'fp8' in the "
            "job's [model.engine] and run with --accept-recipe."
        )

    def file_text(self, key: Mapping[str, Any]) -> str:
        """The tuned file: see `batchgen.job.tuned` for what is read of it.

        Args:
            key: What it was measured on; None is left out.
        """
        gain = f"{self.gain:.2f} times as fast as the job's own settings, measured twice."
        head = [
            "Written by `batchgen tune`; used by `batchgen run` while all of [key] but the",
            "versions fits. What the job file or --set says wins. Remove the file to do without.",
            gain if self.settings else "No other settings were faster than the job's own.",
            *([text] if (text := self._fp8_text()) is not None else ()),
        ]
        trials = [trial_dict(trial, self.own) for trial in self.trials]
        return tuned_text(head, key, self.settings, trials)


def settings_text(settings: Mapping[str, Any]) -> str:
    """`max_num_seqs = 512, enable_prefix_caching = false`."""
    texts = {
        n: value if isinstance(value, str) else _literal(value) for n, value in settings.items()
    }
    return ", ".join(f"{name} = {text}" for name, text in texts.items()) or OWN


def trial_dict(trial: Trial, own: Measure | None) -> dict[str, Any]:
    """Plain values of a trial; figures only where something was measured."""
    shown: dict[str, Any] = {
        "settings": settings_text(trial.settings),
        "failure": trial.failure,
        "wall_s": trial.wall_s,
    }
    if (found := trial.measure) is not None:
        shown |= {"measured_s": found.seconds, "speed": found.speed / own.speed if own else None}
        shown |= {name: getattr(found, name) for name in _MEASURED}
    return shown


def tuned_text(
    head: Sequence[str],
    key: Mapping[str, Any],
    settings: Mapping[str, Any],
    trials: Sequence[Mapping[str, Any]],
) -> str:
    """Text of a tuned file.

    Args:
        head: Comment lines.
        key: See `job.tuned.key_of`; more of it is for people.
        settings: Names of `PLACES`.
        trials: Plain values; None is left out.
    """
    lines = ["# " + "".join(c if c.isprintable() else " " for c in line) for line in head]
    lines += ["", "[key]", *_assignments(key)]
    for place in dict.fromkeys(PLACES.values()):
        here = {name: value for name, value in settings.items() if PLACES[name] == place}
        lines += ["", f"[{place}]", *_assignments(here)] if here else []
    for trial in trials:
        lines += ["", "[[trials]]", *_assignments(trial)]
    return "\n".join(lines) + "\n"


def _assignments(table: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {_literal(value)}" for name, value in table.items() if value is not None]


def _literal(value: object) -> str:
    """A text, number or truth value of JSON's, which is TOML's as well, but for a few things."""
    if isinstance(value, float):
        return json.dumps(round(value, 4)) if math.isfinite(value) else str(value)
    # TOML has no escapes of half a character, nor DEL as it is.
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return text.encode("utf-8", "replace").decode()


def write_tuned(path: Path, text: str) -> None:
    """Write or replace the file, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        LocalStorage(path.parent).replace(path.name, text.encode())
    except BatchgenError as error:
        msg = f"{path}: cannot be written ({error}); this is what it was to hold:\n{text}"
        raise OutputError(msg) from error


def check_writable(path: Path) -> None:
    """See beforehand, as far as can be seen, whether `write_tuned` will succeed.

    Raises:
        OutputError: It will not.
    """
    try:
        probe = LocalStorage(path.parent).temp_for(path.name)
        probe.touch()
        probe.unlink()
        if not path.is_dir():
            return
    except OSError:  # Closed to us, or a name that is too long.
        pass
    msg = f"{path}: cannot be written, and tuning is for that; expected a folder to write in"
    raise OutputError(msg)
