"""Rows of an earlier plan under the ordinals of a later one."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.core.records import Ranges, RowSet
from batchgen.store.matching import Renumbering, Span
from batchgen.store.result_files import rows_of
from tests.fakes import plan

OK, KEYED, KEYLESS = "ok", "an error with a key", "an error without"
KINDS = [OK, KEYED, KEYLESS]


def table(rows):
    """Of (segment, row, kind); `id` tells where each stood."""
    return pa.table(
        {
            "_batchgen_segment": pa.array([row[0] for row in rows], pa.int32()),
            "_batchgen_row": pa.array([row[1] for row in rows], pa.int64()),
            "id": pa.array([f"{row[0]}/{row[1]}" for row in rows], pa.string()),
            "gen_status": pa.array(
                ["ok" if row[2] == OK else "error" for row in rows], pa.string()
            ),
            "gen_request_key": pa.array(
                [None if row[2] == KEYLESS else "k" for row in rows], pa.string()
            ),
        }
    )


def moved(moves, rows, *, takes_errors=True):
    """Old place -> new place of the rows of a table."""
    found = moves.table(table(rows), "gen_", takes_errors=takes_errors)
    assert found.schema.equals(table([]).schema)
    new = zip(*(found.column(at).to_pylist() for at in (0, 1)), strict=True)
    old = [tuple(map(int, name.split("/"))) for name in found["id"].to_pylist()]
    pairs = dict(zip(old, new, strict=True))
    assert len(pairs) == found.num_rows
    return pairs


def plans(num_segments, order=None):
    """Plans of the same files; the later one has them in another order."""
    old = plan(*[100] * num_segments)
    segments = [old.segments[at] for at in order or range(num_segments)]
    return old, replace(old, number=2, segments=segments)


@st.composite
def scrambled(draw):
    """Spans between files whose parts were moved around, and where each old row is now."""
    num_segments = draw(st.integers(1, 3))
    order = draw(st.permutations(range(num_segments)))
    spans, places = [], {}
    for now, was in enumerate(order):
        pieces = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=5))
        old_starts, row = [], 0
        for gap, length in pieces:
            old_starts.append(row + gap)
            row += gap + length
        start = draw(st.integers(0, 3))
        for at in draw(st.permutations(range(len(pieces)))):
            length = pieces[at][1]
            spans.append(Span(now, start, was, old_starts[at], length))
            places.update(((was, old_starts[at] + n), (now, start + n)) for n in range(length))
            start += length + draw(st.integers(0, 2))
    return draw(st.permutations(spans)), order, places


every_row = [(segment, row) for segment in range(3) for row in range(45)]


@settings(max_examples=80, deadline=None)
@given(scrambled(), st.sets(st.sampled_from(every_row)))
def test_ranges_go_where_their_rows_go(drawn, chosen):
    spans, order, places = drawn
    moves = Renumbering(spans, *plans(len(order), order))
    given_rows = {
        segment: Ranges.of(row for where, row in chosen if where == segment) for segment in range(3)
    }
    found = moves.ranges(given_rows)
    assert {(segment, row) for segment, rows in found.items() for row in rows} == {
        places[row] for row in chosen & places.keys()
    }
    assert all(found.values())
    assert {(segment, row) for segment, rows in moves.old_rows.items() for row in rows} == (
        places.keys()
    )


@settings(max_examples=80, deadline=None)
@given(scrambled(), st.dictionaries(st.sampled_from(every_row), st.sampled_from(KINDS)), st.data())
def test_tables_go_where_their_rows_go(drawn, kinds, data):
    spans, order, places = drawn
    moves = Renumbering(spans, *plans(len(order), order))
    rows = [(*row, kinds[row]) for row in sorted(kinds) if row[0] < len(order)]
    takes_errors = data.draw(st.booleans())

    def is_wanted(row):
        if kinds[row] != KEYLESS:
            return kinds[row] == OK or takes_errors
        # Path and line of the text still hold where neither the file's row nor its name is new.
        return takes_errors and order[places[row][0]] == row[0] and places[row][1] == row[1]

    assert moved(moves, rows, takes_errors=takes_errors) == {
        row[:2]: places[row[:2]] for row in rows if row[:2] in places and is_wanted(row[:2])
    }


@pytest.mark.parametrize(
    ("span", "path", "is_taken"),
    [
        (Span(0, 0, 0, 0, 9), "/in/0.jsonl", True),
        (Span(0, 1, 0, 0, 9), "/in/0.jsonl", False),
        (Span(0, 0, 0, 0, 9), "/in/renamed.jsonl", False),
        (Span(1, 0, 0, 0, 9), "/in/0.jsonl", True),  # Another file came before it.
    ],
)
def test_an_error_that_names_file_and_line_is_taken_only_where_both_hold(span, path, is_taken):
    old, new = plan(9), plan(9, 9)
    new.segments[span.segment] = replace(new.segments[span.segment], path=path)
    if span.segment == 1:
        new.segments[0] = replace(new.segments[0], path="/in/before.jsonl")
    moves = Renumbering([span], old, new)
    rows = [(0, 2, KEYLESS), (0, 3, KEYED), (0, 4, OK)]
    wanted = {(0, row): (span.segment, span.start + row) for row in (2, 3, 4)}
    if not is_taken:
        del wanted[(0, 2)]
    assert moved(moves, rows) == wanted
    assert moved(moves, rows, takes_errors=False) == {(0, 4): (span.segment, span.start + 4)}


def test_without_spans_nothing_moves():
    moves = Renumbering([], *plans(1))
    assert moved(moves, [(0, 0, OK)]) == {}
    assert moves.ranges(RowSet({0: Ranges.until(5)})) == {}
    assert moves.old_rows == {}


def test_of_a_table_without_rows_nothing_moves():
    assert moved(Renumbering([Span(0, 0, 0, 0, 9)], *plans(1)), []) == {}


def test_what_is_in_no_span_stays_behind():
    moves = Renumbering([Span(0, 5, 0, 2, 3)], *plans(2))
    rows = [(0, row, OK) for row in range(9)] + [(1, 3, OK)]
    assert moved(moves, rows) == {(0, 2): (0, 5), (0, 3): (0, 6), (0, 4): (0, 7)}


@given(st.sets(st.sampled_from(every_row)), st.randoms())
def test_the_rows_of_a_table_are_told_in_any_order(chosen, random):
    rows = [(*row, OK) for row in chosen]
    random.shuffle(rows)
    found = rows_of(table(rows))
    assert {(segment, row) for segment, numbers in found.items() for row in numbers} == chosen
    assert all(found.values())
