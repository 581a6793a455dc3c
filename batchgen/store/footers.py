"""Footers of parts: read from each file, or from where an earlier run has rolled them up.

Opening a million files takes many minutes, and all that the books want of a part is in its footer.
So a run that has read many leaves what they said behind, in one file for all of them:

    _batchgen/footers/eNNNNNN-SHA.parquet      a row a part: its name, mark and footer

It is a cache and nothing else: parts that it does not have are opened, and whoever removes it loses
time. It says under which size, time and inode number each part was read, and a part that has others
now is opened, too; its own name has the hash of its bytes, so that a torn or changed one says
nothing. What is found in a part that has changed within its bytes since, publishing finds, as it
does of those that were opened.
"""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.core.errors import OutputError, StorageError
from batchgen.store.books import FOOTER_KEY, STATE, PartFooter, epoch_of
from batchgen.store.result_files import ResultFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from batchgen.storage import LocalStorage

FOOTERS = f"{STATE}/footers"
WORTH_PARTS = 1000
"""So many parts have to be opened before what they say is worth a file."""
_ROWS = 10_000
_NO_MARK = [-1, -1, -1]
_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("name", "footer", "columns")),
        *(pa.field(name, pa.int64()) for name in ("num_rows", "size", "mtime_ns", "inode")),
    ]
)


class Told(NamedTuple):
    """What a part says of itself."""

    name: str
    footer: str
    """Its books, see `PartFooter`, as they stand in the file."""
    columns: str
    """Names of its columns, as JSON."""
    num_rows: int
    size: int
    mtime_ns: int
    inode: int


def read_footer(storage: LocalStorage, name: str) -> Told:
    """Open a part.

    Raises:
        ValueError: It cannot count, since it is unreadable or no part.
        StorageError: It cannot be read right now, which says nothing about it.
    """
    mark = _mark(storage, name)
    with ResultFile(storage.path(name)) as file:
        metadata, names = file.footer, file.column_names
        if metadata is None or file.problem is not None:
            raise ValueError(f"unreadable: {file.problem}")
    try:
        footer = (metadata.metadata or {})[FOOTER_KEY].decode()
    except KeyError as error:
        raise ValueError(f"no batchgen footer: {error!r}") from error
    return Told(name, footer, json.dumps(names), metadata.num_rows, *mark)


def _mark(storage: LocalStorage, name: str) -> Sequence[int]:
    """What changes with a part; nothing that a file has if it cannot be looked at."""
    with suppress(OSError, StorageError):
        return storage.mark(name) or _NO_MARK
    return _NO_MARK


def rolled_up(storage: LocalStorage, left: dict[str, str]) -> Iterator[Told]:
    """Yield what is known of parts without opening them.

    Args:
        storage: The output.
        left: Names of parts, each its own value, so that no second text of a million is made;
            loses those that are yielded.
    """
    for place in storage.list(FOOTERS) if len(left) >= WORTH_PARTS else ():
        for told in _rows(storage, place):
            if told.name in left and _mark(storage, told.name) == [*told[4:]]:
                yield told._replace(name=left.pop(told.name))


def _rows(storage: LocalStorage, place: str) -> Iterator[Told]:
    with suppress(StorageError, pa.ArrowException):
        data = storage.read(place) or b""
        if _place(epoch_of(place), data) == place:
            file = pq.ParquetFile(pa.BufferReader(data))
            for batch in file.iter_batches(_ROWS, columns=_SCHEMA.names):
                yield from map(Told, *(column.to_pylist() for column in batch.columns))


def _place(epoch: int, data: bytes) -> str:
    return f"{FOOTERS}/e{epoch:06d}-{hashlib.sha256(data).hexdigest()[:32]}.parquet"


class RollUp:
    """Collects what parts said that had to be opened."""

    def __init__(self) -> None:
        """Begin with none."""
        self._held: list[Told] = []
        self._num_parts = 0
        self._sink = io.BytesIO()
        self._writer = pq.ParquetWriter(self._sink, _SCHEMA, compression="zstd")

    def add(self, told: Told) -> None:
        """Add a part."""
        self._held.append(told)
        self._num_parts += 1
        if len(self._held) >= _ROWS:
            self._write()

    def _write(self) -> None:
        columns = zip(*self._held, strict=True)
        arrays = [
            pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)
        ]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=_SCHEMA))
        self._held = []

    def keep(self, storage: LocalStorage, epoch: int) -> None:
        """Leave it for later runs, if it is worth a file; what fails here costs time, no more."""
        if self._num_parts >= WORTH_PARTS:
            if self._held:
                self._write()
            self._writer.close()
            data = self._sink.getvalue()
            with suppress(StorageError, OutputError):
                storage.replace(_place(epoch, data), data)


class Same:
    """Keeps one of equal values: what a million footers say is mostly the same."""

    def __init__(self) -> None:
        """Begin with none."""
        self._seen: dict[object, object] = {}

    def footer(self, text: str) -> PartFooter:
        """Read a part's books.

        Raises:
            ValueError: They are none, or do not balance.
        """
        footer = PartFooter.from_metadata({FOOTER_KEY: text.encode()})
        for name in ("plan", "run_id", "engine", "tally", "num_ok"):
            value = getattr(footer, name)
            object.__setattr__(footer, name, self._seen.setdefault(repr(value), value))
        return footer
