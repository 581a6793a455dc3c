"""`SortedRuns`: an external merge sort of requests, of which one may take before all are put.

Each run is sorted when it is added; taking merges their beginnings. Runs beyond a bound go to
files.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import pickle
import tempfile
from collections import deque
from typing import TYPE_CHECKING

import pyarrow as pa

from batchgen.core.errors import StorageError
from batchgen.engine.keyed import Keyed, chunks_of
from batchgen.engine.spool import FileRun

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from batchgen.core.records import Request

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
