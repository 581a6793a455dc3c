"""Rows of an earlier plan, read back whole or not at all; and the counts that parts keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchgen.core.errors import OutputError
from batchgen.core.records import NO_ROWS, Ranges, RowError, RowSet
from batchgen.storage import LocalStorage
from batchgen.store import parts as store_parts
from batchgen.store.books import Manifest, Part, PartFooter
from batchgen.store.matching import Renumbering, Span
from batchgen.store.published import PublishedRows
from batchgen.store.result_files import (
    OTHER_BYTES,
    PartContext,
    PartWriter,
    part_schema,
    rows_of,
    tally,
)
from batchgen.store.reuse import Piece, Wanted, from_parts, from_snapshot, gathered
from batchgen.store.snapshot import SnapshotFormat
from tests.fakes import ANSWER, as_version_1, batch, plan, results, write_parts
from tests.harm import overwrite

SCHEMA = part_schema(pa.schema([("id", pa.string())]), ANSWER, "gen_")
BAD = RowError("bad", "it is bad")
BY = {"engine": "fake", "version": "7"}
NUM_ROWS = [40, 0, 30]
BLANK = RowSet({0: Ranges.of([0, 7, 39]), 2: Ranges.of([29])})
FAILED = {0: {3, 20}, 2: {0, 11}}


def put_parts(storage: LocalStorage, num_parts: int = 3) -> list[Part]:
    """A complete plan of `NUM_ROWS`: some rows blank, some failed, parts that overlap."""
    writer = PartWriter(storage, "parts", PartContext("plan-a", 1, 0, "run-1", SCHEMA, "gen_"))
    names = []
    for at in range(num_parts):
        done = []
        for segment, num_rows in enumerate(NUM_ROWS):
            rows = [r for r in range(at, num_rows, num_parts) if r not in BLANK.get(segment, ())]
            failed = FAILED.get(segment, set())
            bad = {row: BAD for row in rows if row in failed}
            done += results(batch(rows, segment=segment), errors=bad)
        names.append(writer.commit(done, BLANK if at == 1 else {}, BY).name)
    return [footed(storage, name) for name in names]


def footed(storage: LocalStorage, name: str) -> Part:
    return Part(name, PartFooter.from_metadata(pq.read_metadata(storage.path(name)).metadata))


def put_snapshot(storage: LocalStorage, parts: list[Part], rows_per_file: int = 25) -> Manifest:
    form = SnapshotFormat(SCHEMA, "gen_", "zstd", rows_per_file, {b"batchgen.engine": b"fake 7"})
    files = write_parts(
        storage, [(part.name, part.footer) for part in parts], plan(*NUM_ROWS), form
    )
    return Manifest(
        number=1,
        plan_id="plan-a",
        epoch=1,
        run_id="run-1",
        created_at="",
        files=files,
        num_planned=70,
        num_ok=62,
        num_errors=4,
        num_skipped=4,
    )


def staying(rows: dict[int, Ranges]) -> Renumbering:
    """These rows are where they were."""
    spans = [
        Span(segment, start, segment, start, stop - start)
        for segment, found in rows.items()
        for start, stop in found.spans
    ]
    return Renumbering(spans, plan(*NUM_ROWS), plan(*NUM_ROWS, number=2))


def wanted(
    told: list[str], rows: dict[int, Ranges] | None = None, *, takes_errors: bool = False
) -> Wanted:
    every = RowSet({segment: Ranges.until(num_rows) for segment, num_rows in enumerate(NUM_ROWS)})
    moves = staying(every if rows is None else rows)
    return Wanted(SCHEMA, "gen_", moves, takes_errors, told.append)


def collect(pieces: Any) -> tuple[list[dict[str, Any]], dict[int, Ranges]]:
    rows: list[dict[str, Any]] = []
    skipped: dict[int, Ranges] = {}
    for table, left_out, _ in pieces:
        assert table.schema.equals(SCHEMA)
        rows += table.to_pylist()
        for segment, numbers in left_out.items():
            assert not numbers & skipped.get(segment, NO_ROWS)
            skipped[segment] = skipped.get(segment, NO_ROWS) | numbers
    return rows, skipped


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['_batchgen_segment']}/{row['_batchgen_row']}" for row in rows]


def expected_ids() -> list[str]:
    return [
        f"{segment}/{row}"
        for segment, num_rows in enumerate(NUM_ROWS)
        for row in range(num_rows)
        if row not in BLANK.get(segment, ()) and row not in FAILED.get(segment, set())
    ]


@pytest.fixture
def parts(storage: LocalStorage) -> list[Part]:
    return put_parts(storage)


def test_the_ok_rows_of_a_snapshot_come_back_as_they_were_and_blank_ones_as_skipped(storage, parts):
    told: list[str] = []
    manifest = put_snapshot(storage, parts)
    rows, skipped = collect(from_snapshot(storage, manifest, plan(*NUM_ROWS), wanted(told)))
    assert ids(rows) == expected_ids() == [row["id"] for row in rows]
    assert {row["gen_text"] for row in rows} == {at.replace("/", ":") for at in expected_ids()}
    assert {row["gen_run_id"] for row in rows} == {"run-1"}
    assert skipped == BLANK
    assert told == []


def test_the_ok_rows_of_parts_are_the_same_rows(storage, parts):
    told: list[str] = []
    manifest = put_snapshot(storage, parts)
    published, _ = collect(from_snapshot(storage, manifest, plan(*NUM_ROWS), wanted(told)))
    rows, skipped = collect(from_parts(storage, parts, wanted(told)))
    assert sorted(rows, key=lambda row: list(row.values())[:2]) == published
    assert (skipped, told) == (BLANK, [])


@pytest.mark.parametrize("kind", ["snapshot", "parts"])
@pytest.mark.parametrize("others", [0, 10_000])
def test_only_wanted_rows_come_back(storage, parts, kind, others):
    some = RowSet({0: Ranges([(2, 9)]), 1: Ranges.until(others), 2: Ranges([(28, 30)])})
    want = wanted([], some)
    manifest = put_snapshot(storage, parts)
    if kind == "snapshot":
        pieces = from_snapshot(storage, manifest, plan(*NUM_ROWS), want)
    else:
        pieces = from_parts(storage, parts, want)
    rows, skipped = collect(pieces)
    assert sorted(ids(rows)) == ["0/2", "0/4", "0/5", "0/6", "0/8", "2/28"]
    assert skipped == {0: Ranges.of([7]), 2: Ranges.of([29])}


@pytest.mark.parametrize("kind", ["snapshot", "parts"])
def test_errors_come_back_too_where_they_are_wanted(storage, parts, kind):
    want = wanted([], takes_errors=True)
    manifest = put_snapshot(storage, parts)
    if kind == "snapshot":
        pieces = from_snapshot(storage, manifest, plan(*NUM_ROWS), want)
    else:
        pieces = from_parts(storage, parts, want)
    rows, skipped = collect(pieces)
    failed = {f"{segment}/{row}" for segment, found in FAILED.items() for row in found}
    assert sorted(ids(rows)) == sorted([*expected_ids(), *failed])
    assert {row["id"] for row in rows if row["gen_status"] == "error"} == failed
    assert {row["gen_error"] for row in rows if row["gen_status"] == "error"} == {"it is bad"}
    assert skipped == BLANK


@pytest.mark.parametrize("kind", ["snapshot", "parts"])
def test_rows_that_moved_come_back_under_their_new_ordinals(storage, parts, kind):
    """Segment 2 comes first now, behind five new rows; of segment 0, rows are gone and swapped."""
    spans = [Span(0, 5, 2, 0, 30), Span(1, 0, 0, 20, 20), Span(1, 20, 0, 5, 10)]
    old = plan(*NUM_ROWS)
    new = replace(old, number=2, segments=[old.segments[2], old.segments[0]])
    want = Wanted(SCHEMA, "gen_", Renumbering(spans, old, new), takes_errors=True, tell=print)
    manifest = put_snapshot(storage, parts)
    if kind == "snapshot":
        pieces = from_snapshot(storage, manifest, plan(*NUM_ROWS), want)
    else:
        pieces = from_parts(storage, parts, want)
    rows, skipped = collect(pieces)
    moved = {f"2/{row}": f"0/{row + 5}" for row in range(30)}
    moved |= {f"0/{row}": f"1/{row - 20}" for row in range(20, 40)}
    moved |= {f"0/{row}": f"1/{row + 15}" for row in range(5, 15)}
    # The failed rows have no key, and their texts name the line that they stood in.
    answered = {was: now for was, now in moved.items() if was in expected_ids()}
    assert dict(zip([row["id"] for row in rows], ids(rows), strict=True)) == answered
    assert skipped == {0: Ranges.of([34]), 1: Ranges.of([19, 22])}


def test_a_snapshot_without_a_row_gives_back_what_was_skipped(storage):
    writer = PartWriter(storage, "parts", PartContext("plan-a", 1, 0, "run-1", SCHEMA, "gen_"))
    blank = RowSet((at, Ranges.until(num_rows)) for at, num_rows in enumerate(NUM_ROWS))
    manifest = put_snapshot(storage, [footed(storage, writer.commit([], blank, {}).name)])
    rows, skipped = collect(from_snapshot(storage, manifest, plan(*NUM_ROWS), wanted([], {
        0: Ranges.until(4), 2: Ranges.until(2)
    })))  # fmt: skip
    assert (rows, skipped) == ([], RowSet({0: Ranges.until(4), 2: Ranges.until(2)}))


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_parts, "_CHUNK_ROWS", 8)


def test_wherever_a_published_file_is_flipped_no_wrong_row_comes_back(storage, parts, small_groups):
    """Every byte: pages, page headers, statistics, footer."""
    manifest = put_snapshot(storage, parts)
    true_rows, _ = collect(from_snapshot(storage, manifest, plan(*NUM_ROWS), wanted([])))
    name = manifest.files[1].name
    path = storage.path(name)
    whole = path.read_bytes()
    num_kept = set()
    for at in range(0, len(whole), 61):
        overwrite(path, whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        told: list[str] = []
        rows, skipped = collect(from_snapshot(storage, manifest, plan(*NUM_ROWS), wanted(told)))
        assert [row for row in true_rows if row in rows] == rows
        assert len(rows) < len(true_rows)
        assert RowSet(skipped) - BLANK == {}  # Which were blank, the footer tells.
        (text,) = told
        assert text.startswith(f"{name}: damaged (its bytes are not those that were published); ")
        num_kept.add(len(rows))
    # A row group, or with the footer the whole file, and never more.
    assert len(num_kept) > 2
    assert min(num_kept) >= len(true_rows) - manifest.files[1].num_rows


@pytest.mark.parametrize("size", [0, 3, 500, -1])
def test_of_a_torn_published_file_nothing_comes_back_and_of_others_all(storage, parts, size):
    manifest = put_snapshot(storage, parts)
    every, _ = collect(from_snapshot(storage, manifest, plan(*NUM_ROWS), wanted([])))
    lost = manifest.files[0]
    path = storage.path(lost.name)
    overwrite(path, path.read_bytes()[:size])
    told: list[str] = []
    rows, _ = collect(from_snapshot(storage, manifest, plan(*NUM_ROWS), wanted(told)))
    assert ids(rows) == [row["id"] for row in every if row["id"] in ids(rows)]
    assert told == [f"{lost.name}: damaged ({OTHER_BYTES}); {lost.num_rows} rows done again"]
    assert len(rows) == len(every) - lost.num_ok


def test_a_published_file_that_is_gone_is_damage_too(storage, parts):
    manifest = put_snapshot(storage, parts)
    lost = manifest.files[2]
    storage.remove(lost.name)
    told: list[str] = []
    rows, _ = collect(from_snapshot(storage, manifest, plan(*NUM_ROWS), wanted(told)))
    assert ids(rows) == expected_ids()[: -lost.num_ok]
    assert told[0].startswith(f"{lost.name}: damaged")


@pytest.mark.parametrize("damage", ["flipped", "gone", "torn"])
def test_without_its_index_nothing_is_taken_from_a_snapshot(storage, parts, damage):
    manifest = as_version_1(storage, put_snapshot(storage, parts), plan(*NUM_ROWS))
    assert manifest.index is not None
    path = storage.path(manifest.index.name)
    whole = path.read_bytes()
    overwrite(path, whole[:-40] if damage == "torn" else whole[:9] + b"?" + whole[10:])
    if damage == "gone":
        path.unlink()
    with pytest.raises(OutputError, match=r"index\.parquet: damaged .* or begin anew with --fresh"):
        PublishedRows(storage, manifest, plan(*NUM_ROWS))


def test_a_snapshot_from_before_there_was_an_index_is_refused(storage, parts):
    manifest = as_version_1(storage, put_snapshot(storage, parts), plan(*NUM_ROWS))
    with pytest.raises(OutputError, match="has no index of rows; use --fresh"):
        PublishedRows(storage, replace(manifest, index=None), plan(*NUM_ROWS))


def test_a_snapshot_with_other_columns_is_refused(storage, parts):
    manifest = put_snapshot(storage, parts)
    other = part_schema(pa.schema([("name", pa.string())]), ANSWER, "gen_")
    want = Wanted(
        other, "gen_", staying(RowSet({0: Ranges.until(40)})), takes_errors=False, tell=print
    )
    with pytest.raises(OutputError, match="has other columns than this job's parts"):
        collect(from_snapshot(storage, manifest, plan(*NUM_ROWS), want))


def test_of_a_part_with_a_flipped_page_the_other_row_groups_come_back(storage):
    writer = PartWriter(storage, "parts", PartContext("plan-a", 1, 0, "run-1", SCHEMA, "gen_"))
    rows = list(range(9000))  # Three row groups.
    name = writer.commit(results(batch(rows)), RowSet({0: Ranges.of([9000])}), BY).name
    part = footed(storage, name)
    path = storage.path(name)
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(1).column(2)
    data[column.data_page_offset + column.total_compressed_size - 9] ^= 1
    overwrite(path, data)
    told: list[str] = []
    found, skipped = collect(
        from_parts(storage, [part], wanted(told, RowSet({0: Ranges.until(9001)})))
    )
    assert [row["_batchgen_row"] for row in found] == [*range(4096), *range(8192, 9000)]
    assert skipped == {}  # Which rows were blank cannot be told any more.
    assert told == [f"{name}: damaged; rows that cannot be read are done again"]


@pytest.mark.parametrize("damage", ["gone", "torn", "another part's rows"])
def test_of_a_part_that_is_not_what_its_footer_says_nothing_comes_back(storage, parts, damage):
    path = storage.path(parts[0].name)
    if damage == "gone":
        path.unlink()
    elif damage == "torn":
        overwrite(path, path.read_bytes()[:-50])
    else:
        overwrite(path, storage.path(parts[2].name).read_bytes())
    told: list[str] = []
    rows, _ = collect(from_parts(storage, [parts[0]], wanted(told)))
    assert rows == []
    assert told[0].startswith(f"{parts[0].name}: damaged (")


def test_pieces_are_gathered_by_rows_and_bytes_and_sorted(storage, parts):
    pieces = list(from_parts(storage, parts, wanted([])))
    (one,) = gathered(pieces, 1000, 2**30)
    assert ids(one.table.to_pylist()) == expected_ids()
    assert (one.skipped, one.engine) == (BLANK, "fake 7")
    assert len(list(gathered(pieces, 1, 2**30))) == len(list(gathered(pieces, 1000, 1))) == 3
    assert list(gathered([], 1000, 1000)) == []


def test_rows_that_were_only_skipped_make_a_piece_and_nothing_makes_none(storage):
    empty = SCHEMA.empty_table()
    (piece,) = gathered([Piece(empty, RowSet({0: Ranges.until(3)}), "")], 10, 10)
    assert piece == (empty, RowSet({0: Ranges.until(3)}), "")
    assert list(gathered([Piece(empty, RowSet(), "")], 10, 10)) == []


def test_what_was_taken_over_is_committed_as_it_was(storage, parts):
    (piece,) = gathered(from_parts(storage, parts, wanted([])), 1000, 2**30)
    writer = PartWriter(storage, "new", PartContext("plan-b", 2, 0, "run-2", SCHEMA, "gen_"))
    name = writer.commit_table(piece.table, piece.skipped, {"engine": piece.engine}).name
    footer = footed(storage, name).footer
    assert (footer.plan, footer.epoch, footer.run_id) == ("plan-b", 2, "run-2")
    assert (footer.num_ok, footer.num_errors, footer.num_skipped) == (62, 0, 4)
    done = {
        segment: rows | BLANK.get(segment, NO_ROWS)
        for segment, rows in rows_of(piece.table).items()
    }
    assert footer.done == done
    assert footer.tally == {"verdict": {"ok": 62}, "attempts": {"1": 62}}
    assert pq.read_table(storage.path(name)).to_pylist() == piece.table.to_pylist()
    assert writer.commit_table(piece.table, {}, {}).name == "new/e000002-w00-s000001.parquet"


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sets(st.integers(0, 30), max_size=10), min_size=1, max_size=4), st.data())
def test_whatever_is_ok_failed_or_blank_each_row_comes_back_once(tmp_path_factory, drawn, data):
    storage = LocalStorage(tmp_path_factory.mktemp("out"))
    writer = PartWriter(storage, "parts", PartContext("plan-a", 1, 0, "run-1", SCHEMA, "gen_"))
    taken: set[int] = set()
    parts, ok, blank = [], [], []
    for rows in drawn:
        fresh = sorted(rows - taken)
        taken |= rows
        kinds = {row: data.draw(st.sampled_from(["ok", "error", "blank"])) for row in fresh}
        given_rows = [row for row in fresh if kinds[row] != "blank"]
        bad = {row: BAD for row in fresh if kinds[row] == "error"}
        skipped = Ranges.of(row for row in fresh if kinds[row] == "blank")
        done = results(batch(given_rows), errors=bad)
        parts.append(footed(storage, writer.commit(done, {0: skipped} if skipped else {}, BY).name))
        ok += [row for row in fresh if kinds[row] == "ok"]
        blank += list(skipped)
    rest = Ranges.until(31) - Ranges.of(taken)  # So that the snapshot is one of a whole plan.
    parts.append(footed(storage, writer.commit([], {0: rest}, BY).name))
    want = wanted([], RowSet({0: Ranges.until(31)}))
    manifest = put_snapshot(storage, parts, rows_per_file=data.draw(st.integers(1, 9)))
    for pieces in (
        from_parts(storage, parts, want),
        from_snapshot(storage, manifest, plan(*NUM_ROWS), want),
    ):
        rows, left_out = collect(pieces)
        assert sorted(row["_batchgen_row"] for row in rows) == sorted(ok)
        assert left_out.get(0, NO_ROWS) == Ranges.of(blank) | rest


TALLIED = pa.table(
    {
        "gen_status": ["ok", "error", "ok", "ok"],
        "gen_verdict": pa.array(["ok", "truncated", "ok", "ok"]).dictionary_encode(),
        "gen_attempts": pa.array([1, 3, 2, 1], pa.int16()),
        "gen_label": ["a", "b", None, "a"],
        "gen_output": [{"label": "x"}, None, {"label": None}, {"label": "y"}],
        "gen_labels": [["a", "b"], None, [None], ["b"]],
        "gen_none": pa.array([None] * 4, pa.string()),
    }
)


def test_a_tally_counts_results_and_the_labels_of_ok_rows():
    labels = [("label",), ("output", "label"), ("labels",), ("none",)]
    assert tally(TALLIED, "gen_", labels) == {
        "verdict": {"ok": 3, "truncated": 1},
        "attempts": {"1": 2, "3": 1, "2": 1},
        "gen_label": {"a": 2},
        "gen_output.label": {"x": 1, "y": 1},
        "gen_labels": {"a": 1, "b": 2},
        "gen_none": {},
    }


def test_a_table_without_rows_counts_nothing():
    assert tally(TALLIED.slice(0, 0), "gen_", [("label",)]) == {
        "verdict": {},
        "attempts": {},
        "gen_label": {},
    }
