"""What Arrow lacks."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from collections.abc import Sequence


_LONG_RUN = 64
"""From so many rows on, cutting them out costs less than copying them."""


def take(table: pa.Table, rows: pa.Array) -> pa.Table:
    """`table.take(rows)` for every type.

    `take` has no kernel for string_view and binary_view, nor for what holds them (pyarrow 26);
    slices do.
    """
    try:
        return table.take(rows)
    except pa.ArrowNotImplementedError:
        return _cut_out(table, _runs(rows.to_pylist()))


def keep(table: pa.Table, mask: pa.ChunkedArray) -> pa.Table:
    """The rows for which the mask is true; not copied if they are most of them, in one piece."""
    rows = pc.indices_nonzero(mask)
    num = len(rows)
    if 2 * num > table.num_rows and rows[-1].as_py() - rows[0].as_py() == num - 1:
        return table.slice(rows[0].as_py(), num)
    return take(table, rows)


def gather(
    places: Sequence[tuple[pa.RecordBatch, int]], names: Sequence[str], *, copy: bool = True
) -> list[pa.ChunkedArray]:
    """Collect rows that lie in several batches of one schema, in the order given.

    Args:
        places: Batch and row number in it; at least one.
        names: The columns wanted.
        copy: False: rows that lie together may stay in their batch, and keep it in memory.

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
    table = pa.Table.from_batches([batch for batch, _ in batches.values()]).select(names)
    if not copy and len(runs := _runs(rows)) * _LONG_RUN <= len(rows):
        table = _cut_out(table, runs)
    else:
        table = take(table, pa.array(rows, pa.int64()))
    return list(table.columns)


def _cut_out(table: pa.Table, runs: Sequence[tuple[int, int]]) -> pa.Table:
    slices = [table.slice(start, length) for start, length in runs]
    return pa.concat_tables(slices) if slices else table.slice(0, 0)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (start, length), in the order given."""
    if not numbers:
        return []
    breaks = [at for at, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1]
    bounds = pairwise([0, *breaks, len(numbers)])
    return [(numbers[start], stop - start) for start, stop in bounds]
