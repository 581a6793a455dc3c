"""What Arrow lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Sequence


def take(table: pa.Table, rows: Sequence[int] | pa.Array) -> pa.Table:
    """`table.take(rows)` for every type.

    `take` has no kernel for string_view and binary_view, nor for what holds them (pyarrow 26);
    slices do.
    """
    try:
        return table.take(rows)
    except pa.ArrowNotImplementedError:
        numbers = rows.to_pylist() if isinstance(rows, pa.Array) else rows
        slices = [table.slice(number, 1) for number in numbers]
        return pa.concat_tables(slices).combine_chunks() if slices else table.slice(0, 0)
