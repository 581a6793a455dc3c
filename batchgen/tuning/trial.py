"""One trial: an ordinary run of the job with other settings, stopped when enough is measured.

There is no special path for its rows: they are committed as in every run, and the next trial, or
`batchgen run`, goes on from there.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import ConfigError, EngineError
from batchgen.job.tuned import with_settings
from batchgen.pipeline.context import Stop, StopSwitch
from batchgen.pipeline.job_run import JobRun
from batchgen.tuning.gauge import Measure, Times, add_moment, is_enough, measure, steady

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from batchgen.job.model import JobConfig
    from batchgen.pipeline.interface import Moment

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


@dataclass(frozen=True, slots=True)
class _Enough:
    """When a trial has seen enough."""

    times: Times
    best_speed: float
    grace_s: float


def _watch(
    run: JobRun, switch: StopSwitch, is_over: threading.Event, enough: _Enough
) -> list[Moment]:
    """Look at a run until it is over, and stop it when enough is known; returns what was seen."""
    moments: list[Moment] = []
    try:
        while not is_over.wait(_LOOK_EVERY_S) and switch.state is Stop.NO:
            if run.death is not None:
                switch.now()
                break
            moment = run.moment()
            add_moment(moments, moment)
            found = measure(steady(moments, enough.times))
            if found is None or not is_enough(found, enough.times, enough.best_speed):
                continue
            # Rows in flight may finish within their time; else the next run does them again.
            if moment.num_in_flight <= found.rows_per_s * enough.grace_s:
                switch.ask()
            else:
                switch.now()
    except BaseException:
        switch.now()
        raise
    return moments


def run_trial(
    job: JobConfig,
    settings: Mapping[str, Any],
    stops: Stops,
    times: Times,
    best_speed: float = 0.0,
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
    began_s, failure, is_over = time.monotonic(), None, threading.Event()
    with stops.trial() as switch, ThreadPoolExecutor(1, "trial") as pool:
        run = JobRun(_for_trial(job, settings), stop=switch, publishes=False)
        enough = _Enough(times, best_speed, job.run.grace_s)
        seen = pool.submit(_watch, run, switch, is_over, enough)
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


def _for_trial(job: JobConfig, settings: Mapping[str, Any]) -> JobConfig:
    """The job as a trial runs it: without hooks, on one engine, which stands for each of many."""
    job = with_settings(job, settings)
    alone: dict[str, Any] = {
        "on_finish": [],
        "metrics_file": None,
        "replicas": 1,
        "ray_address": None,
    }
    return job.model_copy(update={"run": job.run.model_copy(update=alone)})
