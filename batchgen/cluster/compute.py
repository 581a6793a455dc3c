"""`Cluster`: computes a job's rows by many workers, wherever there is room for them."""

from __future__ import annotations

import itertools
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from batchgen.answers.validate import final
from batchgen.cluster.answering import Answering, Task
from batchgen.cluster.board import Board
from batchgen.cluster.crews import needs_of, ray_crew, share_gpu
from batchgen.cluster.leases import LeaseBook
from batchgen.cluster.roster import Roster
from batchgen.core.records import Request, RowError
from batchgen.engine.base import failed
from batchgen.pipeline.committer import OpenPart
from batchgen.pipeline.frozen import input_changes
from batchgen.pipeline.progress import RUNNING, watching

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from batchgen.cluster.crew import Crew
    from batchgen.cluster.roster import Member
    from batchgen.core.ranges import Ranges
    from batchgen.core.records import EngineFacts, EngineStats
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.compute import Rows, TakeOver, Work
    from batchgen.pipeline.context import RunContext
    from batchgen.pipeline.feeder import Feeder
    from batchgen.pipeline.prepare import Prepared
    from batchgen.pipeline.progress import Look
    from batchgen.store.dedupe import Sieve


class Cluster:
    """`Compute` by the workers of one run: hired when it is sure that there is work."""

    def __init__(
        self,
        context: RunContext,
        *,
        crew: Callable[[JobConfig], Crew] = ray_crew,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bind; nobody is hired.

        Args:
            context: The run.
            crew: Makes what places workers.
            clock: Monotonic seconds.

        Raises:
            ConfigError: Replicas of a size that cannot be had.
        """
        self._context = context
        self._job = share_gpu(context.job, needs_of(context.job))
        self._make_crew = crew
        self._clock = clock
        self._board = Board(context.stats, clock=clock)
        self._crew: Crew | None = None
        self._roster: Roster | None = None
        self._facts: EngineFacts | None = None
        self._deaths = itertools.count(1)
        self.death: str | None = None

    @property
    def is_started(self) -> bool:
        """Whether anybody was hired."""
        return self._roster is not None

    @property
    def facts(self) -> EngineFacts | None:
        """What one of the engines is; None until one is up."""
        up = self._roster.up if self._roster is not None else []
        found = (member.look.facts for member in up if member.look is not None)
        return next((facts for facts in found if facts is not None), self._facts)

    @property
    def stats(self) -> EngineStats:
        """The sums and means of what all schedulers tell."""
        return self._board.engines()

    @property
    def num_in_flight(self) -> int:
        """Requests that all engines hold."""
        return self._board.num_in_flight

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
        if self._roster is None:
            _, roster = self._hire()
            roster.is_starting_engines = True
            roster.care()
            roster.send()

    def _hire(self) -> tuple[Crew, Roster]:
        if self._crew is None or self._roster is None:
            self._crew = self._make_crew(self._job)
            self._roster = Roster(
                self._crew,
                self._job,
                self._context.run_id,
                on_hired=lambda member: self._board.note_hired(member.replica, member.number),
                tell=self._context.notes.add,
                clock=self._clock,
            )
        return self._crew, self._roster

    def answer(
        self, work: Work, rows: Rows, sieve: Sieve | None, take_over: TakeOver | None = None
    ) -> bool:
        """Lease the rows to workers. See `Compute`; rows are taken over first."""
        context = self._context
        if take_over is not None:
            rows = take_over(lambda: None)
        if context.is_stopped() or not rows:
            return not context.is_stopped()
        task = Task(
            epoch=work.epoch,
            todo=rows,
            is_packed=self._is_packed(work, rows),
            by_prefix=context.job.run.order == "prefix",
            sieve=sieve,
            feed=partial(self._feed, work, sieve),
            is_input_still=lambda: not input_changes(work.epoch.plan, work.prepared.reader),
            end_guilty=partial(self._end_guilty, work),
            on_commit=context.note_commit,
            on_death=self._note_death,
            on_disk_trouble=context.tell_disk_trouble,
            disk_grace_s=context.job.run.disk_grace_s,
            tell=context.notes.add,
        )
        crew, roster = self._hire()
        book = LeaseBook({} if task.is_packed else task.todo)
        ledger = context.ledger
        answering = Answering(task, roster, crew, book, self._board, ledger, clock=self._clock)
        with watching(context, self._look) as monitor:
            try:
                return answering.run(context.stop, context.job.run.grace_s, monitor.tick)
            finally:
                self._facts = self.facts

    def _look(self, now_s: float) -> Look:
        board = self._board
        state = RUNNING if self.facts is not None else "starting the engines"
        return board.whole(now_s), state, board.rows(now_s)

    def _is_packed(self, work: Work, rows: Rows) -> bool:
        """Whether rows travel by way of the driver.

        For an order over the whole job; or where a worker would have to read a file from its
        start for each lease.
        """
        if self._context.job.run.order == "prefix":
            return True
        reader, segments = work.prepared.reader, work.epoch.plan.segments
        return not all(reader.is_seekable(segments[number].path) for number in rows)

    def _feed(self, work: Work, sieve: Sieve | None, rows: Rows) -> Feeder:
        stages = work.stages
        passing = sieve.passing if sieve is not None else None
        return stages.feeder(stages.feed(stages.read(rows), passing), self)

    def _end_guilty(self, work: Work, rows: Mapping[int, Ranges]) -> None:
        """Make errors of rows that were alone in workers that died, twice."""
        stages, judge = work.stages, work.prepared.judge()
        part = OpenPart(since_s=time.monotonic())
        error = RowError("engine_crash", "workers died with this row alone in them")
        for batch in stages.read(rows):
            for outcome in stages.builder().of(batch):
                if not isinstance(outcome, Request):
                    part.results.append(outcome)
                    continue
                (result,) = judge.judge([(outcome, failed(outcome.request_id, error))])
                part.results.append(final(outcome, result))
        work.commits.computed(part, self.facts)  # May be refused, and done again.
        self._context.stats.note_ends(part.results)

    def _note_death(self, member: Member, death: Mapping[str, Any]) -> None:
        number = next(self._deaths)
        self.death = str(death["reason"])
        path = self._context.log.engine_death(number, death)
        told = f"engine death {number}, replica {member.replica}"
        self._context.notes.add(f"{told}: {self.death}; see {path}")

    def advice(self) -> list[str]:
        """Empty: the samples are of all engines together."""
        return []

    def let_go(self) -> None:
        """Nothing yet: Ray wants to be closed by the thread that has started it."""

    def close(self) -> None:
        """Let go of all workers. Idempotent."""
        crew, self._crew, self._roster = self._crew, None, None
        if crew is not None:
            crew.close()
