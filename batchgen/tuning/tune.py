"""`tune`: trials within a time budget, the best of them confirmed, and the file beside the job.

Best is what was fastest in the search *and* again at the end, beside the job's own settings: rows
differ along an input and machines have moods, so that a gain counts only if two pairs show it.
What was found is told to programs, to people as a table, and to later runs as JOB.tuned.toml.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from batchgen import __version__
from batchgen.core.errors import ConfigError, EngineError, ExitCode, OutputError
from batchgen.core.runtime import command, option
from batchgen.engine.devices import device_name, read_devices, vllm_version
from batchgen.job.tuned import PLACES, key_of, tuned_path, value_of
from batchgen.pipeline.stats import duration
from batchgen.storage import LocalStorage
from batchgen.tuning.search import MOST_MEMORY, Search
from batchgen.tuning.trial import Measure, Stops, Times, Trial, run_trial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from batchgen.job.model import JobConfig


OWN = "the job's own settings"
_ROW = "{:>2}  {:<{width}}  {:>11}  {:>8}  {:>8}  {:>5}  {:>9}  {:>8}"
_HEADS = ("", "settings", "tokens/s in", "out", "rows/s", "speed", "preempted", "KV cache")
_MEASURED = (
    *("error", "rows_per_s", "prompt_tokens_per_s", "output_tokens_per_s", "num_preemptions"),
    *("kv_cache_usage", "num_running", "num_waiting", "tokens_per_step", "cached_share"),
)
"""Figures of a `Measure` that are reported as they are."""
_REASON_WIDTH = 70


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
        return found | {"trials": self._trial_dicts()}

    @property
    def _own(self) -> Measure | None:
        """What the job's own settings do: they are tried first."""
        return self.trials[0].measure if self.trials else None

    def _trial_dicts(self) -> list[dict[str, Any]]:
        return [trial_dict(trial, self._own) for trial in self.trials]

    def as_text(self) -> str:
        """Table and verdict for a person."""
        lines = [*self._table(), ""] if self.trials else []
        if self.settings:
            twice = "measured twice" if self.is_confirmed else "not confirmed"
            lines.append(f"best     {settings_text(self.settings)}")
            lines.append(f"gain     {self.gain:.2f} times the job's own settings, {twice}")
        elif self.tuned_file is not None:
            lines.append(f"best     {OWN}")
        if self.tuned_file is not None:
            use = f"`{command('run')}` uses it" if self.settings else "nothing to use in it"
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
            return f"{kept}; none is left: `{command('run')}` publishes"
        return f"{kept}: `{command('run')}` goes on from there"

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
            usage, own = found.kv_cache_usage, self._own
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
        ]
        return tuned_text(head, key, self.settings, self._trial_dicts())


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


def check_writable(path: Path) -> None:
    """See beforehand, as far as can be seen, whether the file can be written.

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


LEAST_GAIN = 1.03
"""Below, the job's own settings are as good: no reason to run by others."""


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """What `batchgen tune` is asked for beside its job."""

    budget_s: float = 1200.0
    """No trial begins that would probably end later; the first one always does."""
    times: Times = field(default_factory=Times)
    keeps_rows: bool = True
    """False: in a temporary output, each trial over the same rows; nothing is kept."""


@dataclass(eq=False)
class Tuning:
    """One search. Use once: `Tuning(...).run()`."""

    job: JobConfig
    """As loaded, with its own settings: without a tuned file's."""
    job_path: Path
    """The job file; what is found is written beside it."""
    options: TuneOptions
    """What `batchgen tune` was asked for."""
    _: KW_ONLY
    stops: Stops
    """Asked by signal handlers."""
    tell: Callable[[str], None] = lambda line: None
    """Gets a line before and after each trial."""

    def __post_init__(self) -> None:
        self._began_s = time.monotonic()
        device = device_name() if self.job.model.is_vllm else self.job.model.backend
        self._is_gpu = self.job.model.is_vllm and device != "cpu"
        most_memory = _free_share() - 0.03 if self._is_gpu else MOST_MEMORY
        self._search = Search(self.job, is_gpu=self._is_gpu, most_memory=most_memory)
        self._is_searched = False  # To its end: nothing more is worth a trial.
        self._repeats: list[Trial] = []
        self._notes: list[str] = []

    def run(self) -> Report:
        """Search, confirm, write.

        Raises:
            BatchgenError: The job fails. What was answered stays.
        """
        if self.job.model.urls and not self.job.model.is_auto:
            where = "model.base_url"
            raise ConfigError(where, ["how much servers get at once finds itself, in every run"])
        check_writable(tuned_path(self.job_path))
        for settings in self._search.candidates():
            if self._search.trials and not self._may_try(num_after=2):
                break
            self._search.note(self._try(settings))
            if self._is_over():
                break
        else:
            self._is_searched = True
        own = self._search.own
        if own.failure is not None:
            raise EngineError(f"the engine died with the job's own settings: {own.failure}")
        if self._search.best.settings and not self._is_over():
            self._confirm()
        return self._report()

    def _confirm(self) -> None:
        for settings in ({}, self._search.best.settings):
            if not self._may_try(num_after=0):
                self._notes.append("nothing was left to confirm it with")
                return
            self._repeats.append(self._try(settings, again=True))
            if self._is_over():
                return

    @property
    def _trials(self) -> list[Trial]:
        """All trials: those of the search, and those that confirmed."""
        return [*self._search.trials, *self._repeats]

    def _may_try(self, *, num_after: int) -> bool:
        """Whether time and rows suffice for another trial and `num_after` more."""
        trials, num = self._trials, 1 + num_after
        cost_s = max(trial.wall_s for trial in trials[-2:])  # The first may have compiled kernels.
        spent_s = time.monotonic() - self._began_s
        has_time = spent_s + num * cost_s <= self.options.budget_s
        num_rows = max(trial.num_answered for trial in trials)
        has_rows = not self.options.keeps_rows or trials[-1].num_left >= num * num_rows
        if has_time and not has_rows:
            self._notes.append("not all was tried: the rows would have run out")
        return has_time and has_rows

    def _is_over(self) -> bool:
        """Whether no other trial can follow."""
        is_answered = self.options.keeps_rows and self._trials[-1].is_answered
        return self.stops.is_asked or is_answered

    def _try(self, settings: Mapping[str, Any], *, again: bool = False) -> Trial:
        number = len(self._trials) + 1
        self.tell(f"trial {number}: {settings_text(settings)}{', again' if again else ''}")
        best = self._search.best.measure if self._search.trials and not again else None
        rules = (self.stops, self.options.times, best.speed if best else 0.0)
        if self.options.keeps_rows:
            trial = run_trial(self.job, settings, *rules)
        else:
            with _scratch(self.job) as job:
                trial = replace(run_trial(job, settings, *rules), num_answered=0)
        self.tell(f"trial {number}: {self._outcome(trial)}")
        return trial

    def _outcome(self, trial: Trial) -> str:
        if trial.failure is not None:
            return f"failed: {trial.failure:.200}"
        if trial.measure is None:
            return "ended before anything was measured"
        own = self._search.own.measure if self._search.trials else None
        speed = f"{trial.measure.output_tokens_per_s:,.0f} tokens/s out"
        return f"{speed}, {trial.measure.speed / own.speed:.2f} x" if own else speed

    def _report(self) -> Report:
        own, best = self._search.own.measure, self._search.best.measure
        settings, gain = dict(self._search.best.settings), 1.0
        is_confirmed = own is not None and self._is_searched
        if settings and own is not None and best is not None:
            gain, is_confirmed = best.speed / own.speed, False
            again = [trial.measure for trial in self._repeats if trial.measure is not None]
            if len(again) == 2:
                gain = (best.speed + again[1].speed) / (own.speed + again[0].speed)
                is_confirmed = gain >= LEAST_GAIN and again[1].speed > again[0].speed
        if settings and len(self._repeats) == 2 and not is_confirmed:
            self._notes.append(f"{settings_text(settings)} was no faster when tried again")
            settings, gain, is_confirmed = {}, 1.0, self._is_searched
        state, reason = self._end(settings, is_confirmed=is_confirmed)
        report = Report(
            state=state,
            exit_code=int(ExitCode.STOPPED if state == "stopped" else ExitCode.COMPLETE),
            reason=reason,
            job=str(self.job_path),
            settings=settings,
            gain=gain,
            is_confirmed=is_confirmed,
            trials=self._trials,
            num_answered=sum(trial.num_answered for trial in self._trials),
            is_answered=self.options.keeps_rows and self._trials[-1].is_answered,
            keeps_rows=self.options.keeps_rows,
            elapsed_s=time.monotonic() - self._began_s,
            notes=[*dict.fromkeys(self._notes), *self._shadowed(settings)],
        )
        if state != "tuned":
            return report
        path = tuned_path(self.job_path)
        key = key_of(self.job, self.job_path.parent, device_name())
        versions = {"vllm": vllm_version() or "", "batchgen": __version__}
        LocalStorage(path.parent).replace(path.name, report.file_text(key | versions).encode())
        return replace(report, tuned_file=str(path))

    def _end(self, settings: Mapping[str, Any], *, is_confirmed: bool) -> tuple[str, str | None]:
        """State, and the reason for every state but `tuned`."""
        own, scratch = self._search.own, option("--scratch")
        more = f"more {option('--minutes')}, a shorter {option('--trial-s')}, or {scratch}"
        if self.stops.is_asked:
            reason = f"stopped on purpose; run again to tune, or `{command('run')}` to go on"
            return "stopped", reason
        if own.state == "nothing_to_do":
            reason = f"every row is answered and published; measure without keeping: {scratch}"
            return "nothing_to_do", reason
        if own.measure is None:
            return "too_few_rows", "the rows were too few to measure anything with"
        if is_confirmed:
            return "tuned", None
        found = "the best was confirmed" if settings else "anything faster was found"
        return "unconfirmed", f"time or rows ran out before {found}: {more}"

    def _shadowed(self, settings: Mapping[str, Any]) -> list[str]:
        """What the job file says itself, and so would win."""
        return [
            f"the job itself says {name} = {own}, which wins: change it there to {value}"
            for name, value in settings.items()
            if (own := value_of(self.job, name)) is not None
        ]


@contextmanager
def _scratch(job: JobConfig) -> Iterator[JobConfig]:
    """The job with a temporary output, which stays if the engine fails: its log is in there."""
    folder = tempfile.mkdtemp(prefix="batchgen-tune-")
    yield job.changed(output={"path": f"{folder}/out"})
    shutil.rmtree(folder, ignore_errors=True)


def _free_share() -> float:
    """Free share of the GPU's memory that has least, before any engine of ours is up."""
    gpus = read_devices().gpus
    return min((gpu.free_bytes / gpu.total_bytes for gpu in gpus), default=1.0)
