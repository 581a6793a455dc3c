"""What Arrow lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Sequence


def take(table: pa.Table, rows: pa.Array) -> pa.Table:
    """`table.take(rows)` for every type.

    `take` has no kernel for string_view and binary_view, nor for what holds them (pyarrow 26);
    slices do.
    """
    try:
        return table.take(rows)
    except pa.ArrowNotImplementedError:
        slices = [table.slice(start, length) for start, length in _runs(rows.to_pylist())]
        return pa.concat_tables(slices) if slices else table.slice(0, 0)


def gather(
    places: Sequence[tuple[pa.RecordBatch, int]], names: Sequence[str]
) -> list[pa.ChunkedArray]:
    """Collect rows that lie in several batches of one schema, in the order given.

    Args:
        places: Batch and row number in it; at least one.
        names: The columns wanted.

    Returns:
        One array a name, each `len(places)` long.
    """
    batches: dict[int, tuple[pa.RecordBatch, int]] = {}
    offset = 0
    rows = []
    for batch, row in places:
        key = id(batch)
        if key not in batches:
            batches[key] = (batch, offset)
            offset += batch.num_rows
        rows.append(batches[key][1] + row)
    table = pa.Table.from_batches([batch for batch, _ in batches.values()])
    return list(take(table, pa.array(rows, pa.int64())).select(names).columns)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (start, length), in the order given."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs
