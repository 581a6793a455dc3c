"""Which settings to try next. Pure: trials come in, candidates go out.

A search along one setting at a time, the likeliest gain first, each step from the best so far.
An engine's start costs a minute or two on a GPU, so what was measured decides what is worth one:
a setting that did not bind (rows that never filled `max_num_seqs`, steps far below
`max_num_batched_tokens`) is not tried. A step counts as better only beyond the noise.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from batchgen.engine.vllm.settings import GPU_MEMORY_UTILIZATION
from batchgen.tuning.tuned import Settings, value_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping

    from batchgen.job.model import JobConfig
    from batchgen.tuning.gauge import Measure
    from batchgen.tuning.trial import Trial

    Moves = Generator[Settings, bool, None]
    """Changes of the best so far; gets back whether each was tried and was better."""

NOISE = 0.02
"""Gains below are none: two trials of the same settings differ by about as much."""
MOST_NOISE = 0.1
STORM = 0.02
"""Preemptions a row from which the KV cache is too small for what runs at once."""
MOST_MEMORY = 0.95
"""The rest is for what vLLM does not plan: the CUDA context, fragments, longer batches."""
MEMORY_REACH = 0.03
"""So far must a share of memory stay from one that ran out."""
MOST_SEQS, LEAST_SEQS = 4096, 16
MOST_BATCHED, LEAST_BATCHED = 65536, 2048


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
        self._is_echo = job.model.backend == "echo"
        self.trials: list[Trial] = []
        self._best: Trial | None = None
        self._deadly: list[Settings] = []

    @property
    def best(self) -> Trial:
        """The best so far; the first if none was measured."""
        return self._best or self.trials[0]

    @property
    def own(self) -> Trial:
        """That of the job's own settings."""
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
        """Yield settings to try; the first are the job's own. `note` each trial before the next."""
        yield {}
        if self._best is None:
            return
        steps = [self._wider_window, self._seqs]
        if not self._is_echo:
            steps += [self._batched, self._memory, self._prefix_caching, self._async]
        for step in (*steps, self._fewer_seqs):
            yield from self._along(step())

    def _along(self, moves: Moves) -> Iterator[Settings]:
        """Make one setting's moves, those that may be made; tell it of each whether it was one."""
        with suppress(StopIteration):
            change = next(moves)
            while True:
                settings, is_better = {**self.best.settings, **change}, False
                if not self._is_known(settings) and not self._is_risky(change):
                    yield settings
                    is_better = self.best is self.trials[-1]
                change = moves.send(is_better)

    @property
    def _measure(self) -> Measure:
        found = self.best.measure
        assert found is not None  # noqa: S101 - only asked once there is one
        return found

    def _is_known(self, settings: Settings) -> bool:
        return any(trial.settings == settings for trial in self.trials)

    def _is_risky(self, change: Mapping[str, Any]) -> bool:
        """Whether a value is as large as, or within reach of, one that the engine died of."""
        for deadly in self._deadly:
            for name, value in change.items():
                died_at = deadly.get(name)
                if isinstance(value, bool) or died_at is None:
                    continue
                is_share = name == "gpu_memory_utilization"
                if value > (died_at - MEMORY_REACH + 1e-9 if is_share else died_at / 2):
                    return True
        return False

    def _value(self, name: str) -> Any:  # noqa: ANN401 - as a job file has it
        """Of the best so far, as far as it is known."""
        measured = {
            "max_num_seqs": self._measure.max_num_seqs,
            "max_num_batched_tokens": self._measure.max_num_batched_tokens,
        }
        own = value_of(self._job, name)
        return self.best.settings.get(name, own if own is not None else measured.get(name))

    def _wider_window(self) -> Moves:
        """Rows that wait inside are few, and the window is full: it may be what binds."""
        for _ in range(2):
            found = self._measure
            num = max(1, found.max_num_seqs // self._job.sampling.n)
            window = self._value("max_in_flight") or 2 * num
            inside = (found.num_running or 0) + (found.num_waiting or 0)
            is_dry = (found.num_waiting or 0) < 0.05 * (found.num_running or 0)
            if not is_dry or inside < 0.9 * window:
                return
            if not (yield {"max_in_flight": max(2 * window, 2 * num)}):
                return

    def _seqs(self) -> Moves:
        found = self._measure
        if found.preemptions_per_row > STORM and found.num_running:
            fewer = _even(0.9 * found.num_running)
            if LEAST_SEQS <= fewer < found.max_num_seqs:
                yield {"max_num_seqs": fewer}
            return
        while self._measure.is_full and self._measure.max_num_seqs < MOST_SEQS:
            usage = self._measure.kv_cache_usage or 0.0
            factor = min(2.0, 0.9 / usage) if usage else 2.0
            if factor < 1.2:
                return
            more = _even(factor * self._measure.max_num_seqs)
            if not (yield {"max_num_seqs": min(MOST_SEQS, more), **self._window_for(more)}):
                return

    def _window_for(self, max_num_seqs: int) -> Settings:
        """Where the job sets the window: the same number of rows waits."""
        window = self._value("max_in_flight")
        needed = 2 * max_num_seqs // self._job.sampling.n
        return {"max_in_flight": needed} if window is not None and window < needed else {}

    def _batched(self) -> Moves:
        name, tries = "max_num_batched_tokens", 0
        while (budget := self._value(name)) and self._load(budget) >= 0.4:
            if 2 * budget > MOST_BATCHED:
                break
            tries += 1
            if not (yield {name: 2 * budget}):
                break
        else:
            if tries:
                return
        budget = self._value(name)
        if budget and self._load(budget) >= 0.2 and budget // 2 >= self._least_batched():
            yield {name: budget // 2}

    def _load(self, budget: int) -> float:
        """How full steps are on average, 0 to 1."""
        return (self._measure.tokens_per_step or 0.0) / budget

    def _least_batched(self) -> int:
        least = max(LEAST_BATCHED, self._measure.max_num_seqs)
        # On a CPU prompts are not cut in pieces: one must fit.
        return least if self._is_gpu else max(least, self._measure.max_model_len or MOST_BATCHED)

    def _memory(self) -> Moves:
        """More KV cache, where it is what binds."""
        found = self._measure
        is_short = (found.kv_cache_usage or 0) >= 0.9 or found.preemptions_per_row > STORM
        name = "gpu_memory_utilization"
        now = self._value(name) or GPU_MEMORY_UTILIZATION
        if not self._is_gpu or not is_short or now > self._most_memory - 0.01:
            return
        is_better = yield {name: round(self._most_memory, 3)}
        if is_better:
            yield from self._seqs()

    def _prefix_caching(self) -> Moves:
        """Without, if it serves nothing; with, if the job does without."""
        if self._value("enable_prefix_caching") is False:
            yield {"enable_prefix_caching": True}
        elif self._measure.cached_share < 0.02:
            yield {"enable_prefix_caching": False}

    def _async(self) -> Moves:
        """Only where the job has it off: vLLM turns it on by itself wherever it can be."""
        if self._is_gpu and self._value("async_scheduling") is False:
            yield {"async_scheduling": True}

    def _fewer_seqs(self) -> Moves:
        """The other way, where more did not help and no way has been found."""
        num, is_moved = self._measure.max_num_seqs, "max_num_seqs" in self.best.settings
        if self._measure.is_full and not is_moved and num // 2 >= LEAST_SEQS:
            yield {"max_num_seqs": _even(num / 2)}


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
