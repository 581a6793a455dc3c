"""One trial: how it is run, and who may stop it."""

from __future__ import annotations

from functools import partial

import pytest

from batchgen.core.errors import ConfigError
from batchgen.engine.process import build_engine
from batchgen.pipeline.compute import OneEngine
from batchgen.pipeline.context import Stop, StopSwitch
from batchgen.pipeline.job_run import JobRun
from batchgen.tuning.trial import Stops, Times, run_trial
from tests.faulty import BACKEND

TIMES = Times(settle_s=0.05, settle_most_s=0.1, least_s=0.2, most_s=0.2)


def test_nobody_is_told_of_a_trial_and_one_engine_is_enough(make_job):
    hook = {"on_finish": ["true"], "metrics_file": "x.prom"}
    job = make_job(run=hook | {"replicas": 4}).quiet()
    assert (job.run.on_finish, job.run.metrics_file, job.run.replicas) == ([], None, 1)
    assert job.run.order == "auto"


class Recorder:
    """An engine that notes what it is asked for, in order."""

    def __init__(self, engine, asked):
        self._engine, self._asked = engine, asked

    def add(self, requests):
        self._asked += [request.ordinal.row for request in requests]
        self._engine.add(requests)

    def __getattr__(self, name):
        return getattr(self._engine, name)


@pytest.mark.parametrize("publishes", [True, False])
def test_long_rows_do_not_come_first_in_a_trial(make_job, publishes):
    """Else no trial's rows were like the next's."""
    bounds = [4000 if at % 100 == 99 else 4 for at in range(3000)]
    rows = [{"text": f"say {at}", "own": {"max_tokens": most}} for at, most in enumerate(bounds)]
    engine = {"max_num_seqs": 8, "step_s": 0.002}
    checks, model = {"allow_truncated": True}, {"engine": engine}
    job, asked = make_job(rows, sampling={"column": "own"}, checks=checks, model=model), []

    def build(spec):
        return Recorder(build_engine(spec), asked)

    JobRun(
        job,
        stop=StopSwitch(),
        publishes=publishes,
        compute=partial(OneEngine, build=build),
    ).run()
    assert sorted(asked) == list(range(3000))
    assert (asked.index(2999) < 2500) == publishes


def test_a_trial_of_few_rows_answers_them_and_measures_nothing(make_job):
    trial = run_trial(make_job(), {}, Stops(), TIMES)
    assert (trial.num_answered, trial.num_left, trial.is_answered) == (10, 0, True)
    assert (trial.measure, trial.failure, trial.state) == (None, None, "answered")
    again = run_trial(make_job(), {}, Stops(), TIMES)
    assert (again.num_answered, again.is_answered) == (0, True)


def test_settings_that_the_engine_refuses_are_a_failed_trial_and_the_jobs_own_are_trouble(make_job):
    trial = run_trial(make_job(), {"max_num_sqs": 3}, Stops(), TIMES)
    assert "did you mean 'max_num_seqs'?" in trial.failure
    assert not trial.is_answered
    with pytest.raises(ConfigError):
        run_trial(make_job(model={"engine": {"max_num_sqs": 3}}), {}, Stops(), TIMES)


def test_settings_that_the_engine_always_dies_of_are_a_failed_trial(make_job):
    engine = {"faults": [{"kind": "out_of_memory", "at": 1}], "max_num_seqs": 1, "step_s": 0.01}
    job = make_job(model={"backend": BACKEND, "engine": {**engine, "in_process": True}})
    trial = run_trial(job, {"max_num_seqs": 2}, Stops(), TIMES)
    assert "out of memory" in trial.failure
    assert trial.measure is None


def test_a_signal_stops_the_trial_at_work_and_every_later_one():
    stops = Stops()
    with stops.trial() as switch:
        switch.is_heard = True
        assert stops.ask() is True
        assert switch.state is Stop.DRAIN
        assert stops.ask() is True
        assert switch.state is Stop.NOW
    with stops.trial() as switch:
        assert switch.state is Stop.DRAIN
    assert stops.is_asked


def test_a_trial_that_is_about_to_end_is_not_cut_short_by_the_first_signal():
    stops = Stops()
    with stops.trial() as switch:
        switch.ask()
        stops.ask()
        assert switch.state is Stop.DRAIN


def test_asked_again_where_nobody_hears_it_is_for_the_caller_to_end():
    stops = Stops()
    assert stops.ask() is True
    assert stops.ask() is False
    with stops.trial():
        assert stops.ask() is False  # Planning: no loop is there to drain.
