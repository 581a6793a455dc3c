"""The search for the request that kills engines: pure, so by property."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.engine.base import HostedRequest
from batchgen.engine.death import MAX_PIECES, SOLO_DEATHS, SuspectSearch, split

MANY = st.integers(1, 400)


def requests(num):
    return [HostedRequest(number, f"row {number}", None) for number in range(num)]


def ids(group):
    return [request.request_id for request in group]


def investigate(num, kills):
    """Search with an engine that dies with any culprit in a group before anything finishes."""
    search, blamed, groups = SuspectSearch(), [], []
    assert search.note_death(requests(num)) is None
    while group := search.next_group():
        groups.append(ids(group))
        if kills & set(ids(group)):
            culprit = search.note_death(group)
            if culprit is not None:
                blamed.append(culprit.request_id)
    assert not search.is_on
    return blamed, groups


@given(MANY)
def test_pieces_are_even_in_order_and_none_is_empty(num):
    pieces = split(requests(num))
    assert list(itertools.chain(*map(ids, pieces))) == list(range(num))
    assert len(pieces) == min(MAX_PIECES, num)
    sizes = {len(piece) for piece in pieces}
    assert max(sizes) - min(sizes) <= 1


@given(MANY.flatmap(lambda num: st.tuples(st.just(num), st.sets(st.integers(0, num - 1)))))
def test_exactly_the_culprits_are_blamed_and_each_died_alone_twice(case):
    num, kills = case
    blamed, groups = investigate(num, kills)
    assert sorted(blamed) == sorted(kills)
    for request_id in range(num):
        alone = groups.count([request_id])
        assert alone >= SOLO_DEATHS if request_id in kills else alone <= 1 or num == 1


@given(st.integers(1, 5000), st.data())
def test_one_culprit_is_found_in_few_deaths(num, data):
    culprit = data.draw(st.integers(0, num - 1))
    _, groups = investigate(num, {culprit})
    assert sum(culprit in group for group in groups) <= 7


def test_after_a_first_death_all_go_in_again_at_once():
    search = SuspectSearch()
    search.note_death(requests(100))
    assert ids(search.next_group()) == list(range(100))
    assert search.num_waiting == 0


def test_what_came_back_is_cleared():
    search = SuspectSearch()
    search.note_death(requests(100))
    group = search.next_group()
    search.note_death(group[90:])
    assert search.num_waiting == 10


def test_the_last_one_of_a_group_did_not_die_alone():
    search = SuspectSearch()
    search.note_death(requests(2))
    group = search.next_group()
    assert search.note_death(group[1:]) is None
    assert search.note_death(search.next_group()) is None
    assert search.note_death(search.next_group()) is not None


def test_one_that_never_got_in_is_no_more_suspected_than_before():
    search = SuspectSearch()
    search.note_death(requests(1))
    for _ in range(5):
        assert len(search.next_group()) == 1
        search.put_back()
        assert search.note_death([]) is None
    assert search.num_waiting == 1


def test_a_death_with_nothing_inside_accuses_no_one():
    search = SuspectSearch()
    assert search.note_death([]) is None
    assert not search.is_on


def test_after_a_conviction_the_farthest_request_is_the_witness():
    search = SuspectSearch()
    search.note_death(requests(64))
    groups = []
    while not groups or groups[-1] != [63]:
        groups.append(ids(search.next_group()))
        if 0 in groups[-1]:
            search.note_death(search._inside.requests)
    assert groups[:6] == [list(range(64)), list(range(8)), [0], [0], [63]][:6]
    assert ids(search.next_group()) == [1]  # The witness came back: on with the search.


@pytest.mark.parametrize("num", [1, 2, 7, 8, 9, 100])
def test_an_engine_that_always_dies_convicts_a_witness_next(num):
    blamed, _ = investigate(num, set(range(num)))
    assert blamed[0] == 0
    assert blamed[1:2] == ([num - 1] if num > 1 else [])
