"""Snapshots: written of parts, every result once, in input order, and of files kept.

A published file is a stretch of the input and knows nothing of its place: it is of each snapshot
whose input has these rows one after the other. What is between files that are kept is cut into
stretches of about one size, which can be written independently of each other.

The files are hashed while they are written, as a whole and by row group: the whole file's hash
proves it, a row group's says what can still be believed of a file that has been damaged since. Page
checksums alone do not: they leave page headers and the footer out.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen.core.data import vector_encodings
from batchgen.core.errors import OutputError
from batchgen.core.processes import Crew, num_processes
from batchgen.core.records import Ranges
from batchgen.core.runtime import command
from batchgen.storage import LocalStorage, PendingFile, saying_where
from batchgen.store.books import Chunk, Kept, Manifest, Places, Plan, PublishedFile, added
from batchgen.store.keys import KeyFile
from batchgen.store.published import RESULTS_KEY, lengths_text
from batchgen.store.result_files import (
    GROUPS_KEY,
    dictionary_columns,
    published_schema,
    rows_of,
    tally,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from batchgen.store.ledger import Ledger
    from batchgen.store.parts import Parts, Sizes


class HashedParquet:
    """Writes one file, named by its content; a context manager, and nothing is there before."""

    def __init__(
        self,
        storage: LocalStorage,
        stem: str,
        schema: pa.Schema,
        options: Mapping[str, Any],
    ) -> None:
        """Begin.

        Args:
            storage: Where the file goes.
            stem: What its name begins with.
            schema: With the metadata for the footer.
            options: For `pq.ParquetWriter`.

        Raises:
            StorageError: The temp file cannot be created.
        """
        self._stem = stem
        self._schema = schema
        self._pending = storage.begin(stem)
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
            self.note({GROUPS_KEY: json.dumps(self.chunks)})
            self._writer.close()
            self.chunks.append(self._out.cut())
        except BaseException:
            self._pending.discard()
            raise
        if kind is not None:
            self._pending.discard()
            return
        # It is taken only by an earlier try of this very run, which wrote the same.
        self._pending.commit(self.name.rpartition("/")[2])

    @property
    def name(self) -> str:
        """Its name, which tells its content once that is complete."""
        return f"{self._stem}-{self._out.digest.hexdigest()[:16]}.parquet"

    def entry(self, **counts: Any) -> PublishedFile:  # noqa: ANN401 - as `PublishedFile` has them
        """The file's line in a manifest; `counts` are of its rows."""
        out = self._out
        rest = self.chunks[-2].end if len(self.chunks) > 1 else 0
        return PublishedFile(
            self.name,
            self.num_rows,
            out.size_bytes,
            out.digest.hexdigest(),
            footer_bytes=out.size_bytes - rest,
            footer_sha256=self.chunks[-1].sha256,
            **counts,
        )


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
    labels: Sequence[Sequence[str]] = ()
    """Paths to labels: a column without the prefix, and the fields of structs in it."""

    @property
    def published(self) -> pa.Schema:
        """Schema of the files."""
        return published_schema(self.schema)

    @property
    def options(self) -> dict[str, Any]:
        """For `pq.ParquetWriter`."""
        labels = [".".join(path) for path in self.labels]
        return {
            "compression": self.compression,
            "use_dictionary": dictionary_columns(self.prefix, labels),
            "column_encoding": vector_encodings(self.published),
        }


_WORTH_BYTES, _OWN_CORES = 256 << 20, 1.5
"""What processes write that one would not have written meanwhile must be so many bytes of parts: to
start takes them half a second each, and one alone uses so many cores."""


def write_snapshot(
    parts: Parts,
    plan: Plan,
    kept: Sequence[Kept],
    form: SnapshotFormat,
    stem: str,
    worth_bytes: int = _WORTH_BYTES,
) -> list[PublishedFile]:
    """Write all results of `parts` between the files that are kept, in input order.

    Args:
        parts: They have each row of the plan once that is in no kept file.
        plan: The plan that they are of.
        kept: By position.
        form: How to write.
        stem: Of the files' names, with their folder; must be this run's own.
        worth_bytes: By processes, if more than so many bytes of parts are gained by it.

    Returns:
        The entries of all files, kept ones among them, in order. A job without a row has one file
        with the schema and no rows.

    Raises:
        StorageError: A write failed; nothing is published by it.
        DamagedPartError: A part's bytes are not what was written.
        AccountingError: Two parts hold the same row.
        ProcessDiedError: A process was killed; nothing is published by it.
    """
    places = Places(plan)
    spans = cuts(parts, places, kept, form.rows_per_file)
    stems = [f"{stem}-{number:05d}" for number in range(len(spans))]
    found = {one.start: [one.file] for one in kept}
    num = num_processes(len(spans))
    is_worth = num > 1 and parts.num_bytes * (1 - _OWN_CORES / num) >= worth_bytes
    if is_worth and parts.storage.is_plain:
        # Files a little smaller, so that in the last round no core waits for the others.
        in_rounds = -(-len(spans) // num) * num
        spans = cuts(parts, places, kept, form.rows_per_file, in_rounds)
        stems = [f"{stem}-{number:05d}" for number in range(len(spans))]
        num_read = Counter[str]()
        with Crew(num) as crew:
            pieces = (
                (parts.within(places, span), places, span, form, stem)
                for span, stem in zip(spans, stems, strict=True)
            )
            for span, (files, counts) in zip(spans, crew.map(_stretch, pieces), strict=True):
                found[span[0]] = files
                num_read.update(counts)
        parts.check_all_read(num_read)
    else:
        for span, own in zip(spans, stems, strict=True):
            found[span[0]] = write_stretch(parts, places, span, form, own)
        parts.check_all_read()
    return in_order([file for start in sorted(found) for file in found[start]])


def _stretch(
    parts: Parts, places: Places, span: tuple[int, int], form: SnapshotFormat, stem: str
) -> tuple[list[PublishedFile], dict[str, int]]:
    """Write a stretch in a process of its own; return what was read of each part, too."""
    files = write_stretch(parts, places, span, form, stem)
    return files, parts.num_read


def write_stretch(
    parts: Parts, places: Places, span: tuple[int, int], form: SnapshotFormat, stem: str
) -> list[PublishedFile]:
    """Write the results of a stretch of the plan: one file, or several of `rows_per_file`.

    Args:
        parts: Among them those that have its rows.
        places: Of the plan.
        span: Its first position, and the one after its last.
        form: How to write.
        stem: Of the files' names, with their folder; must be this stretch's own.

    Raises:
        StorageError: A write failed.
        DamagedPartError: A part's bytes are not what was written.
        AccountingError: Two parts hold the same row.
    """
    start, stop = span
    schema = form.published.with_metadata(dict(form.metadata))
    files: list[PublishedFile] = []
    with saying_where(parts.storage.path(stem)):
        chunks = _ahead(parts.chunks(places.spans(start, stop)))
        chunk = next(chunks, None)
        while start < stop or not files:
            books, keys = _Books(places, start, form), KeyFile(form.prefix)
            with HashedParquet(parts.storage, stem, schema, form.options) as file:
                while chunk is not None and file.num_rows < form.rows_per_file:
                    room = form.rows_per_file - file.num_rows
                    rows = chunk.slice(0, room)
                    file.write(rows)
                    books.add(rows)
                    keys.add(rows)
                    chunk = chunk.slice(room) if chunk.num_rows > room else next(chunks, None)
                start = stop if chunk is None else places.first_of(rows_of(chunk.slice(0, 1)))
                file.note(books.notes(start))
            files.append(file.entry(**books.counts(start)))
            keys.put(parts.storage, file.name)
    return files


def _ahead(chunks: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Read each while the one before it is written."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = pool.submit(next, chunks, None)
            yield chunk


class _Books:
    """Counts what goes into a published file."""

    def __init__(self, places: Places, start: int, form: SnapshotFormat) -> None:
        self._places = places
        self._start = start
        self._form = form
        self._results: list[tuple[int, int]] = []
        self._num_errors = 0
        self._tallies: list[Mapping[str, Mapping[str, int]]] = []

    def add(self, rows: pa.Table) -> None:
        """Count rows in the part schema."""
        starts, before = self._places.starts, self._start
        self._results += [
            (starts[segment] + first - before, starts[segment] + stop - before)
            for segment, first, stop in rows_of(rows).spans()
        ]
        is_error = pc.equal(rows.column(f"{self._form.prefix}status"), "error")
        self._num_errors += pc.sum(is_error).as_py() or 0
        self._tallies.append(tally(rows, self._form.prefix, self._form.labels))

    def notes(self, stop: int) -> dict[str, str]:
        """What the footer says beside the row groups' hashes."""
        num_rows, results = stop - self._start, Ranges(self._results)
        is_whole = len(results) in {0, num_rows}
        return {} if is_whole else {RESULTS_KEY: lengths_text(results, num_rows)}

    def counts(self, stop: int) -> dict[str, Any]:
        """What the manifest says beside the number of rows."""
        num_skipped = stop - self._start - len(Ranges(self._results))
        self._tallies = [added(self._tallies)]
        return {
            "num_errors": self._num_errors,
            "num_skipped": num_skipped,
            "tally": self._tallies[0],
        }


# A published file's size, estimated: a sixteenth of all, but for very small and for large ones.
LEAST_BYTES, _MANY_BYTES, _MOST_BYTES = 128 * 2**10, 16 * 2**20, 128 * 2**20
_SHARES, _SHARES_OF_MANY = 16, 256
_NEAR = 0.25
"""A stretch is so much shorter or longer than it would be, to end where an input file does."""


def target_bytes(num_bytes: float) -> float:
    """Return how large a file of so large a snapshot is to be."""
    few = min(num_bytes / _SHARES, _MANY_BYTES)
    return max(LEAST_BYTES, min(max(few, num_bytes / _SHARES_OF_MANY), _MOST_BYTES))


def cuts(
    parts: Parts, places: Places, kept: Sequence[Kept], rows_per_file: int, num_wanted: int = 0
) -> list[tuple[int, int]]:
    """Cut what is between kept files into stretches for a file each, of about one size.

    Args:
        parts: They have each of these rows once.
        places: Of the plan.
        kept: By position.
        rows_per_file: About so many rows at most.
        num_wanted: About so many stretches at least.

    Returns:
        First position of each, and the one after its last. One that is empty for a plan without
        rows.
    """
    edges = [0, *(edge for one in kept for edge in (one.start, one.stop)), places.starts[-1]]
    gaps = [(start, stop) for start, stop in pairwise(edges)][::2]
    sizes = parts.sizes(places)
    new = sizes.until(places.starts[-1])
    target = target_bytes(new + sum(one.file.size_bytes for one in kept))
    target = min(target, new / num_wanted) if num_wanted else target
    found: list[tuple[int, int]] = []
    for start, stop in gaps:
        if start < stop:
            num_bytes = sizes.until(stop) - sizes.until(start)
            num = max(round(num_bytes / target), -(-(stop - start) // rows_per_file), 1)
            found += _cut(places, sizes, (start, stop), num)
    return found or ([] if kept else [(0, 0)])


def _cut(places: Places, sizes: Sizes, gap: tuple[int, int], num: int) -> Iterator[tuple[int, int]]:
    start, stop = gap
    first_byte, last_byte = sizes.until(start), sizes.until(stop)
    for number in range(1, num):
        wanted = first_byte + (last_byte - first_byte) * number / num
        at = sizes.position(wanted)
        near = places.nearest_start(at)
        if abs(near - at) < _NEAR * (stop - gap[0]) / num:
            at = near
        if start < at < stop:
            yield start, at
            start = at
    yield start, stop


_ORDER_STEP, _MOST_ORDER = 1000, 90_000_000


def in_order(files: Sequence[PublishedFile]) -> list[PublishedFile]:
    """Number the new ones among files so that numbers ascend; all of them where there is no room.

    Args:
        files: In order; new ones have no number.
    """
    step = min(_ORDER_STEP, _MOST_ORDER // max(len(files), 1))
    orders: list[int] = []
    num_new = 0
    for file in files:
        if file.order is None:
            num_new += 1
            continue
        last = orders[-1] if orders else 0
        room = (file.order - last) / (num_new + 1)
        if room < 1:
            return [replace(one, order=(at + 1) * step) for at, one in enumerate(files)]
        orders += [last + int(room * number) for number in range(1, num_new + 1)]
        orders.append(file.order)
        num_new = 0
    last = orders[-1] if orders else 0
    orders += [last + step * number for number in range(1, num_new + 1)]
    if orders[-1] >= 10**8:
        return [replace(one, order=(at + 1) * step) for at, one in enumerate(files)]
    return [replace(one, order=order) for one, order in zip(files, orders, strict=True)]


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
