"""`Fleet`: stands in a run where its one engine would, and answers what the run leaves to it."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

from batchgen.cluster.answering import Answering
from batchgen.cluster.leases import LeaseBook
from batchgen.cluster.roster import Roster
from batchgen.core.records import EngineStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchgen.cluster.answering import Task
    from batchgen.cluster.board import Board
    from batchgen.cluster.crew import Crew
    from batchgen.cluster.roster import Member
    from batchgen.core.records import EngineFacts
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.runner import StopSwitch
    from batchgen.store.ledger import Ledger


class Fleet:
    """The workers of one run. Started when it is sure that there is work, closed in the end."""

    def __init__(
        self,
        job: JobConfig,
        run_id: str,
        make_crew: Callable[[JobConfig], Crew],
        board: Board,
        tell: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bind; nothing is started.

        Args:
            job: As loaded.
            run_id: Of this run.
            make_crew: Makes what places workers.
            board: Where their figures go.
            tell: Told what is worth a warning.
            clock: Monotonic seconds.
        """
        self._job = job
        self._run_id = run_id
        self._make_crew = make_crew
        self.board = board
        self._tell = tell
        self._clock = clock
        self._crew: Crew | None = None
        self._roster: Roster | None = None
        self._facts: EngineFacts | None = None
        self.deaths = itertools.count(1)
        """Numbers for engines that die."""

    def start(self) -> None:
        """Begin to bring up all workers and their engines. Idempotent.

        Raises:
            BatchgenError: There is nothing to place them.
        """
        if self._roster is None:
            roster = self._hire()
            roster.is_starting_engines = True
            roster.care()
            roster.send()

    def _hire(self) -> Roster:
        if self._roster is None:
            crew = self._crew = self._make_crew(self._job)
            self._roster = Roster(
                crew,
                self._job,
                self._run_id,
                on_hired=self._note_hired,
                tell=self._tell,
                clock=self._clock,
            )
        return self._roster

    def _note_hired(self, member: Member) -> None:
        self.board.note_hired(member.replica, member.number)

    def answer(
        self, task: Task, ledger: Ledger, stop: StopSwitch, on_tick: Callable[[], None]
    ) -> bool:
        """End the rows of a task; see `Answering.run`.

        Raises:
            BatchgenError: Job trouble. What finished before it is durable, if it can be.
        """
        roster, crew = self._hire(), self._crew
        assert crew is not None  # noqa: S101 - made with the roster
        book = LeaseBook({} if task.is_packed else task.todo)
        answering = Answering(task, roster, crew, book, self.board, ledger, clock=self._clock)
        try:
            return answering.run(stop, self._job.run.grace_s, on_tick)
        finally:
            self._facts = self.facts

    def close(self) -> None:
        """Let go of all workers. Idempotent."""
        crew, self._crew, self._roster = self._crew, None, None
        if crew is not None:
            crew.close()

    # What an engine tells of itself, of all of them.

    @property
    def is_started(self) -> bool:
        """Whether anybody was hired."""
        return self._roster is not None

    @property
    def facts(self) -> EngineFacts | None:
        """Of one of the engines; None until one is up."""
        found = (member.look.facts for member in self._up() if member.look is not None)
        return next((facts for facts in found if facts is not None), self._facts)

    @property
    def capacity(self) -> int:
        """Requests that all engines want to hold."""
        return sum(member.look.capacity for member in self._up() if member.look is not None)

    @property
    def num_in_flight(self) -> int:
        """Requests that all engines hold."""
        return sum(member.look.num_in_flight for member in self._up() if member.look is not None)

    @property
    def stats(self) -> EngineStats:
        """Of one engine it would be the scheduler's; see `Board` for those of many."""
        return EngineStats()

    @property
    def warnings(self) -> list[str]:
        """Told as they come."""
        return []

    def _up(self) -> list[Member]:
        return self._roster.up if self._roster is not None else []
