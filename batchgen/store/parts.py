"""Parts read in ordinal order, whatever was in which: for publishing.

Memory is bounded by one chunk of rows and by what overlaps it: the rows of a part are sorted by
ordinal, and its footer names them, so each chunk reads the row groups that it needs. A row group
that reaches into the next chunk is not read again, while there is room for it.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.core.data import keep_rows, take_rows
from batchgen.core.errors import AccountingError, DamagedPartError
from batchgen.core.records import Ranges
from batchgen.store.result_files import ROW, SEGMENT, ResultFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import pyarrow.parquet as pq

    from batchgen.storage import LocalStorage
    from batchgen.store.books import PartFooter, Places

# Rows read, sorted and written at once: a row group of what is published.
_CHUNK_ROWS = 16_384
_CHUNK_BYTES = 8 * 2**20
_HELD_BYTES = 32 * 2**20
"""Of row groups that have been read, the last ones: each reaches into two or three chunks."""

PUBLISHED_SHARE = 0.7
"""How large a published file is, of the parts that it is written of: it is compressed better."""


class Parts:
    """The parts of a plan, to be read in ordinal order."""

    def __init__(
        self, storage: LocalStorage, parts: Sequence[tuple[str, PartFooter]], schema: pa.Schema
    ) -> None:
        """Bind; nothing is read yet.

        Args:
            storage: Where they are.
            parts: Accepted parts and their footers; their ordinals are disjoint.
            schema: Theirs.
        """
        self.storage = storage
        self._schema = schema
        held: _Held = {}
        self._readers = [_PartReader(storage, name, footer, held) for name, footer in parts]

    def chunks(self, spans: Iterable[tuple[int, int, int]]) -> Iterator[pa.Table]:
        """Yield results in ordinal order, so many at a time as fit into memory with ease.

        Args:
            spans: Which rows: segment, first row, row after the last.

        Raises:
            DamagedPartError: A part is not what was written.
            StorageError: It cannot be read right now.
            AccountingError: Two parts hold the same row.
        """
        held: list[pa.Table] = []
        num_rows = 0
        # Of small files many together: a row group for each would be slow to read.
        for segment, start, stop in spans:
            here = [one for one in self._readers if one.overlaps(segment, start, stop)]
            chunk_rows = _chunk_rows(here)
            for table in self._in_turn(here, segment, range(start, stop, chunk_rows), stop):
                held.append(table)
                num_rows += table.num_rows
                if num_rows >= chunk_rows:
                    yield pa.concat_tables(held)
                    held, num_rows = [], 0
        if held:
            yield pa.concat_tables(held)

    def _in_turn(
        self, readers: Sequence[_PartReader], segment: int, starts: range, stop: int
    ) -> Iterator[pa.Table]:
        for start in starts:
            end = min(start + starts.step, stop)
            tables = [
                reader.rows(segment, start, end)
                for reader in readers
                if reader.overlaps(segment, start, end)
            ]
            found = [table for table in tables if table.num_rows]
            if found:
                chunk = pa.concat_tables(found) if len(found) > 1 else found[0]
                yield _in_order(chunk.cast(self._schema))

    def within(self, places: Places, span: tuple[int, int]) -> Parts:
        """Return those that have rows at positions of a span, for another process to read."""
        spans = list(places.spans(*span))
        here = [
            (reader.name, reader.footer)
            for reader in self._readers
            if any(reader.overlaps(*rows) for rows in spans)
        ]
        return Parts(self.storage, here, self._schema)

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(reader.size_bytes for reader in self._readers)

    @property
    def num_read(self) -> dict[str, int]:
        """Name of a part -> results that were read of it."""
        return {reader.name: reader.num_read for reader in self._readers}

    def check_all_read(self, num_read: Mapping[str, int] | None = None) -> None:
        """Every result must have been taken exactly once.

        Args:
            num_read: Where several have read, the sums of theirs.

        Raises:
            DamagedPartError: A part lacks rows that its footer counts.
        """
        told = self.num_read if num_read is None else num_read
        for reader in self._readers:
            reader.check_all_read(told.get(reader.name, 0))

    def sizes(self, places: Places) -> Sizes:
        """Return how many bytes a published file of their rows has, estimated."""
        found: list[tuple[int, int, float]] = []
        for reader in self._readers:
            done = reader.footer.done
            row_bytes = PUBLISHED_SHARE * reader.size_bytes / max(done.num_rows, 1)
            for segment, first, stop in done.spans():
                before = places.starts[segment]
                found.append((before + first, before + stop, row_bytes))
        return Sizes(sorted(found))


class Sizes:
    """Bytes of the rows of a plan by their position."""

    def __init__(self, spans: Sequence[tuple[int, int, float]]) -> None:
        """Add up.

        Args:
            spans: In order: first position, the one after the last, bytes of a row.
        """
        self._spans = spans
        self._starts = [start for start, _, _ in spans]
        self._sums = [0.0, *accumulate((stop - start) * size for start, stop, size in spans)]

    def until(self, position: int) -> float:
        """Return the bytes of all rows before a position."""
        at = bisect_right(self._starts, position) - 1
        if at < 0:
            return 0.0
        start, stop, size = self._spans[at]
        return self._sums[at] + (min(position, stop) - start) * size

    def position(self, num_bytes: float) -> int:
        """Return the position before which there are so many bytes."""
        at = min(max(bisect_right(self._sums, num_bytes) - 1, 0), len(self._spans) - 1)
        start, stop, size = self._spans[at]
        return min(start + int((num_bytes - self._sums[at]) / max(size, 1e-9)), stop)


def _chunk_rows(readers: Sequence[_PartReader]) -> int:
    """How many rows have `_CHUNK_BYTES`, on average of the parts with the widest rows."""
    widest = max((reader.row_bytes for reader in readers), default=1.0)
    return int(min(max(_CHUNK_BYTES / max(widest, 1.0), 1), _CHUNK_ROWS))


def _in_order(chunk: pa.Table) -> pa.Table:
    if not _is_ascending(chunk):
        chunk = take_rows(chunk, pc.sort_indices(chunk.column(ROW)))
        if not _is_ascending(chunk):
            raise AccountingError("two accepted parts hold the same row; not published")
    return chunk


def _is_ascending(chunk: pa.Table) -> bool:
    rows = chunk.column(ROW).combine_chunks()
    return bool(pc.all(pc.greater(rows[1:], rows[:-1]), min_count=0).as_py())


_Held = dict[tuple[str, int], pa.Table]
"""Row groups by their part and number, the latest last."""


class _PartReader:
    """Reads rows of one part by ordinal; the file is open only while it is read."""

    def __init__(self, storage: LocalStorage, name: str, footer: PartFooter, held: _Held) -> None:
        self.footer = footer
        self._held = held
        self.name = name
        self._path = storage.path(name)
        self._groups: list[tuple[int, _Group]] | None = None
        self.num_read = 0
        self._row_bytes = 0.0

    @property
    def size_bytes(self) -> int:
        """Of the file; 0 if it is gone, which is told when it is read."""
        return self._path.stat().st_size if self._path.is_file() else 0

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
        return next(self.footer.done[segment].within(start, stop), None) is not None

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
            raise DamagedPartError(self.name, "holds a row that its footer does not name")
        self.num_read += table.num_rows
        return table

    def _read(self, groups: Sequence[int]) -> pa.Table:
        held, keys = self._held, [(self.name, at) for at in groups]
        with ResultFile(self._path) as file:
            for key in keys:
                table = held.pop(key) if key in held else file.group(key[1])
                self._check(file)
                held[key] = table
            tables = [held[key] for key in keys]
        while sum(table.nbytes for table in held.values()) > _HELD_BYTES:
            del held[next(iter(held))]
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
            raise DamagedPartError(self.name, file.problem)

    def check_all_read(self, num_read: int) -> None:
        if num_read != self.footer.num_results:
            problem = f"gave {num_read} rows, its footer says {self.footer.num_results}"
            raise DamagedPartError(self.name, problem)


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
