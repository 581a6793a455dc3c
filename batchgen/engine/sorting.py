"""`SortedRuns`: an external merge sort of requests, of which one may take before all are put.

Each run is sorted when it is added; taking merges their beginnings. Runs beyond a bound go to
temporary files, as Arrow IPC: carried columns, the rest of a request pickled. A file has no name
(`O_TMPFILE`), so nothing of it outlives the process, however that ends.

A request that waits is cut loose from the batch that it was read in: else a few rows would hold
the memory of all that were read with them.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import pickle
import tempfile
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from batchgen.core import arrow
from batchgen.core.errors import StorageError
from batchgen.core.ranges import Ranges
from batchgen.core.records import Request, RowBatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import IO, Any

    from batchgen.core.records import Ordinal, Prompt

CHUNK_ROWS = 64
CHUNK_BYTES = 256 << 10
"""Rows that share the memory of their columns, and are read from a file together."""


class Keyed(NamedTuple):
    """A request with what it is sorted by; compared in the order of the fields."""

    rank: int
    text: bytes
    request_id: int
    num_bytes: int
    request: Request


def loose(requests: Sequence[Request]) -> list[Request]:
    """The same requests with columns of their own, shared by nobody else."""
    carried = requests[0].batch.carried
    if carried.num_columns:
        places = [(request.batch.carried, request.index) for request in requests]
        columns = arrow.gather(places, carried.schema.names)
        table = pa.Table.from_arrays(columns, schema=carried.schema)
        (carried,) = table.combine_chunks().to_batches()
    batch = RowBatch(0, (), (), carried, {}, Ranges())
    return [request._replace(batch=batch, index=at) for at, request in enumerate(requests)]


def chunks_of(rows: Iterable[Keyed]) -> Iterator[list[Keyed]]:
    """Rows in order, some at a time, with columns of their own."""
    chunk: list[Keyed] = []
    num_bytes = 0
    for row in rows:
        chunk.append(row)
        num_bytes += row.num_bytes
        if len(chunk) == CHUNK_ROWS or num_bytes >= CHUNK_BYTES:
            yield _loose(chunk)
            chunk, num_bytes = [], 0
    if chunk:
        yield _loose(chunk)


def _loose(rows: Sequence[Keyed]) -> list[Keyed]:
    requests = loose([row.request for row in rows])
    return [row._replace(request=request) for row, request in zip(rows, requests, strict=True)]


class FileRun:
    """Rows in order, of which one chunk is in memory."""

    def __init__(self, chunks: Iterable[Sequence[Keyed]], folder: Path | None) -> None:
        """Write the chunks, and begin to read them.

        Args:
            chunks: Rows in order; those of a chunk share their batch.
            folder: Where the file lies; None: in `TMPDIR`.

        Raises:
            OSError: It cannot be written.
        """
        self._stack = contextlib.ExitStack()
        self._rows: Iterator[Keyed] = iter(())
        with contextlib.ExitStack() as undo:
            undo.push(self._stack)
            file = self._stack.enter_context(tempfile.TemporaryFile(dir=folder))
            self._num_left = _write(file, chunks)
            self.num_bytes = file.tell()
            file.seek(0)
            self._reader = self._stack.enter_context(pa.ipc.open_stream(pa.PythonFile(file, "r")))
            undo.pop_all()

    def next(self) -> Keyed | None:
        """Take the next row; None at the end.

        Raises:
            OSError, pa.ArrowException, pickle.UnpicklingError: The file is not as written.
        """
        row = next(self._rows, None)
        if row is None and self._num_left:
            try:
                batch = self._reader.read_next_batch()
            except StopIteration:
                msg = "a temporary file ends too soon"
                raise pa.ArrowInvalid(msg) from None
            self._num_left -= batch.num_rows
            self._rows = iter(_read(batch))
            row = next(self._rows, None)
        if row is None:
            self.close()
        return row

    def close(self) -> None:
        """Give the disk its room back. Idempotent."""
        self._stack.close()


def _write(file: IO[bytes], chunks: Iterable[Sequence[Keyed]]) -> int:
    num_rows = 0
    with contextlib.ExitStack() as stack:
        writer: pa.RecordBatchStreamWriter | None = None
        for rows in chunks:
            data = pa.array([pickle.dumps(_Bare.of(row)) for row in rows], pa.binary())
            batch = rows[0].request.batch.carried
            # By place, not by name: a column of the input may be called anything.
            schema = batch.schema.append(pa.field("", pa.binary()))
            batch = pa.RecordBatch.from_arrays([*batch.columns, data], schema=schema)
            if writer is None:
                sink = pa.PythonFile(file, "w")
                writer = stack.enter_context(pa.ipc.new_stream(sink, schema))
            writer.write_batch(batch)
            num_rows += len(rows)
    file.flush()
    return num_rows


def _read(batch: pa.RecordBatch) -> list[Keyed]:
    pickled = batch.column(batch.num_columns - 1).to_pylist()
    carried = batch.select(range(batch.num_columns - 1))
    loose = RowBatch(0, (), (), carried, {}, Ranges())
    # Our own file, in a folder that only we can write.
    return [pickle.loads(data).keyed(loose, at) for at, data in enumerate(pickled)]  # noqa: S301


class _Bare(NamedTuple):
    """A keyed request without its columns."""

    rank: int
    text: bytes
    num_bytes: int
    request_id: int
    ordinal: Ordinal
    prompt: Prompt
    request_key: str
    seed: int | None
    params: Mapping[str, Any] | None
    lora: str | None

    @classmethod
    def of(cls, row: Keyed) -> _Bare:
        r = row.request
        content = (r.ordinal, r.prompt, r.request_key, r.seed, r.params, r.lora)
        return cls(row.rank, row.text, row.num_bytes, r.request_id, *content)

    def keyed(self, batch: RowBatch, index: int) -> Keyed:
        request = Request(
            request_id=self.request_id,
            ordinal=self.ordinal,
            prompt=self.prompt,
            request_key=self.request_key,
            seed=self.seed,
            batch=batch,
            index=index,
            params=self.params,
            lora=self.lora,
        )
        return Keyed(self.rank, self.text, self.request_id, self.num_bytes, request)


MAX_RUNS = 32
"""In memory; of more, one is made: each may hold a chunk for the sake of its last row."""
MAX_FILES = 64
"""Open at once; of more, the shorter half is merged."""


class SortedRuns:
    """Requests in order. One thread at a time."""

    def __init__(self, max_bytes: int | None, folder: Path | None = None) -> None:
        """Start empty.

        Args:
            max_bytes: Beyond so many held in memory, runs are written to files; None: never.
            folder: Where these are; None: in `TMPDIR`.
        """
        self._folder = folder
        self._max_bytes = max_bytes
        self._heads: list[tuple[Keyed, _Run]] = []
        self.num_rows = 0
        self.num_bytes = 0
        """Of the rows in memory."""

    def add(self, rows: Sequence[Keyed]) -> None:
        """Add a run; any order.

        Raises:
            StorageError: It cannot be written.
        """
        with self._trouble_told():
            self._add(rows)

    def pop(self, num: int, max_bytes: float = math.inf) -> list[Request]:
        """Take the first `num` in order, or all that are left; fewer once they pass `max_bytes`.

        Raises:
            StorageError: What was written cannot be read.
        """
        with self._trouble_told():
            return self._pop(num, max_bytes)

    @contextlib.contextmanager
    def _trouble_told(self) -> Iterator[None]:
        """After trouble nothing is held: what is lost cannot be told from what is not."""
        try:
            yield
        except (OSError, pa.ArrowException, pickle.UnpicklingError) as error:
            self.close()
            folder = self._folder or tempfile.gettempdir()
            problem = f"rows cannot be sorted there: {error}; free space, set TMPDIR, or run.order"
            raise StorageError(str(folder), problem) from error
        except BaseException:
            self.close()
            raise

    def _add(self, rows: Sequence[Keyed]) -> None:
        if not rows:
            return
        ordered = sorted(rows)
        num_bytes = sum(row.num_bytes for row in ordered)
        chunks = chunks_of(ordered)
        is_spilt = self._max_bytes is not None and self.num_bytes + num_bytes > self._max_bytes
        run = FileRun(chunks, self._folder) if is_spilt else _MemoryRun(chunks)
        self._open(run)
        self.num_rows += len(rows)
        self.num_bytes += 0 if is_spilt else num_bytes
        files = self._files()
        if len(files) > MAX_FILES:
            files.sort(key=lambda opened: opened[1].num_bytes)
            self._merge(files[: MAX_FILES // 2])
        if len(self._heads) - len(files) > MAX_RUNS:
            self._merge([head for head in self._heads if isinstance(head[1], _MemoryRun)])

    def _pop(self, num: int, max_bytes: float) -> list[Request]:
        taken: list[Request] = []
        num_bytes = 0
        while self._heads and len(taken) < num and num_bytes < max_bytes:
            first, run = self._heads[0]
            taken.append(first.request)
            num_bytes += first.num_bytes
            following = run.next()
            if following is None:
                heapq.heappop(self._heads)
            else:
                heapq.heapreplace(self._heads, (following, run))
            if isinstance(run, _MemoryRun):
                self.num_bytes -= first.num_bytes
        self.num_rows -= len(taken)
        return taken

    def close(self) -> None:
        """Drop everything. Idempotent."""
        for _, run in self._heads:
            run.close()
        self._heads.clear()
        self.num_rows = self.num_bytes = 0

    @property
    def num_files(self) -> int:
        """Open right now."""
        return len(self._files())

    def _files(self) -> list[tuple[Keyed, FileRun]]:
        return [(head, run) for head, run in self._heads if isinstance(run, FileRun)]

    def _open(self, run: _Run) -> None:
        if (head := run.next()) is not None:
            heapq.heappush(self._heads, (head, run))

    def _merge(self, heads: Sequence[tuple[Keyed, _Run]]) -> None:
        """Of some runs, make one: in memory if they are there, or in a file."""
        merging = {id(run) for _, run in heads}
        self._heads = [head for head in self._heads if id(head[1]) not in merging]
        heapq.heapify(self._heads)
        rows = heapq.merge(*(itertools.chain([head], iter(run.next, None)) for head, run in heads))
        chunks = chunks_of(rows)
        is_file = isinstance(heads[0][1], FileRun)
        self._open(FileRun(chunks, self._folder) if is_file else _MemoryRun(chunks))


class _MemoryRun:
    """A run in memory; what was taken is let go."""

    def __init__(self, chunks: Iterator[list[Keyed]]) -> None:
        self._chunks = deque(chunks)
        self._rows: Iterator[Keyed] = iter(())

    def next(self) -> Keyed | None:
        row = next(self._rows, None)
        if row is None and self._chunks:
            self._rows = iter(self._chunks.popleft())
            row = next(self._rows, None)
        return row

    def close(self) -> None:
        self._chunks.clear()


_Run = _MemoryRun | FileRun
