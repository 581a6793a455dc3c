"""What happens beside the work, at its own pace: progress, live view, samples."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from batchgen.pipeline.progress import Progress
    from batchgen.pipeline.run_stats import RunStats
    from batchgen.store.runlog import RunLog

RUNNING = "running"
_LIVE_EVERY_S = 2.0


class Sight(NamedTuple):
    """A run at one moment."""

    sample: Mapping[str, Any]
    """As `RunStats.sample`."""
    state: str
    """`RUNNING` from when the first engine is up; before, what it is doing."""
    replicas: Sequence[Mapping[str, Any]] | None = None
    """A row for each, if there are any: `Board.rows`."""


class Watch:
    """Looks at a run and tells; never changes it."""

    def __init__(
        self,
        look: Callable[[float], Sight],
        stats: RunStats,
        log: RunLog,
        progress: Progress,
        sample_s: float,
    ) -> None:
        """Bind to a run.

        Args:
            look: At this time, in monotonic seconds.
            stats: The run's.
            log: Gets the live view and the samples.
            progress: Is shown to a person.
            sample_s: The pace of stats.parquet.
        """
        self._look = look
        self._stats = stats
        self._log = log
        self._progress = progress
        self._sample_s = sample_s
        self._next_s = 0.0
        self._next_sample_s = time.monotonic() + sample_s

    def tick(self) -> None:
        """Called at every turn of the loop; mostly does nothing."""
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + min(_LIVE_EVERY_S, self._sample_s)
            self.show(now_s, is_last=False)

    def show(self, now_s: float, *, is_last: bool) -> None:
        """Tell where the run is; the last look is always sampled."""
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
