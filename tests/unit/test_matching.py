"""Which rows of a file are rows of its earlier version: never a wrong one, and none twice."""

from __future__ import annotations

import base64
import hashlib
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.core.records import Ranges, RowSet
from batchgen.source.text import DIGEST_BYTES, NO_DIGEST
from batchgen.storage import LocalStorage
from batchgen.store import matching
from batchgen.store.books import Durable, Part, PartFooter, Segment
from batchgen.store.matching import (
    DigestFile,
    Span,
    answered_by,
    digests_of,
    is_same_reading,
    match,
    restricted,
)
from tests.fakes import plan
from tests.harm import overwrite

LONG = None
"""A line that is too long to be kept: it has no digest."""
lines_of = st.lists(st.sampled_from(["a", "b", "c", "d", LONG]), max_size=25)


def digest_of(line):
    return NO_DIGEST if line is LONG else hashlib.sha256(line.encode()).digest()[:DIGEST_BYTES]


def content_of(lines):
    return hashlib.sha256(repr(list(lines)).encode()).hexdigest()


def scanned(storage, path, lines):
    """A file's segment; its digests are in the output."""
    digest = content_of(lines)
    file = DigestFile(storage)
    file.add(b"".join(map(digest_of, lines)))
    file.commit(digest)
    return Segment(path, 1, "1", digest, len(lines))


def plans(storage, olds, news):
    """Two plans of files: path -> lines."""
    return tuple(
        replace(
            plan(number=number),
            segments=[scanned(storage, path, lines) for path, lines in files.items()],
        )
        for number, files in ((1, olds), (2, news))
    )


def found(storage, olds, news):
    """Match, checked: spans of equal lines, no row twice."""
    spans = match(storage, *plans(storage, olds, news))
    old_files, new_files = list(olds.values()), list(news.values())
    pairs = [pair for span in spans for pair in pairs_of(span)]
    for (segment, row), (old_segment, old_row) in pairs:
        now, was = new_files[segment], old_files[old_segment]
        assert now[row] == was[old_row]
        assert now[row] is not LONG or now == was
    for side in zip(*pairs, strict=True):
        assert len(set(side)) == len(side)
    return spans


def pairs_of(span):
    return [
        ((span.segment, span.start + at), (span.old_segment, span.old_start + at))
        for at in range(span.length)
    ]


def found_in_one(storage, old, new):
    return found(storage, {"/in": old}, {"/in": new})


def num_rows(spans):
    return sum(span.length for span in spans)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(matching, "_BLOCK_ROWS", 4)
    monkeypatch.setattr(matching, "_AHEAD_ROWS", 6)


def new_storage(tmp_path_factory):
    return LocalStorage(tmp_path_factory.mktemp("out"))


@settings(max_examples=60, deadline=None)
@given(lines_of, lines_of)
def test_in_one_block_every_line_that_is_in_both_is_found(tmp_path_factory, old, new):
    spans = found_in_one(new_storage(tmp_path_factory), old, new)
    if old == new:
        assert num_rows(spans) == len(old)
    else:
        both = Counter(old) & Counter(new)
        assert num_rows(spans) == both.total() - both[LONG]


@settings(max_examples=60, deadline=None)
@given(lines_of, lines_of, st.integers(1, 7), st.integers(0, 9))
def test_over_many_blocks_no_line_is_taken_for_another(tmp_path_factory, old, new, block, ahead):
    storage = new_storage(tmp_path_factory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_BLOCK_ROWS", block)
        patch.setattr(matching, "_AHEAD_ROWS", ahead)
        found_in_one(storage, old, new)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 60), st.integers(1, 7), st.integers(0, 12), st.data())
def test_whatever_moved_no_further_than_ahead_is_found(tmp_path_factory, size, block, ahead, data):
    """Lines come and go, all in all no more than `ahead`; each is unlike every other."""
    storage = new_storage(tmp_path_factory)
    old = [f"line {number}" for number in range(size)]
    new, left = list(old), ahead
    while left and data.draw(st.booleans()):
        num = data.draw(st.integers(1, left))
        at = data.draw(st.integers(0, len(new)))
        if data.draw(st.booleans()):
            new[at:at] = [f"new {left}.{number}" for number in range(num)]
        else:
            del new[at : at + num]
        left -= num
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_BLOCK_ROWS", block)
        patch.setattr(matching, "_AHEAD_ROWS", ahead)
        assert num_rows(found_in_one(storage, old, new)) == len(set(old) & set(new))


def test_an_unchanged_file_is_one_span_and_needs_no_digests(storage):
    lines = ["a", LONG, "a", "b"]
    olds, news = plans(storage, {"/in": lines}, {"/in": lines})
    storage.remove(digests_of(content_of(lines)))
    assert match(storage, olds, news) == [Span(0, 0, 0, 0, 4)]


def test_a_file_that_grew_is_one_span_and_what_came(storage, small_blocks):
    old = [f"line {number}" for number in range(10)]
    spans = found_in_one(storage, old, [*old, "x", "y"])
    assert [span[1:] for span in spans] == [(0, 0, 0, 4), (4, 0, 4, 4), (8, 0, 8, 2)]


def test_a_line_that_was_edited_is_a_gap_between_two_spans(storage):
    old = [f"line {number}" for number in range(10)]
    new = [*old[:4], "edited", *old[5:]]
    assert found_in_one(storage, old, new) == [Span(0, 0, 0, 0, 4), Span(0, 5, 0, 5, 5)]


@pytest.mark.parametrize("num", [1, 4, 6])
def test_lines_behind_an_insertion_or_a_deletion_are_found_shifted(storage, small_blocks, num):
    old = [f"line {number}" for number in range(30)]
    assert num_rows(found_in_one(storage, old, [*["new"] * num, *old])) == 30
    assert num_rows(found_in_one(storage, old, old[num:])) == 30 - num
    assert num_rows(found_in_one(storage, old, [*old[:3], *old[3 + num :]])) == 30 - num
    assert num_rows(found_in_one(storage, old, [*old[:7], *["new"] * num, *old[7:]])) == 30


@pytest.mark.parametrize("num", [5, -5])
def test_lines_that_move_on_little_by_little_are_found_however_far_they_get(
    storage, small_blocks, num
):
    """Ten insertions or deletions, none further than is searched, all of them much further."""
    old = [f"line {number}" for number in range(300)]
    new = []
    for at in range(0, 300, 30):
        came = [f"new {at}.{number}" for number in range(num)]
        new += [*came, *old[at + max(-num, 0) : at + 30]]
    spans = found_in_one(storage, old, new)
    assert num_rows(spans) == len(set(old) & set(new)) == (300 if num > 0 else 250)


def test_lines_that_moved_too_far_are_left_to_their_keys(storage, small_blocks):
    old = [f"line {number}" for number in range(60)]
    assert num_rows(found_in_one(storage, old, [*["new"] * 40, *old])) == 0


def test_equal_lines_meet_in_their_order(storage):
    spans = found_in_one(storage, ["x", "a", "a", "a"], ["a", "y", "a"])
    assert sorted(pair for span in spans for pair in pairs_of(span)) == [
        ((0, 0), (0, 1)),
        ((0, 2), (0, 2)),
    ]


def test_a_line_without_a_digest_is_no_line(storage):
    assert found_in_one(storage, [LONG, "a", LONG], [LONG, "a", LONG, "b"]) == [Span(0, 1, 0, 1, 1)]


def test_files_are_compared_by_their_content_and_else_by_their_name(storage):
    olds = {"/a": ["1", "2"], "/b": ["3", "4"], "/c": ["5"], "/d": ["6"]}
    # /a is edited, /b has another name, /c is gone, /d has moved up; /new has a line of /c.
    news = {"/d": ["6"], "/moved": ["3", "4"], "/a": ["0", "2"], "/new": ["5", "7"]}
    assert sorted(found(storage, olds, news)) == [
        Span(0, 0, 3, 0, 1),
        Span(1, 0, 1, 0, 2),
        Span(2, 1, 0, 1, 1),
    ]


def test_a_content_goes_before_a_name(storage):
    """A log that was rotated: its lines are in another file, and its name has others."""
    olds = {"/log": ["1", "2", "3"], "/log.1": ["0"]}
    news = {"/log": ["4"], "/log.1": ["1", "2", "3"], "/log.2": ["0"]}
    assert sorted(found(storage, olds, news)) == [Span(1, 0, 0, 0, 3), Span(2, 0, 1, 0, 1)]
    # A copy that was edited afterwards is left to its rows' keys.
    assert found(storage, {"/a": ["1", "2"]}, {"/a": ["1", "3"], "/b": ["1", "2"]}) == [
        Span(1, 0, 0, 0, 2)
    ]


def test_two_files_of_one_content_are_each_found_once(storage):
    olds = {"/a": ["1"], "/b": ["1"], "/c": ["2"]}
    assert found(storage, olds, {"/x": ["1"], "/b": ["1"]}) == [
        Span(1, 0, 1, 0, 1),
        Span(0, 0, 0, 0, 1),
    ]
    assert found(storage, {"/a": ["1"]}, {"/x": ["1"], "/y": ["1"]}) == [Span(0, 0, 0, 0, 1)]
    # Of one content and one name: nothing has moved.
    assert found(storage, {"/a": ["1"], "/b": ["1"]}, {"/b": ["1"], "/c": ["2"]}) == [
        Span(0, 0, 1, 0, 1)
    ]


def test_of_a_file_that_was_cut_by_a_limit_only_planned_rows_are_found(storage):
    before, after = plans(storage, {"/in": ["a", "b", "c"]}, {"/in": ["a", "b", "c"]})
    cut = replace(before, segments=[replace(before.segments[0], num_rows=2)])
    assert match(storage, cut, after) == match(storage, after, cut) == [Span(0, 0, 0, 0, 2)]
    edited = replace(after, segments=[scanned(storage, "/in", ["x", "c", "b"])])
    assert num_rows(match(storage, before, edited)) == 2
    assert match(storage, cut, edited) == [Span(0, 2, 0, 1, 1)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.booleans(), st.data())
def test_damaged_digests_only_lose_matches(tmp_path_factory, old, is_old, data):
    storage = new_storage(tmp_path_factory)
    new = [*old[::2], "x", *old[1:]]
    whole = num_rows(found_in_one(storage, old, new))
    before, after = plans(storage, {"/in": old}, {"/in": new})
    path = storage.path(digests_of((before if is_old else after).segments[0].digest))
    content = bytearray(path.read_bytes())
    harm = data.draw(st.sampled_from(["gone", "torn", "zeros", "flipped"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if harm == "flipped":
        content[at] ^= data.draw(st.integers(1, 255))
    elif harm == "zeros":
        content[at:] = bytes(len(content) - at)
    overwrite(path, content[:at] if harm == "torn" else content)
    if harm == "gone":
        path.unlink()
    spans = match(storage, before, after)
    for (_, row), (_, old_row) in (pair for span in spans for pair in pairs_of(span)):
        assert new[row] == old[old_row]
    assert num_rows(spans) <= whole
    if harm in {"gone", "torn"}:
        assert spans == []


def test_too_many_spans_are_not_kept(storage, small_blocks, monkeypatch):
    monkeypatch.setattr(matching, "MAX_SPANS", 5)
    lines = [f"line {number}" for number in range(40)]
    new = [line for at in range(0, 40, 4) for line in reversed(lines[at : at + 4])]
    spans = found_in_one(storage, lines, new)
    assert 5 < len(spans) <= 5 + 4


def test_large_files_are_compared_block_by_block(storage):
    """Two and a half blocks of the true size, shifted over the borders of blocks."""
    size = matching._BLOCK_ROWS
    num = 2 * size + size // 2
    old = random.Random(5).randbytes(DIGEST_BYTES * num)
    came = random.Random(6).randbytes(DIGEST_BYTES * 1000)
    cut, gap = 16 * (size - 3), 16 * (2 * size - 10)
    new = old[:cut] + came + old[cut:gap] + old[gap + 16 * 20 :]
    segments = []
    for digest, data in (("old", old), ("new", new)):
        file = DigestFile(storage)
        file.add(data)
        file.commit(digest)
        segments.append(Segment("/in", 1, "1", digest, len(data) // 16))
    before, after = (replace(plan(), segments=[segment]) for segment in segments)
    spans = match(storage, before, after)
    assert num_rows(spans) == num - 20
    assert len(spans) < 10
    for _, start, _, was, length in spans:
        assert new[16 * start : 16 * (start + length)] == old[16 * was : 16 * (was + length)]


def reading(**changes):
    """A plan of a job with these keys of `[input]`."""
    fields = {"where": None, "limit": None, "columns": None, "types": {}, "format": None}
    return replace(plan(3), job={"input": {**fields, **changes}})


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        (reading(), True),
        (reading(limit=3), True),
        (reading(where="n > 1"), False),
        (reading(columns=["id"]), False),
        (reading(types={"id": "int"}), False),
        (replace(reading(), input_format="csv"), False),
        (replace(reading(), schema=base64.b64encode(b"other").decode()), False),
        (replace(reading(), carried=("id",)), True),
        (replace(reading(), carried=["id", "text"]), False),
    ],
)
def test_lines_are_rows_as_before_while_the_same_is_read_of_them(other, is_same):
    assert is_same_reading(reading(), other) is is_same
    assert is_same_reading(other, reading()) is is_same


spans_of = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 1)), max_size=8
).map(
    lambda drawn: [
        # Old rows go up by tens, new rows come in the other order.
        Span(segment, 10 * (9 - at) + gap, segment, 10 * at + gap, length)
        for at, (gap, length, segment) in enumerate(drawn)
    ]
)
rows_of = st.dictionaries(st.integers(0, 2), st.sets(st.integers(0, 99)).map(Ranges.of))


@given(spans_of, rows_of)
def test_spans_are_restricted_to_the_rows_that_are_to_do(spans, todo):
    pairs = [pair for span in restricted(spans, todo) for pair in pairs_of(span)]
    assert pairs == [
        (new, old)
        for span in spans
        for new, old in pairs_of(span)
        if new[1] in todo.get(new[0], Ranges())
    ]


@given(spans_of, rows_of, rows_of)
def test_spans_are_cut_to_what_an_unfinished_plan_has_ended(spans, done, also_done):
    also_done = {segment: rows - done.get(segment, Ranges()) for segment, rows in also_done.items()}
    parts = [
        Part(f"part-{at}", PartFooter("plan-a", 1, "run-1", RowSet(rows), 0, 0, 0, {}))
        for at, rows in enumerate((done, also_done))
    ]
    pairs = [pair for span in answered_by(spans, Durable(parts)) for pair in pairs_of(span)]
    assert pairs == [
        (new, old)
        for span in spans
        for new, old in pairs_of(span)
        if any(old[1] in rows.get(old[0], Ranges()) for rows in (done, also_done))
    ]
