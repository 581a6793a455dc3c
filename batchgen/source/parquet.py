"""Parquet: types pass through unchanged; row groups without wanted rows are not read.

Invariant: files of one input have equal names and types, and column names are unique. Strings
that are not UTF-8, which Parquet does not forbid, are errors of their rows.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.core.errors import SourceError
from batchgen.core.records import Ranges, RowError
from batchgen.source import text as lines
from batchgen.source.columns import JSON_METADATA, is_json, override
from batchgen.source.files import open_input, stat_input
from batchgen.source.reading import Rows, make_batch, shape_of, taken, to_values
from batchgen.source.text import PARQUET_MAGIC, Scan, binary_looks_like
from batchgen.source.values import to_python

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from batchgen.core.records import RowBatch
    from batchgen.source.reading import ReadSpec

_STREAM_BYTES = 8 << 20
_MAX_GROUP_BYTES = 256 << 20
"""Before compression. That much is decoded in about 0.2 s, and engines take longer for the rows
of any lease; pyarrow's default, 2**20 rows, is more for rows over 256 bytes."""
_TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view())


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
        first = _schema(paths[0])
        for path in paths[1:]:
            difference = _difference(_schema(path), first)
            if difference:
                raise SourceError(path, f"has other columns than {paths[0]}: {difference}")
        wished = override({field.name: field for field in first}, types, paths[0], may_add=False)
        for name in types:
            here = first.field(name)
            if not here.type.equals(wished.field(name).type):
                text = f"column {name!r} is {here.type}, not {types[name]}; Parquet keeps its types"
                raise SourceError(paths[0], text)
        return first

    def scan(
        self,
        path: str,
        on_rows: Callable[[bytes], object] | None = None,
        on_block: Callable[[], object] = int,
    ) -> Scan:
        """See `Reader`. The footer alone would not tell values that were changed in place."""
        with _opened(path) as file:
            num_rows = file.metadata.num_rows
        digest = lines.digest_prefix(path, stat_input(path).size_bytes, on_block)
        return Scan(num_rows, digest)

    def digest_prefix(self, path: str, size_bytes: int) -> str:
        """See `Reader`."""
        return lines.digest_prefix(path, size_bytes)

    def read(self, path: str, segment: int, todo: Ranges, spec: ReadSpec) -> Iterator[RowBatch]:
        """See `Reader`."""
        shape = shape_of(segment, spec)
        names = list(dict.fromkeys([*shape.table_columns, *shape.needed]))
        for rows, batch in _wanted(path, todo, names, spec.batch_rows):
            yield make_batch(shape, _convert(path, rows, batch, shape.needed, spec.as_bytes))

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


def _schema(path: str) -> pa.Schema:
    """The columns, without metadata but for our own.

    Raises:
        SourceError: The footer cannot be read, or a name repeats.
    """
    with _opened(path) as file:
        found = file.schema_arrow
    repeated = sorted({name for name in found.names if found.names.count(name) > 1})
    if repeated:
        raise SourceError(path, f"repeats the columns {repeated}, expected every name once")
    return pa.schema(
        [pa.field(f.name, f.type, metadata=JSON_METADATA if is_json(f) else None) for f in found]
    )


def _difference(one: pa.Schema, other: pa.Schema) -> str:
    names = sorted({*one.names, *other.names})
    parts = []
    for name in names:
        here = str(one.field(name).type) if name in one.names else "absent"
        there = str(other.field(name).type) if name in other.names else "absent"
        if here != there:
            parts.append(f"{name!r} is {here} here, {there} there")
    return ", ".join(parts)


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
    file: pq.ParquetFile,
    group: int,
    first: int,
    wanted: Ranges,
    what: tuple[Sequence[str], int],
) -> Iterator[tuple[list[int], pa.RecordBatch]]:
    names, batch_rows = what
    end = wanted.spans[-1][1]
    for batch in file.iter_batches(batch_rows, row_groups=[group], columns=list(names)):
        rows = list(wanted & Ranges([(first, first + batch.num_rows)]))
        if len(rows) == batch.num_rows:
            yield rows, batch
        elif rows:
            yield rows, taken(batch, [row - first for row in rows])
        first += batch.num_rows
        if first >= end:
            return


def _convert(
    path: str,
    rows: list[int],
    batch: pa.RecordBatch,
    needed: Sequence[str],
    as_bytes: Collection[str],
) -> Rows:
    arrays: dict[str, pa.Array] = {}
    errors: dict[int, RowError] = {}
    for name in batch.schema.names:
        arrays[name], bad = _valid_text(path, batch.column(name))
        for at in bad:
            text = f"{path}: row {rows[at]}: column {name!r} is not UTF-8"
            errors.setdefault(at, RowError("invalid_utf8", text))
    columns = {
        name: arrays[name].to_pylist() if name in as_bytes else to_python(arrays[name])
        for name in needed
    }
    return Rows(rows, to_values(columns, needed, len(rows)), arrays, errors)


def _valid_text(path: str, column: pa.Array) -> tuple[pa.Array, list[int]]:
    """Null what is not UTF-8; says where. Arrow and polars take valid text for granted."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        if column.type not in _TEXT_TYPES:
            raise SourceError(path, f"is damaged: {error}") from error
    else:
        return column, []
    values = [_decoded(scalar) for scalar in column.cast(pa.large_binary()).to_pylist()]
    bad = [at for at, value in enumerate(values) if isinstance(value, UnicodeDecodeError)]
    texts = [None if at in set(bad) else value for at, value in enumerate(values)]
    return pa.array(texts, column.type), bad


def _decoded(value: bytes | None) -> str | UnicodeDecodeError | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError as error:
        return error
