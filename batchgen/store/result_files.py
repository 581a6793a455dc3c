"""Files of results, read back: parts and published files, under one policy for damage.

Nothing is believed that cannot be shown to be what was written. Page checksums are verified with
every read; of published files, whose index keeps hashes, so are the footer and each row group:
page headers and the footer have no checksum. What is damaged is left out, a row group at a time,
and `problem` says why. What follows from that (rows are computed again, a run ends, a hint is
missing) is its reader's to decide. An error that says nothing about a file's content, such as too
many open files, is a StorageError for every reader.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.core.errors import OutputError
from batchgen.storage import raise_if_not_damage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import polars as pl

    from batchgen.storage import LocalStorage
    from batchgen.store.books import Manifest, PublishedFile

GROUPS_KEY = "batchgen.groups"
"""In the index's footer: a `Chunk` for each row group and the footer of each file."""
OTHER_BYTES = "its bytes are not those that were published"
# A flipped bit in a footer that has no checksum may also be in a name, or in a type.
_READ_ERRORS = (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError, KeyError, TypeError)


class Chunk(NamedTuple):
    """Bytes of a file, from the end of the chunk before to `end`."""

    end: int
    sha256: str


class ResultFile:
    """One file, opened with the first read; a context manager."""

    def __init__(self, path: Path, chunks: Sequence[Chunk] = ()) -> None:
        """Bind; nothing is read yet.

        Args:
            path: The file.
            chunks: Of a published file: its row groups in order, and last its footer.
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
            self._file.close()
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
                anybody believes them.

        Raises:
            StorageError: It cannot be read right now.
        """
        with self._noting_damage():
            file = self._opened()
            if is_proven and self._chunks and not is_whole(self.path, self._chunks, number):
                raise pa.ArrowInvalid(OTHER_BYTES)
            table = file.read_row_group(number, columns=columns and list(columns))
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
            self._file = pq.ParquetFile(self.path, page_checksum_verification=True)
        return self._file

    @contextmanager
    def _noting_damage(self) -> Iterator[None]:
        try:
            yield
        except _READ_ERRORS as error:
            raise_if_not_damage(self.path, error)
            self.problem = self.problem or str(error).splitlines()[0]


class Index:
    """Which row of the input each published row is, by row group; a context manager."""

    def __init__(self, storage: LocalStorage, manifest: Manifest) -> None:
        """Open and check it.

        Raises:
            OutputError: There is none, or it is not what was written.
            StorageError: It cannot be read right now.
        """
        if manifest.index is None:
            msg = f"{storage.where}: its snapshot has no index of rows; use --fresh"
            raise OutputError(msg)
        path = storage.path(manifest.index.name)
        self._storage = storage
        self._files = manifest.files
        self._file = ResultFile(path)
        if not is_intact(path, manifest.index):
            why = "sha256 differs"
            raise self._damaged(why)
        groups = json.loads(self._file.metadata.get(GROUPS_KEY.encode(), b"[]"))
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
            "it back from a backup, or begin anew with --fresh"
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


def scan(storage: LocalStorage, names: Sequence[str]) -> pl.LazyFrame:
    """Rows of files as they lie on the disk, for views: damage is not looked for.

    Collecting them raises a PolarsError or an OSError where a file cannot be read.
    """
    import polars as pl

    return pl.scan_parquet([storage.path(name) for name in names], glob=False)


def is_as_published(path: Path, entry: PublishedFile) -> bool:
    """Whether every byte is still what the manifest's entry says. Reads the file.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256


def is_intact(path: Path, entry: PublishedFile) -> bool:
    """The same; False if the file is gone.

    Raises:
        StorageError: It cannot be read right now.
    """
    try:
        return is_as_published(path, entry)
    except OSError as error:
        raise_if_not_damage(path, error)
        return False


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
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(chunks[at].end - start)
    return hashlib.sha256(data).hexdigest() == chunks[at].sha256
