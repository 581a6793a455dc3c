"""What a run's samples say of its settings, on made-up samples."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from batchgen.core.records import EngineFacts
from batchgen.pipeline.compute import OneEngine
from batchgen.pipeline.context import StopSwitch
from batchgen.pipeline.job_run import JobRun
from batchgen.pipeline.stats import Way, advise
from tests.fakes import FakeEngine

FACTS = EngineFacts("vllm", "0.26.0", "NVIDIA H100 80GB HBM3", 8192, 256, 60.0)
WAY = Way(capacity=1536)


def samples(num=40, every_s=5.0, **changes):
    """A healthy run: full, rows waiting, 100 rows/s; `changes` by name, or by time."""
    row = {
        "num_running": 250,
        "num_waiting": 260,
        "kv_cache_usage": 0.7,
        "gpu_busy": 0.98,
        "num_preemptions": 0,
        "num_in_flight": 1536,
        "num_ok": lambda s: int(100 * s),
        "num_errors": 0,
    } | changes
    return [
        {"elapsed_s": at * every_s}
        | {name: value(at * every_s) if callable(value) else value for name, value in row.items()}
        for at in range(num)
    ]


def test_a_full_engine_gets_no_advice():
    assert advise(samples(), FACTS, WAY) == []


def test_a_preemption_storm_says_how_many_rows_fit():
    run = samples(
        kv_cache_usage=lambda s: 0.99 if s > 30 else 0.5,
        num_running=160,
        num_preemptions=lambda s: int(40 * s),
    )
    (text,) = advise(run, FACTS, WAY)
    assert "the KV cache was full and 6,600 requests were preempted, 0.4 a row" in text
    assert "Lower model.max_num_seqs from 256 to about 140" in text


def test_a_few_preemptions_are_no_storm():
    run = samples(kv_cache_usage=0.99, num_preemptions=lambda s: int(5 * s))
    assert advise(run, FACTS, WAY) == []


def test_a_gpu_that_waits_for_a_full_engine_is_told():
    waits = samples(gpu_busy=0.55)
    (text,) = advise(waits, FACTS, WAY)
    assert "the GPU worked 55% of the time though the engine had its fill" in text
    assert "run.engines_per_gpu = 2" in text
    assert advise(waits, replace(FACTS, device="cpu"), WAY) == []
    assert advise(waits, FACTS, WAY._replace(num_gpus=2)) == []
    assert advise(waits, FACTS, WAY._replace(num_engines=2, capacity=1)) == []
    assert advise(samples(num=20, gpu_busy=0.55, every_s=1.0), FACTS, WAY) == []
    assert advise(samples(gpu_busy=None), FACTS, WAY) == []
    assert advise(samples(gpu_busy=lambda s: 0.55 if s < 80 else 0.9), FACTS, WAY) == []


def test_an_idle_engine_is_told_before_its_idle_gpu():
    run = samples(num_running=64, num_waiting=0, num_in_flight=1088, gpu_busy=0.3)
    (text,) = advise(run, FACTS, WAY._replace(max_in_flight=64, capacity=1088))
    assert "run.max_in_flight = 64" in text


def test_a_window_that_is_too_small_is_named():
    run = samples(num_running=64, num_waiting=0, num_in_flight=1088)
    (text,) = advise(run, FACTS, WAY._replace(max_in_flight=64, capacity=1088))
    assert "the engine ran 64 rows at once, it may run 256: run.max_in_flight = 64" in text
    assert "Raise it to 512" in text


def test_several_answers_a_row_fill_the_window():
    run = samples(num_running=240, num_waiting=0, num_in_flight=1088)
    assert advise(run, FACTS, Way(max_in_flight=64, n=4, capacity=1088)) == []


@pytest.mark.parametrize(
    ("num_in_flight", "limit"), [(90, "Reading and rendering"), (1500, "the engine's front end")]
)
def test_an_idle_engine_says_on_which_side_rows_are_held_up(num_in_flight, limit):
    run = samples(num_running=80, num_waiting=1, kv_cache_usage=0.2, num_in_flight=num_in_flight)
    (text,) = advise(run, FACTS, WAY)
    assert "ran 80 rows at once, it may run 256" in text
    assert limit in text


def test_rows_that_wait_for_memory_or_tokens_do_not_make_an_engine_idle():
    assert advise(samples(num_running=80, kv_cache_usage=0.95, num_waiting=0), FACTS, WAY) == []
    assert advise(samples(num_running=80, num_waiting=400), FACTS, WAY) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        (
            {"kv_cache_usage": 0.99, "num_preemptions": lambda s: int(40 * s)},
            "and 26,400 requests were preempted, 0.4 a row: work that is done twice. Lower "
            "model.max_num_seqs from 256 to about 200",
        ),
        ({"num_running": 80, "num_waiting": 3, "kv_cache_usage": 0.2}, "each engine ran 80 rows"),
        (
            {"num_running": 80, "num_waiting": 3, "kv_cache_usage": 0.2, "num_in_flight": 300},
            "it may run 256: rows came too slowly",
        ),
    ],
)
def test_of_several_engines_it_says_what_it_would_say_of_one(changes, told):
    summed = [
        {name: 4 * value if name.startswith("num_") else value for name, value in one.items()}
        for one in samples(**changes)
    ]
    texts = advise([*summed], FACTS, WAY._replace(num_engines=4))
    assert [told in text for text in texts] == ([True] if told else [])


STORM = {"kv_cache_usage": 0.99, "num_preemptions": lambda s: int(90 * s)}


@pytest.mark.parametrize(
    ("run", "facts"),
    [
        (samples(num=16, **STORM), FACTS),  # 45 steady seconds.
        (samples(num=8, every_s=60, **STORM), FACTS),  # Too few looks.
        (samples(**STORM), replace(FACTS, device="none")),
        (samples(**STORM), None),
        ([], FACTS),
        (samples(num_running=None, **STORM), FACTS),
        (samples(**{**STORM, "num_preemptions": None}), FACTS),
    ],
)
def test_where_too_little_is_known_it_is_silent(run, facts):
    assert advise(run, facts, WAY) == []
    assert advise(samples(**STORM), FACTS, WAY) != []


def test_the_time_in_which_the_engine_loads_does_not_count():
    loading = samples(num_running=0, num_waiting=0, num_in_flight=1088, num_ok=0)
    short = [
        sample | {"elapsed_s": 200.0 + sample["elapsed_s"]}
        for sample in samples(num=8, num_running=60, num_waiting=0, num_in_flight=300)
    ]
    assert advise(loading + short, FACTS, WAY) == []


def test_the_last_rows_do_not_count_however_long_they_take():
    def at_work(s, busy, else_):
        return busy if s < 120 else else_

    tail = {
        "num_in_flight": lambda s: at_work(s, 1536, 20),
        "num_running": lambda s: at_work(s, 250, 20),
        "num_waiting": lambda s: at_work(s, 260, 0),
    }
    run = samples(num=120, num_ok=lambda s: min(12_000, int(100 * s)) + (s > 594) * 20, **tail)
    assert advise(run, FACTS, WAY) == []
    (text,) = advise(samples(num=120, **tail), FACTS, WAY)  # But if more rows come:
    assert "rows came too slowly" in text


@pytest.fixture
def stormy_run(make_job):
    """A run that had a storm, on a fake engine."""

    def make(**kwargs):
        def build(_):
            return FakeEngine(facts=FACTS)

        run = JobRun(
            make_job(), stop=StopSwitch(), compute=partial(OneEngine, build=build), **kwargs
        )
        # Long before the ten rows that it has now.
        for sample in samples(num_running=160, num_ok=lambda s: int(100 * s) - 10**6, **STORM):
            run._context.log.sample(sample)
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
