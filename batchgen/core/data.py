"""Arrow tables and JSON texts, where their libraries fall short.

Arrow: rows of any type are taken out. JSON: parsed strictly, integers of any length stay exact.
"""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from collections.abc import Sequence


class NotTextError(ValueError):
    """Bytes that are not UTF-8 were to become text."""


class NotText(bytes):
    """A value of the input that is not UTF-8: may be passed on and tested, not printed."""

    __slots__ = ()

    def __str__(self) -> str:
        raise NotTextError

    __repr__ = __str__

    def __format__(self, _: str) -> str:
        return str(self)


_LONG_RUN = 64
"""From so many rows on, cutting them out costs less than copying them."""
MAX_LEVELS = 64
"""Objects and arrays inside each other in a schema, or in a row's own sampling parameters.
jsonschema recurses, some ten frames a level, and Python stops at a thousand."""

_LONG_INTEGER = re.compile(r"[0-9]{19}")  # orjson makes floats of those over 64 bits,
_HUGE_INTEGER = re.compile(r"[0-9]{300}")  # and refuses those over what a float can be.


def take_rows(table: pa.Table, rows: pa.Array) -> pa.Table:
    """`table.take(rows)` for every type.

    `take` has no kernel for string_view and binary_view, nor for what holds them (pyarrow 26);
    slices do.
    """
    try:
        return table.take(rows)
    except pa.ArrowNotImplementedError:
        return _cut_out(table, _runs(rows.to_pylist()))


def keep_rows(table: pa.Table, mask: pa.ChunkedArray) -> pa.Table:
    """The rows for which the mask is true; not copied if they are most of them, in one piece."""
    rows = pc.indices_nonzero(mask)
    num = len(rows)
    if 2 * num > table.num_rows and rows[-1].as_py() - rows[0].as_py() == num - 1:
        return table.slice(rows[0].as_py(), num)
    return take_rows(table, rows)


def gather_rows(
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
        table = take_rows(table, pa.array(rows, pa.int64()))
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


def parse_json(text: str | bytes) -> Any:  # noqa: ANN401 - any JSON
    """Parse JSON as strictly as orjson does, with integers of any length kept exact.

    Raises:
        ValueError: Not JSON: also NaN, infinite numbers, half a character, too many levels.
    """
    if isinstance(text, bytes):
        text = text.decode()
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        if _HUGE_INTEGER.search(text) is None:
            raise
    else:
        if _LONG_INTEGER.search(text) is None:
            return value
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        json.dumps(value, ensure_ascii=False).encode()  # Half a character: UnicodeEncodeError.
    except RecursionError:
        msg = "too many levels, beside an integer of 19 digits or more"
        raise ValueError(msg) from None
    return value


def _finite(written: str) -> float:
    number = float(written)
    if not math.isfinite(number):
        msg = f"{written} is no JSON number of 64 bits"
        raise ValueError(msg)
    return number


def check_levels(value: object) -> None:
    """Refuse what is nested more than `MAX_LEVELS` deep, before anything recurses into it.

    Raises:
        ValueError: It is.
    """
    level = [value]
    for _ in range(MAX_LEVELS + 1):
        level = [item for parent in level for item in _children(parent)]
        if not level:
            return
    msg = f"more than {MAX_LEVELS} objects and arrays inside each other"
    raise ValueError(msg)


def _children(value: object) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
