"""Requests that are known: which of equal rows runs, and which wait for its answer."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.core.records import Ordinal, Request
from batchgen.store.keys import KeySet, prefix_of, prefixes_of
from batchgen.store.reuse import Deduper
from tests.fakes import batch

MERGE_KEYS = 2**18


def key(first, second=0):
    """A request key by its two halves."""
    return f"{first:016x}{second:016x}"


def requests(*keys, seed=None):
    return [
        Request(at, Ordinal(0, at), "prompt", request_key, seed, batch([at]), 0)
        for at, request_key in enumerate(keys)
    ]


def known(*prefixes):
    keys = KeySet()
    keys.load(pl.Series(prefixes, dtype=pl.UInt64))
    return keys


def passing(deduper, given_requests):
    return [request.request_id for request in deduper.passing(given_requests)]


@pytest.mark.parametrize("first", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_prefix_is_the_first_64_bits_of_a_key(first):
    assert prefix_of(key(first, 7)) == first
    assert prefixes_of(pl.Series([key(first, 7), None])).to_list() == [first, None]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(2**64 - 6, 2**64 - 1) | st.integers(0, 9), max_size=8)),
    st.data(),
)
def test_known_keys_are_a_set(loads, data):
    keys, true = KeySet(), set()
    everything = [*range(10), *range(2**64 - 6, 2**64)]
    for numbers in loads:
        if data.draw(st.booleans()):
            keys.load(pl.Series(numbers, dtype=pl.UInt64))
            true |= set(numbers)
        for number in numbers:
            if number not in true:
                assert keys.add(number)
                true.add(number)
        assert keys.know(everything) == [number in true for number in everything]


def test_nothing_is_known_at_first_and_nothing_may_be_asked():
    assert KeySet().know([0, 1]) == [False, False]
    assert KeySet().know([]) == known(1).know([]) == []
    assert len(KeySet()) == 0


def test_a_key_that_was_added_since_it_was_asked_for_is_not_added_again():
    keys = known(1)
    assert keys.add(5)
    assert not keys.add(5)
    assert keys.know([1, 5, 6]) == [True, True, False]


def test_many_keys_are_merged_and_stay_known():
    keys = known(2**40, 2**41)
    for number in range(MERGE_KEYS + 3):
        assert keys.add(number)
    assert len(keys) == MERGE_KEYS + 5
    asked = [0, MERGE_KEYS - 1, MERGE_KEYS, MERGE_KEYS + 2, MERGE_KEYS + 3, 2**40, 2**41, 2**42]
    assert keys.know(asked) == [True, True, True, True, False, True, True, False]
    assert len(keys) == MERGE_KEYS + 5  # Merged, and not kept twice.


def test_millions_of_keys_are_loaded_piece_by_piece():
    """More than one sorted run, and runs that are not full."""
    keys = KeySet()
    numbers = pl.int_range(0, 3 * 2**20, 3, dtype=pl.UInt64, eager=True).reverse()
    for piece in (numbers[:10], numbers[10:10], numbers[10 : 2**19], numbers[2**19 :]):
        keys.load(piece)
    later = pl.Series([5, 2**63, 4], dtype=pl.UInt64)
    for piece in (later, numbers[:3], later[:0]):
        keys.load(piece)
    last = 3 * (2**20 - 1)
    asked = [0, 1, 2, 3, 4, 5, 6, last - 3, last - 1, last, last + 1, 2**63, 2**63 + 1]
    right = {*numbers, *later}
    assert keys.know(asked) == [number in right for number in asked]
    assert keys.add(1)
    assert keys.know([1, 2]) == [True, False]


def test_a_merge_in_the_middle_of_a_batch_forgets_nothing():
    keys = KeySet()
    for number in range(MERGE_KEYS - 1):
        keys.add(number)
    deduper = Deduper(KeySet(), keys, "auto")
    last = key(2**50)  # The one at which they are merged.
    assert passing(deduper, requests(last, last, last)) == [0]
    assert deduper.num_set_aside == 2


@pytest.mark.parametrize(
    ("dedupe", "seed", "passed"),
    [
        ("auto", None, [0, 1, 3]),
        ("auto", 7, [0, 1, 2, 3, 4]),
        ("always", None, [0, 1, 3]),
        ("always", 7, [0, 1, 3]),
        ("never", None, [0, 1, 2, 3, 4]),
        ("never", 7, [0, 1, 2, 3, 4]),
    ],
)
def test_the_first_of_equal_requests_passes_where_they_may_share_an_answer(dedupe, seed, passed):
    deduper = Deduper(KeySet(), KeySet(), dedupe)
    given_requests = requests(key(1), key(2), key(1), key(3), key(2), seed=seed)
    assert passing(deduper, given_requests) == passed
    assert deduper.num_set_aside == 5 - len(passed)


def test_equal_requests_of_later_batches_wait_too():
    deduper = Deduper(KeySet(), KeySet(), "auto")
    assert passing(deduper, requests(key(1), key(2))) == [0, 1]
    assert passing(deduper, requests(key(2), key(3), key(1))) == [1]
    assert deduper.num_set_aside == 2


@pytest.mark.parametrize("dedupe", ["auto", "always", "never"])
@pytest.mark.parametrize("seed", [None, 7])
def test_what_an_earlier_plan_has_answered_waits_however_rows_of_the_job_are_treated(dedupe, seed):
    """Its answer to the very same request is the row's own."""
    deduper = Deduper(known(1, 3), KeySet(), dedupe)
    assert passing(deduper, requests(key(1), key(2), key(3), seed=seed)) == [1]
    assert deduper.num_set_aside == 2


RANDOM = [("auto", 7), ("never", 7)]
SHARED = [("auto", None), ("always", None), ("always", 7)]


@pytest.mark.parametrize(("dedupe", "seed"), RANDOM)
def test_where_each_row_has_its_own_draw_an_earlier_answer_is_for_one_row(dedupe, seed):
    deduper = Deduper(known(1), KeySet(), dedupe)
    assert passing(deduper, requests(key(1), key(1), key(2), key(1), seed=seed)) == [1, 2, 3]
    assert passing(deduper, requests(key(1), seed=seed)) == [0]
    assert deduper.num_set_aside == 1


@pytest.mark.parametrize(("dedupe", "seed"), RANDOM)
def test_where_each_row_has_its_own_draw_an_answer_that_was_used_is_not_used_again(dedupe, seed):
    """A run that goes on does not give a second row what its plan has given the first."""
    deduper = Deduper(known(1, 2), known(1), dedupe)
    assert passing(deduper, requests(key(1), key(2), seed=seed)) == [0]


def test_a_greedy_row_that_shares_with_no_row_of_the_job_still_has_an_earlier_plans_answer():
    """It would be the same again."""
    deduper = Deduper(known(1), known(2), "never")
    assert passing(deduper, requests(key(1), key(2), key(1), key(3), key(3))) == [1, 3, 4]


@pytest.mark.parametrize(("dedupe", "seed"), SHARED)
def test_where_rows_share_answers_every_one_that_is_known_is_used(dedupe, seed):
    deduper = Deduper(known(1), known(2), dedupe)
    given_requests = requests(key(1), key(2), key(1), key(2), key(3), key(3), seed=seed)
    assert passing(deduper, given_requests) == [4]
    assert deduper.num_set_aside == 5


def test_requests_with_and_without_a_seed_are_told_apart_row_by_row():
    """A row may bring its own temperature."""
    deduper = Deduper(KeySet(), KeySet(), "auto")
    random = requests(key(1), key(1), seed=7)
    greedy = requests(key(2), key(2))
    assert len(deduper.passing([*random, *greedy])) == 3


def test_two_requests_that_share_64_bits_are_told_apart_later():
    """Until then the second waits; see test_answered."""
    deduper = Deduper(KeySet(), KeySet(), "auto")
    assert passing(deduper, requests(key(1, 1), key(1, 2))) == [0]
    assert deduper.num_set_aside == 1


def test_no_requests_pass_as_none():
    for keys in (KeySet(), known(1)):
        assert Deduper(keys, keys, "auto").passing([]) == []
