"""Which settings to try next. Pure: trials come in, candidates go out.

A search along one setting at a time, the likeliest gain first, each step from the best so far.
An engine's start costs a minute or two on a GPU, so what was measured decides what is worth one:
a setting that did not bind (rows that never filled `max_num_seqs`, steps far below
`max_num_batched_tokens`) is not tried. A step counts as better only beyond the noise.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from batchgen.engine.vllm.settings import GPU_MEMORY_UTILIZATION
from batchgen.job.tuned import Settings, value_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from batchgen.job.model import JobConfig
    from batchgen.tuning.trial import Measure, Trial

NOISE = 0.02
"""Gains below are none: two trials of the same settings differ by about as much."""
MOST_NOISE = 0.1
STORM = 0.02
"""Preemptions a row from which the KV cache is too small for what runs at once."""
MOST_MEMORY = 0.95
"""The rest is for what vLLM does not plan: the CUDA context, fragments, longer batches."""
MEMORY_REACH = 0.03
"""Distance that a share of memory must keep from one that ran out."""
MOST_SEQS, LEAST_SEQS = 4096, 16
MOST_BATCHED = 65536


class Search:
    """Remembers trials and proposes the next. Use: `for settings in search.candidates()`."""

    def __init__(self, job: JobConfig, *, is_gpu: bool, most_memory: float = MOST_MEMORY) -> None:
        """Begin.

        Args:
            job: With its own settings, where the search starts.
            is_gpu: Whether there is GPU memory to share out.
            most_memory: Highest `gpu_memory_utilization` to try.
        """
        self._job = job
        self._is_gpu = is_gpu
        self._most_memory = min(most_memory, MOST_MEMORY)
        self.trials: list[Trial] = []
        self._best: Trial | None = None
        self._deadly: list[Settings] = []

    @property
    def best(self) -> Trial:
        """The best so far; the first if none was measured."""
        return self._best or self.trials[0]

    @property
    def own(self) -> Trial:
        """The trial of the job's own settings."""
        return self.trials[0]

    def note(self, trial: Trial) -> None:
        """Take a trial in; call after each candidate."""
        before = self._best
        self.trials.append(trial)
        if trial.failure is not None:
            known = before.settings if before else {}
            self._deadly.append(
                {name: v for name, v in trial.settings.items() if known.get(name) != v}
            )
        elif trial.measure is not None and _is_better(trial.measure, before):
            self._best = trial

    def candidates(self) -> Iterator[Settings]:
        """Yield settings to try; the first are the job's own. `note` each trial before the next.

        Each way is followed while its last step was better. More memory may make room for more
        rows at once, so that one is gone twice.
        """
        yield {}
        ways = [self._window, self._seqs, self._memory, self._seqs]
        if self._job.model.is_vllm:
            ways += [self._more_batched, self._prefix_caching]
        for way in ways:
            while self._best is not None and (change := way(self._measure)):
                settings = {**self.best.settings, **change}
                is_known = any(trial.settings == settings for trial in self.trials)
                if is_known or self._is_risky(change):
                    break
                yield settings
                if self.best is not self.trials[-1]:
                    break

    @property
    def _measure(self) -> Measure:
        found = self.best.measure
        assert found is not None  # noqa: S101 - only asked once there is one
        return found

    def _is_risky(self, change: Mapping[str, Any]) -> bool:
        """Whether a value is as large as, or within reach of, one that the engine died of."""
        for name, value in change.items():
            for died_at in (deadly[name] for deadly in self._deadly if name in deadly):
                is_share = name == "gpu_memory_utilization"
                most = died_at - MEMORY_REACH + 1e-9 if is_share else died_at / 2
                if not isinstance(value, bool) and value > most:
                    return True
        return False

    def _value(self, name: str) -> Any:  # noqa: ANN401 - as a job file has it
        """A setting of the best so far, which may be the job's own; None if nobody says it."""
        return self.best.settings.get(name, value_of(self._job, name))

    def _window(self, found: Measure) -> Settings | None:
        """Rows that wait inside are few, and the window is full: it may be what binds."""
        num = max(1, found.max_num_seqs // self._job.sampling.n)
        window = self._value("max_in_flight") or 2 * num
        running, waiting = found.num_running or 0, found.num_waiting or 0
        is_dry = waiting < 0.05 * running and running + waiting >= 0.9 * window
        return {"max_in_flight": max(2 * window, 2 * num)} if is_dry else None

    def _seqs(self, found: Measure) -> Settings | None:
        """More rows at once while they fill it and the KV cache has room; fewer in a storm."""
        if found.preemptions_per_row > STORM and found.num_running:
            fewer = _even(0.9 * found.num_running)
            return {"max_num_seqs": fewer} if LEAST_SEQS <= fewer < found.max_num_seqs else None
        usage = found.kv_cache_usage or 0.0
        factor = min(2.0, 0.9 / usage) if usage else 2.0
        if not found.is_full or found.max_num_seqs >= MOST_SEQS or factor < 1.2:
            return None
        more = min(MOST_SEQS, _even(factor * found.max_num_seqs))
        # Where the job sets the window, the same number of rows waits as before.
        window, needed = self._value("max_in_flight"), 2 * more // self._job.sampling.n
        wider = {"max_in_flight": needed} if window is not None and window < needed else {}
        return {"max_num_seqs": more, **wider}

    def _more_batched(self, found: Measure) -> Settings | None:
        """A larger budget of tokens, where steps are nearly full on average."""
        name = "max_num_batched_tokens"
        budget = self._value(name) or found.max_num_batched_tokens or MOST_BATCHED
        is_used = (found.tokens_per_step or 0.0) >= 0.4 * budget
        return {name: 2 * budget} if is_used and 2 * budget <= MOST_BATCHED else None

    def _memory(self, found: Measure) -> Settings | None:
        """More KV cache, where it is what binds."""
        is_short = (found.kv_cache_usage or 0) >= 0.9 or found.preemptions_per_row > STORM
        now = self._value("gpu_memory_utilization") or GPU_MEMORY_UTILIZATION
        if not self._is_gpu or not is_short or now > self._most_memory - 0.01:
            return None
        return {"gpu_memory_utilization": round(self._most_memory, 3)}

    def _prefix_caching(self, found: Measure) -> Settings | None:
        """No prefix caching, where it serves nothing."""
        is_on = self._value("enable_prefix_caching") is not False
        return {"enable_prefix_caching": False} if is_on and found.cached_share < 0.02 else None


def _is_better(found: Measure, best: Trial | None) -> bool:
    """Beyond the noise: what trials differ by anyway, or twice the errors of these two."""
    if best is None or best.measure is None:
        return True
    noise = max(NOISE, 2 * math.hypot(found.error, best.measure.error))
    return found.score > best.measure.score * (1 + min(noise, MOST_NOISE))


def _even(number: float) -> int:
    """A number that a person would write: two digits and zeros, or a multiple of 8 below 256."""
    if number < 256:
        return max(8, round(number / 8) * 8)
    return round(number / 16) * 16
