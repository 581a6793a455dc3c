"""Snapshots: written of parts, every result once, in input order, with their index.

Memory is bounded by one chunk of rows and by what overlaps it: parts are sorted by ordinal and
their footers name the rows that they hold, so each chunk reads the row groups that it needs.

The files are hashed while they are written, as a whole and by row group: the whole file's hash
proves it, a row group's says what can still be believed of a file that has been damaged since. Page
checksums alone do not: they leave page headers and the footer out.

The index says what the published files do not: which row of the input each row is, and the hash
of each row group. It has the row groups of all files, one by one, in order.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen.core.data import keep_rows, parse_json, take_rows, vector_encodings
from batchgen.core.errors import AccountingError, DamagedPartError, OutputError
from batchgen.core.records import Ranges
from batchgen.core.runtime import command, option
from batchgen.storage import saying_where
from batchgen.store.books import PublishedFile
from batchgen.store.result_files import (
    GROUPS_KEY,
    ROW,
    SEGMENT,
    Chunk,
    ResultFile,
    dictionary_columns,
    published_schema,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from batchgen.storage import LocalStorage, PendingFile
    from batchgen.store.books import Manifest, PartFooter
    from batchgen.store.ledger import Ledger


class HashedParquet:
    """Writes one file under its name; a context manager, and nothing is there until it is left."""

    def __init__(
        self,
        storage: LocalStorage,
        name: str,
        schema: pa.Schema,
        options: Mapping[str, Any],
    ) -> None:
        """Begin.

        Args:
            storage: Where the file goes.
            name: Its name; must not exist.
            schema: With the metadata for the footer.
            options: For `pq.ParquetWriter`.

        Raises:
            StorageError: The temp file cannot be created.
        """
        self._name = name
        self._schema = schema
        self._pending = storage.begin(name)
        self._out = _HashedFile(self._pending)
        self._writer = pq.ParquetWriter(self._out, schema, write_page_checksum=True, **options)
        self.num_rows = 0
        self.chunks: list[Chunk] = []
        """One a row group and, once the file is complete, one for the footer."""

    def __enter__(self) -> HashedParquet:
        return self

    def write(self, rows: pa.Table) -> None:
        """Append a row group."""
        self._writer.write_table(rows.select(self._schema.names).cast(self._schema))
        self.num_rows += rows.num_rows
        self.chunks.append(self._out.cut())

    def note(self, metadata: Mapping[str, str]) -> None:
        """Add to the footer what was not known at the beginning."""
        self._writer.add_key_value_metadata(dict(metadata))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Closing writes a valid footer, also after an error: only `commit` makes a file of it.
        try:
            self._writer.close()
            self.chunks.append(self._out.cut())
        except BaseException:
            self._pending.discard()
            raise
        if kind is None:
            self._pending.commit()
        else:
            self._pending.discard()

    def entry(self) -> PublishedFile:
        """The file's line in the manifest."""
        out = self._out
        return PublishedFile(self._name, self.num_rows, out.size_bytes, out.digest.hexdigest())


class _HashedFile(io.RawIOBase):
    """What pyarrow's writer writes to, hashing what passes; its pending file outlives its end."""

    def __init__(self, pending: PendingFile) -> None:
        super().__init__()
        self._pending = pending
        self._since_cut = hashlib.sha256()
        self.digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: Any) -> int:  # noqa: ANN401 - bytes or a buffer of pyarrow's
        """Append."""
        self._pending.write(data)
        self.digest.update(data)
        self._since_cut.update(data)
        self.size_bytes += len(data)
        return len(data)

    def cut(self) -> Chunk:
        """End a chunk."""
        digest, self._since_cut = self._since_cut, hashlib.sha256()
        return Chunk(self.size_bytes, digest.hexdigest())

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size_bytes

    def writable(self) -> bool:
        """Written only."""
        return True


# Rows read, sorted and written at once: a row group of what is published.
_CHUNK_ROWS = 16_384
_CHUNK_BYTES = 8 * 2**20
_ORDER_STEP = 1000
"""So far apart are the places of files, so that later ones fit in between."""

INDEX_SCHEMA = pa.schema(
    [
        pa.field(SEGMENT, pa.int32(), nullable=False),
        pa.field(ROW, pa.int64(), nullable=False),
    ]
)
INDEX_OPTIONS = {
    "compression": "zstd",
    "use_dictionary": False,
    "column_encoding": dict.fromkeys((SEGMENT, ROW), "DELTA_BINARY_PACKED"),
}


@dataclass(frozen=True, slots=True)
class SnapshotFormat:
    """How the published files are written."""

    schema: pa.Schema
    """Schema of the parts, ordinal included."""
    prefix: str
    compression: str
    rows_per_file: int
    metadata: Mapping[bytes, bytes]
    """Entries of every footer: job, recipe, versions."""
    labels: Sequence[str] = ()
    """Columns with few distinct values, without the prefix."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was written."""

    files: list[PublishedFile]
    index: PublishedFile


def write_snapshot(
    storage: LocalStorage,
    folder: str,
    parts: Sequence[tuple[str, PartFooter]],
    form: SnapshotFormat,
) -> Snapshot:
    """Write all results of `parts` under `folder`, in input order.

    Args:
        storage: Where parts are and files go.
        folder: Must be this run's own: nobody else writes there.
        parts: Accepted parts and their footers; their ordinals are disjoint.
        form: How to write.

    Returns:
        The entries of the files, in order, and of the index. A job without a row has one file
        with the schema and no rows.

    Raises:
        StorageError: A write failed; nothing is published by it.
        DamagedPartError: A part's bytes are not what was written.
        AccountingError: Two parts hold the same row.
    """
    schema = published_schema(form.schema).with_metadata(dict(form.metadata))
    options = {
        "compression": form.compression,
        "use_dictionary": dictionary_columns(form.prefix, form.labels),
        "column_encoding": vector_encodings(schema),
    }
    files: list[PublishedFile] = []
    groups: list[list[Chunk]] = []
    with (
        saying_where(storage.path(folder)),
        _open(storage, f"{folder}/index.parquet", INDEX_SCHEMA, INDEX_OPTIONS) as index,
    ):
        chunks = _chunks(storage, parts, form.schema)
        chunk: pa.Table | None = next(chunks, None)
        while chunk is not None or not files:
            name = f"{folder}/part-{len(files):05d}.parquet"
            with _open(storage, name, schema, options) as file:
                while chunk is not None and file.num_rows < form.rows_per_file:
                    room = form.rows_per_file - file.num_rows
                    rows = chunk.slice(0, room)
                    file.write(rows)
                    index.write(rows)
                    chunk = chunk.slice(room) if chunk.num_rows > room else next(chunks, None)
            order = _ORDER_STEP * (len(files) + 1)
            files.append(replace(file.entry(), order=order))
            groups.append(file.chunks)
        index.note({GROUPS_KEY: json.dumps(groups)})
    return Snapshot(files, index.entry())


def _open(
    storage: LocalStorage, name: str, schema: pa.Schema, options: Mapping[str, Any]
) -> HashedParquet:
    storage.remove(name)  # Left by an earlier try of this very run.
    return HashedParquet(storage, name, schema, options)


def _chunks(
    storage: LocalStorage, parts: Sequence[tuple[str, PartFooter]], schema: pa.Schema
) -> Iterator[pa.Table]:
    """Yield all results in ordinal order, so many at a time as fit into memory with ease."""
    readers = [_PartReader(storage, name, footer) for name, footer in parts]
    chunk_rows = _chunk_rows(readers)
    held: list[pa.Table] = []
    # Of small files many together: a row group for each would be slow to read.
    for chunk in _in_turn(readers, chunk_rows, schema):
        held.append(chunk)
        if sum(table.num_rows for table in held) >= chunk_rows:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)
    for reader in readers:
        reader.check_all_read()


def _in_turn(
    readers: Sequence[_PartReader], chunk_rows: int, schema: pa.Schema
) -> Iterator[pa.Table]:
    """Yield the results, segment by segment, at most `chunk_rows` of one at a time."""
    for segment in sorted({seg for reader in readers for seg in reader.footer.done}):
        here = [reader for reader in readers if segment in reader.footer.done]
        stop = max(reader.footer.done[segment].spans[-1][1] for reader in here)
        for start in range(0, stop, chunk_rows):
            stop_row = start + chunk_rows
            tables = [
                reader.rows(segment, start, stop_row)
                for reader in here
                if reader.overlaps(segment, start, stop_row)
            ]
            found = [table for table in tables if table.num_rows]
            if found:
                chunk = pa.concat_tables(found) if len(found) > 1 else found[0]
                yield _in_order(chunk.cast(schema))


def _chunk_rows(readers: Sequence[_PartReader]) -> int:
    """How many rows have `_CHUNK_BYTES`, on average of the parts with the widest rows."""
    widest = max((reader.row_bytes for reader in readers), default=1.0)
    return int(min(max(_CHUNK_BYTES / max(widest, 1.0), 1), _CHUNK_ROWS))


def _in_order(chunk: pa.Table) -> pa.Table:
    if not _is_ascending(chunk):
        chunk = take_rows(chunk, pc.sort_indices(chunk.column(ROW)))
        if not _is_ascending(chunk):
            msg = "two accepted parts hold the same row; not published"
            raise AccountingError(msg)
    return chunk


def _is_ascending(chunk: pa.Table) -> bool:
    rows = chunk.column(ROW).combine_chunks()
    return bool(pc.all(pc.greater(rows[1:], rows[:-1]), min_count=0).as_py())


class _PartReader:
    """Reads rows of one part by ordinal; the file is open only while it is read."""

    def __init__(self, storage: LocalStorage, name: str, footer: PartFooter) -> None:
        self.footer = footer
        self._name = name
        self._path = storage.path(name)
        self._groups: list[tuple[int, _Group]] | None = None
        self._num_read = 0
        self._row_bytes = 0.0

    @property
    def row_bytes(self) -> float:
        """Bytes that a row takes, not compressed; 0 without a row.

        Raises:
            DamagedPartError: The part is not what was written.
            StorageError: It cannot be read right now.
        """
        self._row_groups()
        return self._row_bytes

    def overlaps(self, segment: int, start: int, stop: int) -> bool:
        """Whether the part may hold rows with `start <= row < stop`; cheap, from the footer."""
        spans = self.footer.done[segment].spans
        return spans[0][0] < stop and spans[-1][1] > start

    def rows(self, segment: int, start: int, stop: int) -> pa.Table:
        """Results with `start <= row < stop`.

        Raises:
            DamagedPartError: The part is not what was written.
            StorageError: It cannot be read right now.
        """
        wanted = [
            at
            for at, group in self._row_groups()
            if group.first < (segment, stop) and group.last >= (segment, start)
        ]
        if not wanted:
            return pa.table({})
        table = self._read(wanted)
        row = table.column(ROW)
        here = pc.and_(pc.greater_equal(row, start), pc.less(row, stop))
        here = pc.and_(pc.equal(table.column(SEGMENT), segment), here)
        table = keep_rows(table, here)
        if Ranges.of(table.column(ROW).to_pylist()) - self.footer.done[segment]:
            raise DamagedPartError(self._name, "holds a row that its footer does not name")
        self._num_read += table.num_rows
        return table

    def _read(self, groups: Sequence[int]) -> pa.Table:
        with ResultFile(self._path) as file:
            tables = [table for at in groups if (table := file.group(at)) is not None]
            self._check(file)
        return pa.concat_tables(tables)

    def _row_groups(self) -> list[tuple[int, _Group]]:
        """Number and extent of each row group, from the footer's statistics."""
        if self._groups is None:
            with ResultFile(self._path) as file:
                metadata = file.footer
                self._check(file)
            assert metadata is not None  # noqa: S101 - else it is damaged
            groups = ((at, metadata.row_group(at)) for at in range(metadata.num_row_groups))
            found = [(at, group) for at, group in groups if group.num_rows]
            self._groups = [(at, _extent(group)) for at, group in found]
            num_bytes = sum(group.total_byte_size for _, group in found)
            self._row_bytes = num_bytes / max(metadata.num_rows, 1)
        return self._groups

    def _check(self, file: ResultFile) -> None:
        if file.problem is not None:
            raise DamagedPartError(self._name, file.problem)

    def check_all_read(self) -> None:
        """Every result must have been taken exactly once.

        Raises:
            DamagedPartError: The part lacks rows that its footer counts.
        """
        if self._num_read != self.footer.num_results:
            problem = f"gave {self._num_read} rows, its footer says {self.footer.num_results}"
            raise DamagedPartError(self._name, problem)


class _Group(NamedTuple):
    """First and last ordinal of a row group."""

    first: tuple[int, int]
    last: tuple[int, int]


def _extent(group: pq.RowGroupMetaData) -> _Group:
    segments, rows = group.column(0).statistics, group.column(1).statistics
    if segments.min != segments.max:
        # Two segments in one group: their row numbers are not ordered together.
        return _Group((segments.min, 0), (segments.max, 2**62))
    return _Group((segments.min, rows.min), (segments.max, rows.max))


class Index:
    """Which row of the input each published row is, by row group; a context manager."""

    def __init__(self, storage: LocalStorage, manifest: Manifest) -> None:
        """Open and check it.

        Raises:
            OutputError: There is none, or it is not what was written.
            StorageError: It cannot be read right now.
        """
        if manifest.index is None:
            msg = f"{storage.where}: its snapshot has no index of rows; use {option('--fresh')}"
            raise OutputError(msg)
        path = storage.path(manifest.index.name)
        self._storage = storage
        self._files = manifest.files
        self._file = ResultFile(path)
        if not manifest.index.is_intact(path):
            why = "sha256 differs"
            raise self._damaged(why)
        groups = parse_json(self._file.metadata.get(GROUPS_KEY.encode(), b"[]"))
        self.chunks = [[Chunk(*chunk) for chunk in chunks] for chunks in groups]
        """For each published file, its row groups and last its footer."""

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def files(self) -> Iterator[tuple[PublishedFile, ResultFile, range]]:
        """Yield each published file, and the numbers of its row groups, counted over all files."""
        first = 0
        for entry, chunks in zip(self._files, self.chunks, strict=True):
            with ResultFile(self._storage.path(entry.name), chunks) as file:
                yield entry, file, range(first, first + len(chunks) - 1)
            first += len(chunks) - 1

    def ordinals(self, group: int) -> pa.Table:
        """Segments and rows of one published row group, counted over all files."""
        table = self._file.group(group)
        if table is None:
            raise self._damaged(str(self._file.problem))
        return table

    def _damaged(self, why: str) -> OutputError:
        return OutputError(
            f"{self._file.path}: damaged ({why}), and without it rows cannot be told apart; bring "
            f"it back from a backup, or begin anew with {option('--fresh')}"
        )


def row_groups(
    storage: LocalStorage, manifest: Manifest | None
) -> Iterator[tuple[ResultFile, int, Callable[[], pa.Table]]]:
    """Yield each row group of a snapshot: its file, its number in it, and what reads its ordinals.

    Raises:
        OutputError: There is no index of rows, or it is damaged.
        StorageError: The index cannot be read right now.
    """
    if manifest is None:
        return
    with Index(storage, manifest) as index:
        for _, file, numbers in index.files():
            for group, number in enumerate(numbers):
                yield file, group, partial(index.ordinals, number)


def find_snapshot(ledger: Ledger, number: int | None) -> Manifest:
    """A snapshot by number; None: the newest.

    Raises:
        OutputError: There is none, or not that one; the text says which there are.
    """
    manifest = ledger.latest_manifest() if number is None else ledger.manifest(number)
    if manifest is not None:
        return manifest
    numbers = ", ".join(str(manifest.number) for manifest in ledger.manifests())
    if numbers:
        msg = f"{ledger.storage.where}: there is no snapshot {number}, expected one of: {numbers}"
    else:
        msg = (
            f"{ledger.storage.where}: nothing is published here; "
            f"`{command('status')}` tells how far the job is"
        )
    raise OutputError(msg)
