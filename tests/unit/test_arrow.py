"""Rows of tables and batches, copied or not, are the same rows."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.core.data import gather_rows, keep_rows

KINDS = [pa.string(), pa.string_view()]


def batch_of(start: int, num_rows: int, kind: pa.DataType) -> pa.RecordBatch:
    values = pa.array([None if n % 7 == 0 else n for n in range(start, start + num_rows)])
    return pa.record_batch({"n": values, "x": values.cast(pa.string()).cast(kind)})


def addresses(column: pa.ChunkedArray) -> set[int]:
    return {part.address for chunk in column.chunks for part in chunk.buffers() if part}


@given(st.lists(st.booleans(), min_size=0, max_size=12), st.sampled_from(KINDS))
def test_kept_rows_are_those_of_the_mask(mask, kind):
    table = pa.Table.from_batches([batch_of(0, 5, kind), batch_of(5, 7, kind)])[: len(mask)]
    kept = keep_rows(table, pa.chunked_array([mask], pa.bool_()))
    rows = zip(table.to_pylist(), mask, strict=True)
    assert kept.to_pylist() == [row for row, is_kept in rows if is_kept]


@pytest.mark.parametrize(("num_kept", "is_shared"), [(0, False), (5, False), (6, True), (10, True)])
def test_few_kept_rows_do_not_hold_the_memory_of_all(num_kept, is_shared):
    table = pa.Table.from_batches([batch_of(0, 10, pa.string())])
    mask = [at < num_kept for at in range(10)]
    kept = keep_rows(table, pa.chunked_array([mask], pa.bool_()))
    assert bool(addresses(kept["x"]) & addresses(table["x"])) is is_shared


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 199)), min_size=1, max_size=5),
    st.integers(1, 200),
    st.sampled_from(KINDS),
)
def test_gathered_rows_are_the_same_whether_copied_or_not(starts, length, kind):
    batches = [batch_of(0, 200, kind), batch_of(500, 200, kind)]
    places = [
        (batches[which], row)
        for which, start in starts
        for row in range(start, min(start + length, 200))
    ]
    wanted = [batch.column("n")[row].as_py() for batch, row in places]
    for copy in (True, False):
        x, n = gather_rows(places, ["x", "n"], copy=copy)
        assert n.to_pylist() == wanted
        assert x.to_pylist() == [None if value is None else str(value) for value in wanted]


@pytest.mark.parametrize(("num_rows", "is_shared"), [(63, False), (64, True), (200, True)])
def test_rows_that_lie_together_stay_where_they_are_if_they_may(num_rows, is_shared):
    batch = batch_of(0, 300, pa.string())
    places = [(batch, row) for row in range(num_rows)]
    mine = addresses(pa.chunked_array([batch.column("x")]))
    (copied,) = gather_rows(places, ["x"])
    (shared,) = gather_rows(places, ["x"], copy=False)
    assert not addresses(copied) & mine
    assert bool(addresses(shared) & mine) is is_shared
