"""What is taken from vLLM's inside, on stand-ins of its shape and on strangers."""

import queue
import threading
from types import SimpleNamespace

import pytest

from batchgen.core.records import EngineStats
from batchgen.engine.vllm.engine import SchedulerWatch, wake_when_dead

REPORTED = SimpleNamespace(
    num_running_reqs=3, num_waiting_reqs=4, num_skipped_waiting_reqs=1, kv_cache_usage=0.5
)


def make_engine(events=()):
    output = SimpleNamespace(
        events=[SimpleNamespace(type=kind) for kind in events] or None,
        new_token_ids=[5, 6, 7],
        prefill_stats=SimpleNamespace(num_prompt_tokens=40) if 2 in events else None,
    )
    core = SimpleNamespace(get_output=lambda: SimpleNamespace(outputs=[output]))
    return SimpleNamespace(
        log_stats=True,
        output_processor=SimpleNamespace(log_stats=True),
        logger_manager=object(),
        engine_core=core,
        vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=8192)),
    )


def test_the_front_end_stops_counting_tokens_and_the_watch_takes_the_scheduler():
    engine, watch = make_engine(), SchedulerWatch()
    watch.attach(engine)
    assert (engine.log_stats, engine.output_processor.log_stats) == (False, False)
    engine.logger_manager.record(
        scheduler_stats=REPORTED, iteration_stats=None, mm_cache_stats=None
    )
    engine.logger_manager.log()
    assert watch.stats == EngineStats(3, 5, 0.5, 0, 1, 0, 0, 8192)


def test_preemptions_and_tokens_add_up():
    engine, watch = make_engine(events=[1, 2, 3, 3]), SchedulerWatch()
    watch.attach(engine)
    assert len(engine.engine_core.get_output().outputs) == 1
    engine.engine_core.get_output()
    watch.record(scheduler_stats=REPORTED)
    assert watch.stats == EngineStats(3, 5, 0.5, 4, 1, 80, 6, 8192)


def test_a_token_after_the_first_has_no_prompt():
    engine, watch = make_engine(), SchedulerWatch()
    watch.attach(engine)
    engine.engine_core.get_output()
    watch.record(scheduler_stats=REPORTED)
    assert (watch.stats.num_prompt_tokens, watch.stats.num_generated_tokens) == (0, 3)


def test_a_job_without_statistics_is_left_alone():
    engine, watch = make_engine(), SchedulerWatch()
    engine.logger_manager = None
    get_output = engine.engine_core.get_output
    watch.attach(engine)
    assert engine.log_stats is True
    assert engine.engine_core.get_output is get_output
    assert watch.stats == EngineStats()


def test_steps_without_statistics_keep_the_last():
    watch = SchedulerWatch()
    watch.record(scheduler_stats=None)
    assert watch.stats == EngineStats()


def test_a_dead_core_wakes_the_step_that_waits():
    closed = threading.Event()
    core = SimpleNamespace(
        resources=SimpleNamespace(engine_dead=False), outputs_queue=queue.SimpleQueue()
    )
    wake_when_dead(core, RuntimeError, closed)
    with pytest.raises(queue.Empty):
        core.outputs_queue.get(timeout=0.5)
    core.resources.engine_dead = True
    assert isinstance(core.outputs_queue.get(timeout=2.0), RuntimeError)


@pytest.mark.parametrize(
    "core",
    [
        SimpleNamespace(),
        SimpleNamespace(resources=SimpleNamespace(engine_dead=True)),
        SimpleNamespace(resources=SimpleNamespace(), outputs_queue=None),
    ],
)
def test_a_core_without_a_process_is_not_watched(core):
    before = threading.active_count()
    wake_when_dead(core, RuntimeError, threading.Event())
    assert threading.active_count() == before
