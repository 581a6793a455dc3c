"""`Worker`: an engine somewhere in the cluster and the process around it, spoken to by `exchange`.

Two threads: whoever calls `exchange`, and the one that owns the engine and runs the same loop as a
run on one machine does. Leases come one after the other into one inbox, and the feeder reads on
from one to the next, so that no engine idles at a lease's end.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen import __version__
from batchgen.cluster import messages
from batchgen.core.errors import BatchgenError, ConfigError, OutputError, RecipeChangedError
from batchgen.engine.group import supervise
from batchgen.engine.process import build_engine
from batchgen.pipeline.compute import Stages, footer_facts
from batchgen.pipeline.context import Stop, StopSwitch
from batchgen.pipeline.frozen import input_changes
from batchgen.pipeline.prepare import check
from batchgen.pipeline.stats import Counts, RunStats
from batchgen.source.text import LineIndexes
from batchgen.storage import LocalStorage
from batchgen.store.books import Durable, Epoch, numbered
from batchgen.store.keys import prefix_of
from batchgen.store.ledger import Ledger
from batchgen.store.runs import RunLog, memory_mib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from batchgen.cluster.messages import Event, Lease, Order, WorkerInit
    from batchgen.core.errors import StorageError
    from batchgen.core.records import EngineSpec, Request
    from batchgen.engine.base import Engine
    from batchgen.pipeline.runner import FeedBatch, OpenPart

_LOOK_S = 0.2
_CLOSE_S = 10.0
_LATENCIES = 50
_WAIT_S = 0.2


class Inbox:
    """Orders come in, events go out, between the threads of one process. For any thread."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._bell = threading.Condition()
        self._events: list[Event] = []
        self._answers: dict[int, Sequence[bool]] = {}
        self._num_asked = 0
        self._crash: BaseException | None = None

    def hear(self, order: Order) -> None:
        """Take an order in."""
        if isinstance(order, messages.Answer):
            with self._bell:
                self._answers[order.ask] = order.passes
                self._bell.notify_all()
        else:
            self._orders.put(order)

    @property
    def has_orders(self) -> bool:
        """Whether an order waits."""
        return not self._orders.empty()

    def next_order(self, is_over: Callable[[], bool]) -> Order | None:
        """Wait for the next order; None once it is over."""
        while not is_over():
            try:
                return self._orders.get(timeout=_WAIT_S)
            except queue.Empty:
                continue
        return None

    def say(self, event: Event) -> None:
        """Put an event with what the next report brings."""
        with self._bell:
            self._events.append(event)
            self._bell.notify_all()

    def say_crash(self, error: BaseException) -> None:
        """Let the next `collect` raise."""
        with self._bell:
            self._crash = error
            self._bell.notify_all()

    def collect(self, wait_s: float) -> list[Event]:
        """Return what was said since the last time; waits for something up to `wait_s`.

        Raises:
            BaseException: What `say_crash` was given.
        """
        with self._bell:
            self._bell.wait_for(lambda: self._events or self._crash is not None, wait_s)
            if self._crash is not None:
                raise self._crash
            events, self._events = self._events, []
        return events

    def ask(self, requests: Sequence[Request], is_over: Callable[[], bool]) -> list[Request]:
        """Ask the driver which requests of one segment have to be computed; none if over."""
        if not requests:
            return []
        with self._bell:
            self._num_asked += 1
            ask = self._num_asked
        self.say(
            messages.Asked(
                ask,
                requests[0].ordinal.segment,
                [request.ordinal.row for request in requests],
                [prefix_of(request.request_key) for request in requests],
                [request.seed is not None for request in requests],
            )
        )
        with self._bell:
            while ask not in self._answers:
                if is_over():
                    return []
                self._bell.wait(_WAIT_S)
            passes = self._answers.pop(ask)
        return [request for request, passed in zip(requests, passes, strict=True) if passed]


class Worker:
    """See the module. Made where the worker is to be."""

    def __init__(
        self,
        init: WorkerInit,
        *,
        fetch: Callable[[Any], Sequence[FeedBatch]],
        build: Callable[..., Engine] = build_engine,
    ) -> None:
        """Look at the job; nothing is started but a thread.

        Args:
            init: Who we are.
            fetch: Brings what a lease's payload stands for.
            build: Builds the engine.

        Raises:
            ConfigError: This machine has another batchgen, or not the job's model.
        """
        self._where = f"worker {init.number} on {socket.gethostname()}"
        if init.version != __version__:
            told = f"batchgen {__version__} is installed here, the driver has {init.version}"
            raise ConfigError(self._where, [f"{told}; install the same on every node"])
        self._init = init
        self._fetch = fetch
        tag = f"{init.run_id}-w{init.number:02d}"
        storage = LocalStorage(Path(init.job.output.path), temp_tag=tag)
        self._ledger = Ledger(storage)
        self._log = RunLog(storage, init.run_id)
        self._checked = check(init.job)
        num = init.job.run.engines_per_gpu
        self._engine = supervise(
            build,
            [self._engine_spec] * (1 if num == "auto" else num),
            on_death=lambda death, _: self._inbox.say(messages.EngineDied(death.as_dict())),
            stall_s=init.job.run.stall_s,
        )
        self._stop = StopSwitch()
        self._stats = RunStats(time.monotonic(), 0)
        self._inbox = Inbox()
        self._begun: messages.Begin | None = None
        self._stages: Stages | None = None
        """One for all tasks: its parts are numbered through."""
        self._indexes = LineIndexes()  # Leases are pieces of the same files, again and again.
        self._is_over = threading.Event()
        """The loop has ended: nobody waits for orders or answers any more."""
        self._counted = self._count()
        self._counted_s = 0.0
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()

    def exchange(self, orders: Sequence[Order], wait_s: float) -> messages.Report:
        """Take orders, and report once something has happened, at the latest after `wait_s`.

        Raises:
            BaseException: What the worker's own thread died of, a bug.
        """
        for order in orders:
            if isinstance(order, messages.Halt):
                self._halt(order)
            else:
                self._inbox.hear(order)
        events = self._inbox.collect(wait_s)
        # Counts as the worker's thread has last seen them, and the engine as it is now.
        return messages.Report(
            events, self._counted._replace(memory_mib=memory_mib(), **self._engine_now())
        )

    def close(self) -> None:
        """Stop at once and let go of the engine. Idempotent."""
        self._stop.now()
        self._thread.join(_CLOSE_S)
        self._engine.close()

    def _halt(self, order: messages.Halt) -> None:
        if order.state is Stop.NOW:
            self._stop.now()
        elif order.is_patient:
            self._stop.drain()
        elif self._stop.state is Stop.NO:
            self._stop.ask()

    # The worker's own thread.

    def _work(self) -> None:
        def is_stopped() -> bool:
            return self._stop.state is not Stop.NO

        try:
            while (order := self._inbox.next_order(is_stopped)) is not None:
                self._follow(order)
            self._inbox.say(messages.Finished(is_complete=False))
        except BatchgenError as error:
            self._inbox.say(messages.Failed(error))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._inbox.say_crash(error)

    def _follow(self, order: Order) -> None:
        if isinstance(order, messages.StartEngine):
            self._engine.start()
        elif isinstance(order, messages.Begin):
            self._begin(order)
        elif isinstance(order, messages.Take):
            if self._run(order.lease):  # Else it was stopped, and that is told in the end.
                self._inbox.say(messages.Finished(is_complete=True))
        elif isinstance(order, messages.Finish):
            self._inbox.say(messages.Finished(is_complete=True))

    def _begin(self, begin: messages.Begin) -> None:
        """Bind to a plan, once it is sure that this machine sees what the driver sees."""
        ledger = self._ledger
        if ledger.storage.read(numbered("epochs", begin.epoch)) is None:
            raise OutputError(
                f"{self._where}: {ledger.storage.where} is not the folder that the driver sees; "
                "set output.path to one that all nodes share"
            )
        checked = self._checked.by_recipe_of(begin.plan)
        if changes := checked.changes(begin.plan):
            raise RecipeChangedError(self._where, changes, is_finished=False)
        prepared = checked.with_plan(begin.plan)
        if self._stages is None:
            self._stages = Stages(
                prepared,
                begin.plan,
                ledger,
                epoch=begin.epoch,
                worker=self._init.number,
                run_id=self._init.run_id,
            )
        # Others take their shares of it: what is left to us is not known.
        self._engine.expect(self._stages.work_of(begin.plan.num_rows))
        self._begun = begin
        self._inbox.say(messages.Ready(not input_changes(begin.plan)))

    def _run(self, lease: Lease) -> bool:
        """End the rows of this lease and of those that come, up to a `Finish`, or until stopped.

        Returns:
            Whether every row of them has ended.

        Raises:
            BatchgenError: Job error, or the engine's; what finished before it is committed.
        """
        begin, stages = self._begun, self._stages
        assert begin is not None and stages is not None  # noqa: S101, PT018 - `Begin` comes first
        self._is_over.clear()
        batches = self._batches(lease, stages, asks=begin.asks)
        # What the driver has put in order stays so.
        feeder = stages.feeder(batches, self._engine, is_ordered=begin.is_packed)
        try:
            runner = stages.runner(
                self._engine, feeder, self._stats, self._commit, self._tell_disk_trouble
            )
            return runner.run(self._stop, self._tick)
        finally:
            self._is_over.set()
            feeder.close()
            self._counted = self._count()

    def _batches(self, lease: Lease, stages: Stages, *, asks: bool) -> Iterator[FeedBatch]:
        """Read one lease after the other. In the feeder's thread, which the worker outlives."""

        def passing(requests: Sequence[Request]) -> list[Request]:
            return self._inbox.ask(requests, self._is_over.is_set)

        order: Order | None = messages.Take(lease)
        while order is not None and not isinstance(order, messages.Finish):
            if isinstance(order, messages.Take) and order.lease.payload is not None:
                yield from self._unpacked(order.lease, stages)
            elif isinstance(order, messages.Take):
                rows = stages.read(order.lease.rows, self._indexes)
                yield from stages.feed(rows, passing if asks else None)
            if not self._inbox.has_orders:
                self._inbox.say(messages.Read())
            order = self._inbox.next_order(self._is_over.is_set)

    def _unpacked(self, lease: Lease, stages: Stages) -> Iterator[FeedBatch]:
        for batch in self._fetch(lease.payload):
            mine = lease.rows
            requests = [
                stages.own(one)
                for one in batch.requests
                if one.ordinal.row in mine[one.ordinal.segment]
            ]
            results = [one for one in batch.results if one.ordinal.row in mine[one.ordinal.segment]]
            skipped = batch.skipped & mine[batch.segment]
            yield batch.only(requests, results, skipped)

    def _commit(self, part: OpenPart) -> None:
        """In the committer's thread: behind the driver's fence, and unless we are given up."""
        begin, stages, number = self._begun, self._stages, self._init.number
        assert begin is not None and stages is not None  # noqa: S101, PT018 - we have begun
        began_s = time.monotonic()
        epoch = Epoch(begin.epoch, begin.plan, self._init.run_id, Durable())
        self._ledger.check_fence(epoch)
        self._ledger.check_seal(epoch, number)
        facts = footer_facts(self._engine.facts)
        name, footer = stages.writer.commit(part.results, part.skipped, facts)
        counts = Counts(footer.num_ok, footer.num_errors, footer.num_skipped)
        kinds = Counter([one.error.error_type for one in part.results if one.error is not None])
        seconds = time.monotonic() - began_s
        self._inbox.say(messages.Committed(name, footer.done, counts, seconds, kinds))

    def _tell_disk_trouble(self, error: StorageError) -> None:
        number = self._init.number
        self._inbox.say(messages.Noted(f"worker {number}: a commit is tried again: {error}"))

    def _engine_spec(self) -> EngineSpec:
        return self._checked.engine_spec(self._log.engine_log_of(self._init.number))

    # What the driver sees.

    def _tick(self) -> None:
        now_s = time.monotonic()
        if now_s - self._counted_s >= _LOOK_S:
            self._counted_s = now_s
            self._counted = self._count()

    def _engine_now(self) -> dict[str, Any]:
        engine = self._engine
        return {
            "facts": engine.facts,
            "capacity": engine.capacity,
            "num_in_flight": engine.num_in_flight,
            "engine": engine.stats,
        }

    def _count(self) -> messages.Look:
        stats = self._stats
        return messages.Look(
            host=socket.gethostname(),
            pid=os.getpid(),
            **self._engine_now(),
            counts=stats.counts,
            error_types=dict(stats.error_types),
            verdicts={
                attempt: {verdict.value: num for verdict, num in found.items()}
                for attempt, found in stats.verdicts.items()
            },
            rates=stats.rates(time.monotonic()),
            latencies_s=list(stats.latencies_s)[-_LATENCIES:],
            memory_mib=None,
        )
