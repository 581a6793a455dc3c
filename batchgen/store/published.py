"""Snapshots, read back: which row of the input each published row is, and what proves it.

The files of a snapshot tile all planned rows in order, so a row's place among them tells which it
is: how many rows the files before it have, and how many its own file has before it. A file says in
its footer, which a hash in its manifest proves, which rows of its stretch have no result, and the
hash of each of its row groups.

Of version 1, an index has both: `index.parquet`, which a manifest names beside the files. It has
the row groups of all of them, one by one, in order.
"""

from __future__ import annotations

import base64
import json
import zlib
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from batchgen.core.data import parse_json, pl
from batchgen.core.errors import OutputError
from batchgen.core.records import Ranges, RowSet
from batchgen.core.runtime import option
from batchgen.store.books import Chunk, Kept, Manifest, Places, Plan, PublishedFile
from batchgen.store.result_files import GROUPS_KEY, ROW, SEGMENT, ResultFile, rows_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from batchgen.storage import LocalStorage

RESULTS_KEY = "batchgen.results"
"""In a published file's footer, if its stretch has rows without a result: see `lengths_text`."""
ORDINALS = pa.schema(
    [
        pa.field(SEGMENT, pa.int32(), nullable=False),
        pa.field(ROW, pa.int64(), nullable=False),
    ]
)


def lengths_text(results: Ranges, num_rows: int) -> str:
    """Write down which of so many rows have a result.

    Returns:
        How many have none, how many then have one, how many then have none, and so on; as JSON,
        compressed by zlib, in base64.
    """
    edges = [0, *chain.from_iterable(results.spans), num_rows]
    lengths = [stop - start for start, stop in pairwise(edges)]
    return base64.b64encode(zlib.compress(json.dumps(lengths).encode())).decode()


def _results(text: bytes) -> Ranges:
    """Read what `lengths_text` wrote."""
    edges = [0, *accumulate(parse_json(zlib.decompress(base64.b64decode(text))))]
    return Ranges(list(pairwise(edges))[1::2])


def ordinals_of(rows: RowSet) -> pa.Table:
    """Segment and row of each row of a set, in order."""
    if not rows:
        return ORDINALS.empty_table()
    kinds = {"segment": pl.Int32, "start": pl.Int64, "stop": pl.Int64}
    spans = pl.DataFrame(list(rows.spans()), schema=kinds, orient="row")
    number = pl.col("segment").repeat_by(pl.col("stop") - pl.col("start")).explode()
    row = pl.int_ranges("start", "stop").explode()
    columns = spans.select(number, row=row).get_columns()
    return pa.Table.from_arrays([one.to_arrow() for one in columns], schema=ORDINALS)


def _damaged_groups(one: OpenFile) -> Iterator[RowSet]:
    for group in range(one.num_groups):
        if one.file.group(group) is None:
            yield one.rows(group)


class _Stretch:
    """A file that tells its rows by its place."""

    def __init__(
        self, storage: LocalStorage, entry: PublishedFile, places: Places, start: int
    ) -> None:
        self.entry = entry
        self.file = ResultFile(storage.path(entry.name), entry.chunks)
        self._places = places
        self._start = start
        self._spans: Sequence[tuple[int, int]] = ()
        self._edges: Sequence[int] = ()

    @property
    def planned(self) -> RowSet:
        """Segment -> its rows, with a result or without."""
        return RowSet.of_spans(self._places.spans(self._start, self._start + self.entry.num_done))

    @property
    def num_groups(self) -> int:
        """Row groups; 0 if it cannot be told."""
        return self.file.num_groups

    def rows(self, group: int) -> RowSet:
        """Segment -> the rows of a row group, in this order."""
        self._look()
        return self._between(self._edges[group], self._edges[group + 1])

    def damaged(self) -> Iterator[RowSet]:
        """Yield rows that are not what was published; reads all row groups."""
        if self.num_groups or not self.entry.num_rows:
            return _damaged_groups(self)
        return iter([self.planned])

    def skipped(self) -> RowSet:
        """Segment -> its rows without a result; none if it cannot be told."""
        if not self.entry.num_skipped or not self.num_groups:
            whole = not self.entry.num_rows
            return self.planned if whole else RowSet()
        self._look()
        return self.planned - self._between(0, self._edges[-1])

    def _look(self) -> None:
        footer = self.file.footer
        if self._edges or footer is None:
            return
        sizes = [footer.row_group(at).num_rows for at in range(footer.num_row_groups)]
        self._edges = [0, *accumulate(sizes)]
        text = (footer.metadata or {}).get(RESULTS_KEY.encode())
        self._spans = ((0, self.entry.num_rows),) if text is None else _results(text).spans

    def _between(self, first: int, stop: int) -> RowSet:
        """Rows of the results `first` up to, not including, `stop` of the file."""
        found: list[tuple[int, int, int]] = []
        num_before = 0
        for start, end in self._spans:
            here = start + max(first - num_before, 0), min(end, start + stop - num_before)
            num_before += end - start
            if here[0] < here[1]:
                found += self._places.spans(self._start + here[0], self._start + here[1])
            if num_before >= stop:
                break
        return RowSet.of_spans(found)


class _Indexed(NamedTuple):
    """A file of version 1, whose rows the snapshot's index tells."""

    entry: PublishedFile
    file: ResultFile
    ordinals: Callable[[int], pa.Table]
    """Segments and rows of a row group, by its number."""
    groups: range
    """Numbers of its row groups, counted over all files."""

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    def rows(self, group: int) -> RowSet:
        return rows_of(self.ordinals(self.groups[group]))

    def damaged(self) -> Iterator[RowSet]:
        return _damaged_groups(self)


OpenFile = _Stretch | _Indexed
"""A published file, and which rows of the plan are in it."""


class _Index:
    """Which row of the input each row of a version 1 snapshot is, by row group."""

    def __init__(self, storage: LocalStorage, manifest: Manifest) -> None:
        if manifest.index is None:
            msg = f"{storage.where}: its snapshot has no index of rows; use {option('--fresh')}"
            raise OutputError(msg)
        path = storage.path(manifest.index.name)
        self._file = ResultFile(path)
        if not manifest.index.is_intact(path):
            why = "sha256 differs"
            raise self._damaged(why)
        groups = parse_json(self._file.metadata.get(GROUPS_KEY.encode(), b"[]"))
        self.chunks = [[Chunk(*chunk) for chunk in chunks] for chunks in groups]
        """For each published file, its row groups and last its footer."""

    def close(self) -> None:
        self._file.close()

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


class PublishedRows:
    """A snapshot's files, and which rows of its plan are in each; a context manager."""

    def __init__(self, storage: LocalStorage, manifest: Manifest, plan: Plan) -> None:
        """Open what tells the rows.

        Args:
            storage: The output.
            manifest: The snapshot's.
            plan: The plan that it is of.

        Raises:
            OutputError: Of version 1: there is no index, or it is not what was written.
            StorageError: It cannot be read right now.
        """
        self._storage = storage
        self._manifest = manifest
        self._places = Places(plan)
        self._index = None if manifest.is_tiled else _Index(storage, manifest)

    def __enter__(self) -> PublishedRows:
        return self

    def __exit__(self, *_: object) -> None:
        if self._index is not None:
            self._index.close()

    def files(self, wanted: RowSet | None = None) -> Iterator[OpenFile]:
        """Yield the files, one open at a time; those only that may have wanted rows.

        Raises:
            OutputError: The index of a version 1 snapshot is damaged.
            StorageError: Something cannot be read right now.
        """
        if self._index is None:
            yield from stretches(self._storage, self._manifest.tiles(), self._places, wanted)
            return
        first = 0
        for entry, chunks in zip(self._manifest.files, self._index.chunks, strict=True):
            with ResultFile(self._storage.path(entry.name), chunks) as file:
                groups = range(first, first + len(chunks) - 1)
                yield _Indexed(entry, file, self._index.ordinals, groups)
            first += len(chunks) - 1

    def skipped(self, rows: RowSet) -> RowSet:
        """Pick of a plan's rows those that ended without a result, as far as it can be told.

        Raises:
            OutputError: The index of a version 1 snapshot is damaged.
            StorageError: Something cannot be read right now.
        """
        if self._index is None:
            files = stretches(self._storage, self._manifest.tiles(), self._places, rows)
            found = (one.skipped().spans() for one in files)
            return RowSet.of_spans(chain.from_iterable(found)) & rows
        groups = range(sum(len(chunks) - 1 for chunks in self._index.chunks))
        seen = (rows_of(self._index.ordinals(group)).spans() for group in groups)
        return rows - RowSet.of_spans(chain.from_iterable(seen))


def stretches(
    storage: LocalStorage, files: Iterable[Kept], places: Places, wanted: RowSet | None = None
) -> Iterator[_Stretch]:
    """Yield files that tell their rows by their place, one open at a time.

    Args:
        storage: The output.
        files: With their places.
        places: Of the plan.
        wanted: Only files that may have one of these rows; None: all.
    """
    for entry, start in files:
        spans = places.spans(start, start + entry.num_done)
        if wanted is None or any(_touches(wanted[segment], *span) for segment, *span in spans):
            found = _Stretch(storage, entry, places, start)
            with found.file:
                yield found


def _touches(rows: Ranges, start: int, stop: int) -> bool:
    return next(rows.within(start, stop), None) is not None


def row_groups(
    storage: LocalStorage, manifest: Manifest | None, plan: Plan, wanted: RowSet | None = None
) -> Iterator[tuple[ResultFile, int, Callable[[], pa.Table]]]:
    """Yield each row group of a snapshot: its file, its number in it, and what reads its ordinals.

    Args:
        storage: The output.
        manifest: The snapshot's; None: there is none.
        plan: The plan that it is of.
        wanted: Only of files that may have one of these rows; None: all.

    Raises:
        OutputError: Of version 1: there is no index of rows, or it is damaged.
        StorageError: Something cannot be read right now.
    """
    if manifest is None:
        return
    with PublishedRows(storage, manifest, plan) as snapshot:
        yield from groups_of(snapshot.files(wanted))


def groups_of(
    files: Iterable[OpenFile],
) -> Iterator[tuple[ResultFile, int, Callable[[], pa.Table]]]:
    """Yield each row group of files, see `row_groups`."""
    for one in files:
        for group in range(one.num_groups):
            yield one.file, group, partial(_ordinals, one, group)


def _ordinals(one: OpenFile, group: int) -> pa.Table:
    return ordinals_of(one.rows(group))


def proofs(
    storage: LocalStorage, manifest: Manifest
) -> list[tuple[PublishedFile, Sequence[Chunk]]]:
    """Return the files of a snapshot that can be believed, and what proves each.

    Without the index of a version 1 snapshot, whole files are believed, or not at all.

    Raises:
        StorageError: Something cannot be read right now.
    """
    if manifest.is_tiled:
        return [(file, file.chunks) for file in manifest.files]
    try:
        index = _Index(storage, manifest)
    except OutputError:
        files = manifest.files
        return [(file, ()) for file in files if file.is_intact(storage.path(file.name))]
    index.close()
    return list(zip(manifest.files, index.chunks, strict=True))
