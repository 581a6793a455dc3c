"""What a person sees while a run works: tqdm on a terminal, a plain line now and then elsewhere.

Progress goes to stderr; stdout is for results. The same looks at the run become its live view and
its samples, see `RunLog`.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Self, cast

from tqdm import tqdm

from batchgen.core.runtime import STDERR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from batchgen.pipeline.context import RunContext
    from batchgen.pipeline.run_stats import RunStats
    from batchgen.store.runs import RunLog

    Look = tuple[Mapping[str, Any], str, Sequence[Mapping[str, Any]] | None]
    """A run at one moment: a row of stats.parquet, see `RunStats.sample`; what it is doing,
    `RUNNING` from when the first engine is up; and a row for each replica, if there are any."""

RUNNING = "running"
_LIVE_EVERY_S = 2.0
_PLAIN_EVERY_S = 30.0
_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


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
            num_done: Rows accounted for by all runs.
            eta_s: Seconds left, None if unknown.
            starting: What is shown in place of the figures while no engine is up to have any.
        """
        figures = starting or _figures(sample)
        elapsed_s = float(sample["elapsed_s"])
        if self._bar is not None:
            self._bar.n = num_done
            self._bar.set_description_str(starting or "rows", refresh=False)
            self._bar.set_postfix_str("" if starting else figures, refresh=False)
            self._bar.refresh()
        elif self._last_line_s is None or elapsed_s - self._last_line_s >= _PLAIN_EVERY_S:
            self._last_line_s = elapsed_s
            left = f", {duration(eta_s)} left" if eta_s is not None else ""
            self.note(f"{num_done:,}/{self._num_rows:,} rows, {figures}{left}")

    def note(self, line: str) -> None:
        """Print one line above the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(f"batchgen: {line}", file=self._stream, flush=True)
        if self._bar is not None:
            self._bar.refresh()


class Monitor:
    """Looks at a run at its own pace and shows what it sees; never changes the run."""

    def __init__(
        self,
        look: Callable[[float], Look],
        stats: RunStats,
        log: RunLog,
        progress: Progress,
        sample_s: float,
    ) -> None:
        """Bind to a run.

        Args:
            look: Looks at the engines at this time, in monotonic seconds.
            stats: The run's.
            log: Gets the live view and the samples.
            progress: Is shown to a person.
            sample_s: Seconds between two rows of stats.parquet.
        """
        self._look = look
        self._stats = stats
        self._log = log
        self._progress = progress
        self._sample_s = sample_s
        self._next_s = 0.0
        self._next_sample_s = time.monotonic() + sample_s

    def tick(self) -> None:
        """Show the run if it is time to; called at every turn of the loop."""
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + min(_LIVE_EVERY_S, self._sample_s)
            self.show(now_s, is_last=False)

    def show(self, now_s: float, *, is_last: bool) -> None:
        """Show where the run is; the last look is always sampled."""
        stats, (sample, state, replicas) = self._stats, self._look(now_s)
        eta_s = stats.eta_s(now_s)
        starting = None if state == RUNNING else state
        self._progress.update(sample, stats.num_rows - stats.num_left, eta_s, starting)
        live = {"state": state, "num_rows": stats.num_rows, "num_left": stats.num_left}
        self._log.live({**live, "eta_s": eta_s, **sample}, replicas)
        if is_last or now_s >= self._next_sample_s:
            self._next_sample_s = now_s + self._sample_s
            self._log.sample(sample)
            if replicas is not None:
                self._log.sample_replicas(replicas, is_last=is_last)


@contextmanager
def watching(context: RunContext, look: Callable[[float], Look]) -> Iterator[Monitor]:
    """Show a run and its notes to a person while it computes."""
    stats = context.stats
    with Progress(stats.num_rows, stats.num_resumed) as progress:
        context.notes.show_by(progress.note)
        monitor = Monitor(look, stats, context.log, progress, context.job.run.stats_s)
        try:
            yield monitor
        finally:
            monitor.show(time.monotonic(), is_last=True)
            context.notes.show = None


def _figures(sample: Mapping[str, Any]) -> str:
    figures = [
        f"{sample['requests_per_s']:,.0f} rows/s",
        f"{sample['prompt_tokens_per_s']:,.0f} tok/s in",
        f"{sample['output_tokens_per_s']:,.0f} out",
        f"{num_inside(sample):,} in flight",
    ]
    if "num_replicas" in sample:
        figures.append(f"{sample['num_replicas_up']}/{sample['num_replicas']} replicas")
    if sample["kv_cache_usage"] is not None:
        figures.append(f"KV {sample['kv_cache_usage']:.0%}")
    if sample["gpu_busy"] is not None:
        figures.append(f"GPU {sample['gpu_busy']:.0%}")
    if sample["num_errors"]:
        figures.append(f"{sample['num_errors']:,} errors")
    return ", ".join(figures)


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
