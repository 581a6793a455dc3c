"""The driver's loop: leases rows to workers until each has ended and is durable.

A row's way here: free in the `LeaseBook` -> leased -> its worker says that it is durable, or is
told that its answer is another row's -> settled (`Settling`). A worker that is gone is sealed
first: what it committed counts, what it writes from then on nobody accepts, and only then its
other rows are free again. So no row is ever in two hands.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from batchgen.cluster import pace
from batchgen.cluster.chores import Chores
from batchgen.cluster.messages import (
    Asked,
    Begin,
    Committed,
    EngineDied,
    Failed,
    Finish,
    Finished,
    Gone,
    Halt,
    Noted,
    Ready,
    Take,
)
from batchgen.cluster.packing import Packer
from batchgen.cluster.settling import Settling
from batchgen.core.errors import (
    BatchgenError,
    ConfigError,
    EngineError,
    InputChangedError,
    StorageError,
)
from batchgen.pipeline.context import Stop

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from batchgen.cluster.board import Board
    from batchgen.cluster.crew import Crew
    from batchgen.cluster.leases import LeaseBook
    from batchgen.cluster.messages import Event, Report
    from batchgen.cluster.roster import Member, Roster
    from batchgen.core.ranges import Ranges
    from batchgen.pipeline.context import StopSwitch
    from batchgen.pipeline.feeder import Feeder
    from batchgen.store.books import Epoch
    from batchgen.store.dedupe import Sieve
    from batchgen.store.ledger import Ledger

_PACKS_AHEAD_ROWS = 8192
_COMMIT_GRACE_S = 30.0
_OUTLOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be answered, and who helps."""

    epoch: Epoch
    todo: Mapping[int, Ranges]
    is_packed: bool
    """Whether rows travel by way of the driver."""
    by_prefix: bool
    """Whether these come sorted by their prompts' text."""
    sieve: Sieve | None
    """Which requests are to be computed; None: all."""
    feed: Callable[[Mapping[int, Ranges]], Feeder]
    """Reads rows in the driver."""
    is_input_still: Callable[[], bool]
    """Looks whether the input is as it was planned, here."""
    end_guilty: Callable[[Mapping[int, Ranges]], None]
    """Makes rows errors that have killed workers."""
    on_commit: Callable[[float], None]
    """Told how long a commit took."""
    on_death: Callable[[Member, Mapping[str, object]], None]
    """Told of an engine's death."""
    on_disk_trouble: Callable[[StorageError], None]
    """Told that the disk refuses; it is asked again for `disk_grace_s`."""
    disk_grace_s: float
    tell: Callable[[str], None]
    """Told what is worth a warning."""


class Answering:
    """One task. Use once: `Answering(...).run(...)`."""

    def __init__(  # noqa: PLR0913 - the one place where all of the driver meets
        self,
        task: Task,
        roster: Roster,
        crew: Crew,
        book: LeaseBook,
        board: Board,
        ledger: Ledger,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bind; `book` is new and empty, `clock` tells monotonic seconds."""
        self._task = task
        self._roster = roster
        self._crew = crew
        self._book = book
        self._board = board
        self._clock = clock
        self._settling = Settling(task.epoch, book, board, ledger, task.sieve)
        self._packers: list[Packer] = []
        self._is_packed = task.is_packed
        self._trouble: BatchgenError | None = None
        self._halted: tuple[Stop, bool] = (Stop.NO, False)
        self._give_up_s: float | None = None
        self._num_not_started = 0
        self._chores = Chores(task.disk_grace_s, task.on_disk_trouble, clock)
        self._outlook: pace.Outlook | None = None
        self._num_seen = 0
        self._look_again_s = 0.0

    def run(self, stop: StopSwitch, grace_s: float, on_tick: Callable[[], None]) -> bool:
        """Work until every row has ended and is durable, or until stopped.

        Args:
            stop: May be asked at any time.
            grace_s: How long rows in flight may take once it is.
            on_tick: Called often; must be quick.

        Returns:
            Whether every row has ended.

        Raises:
            BatchgenError: Job trouble. What finished before it is durable, if it can be.
        """
        stop.is_heard = True
        self._roster.begin(sum(map(len, self._task.todo.values())))
        self._book.is_fed = True
        if self._is_packed:
            self._pack(self._task.todo)
        try:
            while not self._is_through():
                if self._is_to_stop(stop, grace_s) and self._has_stopped():
                    break
                self._turn()
                on_tick()
        finally:
            stop.is_heard = False
            for packer in self._packers:
                packer.close()
        if self._trouble is not None:
            raise self._trouble
        self._settling.await_parts()
        return self._book.is_through

    def _turn(self) -> None:
        if self._halted[0] is Stop.NO:
            try:
                self._roster.care()
                self._lease()
            except BatchgenError as error:
                self._trouble = self._trouble or error
        for member, news in self._roster.talk():
            try:
                self._hear(member, news)
            except BatchgenError as error:
                self._trouble = self._trouble or error
        for lease in self._book.guilty():
            self._chores.add(partial(self._task.end_guilty, lease.rows))
        self._trouble = self._trouble or self._chores.do()

    def _is_through(self) -> bool:
        is_idle = not self._chores and not any(one.is_at_work for one in self._roster.members)
        return self._book.is_through and is_idle and self._trouble is None

    # Stopping.

    def _is_to_stop(self, stop: StopSwitch, grace_s: float) -> bool:
        """Tell the workers, once, how far to stop; whether they are to."""
        wanted = (stop.state, stop.is_patient)
        if self._trouble is not None and stop.state is Stop.NO:
            wanted = (Stop.DRAIN, False)
        if wanted[0] is Stop.NO:
            return False
        if wanted != self._halted:
            self._halted = wanted
            wait_s = 0.0 if wanted[0] is Stop.NOW else grace_s
            patient = wanted == (Stop.DRAIN, True)
            self._give_up_s = None if patient else self._clock() + wait_s + _COMMIT_GRACE_S
            for member in self._roster.members:
                member.orders.append(Halt(*wanted))
        return True

    def _has_stopped(self) -> bool:
        if self._give_up_s is not None and self._clock() >= self._give_up_s:
            return True
        return not any(member.is_at_work for member in self._roster.up)

    # Rows to workers.

    def _lease(self) -> None:
        up = self._roster.up
        self._fill()
        for member in up:
            if not member.is_begun:
                member.is_begun = True
                task = self._task
                asks = task.sieve is not None and not task.is_packed
                member.orders.append(
                    Begin(task.epoch.plan, task.epoch.number, asks, task.is_packed)
                )
        ready = [member for member in up if self._is_packed or member.sees_input]
        outlook = self._look_at(ready)
        if not outlook.is_held_up:
            now_s = self._clock()
            for member in ready:
                if not member.is_exchanging:  # Else its orders would wait, and grow old.
                    self._lease_to(member, pace.rows_for(member.pace(now_s), outlook))

    def _look_at(self, ready: Sequence[Member]) -> pace.Outlook:
        """The fleet as it is, or was a moment ago: hundreds of workers are dear to look at."""
        now_s, before = self._clock(), self._outlook
        if before is not None and len(ready) == self._num_seen and now_s < self._look_again_s:
            return before
        paces = [member.pace(now_s) for member in ready]
        num_pending = self._book.num_pending + self._num_unpacked()
        outlook = pace.outlook(paces, num_pending, self._roster.num_expected)
        self._outlook, self._num_seen = outlook, len(ready)
        # Before a speed is known, the next worker to tell one would seem to have time for ever.
        self._look_again_s = now_s + (_OUTLOOK_S if outlook.mean_rate else 0.0)
        if outlook.is_held_up:
            self._outlook = None
            for member, one in zip(ready, paces, strict=True):
                if not one.is_up and one.backlog:
                    reason = "its engine is not up, and nothing but its rows is left to do"
                    self._give_up(member, reason, has_died=False)
        return outlook

    def _num_unpacked(self) -> int:
        """Rows that the driver has yet to read."""
        return sum(packer.num_left for packer in self._packers)

    def _lease_to(self, member: Member, num_rows: int) -> None:
        book, number = self._book, member.number
        left = num_rows
        while left > 0 and (lease := book.take(number, left)) is not None:
            num = sum(map(len, lease.rows.values()))
            member.orders.append(Take(lease))
            member.num_leased += num
            member.is_busy = True
            left -= num
        has_none = book.is_fed and (not book.num_pending or left == num_rows > 0)
        if member.is_busy and (has_none or book.is_alone(number)):
            member.orders.append(Finish())
            member.is_busy = False
            member.num_finishing += 1

    def _pack(self, rows: Mapping[int, Ranges]) -> None:
        """Read these here."""
        if rows:
            num_rows = sum(map(len, rows.values()))
            feeder, by_prefix = self._task.feed(rows), self._task.by_prefix
            self._packers.append(Packer(feeder, self._crew.put, num_rows, by_prefix=by_prefix))
            self._book.is_fed = False

    def _fill(self) -> None:
        for packer in list(self._packers):
            packer.fill(self._book, _PACKS_AHEAD_ROWS * max(1, len(self._roster.up)))
            if packer.is_done:
                packer.close()
                self._packers.remove(packer)
        self._book.is_fed = not self._packers

    # What workers say.

    def _hear(self, member: Member, news: Report | Gone) -> None:
        if isinstance(news, Gone):
            self._give_up(member, news.reason, has_died=True)
            return
        if news.look is not None:
            self._board.note(member.replica, member.number, news.look)
        for event in news.events:
            self._note(member, event)

    def _note(self, member: Member, event: Event) -> None:
        if isinstance(event, Asked):
            member.orders.append(self._settling.set_aside(member, event))
        elif isinstance(event, Committed):
            self._settling.commit(member, event)
            self._task.on_commit(event.seconds)
        elif isinstance(event, Finished):
            member.num_finishing = max(0, member.num_finishing - 1)
            if not event.is_complete:
                member.is_busy, member.num_finishing = False, 0
        elif isinstance(event, Ready):
            self._see(member, sees_input=event.sees_input)
        elif isinstance(event, EngineDied):
            self._board.note_engine_death(member.number)
            self._task.on_death(member, event.death)
        elif isinstance(event, Failed):
            self._fail(member, event.error)
        elif isinstance(event, Noted):
            self._task.tell(event.text)

    def _see(self, member: Member, *, sees_input: bool) -> None:
        """Rows go by way of the driver from now on, if one worker does not see the input."""
        member.sees_input = sees_input
        if sees_input or self._is_packed:
            return
        host = member.look.host if member.look is not None else "?"
        self._task.tell(f"the input is not to be seen on {host}: rows are sent from here")
        self._is_packed = True
        self._pack(self._book.withdraw())

    def _fail(self, member: Member, error: BatchgenError) -> None:
        """A worker cannot go on: its own trouble, or the job's."""
        is_own = isinstance(error, EngineError | StorageError)
        if isinstance(error, ConfigError):
            is_own = self._board.has_seen_engine  # The job's settings are good where it is up.
        if isinstance(error, InputChangedError):
            is_own = self._task.is_input_still()  # Then it is that node that has lost it.
        if isinstance(error, EngineError) and not self._board.has_seen_engine:
            # One may have a bad GPU; if it is all of them, it is the job.
            self._num_not_started += 1
            is_own = self._num_not_started < self._roster.num_replicas
        if not is_own:
            self._trouble = self._trouble or error
        self._give_up(member, str(error), has_died=False)

    def _give_up(self, member: Member, reason: str, *, has_died: bool) -> None:
        self._roster.dismiss(member, reason)
        self._chores.add(partial(self._close_books, member, reason, has_died=has_died))

    def _close_books(self, member: Member, reason: str, *, has_died: bool) -> None:
        self._settling.close(member, reason, has_died=has_died)
        if self._is_packed:  # Whoever gets its rows may not see the input.
            self._pack(self._book.withdraw())
