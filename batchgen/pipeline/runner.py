"""One worker's loop with its three threads, and the only place where stages meet.

Follow a row:

    Feeder thread      reader.read -> RequestBuilder.of -> queue or order     (render ahead)
    Runner (caller)    engine.add up to engine.capacity, engine.step          (never waits for I/O)
                       completion -> Judge -> Result -> open part, or Retries -> again
    Committer thread   open part -> PartWriter.commit                         (durable from here)

No stage waits for a slow row: the window is topped up as completions come, in whatever order,
and a part holds whatever finished since the last one. The feeder holds no more than its queue and
what its order looks ahead. That each row comes back from the engine
exactly once is `SupervisedEngine`'s promise; nobody counts again here.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from batchgen.answers.validate import Judge, Retries, final
from batchgen.core.errors import BatchgenError, StorageError
from batchgen.core.records import Completion, Ranges, Request, Result, RowBatch, RowSet
from batchgen.core.runtime import rare_collection
from batchgen.engine.order import AdmissionOrder, carried_bytes
from batchgen.pipeline.context import Purse, Stop, StopSwitch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from batchgen.engine.group import Supervised
    from batchgen.job.run_table import RunConfig
    from batchgen.pipeline.stats import RunStats
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


@dataclass(eq=False)
class Feeder:
    """Reads and renders ahead, in a thread, into a bounded queue.

    Requests that an order sorts do not go through the queue: the taker draws the best of what is
    held, so that an engine with room never waits for the reader.
    """

    batches: Iterable[FeedBatch]
    """The rows, see `feed_batches`; drawn in the thread."""
    _: KW_ONLY
    order: AdmissionOrder | None = None
    """In which order; None: as they come. Belongs to the feeder from now on."""
    is_loading: Callable[[], bool] = lambda: False
    """Whether the engine is about to come up: until then looking ahead, for a better order, costs
    nothing."""

    def __post_init__(self) -> None:
        self._queue: queue.Queue[FeedBatch | _End] = queue.Queue(_FEED_BATCHES)
        self._end: _End | None = None
        self._stopped = threading.Event()
        self.is_done = False
        self.has_requests = False
        """One was read, taken or not; may be asked by any thread."""
        self._ordering = threading.Condition()  # Who touches the order holds it.
        self._thread = threading.Thread(
            target=self._work, args=(iter(self.batches),), name="feeder", daemon=True
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
        return self.order is not None and self.order.num_held > 0

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
        order = self.order
        if order is None or not order.num_held:
            return None
        # Sorting takes a moment, merging files seconds: no engine waits for that.
        if not self._ordering.acquire(blocking=False):
            return None
        try:
            if self.is_loading() and not order.is_full and self._end is None:
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
        if self.order is not None:
            self.order.close()

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
        order = self.order
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
    batches: Iterable[RowBatch], builder: RequestBuilder, deduper: Passing | None = None
) -> Iterator[FeedBatch]:
    """Make requests of rows.

    Args:
        batches: The rows.
        builder: Makes requests of them.
        deduper: Which of them are to be computed; None: all.
    """
    for batch in batches:
        made = list(builder.of(batch))
        requests = [outcome for outcome in made if isinstance(outcome, Request)]
        results = [outcome for outcome in made if not isinstance(outcome, Request)]
        if deduper is not None:
            requests = deduper(requests)
        yield FeedBatch(requests, results, batch.segment, batch.skipped, batch.carried.nbytes)


_IDLE_WAIT_S = 0.05
_STEP_WAIT_S = 0.2
# Begin a commit a little early: a row is to be durable, not merely sent, within flush_s.
_FLUSH_EARLY = 0.8
_RETRY_FIRST_S, _RETRY_MOST_S = 0.1, 10.0

Pending = TypeVar("Pending")
"""What one commit makes durable."""


@dataclass(slots=True)
class OpenPart:
    """Finished rows that are not durable yet."""

    results: list[Result] = field(default_factory=list)
    skipped: RowSet = field(default_factory=RowSet)
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


@dataclass(eq=False)
class Runner:
    """Keeps the engine full and the books straight. One run, one instance, one thread.

    The stages belong to the caller, who closes them.
    """

    engine: Supervised
    feeder: Feeder
    committer: Committer[OpenPart]
    stats: RunStats
    _: KW_ONLY
    judge: Judge
    retries: Retries
    config: RunConfig
    clock: Callable[[], float]
    purse: Purse | None = None

    def __post_init__(self) -> None:
        self._is_broke = False
        self._waiting: deque[Request] = deque()
        self._part = OpenPart()
        self._row_bytes = 0.0
        self._error: BatchgenError | None = None
        self._has_dropped = False  # Rows were read that nobody will ask about.
        self._is_held_up = False  # The disk does not take what is finished: admit no more.

    @property
    def num_in_flight(self) -> int:
        """Requests that the engine holds."""
        return self.engine.num_in_flight

    def run(self, stop: StopSwitch, on_tick: Callable[[], None]) -> bool:
        """Run until the input is used up or the switch stops it; commit all that finished.

        Args:
            stop: May be asked at any time.
            on_tick: Called often, at least every 0.2 s; must be quick.

        Returns:
            Whether every row of the feed has ended.

        Raises:
            BatchgenError: Job error. What finished before it is committed, if it can be.
        """
        give_up_s: float | None = None
        with rare_collection(), self._committing(stop):
            while not self._is_through():
                now_s = self.clock()
                if stop.state is Stop.NO and self._error is None:
                    if not self._is_held_up:
                        self._admit()
                    if self._is_broke:
                        budget = self.config.max_tokens_total
                        stop.reason = f"run.max_tokens_total = {budget} is spent"
                        stop.drain()
                else:
                    give_up_s = give_up_s or now_s + self.config.grace_s
                    is_over = now_s >= give_up_s and not stop.is_patient
                    if stop.state is Stop.NOW or is_over or not self._may_still_finish():
                        break
                if self.num_in_flight:
                    self._settle(self.engine.step(self._patience_s()), now_s)
                if self._part.is_due(self.clock(), self.config):
                    self._is_held_up = not self._flush(_STEP_WAIT_S)
                self.committer.check()
                on_tick()
            if not self.num_in_flight and not self._waiting and self._error is None:
                self._hear_the_end()
            if self._error is not None:
                raise self._error
        return self._is_through()

    @contextmanager
    def _committing(self, stop: StopSwitch) -> Iterator[None]:
        """Commit all that finished, however the loop ends."""
        stop.is_heard = True
        try:
            yield
        except BaseException:
            self._salvage()
            raise
        finally:
            stop.is_heard = False
        if stop.state is not Stop.NO:
            self.committer.hurry()
        self._flush()
        self.committer.close()

    def _is_through(self) -> bool:
        is_at_end = self.feeder.is_done and not self._has_dropped
        return is_at_end and not self._waiting and not self.num_in_flight

    def _hear_the_end(self) -> None:
        """Stopped at the last row, the end of the input may be all that is left to hear."""
        if not self._has_dropped:
            self._has_dropped = self._take() is not None

    def _may_still_finish(self) -> bool:
        """While stopping: whether waiting is of use. An engine that is not up answers nothing."""
        if not self.num_in_flight and not self._waiting and self._error is None:
            self._hear_the_end()
        return bool(self.num_in_flight) and self.engine.facts is not None

    def _admit(self) -> None:
        """Top the engine up with what is ready; wait only if the engine has nothing to do."""
        room = self.engine.capacity - self.num_in_flight
        while room > 0:
            if not self._waiting:
                batch = self._take()
                if batch is None:
                    return
                self._take_in(batch)
                if not batch.requests:
                    return  # Rows that end without the engine: let the loop flush and listen.
                continue
            chunk = list(self._affordable(min(room, len(self._waiting))))
            if not chunk:
                self._is_broke = not self.num_in_flight
                return
            self.engine.add(chunk)
            room -= len(chunk)

    def _affordable(self, num: int) -> Iterator[Request]:
        """Take the next requests that the budget is good for, up to `num`."""
        for _ in range(num):
            if self.purse is not None and not self.purse.pay(self._waiting[0]):
                return
            yield self._waiting.popleft()

    def _take(self) -> FeedBatch | None:
        """What the feeder has ready; its error waits until what is in flight has finished."""
        try:
            return self.feeder.take(0 if self.num_in_flight else _IDLE_WAIT_S)
        except BatchgenError as error:
            self._error = error
            return None

    def _take_in(self, batch: FeedBatch) -> None:
        num_rows = len(batch.requests) + len(batch.results)
        if num_rows:
            self._row_bytes = batch.num_bytes / num_rows
        self._waiting.extend(batch.requests)
        if batch.results:
            self._end(batch.results)
        if batch.skipped:
            self._part.skipped |= RowSet({batch.segment: batch.skipped})
            self._part.since_s = self._part.since_s or self.clock()
            self.stats.num_skipped += len(batch.skipped)

    def _patience_s(self) -> float:
        """How long to wait for the engine: not for long while it has room for more."""
        is_full = self.num_in_flight >= self.engine.capacity or self.feeder.is_done
        return _STEP_WAIT_S if is_full else _IDLE_WAIT_S / 5

    def _settle(self, answered: Sequence[tuple[Request, Completion]], now_s: float) -> None:
        """Judge what came back: it ends its row, or the row goes to the end of the queue."""
        if self.stats.engine_ready_s is None and self.engine.facts is not None:
            self.stats.engine_ready_s = now_s
        if not answered:
            return
        if self.purse is not None:
            for _, completion in answered:
                self.purse.settle(completion)
        results = self.judge.judge(answered)
        self.stats.note_attempts(results)
        ended = []
        for (request, _), result in zip(answered, results, strict=True):
            again = self.retries.next(request, result)
            if again is not None:
                self._waiting.append(again)
            else:
                ended.append(final(request, result))
        self._end(ended)
        self.stats.note_progress(now_s)

    def _end(self, results: Sequence[Result]) -> None:
        if not results:
            return
        part = self._part
        part.results.extend(results)
        done = [result.completion for result in results if result.completion is not None]
        samples = [sample for one in done for sample in one.samples]
        num_chars = sum([len(sample.text) + len(sample.numbers or "") for sample in samples])
        part.num_bytes += self._row_bytes * len(results) + num_chars
        if part.since_s is None:
            part.since_s = self.clock()
        self.stats.note_ends(results)

    def _flush(self, timeout_s: float | None = None) -> bool:
        """Hand the open part over; False if the committer is still busy with earlier ones."""
        if self._part and not self.committer.put(self._part, timeout_s):
            return False
        self._part = OpenPart()
        return True

    def _salvage(self) -> None:
        """On an error: commit what finished, unless committing is what failed."""
        self.committer.hurry()
        with suppress(BatchgenError):  # The first error is the one to tell.
            self._flush()
        with suppress(BatchgenError):
            self.committer.close()


@dataclass(eq=False)
class Committer(Generic[Pending]):
    """Makes parts durable in a thread, so that no disk ever makes the engine wait.

    A disk in trouble (full, over quota, I/O error) gets time to recover: the part stays in
    memory and its commit is tried again, which is safe because a put is idempotent.
    """

    commit: Callable[[Pending], None]
    """Runs in the thread, one part at a time; may be repeated for the same part."""
    grace_s: float
    """How long to go on trying a commit that the disk refuses."""
    on_retry: Callable[[StorageError], None]
    """Told of each refusal, in the thread."""

    def __post_init__(self) -> None:
        # One part waiting while one is written: more would only be memory.
        self._queue: queue.Queue[Pending | None] = queue.Queue(1)
        self._error: BaseException | None = None
        self._give_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="committer", daemon=True)
        self._thread.start()

    def put(self, part: Pending, timeout_s: float | None) -> bool:
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

    def _commit_patiently(self, part: Pending) -> None:
        give_up_s = time.monotonic() + self.grace_s
        wait_s = _RETRY_FIRST_S
        while True:
            try:
                self.commit(part)
            except StorageError as error:
                if time.monotonic() + wait_s > give_up_s or self._give_up.wait(wait_s):
                    raise
                self.on_retry(error)
                wait_s = min(2 * wait_s, _RETRY_MOST_S)
            else:
                return
