"""What a run counts, what a person sees of it, and what it says of the job's settings.

Figures and advice are pure: the clock is passed in, nothing is read or written. Names are those of
vllm/benchmarks/throughput.py (`requests_per_s`, `output_tokens_per_s`, `total_tokens_per_s`), so
that figures compare. Advice is told at the end of a run, and only what is beyond doubt: a hint that
is wrong once is not read again.

Progress goes to stderr, as a bar on a terminal and a plain line now and then elsewhere; stdout is
for results. The same looks at the run become its live view and its samples, see `RunLog`.
"""

from __future__ import annotations

import operator
import os
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Self, cast

from tqdm import tqdm

from batchgen.core.runtime import STDERR, command, printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.core.records import EngineFacts, EngineStats, Result, Verdict

    Look = tuple[Mapping[str, Any], str, Sequence[Mapping[str, Any]] | None]
    """A run at one moment: a row of stats.parquet, see `RunStats.sample`; what it is doing,
    `RUNNING` from when the first engine is up; and a row for each replica, if there are any."""


_SAMPLED = (
    *("num_ok", "num_errors", "num_skipped", "num_committed"),
    *("prompt_tokens", "cached_tokens", "output_tokens"),
)
"""What `RunStats` counts and samples have."""
_OF_ENGINE = ("num_running", "num_waiting", "kv_cache_usage", "gpu_busy", "num_preemptions")
# Rates that a person reads are over the last so many seconds.
_WINDOW_S = 30.0
_LATENCIES = 2000


class Counts(NamedTuple):
    """Rows and tokens of a run or of a part of it; also a change of them, which may be negative."""

    num_ok: int = 0
    num_errors: int = 0
    num_skipped: int = 0
    num_retries: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    @property
    def num_rows(self) -> int:
        """Rows that have ended, with a result or without."""
        return self.num_ok + self.num_errors + self.num_skipped

    def plus(self, other: Counts) -> Counts:
        """The sum, figure by figure."""
        return Counts(*map(operator.add, self, other))

    def minus(self, other: Counts) -> Counts:
        """The difference, figure by figure."""
        return Counts(*map(operator.sub, self, other))


@dataclass(slots=True)
class RunStats:
    """What one run has done so far. Times are seconds of one monotonic clock."""

    started_s: float
    num_rows: int
    """Physical rows of the plan."""
    num_resumed: int = 0
    """Of these, accounted for by earlier runs."""
    num_ok: int = 0
    num_errors: int = 0
    num_skipped: int = 0
    error_types: Counter[str] = field(default_factory=Counter)
    num_retries: int = 0
    """Attempts beyond each row's first."""
    verdicts: dict[int, Counter[Verdict]] = field(default_factory=dict)
    """Attempt number -> what became of it."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    num_committed: int = 0
    """Rows of this run that are durable."""
    num_parts: int = 0
    engine_ready_s: float | None = None
    """When the engine was up: rates count from here."""
    last_done_s: float | None = None
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES))
    """Of the last rows, from admission into the engine to the last token."""
    _window: deque[tuple[float, int, int, int]] = field(default_factory=deque)

    @property
    def num_results(self) -> int:
        """Rows that ended in this run."""
        return self.num_ok + self.num_errors

    @property
    def counts(self) -> Counts:
        """Rows and tokens of this run."""
        return Counts(*[getattr(self, name) for name in Counts._fields])

    @property
    def num_left(self) -> int:
        """Physical rows that nobody has accounted for yet."""
        return self.num_rows - self.num_resumed - self.num_results - self.num_skipped

    def note_attempts(self, results: Sequence[Result]) -> None:
        """Count answers of the engine, whether they end their rows or not."""
        done = [result.completion for result in results if result.completion is not None]
        self.prompt_tokens += sum([completion.num_prompt_tokens or 0 for completion in done])
        self.cached_tokens += sum([completion.num_cached_tokens or 0 for completion in done])
        self.output_tokens += sum([completion.num_output_tokens or 0 for completion in done])
        self.latencies_s.extend([one.latency_s for one in done if one.latency_s is not None])
        found = Counter([(result.attempts, result.verdict) for result in results])
        for (attempt, verdict), num in found.items():
            self.verdicts.setdefault(attempt, Counter())[verdict] += num
            self.num_retries += num * (attempt > 1)

    def note_ends(self, results: Sequence[Result]) -> None:
        """Count the ends of rows."""
        errors = [result.error.error_type for result in results if result.error is not None]
        self.num_ok += len(results) - len(errors)
        self.num_errors += len(errors)
        self.error_types.update(errors)

    def count(self, change: Counts) -> None:
        """Count what others have done."""
        for name, num in change._asdict().items():
            setattr(self, name, getattr(self, name) + num)

    def correct(self, change: Counts) -> None:
        """Change the counts of rows, in the past too: no work is done or undone by this.

        For rows that a dead worker had ended but not made durable, which are done again. The
        rates stay those of the work that was done, lost or not.
        """
        self.count(change)
        num = change.num_ok + change.num_errors
        self._window = deque(
            (at_s, results + num, prompt, output) for at_s, results, prompt, output in self._window
        )

    def note_progress(self, now_s: float) -> None:
        """Remember when results last came, for the rates. Call after each step with results."""
        self.last_done_s = now_s
        if self._window and now_s - self._window[-1][0] < 0.5:
            return
        self._window.append((now_s, self.num_results, self.prompt_tokens, self.output_tokens))
        while now_s - self._window[0][0] > _WINDOW_S and len(self._window) > 2:
            self._window.popleft()

    def rates(self, now_s: float) -> dict[str, float]:
        """Rates over the last half minute, per second."""
        if not self._window:
            return {"requests_per_s": 0.0, "prompt_tokens_per_s": 0.0, "output_tokens_per_s": 0.0}
        then_s, results, prompt, output = self._window[0]
        span_s = max(now_s - then_s, 1e-9)
        return {
            "requests_per_s": (self.num_results - results) / span_s,
            "prompt_tokens_per_s": (self.prompt_tokens - prompt) / span_s,
            "output_tokens_per_s": (self.output_tokens - output) / span_s,
        }

    def eta_s(self, now_s: float, num_aside: int = 0) -> float | None:
        """Seconds left at the present rate; None before there is one.

        Args:
            now_s: The time.
            num_aside: Rows left that no engine is asked for.
        """
        rate = self.rates(now_s)["requests_per_s"]
        return (self.num_left - num_aside) / rate if rate > 0 else None

    def sample(self, now_s: float, in_flight: int, engine: EngineStats) -> dict[str, Any]:
        """One row of stats.parquet. `memory_mib` is added by whoever may ask the system."""
        return {
            "elapsed_s": now_s - self.started_s,
            **{name: getattr(self, name) for name in _SAMPLED},
            **self.rates(now_s),
            "num_in_flight": in_flight,
            **engine_figures(engine),
        }

    def totals(self, now_s: float) -> dict[str, Any]:
        """The run as a whole. Rates are over the engine's working time, not over its start."""
        begun_s = self.started_s if self.engine_ready_s is None else self.engine_ready_s
        # A run that answers everything at once has no working time to speak of.
        working_s = max((self.last_done_s or now_s) - begun_s, 1e-3)
        total_tokens = self.prompt_tokens + self.output_tokens
        return {
            **{name: getattr(self, name) for name in (*_SAMPLED[:3], "num_resumed")},
            "error_types": dict(self.error_types.most_common()),
            "num_retries": self.num_retries,
            "verdicts": {
                str(at): {verdict.value: n for verdict, n in self.verdicts[at].items()}
                for at in sorted(self.verdicts)
            },
            "num_prompt_tokens": self.prompt_tokens,
            "num_cached_tokens": self.cached_tokens,
            "num_output_tokens": self.output_tokens,
            "num_parts": self.num_parts,
            "elapsed_s": now_s - self.started_s,
            "ready_after_s": begun_s - self.started_s,
            "working_s": working_s,
            "requests_per_s": self.num_results / working_s,
            "output_tokens_per_s": self.output_tokens / working_s,
            "total_tokens_per_s": total_tokens / working_s,
        }


def engine_figures(engine: EngineStats) -> dict[str, Any]:
    """What a look at an engine's scheduler has in a row of stats.parquet."""
    return {name: getattr(engine, name) for name in _OF_ENGINE}


LEAST_S = 60.0
"""A shorter run has little to gain."""
STORM = 0.1
"""Preemptions a finished row. Each does a prompt and half an answer again, on average: from here
on a twentieth of the work or more is done twice."""


def advise(last: Mapping[str, Any], facts: EngineFacts | None) -> str | None:
    """Say what to change where the KV cache was too small for what ran at once; mostly nothing.

    Args:
        last: The run's last sample, of `RunStats.sample` or `ReplicaStats.whole`.
        facts: An engine's.
    """
    num, num_rows = last["num_preemptions"] or 0, last["num_ok"] + last["num_errors"]
    is_short = last["elapsed_s"] < LEAST_S
    if facts is None or is_short or num < max(1, STORM * num_rows):
        return None
    return (
        f"the KV cache was full and {num:,} requests were preempted, {num / max(1, num_rows):.1f} "
        f"a row: work that is done twice. Lower model.max_num_seqs from {facts.max_num_seqs}, or "
        "give the cache more memory (model.gpu_memory_utilization), or run "
        f"`{command('tune')}`"
    )


RUNNING = "running"
_PLAIN_EVERY_S = 30.0
_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
_LEAST_BAR = 10
_COLUMNS = 80
"""Of a terminal that does not say how wide it is."""


class Progress:
    """A bar or plain lines over one run."""

    def __init__(self, num_rows: int, num_done: int, *, stream: IO[str] | None = None) -> None:
        """Begin.

        Args:
            num_rows: Physical rows of the job.
            num_done: Of these, done by earlier runs.
            stream: Default stderr; a bar only if it is a terminal.
        """
        self._stream = stream or cast("IO[str]", STDERR)
        self._num_rows = num_rows
        self._last_line_s: float | None = None
        self._bar: tqdm[Any] | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=num_rows,
                initial=num_done,
                desc="starting the engine",
                bar_format=_BAR,
                file=self._stream,
                smoothing=0.05,
                unit="row",
                dynamic_ncols=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(
        self,
        sample: Mapping[str, Any],
        num_done: int,
        eta_s: float | None,
        starting: str | None = None,
    ) -> None:
        """Show where the run is; draws no oftener than is useful.

        Args:
            sample: As `RunStats.sample`, or `ReplicaStats.whole`.
            num_done: Rows accounted for by all runs, or by another row's answer.
            eta_s: Seconds left, None if unknown.
            starting: What is shown in place of the figures while no engine is up to have any.
        """
        elapsed_s = float(sample["elapsed_s"])
        figures = [starting] if starting else figures_of(sample)
        left = [] if starting or eta_s is None else [f"{duration(eta_s)} left"]
        if self._bar is not None:
            if num_done >= self._num_rows:
                left = []
            # Tokens tell least to who has little room.
            shown = [] if starting else [*left, *figures[:1], *figures[:0:-1]]
            self._draw(num_done, starting or "rows", [*shown, f"after {duration(elapsed_s)}"])
        elif self._last_line_s is None or elapsed_s - self._last_line_s >= _PLAIN_EVERY_S:
            self._last_line_s = elapsed_s
            rows = f"{num_done:,}/{self._num_rows:,} rows"
            self.note(", ".join([rows, *figures, *left]))

    def _draw(self, num_done: int, what: str, figures: Sequence[str]) -> None:
        """Draw the bar, with as many of the figures as are whole beside it; the first matter most.

        The time left is the run's own estimate: tqdm's would count rows that ended while the
        engine started.
        """
        assert self._bar is not None  # noqa: S101 - else nothing is drawn
        width = _columns_of(self._stream) - 1  # As tqdm, which leaves the last one free.
        room = width - len(f"{what} 100%|| {num_done}/{self._num_rows}") - _LEAST_BAR
        shown: list[str] = []
        for figure in figures:
            if len(", ".join([*shown, figure])) + 2 <= room:
                shown.append(figure)
        self._bar.n = num_done
        self._bar.set_description_str(what, refresh=False)
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.refresh()

    def note(self, line: str) -> None:
        """Print one line above the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(f"batchgen: {printable(line)}", file=self._stream, flush=True)
        if self._bar is not None:
            self._bar.refresh()


def _columns_of(stream: IO[str]) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or _COLUMNS
    except (OSError, ValueError, AttributeError):
        return _COLUMNS


def figures_of(sample: Mapping[str, Any]) -> list[str]:
    """List what a person sees of a run, the most telling first."""
    figures = [
        f"{sample['requests_per_s']:,.0f} rows/s",
        f"{sample['prompt_tokens_per_s']:,.0f} tok/s in, {sample['output_tokens_per_s']:,.0f} out",
        f"{num_inside(sample):,} in flight",
    ]
    if not sample["requests_per_s"] and not sample["num_in_flight"]:
        figures = []  # Nothing is asked of the engine, or all came back at once: no speed yet.
    if "num_replicas" in sample:
        figures.append(f"{sample['num_replicas_up']}/{sample['num_replicas']} replicas")
    if sample["kv_cache_usage"] is not None:
        figures.append(f"KV {sample['kv_cache_usage']:.0%}")
    if sample["gpu_busy"] is not None:
        figures.append(f"GPU {sample['gpu_busy']:.0%}")
    if sample["num_errors"]:
        figures.append(f"{sample['num_errors']:,} errors")
    return figures


def num_inside(sample: Mapping[str, Any]) -> int:
    """Requests in the engine's scheduler, as `run.max_in_flight` bounds them.

    `num_in_flight` also has those that are being tokenized ahead of it, a thousand or so. It is
    what is left where the scheduler is not known, as while an engine is replaced; and the
    scheduler's own figures, half a second old, may tell of requests that have ended since.
    """
    num, running, waiting = (
        sample[name] for name in ("num_in_flight", "num_running", "num_waiting")
    )
    return int(num if running is None or waiting is None else min(num, running + waiting))


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
