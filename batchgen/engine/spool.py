"""A sorted run in a temporary file, as Arrow IPC: carried columns, the rest of a request pickled.

The file has no name (`O_TMPFILE`), so nothing of it outlives the process, however that ends.
"""

from __future__ import annotations

import contextlib
import pickle
import tempfile
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from batchgen.core.ranges import Ranges
from batchgen.core.records import Request, RowBatch
from batchgen.engine.keyed import Keyed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import IO, Any

    from batchgen.core.records import Ordinal, Prompt


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
