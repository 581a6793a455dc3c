"""How many rows each worker gets: rules one by one, then whole fleets on paper."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.cluster.pacing import (
    HORIZON_S,
    LEAST_S,
    MAX_LEASE_ROWS,
    RATE_WINDOW_S,
    REFILL,
    STARTING_S,
    Meter,
    Pace,
    outlook,
    rows_for,
)
from tests.bench import fleet_sim

RATES = st.just(0.0) | st.floats(0.01, 5000)
WORKERS = st.lists(
    st.builds(
        lambda backlog, capacity, rate, is_up, share: Pace(
            backlog, capacity, rate * is_up, is_up, math.ceil(capacity * share)
        ),
        st.integers(0, 90_000),
        st.integers(1, 4096),
        RATES,
        st.booleans(),
        st.floats(0.01, 1),
    ),
    min_size=1,
    max_size=6,
)
PLENTY = 10**9


def pace(backlog, capacity, rate, *, is_up, num_slots=None):
    return Pace(backlog, capacity, rate, is_up, capacity if num_slots is None else num_slots)


BUSY = pace(10_000, 100, 10.0, is_up=True)


def given_rows(worker, others=(), num_pending=PLENTY):
    return rows_for(worker, outlook([worker, *others], num_pending))


@given(st.integers(0, 9000), st.integers(1, 4096), st.floats(0.01, 3000))
def test_while_rows_are_plenty_a_worker_has_its_fill_and_some_seconds_more(backlog, fill, rate):
    num = given_rows(pace(backlog, fill, rate, is_up=True))
    assert backlog + num >= fill + HORIZON_S * rate
    assert num == 0 or num >= int(HORIZON_S * rate * REFILL)  # Messages are not for nothing.
    assert (num == 0) is (backlog >= fill + HORIZON_S * rate)


@given(WORKERS, st.integers(0, 10**6))
def test_nobody_gets_more_than_its_share_of_what_is_left(workers, num_pending):
    fleet = outlook(workers, num_pending)
    for worker in workers:
        num = rows_for(worker, fleet)
        assert 0 <= num <= MAX_LEASE_ROWS
        held = worker.backlog + num
        speed = worker.rate or fleet.mean_rate
        if num > 1 and speed:
            assert held <= math.ceil(speed * fleet.left_s)
        if num > 1 and not worker.rate:
            assert held <= worker.capacity * (1 + worker.is_up)


@given(WORKERS, st.integers(1, 10**6))
def test_nobody_who_works_goes_without_while_rows_are_free(workers, num_pending):
    fleet = outlook(workers, num_pending)
    assert all(rows_for(w, fleet) for w in workers if w.is_up and not w.backlog)
    assert not any(
        rows_for(w._replace(backlog=0), outlook([w._replace(backlog=0)], 0)) for w in workers
    )


def test_one_that_has_run_out_gets_a_row_even_if_it_is_slow_or_of_unknown_capacity():
    assert given_rows(pace(0, 0, 0.0, is_up=True), [], 1) == 1
    assert given_rows(pace(0, 0, 0.0, is_up=True), [BUSY], 1) == 1
    assert given_rows(pace(0, 0, 0.0, is_up=False), [BUSY], 1) == 0


def test_huge_rates_do_not_make_huge_leases():
    assert given_rows(pace(0, 100, 90_000.0, is_up=True)) == MAX_LEASE_ROWS
    assert given_rows(pace(90_000, 100, 90_000.0, is_up=True)) == MAX_LEASE_ROWS


def test_the_fast_get_more_of_the_rest_than_the_slow():
    slow, fast = pace(0, 10, 1.0, is_up=True), pace(0, 10, 4.0, is_up=True)
    assert [given_rows(slow, [fast], 50), given_rows(fast, [slow], 50)] == [10, 22]
    assert [given_rows(slow, [fast], 20), given_rows(fast, [slow], 20)] == [4, 16]


def test_seconds_ahead_shrink_towards_the_end_but_not_to_nothing():
    worker = pace(100, 100, 10.0, is_up=True)
    nums = [given_rows(worker, [BUSY._replace(backlog=0)], num) for num in (10**5, 900, 600, 250)]
    assert nums == sorted(nums, reverse=True)
    assert nums[0] == math.ceil(HORIZON_S * 10 * (1 + REFILL))
    assert nums[-1] == math.ceil(LEAST_S * 10 * (1 + REFILL))


def test_before_any_rate_is_known_all_get_the_same_and_no_more_than_they_hold():
    new = pace(0, 100, 0.0, is_up=False)
    assert given_rows(new, [new, new], 10**5) == 100
    assert given_rows(new, [new, new], 31) == 6
    up = new._replace(is_up=True)
    assert given_rows(up, [up, up], 31) == 11
    assert given_rows(up._replace(backlog=11), [up, up], 20) == 0
    assert given_rows(new._replace(is_up=True, backlog=30), [new, new], 10**5) == 170


def test_who_is_heard_of_first_leaves_the_others_their_share():
    new = pace(0, 3000, 0.0, is_up=True)
    early = rows_for(new, outlook([new], 4000, 2))
    assert early == 2000
    early = new._replace(backlog=early)
    assert rows_for(early, outlook([early], 2000, 2)) == 0
    assert rows_for(new, outlook([early, new], 2000, 2)) == 2000
    assert rows_for(new, outlook([new], 2500, 1)) == 2500


def test_half_of_a_small_job_waits_until_speeds_are_known():
    new = pace(0, 3000, 0.0, is_up=True, num_slots=1000)
    assert given_rows(new, [new], 5000) == 1250
    assert given_rows(new, [new], 1800) == 900  # All of them run at once.
    assert given_rows(new, [new], PLENTY) == 6000
    assert given_rows(new._replace(backlog=1000), [new._replace(backlog=1250)], 2500) == 0
    assert given_rows(new._replace(backlog=600), [new._replace(backlog=1250)], 2500) == 488


def test_at_the_end_an_engine_has_what_it_works_on_and_two_seconds_more():
    holds = pace(0, 3000, 90.0, is_up=True, num_slots=1000)
    other = holds._replace(backlog=1500)
    most = 1000 + LEAST_S * 90 * (1 + REFILL)
    assert given_rows(holds, [other], 1500) == most
    assert given_rows(holds._replace(backlog=1250), [other], 1000) == 0
    assert given_rows(holds, [other._replace(backlog=0)], 800) == 400
    assert given_rows(holds, [other], PLENTY) == 3000 + HORIZON_S * 90 * (1 + REFILL)


def test_who_is_not_up_gets_rows_only_if_it_will_be_in_time():
    new = pace(0, 100, 0.0, is_up=False)
    others = [BUSY, BUSY]
    num_left = int(20 * STARTING_S) - 20_000
    assert given_rows(new, others, num_left + 1) == 100
    assert given_rows(new, others, num_left - 1) == 0
    assert given_rows(new._replace(is_up=True), others, num_left - 1) == 100


def test_who_is_of_unknown_speed_gets_no_more_than_who_is_known():
    known = pace(1250, 3000, 100.0, is_up=True, num_slots=1000)
    new = pace(1250, 3000, 0.0, is_up=False, num_slots=1000)
    assert given_rows(known, [new], 2500) > 0
    assert given_rows(new, [known], 2500) == 0
    assert given_rows(new._replace(is_up=True), [known], 2500) == 0
    assert given_rows(new._replace(backlog=0), [known], 40_000) == 1000
    assert given_rows(new._replace(backlog=0, is_up=True), [known], 2500) == 1200


def test_who_waits_for_an_engine_is_told_to_hold_up_those_who_have_run_out():
    new, idle = pace(5, 100, 0.0, is_up=False), BUSY._replace(backlog=0)
    assert outlook([new, idle], 0).is_held_up
    assert outlook([new, idle._replace(rate=0.0)], 0).is_held_up
    assert not outlook([new, idle], 1).is_held_up
    assert not outlook([new, idle, BUSY], 0).is_held_up
    assert not outlook([new._replace(backlog=0), idle], 0).is_held_up
    assert not outlook([new, new], 0).is_held_up
    assert not outlook([], 0).is_held_up


def test_a_meter_knows_the_last_half_minute():
    meter = Meter()
    for now_s in range(100):  # Two minutes of start.
        meter.note(now_s, 0)
        assert meter.rate == 0
    meter.note(100, 7)
    meter.note(101, 14)
    assert meter.rate == pytest.approx(7)  # Not less for the time before.
    for now_s in range(102, 200):
        meter.note(now_s, 14 + 21 * (now_s - 101))
    assert meter.rate == pytest.approx(21)
    meter.note(200, 14 + 21 * 98)
    assert meter.rate == pytest.approx(21 * 29 / 30)
    for now_s in range(201, 201 + int(RATE_WINDOW_S)):
        meter.note(now_s, 14 + 21 * 98 + 20 * (now_s - 200))
    assert meter.rate == pytest.approx(20)


def test_what_ended_before_the_first_row_of_an_engine_does_not_make_it_slow():
    meter = Meter()
    for now_s in range(20):  # Eight rows needed no engine; it is up, and its first rows take long.
        meter.note(now_s, 8)
        assert meter.rate == 0
    meter.note(20, 58)
    assert meter.rate == pytest.approx(50)


def test_a_meter_is_known_soon_and_does_not_grow():
    meter = Meter()
    meter.note(0.0, 0)
    meter.note(0.5, 100)
    meter.note(1.0, 250)
    assert meter.rate == pytest.approx(250)
    for at in range(10_000):
        meter.note(1 + at / 100, 250 + at)
    assert len(pickle.dumps(meter)) < 2000  # 10,000 looks would be 180,000.
    assert meter.rate == pytest.approx(100, rel=0.05)


KIND = replace(fleet_sim.SLOW, capacity=32, rate=8.0, sigma=0.3, startup_s=30)


@pytest.mark.parametrize("kind_of", [fleet_sim.even(KIND), fleet_sim.mixed(KIND)])
def test_no_engine_waits_and_all_end_together(kind_of):
    told = fleet_sim.simulate(kind_of, 8, 20_000)
    assert told["idle_%"] < 0.3
    assert told["to_bound"] < 1.03


@pytest.mark.parametrize("late_s", [20, 60])
def test_engines_that_come_up_one_after_the_other_end_together(late_s):
    kind = replace(fleet_sim.SLOW, sigma=0.3, startup_s=60, holds=1536)
    told = fleet_sim.simulate(
        lambda number: replace(kind, startup_s=60 + late_s * (number % 2)), 2, 5000
    )
    assert told["to_bound"] < 1.05


def test_a_fleet_that_loses_workers_all_the_time_gets_on_and_blames_no_row():
    told = fleet_sim.simulate(fleet_sim.even(KIND), 4, 8_000, life_s=60)
    assert told["deaths"] > 20
    assert told["guilty"] == 0
    assert told["to_bound"] < 5


def test_rows_that_kill_are_found_while_the_others_go_on():
    told = fleet_sim.simulate(
        fleet_sim.even(KIND), 8, 20_000, killers=frozenset({3000, 3001, 15_000})
    )
    assert told["guilty"] == 3
    assert told["deaths"] <= 22
    assert told["to_bound"] < 2


@pytest.mark.parametrize("num_rows", [10_000, 20_000])
def test_engines_that_live_as_long_as_they_take_to_start_get_through_and_no_row_is_blamed(
    num_rows: int,
) -> None:
    told = fleet_sim.simulate(fleet_sim.even(fleet_sim.SLOW), 8, num_rows, life_s=120)
    assert told["guilty"] == 0
    assert told["deaths"] < 150  # With suspects of any two deaths 450 and more: most go alone.
