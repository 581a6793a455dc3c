"""Files of results: their one Arrow schema, parts and their commit, and files read back.

A part is whatever finished since the last flush, in ordinal order. The part file is the commit
record: once `commit` returns, its rows are durable and will not be done again. It is built in
memory and put under its name in one piece; nothing is ever streamed to a final name, because a
writer that is closed by an exception leaves a valid, short file.

The schema is fixed at plan time and written with explicit types, so that a part without a single
error and a part with nothing else have the same. The counts are kept in the footer, so that the
gate never has to read the rows:

    {"verdict":   {"ok": 95, "truncated": 5},       over all results
     "attempts":  {"1": 97, "2": 3},                over all results
     "gen_label": {"refund": 60, "invoice": 35}}    over ok rows, for each column of labels

Parts and published files are read back under one policy for damage: nothing is believed that cannot
be shown to be what was written. Page checksums are verified with every read; of published files,
whose index keeps hashes, so are the footer and each row group: page headers and the footer have no
checksum. What is damaged is left out, a row group at a time, and `problem` says why. What follows
from that (rows are computed again, a run ends, a hint is missing) is its reader's to decide. An
error that says nothing about a file's content, such as too many open files, is a StorageError for
every reader.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen.core.data import column_of, gather_rows, lazy_frame, parse_json, pl, with_polars_types
from batchgen.core.errors import AccountingError, ConfigError, OutputError
from batchgen.core.records import Ranges, Result, RowSet, writable_text
from batchgen.core.runtime import check_file, open_file
from batchgen.storage import LocalStorage, raise_if_not_damage
from batchgen.store.books import Chunk, Part, PartFooter

SEGMENT = "_batchgen_segment"
ROW = "_batchgen_row"
"""The ordinal. In parts only; the published order stands for it."""

RESULT_FIELDS = (
    pa.field("status", pa.string(), nullable=False),
    pa.field("verdict", pa.string(), nullable=False),
    pa.field("finish_reason", pa.string()),
    pa.field("error_type", pa.string()),
    pa.field("error", pa.string()),
    pa.field("attempts", pa.int16(), nullable=False),
    pa.field("seed", pa.int64()),
    pa.field("num_prompt_tokens", pa.int32()),
    pa.field("num_cached_tokens", pa.int32()),
    pa.field("num_output_tokens", pa.int32()),
    pa.field("latency_s", pa.float32()),
    pa.field("request_key", pa.string()),
    pa.field("run_id", pa.string(), nullable=False),
    pa.field("model", pa.string()),
    pa.field("recipe", pa.string(), nullable=False),
    pa.field("engine", pa.string()),
)
"""What batchgen tells of a row beside its answer; the job's prefix goes before each name."""
OPTIONAL = "seed"
"""Only with `output.with_seed`: a column of noise does not compress."""

# Few distinct values: worth a dictionary. Texts and keys are not, and building one costs time.
DICTIONARY_FIELDS = (
    *("status", "verdict", "finish_reason", "error_type", "error", "attempts"),
    *("run_id", "model", "recipe", "engine"),
)


def part_schema(
    carried: pa.Schema, answer: Sequence[pa.Field], prefix: str, *, with_seed: bool = False
) -> pa.Schema:
    """Schema of a part: ordinal, carried columns, answer, result columns.

    Args:
        carried: Columns of the input.
        answer: Columns that answers become, without the prefix.
        prefix: Goes before the name of each column of ours.
        with_seed: Whether seeds are kept.

    Raises:
        ConfigError: Two columns have one name.
    """
    fields = [field for field in RESULT_FIELDS if with_seed or field.name != OPTIONAL]
    _check_answer(answer, fields)
    ours = [field.with_name(prefix + field.name) for field in (*answer, *fields)]
    clash = sorted({SEGMENT, ROW, *(field.name for field in ours)} & set(carried.names))
    if clash:
        where = "output.prefix"
        problem = (
            f"{prefix!r} makes the column {clash[0]!r}, which the input has too; choose another "
            "prefix, or leave the column out of input.columns"
        )
        raise ConfigError(where, [problem])
    # Error rows carry nulls in every carried column, whatever the input's schema allows.
    carried_fields = [field.with_nullable(True) for field in carried]  # noqa: FBT003 - pyarrow's
    ordinal = [
        pa.field(SEGMENT, pa.int32(), nullable=False),
        pa.field(ROW, pa.int64(), nullable=False),
    ]
    return pa.schema([*ordinal, *carried_fields, *ours])


def _check_answer(answer: Sequence[pa.Field], fields: Sequence[pa.Field]) -> None:
    names = [field.name for field in (*answer, *fields)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        where = "output.flatten"
        problem = f"the schema's field {twice[0]!r} is a column of batchgen's too; rename it"
        raise ConfigError(where, [problem])


def published_schema(parts: pa.Schema) -> pa.Schema:
    """Schema of published files: that of parts without the ordinal."""
    return pa.schema([field for field in parts if field.name not in {SEGMENT, ROW}])


def schema_digest(schema: pa.Schema) -> str:
    """What tells whether two snapshots may share files: names, types and order of the columns."""
    text = "\n".join(f"{field.name}: {field.type} {field.nullable}" for field in schema)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def dictionary_columns(prefix: str, labels: Sequence[str] = ()) -> Sequence[str]:
    """Columns for Parquet's dictionary encoding."""
    return [prefix + name for name in (*DICTIONARY_FIELDS, *labels)]


VERDICT, ATTEMPTS = "verdict", "attempts"


def num_unasked(tally: Mapping[str, Mapping[str, int]]) -> int:
    """Count the results that no engine was asked for: not JSON, or without a column."""
    return tally.get(ATTEMPTS, {}).get("0", 0)


def tally(
    table: pa.Table, prefix: str, labels: Sequence[Sequence[str]] = ()
) -> dict[str, dict[str, int]]:
    """Count what is written.

    Args:
        table: Rows in the part schema.
        prefix: Of batchgen's columns.
        labels: Paths to labels: a column without the prefix, and the fields of structs in it.
            A list of labels counts each.

    Returns:
        As above. A label column that has no label in any row has no counts.
    """
    found = {
        name: _counts(table.column(prefix + name))
        for name in (VERDICT, ATTEMPTS)
        if prefix + name in table.column_names
    }
    if labels:
        is_ok = pc.equal(table.column(f"{prefix}status"), "ok")
        for path in labels:
            values = label_column(table, prefix + path[0], path[1:]).filter(is_ok)
            found[prefix + ".".join(path)] = _counts(values)
    return found


def label_column(table: pa.Table, name: str, path: Sequence[str]) -> pa.ChunkedArray:
    """A column, or a field of a struct. By index: names may hold dots, or be empty."""
    column = table.column(name)
    for at in path:
        column = pc.struct_field(column, column.type.get_field_index(at))
    return column


def _counts(values: pa.ChunkedArray) -> dict[str, int]:
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        values = pc.list_flatten(values)
    counted = pc.value_counts(values.drop_null()).to_pylist()
    return {str(entry["values"]): entry["counts"] for entry in counted}


# Publishing reads parts by row group: small enough that a straggler does not drag a whole part.
_ROW_GROUP_ROWS = 4096


@dataclass(frozen=True, slots=True)
class PartContext:
    """What all parts of one run share."""

    plan_id: str
    epoch: int
    worker: int
    run_id: str
    schema: pa.Schema
    prefix: str
    num_answer_columns: int = 1
    origin: Mapping[str, str] = field(default_factory=dict)
    """`model` and `recipe`, for the columns of these names."""
    labels: Sequence[Sequence[str]] = ()
    """Paths to labels: an answer column without the prefix, and the fields of structs in it."""
    with_seed: bool = False
    """Whether the schema has the seeds' column."""


class PartWriter:
    """Commits parts of one worker in one epoch, numbered from 0."""

    def __init__(self, storage: LocalStorage, folder: str, context: PartContext) -> None:
        """Bind; nothing is written yet."""
        self._storage = storage
        self._folder = folder
        self._context = context
        self._serial = 0

    def commit(
        self,
        results: Sequence[Result],
        skipped: Mapping[int, Ranges],
        engine: Mapping[str, str],
    ) -> Part:
        """Make a part durable.

        Args:
            results: At least one, or none if `skipped` has rows; any order.
            skipped: Segment -> rows that end without a result.
            engine: Who answered, for the footer.

        Raises:
            StorageError: Not durable; the same call may be made again.
            AccountingError: The part's name holds something else.
        """
        ordered = sorted(results, key=attrgetter("ordinal"))
        return self.commit_table(_table(ordered, self._context, engine), skipped, engine)

    def commit_table(
        self, table: pa.Table, skipped: Mapping[int, Ranges], engine: Mapping[str, str]
    ) -> Part:
        """Make results durable that are a table in the part schema, in ordinal order.

        Raises:
            StorageError: Not durable; the same call may be made again.
            AccountingError: The part's name holds something else.
        """
        context, skipped = self._context, RowSet(skipped)
        name = (
            f"{self._folder}/e{context.epoch:06d}-w{context.worker:02d}-s{self._serial:06d}.parquet"
        )
        status = table.column(f"{context.prefix}status")
        num_ok = pc.sum(pc.equal(status, "ok")).as_py() or 0
        footer = PartFooter(
            plan=context.plan_id,
            epoch=context.epoch,
            run_id=context.run_id,
            done=rows_of(table) | skipped,
            num_ok=num_ok,
            num_errors=table.num_rows - num_ok,
            num_skipped=skipped.num_rows,
            engine=engine,
            tally=tally(table, context.prefix, context.labels),
        )
        data = _encode(table, footer, context)
        if not self._storage.put_if_absent(name, data):
            # Epochs are exclusive, so nobody else writes this name; silence would lose rows.
            msg = f"{self._storage.where}/{name}: holds other rows than this run's; run again"
            raise AccountingError(msg)
        self._serial += 1
        return Part(name, footer)


def rows_of(table: pa.Table) -> RowSet:
    """Segment -> row numbers of a table with ordinals."""
    if not table.num_rows:
        return RowSet()
    ordinals = pl.DataFrame(
        {"segment": pl.Series(table.column(SEGMENT)), "row": pl.Series(table.column(ROW))}
    ).sort("segment", "row")
    starts = ordinals.with_row_index("at").filter(
        ((pl.col("row").diff() != 1) | (pl.col("segment").diff() != 0)).fill_null(value=True)
    )
    stops = [*starts["at"][1:], len(ordinals)]
    places = zip(starts["at"], stops, starts["segment"], starts["row"], strict=True)
    return RowSet.of_spans((segment, row, row + stop - at) for at, stop, segment, row in places)


def check_rows(tables: Iterable[pa.Table], footer: PartFooter, *, is_all: bool = True) -> RowSet:
    """Segment -> rows of a part's tables, which are results that its footer names, each once.

    Args:
        tables: Row groups of the part.
        footer: Its own books.
        is_all: Whether these are all of its row groups.

    Raises:
        ValueError: They are not.
    """
    seen, num_rows = RowSet(), 0
    for table in tables:
        num_rows += table.num_rows
        seen |= rows_of(table)
    if seen.num_rows != num_rows:
        raise ValueError("holds a row twice")
    if seen - footer.done:
        raise ValueError("holds a row that its footer does not name")
    if is_all and num_rows != footer.num_results:
        raise ValueError(f"holds {num_rows} rows, its footer says {footer.num_results}")
    return seen


def _table(ordered: Sequence[Result], context: PartContext, engine: Mapping[str, str]) -> pa.Table:
    """One row a result: ordinal, carried columns, answer, result columns, in the part schema."""
    schema = context.schema
    facts = _fact_columns(ordered, context, engine)
    if not context.with_seed:
        del facts[OPTIONAL]
    num_carried = len(schema) - 2 - context.num_answer_columns - len(facts)
    carried = [field.name for field in list(schema)[2 : 2 + num_carried]]
    columns: list[Any] = [
        [result.ordinal.segment for result in ordered],
        [result.ordinal.row for result in ordered],
        *_carried_columns(ordered, carried, schema),
        *(
            [None if r.values is None else r.values[at] for r in ordered]
            for at in range(context.num_answer_columns)
        ),
        *facts.values(),
    ]
    arrays = [
        column if isinstance(column, pa.ChunkedArray | pa.Array) else column_of(column, kind.type)
        for column, kind in zip(columns, schema, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _fact_columns(
    ordered: Sequence[Result], context: PartContext, engine: Mapping[str, str]
) -> dict[str, Any]:
    """The columns of `RESULT_FIELDS`, in that order."""
    completions = [result.completion for result in ordered]
    errors = [result.error for result in ordered]

    def repeated(value: str | None) -> pa.Array:
        return pa.repeat(pa.scalar(value, pa.string()), len(ordered))

    by = f"{engine['engine']} {engine['version']}" if "engine" in engine else None
    return {
        "status": ["ok" if e is None else "error" for e in errors],
        "verdict": [result.verdict for result in ordered],
        "finish_reason": [c and c.finish_reason for c in completions],
        "error_type": [e and e.error_type for e in errors],
        "error": [e and e.error for e in errors],
        "attempts": [result.attempts for result in ordered],
        "seed": [result.seed for result in ordered],
        "num_prompt_tokens": [c and c.num_prompt_tokens for c in completions],
        "num_cached_tokens": [c and c.num_cached_tokens for c in completions],
        "num_output_tokens": [c and c.num_output_tokens for c in completions],
        "latency_s": [c and c.latency_s for c in completions],
        "request_key": [result.request_key for result in ordered],
        "run_id": repeated(context.run_id),
        "model": repeated(context.origin.get("model")),
        "recipe": repeated(context.origin.get("recipe", "")),
        # Who was never asked has not answered, whatever happened to run at that time.
        "engine": [by if result.attempts else None for result in ordered],
    }


def _carried_columns(
    ordered: Sequence[Result], names: Sequence[str], schema: pa.Schema
) -> list[pa.ChunkedArray]:
    if not ordered or not names:
        return [pa.chunked_array([], schema.field(name).type) for name in names]
    places = [(result.batch.carried, result.index) for result in ordered]
    return gather_rows(places, names, copy=False)


def _encode(table: pa.Table, footer: PartFooter, context: PartContext) -> bytes:
    sink = io.BytesIO()
    metadata = {**(table.schema.metadata or {}), **footer.to_metadata()}
    pq.write_table(
        table.replace_schema_metadata(metadata),
        sink,
        compression="lz4",
        row_group_size=_ROW_GROUP_ROWS,
        use_dictionary=dictionary_columns(
            context.prefix, [".".join(path) for path in context.labels]
        ),
        write_page_checksum=True,
    )
    return sink.getvalue()


GROUPS_KEY = "batchgen.groups"
"""In the footer of a published file: its row groups as `Chunk`s. Of version 1: in the index."""
OTHER_BYTES = "its bytes are not those that were published"
# A flipped bit in a footer that has no checksum may also be in a name, or in a type.
_READ_ERRORS = (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError, KeyError, TypeError)


class ResultFile:
    """One file, opened with the first read; a context manager."""

    def __init__(self, path: Path, chunks: Sequence[Chunk] = ()) -> None:
        """Bind; nothing is read yet.

        Args:
            path: The file.
            chunks: Of a published file: its row groups in order, and last its footer; or what
                proves the footer alone, see `PublishedFile.chunks`.
        """
        self.path = path
        self.problem: str | None = None
        """Why something that was asked for is damaged; None while all is well."""
        self._chunks = chunks
        self._file: pq.ParquetFile | None = None

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close(force=True)
            self._file = None

    @property
    def footer(self) -> pq.FileMetaData | None:
        """What the file says of itself; None if it is damaged.

        Raises:
            StorageError: It cannot be read right now.
        """
        with self._noting_damage():
            return self._opened().metadata
        return None

    @property
    def metadata(self) -> Mapping[bytes, bytes]:
        """Keys and values of the footer; empty if it is damaged."""
        footer = self.footer
        return (footer and footer.metadata) or {}

    @property
    def column_names(self) -> Sequence[str]:
        """Names of the columns; none if the footer is damaged."""
        with self._noting_damage():
            return list(self._opened().schema_arrow.names)
        return ()

    @property
    def num_groups(self) -> int:
        """Row groups; 0 if the footer is damaged."""
        footer = self.footer
        return footer.num_row_groups if footer is not None else 0

    def group(
        self, number: int, columns: Sequence[str] | None = None, *, is_proven: bool = True
    ) -> pa.Table | None:
        """A row group; None if it is damaged.

        Args:
            number: Which one.
            columns: In this order; None: all.
            is_proven: False: page checksums are enough, since the rows are read again before
                anybody believes them; and one thread, as some columns of many rows are read, and
                each thread keeps memory of its own.

        Raises:
            StorageError: It cannot be read right now.
        """
        with self._noting_damage():
            file = self._opened()
            if is_proven and self._chunks and not is_whole(self.path, self._chunks, number):
                raise pa.ArrowInvalid(OTHER_BYTES)
            names = columns and list(columns)
            table = file.read_row_group(number, columns=names, use_threads=is_proven)
            if columns is None:
                return table
            if missing := set(columns) - set(table.column_names):
                msg = f"lacks the columns {sorted(missing)}"
                raise pa.ArrowInvalid(msg)
            return table.select(columns)
        return None

    def groups(
        self, columns: Sequence[str] | None = None, *, is_proven: bool = True
    ) -> Iterator[tuple[int, pa.Table]]:
        """Yield number and rows of each row group that is whole, see `group`."""
        for number in range(self.num_groups):
            table = self.group(number, columns, is_proven=is_proven)
            if table is not None:
                yield number, table

    def _opened(self) -> pq.ParquetFile:
        if self._file is None:
            is_all = not self._chunks or self.path.stat().st_size == self._chunks[-1].end
            if not is_all or (self._chunks and not is_whole(self.path, self._chunks, -1)):
                raise pa.ArrowInvalid(OTHER_BYTES)
            self._file = _parquet_file(self.path, page_checksum_verification=True)
            if self._chunks and not self._chunks[0].sha256:
                told = (self._file.metadata.metadata or {})[GROUPS_KEY.encode()]
                self._chunks = [*(Chunk(*one) for one in parse_json(told)), self._chunks[-1]]
        return self._file

    @contextmanager
    def _noting_damage(self) -> Iterator[None]:
        try:
            yield
        except _READ_ERRORS as error:
            raise_if_not_damage(self.path, error)
            self.problem = self.problem or str(error).splitlines()[0]


def _parquet_file(path: Path, **options: Any) -> pq.ParquetFile:  # noqa: ANN401 - pyarrow's
    """Open a file by its name or, as pyarrow takes only UTF-8, by a file that is open already."""
    check_file(path)
    return pq.ParquetFile(path.open("rb") if _is_odd(path) else path, **options)


@contextmanager
def _reading(path: Path) -> Iterator[pq.ParquetFile]:
    file = _parquet_file(path)
    try:
        yield file
    finally:
        file.close(force=True)


def _is_odd(path: Path) -> bool:
    return writable_text(str(path)) != str(path)


def scan(storage: LocalStorage, names: Sequence[str]) -> pl.LazyFrame:
    """Rows of files as they lie on the disk, for views: damage is not looked for.

    Columns of types that polars lacks have its own types, see `core.data.with_polars_types`.
    Collecting them raises a PolarsError or an OSError where a file cannot be read.

    Raises:
        OutputError: A column can be shown to polars in no type.
    """
    paths = [storage.path(name) for name in (names if storage.is_plain else names[:1])]

    def batches(num_rows: int) -> Iterator[pa.RecordBatch]:
        for name in names:  # Of an object store they are fetched as they are read.
            with _reading(storage.path(name)) as file:
                yield from file.iter_batches(num_rows)

    try:
        for path in paths:
            check_file(path)
        with _reading(paths[0]) as file:
            schema = file.schema_arrow
        if not storage.is_plain or _is_odd(paths[0]) or schema != with_polars_types(schema):
            return lazy_frame(schema, batches)
    except pa.ArrowNotImplementedError as error:
        msg = f"{paths[0]}: {error}; read the file with pyarrow, or leave the column out"
        raise OutputError(msg) from error
    except (OSError, pa.ArrowException) as error:
        raise_if_not_damage(paths[0], error)  # Else it is told when rows are read.
    return pl.scan_parquet(paths, glob=False)


def is_whole(path: Path, chunks: Sequence[Chunk], number: int) -> bool:
    """Whether one chunk of a file is still what was written. Reads the chunk.

    Args:
        path: The file.
        chunks: All of the file's, in order.
        number: Which one; -1 is the footer.

    Raises:
        OSError: It cannot be read.
    """
    at = number % len(chunks)
    start = chunks[at - 1].end if at else 0
    with open_file(path) as file:
        file.seek(start)
        data = file.read(chunks[at].end - start)
    return hashlib.sha256(data).hexdigest() == chunks[at].sha256
