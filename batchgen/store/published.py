"""Published rows, read back to be taken over by a later plan under its ordinals.

Of a damaged file those row groups are believed whose bytes have the hash that the index keeps.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.core.errors import OutputError
from batchgen.core.ranges import Ranges
from batchgen.storage import raise_if_not_damage
from batchgen.store.books import NO_ROWS
from batchgen.store.carry import READ_ERRORS, Piece
from batchgen.store.hashed import Chunk, is_as_published, is_whole
from batchgen.store.publish import GROUPS_KEY, INDEX_SCHEMA
from batchgen.store.renumber import common_rows, rows_of
from batchgen.store.schema import ROW, SEGMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from batchgen.storage import LocalStorage
    from batchgen.store.books import Manifest
    from batchgen.store.carry import Wanted

_ENGINE_KEY = b"batchgen.engine"


class Index:
    """Which row of the input each published row is, by row group."""

    def __init__(self, storage: LocalStorage, manifest: Manifest) -> None:
        """Open and check it.

        Raises:
            OutputError: There is none, or it is not what was written.
            StorageError: It cannot be read right now.
        """
        if manifest.index is None:
            msg = f"{storage.where}: its snapshot has no index of rows; use --fresh"
            raise OutputError(msg)
        path = storage.path(manifest.index["name"])
        try:
            if not is_as_published(path, manifest.index):
                raise _damaged_index(path, "sha256 differs")
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            groups = json.loads(self._file.metadata.metadata[GROUPS_KEY.encode()])
        except READ_ERRORS as error:
            raise_if_not_damage(path, error)
            raise _damaged_index(path, str(error).splitlines()[0]) from error
        self.chunks = [[Chunk(*chunk) for chunk in chunks] for chunks in groups]
        """Of each file: its row groups, and last its footer."""

    def ordinals(self, group: int) -> pa.Table:
        """Of one published row group, counted over all files."""
        return self._file.read_row_group(group)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _damaged_index(path: Path, why: str) -> OutputError:
    return OutputError(
        f"{path}: damaged ({why}), and without it rows cannot be told apart; bring it back from a "
        "backup, or begin anew with --fresh"
    )


def from_snapshot(
    storage: LocalStorage, manifest: Manifest, num_rows: Sequence[int], wanted: Wanted
) -> Iterator[Piece]:
    """Yield the wanted rows of a snapshot, answered or skipped, in its ordinal order.

    Args:
        storage: Where it is.
        manifest: Of the snapshot.
        num_rows: Planned rows of each segment.
        wanted: What to take.

    Raises:
        OutputError: Its index is damaged, or it has other columns.
        StorageError: Something cannot be read right now.
    """
    index = Index(storage, manifest)
    moves = wanted.moves
    try:
        cursor, number = (0, 0), 0
        for entry, chunks in zip(manifest.files, index.chunks, strict=True):
            file = _PublishedFile(storage, entry, chunks)
            for group in range(len(chunks) - 1):
                ordinals = index.ordinals(number)
                number += 1
                here = rows_of(ordinals)
                last = (ordinals[SEGMENT][-1].as_py(), ordinals[ROW][-1].as_py() + 1)
                skipped = moves.ranges(_gaps(cursor, last, here, num_rows))
                cursor = last
                table = wanted.schema.empty_table()
                if rows := common_rows(here, moves.old_rows):
                    table = file.rows(group, ordinals, rows, wanted)
                if table.num_rows or skipped:
                    yield Piece(table, skipped, file.engine)
            file.close(wanted.tell)
        end = (len(num_rows) - 1, num_rows[-1]) if num_rows else cursor
        if skipped := moves.ranges(_gaps(cursor, end, {}, num_rows)):
            yield Piece(wanted.schema.empty_table(), skipped, "")
    finally:
        index.close()


def _gaps(
    start: tuple[int, int],
    stop: tuple[int, int],
    rows: Mapping[int, Ranges],
    num_rows: Sequence[int],
) -> dict[int, Ranges]:
    """Rows from ordinal `start` up to, not including, `stop` that are not in `rows`."""
    found = {}
    for segment in range(start[0], stop[0] + 1):
        first = start[1] if segment == start[0] else 0
        end = stop[1] if segment == stop[0] else num_rows[segment]
        found[segment] = Ranges([(first, end)]) - rows.get(segment, NO_ROWS)
    return found


class _PublishedFile:
    """Reads row groups of a published file, as far as their bytes are those that were written."""

    def __init__(
        self, storage: LocalStorage, entry: Mapping[str, object], chunks: Sequence[Chunk]
    ) -> None:
        self._name = str(entry["name"])
        self._path = storage.path(self._name)
        self._chunks = chunks
        self._file: pq.ParquetFile | None = None
        self._is_opened = False
        self._problem = "its bytes are not those that were published"
        self._num_damaged = 0
        self.engine = ""

    def rows(
        self, group: int, ordinals: pa.Table, rows: Mapping[int, Ranges], wanted: Wanted
    ) -> pa.Table:
        """The wanted ones of a row group, which are in `rows`; none of a damaged one."""
        table = self._read(group, ordinals, wanted.schema)
        if table is None:
            self._num_damaged += sum(len(found) for found in rows.values())
            return wanted.schema.empty_table()
        return wanted.of(table)

    def _read(self, group: int, ordinals: pa.Table, schema: pa.Schema) -> pa.Table | None:
        try:
            if not self._is_opened:
                self._open()
            if self._file is None or not is_whole(self._path, self._chunks, group):
                return None
            table = self._file.read_row_group(group)
        except READ_ERRORS as error:
            raise_if_not_damage(self._path, error)
            self._problem = str(error).splitlines()[0]
            return None
        if table.column_names != schema.names[len(INDEX_SCHEMA) :]:
            msg = (
                f"{self._path}: has other columns than this job's parts; use the batchgen that "
                "wrote it, or begin anew with --fresh"
            )
            raise OutputError(msg)
        columns = [*ordinals.columns, *table.columns]
        return pa.table(dict(zip(schema.names, columns, strict=True))).cast(schema)

    def _open(self) -> None:
        """Open the file if its footer can be believed."""
        self._is_opened = True
        is_all = self._path.stat().st_size == self._chunks[-1].end
        if is_all and is_whole(self._path, self._chunks, -1):
            self._file = pq.ParquetFile(self._path, page_checksum_verification=True)
            metadata = self._file.metadata.metadata or {}
            self.engine = metadata.get(_ENGINE_KEY, b"").decode()

    def close(self, tell: Callable[[str], None]) -> None:
        """Let go of the file, and tell of its damage."""
        if self._file is not None:
            self._file.close()
        if self._num_damaged:
            tell(f"{self._name}: damaged ({self._problem}); {self._num_damaged:,} rows done again")
