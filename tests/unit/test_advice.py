"""What a run says at its end of a KV cache that was too small."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from batchgen.core.records import EngineFacts, EngineStats
from batchgen.pipeline.compute import OneEngine
from batchgen.pipeline.context import StopSwitch
from batchgen.pipeline.job_run import JobRun
from batchgen.pipeline.stats import advise
from tests.fakes import FakeEngine

FACTS = EngineFacts("vllm", "0.26.0", "NVIDIA H100 80GB HBM3", 8192, 256, 60.0)
STORM = {"elapsed_s": 200.0, "num_ok": 19_000, "num_errors": 1000, "num_preemptions": 8000}


def test_a_preemption_storm_says_how_often_and_what_to_do():
    text = advise(STORM, FACTS) or ""
    assert "the KV cache was full and 8,000 requests were preempted, 0.4 a row" in text
    assert "Lower model.max_num_seqs from 256" in text


@pytest.mark.parametrize(
    "changes",
    [{"num_preemptions": 1000}, {"num_preemptions": None}, {"elapsed_s": 45.0}],
)
def test_of_few_preemptions_or_a_short_run_nothing_is_said(changes):
    assert advise(STORM | changes, FACTS) is None


def test_of_an_engine_that_never_came_up_nothing_is_said():
    assert advise(STORM, None) is None
    assert advise(STORM | {"num_ok": 0, "num_errors": 0}, replace(FACTS, device="cpu"))


@pytest.fixture
def stormy_run(make_job):
    """A run that had a storm, on a fake engine."""

    def make(**kwargs):
        def build(_):
            engine = FakeEngine(facts=FACTS)
            engine.stats = EngineStats(num_preemptions=90)
            return engine

        compute = partial(OneEngine, build=build)
        run = JobRun(make_job(), stop=StopSwitch(), compute=compute, **kwargs)
        run._context.stats.started_s -= 200  # It takes that long.
        return run

    return make


def test_a_run_tells_it_in_the_summary_and_on_stderr(stormy_run, capsys):
    summary = stormy_run().run()
    (warning,) = summary.warnings
    assert warning.startswith("the KV cache was full")
    assert f"batchgen: {warning}\n" in capsys.readouterr().err


def test_a_trial_leaves_it_to_the_tune(stormy_run, capsys):
    summary = stormy_run(publishes=False).run()
    assert (summary.state, summary.warnings) == ("answered", [])
    assert "KV cache" not in capsys.readouterr().err
