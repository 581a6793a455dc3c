"""The stages that run beside the runner's loop, each in a thread, each behind a bounded queue.

The feeder reads and renders ahead; the committer makes parts durable. Neither ever makes the
engine wait, and neither holds more than its queue, the feeder besides what its order looks ahead.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from batchgen.core.errors import StorageError
from batchgen.core.ranges import Ranges
from batchgen.core.records import Request, Result
from batchgen.engine.order import carried_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from batchgen.core.records import RowBatch
    from batchgen.engine.order import AdmissionOrder
    from batchgen.job.model import RunConfig
    from batchgen.prompt.requests import RequestBuilder

    Passing = Callable[[Sequence[Request]], list[Request]]

# Batches rendered ahead of the engine's own read-ahead: enough to ride out a slow read.
_FEED_BATCHES = 4
_LOOK_AHEAD_BATCHES = 16
# Begin a commit a little early: a row is to be durable, not merely sent, within flush_s.
_FLUSH_EARLY = 0.8
_PUT_WAIT_S = 0.2
_RETRY_FIRST_S, _RETRY_MOST_S = 0.1, 10.0

Work = TypeVar("Work")
"""What one commit makes durable."""


@dataclass(frozen=True, slots=True)
class Fed:
    """What becomes of one batch."""

    requests: Sequence[Request]
    results: Sequence[Result]
    """Rows that end before they reach the engine."""
    segment: int
    skipped: Ranges
    num_bytes: int
    """Memory of the carried columns."""

    def of_these(
        self, requests: Sequence[Request], results: Sequence[Result], skipped: Ranges
    ) -> Fed:
        """The same with some of its rows only."""
        num_rows = len(self.requests) + len(self.results)
        num_bytes = self.num_bytes * (len(requests) + len(results)) // max(1, num_rows)
        return Fed(requests, results, self.segment, skipped, num_bytes)


_WAKE_UP = Fed((), (), 0, Ranges(), 0)
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
        feds: Iterable[Fed],
        *,
        order: AdmissionOrder | None = None,
        is_loading: Callable[[], bool] = lambda: False,
    ) -> None:
        """Start reading at once.

        Args:
            feds: The rows, see `feds_of`; drawn in the thread.
            order: In which order; None: as they come. Belongs to the feeder from now on.
            is_loading: Whether the engine is about to come up: until then looking ahead, for a
                better order, costs nothing.
        """
        self._queue: queue.Queue[Fed | _End] = queue.Queue(_FEED_BATCHES)
        self._held: deque[Fed | _End] = deque()
        self._end: _End | None = None
        self._stopped = threading.Event()
        self.is_done = False
        self._order = order
        self._ordering = threading.Condition()  # Who touches the order holds it.
        self._is_loading = is_loading
        self._thread = threading.Thread(
            target=self._work, args=(iter(feds),), name="feeder", daemon=True
        )
        self._thread.start()

    def has_requests(self) -> bool:
        """Whether a request is there, as far as can be told without holding many rows."""
        if self._is_holding():
            return True
        while not any(isinstance(item, Fed) and item.requests for item in self._held):
            if len(self._held) >= _LOOK_AHEAD_BATCHES or self._queue.empty():
                return False
            self._held.append(self._queue.get_nowait())
        return True

    def take(self, timeout_s: float) -> Fed | None:
        """Return the next batch; None if none is ready in time or the input is at its end.

        Raises:
            BatchgenError: What reading raised, once what was read before is taken.
        """
        if self.is_done:
            return None
        until_s = time.monotonic() + timeout_s
        while (fed := self._next(0) or self._next_in_order()) is None and self._end is None:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return None
            if (fed := self._next(left_s)) is not None:
                return fed
        if fed is None and self._end is not None and not self._is_holding():
            if self._end.error is not None:
                raise self._end.error
            self.is_done = True
        return fed

    def _is_holding(self) -> bool:
        return self._order is not None and self._order.num_held > 0

    def _next(self, timeout_s: float) -> Fed | None:
        """From the queue; None for nothing, for a wake-up, and for the end, which is noted."""
        if self._end is not None:
            return None
        try:
            if self._held:
                item = self._held.popleft()
            else:
                item = self._queue.get(timeout=timeout_s) if timeout_s else self._queue.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, _End):
            self._end = item
            return None
        return None if item is _WAKE_UP else item

    def _next_in_order(self) -> Fed | None:
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
        return Fed(requests, (), 0, Ranges(), carried_bytes(requests))

    def close(self) -> None:
        """Stop reading and wait for it; what is queued is dropped.

        Waits, because a reader's native threads must not outlive the interpreter.
        """
        self._stopped.set()
        self._thread.join()
        if self._order is not None:
            self._order.close()

    def _work(self, feds: Iterator[Fed]) -> None:
        error: BaseException | None = None
        try:
            for fed in feds:
                if not self._pass_on(fed):
                    return
        except BaseException as raised:  # noqa: BLE001 - raised again in the runner's thread
            error = raised
        self._put(_End(error))

    def _pass_on(self, fed: Fed) -> bool:
        """Hand a batch on, its requests by way of the order; False if the feeder was stopped."""
        order = self._order
        if order is None:
            return self._put(fed)
        with self._ordering:
            is_plain = order.is_plain
            if not is_plain:
                order.put(fed.requests)
        if is_plain:
            return self._put(fed)
        has_others = fed.results or fed.skipped
        fed = fed.of_these((), fed.results, fed.skipped) if has_others else _WAKE_UP
        if (fed is not _WAKE_UP or self._queue.empty()) and not self._put(fed):
            return False
        with self._ordering:
            while order.is_full and not self._stopped.is_set():
                self._ordering.wait(_PUT_WAIT_S)
        return not self._stopped.is_set()

    def _put(self, item: Fed | _End) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=_PUT_WAIT_S)
            except queue.Full:
                continue
            return True
        return False


def feds_of(
    batches: Iterable[RowBatch], builder: RequestBuilder, sieve: Passing | None = None
) -> Iterator[Fed]:
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
        yield Fed(requests, results, batch.segment, batch.skipped, batch.carried.nbytes)


@dataclass(slots=True)
class OpenPart:
    """Finished rows that are not durable yet."""

    results: list[Result] = field(default_factory=list)
    skipped: dict[int, Ranges] = field(default_factory=dict)
    since_s: float | None = None
    num_bytes: float = 0.0

    def __bool__(self) -> bool:
        return self.since_s is not None

    def is_due(self, now_s: float, run: RunConfig) -> bool:
        """Whether it is time to commit."""
        return self.since_s is not None and (
            len(self.results) >= run.flush_rows
            or self.num_bytes >= run.flush_mib * 2**20
            or now_s - self.since_s >= run.flush_s * _FLUSH_EARLY
        )


class Committer(Generic[Work]):
    """Makes parts durable in a thread, so that no disk ever makes the engine wait.

    A disk in trouble (full, over quota, I/O error) gets time to recover: the part stays in
    memory and its commit is tried again, which is safe because a put is idempotent.
    """

    def __init__(
        self,
        commit: Callable[[Work], None],
        grace_s: float,
        on_retry: Callable[[StorageError], None],
    ) -> None:
        """Start the thread.

        Args:
            commit: Runs in the thread, one part at a time; may be repeated for the same part.
            grace_s: How long to go on trying a commit that the disk refuses.
            on_retry: Told of each refusal, in the thread.
        """
        self._commit = commit
        self._grace_s = grace_s
        self._on_retry = on_retry
        # One part waiting while one is written: more would only be memory.
        self._queue: queue.Queue[Work | None] = queue.Queue(1)
        self._error: BaseException | None = None
        self._give_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="committer", daemon=True)
        self._thread.start()

    def put(self, part: Work, timeout_s: float | None) -> bool:
        """Hand a part over; False if another one was still waiting when the time was up.

        Raises:
            BatchgenError: What an earlier commit raised.
        """
        self.check()
        try:
            self._queue.put(part, timeout=timeout_s)
        except queue.Full:
            return False
        return True

    def check(self) -> None:
        """Raise what a commit raised, if any did."""
        if self._error is not None:
            raise self._error

    def hurry(self) -> None:
        """Grant a refusing disk no more time: what it does not take now is done again."""
        self._give_up.set()

    def close(self) -> None:
        """Wait until everything handed over is durable, or has failed.

        Raises:
            BatchgenError: What a commit raised.
        """
        self._queue.put(None)
        self._thread.join()
        self.check()

    def _work(self) -> None:
        while (part := self._queue.get()) is not None:
            if self._error is not None:
                continue  # Keep taking, so that nobody blocks on a committer that gave up.
            try:
                self._commit_patiently(part)
            except BaseException as error:  # noqa: BLE001 - raised again in the runner's thread
                self._error = error

    def _commit_patiently(self, part: Work) -> None:
        give_up_s = time.monotonic() + self._grace_s
        wait_s = _RETRY_FIRST_S
        while True:
            try:
                self._commit(part)
            except StorageError as error:
                if time.monotonic() + wait_s > give_up_s or self._give_up.wait(wait_s):
                    raise
                self._on_retry(error)
                wait_s = min(2 * wait_s, _RETRY_MOST_S)
            else:
                return
