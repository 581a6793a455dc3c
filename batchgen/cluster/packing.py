"""Rows that travel by way of the driver: it reads, renders and orders them, workers get packs.

For input that workers do not see, that cannot be read in pieces (gzip, zstd, CSV), and for an
order over the whole job, where rows that go together stand far apart in the files.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from batchgen.core.ranges import Ranges
from batchgen.engine.order import carried_bytes, common_prefix, held_bytes, text_of
from batchgen.pipeline.feeder import FeedBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.cluster.leases import LeaseBook
    from batchgen.core.records import Request
    from batchgen.pipeline.feeder import Feeder

PACK_ROWS = 1024
_PACK_BYTES = 8 << 20
"""Of a pack, and of each 1,024 rows that may wait."""


class Packer:
    """Fills a lease book from a feeder."""

    def __init__(
        self,
        feeder: Feeder,
        put: Callable[[Sequence[FeedBatch]], Any],
        num_rows: int,
        *,
        by_prefix: bool = False,
    ) -> None:
        """Bind.

        Args:
            feeder: Belongs to the packer from now on.
            put: Stores packs where workers find them.
            num_rows: That it reads, those included that will not need an engine.
            by_prefix: Rows come by their prompts' text: where one pack ends and the next begins,
                these are to have little in common.
        """
        self._feeder = feeder
        self._put = put
        self._num_left = num_rows
        self._by_prefix = by_prefix
        self._held: list[Request] = []
        self._row_bytes = 1.0
        self.is_done = False
        """All rows are packed."""

    @property
    def num_left(self) -> int:
        """Rows that are yet to be packed, at most."""
        return 0 if self.is_done else self._num_left

    def fill(self, book: LeaseBook, num_wanted: int) -> None:
        """Add packs until so many rows are free, or nothing more is ready.

        Raises:
            BatchgenError: What reading raised.
        """
        while not self.is_done and book.num_pending < self._limit(num_wanted):
            batch = self._feeder.take(0)
            if batch is None:
                if self._feeder.is_done:
                    self._pack(book, self._held)
                    self.is_done = True
                return
            if not self._by_prefix:
                self._add(book, batch)
                continue
            self._add(book, batch.only((), batch.results, batch.skipped))
            self._held += batch.requests
            if len(self._held) >= 2 * PACK_ROWS:
                cut = best_cut(self._held)
                self._pack(book, self._held[:cut])
                del self._held[:cut]

    def _limit(self, num_wanted: int) -> int:
        """Rows that may wait: of large ones fewer."""
        return min(num_wanted, max(1, int(num_wanted / PACK_ROWS * _PACK_BYTES / self._row_bytes)))

    def _pack(self, book: LeaseBook, requests: Sequence[Request]) -> None:
        self._add(book, FeedBatch(list(requests), (), 0, Ranges(), carried_bytes(requests)))

    def _add(self, book: LeaseBook, batch: FeedBatch) -> None:
        """Put a pack, or several if it is large."""
        if batch.requests:
            self._row_bytes = max(1.0, held_bytes(batch.requests) / len(batch.requests))
        size = max(1, int(_PACK_BYTES / self._row_bytes))
        rest = [
            batch.only(batch.requests[at : at + size], (), Ranges())
            for at in range(size, len(batch.requests), size)
        ]
        for pack in (batch.only(batch.requests[:size], batch.results, batch.skipped), *rest):
            if rows := rows_of(pack):
                book.add(rows, self._put([pack]))
                self._num_left -= sum(map(len, rows.values()))

    def close(self) -> None:
        """Stop reading."""
        self._feeder.close()


def best_cut(requests: Sequence[Request]) -> int:
    """Where to cut sorted requests so that both sides have least in common; not near the ends."""
    first = len(requests) // 4
    texts = [text_of(request) for request in requests[first : 3 * first + 1]]
    shared = [common_prefix(one, other) for one, other in pairwise(texts)]
    return first + 1 + min(range(len(shared)), key=shared.__getitem__)


def rows_of(batch: FeedBatch) -> dict[int, Ranges]:
    """Segment -> the rows that end by way of a `FeedBatch`."""
    found: dict[int, list[int]] = {}
    for segment, row in [one.ordinal for one in batch.requests] + [
        r.ordinal for r in batch.results
    ]:
        found.setdefault(segment, []).append(row)
    rows = {segment: Ranges.of(numbers) for segment, numbers in found.items()}
    if batch.skipped:
        rows[batch.segment] = rows.get(batch.segment, Ranges()) | batch.skipped
    return rows
