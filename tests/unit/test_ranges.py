"""`Ranges` against Python sets."""

import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.core.records import Ranges, RowSet

numbers = st.sets(st.integers(0, 60))
spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)))


def is_normal(ranges: Ranges) -> bool:
    flat = ranges.to_json()
    return all(a < b for a, b in pairwise(flat))


@given(numbers)
def test_of_holds_exactly_the_numbers(a):
    made = Ranges.of(a)
    assert list(made) == sorted(a)
    assert (len(made), bool(made)) == (len(a), bool(a))
    assert [n for n in range(-1, 62) if n in made] == sorted(a)
    assert is_normal(made)


@given(spans)
def test_spans_in_any_order_and_overlapping_are_merged(a):
    made = Ranges(a)
    assert set(made) == {n for start, stop in a for n in range(start, stop)}
    assert is_normal(made)


@given(numbers, numbers)
def test_set_operations_agree_with_sets(a, b):
    for made, wanted in [
        (Ranges.of(a) | Ranges.of(b), a | b),
        (Ranges.of(a) & Ranges.of(b), a & b),
        (Ranges.of(a) - Ranges.of(b), a - b),
    ]:
        assert set(made) == wanted
        assert is_normal(made)


@given(numbers, st.integers(0, 60), st.integers(0, 60))
def test_the_spans_within_bounds_agree_with_sets(a, start, stop):
    made = Ranges.of(a)
    found = list(made.within(start, stop))
    assert [n for first, end in found for n in range(first, end)] == sorted(
        n for n in a if start <= n < stop
    )
    assert all(first < end for first, end in found)
    # As few as can be: a span is cut at the bounds only.
    assert found == list((made & Ranges([(start, stop)])).spans)


@pytest.mark.parametrize(
    ("start", "stop", "found"),
    [
        (0, 100, [(2, 5), (7, 9)]),
        (2, 9, [(2, 5), (7, 9)]),
        (3, 8, [(3, 5), (7, 8)]),
        (3, 4, [(3, 4)]),
        (5, 7, []),
        (4, 7, [(4, 5)]),
        (0, 2, []),
        (9, 20, []),
        (4, 4, []),
        (8, 3, []),
    ],
)
def test_spans_are_cut_to_the_bounds(start, stop, found):
    assert list(Ranges([(2, 5), (7, 9)]).within(start, stop)) == found
    assert list(Ranges().within(start, stop)) == []


@given(numbers, numbers)
def test_equality_and_hash_agree_with_sets(a, b):
    assert (Ranges.of(a) == Ranges.of(b)) is (a == b)
    assert hash(Ranges.of(a)) == hash(Ranges.of(sorted(a)))
    assert Ranges.of(a) != a


@given(numbers)
def test_json_round_trip(a):
    assert Ranges.from_json(Ranges.of(a).to_json()) == Ranges.of(a)


def test_until_and_repr():
    assert list(Ranges.until(3)) == [0, 1, 2]
    assert repr(Ranges([(5, 7), (0, 2)])) == "Ranges([(0, 2), (5, 7)])"
    assert not Ranges.until(0)


@pytest.mark.parametrize(
    "flat", [None, {}, [1], [2, 1], [1, 1], [0, 2, 2, 4], [-1, 2], [0, 1.0], [False, 1], ["0", "1"]]
)
def test_what_is_not_ranges_is_refused(flat):
    with pytest.raises(ValueError, match="not a list of ranges"):
        Ranges.from_json(flat)


# --- rows of several segments --------------------------------------------------------------------

row_sets = st.sets(st.tuples(st.integers(0, 3), st.integers(0, 9)))


@given(row_sets, row_sets)
def test_row_sets_are_sets_of_ordinals(one, other):
    a, b = RowSet.of(one), RowSet.of(other)

    def ordinals(rows):
        assert all(rows.values())  # No segment without rows.
        assert list(rows) == sorted(rows)
        return {(segment, row) for segment, found in rows.items() for row in found}

    assert (ordinals(a - b), ordinals(a & b), ordinals(a | b)) == (
        one - other,
        one & other,
        one | other,
    )
    assert (a.num_rows, bool(a)) == (len(one), bool(one))
    assert RowSet.of_spans(reversed(list(a.spans()))) == a == pickle.loads(pickle.dumps(a))
    before = dict(a)
    grown = a
    grown |= b
    assert (ordinals(grown), dict(a)) == (one | other, before)
    assert a[7] == Ranges()
    assert 7 not in a
