"""The seam that every input format fits, and where every format's rows become a `RowBatch`.

A format is a handful of functions over paths, gathered in a `Reader`. Readers keep no state
between calls; what the plan froze comes in, rows go out.

Invariant: each row number that comes in goes out once, in `rows` or in `skipped`. A row that is
an error is never filtered out by `where`, since nobody can tell whether it would have passed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from batchgen.core.expressions import RowTest, parse_row_test
from batchgen.core.records import Ranges, RowBatch, RowError
from batchgen.source.columns import partition_values, to_array, type_word

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from batchgen.source.text import LineIndexes, OnBlock, OnRows, Scan


@dataclass(frozen=True, slots=True)
class ReadSpec:
    """How rows are to be read; fixed at plan time."""

    columns: pa.Schema
    """Every column of the input with its planned type."""
    carried: Sequence[str]
    """Names of the columns that go to the output, in that order."""
    needed: frozenset[str]
    """Names of the columns that templates read."""
    where: str | None = None
    """SQL expression over the columns; rows for which it is not true are skipped."""
    batch_rows: int = 1024
    as_bytes: frozenset[str] = frozenset()
    """Those of `needed` whose binary values are no text: images."""
    line_indexes: LineIndexes | None = None
    """What earlier reads learnt, for a process that reads a file in many pieces; the rows that
    come are the same with it and without."""


class Reader(Protocol):
    """One input format."""

    def sniff(self, path: str) -> None:
        """Refuse a file that is clearly not this format, having read its beginning.

        Raises:
            SourceError: With what it looks like, and what to do.
        """

    def columns(self, paths: Sequence[str], types: Mapping[str, str]) -> pa.Schema:
        """Decide every column's name and type; `types` overrides by name.

        Of a format whose columns only a whole pass tells: as far as beginnings tell, see `scan`.

        Args:
            paths: At least one.
            types: Column name -> type word, see `columns.parse_field`.

        Raises:
            ConfigError: A type word is unknown.
            SourceError: Files disagree, names repeat, or `types` names an unknown column.
        """

    def is_all_seen(self, paths: Sequence[str]) -> bool:
        """Whether `columns` has looked at every row that may bring a column.

        Raises:
            SourceError: A file cannot be read.
        """

    def scan(self, path: str, on_rows: OnRows = None, on_block: OnBlock = int) -> Scan:
        """Count physical rows and hash the content in one pass.

        Args:
            path: Of the file.
            on_rows: Called with the digests of rows that follow each other, see `store.matching`;
                never by a format whose rows are not to be told apart without parsing them.
            on_block: Called now and then; what it raises ends the pass.

        Raises:
            SourceError: The file ends early or cannot be decoded as what its name says.
        """

    def read(self, path: str, segment: int, todo: Ranges, spec: ReadSpec) -> Iterator[RowBatch]:
        """Yield the rows of `todo`, ascending, each either in `rows` or in `skipped`, once.

        Batches hold at most `spec.batch_rows` rows; their `carried` has the columns
        `spec.carried`. A bad row is an entry in `errors`; `carried` has what of it could be
        read (its id, say, beside a column that does not fit) and nulls for the rest.

        Raises:
            SourceError: The file ends before the last row of `todo`, or cannot be decoded.
        """

    def is_seekable(self, path: str) -> bool:
        """Whether reading a few rows late in this file costs about what it yields.

        For files of lines that is so with `ReadSpec.line_indexes`, once it has passed them.

        Raises:
            SourceError: The file cannot be read, where that has to be known.
        """


@dataclass(slots=True)
class Rows:
    """Rows as a format read them, before `where`. All but `blank` have one entry a row."""

    rows: list[int]
    values: Sequence[Mapping[str, Any] | None]
    arrays: Mapping[str, pa.Array]
    """The columns of `table_columns`, by name."""
    errors: dict[int, RowError] = field(default_factory=dict)
    """Index -> why."""
    blank: Ranges = field(default_factory=Ranges)
    """Further row numbers, which hold nothing."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a `ReadSpec` comes to, worked out once a read."""

    segment: int
    schema: pa.Schema
    """Of `carried`."""
    table_columns: tuple[str, ...]
    """Columns that are read as Arrow: the carried ones and those of `where`."""
    needed: tuple[str, ...]
    where: RowTest | None
    constants: Mapping[str, pa.Scalar]
    """Columns that are the same in all rows, see `columns`; not among those above."""
    constant_values: Mapping[str, Any]
    """Those of them that templates see."""


def shape_of(path: str, segment: int, spec: ReadSpec) -> Shape:
    """Work out which columns a read of a file touches."""
    constants = partition_values(path, spec.columns)
    where = None if spec.where is None else parse_row_test("where", spec.where)
    tested = () if where is None else where.columns
    return Shape(
        segment=segment,
        schema=pa.schema([spec.columns.field(name) for name in spec.carried]),
        table_columns=tuple(
            name for name in dict.fromkeys([*spec.carried, *tested]) if name not in constants
        ),
        needed=tuple(sorted(spec.needed - constants.keys())),
        where=where,
        constants=constants,
        constant_values={
            name: value.as_py() for name, value in constants.items() if name in spec.needed
        },
    )


def to_arrays(
    columns: Mapping[str, Sequence[Any]], schema: pa.Schema, where_is: Callable[[int], str]
) -> tuple[dict[str, pa.Array], dict[int, RowError]]:
    """Turn Python columns into Arrow ones of the planned types.

    Args:
        columns: Name -> values.
        schema: Has every name in `columns`.
        where_is: Index -> `file:line`, for error texts.

    Returns:
        The arrays by name, null where a value does not fit, and `type_mismatch` by index.
    """
    arrays: dict[str, pa.Array] = {}
    errors: dict[int, RowError] = {}
    # Of tens of thousands of columns nearly all are absent in a row, and then one list.
    done: dict[tuple[int, pa.DataType], pa.Array] = {}
    for name, values in columns.items():
        field = schema.field(name)
        same = id(values), field.type
        if same in done:
            arrays[name] = done[same]
            continue
        arrays[name], misfits = to_array(field, values)
        if arrays[name].null_count == len(values) and not misfits:
            done[same] = arrays[name]
        for index, found in misfits.items():
            error = mismatch(where_is(index), field, found)
            errors.setdefault(index, error)
    return arrays, errors


def mismatch(where_is: str, planned: pa.Field, found: str) -> RowError:
    """The error of a row with a value that does not fit its column."""
    text = f"column {planned.name!r} is planned as {type_word(planned)}, found {found}"
    return RowError("type_mismatch", f"{where_is}: {text}")


def to_values(
    columns: Mapping[str, Sequence[Any]], needed: Sequence[str], num_rows: int
) -> list[Mapping[str, Any] | None]:
    """Turn the needed columns into one mapping a row."""
    if not needed:
        return [{} for _ in range(num_rows)]
    table = zip(*(columns[name] for name in needed), strict=True)
    return [dict(zip(needed, row, strict=True)) for row in table]


def make_batch(shape: Shape, read: Rows) -> RowBatch:
    """Apply `where` and put the batch together."""
    names, num_rows = shape.schema.names, len(read.rows)
    arrays = {
        **read.arrays,
        **{name: pa.repeat(value, num_rows) for name, value in shape.constants.items()},
    }
    carried = _record_batch([arrays[name] for name in names], shape.schema, num_rows)
    values = [None if at in read.errors else value for at, value in enumerate(read.values)]
    if shape.constant_values:
        values = [it if it is None else {**it, **shape.constant_values} for it in values]
    if shape.where is not None and read.rows:
        tested = [arrays[name] for name in shape.where.columns]
        passed, failed = shape.where.keep(tested, len(read.rows))
        for at, why in failed.items():
            read.errors.setdefault(at, RowError("where_failed", why))
            values[at] = None
        keep = [at for at, good in enumerate(passed.to_pylist()) if good or at in read.errors]
        if len(keep) < len(read.rows):
            return _subset(shape, read, values, carried, keep)
    return RowBatch(shape.segment, read.rows, values, carried, read.errors, read.blank)


def _subset(
    shape: Shape,
    read: Rows,
    values: Sequence[Mapping[str, Any] | None],
    carried: pa.RecordBatch,
    keep: Sequence[int],
) -> RowBatch:
    rows = [read.rows[at] for at in keep]
    errors = {to: read.errors[at] for to, at in enumerate(keep) if at in read.errors}
    skipped = read.blank | Ranges.of(set(read.rows) - set(rows))
    return RowBatch(
        segment=shape.segment,
        rows=rows,
        values=[values[at] for at in keep],
        carried=taken(carried, keep),
        errors=errors,
        skipped=skipped,
    )


def taken(batch: pa.RecordBatch, keep: Sequence[int]) -> pa.RecordBatch:
    """The rows at these ascending indexes."""
    # Slices and not `take`, which has no kernel for string_view (pyarrow 26).
    spans = Ranges.of(keep).spans
    columns = [
        pa.concat_arrays([column.slice(start, stop - start) for start, stop in spans])
        if spans
        else column.slice(0, 0)
        for column in batch.columns
    ]
    return _record_batch(columns, batch.schema, len(keep))


def _record_batch(arrays: Sequence[pa.Array], schema: pa.Schema, num_rows: int) -> pa.RecordBatch:
    if arrays:
        return pa.RecordBatch.from_arrays(list(arrays), schema=schema)
    # With no column, only this constructor keeps the number of rows.
    empty = pa.StructArray.from_arrays([pa.nulls(num_rows)], names=["x"])
    return pa.RecordBatch.from_struct_array(empty).select([])
