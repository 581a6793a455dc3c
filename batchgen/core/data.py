"""Arrow tables and JSON texts, where their libraries fall short.

Arrow: rows of any type are taken out, and shown to polars. JSON: parsed strictly, integers of any
length stay exact.
"""

from __future__ import annotations

import json
import math
import re
import sys
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import orjson
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Mapping, Sequence


class Lazy:
    """A module that is imported once something of it is asked for, since that takes long."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the module has
        return getattr(import_module(self._name), name)


if TYPE_CHECKING:
    import polars

    pl = polars
else:
    pl = Lazy("polars")


class _NoPandas:
    """Finds everything but pandas."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name=name)


def spare_pandas() -> None:
    """Keep pyarrow from importing pandas, half a second of every command that never uses it.

    pyarrow tries once in a process, with the first array that is made of Python values (its
    `pandas-shim.pxi`); whoever asks for pandas by name, or for `to_pandas`, gets it all the same.
    """
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        pa.array([None])
    finally:
        sys.meta_path.remove(finder)


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


def holder_of(name: str, columns: Container[str]) -> str:
    """Name the column that a name means: the one of that name, or of what is before a dot of it.

    The name itself where there is none.
    """
    heads = (name[:at] for at in range(len(name), 0, -1) if name[at : at + 1] in ("", "."))
    return next((head for head in heads if head in columns), name)


def value_at(values: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401 - of any column
    """Look a name up: `body.messages` is in the object `body`, unless a key is called so."""
    head = holder_of(name, values)
    value, rest = values.get(head), name[len(head) + 1 :]
    if not rest:
        return value
    return value_at(value, rest) if isinstance(value, dict) else None


def column_of(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Make a column of Python's values.

    Args:
        values: None is null. Those of a list of fixed size are its numbers, float32 in memory.
        kind: The column's type.
    """
    if not pa.types.is_fixed_size_list(kind):
        return pa.array(values, kind)
    empty = bytes(4 * kind.list_size)
    data = pa.py_buffer(b"".join([empty if value is None else value for value in values]))
    num = len(values) * kind.list_size
    numbers = pa.Array.from_buffers(pa.float32(), num, [None, data]).cast(kind.value_type)
    is_null = pa.array([value is None for value in values], pa.bool_())
    return pa.FixedSizeListArray.from_arrays(numbers, type=kind, mask=is_null)


def vector_encodings(schema: pa.Schema) -> dict[str, str]:
    """How vectors are written: Parquet column -> its encoding.

    Byte-stream-split and zstd make unit vectors 9 % smaller than zstd alone, are written as fast
    and read in a third of the time (98,304 x 384 float32, pyarrow 26).
    """
    return {
        f"{field.name}.list.element": "BYTE_STREAM_SPLIT"
        for field in schema
        if pa.types.is_fixed_size_list(field.type) and pa.types.is_floating(field.type.value_type)
    }


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


def with_polars_types(schema: pa.Schema) -> pa.Schema:
    """Replace the types that polars lacks by such as it has; the same schema if it has all.

    Moments in a zone that it does not know, such as +05:30, are told in UTC. Decimals of 256 bits
    are narrower ones, or text if they have more than 38 digits. List views are lists.

    polars itself would end in a panic, which no program can catch as an error (2.1).
    """
    return pa.schema([field.with_type(_polars_type(field.type)) for field in schema])


def _polars_type(kind: pa.DataType) -> pa.DataType:  # noqa: PLR0911 - a line a kind
    if pa.types.is_timestamp(kind):
        return kind if kind.tz is None or _polars_knows(kind.tz) else pa.timestamp(kind.unit, "UTC")
    if pa.types.is_decimal256(kind):
        return pa.decimal128(kind.precision, kind.scale) if kind.precision <= 38 else pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_polars_type(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_polars_type(kind.key_type), _polars_type(kind.item_type))
    if isinstance(kind, pa.BaseExtensionType):
        inner, outer = kind.storage_type, _polars_type(kind.storage_type)
        return kind if inner == outer else outer
    if not hasattr(kind, "value_type"):
        return kind
    inner, outer = kind.value_type, _polars_type(kind.value_type)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(outer, kind.list_size)
    if _is_list_view(kind):
        return pa.large_list(outer)
    if inner == outer:
        return kind
    return outer if pa.types.is_dictionary(kind) else pa.large_list(outer)


@cache
def _polars_knows(zone: str) -> bool:
    try:
        pl.Series([None]).cast(pl.Datetime("us", zone))
    except pl.exceptions.PolarsError:
        return False
    return True


def _is_list_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def lazy_frame(
    schema: pa.Schema, batches: Callable[[int], Iterator[pa.RecordBatch]]
) -> pl.LazyFrame:
    """Show rows to polars in types that it has, see `with_polars_types`.

    Collecting them raises a PolarsError for a value that cannot be converted.

    Args:
        schema: Of the rows.
        batches: Reads them, so many at once.

    Raises:
        ArrowNotImplementedError: A list view in a map, or in lists of one length.
    """
    from polars.io.plugins import register_io_source

    wanted = with_polars_types(schema)

    def source(
        columns: list[str] | None, predicate: pl.Expr | None, num: int | None, size: int | None
    ) -> Iterator[pl.DataFrame]:
        for batch in batches(size or 10_000):
            frame = _to_polars(batch, wanted).head(batch.num_rows if num is None else num)
            num = None if num is None else num - len(frame)
            frame = frame.filter(predicate) if predicate is not None else frame
            yield frame.select(columns) if columns else frame

    nothing = pa.record_batch([pa.nulls(0, field.type) for field in schema], schema=schema)
    return register_io_source(source, schema=_to_polars(nothing, wanted).schema)


def to_polars(batch: pa.RecordBatch) -> pl.DataFrame:
    """Show rows to polars in types that it has, see `with_polars_types`.

    Raises:
        ArrowException: A value cannot be converted.
    """
    return _to_polars(batch, with_polars_types(batch.schema))


def _to_polars(batch: pa.RecordBatch, schema: pa.Schema) -> pl.DataFrame:
    columns = [_cast(column, field.type) for column, field in zip(batch, schema, strict=True)]
    return cast("pl.DataFrame", pl.from_arrow(pa.Table.from_arrays(columns, schema=schema)))


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if not any(map(_is_list_view, parts_of(column.type))):
        return column.cast(kind)
    # Not by `cast`: that of pyarrow 26 loses values of a list view's last row.
    if pa.types.is_struct(kind):
        pairs = zip(column.flatten(), kind, strict=True)
        inner = [_cast(values, field.type) for values, field in pairs]
        return pa.StructArray.from_arrays(inner, fields=list(kind), mask=column.is_null())
    if not pa.types.is_large_list(kind):
        msg = f"{column.type} has no counterpart in polars"
        raise pa.ArrowNotImplementedError(msg)
    ends = pc.cumulative_sum(pc.fill_null(column.value_lengths(), 0).cast(pa.int64()))
    offsets = pa.concat_arrays([pa.array([0], pa.int64()), ends])
    values = _cast(column.flatten(), kind.value_type)
    return pa.LargeListArray.from_arrays(offsets, values, mask=column.is_null())


def parts_of(kind: pa.DataType) -> Iterator[pa.DataType]:
    """Yield a type and those that it is made of; an extension's own value is not looked into."""
    yield kind
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        yield from parts_of(kind.value_type)
    for at in range(kind.num_fields):
        yield from parts_of(kind.field(at).type)


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
        raise ValueError("too many levels, beside an integer of 19 digits or more") from None
    return value


def parse_state(data: bytes) -> Any:  # noqa: ANN401 - any JSON
    """Parse JSON that batchgen wrote, with half characters: names that are not UTF-8 have them.

    Raises:
        ValueError: Not JSON, or too many levels.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("too many levels") from None


def _finite(written: str) -> float:
    number = float(written)
    if not math.isfinite(number):
        raise ValueError(f"{written} is no JSON number of 64 bits")
    return number


def check_levels(value: object) -> None:
    """Refuse what is nested more than `MAX_LEVELS` deep, before anything recurses into it.

    Raises:
        ValueError: It is.
    """
    if is_deeper(value, MAX_LEVELS):
        raise ValueError(f"more than {MAX_LEVELS} objects and arrays inside each other")


def is_deeper(value: object, num_levels: int) -> bool:
    """Whether more objects and arrays are inside each other than so many."""
    level = [value]
    for _ in range(num_levels + 1):
        level = [item for parent in level for item in _children(parent)]
    return bool(level)


def _children(value: object) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
