"""One trial: an ordinary run of the job with other settings, stopped when enough is measured.

There is no special path for its rows: they are committed as in every run, and the next trial, or
`batchgen run`, goes on from there.

What would the whole job's time be with these settings? A trial is a minute of it, so it must be
read with care:

- Rows that finish in a minute tell too little: at first the short ones do, and the more rows run
  at once, the later each finishes. So the engine's own counters are used, which know the tokens
  of unfinished rows; finished rows' only where an engine has no such counters.
- Only a steady stretch counts: from when the engine is full, and as many rows as it runs at once
  have ended since (so that rows of every age run side by side), to the last moment that it is
  full. Neither its start nor what drains at the end says anything of a night. (Where rows take
  longer than `Times.settle_most_s`, it begins then: prompts are fewer than their share for a
  while, at all settings alike.)
- Tokens are not all alike: of prompts a stretch may by chance hold more or less than its share,
  and they cost less. Were their price r of a generated token's, `generated + r * prompt` would
  not care. r = 0.2 is about right for GPUs (0.1 for small models, whose steps wait for the
  host, to 0.5 for large ones at large batches), and since a steady stretch has nearly its share,
  an error of r is one of second order. Prompt tokens from the prefix cache count like others:
  the job needs them either way, and a setting that gets them for nothing is a fast one.
- Work that is done twice, after a preemption, counts once.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import ConfigError, EngineError
from batchgen.job.tuned import with_settings
from batchgen.pipeline.context import Moment, Stop, StopSwitch
from batchgen.pipeline.job_run import JobRun

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from batchgen.job.model import JobConfig


PROMPT_WEIGHT = 0.2
_FULL, _STILL_FULL = 0.95, 0.8
_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class Times:
    """How long a trial looks, in seconds."""

    warm_up_s: float = 20.0
    """An engine that is not full by then will never be: its rows come too slowly."""
    settle_s: float = 5.0
    """At least so long after it is full; kernels may still be compiled."""
    settle_most_s: float = 20.0
    """And no longer, where rows take that long."""
    least_s: float = 15.0
    most_s: float = 60.0
    error: float = 0.01
    """Enough is measured, after `least_s`, once the standard error is that small a share."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A steady stretch of a run. Medians and maxima are over it."""

    seconds: float
    rows_per_s: float
    prompt_tokens_per_s: float
    """Prompt tokens, those of the prefix cache included."""
    output_tokens_per_s: float
    error: float
    """Standard error of the speed, as a share of it."""
    num_preemptions: int
    preemptions_per_row: float
    kv_cache_usage: float | None
    """The most."""
    num_running: int | None
    num_waiting: int | None
    max_num_seqs: int
    max_num_batched_tokens: int | None
    tokens_per_step: float | None
    """Tokens that a step had to compute."""
    cached_share: float
    """Share of the prompt tokens that the prefix cache had."""

    @property
    def speed(self) -> float:
        """What settings are compared by, see the module."""
        return self.output_tokens_per_s + PROMPT_WEIGHT * self.prompt_tokens_per_s

    @property
    def score(self) -> float:
        """The speed, less where rows are preempted: with longer answers it would be more of them.

        At most a tenth: what is lost by those that were seen is in the speed already.
        """
        return self.speed * (1 - min(0.1, self.preemptions_per_row))

    @property
    def is_full(self) -> bool:
        """Whether rows waited because it ran as many at once as it may.

        Its count is taken after a step, when those that it finished are gone: where answers are
        short that is far below. So what else could hold rows back is looked at, too.
        """
        has_memory = (self.kv_cache_usage or 0.0) < 0.9
        num_tokens = self.tokens_per_step or 0.0
        has_tokens = num_tokens < 0.7 * (self.max_num_batched_tokens or math.inf)
        is_at_limit = (self.num_running or 0) >= 0.9 * self.max_num_seqs
        return bool(self.num_waiting) and (is_at_limit or (has_memory and has_tokens))


def add_moment(moments: list[Moment], moment: Moment) -> None:
    """Keep a look if the engine is up and has said something new."""
    if moment.facts is None or not moment.num_in_flight:
        return
    if not moments or moments[-1].engine != moment.engine:
        moments.append(moment)


def steady(moments: Sequence[Moment], times: Times) -> Sequence[Moment]:
    """The steady stretch; empty if there is none yet."""
    if not moments:
        return ()
    peak, begun_s = max(map(_running, moments)), moments[0].at_s
    full = next(
        (
            moment
            for moment in moments
            if _running(moment) >= _FULL * peak or moment.at_s - begun_s >= times.warm_up_s
        ),
        moments[-1],
    )

    def is_settled(moment: Moment) -> bool:
        has_turned = moment.num_ended - full.num_ended >= peak
        wait_s = times.settle_s if has_turned else times.settle_most_s
        return moment.at_s - full.at_s >= wait_s

    stretch = [moment for moment in moments if is_settled(moment)]
    usual = statistics.median(map(_running, stretch)) if stretch else 0
    while stretch and _running(stretch[-1]) < _STILL_FULL * usual:
        stretch.pop()
    return stretch if len(stretch) > 1 else ()


def _running(moment: Moment) -> int:
    return moment.engine.num_running or 0


def measure(stretch: Sequence[Moment]) -> Measure | None:
    """What a steady stretch says; None if it is none or nothing was done in it."""
    if len(stretch) < 2 or (facts := stretch[-1].facts) is None:
        return None
    first, last = stretch[0], stretch[-1]
    seconds = last.at_s - first.at_s
    prompts, outputs = _counters(stretch)
    work = [
        output + PROMPT_WEIGHT * prompt for prompt, output in zip(prompts, outputs, strict=True)
    ]
    if seconds <= 0 or work[-1] <= work[0]:
        return None
    prompt, output = prompts[-1] - prompts[0], outputs[-1] - outputs[0]
    preempted = (last.engine.num_preemptions or 0) - (first.engine.num_preemptions or 0)
    num_rows = last.num_ended - first.num_ended
    usages = [u for moment in stretch if (u := moment.engine.kv_cache_usage) is not None]
    back = last.prompt_tokens - first.prompt_tokens
    cached = (last.cached_tokens - first.cached_tokens) / back if back > 0 else 0.0
    num_steps = (last.engine.num_steps or 0) - (first.engine.num_steps or 0)
    computed = output + prompt * (1 - cached)
    return Measure(
        seconds=seconds,
        rows_per_s=num_rows / seconds,
        prompt_tokens_per_s=prompt / seconds,
        output_tokens_per_s=output / seconds,
        error=_error([moment.at_s for moment in stretch], work),
        num_preemptions=preempted,
        preemptions_per_row=preempted / max(1, num_rows),
        kv_cache_usage=max(usages) if usages else None,
        num_running=_median([one.engine.num_running for one in stretch], facts.num_engines),
        num_waiting=_median([one.engine.num_waiting for one in stretch], facts.num_engines),
        max_num_seqs=facts.max_num_seqs,
        max_num_batched_tokens=last.engine.max_num_batched_tokens,
        tokens_per_step=computed / num_steps if num_steps > 0 else None,
        cached_share=cached,
    )


def _counters(stretch: Sequence[Moment]) -> tuple[list[int], list[int]]:
    """Tokens of prompts and of answers: the engine's own, or finished rows' where it has none."""
    prompts = [moment.engine.num_prompt_tokens or 0 for moment in stretch]
    outputs = [moment.engine.num_generated_tokens or 0 for moment in stretch]
    if prompts[-1] > prompts[0] or outputs[-1] > outputs[0]:
        return prompts, outputs
    return [m.prompt_tokens for m in stretch], [m.output_tokens for m in stretch]


def _median(values: Sequence[int | None], num_engines: int) -> int | None:
    """Of one of some engines whose figures are added up."""
    known = [value for value in values if value is not None]
    return round(statistics.median(known) / num_engines) if known else None


def _error(times_s: Sequence[float], work: Sequence[float]) -> float:
    """Standard error of the mean rate as a share of it, by the spread of up to eight blocks."""
    span_s = times_s[-1] - times_s[0]
    edges: list[int] = [0]
    rates: list[float] = []
    for at in range(1, len(times_s)):
        if times_s[at] - times_s[edges[-1]] >= 0.99 * span_s / _BLOCKS:
            start = edges[-1]
            rates.append((work[at] - work[start]) / (times_s[at] - times_s[start]))
            edges.append(at)
    if len(rates) < 3 or not (mean := statistics.fmean(rates)):
        return 1.0
    return statistics.stdev(rates) / mean / math.sqrt(len(rates))


def is_enough(found: Measure | None, times: Times, best_speed: float = 0.0) -> bool:
    """Whether looking on would change nothing that matters.

    Args:
        found: So far.
        times: How long to look.
        best_speed: Of the best settings so far: what is clearly slower is not measured exactly.
    """
    if found is None or found.seconds < times.least_s:
        return False
    is_slow = found.speed * (1 + 3 * found.error) < 0.9 * best_speed
    return is_slow or found.error <= times.error or found.seconds >= times.most_s


_LOOK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of settings."""

    settings: Mapping[str, Any]
    """What differs from the job's own."""
    measure: Measure | None = None
    """None where it failed, or ended before there was a steady stretch."""
    failure: str | None = None
    """Why the engine did not start, or died."""
    num_answered: int = 0
    """Rows; they are kept."""
    num_left: int = 0
    """Rows without an answer, after it."""
    wall_s: float = 0.0
    is_answered: bool = False
    """No row of the job is left without an answer."""
    state: str = ""
    """State of the run, see `Summary`."""


class Stops:
    """What signals ask for: passed on to the trial at work, and the end of the search."""

    def __init__(self) -> None:
        self.is_asked = False
        self._trial: StopSwitch | None = None

    @contextmanager
    def trial(self) -> Iterator[StopSwitch]:
        """The switch of the next trial, which may also be asked by the trial itself."""
        switch = StopSwitch()
        self._trial = switch
        if self.is_asked:
            switch.ask()
        try:
            yield switch
        finally:
            self._trial = None

    def ask(self) -> bool:
        """Ask once: what is in flight may finish. Ask again: now.

        Returns:
            False if it was asked again and nobody is there to hear it.
        """
        switch, is_again = self._trial, self.is_asked
        self.is_asked = True
        if switch is None:
            return not is_again
        if is_again:
            switch.now()
        elif switch.state is Stop.NO:  # Else it is ending already.
            switch.ask()
        return switch.is_heard or not is_again


def _watch(
    run: JobRun,
    switch: StopSwitch,
    is_over: threading.Event,
    look: Callable[[Sequence[Moment]], Measure | None],
    grace_s: float,
) -> list[Moment]:
    """Look at a run until it is over, and stop it when enough is known; returns what was seen.

    Args:
        run: The trial's.
        switch: Stops it.
        is_over: Set when it has ended.
        look: Says what was measured, once that is enough.
        grace_s: How long the rows in flight have.
    """
    moments: list[Moment] = []
    try:
        while not is_over.wait(_LOOK_EVERY_S) and switch.state is Stop.NO:
            if run.death is not None:
                switch.now()
                break
            moment = run.moment()
            add_moment(moments, moment)
            if (found := look(moments)) is None:
                continue
            # Rows in flight may finish within their time; else the next run does them again.
            if moment.num_in_flight <= found.rows_per_s * grace_s:
                switch.ask()
            else:
                switch.now()
    except BaseException:
        switch.now()
        raise
    return moments


def run_trial(
    job: JobConfig, settings: Mapping[str, Any], stops: Stops, times: Times, best_speed: float = 0.0
) -> Trial:
    """Run the job with other settings until enough is measured or no row is left.

    Args:
        job: With its own settings.
        settings: See `job.tuned.with_settings`; empty: the job's own.
        stops: Asked from outside.
        times: How long to measure.
        best_speed: See `is_enough`.

    Raises:
        BatchgenError: The job fails. Not where only these settings are at fault: that is a trial
            with `failure`. With its own settings the job fails.
    """

    def look(moments: Sequence[Moment]) -> Measure | None:
        found = measure(steady(moments, times))
        return found if is_enough(found, times, best_speed) else None

    began_s, failure, is_over = time.monotonic(), None, threading.Event()
    with stops.trial() as switch, ThreadPoolExecutor(1, "trial") as pool:
        # One engine stands for each of many.
        run = JobRun(with_settings(job.quiet(), settings), stop=switch, publishes=False)
        seen = pool.submit(_watch, run, switch, is_over, look, job.run.grace_s)
        try:
            run.run()
        except (EngineError, ConfigError) as error:
            if not settings:
                raise
            failure = str(error)
        finally:
            is_over.set()
        moments = seen.result()
    failure = failure or run.death
    summary = run.summary
    found = None if failure else measure(steady(moments, times))
    return Trial(
        settings=settings,
        measure=found if found and found.seconds >= times.least_s / 2 else None,
        failure=" ".join(failure.split()) if failure else None,
        num_answered=sum(summary.run.get(n, 0) for n in ("num_ok", "num_errors")) if summary else 0,
        num_left=summary.num_left if summary else 0,
        wall_s=time.monotonic() - began_s,
        is_answered=summary is not None and summary.state in {"answered", "nothing_to_do"},
        state=summary.state if summary else "",
    )
