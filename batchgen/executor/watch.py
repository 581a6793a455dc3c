"""What happens beside the work, at its own pace: progress, live view, samples."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchgen.engine.base import Engine
    from batchgen.progress import Progress
    from batchgen.runlog import RunLog
    from batchgen.runner import Runner
    from batchgen.stats import RunStats

_LIVE_EVERY_S = 2.0


class Watch:
    """Looks at a run and tells; never changes it."""

    def __init__(
        self, runner: Runner, engine: Engine, log: RunLog, progress: Progress, sample_s: float
    ) -> None:
        """Bind to a run; `sample_s` is the pace of stats.parquet."""
        self._runner = runner
        self._engine = engine
        self._log = log
        self._progress = progress
        self._sample_s = sample_s
        self._next_s = 0.0
        self._next_sample_s = time.monotonic() + sample_s

    def tick(self) -> None:
        """Called at every turn of the runner's loop; mostly does nothing."""
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + min(_LIVE_EVERY_S, self._sample_s)
            self.show(now_s, is_last=False)

    def show(self, now_s: float, *, is_last: bool) -> None:
        """Tell where the run is; the last look is always sampled."""
        stats: RunStats = self._runner.stats
        sample = stats.sample(now_s, self._runner.num_in_flight, self._engine.stats)
        eta_s = stats.eta_s(now_s)
        self._progress.update(sample, stats.num_rows - stats.num_left, eta_s)
        state = "running" if self._engine.facts is not None else "starting the engine"
        live = {"state": state, "num_rows": stats.num_rows, "num_left": stats.num_left}
        self._log.live({**live, "eta_s": eta_s, **sample})
        if is_last or now_s >= self._next_sample_s:
            self._next_sample_s = now_s + self._sample_s
            self._log.sample(sample)
