"""One trial: an ordinary run of the job with other settings, stopped when enough is measured.

There is no special path for its rows: they are committed as in every run, and the next trial, or
`batchgen run`, goes on from there.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import ConfigError, EngineError
from batchgen.engine.death import is_out_of_memory
from batchgen.pipeline.context import Stop, StopSwitch
from batchgen.pipeline.job_run import JobRun
from batchgen.tuning.gauge import Measure, Times, add_moment, is_enough, measure, steady
from batchgen.tuning.tuned import with_settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from batchgen.job.model import JobConfig
    from batchgen.pipeline.interface import Moment, Summary

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
    is_out_of_memory: bool = False
    num_answered: int = 0
    """Rows; they are kept."""
    num_left: int = 0
    """Rows without an answer, after it."""
    wall_s: float = 0.0
    is_answered: bool = False
    """No row of the job is left without an answer."""
    state: str = ""
    """Of the run, see `executor.summary.Summary`."""


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


class _Watcher:
    """Looks at a run from a thread of its own and stops it when enough is known."""

    def __init__(self, run: JobRun, switch: StopSwitch, times: Times, best: float) -> None:
        self._run = run
        self._switch = switch
        self._times = times
        self._best_speed = best
        self._grace_s = 0.0
        self._is_over = threading.Event()
        self._trouble: BaseException | None = None
        self._thread = threading.Thread(target=self._watch, name="trial", daemon=True)
        self.moments: list[Moment] = []

    @contextmanager
    def watching(self, grace_s: float) -> Iterator[None]:
        """Watch while the run works.

        Args:
            grace_s: Let what is in flight finish if it will within that time; else it is cheaper
                to let the next run do it again.
        """
        self._grace_s = grace_s
        self._thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            self._thread.join()
        if self._trouble is not None:
            raise self._trouble

    def _watch(self) -> None:
        try:
            while not self._is_over.wait(_LOOK_EVERY_S) and self._switch.state is Stop.NO:
                self._look()
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._trouble = error
            self._switch.now()

    def _look(self) -> None:
        if self._run.death is not None:
            self._switch.now()
            return
        moment = self._run.moment()
        add_moment(self.moments, moment)
        found = measure(steady(self.moments, self._times))
        if found is None or not is_enough(found, self._times, self._best_speed):
            return
        if moment.num_in_flight <= found.rows_per_s * self._grace_s:
            self._switch.ask()
        else:
            self._switch.now()


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
        settings: See `config.tuned.with_settings`; empty: the job's own.
        stops: Asked from outside.
        times: How long to measure.
        best_speed: See `is_enough`.

    Raises:
        BatchgenError: Job trouble. Not where only these settings are at fault: that is a trial
            with `failure`. Of the job's own settings it is the job's trouble.
    """
    began_s = time.monotonic()
    with stops.trial() as switch:
        run = JobRun(_for_trial(job, settings), stop=switch, publishes=False)
        watcher = _Watcher(run, switch, times, best_speed)
        failure = None
        try:
            with watcher.watching(job.run.grace_s):
                run.run()
        except (EngineError, ConfigError) as error:
            if not settings:
                raise
            failure = str(error)
    failure = failure or run.death
    summary = run.summary
    found = None if failure else measure(steady(watcher.moments, times))
    return Trial(
        settings=settings,
        measure=found if found and found.seconds >= times.least_s / 2 else None,
        failure=" ".join(failure.split()) if failure else None,
        is_out_of_memory=failure is not None and is_out_of_memory(failure),
        num_answered=_num_answered(summary),
        num_left=summary.num_left if summary is not None else 0,
        wall_s=time.monotonic() - began_s,
        is_answered=summary is not None and summary.state in {"answered", "nothing_to_do"},
        state=summary.state if summary else "",
    )


def _num_answered(summary: Summary | None) -> int:
    return summary.run.get("num_ok", 0) + summary.run.get("num_errors", 0) if summary else 0


def _for_trial(job: JobConfig, settings: Mapping[str, Any]) -> JobConfig:
    """The job as a trial runs it: one engine, and nobody is told."""
    job = with_settings(job, settings)
    # What is found of one engine here holds for each of many.
    run: dict[str, Any] = {"on_finish": [], "metrics_file": None}
    run |= {"replicas": 1, "ray_address": None}
    return job.model_copy(update={"run": job.run.model_copy(update=run)})
