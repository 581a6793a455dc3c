"""`ManyEngines`, the second way to compute, and its loop, the driver's.

The driver leases rows to workers until each has ended and is durable.

A row's way here: free in the `LeaseBook` -> leased -> its worker says that it is durable, or is
told that its answer is another row's -> settled. A worker that is gone is sealed first: what it
committed counts, what it writes from then on nobody accepts, and only then its other rows are free
again. So no row is ever in two hands.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import TYPE_CHECKING

from batchgen.answers.validate import final
from batchgen.cluster import messages, pacing
from batchgen.cluster.leases import LeaseBook, Packer, count
from batchgen.cluster.machines import resources_of, share_gpu
from batchgen.cluster.ray import ray_cluster
from batchgen.cluster.workers import ReplicaStats, WorkerHandle, WorkerPool
from batchgen.core.errors import (
    AccountingError,
    BatchgenError,
    ConfigError,
    EngineError,
    InputChangedError,
    OutputError,
    StorageError,
)
from batchgen.core.records import EngineFacts, EngineStats, Ranges, Request, RowError
from batchgen.engine.base import failed
from batchgen.pipeline.compute import watching
from batchgen.pipeline.context import RunContext, Stop
from batchgen.pipeline.frozen import input_changes
from batchgen.pipeline.runner import Feeder, OpenPart
from batchgen.pipeline.stats import RUNNING, Counts
from batchgen.store.books import PARTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.cluster.messages import Cluster, Event, Report
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.compute import Rows, TakeOver, Work
    from batchgen.pipeline.prepare import Prepared
    from batchgen.pipeline.stats import Look
    from batchgen.store.reuse import Deduper

_PACKS_AHEAD_ROWS = 8192
_COMMIT_GRACE_S = 30.0
_OUTLOOK_S = 0.1
_LISTING_S, _LISTING_WAIT_S = 90.0, 0.5
_LATELY = 5000
"""Parts that some folder may not show yet: 256 workers commit so many in eight minutes."""


@dataclass(eq=False)
class ManyEngines:
    """`Compute` by the workers of one run: started when it is sure that there is work."""

    context: RunContext
    """The run."""
    _: KW_ONLY
    connect: Callable[[JobConfig], Cluster] = ray_cluster
    """Makes what places workers."""
    clock: Callable[[], float] = time.monotonic
    """Monotonic seconds."""

    def __post_init__(self) -> None:
        """Begin.

        Raises:
            ConfigError: Replicas of a size that cannot be had.
        """
        self._job = share_gpu(self.context.job, resources_of(self.context.job))
        self._replicas = ReplicaStats(self.context.stats, clock=self.clock)
        self._pool: WorkerPool | None = None

    @property
    def is_started(self) -> bool:
        """Whether workers were ever asked for."""
        return self._pool is not None

    @property
    def facts(self) -> EngineFacts | None:
        """What one of the engines is; None until one is up."""
        return self._pool.facts if self._pool is not None else None

    @property
    def stats(self) -> EngineStats:
        """The sums and means of what all schedulers tell."""
        return self._replicas.engines()

    @property
    def num_in_flight(self) -> int:
        """Requests that all engines hold."""
        return self._replicas.num_in_flight

    @property
    def warnings(self) -> list[str]:
        """Empty: all is noted as it comes."""
        return []

    def start(self, prepared: Prepared) -> None:
        """Begin to bring up all workers and their engines. See `Compute`.

        Raises:
            BatchgenError: There is nothing to place them.
        """
        del prepared  # Each worker prepares the job where it is.
        self._workers().start_engines()

    def _workers(self) -> WorkerPool:
        if self._pool is None:
            self._pool = WorkerPool(
                self.connect(self._job),
                self._job,
                self.context.run_id,
                stats=self._replicas,
                tell=self.context.notes.add,
                clock=self.clock,
            )
        return self._pool

    def answer(
        self, work: Work, rows: Rows, deduper: Deduper | None, take_over: TakeOver | None = None
    ) -> bool:
        """Lease the rows to workers. See `Compute`; rows are taken over first."""
        context = self.context
        if take_over is not None:
            rows = take_over(lambda: None)
        if context.is_stopped() or not rows:
            return not context.is_stopped()
        driver = Driver(
            context,
            work,
            self._workers(),
            deduper=deduper,
            feed=partial(self._feed, work, deduper),
            is_packed=self._is_packed(work, rows),
        )
        with watching(context, self._look, deduper) as monitor:
            return driver.run(rows, monitor.tick)

    def _look(self, now_s: float) -> Look:
        state = RUNNING if self.facts is not None else "starting the engines"
        return self._replicas.whole(now_s), state, self._replicas.rows(now_s)

    def _is_packed(self, work: Work, rows: Rows) -> bool:
        """Whether rows travel by way of the driver.

        For an order by text, so that what is alike goes to one worker; or where a worker would have
        to read a file from its start for each lease.
        """
        if self.context.job.run.order == "prefix":
            return True
        reader, segments = work.prepared.reader, work.epoch.plan.segments
        return not all(reader.is_seekable(segments[number].path) for number in rows)

    def _feed(self, work: Work, deduper: Deduper | None, rows: Rows) -> Feeder:
        stages = work.stages
        passing = deduper.passing if deduper is not None else None
        return stages.feeder(stages.feed(stages.read(rows), passing), self)

    def let_go(self) -> None:
        """Nothing yet: Ray wants to be closed by the thread that has started it."""

    def close(self) -> None:
        """Let go of all workers. Idempotent."""
        if self._pool is not None:
            self._pool.cluster.close()


@dataclass(eq=False)
class Driver:
    """One task: these rows, by these workers. Use once: `Driver(...).run(...)`."""

    context: RunContext
    """The run."""
    work: Work
    """Whose rows they are."""
    pool: WorkerPool
    """The workers."""
    _: KW_ONLY
    deduper: Deduper | None
    """Which requests are to be computed; None: all."""
    feed: Callable[[Rows], Feeder]
    """Reads rows here."""
    is_packed: bool
    """Whether rows travel by way of the driver."""

    def __post_init__(self) -> None:
        self._clock = self.pool.clock
        self._stats = self.pool.stats
        self._book = LeaseBook({})
        self._packers: list[Packer] = []
        self._error: BatchgenError | None = None
        self._halted: tuple[Stop, bool] = (Stop.NO, False)
        self._give_up_s: float | None = None
        self._num_not_started = 0
        self._committed: deque[str] = deque(maxlen=_LATELY)
        """Parts that count, the last ones."""
        self._disk_jobs: list[Callable[[], None]] = []
        """To be done, and again while the disk refuses."""
        self._disk_give_up_s: float | None = None
        self._outlook: pacing.Outlook | None = None
        self._num_seen = 0
        self._look_again_s = 0.0

    def run(self, rows: Rows, on_tick: Callable[[], None]) -> bool:
        """Work until every row has ended and is durable, or until the run is stopped.

        Args:
            rows: Segment -> rows.
            on_tick: Called often; must be quick.

        Returns:
            Whether every row has ended.

        Raises:
            BatchgenError: Job error. What finished before it is durable, if it can be.
        """
        stop = self.context.stop
        stop.is_heard = True
        self.pool.begin(count(rows))
        self._book = LeaseBook({} if self.is_packed else rows)
        self._book.is_fed = True
        if self.is_packed:
            self._pack(rows)
        try:
            while not self._is_through():
                if self._is_to_stop() and self._has_stopped():
                    break
                self._turn()
                on_tick()
        finally:
            stop.is_heard = False
            for packer in self._packers:
                packer.close()
        if self._error is not None:
            raise self._error
        self._await_parts()
        return self._book.is_through

    def _turn(self) -> None:
        if self._halted[0] is Stop.NO:
            self._try(self._lease)
        for worker, news in self.pool.talk():
            self._try(partial(self._hear, worker, news))
        for rows in self._book.guilty():
            self._disk_jobs.append(partial(self._end_guilty, rows))
        self._do_disk_jobs()

    def _try(self, step: Callable[[], None]) -> None:
        """The first error ends the job, once what is under way has ended."""
        try:
            step()
        except BatchgenError as error:
            self._error = self._error or error

    def _is_through(self) -> bool:
        is_idle = not self._disk_jobs and not any(one.is_at_work for one in self.pool.workers)
        return self._book.is_through and is_idle and self._error is None

    # Stopping.

    def _is_to_stop(self) -> bool:
        """Tell the workers, once, how far to stop; whether they are to."""
        stop = self.context.stop
        wanted = (stop.state, stop.is_patient)
        if self._error is not None and stop.state is Stop.NO:
            wanted = (Stop.DRAIN, False)
        if wanted[0] is Stop.NO:
            return False
        if wanted != self._halted:
            self._halted = wanted
            wait_s = 0.0 if wanted[0] is Stop.NOW else self.context.job.run.grace_s
            is_patient = wanted == (Stop.DRAIN, True)
            self._give_up_s = None if is_patient else self._clock() + wait_s + _COMMIT_GRACE_S
            for worker in self.pool.workers:
                worker.orders.append(messages.Halt(*wanted))
        return True

    def _has_stopped(self) -> bool:
        if self._give_up_s is not None and self._clock() >= self._give_up_s:
            return True
        return not any(worker.is_at_work for worker in self.pool.up)

    # Rows to workers.

    def _lease(self) -> None:
        self.pool.care()
        up = self.pool.up
        for packer in list(self._packers):
            packer.fill(self._book, _PACKS_AHEAD_ROWS * max(1, len(up)))
            if packer.is_done:
                packer.close()
                self._packers.remove(packer)
        self._book.is_fed = not self._packers
        asks, epoch = self.deduper is not None and not self.is_packed, self.work.epoch
        for worker in up:
            if not worker.is_begun:
                worker.is_begun = True
                worker.orders.append(messages.Begin(epoch.plan, epoch.number, asks, self.is_packed))
        ready = [worker for worker in up if self.is_packed or worker.sees_input]
        outlook = self._look_at(ready)
        if not outlook.is_held_up:
            now_s = self._clock()
            for worker in ready:
                if not worker.is_exchanging:  # Else its orders would wait, and grow old.
                    self._lease_to(worker, pacing.rows_for(worker.pace(now_s), outlook))

    def _look_at(self, ready: Sequence[WorkerHandle]) -> pacing.Outlook:
        """The workers as they are, or were a moment ago: hundreds are expensive to look at."""
        now_s, before = self._clock(), self._outlook
        if before is not None and len(ready) == self._num_seen and now_s < self._look_again_s:
            return before
        paces = [worker.pace(now_s) for worker in ready]
        num_pending = self._book.num_pending + sum(packer.num_left for packer in self._packers)
        outlook = pacing.outlook(paces, num_pending, self.pool.num_expected)
        self._outlook, self._num_seen = outlook, len(ready)
        # Before a speed is known, the next worker to tell one would seem to have time for ever.
        self._look_again_s = now_s + (_OUTLOOK_S if outlook.mean_rate else 0.0)
        if outlook.is_held_up:
            self._outlook = None
            for worker, one in zip(ready, paces, strict=True):
                if not one.is_up and one.backlog:
                    reason = "its engine is not up, and nothing but its rows is left to do"
                    self._give_up(worker, reason, has_died=False)
        return outlook

    def _lease_to(self, worker: WorkerHandle, num_rows: int) -> None:
        book, number = self._book, worker.number
        is_up = worker.look is not None and worker.look.facts is not None
        left = num_rows
        while left > 0 and (lease := book.take(number, left, is_up=is_up)) is not None:
            num = count(lease.rows)
            worker.orders.append(messages.Take(lease))
            worker.num_leased += num
            worker.is_busy = True
            left -= num
        has_none = book.is_fed and (not book.num_pending or left == num_rows > 0)
        if worker.is_busy and (has_none or book.is_alone(number)):
            worker.orders.append(messages.Finish())
            worker.is_busy = False
            worker.num_finishing += 1

    def _pack(self, rows: Rows) -> None:
        """Read these here."""
        if rows:
            self._packers.append(Packer(self.feed(rows), self.pool.cluster.put, count(rows)))
            self._book.is_fed = False

    # What workers say.

    def _hear(self, worker: WorkerHandle, news: Report | messages.Gone) -> None:
        if isinstance(news, messages.Gone):
            self._give_up(worker, news.reason, has_died=True)
            return
        if news.look is not None:
            self._stats.note(worker, news.look)
        for event in news.events:
            self._note(worker, event)

    def _note(self, worker: WorkerHandle, event: Event) -> None:
        if isinstance(event, messages.Asked):
            worker.orders.append(self._set_aside(worker, event))
        elif isinstance(event, messages.Committed):
            self._settle(worker, event)
            self.context.note_commit(event.seconds)
        elif isinstance(event, messages.Finished):
            worker.num_finishing = max(0, worker.num_finishing - 1)
            if not event.is_complete:
                worker.is_busy, worker.num_finishing = False, 0
        elif isinstance(event, messages.Ready):
            self._see(worker, sees_input=event.sees_input)
        elif isinstance(event, messages.EngineDied):
            self._stats.note_engine_death(worker)
            self.context.note_death(event.death, f", replica {worker.replica}")
        elif isinstance(event, messages.Failed):
            self._fail(worker, event.error)
        elif isinstance(event, messages.Noted):
            self.context.notes.add(event.text)

    def _see(self, worker: WorkerHandle, *, sees_input: bool) -> None:
        """Rows go by way of the driver from now on, if one worker does not see the input."""
        worker.sees_input = sees_input
        if sees_input or self.is_packed:
            return
        host = worker.look.host if worker.look is not None else "?"
        self.context.notes.add(f"the input is not to be seen on {host}: rows are sent from here")
        self.is_packed = True
        self._pack(self._book.withdraw())

    def _fail(self, worker: WorkerHandle, error: BatchgenError) -> None:
        """A worker cannot go on: by its own fault, or the job's."""
        is_own = isinstance(error, EngineError | StorageError)
        if isinstance(error, ConfigError):
            is_own = self._stats.has_seen_engine  # The job's settings are good where it is up.
        if isinstance(error, InputChangedError):  # Is it that node that has lost it?
            is_own = not input_changes(self.work.epoch.plan)
        if isinstance(error, EngineError) and not self._stats.has_seen_engine:
            # One may have a bad GPU; if it is all of them, it is the job.
            self._num_not_started += 1
            is_own = self._num_not_started < self.pool.num_replicas
        if not is_own:
            self._error = self._error or error
        self._give_up(worker, str(error), has_died=False)

    def _give_up(self, worker: WorkerHandle, reason: str, *, has_died: bool) -> None:
        self.pool.dismiss(worker, reason)
        self._disk_jobs.append(partial(self._close_books, worker, reason, has_died=has_died))

    # What is durable: by the words of workers and, once one is gone, by its files.

    def _set_aside(self, worker: WorkerHandle, asked: messages.Asked) -> messages.Answer:
        """Say which requests are to be computed; the rows of the others wait for their answers."""
        assert self.deduper is not None  # noqa: S101 - else nobody asks
        passes = self.deduper.let_pass(asked.prefixes, asked.has_seed)
        worker.passed.append((asked, passes))
        aside = [row for row, passed in zip(asked.rows, passes, strict=True) if not passed]
        if aside:
            worker.num_set_aside += len(aside)
            self._book.settle(worker.number, {asked.segment: Ranges.of(aside)})
        return messages.Answer(asked.ask, passes)

    def _settle(self, worker: WorkerHandle, committed: messages.Committed) -> None:
        """A part is durable.

        Raises:
            AccountingError: It holds rows that the worker should not have.
        """
        self._committed.append(committed.name)
        worker.parts.add(committed.name)
        self._stats.note_committed(worker, committed)
        if self._book.settle(worker.number, committed.done):
            msg = f"{committed.name}: holds rows that worker {worker.number} was not given"
            raise AccountingError(msg)
        if self.deduper is None:
            return
        left = self._book.rows_out(worker.number)

        def may_come_back(asked: messages.Asked) -> bool:
            rows = left[asked.segment]
            return any(rows.within(min(asked.rows), max(asked.rows) + 1))

        worker.passed = deque(one for one in worker.passed if may_come_back(one[0]))

    def _close_books(self, worker: WorkerHandle, reason: str, *, has_died: bool) -> None:
        """A worker is given up: what it has committed counts, its other rows are free again.

        Raises:
            StorageError: It cannot be sealed yet: its rows stay where they are.
        """
        if worker.is_begun:
            ledger, epoch = self.context.ledger, self.work.epoch
            names = ledger.seal(epoch, worker.number)
            # Those that count and that it has not told of.
            for part in ledger.parts(epoch.plan, set(names) - worker.parts).parts:
                footer = part.footer
                counts = Counts(footer.num_ok, footer.num_errors, footer.num_skipped)
                self._settle(worker, messages.Committed(part.name, footer.done, counts, 0.0))
        self._stats.note_gone(worker, reason)
        rows = self._book.take_back(worker.number, has_died=has_died)
        if self.deduper is not None:
            for asked, passes in worker.passed:
                mine = rows[asked.segment]
                those = zip(asked.rows, asked.prefixes, asked.has_seed, passes, strict=True)
                self.deduper.take_back(
                    (prefix, seeded)
                    for row, prefix, seeded, passed in those
                    if passed and row in mine
                )
        if self.is_packed:  # Whoever gets its rows may not see the input.
            self._pack(self._book.withdraw())

    def _end_guilty(self, rows: Rows) -> None:
        """Make errors of rows that were alone in workers that died, twice.

        Raises:
            StorageError: Not durable; may be tried again.
        """
        stages, judge = self.work.stages, self.work.prepared.judge()
        part = OpenPart(since_s=time.monotonic())
        error = RowError("engine_crash", "workers died with this row alone in them")
        for batch in stages.read(rows):
            for outcome in stages.builder().of(batch):
                if not isinstance(outcome, Request):
                    part.results.append(outcome)
                    continue
                (result,) = judge.judge([(outcome, failed(outcome.request_id, error))])
                part.results.append(final(outcome, result))
        self.work.commits.computed(part, self.pool.facts)
        self.context.stats.note_ends(part.results)

    def _do_disk_jobs(self) -> None:
        """Do what touches the output; what the disk refuses is tried again for `disk_grace_s`."""
        jobs, self._disk_jobs = self._disk_jobs, []
        for job in jobs:
            try:
                job()
            except StorageError as error:
                self._disk_jobs.append(job)
                self.context.tell_disk_trouble(error)
                if self._disk_give_up_s is None:
                    self._disk_give_up_s = self._clock() + self.context.job.run.disk_grace_s
                if self._clock() >= self._disk_give_up_s:
                    self._error = self._error or error
            except BatchgenError as error:
                self._error = self._error or error
        if not self._disk_jobs:
            self._disk_give_up_s = None

    def _await_parts(self) -> None:
        """Wait until the parts that workers have told of can be listed here.

        A network file system may show a folder as it was a while ago: NFS keeps its entries for
        up to 60 s (nfs(5), acdirmax).

        Raises:
            OutputError: One is not there.
        """
        storage, until_s = self.context.ledger.storage, time.monotonic() + _LISTING_S
        while missing := set(self._committed) - set(storage.list(PARTS)):
            if time.monotonic() >= until_s:
                raise OutputError(f"{storage.where}: {min(missing)} was committed and is not there")
            time.sleep(_LISTING_WAIT_S)
