"""Durable results found by their `request_key`, so that equal requests are computed once.

In memory is where each answer is, 16 bytes a row; the answers stay on the disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from batchgen.core import arrow
from batchgen.core.errors import OutputError, StorageError
from batchgen.store.known import prefixes_of
from batchgen.store.result_files import Index, ResultFile, is_intact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import polars as pl

    from batchgen.storage import LocalStorage
    from batchgen.store.books import Manifest
    from batchgen.store.result_files import Chunk


class Source(NamedTuple):
    """A Parquet file of results: a part, or a published file."""

    name: str
    takes_errors: bool
    """Whether a row that is an error answers for rows like it."""
    chunks: Sequence[Chunk] = ()
    """Of a published file: an answer is believed if its row group is what was written."""


def published_sources(
    storage: LocalStorage, manifest: Manifest, *, takes_errors: bool
) -> list[Source]:
    """The files of a snapshot.

    Raises:
        StorageError: Its index cannot be read right now.
    """
    try:
        index = Index(storage, manifest)
    except StorageError:
        raise
    except OutputError:  # Then whole files are believed, or not at all.
        return [
            Source(file["name"], takes_errors)
            for file in manifest.files
            if is_intact(storage.path(file["name"]), file)
        ]
    index.close()
    return [
        Source(file["name"], takes_errors, chunks)
        for file, chunks in zip(manifest.files, index.chunks, strict=True)
    ]


def key_prefixes(
    storage: LocalStorage, sources: Sequence[Source], prefix: str, tell: Callable[[str], None]
) -> Iterator[pl.Series]:
    """Yield the first 64 bits of every key that has an answer, repeats included, piece by piece.

    Raises:
        StorageError: A source cannot be read right now.
    """
    for source in sources:
        for _, keys in _key_groups(storage, source, prefix, tell):
            yield keys["prefix"]


def _key_groups(
    storage: LocalStorage, source: Source, prefix: str, tell: Callable[[str], None]
) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield each row group's number and its rows that answer: `prefix`, `row`, `is_ok`."""
    import polars as pl

    key, status = f"{prefix}request_key", f"{prefix}status"
    with ResultFile(storage.path(source.name), source.chunks) as file:
        # Whose answer is copied is proven then.
        for group, table in file.groups([key, status], is_proven=False):
            keys = pl.DataFrame(
                {
                    "prefix": prefixes_of(pl.Series(table.column(key).cast(pa.string()))),
                    "row": pl.int_range(table.num_rows, dtype=pl.UInt32, eager=True),
                    "is_ok": pl.Series(table.column(status).cast(pa.string())) == "ok",
                }
            )
            answers = pl.col("prefix").is_not_null() & (
                pl.lit(source.takes_errors) | pl.col("is_ok")
            )
            yield group, keys.filter(answers)
        _tell_of(file, tell)


def _tell_of(file: ResultFile, tell: Callable[[str], None]) -> None:
    if file.problem is not None:
        tell(f"{file.path.name}: damaged ({file.problem}); its answers are not used again")


class AnsweredKeys:
    """Where the answer of each request key is. Files may come, none may go."""

    def __init__(
        self,
        storage: LocalStorage,
        sources: Sequence[Source],
        columns: Sequence[pa.Field],
        prefix: str,
        tell: Callable[[str], None],
    ) -> None:
        """Read the keys.

        Args:
            storage: Where the sources are.
            sources: Where two have a key, the earlier one answers; an ok row before an error.
            columns: What to return of an answer, in the part schema: nothing carried, no ordinal.
            prefix: Of batchgen's columns.
            tell: Hears of damage.

        Raises:
            StorageError: A source cannot be read right now.
        """
        self._storage = storage
        self._columns = pa.schema(columns)
        self._prefix = prefix
        self._tell = tell
        self._groups: list[tuple[Source, int]] = []
        self._index = self._read(sources)

    def _read(self, sources: Sequence[Source]) -> pl.DataFrame:
        """Where the answers are, those that are ok first.

        Neither sorted nor without repeats: at ten million rows, either would cost more memory than
        the places themselves.
        """
        import polars as pl

        kinds = {"prefix": pl.UInt64, "group": pl.UInt32, "row": pl.UInt32}
        found = {is_ok: [pl.DataFrame(schema=kinds)] for is_ok in (True, False)}
        for source in sources:
            for group, keys in _key_groups(self._storage, source, self._prefix, self._tell):
                self._groups.append((source, group))
                number = pl.lit(len(self._groups) - 1, pl.UInt32)
                rows = keys.with_columns(group=number)
                for is_ok, frames in found.items():
                    frames.append(rows.filter(pl.col("is_ok") == is_ok).select(*kinds))
        return pl.concat([*found[True], *found[False]])

    def find(self, keys: Sequence[str]) -> tuple[list[int], pa.Table]:
        """Look answers up.

        Args:
            keys: Request keys, repeats allowed.

        Returns:
            Indexes into `keys` that have an answer, ascending, and the answers, one row each.

        Raises:
            StorageError: A source cannot be read right now.
        """
        import polars as pl

        wanted = pl.DataFrame({"key": keys}, schema={"key": pl.String}).with_row_index("at")
        wanted = wanted.with_columns(prefix=prefixes_of(wanted["key"]))
        here = self._index.join(wanted, on="prefix", how="semi", maintain_order="left")
        here = here.unique("prefix", keep="first", maintain_order=True)
        hits = wanted.join(here, on="prefix").sort("group", "at")
        places: list[int] = []
        tables = [self._columns.empty_table()]
        file: ResultFile | None = None
        for rows in hits.partition_by("group", maintain_order=True):
            source, group = self._groups[rows["group"][0]]
            file = self._opened(source, file)
            answers = self._answers(file, group)
            if answers is None:
                continue
            table = arrow.take(answers, rows["row"].cast(pl.Int64).to_arrow())
            found = pl.Series(table.column(f"{self._prefix}request_key"), dtype=pl.String)
            is_same = found == rows["key"]
            tables.append(table.filter(is_same.to_arrow()))
            places += rows["at"].filter(is_same).to_list()
        self._let_go(file)
        order = sorted(range(len(places)), key=places.__getitem__)
        answers = arrow.take(pa.concat_tables(tables), pa.array(order, pa.int64()))
        return [places[at] for at in order], answers

    def _opened(self, source: Source, file: ResultFile | None) -> ResultFile:
        """The file of a source; mostly many row groups of one file are asked for in a row."""
        path = self._storage.path(source.name)
        if file is not None and file.path == path:
            return file
        self._let_go(file)
        return ResultFile(path, source.chunks)

    def _answers(self, file: ResultFile, group: int) -> pa.Table | None:
        table = file.group(group, self._columns.names)
        try:
            return None if table is None else table.cast(self._columns)
        except pa.ArrowException:  # The footer of a part has no checksum: its types may lie.
            self._tell(f"{file.path.name}: damaged; answers in it are not used again")
            return None

    def _let_go(self, file: ResultFile | None) -> None:
        if file is not None:
            file.close()
            _tell_of(file, self._tell)
