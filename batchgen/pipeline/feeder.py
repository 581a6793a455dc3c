"""Reads and renders ahead of the loop, in a thread, behind a bounded queue.

The feeder never makes the engine wait, and holds no more than its queue and what its order looks
ahead.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchgen.core.records import Ranges, Request, Result
from batchgen.engine.order import carried_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from batchgen.core.records import RowBatch
    from batchgen.engine.order import AdmissionOrder
    from batchgen.prompt.requests import RequestBuilder

    Passing = Callable[[Sequence[Request]], list[Request]]

# Batches rendered ahead of the engine's own read-ahead: enough to ride out a slow read.
_FEED_BATCHES = 4
_PUT_WAIT_S = 0.2


@dataclass(frozen=True, slots=True)
class FeedBatch:
    """What becomes of one batch."""

    requests: Sequence[Request]
    results: Sequence[Result]
    """Rows that end before they reach the engine."""
    segment: int
    skipped: Ranges
    num_bytes: int
    """Memory of the carried columns."""

    def only(
        self, requests: Sequence[Request], results: Sequence[Result], skipped: Ranges
    ) -> FeedBatch:
        """The same with some of its rows only."""
        num_rows = len(self.requests) + len(self.results)
        num_bytes = self.num_bytes * (len(requests) + len(results)) // max(1, num_rows)
        return FeedBatch(requests, results, self.segment, skipped, num_bytes)


_WAKE_UP = FeedBatch((), (), 0, Ranges(), 0)
"""For a taker that waits: there are requests in the order."""


@dataclass(frozen=True, slots=True)
class _End:
    """The input is at its end, or reading has failed."""

    error: BaseException | None


class Feeder:
    """Reads and renders ahead, in a thread, into a bounded queue.

    Requests that an order sorts do not go through the queue: the taker draws the best of what is
    held, so that an engine with room never waits for the reader.
    """

    def __init__(
        self,
        batches: Iterable[FeedBatch],
        *,
        order: AdmissionOrder | None = None,
        is_loading: Callable[[], bool] = lambda: False,
    ) -> None:
        """Start reading at once.

        Args:
            batches: The rows, see `feed_batches`; drawn in the thread.
            order: In which order; None: as they come. Belongs to the feeder from now on.
            is_loading: Whether the engine is about to come up: until then looking ahead, for a
                better order, costs nothing.
        """
        self._queue: queue.Queue[FeedBatch | _End] = queue.Queue(_FEED_BATCHES)
        self._end: _End | None = None
        self._stopped = threading.Event()
        self.is_done = False
        self.has_requests = False
        """One was read, taken or not; may be asked by any thread."""
        self._order = order
        self._ordering = threading.Condition()  # Who touches the order holds it.
        self._is_loading = is_loading
        self._thread = threading.Thread(
            target=self._work, args=(iter(batches),), name="feeder", daemon=True
        )
        self._thread.start()

    def take(self, timeout_s: float) -> FeedBatch | None:
        """Return the next batch; None if none is ready in time or the input is at its end.

        Raises:
            BatchgenError: What reading raised, once what was read before is taken.
        """
        if self.is_done:
            return None
        until_s = time.monotonic() + timeout_s
        while (batch := self._next(0) or self._next_in_order()) is None and self._end is None:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return None
            if (batch := self._next(left_s)) is not None:
                return batch
        if batch is None and self._end is not None and not self._is_holding():
            if self._end.error is not None:
                raise self._end.error
            self.is_done = True
        return batch

    def _is_holding(self) -> bool:
        return self._order is not None and self._order.num_held > 0

    def _next(self, timeout_s: float) -> FeedBatch | None:
        """From the queue; None for nothing, for a wake-up, and for the end, which is noted."""
        if self._end is not None:
            return None
        try:
            item = self._queue.get(timeout=timeout_s) if timeout_s else self._queue.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, _End):
            self._end = item
            return None
        return None if item is _WAKE_UP else item

    def _next_in_order(self) -> FeedBatch | None:
        """The best of what was read. An engine that waits gets it; one that loads can wait."""
        order = self._order
        if order is None or not order.num_held:
            return None
        # Sorting takes a moment, merging files seconds: no engine waits for that.
        if not self._ordering.acquire(blocking=False):
            return None
        try:
            if self._is_loading() and not order.is_full and self._end is None:
                return None
            requests = order.take()
            self._ordering.notify()
        finally:
            self._ordering.release()
        return FeedBatch(requests, (), 0, Ranges(), carried_bytes(requests))

    def close(self) -> None:
        """Stop reading and wait for it; what is queued is dropped.

        Waits, because a reader's native threads must not outlive the interpreter.
        """
        self._stopped.set()
        self._thread.join()
        if self._order is not None:
            self._order.close()

    def _work(self, batches: Iterator[FeedBatch]) -> None:
        error: BaseException | None = None
        try:
            for batch in batches:
                self.has_requests = self.has_requests or bool(batch.requests)
                if not self._pass_on(batch):
                    return
        except BaseException as raised:  # noqa: BLE001 - raised again in the runner's thread
            error = raised
        self._put(_End(error))

    def _pass_on(self, batch: FeedBatch) -> bool:
        """Hand a batch on, its requests by way of the order; False if the feeder was stopped."""
        if not (batch.requests or batch.results or batch.skipped):
            return not self._stopped.is_set()
        order = self._order
        if order is None:
            return self._put(batch)
        with self._ordering:
            is_plain = order.is_plain
            if not is_plain:
                order.put(batch.requests)
        if is_plain:
            return self._put(batch)
        has_others = batch.results or batch.skipped
        batch = batch.only((), batch.results, batch.skipped) if has_others else _WAKE_UP
        if (batch is not _WAKE_UP or self._queue.empty()) and not self._put(batch):
            return False
        with self._ordering:
            while order.is_full and not self._stopped.is_set():
                self._ordering.wait(_PUT_WAIT_S)
        return not self._stopped.is_set()

    def _put(self, item: FeedBatch | _End) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=_PUT_WAIT_S)
            except queue.Full:
                continue
            return True
        return False


def feed_batches(
    batches: Iterable[RowBatch], builder: RequestBuilder, sieve: Passing | None = None
) -> Iterator[FeedBatch]:
    """Make requests of rows.

    Args:
        batches: The rows.
        builder: Makes requests of them.
        sieve: Which of them are to be computed; None: all.
    """
    for batch in batches:
        made = list(builder.of(batch))
        requests = [outcome for outcome in made if isinstance(outcome, Request)]
        results = [outcome for outcome in made if not isinstance(outcome, Request)]
        if sieve is not None:
            requests = sieve(requests)
        yield FeedBatch(requests, results, batch.segment, batch.skipped, batch.carried.nbytes)
