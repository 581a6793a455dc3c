"""A request with what it is sorted by, cut loose from the batch that it was read in.

Else a few rows that wait would hold the memory of all that were read with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from batchgen.core import arrow
from batchgen.core.ranges import Ranges
from batchgen.core.records import Request, RowBatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

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
