"""Counters to figures. Pure: the clock is passed in, nothing is read or written.

Names are those of vllm/benchmarks/throughput.py (`requests_per_s`, `output_tokens_per_s`,
`total_tokens_per_s`), so that figures compare.
"""

from __future__ import annotations

import operator
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchgen.core.records import EngineStats, Result, Verdict

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
        self.num_ok += change.num_ok
        self.num_errors += change.num_errors
        self.num_skipped += change.num_skipped
        self.num_retries += change.num_retries
        self.prompt_tokens += change.prompt_tokens
        self.cached_tokens += change.cached_tokens
        self.output_tokens += change.output_tokens

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

    def eta_s(self, now_s: float) -> float | None:
        """Seconds left at the present rate; None before there is one."""
        rate = self.rates(now_s)["requests_per_s"]
        return self.num_left / rate if rate > 0 else None

    def sample(self, now_s: float, in_flight: int, engine: EngineStats) -> dict[str, Any]:
        """One row of stats.parquet. `memory_mib` is added by whoever may ask the system."""
        return {
            "elapsed_s": now_s - self.started_s,
            "num_ok": self.num_ok,
            "num_errors": self.num_errors,
            "num_skipped": self.num_skipped,
            "num_committed": self.num_committed,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            **self.rates(now_s),
            "num_in_flight": in_flight,
            "num_running": engine.num_running,
            "num_waiting": engine.num_waiting,
            "kv_cache_usage": engine.kv_cache_usage,
            "gpu_busy": engine.gpu_busy,
            "num_preemptions": engine.num_preemptions,
        }

    def totals(self, now_s: float) -> dict[str, Any]:
        """The run as a whole. Rates are over the engine's working time, not over its start."""
        begun_s = self.started_s if self.engine_ready_s is None else self.engine_ready_s
        # A run that answers everything at once has no working time to speak of.
        working_s = max((self.last_done_s or now_s) - begun_s, 1e-3)
        total_tokens = self.prompt_tokens + self.output_tokens
        return {
            "num_ok": self.num_ok,
            "num_errors": self.num_errors,
            "num_skipped": self.num_skipped,
            "num_resumed": self.num_resumed,
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
