"""From looks at a run to its speed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchgen.core.records import EngineFacts, EngineStats
from batchgen.pipeline.context import Moment
from batchgen.tuning.trial import PROMPT_WEIGHT, Times, add_moment, is_enough, measure, steady

FACTS = EngineFacts("vllm", "0.26.0", "H100", 8192, 100, 60.0)
TIMES = Times()


def moment(at_s, running=100, **changes):
    """A look at a steady engine: 1,000 tokens/s out, 2,000 in, 10 rows/s."""
    engine = EngineStats(
        num_running=running,
        num_waiting=100,
        kv_cache_usage=0.5,
        num_preemptions=0,
        num_steps=int(40 * at_s),
        num_prompt_tokens=int(2000 * at_s),
        num_generated_tokens=int(1000 * at_s),
        max_num_batched_tokens=8192,
    )
    own = {name: changes.pop(name) for name in [*changes] if hasattr(engine, name)}
    look = Moment(
        at_s=at_s,
        facts=FACTS,
        engine=replace(engine, **own),
        num_in_flight=1200,
        num_ended=int(10 * at_s),
        prompt_tokens=int(1900 * at_s),
        cached_tokens=int(950 * at_s),
        output_tokens=int(900 * at_s),
    )
    return replace(look, **changes)


def run(until_s, **changes):
    return [moment(at / 2, **changes) for at in range(2 * until_s + 1)]


def test_a_steady_run_is_measured_by_the_engines_own_counters():
    found = measure(steady(run(60), TIMES))
    assert found.output_tokens_per_s == pytest.approx(1000)
    assert found.prompt_tokens_per_s == pytest.approx(2000)
    assert found.rows_per_s == pytest.approx(10)
    assert found.speed == pytest.approx(1000 + 2000 * PROMPT_WEIGHT)
    assert found.cached_share == pytest.approx(0.5)
    assert found.tokens_per_step == pytest.approx((1000 + 2000 * 0.5) / 40)
    assert found.error < 0.001
    # Full at once; 100 rows have ended after 10 s, which is when rows of all ages run.
    assert found.seconds == pytest.approx(50)


def test_filling_and_draining_do_not_count():
    def looks(at_s):
        if at_s < 10:
            return moment(at_s, running=int(10 * at_s), num_generated_tokens=int(10 * at_s))
        if at_s < 60:
            return moment(at_s, num_generated_tokens=int(100 + 1000 * (at_s - 10)))
        return moment(at_s, running=20, num_generated_tokens=50_100 + int(10 * (at_s - 60)))

    found = measure(steady([looks(at / 2) for at in range(160)], TIMES))
    assert found.output_tokens_per_s == pytest.approx(1000)
    assert found.seconds == pytest.approx(60 - 0.5 - 9.5 - 10)


def test_rows_that_take_longer_than_a_trial_do_not_hold_it_up():
    found = measure(steady(run(60, num_ended=0), TIMES))
    assert found.seconds == pytest.approx(60 - TIMES.settle_most_s)
    assert found.rows_per_s == 0


def test_an_engine_that_never_fills_is_measured_all_the_same():
    looks = [moment(at / 2, running=5 + at // 4) for at in range(160)]
    assert measure(steady(looks, TIMES)).seconds > 30


def test_without_counters_finished_rows_count():
    unknown = {"num_prompt_tokens": None, "num_generated_tokens": None}
    found = measure(steady(run(60, **unknown), TIMES))
    assert found.output_tokens_per_s == pytest.approx(900)
    assert found.prompt_tokens_per_s == pytest.approx(1900)


def test_preemptions_lower_the_score_and_not_the_speed():
    def looks(per_row):
        return [
            replace(m, engine=replace(m.engine, num_preemptions=int(per_row * m.num_ended)))
            for m in run(60)
        ]

    calm, some, many = (measure(steady(looks(share), TIMES)) for share in (0, 0.04, 3))
    assert calm.speed == some.speed == many.speed
    assert some.score == pytest.approx(0.96 * calm.score, rel=0.002)
    assert many.score == pytest.approx(0.9 * calm.score)
    assert many.num_preemptions == pytest.approx(1500)


@pytest.mark.parametrize(
    ("changes", "is_full"),
    [
        ({}, True),
        ({"num_waiting": 0}, False),
        # Short answers: many of those that ran have just ended.
        ({"num_running": 60}, True),
        ({"num_running": 60, "kv_cache_usage": 0.97}, False),
        ({"num_running": 60, "max_num_batched_tokens": 64}, False),
        ({"num_running": 98, "kv_cache_usage": 0.97}, True),
    ],
)
def test_full_is_who_is_held_back_by_nothing_else(changes, is_full):
    assert measure(steady(run(60, **changes), TIMES)).is_full is is_full


def test_only_news_of_an_engine_at_work_is_kept():
    moments = []
    for look in (
        moment(1, facts=None),
        moment(2, num_in_flight=0),
        moment(3),
        replace(moment(3), at_s=3.1),
        moment(4),
    ):
        add_moment(moments, look)
    assert [look.at_s for look in moments] == [3, 4]


def test_enough_is_a_small_error_or_a_long_look_or_a_hopeless_case():
    found = measure(steady(run(60), TIMES))
    noisy = replace(found, error=0.03)
    assert is_enough(replace(found, seconds=15), TIMES)
    assert not is_enough(replace(found, seconds=14), TIMES)
    assert not is_enough(noisy, TIMES)
    assert is_enough(replace(noisy, seconds=60), TIMES)
    assert is_enough(noisy, TIMES, best_speed=1.3 * found.speed)
    assert not is_enough(noisy, TIMES, best_speed=1.15 * found.speed)
    assert not is_enough(None, TIMES)


def test_the_error_is_that_of_the_mean():
    looks = [
        moment(
            at, num_prompt_tokens=0, num_generated_tokens=1000 * at + (200 if at % 10 < 5 else 0)
        )
        for at in range(101)
    ]
    assert 0.001 < measure(steady(looks, TIMES)).error < 0.02
    assert measure(steady(looks[:13], TIMES)).error == 1.0  # Too few to tell.


def test_nothing_done_is_nothing_measured():
    assert steady([], TIMES) == ()
    assert measure(steady(run(4), TIMES)) is None
    idle = [replace(m, engine=replace(m.engine, num_prompt_tokens=0, num_generated_tokens=0),
                    prompt_tokens=0, output_tokens=0) for m in run(60)]  # fmt: skip
    assert measure(steady(idle, TIMES)) is None


def test_of_several_engines_each_is_compared_with_what_it_may_run():
    facts = replace(FACTS, settings={"engines_per_gpu": 2})
    found = measure(steady(run(60, running=200, num_waiting=300, facts=facts), TIMES))
    assert (found.num_running, found.num_waiting, found.max_num_seqs) == (100, 150, 100)
    assert found.output_tokens_per_s == pytest.approx(1000)
