"""Parquet: types pass through unchanged; row groups without wanted rows are not read.

Invariant: a column that is used is in every file that has rows, by types that have one in common,
see `shards`; column names are unique. What Parquet does not forbid and Arrow takes for granted
(strings of UTF-8, decimals of so many digits) is looked at: a value that is not so is an error of
its row, as is one longer than a line may be.
"""

from __future__ import annotations

import pickle
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.core.errors import SourceError
from batchgen.core.records import Ranges, RowBatch, RowError
from batchgen.source import text as lines
from batchgen.source.columns import JSON_METADATA, differing, is_differing, is_json, override
from batchgen.source.files import open_input, stat_input
from batchgen.source.reading import ReadSpec, Rows, Shape, make_batch, shape_of, taken, to_values
from batchgen.source.shards import common_type
from batchgen.source.sniff import PARQUET_MAGIC, binary_looks_like
from batchgen.source.text import Scan
from batchgen.source.values import to_python

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence, Set

    from batchgen.source.text import OnBlock, OnRows


_STREAM_BYTES = 8 << 20
_MAX_GROUP_BYTES = 256 << 20
"""Before compression. That much is decoded in about 0.2 s, and engines take longer for the rows
of any lease; pyarrow's default, 2**20 rows, is more for rows over 256 bytes."""


class ParquetReader:
    """See `Reader`."""

    def sniff(self, path: str) -> None:
        """See `Reader`."""
        with open_input(path) as raw:
            head = raw.read(16)
        if not head.startswith(PARQUET_MAGIC):
            looks = f"it looks like {found}" if (found := binary_looks_like(head)) else "no PAR1"
            raise SourceError(path, f"is not Parquet: {looks if head else 'it is empty'}")

    def columns(self, paths: Sequence[str], types: Mapping[str, str]) -> pa.Schema:
        """See `Reader`. Reads every footer; `types` may only name what is so already."""
        found = _common_schema(paths)
        wished = override({field.name: field for field in found}, types, paths[0], may_add=False)
        for name in types:
            here = found.field(name)
            if not here.type.equals(wished.field(name).type):
                text = f"column {name!r} is {here.type}, not {types[name]}; Parquet keeps its types"
                raise SourceError(paths[0], text)
        return found

    def is_all_seen(self, paths: Sequence[str]) -> bool:
        """See `Reader`."""
        return True

    def scan(self, path: str, on_rows: OnRows = None, on_block: OnBlock = int) -> Scan:
        """See `Reader`. The footer alone would not tell values that were changed in place."""
        with _opened(path) as file:
            num_rows = file.metadata.num_rows
        digest = lines.digest_prefix(path, stat_input(path).size_bytes, on_block)
        return Scan(num_rows, digest)

    def read(self, path: str, segment: int, todo: Ranges, spec: ReadSpec) -> Iterator[RowBatch]:
        """See `Reader`."""
        shape = shape_of(path, segment, spec)
        names = list(dict.fromkeys([*shape.table_columns, *shape.needed]))
        for rows, batch in _wanted(path, todo, names, spec.batch_rows):
            yield make_batch(shape, _convert(path, rows, batch, shape, spec))

    def is_seekable(self, path: str) -> bool:
        """See `Reader`. Rows before the wanted ones are decoded from their row group's start on."""
        with _opened(path) as file:
            facts = file.metadata
            sizes = (facts.row_group(at).total_byte_size for at in range(facts.num_row_groups))
            return max(sizes, default=0) <= _MAX_GROUP_BYTES


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    """Open, and translate what goes wrong until it is closed."""
    with open_input(path) as raw:
        try:
            # Streamed: a row group may be larger than memory.
            yield pq.ParquetFile(raw, pre_buffer=False, buffer_size=_STREAM_BYTES)
        except (pa.ArrowException, OSError, NotImplementedError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise SourceError(path, f"is not readable as Parquet: {reason}") from error


class _Columns(NamedTuple):
    """What a footer says of a file's columns."""

    num_rows: int
    schema: pa.Schema
    """Without metadata but for our own."""
    empty: Set[str]
    """Those that hold nothing but nulls, as far as statistics tell."""


def _columns(path: str) -> _Columns:
    """Read a file's footer.

    Raises:
        SourceError: It cannot be read, or a name repeats.
    """
    with _opened(path) as file:
        found, facts = file.schema_arrow, file.metadata
        groups = [facts.row_group(at) for at in range(facts.num_row_groups)]
    repeated = sorted(name for name, num in Counter(found.names).items() if num > 1)
    if repeated:
        raise SourceError(path, f"repeats the columns {repeated}, expected every name once")
    fields = [
        pa.field(f.name, f.type, metadata=JSON_METADATA if is_json(f) else None) for f in found
    ]
    chunks = [group.column(at) for group in groups for at in range(group.num_columns)]
    filled = {chunk.path_in_schema.split(".")[0] for chunk in chunks if not _is_empty(chunk)}
    return _Columns(facts.num_rows, pa.schema(fields), {*found.names} - filled)


def _is_empty(chunk: pq.ColumnChunkMetaData) -> bool:
    told = chunk.statistics
    return told is not None and told.has_null_count and told.null_count == chunk.num_values


def _common_schema(paths: Sequence[str]) -> pa.Schema:
    """The columns of files, those in which they differ marked, see `differing`.

    A file without rows has no say, unless all are such; nor has a column of nothing but nulls.
    """
    found = {path: _columns(path) for path in paths}
    first, *others = [path for path in paths if found[path].num_rows] or paths
    fields, empty = {field.name: field for field in found[first].schema}, found[first].empty
    for path in others:
        here = {field.name: field for field in found[path].schema}
        for name in dict.fromkeys([*fields, *here]):
            one, other = fields.get(name), here.get(name)
            if one is not None and is_differing(one):
                continue
            kind = None
            if one is not None and other is not None:
                kind = common_type(one.type, other.type) or common_type(
                    pa.null() if name in empty else one.type,
                    pa.null() if name in found[path].empty else other.type,
                )
            fields[name] = _field(name, one, other, kind, (path, first))
        empty &= found[path].empty
    return pa.schema(list(fields.values()))


def _field(
    name: str,
    one: pa.Field | None,
    other: pa.Field | None,
    kind: pa.DataType | None,
    files: tuple[str, str],
) -> pa.Field:
    """A column of two files with their common type, or marked."""
    if one is not None and kind is not None:
        return one.with_type(kind)
    there, here = (str(it.type) if it is not None else "absent" for it in (one, other))
    return differing(name, *files, f"{name!r} is {here} here, {there} there")


def _wanted(
    path: str, todo: Ranges, names: Sequence[str], batch_rows: int
) -> Iterator[tuple[list[int], pa.RecordBatch]]:
    with _opened(path) as file:
        facts = file.metadata
        if todo and todo.spans[-1][1] > facts.num_rows:
            text = f"has {facts.num_rows} rows, expected at least {todo.spans[-1][1]}"
            raise SourceError(path, text)
        first = 0
        for group in range(facts.num_row_groups):
            stop = first + facts.row_group(group).num_rows
            wanted = todo & Ranges([(first, stop)])
            if wanted:
                yield from _in_group(file, group, first, wanted, (names, batch_rows))
            first = stop


def _in_group(
    file: pq.ParquetFile, group: int, first: int, wanted: Ranges, what: tuple[Sequence[str], int]
) -> Iterator[tuple[list[int], pa.RecordBatch]]:
    names, batch_rows = what
    end = wanted.spans[-1][1]
    batch_rows = _rows_at_once(file.metadata.row_group(group), names, batch_rows)
    for batch in file.iter_batches(batch_rows, row_groups=[group], columns=list(names)):
        rows = list(wanted & Ranges([(first, first + batch.num_rows)]))
        if len(rows) == batch.num_rows:
            yield rows, batch
        elif rows:
            yield rows, taken(batch, [row - first for row in rows])
        first += batch.num_rows
        if first >= end:
            return


def _rows_at_once(group: pq.RowGroupMetaData, names: Collection[str], most: int) -> int:
    """How many rows to decode at once, so that they are no more than some `MAX_BATCH_BYTES`."""
    columns = (group.column(at) for at in range(group.num_columns))
    num_bytes = sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema in names or column.path_in_schema.split(".")[0] in names
    )
    fitting: int = group.num_rows * lines.MAX_BATCH_BYTES // max(num_bytes, 1)
    return max(1, min(most, fitting))


def _convert(
    path: str, rows: list[int], batch: pa.RecordBatch, shape: Shape, spec: ReadSpec
) -> Rows:
    arrays: dict[str, pa.Array] = {}
    columns: dict[str, list[Any]] = {}
    errors: dict[int, RowError] = {}
    for name in batch.schema.names:
        array, bad = _sound(batch.column(name))
        if name in shape.needed:
            columns[name] = array.to_pylist() if name in spec.as_bytes else to_python(array)
        if name in shape.table_columns:
            arrays[name], misfits = _as_planned(array, spec.columns.field(name).type)
            bad |= misfits
        for at, (kind, problem) in bad.items():
            text = f"{path}: row {rows[at]}: column {name!r} {problem}"
            errors.setdefault(at, RowError(kind, text))
    return Rows(rows, to_values(columns, shape.needed, len(rows)), arrays, errors)


_Bad = dict[int, tuple[str, str]]
"""Index -> error type, and what is wrong with a value."""
_TOO_LONG = ("value_too_long", f"is longer than {lines.MAX_LINE_BYTES >> 20} MiB")
_NOT_UTF8 = ("invalid_utf8", "is not UTF-8")
_DAMAGED = ("bad_value", "holds what its type does not allow")


def _sound(column: pa.Array) -> tuple[pa.Array, _Bad]:
    """Null values that are too long, and those that are not what Arrow takes for granted."""
    if column.nbytes <= lines.MAX_LINE_BYTES and _is_valid(column):
        return column, {}
    if pa.types.is_dictionary(column.type):
        plain, bad = _sound(column.dictionary_decode())
        return (plain.dictionary_encode().cast(column.type) if bad else column), bad
    bad = {at: wrong for at in range(len(column)) if (wrong := _what_is_wrong(column, at))}
    return _nulled(column, bad), bad


def _is_valid(column: pa.Array) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _what_is_wrong(column: pa.Array, at: int) -> tuple[str, str] | None:
    if "view" in str(column.type):  # They share buffers, and have no kernel for `take`.
        return _what_is_wrong_with_view(column[at])
    if column.slice(at, 1).nbytes > lines.MAX_LINE_BYTES:
        return _TOO_LONG
    one = column.take(pa.array([at]))  # Copied, so that it is judged by itself.
    if _is_valid(one):
        return None
    return _NOT_UTF8 if _not_utf8(one[0]) else _DAMAGED


def _what_is_wrong_with_view(scalar: pa.Scalar) -> tuple[str, str] | None:
    if _not_utf8(scalar):
        return _NOT_UTF8
    size = len(pickle.dumps(to_python(pa.array([scalar], scalar.type))))
    return _TOO_LONG if size > lines.MAX_LINE_BYTES else None


def _not_utf8(scalar: pa.Scalar) -> bool:
    try:
        scalar.as_py()
    except UnicodeDecodeError:
        return True
    except Exception:  # noqa: BLE001 - what else Python cannot hold is no matter here
        return False
    return False


def _nulled(column: pa.Array, those: Collection[int]) -> pa.Array:
    if not those:
        return column
    keep = Ranges.until(len(column)) - Ranges.of(sorted(those))
    pieces: list[pa.Array] = []
    end = 0
    for start, stop in [*keep.spans, (len(column), len(column))]:
        pieces += [pa.nulls(start - end, column.type), column.slice(start, stop - start)]
        end = stop
    return pa.concat_arrays(pieces)


def _as_planned(column: pa.Array, kind: pa.DataType) -> tuple[pa.Array, _Bad]:
    """Give a column the type that it has in all files; null what does not fit."""
    if column.type.equals(kind):
        return column, {}
    if column.null_count == len(column):
        return pa.nulls(len(column), kind), {}
    try:
        return column.cast(kind), {}
    except pa.ArrowException:
        pass
    pieces, bad = [], {}
    for at in range(len(column)):
        try:
            pieces.append(column.slice(at, 1).cast(kind))
        except pa.ArrowException:
            pieces.append(pa.nulls(1, kind))
            bad[at] = ("type_mismatch", f"is {column.type} and does not fit into {kind}")
    return pa.concat_arrays(pieces), bad
