"""`SupervisedEngine`: what a run sees of its engine. Each row given to it comes back exactly once.

Behind it stands one engine after the other, the first of them built when there is something to
do. It is the one place that keeps books of what engines were asked and what they gave back, and
whatever goes wrong with an engine ends as a row's error, or as the end of the run:

- Answers to what is not in flight (never asked, or answered already) are dropped and counted. A
  request that the engine lost is added once more; lost again, it is that row's `engine_lost`.
- An engine that finishes no row and changes no statistic for `stall_s` counts as dead.
- A dead one is closed, never spoken to again, and another is built. What was in flight goes
  through `SuspectSearch`; while that is on nothing else is inside, and rows that come wait here.
  A row found guilty becomes the error `engine_crash`, but is told only once another row has come
  back: an engine that answers nothing proves nothing against a row.
- Out of memory: the next one runs half as much at once.
- Deaths without progress end the run (`death.Tally`).

It must not know what kind of engine it holds. An engine in this process whose `step` never
returns cannot be helped from here; that is what `EngineProcess` is for.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING

from batchgen.core.errors import ConfigError, EngineDeadError, EngineError
from batchgen.core.records import EngineStats, RowError
from batchgen.engine.base import Engine, expect, failed
from batchgen.engine.death import (
    MAX_LOG_LINES,
    MAX_ROWS,
    SOLO_DEATHS,
    EngineDeath,
    SuspectSearch,
    Tally,
    ask_less,
    is_out_of_memory,
    log_size,
    log_tail,
    may_be_by_settings,
    row_in_flight,
    utc_now,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.core.records import Completion, EngineFacts, EngineSpec, Request, WorkLeft

    Answered = tuple[Request, Completion]
    Build = Callable[[EngineSpec], Engine]

STALL_S = 900.0
"""The longest step known is a first one that compiles, minutes."""
REBUILD_WAITS_S = (2.0, 10.0, 30.0, 60.0)
"""A dead engine's GPU memory may be taken for a while: vllm#20305, #18974, #55169."""
LOST_S = 2.0
"""Patience where an engine's own count cannot be trusted; its statistics are 0.5 s old at most."""
LOST = RowError("engine_lost", "the engine lost the request twice: no answer, no error")
_FIRST_REQUESTS = 1
"""Room before the first engine is built: enough to have a reason to."""


@dataclass(slots=True)
class _Life:
    """One engine from its start to its end, with the books of what it was asked."""

    engine: Engine
    spec: EngineSpec
    log_start: int
    progress_s: float
    held: dict[int, Request] = field(default_factory=dict)
    """In flight, in the order of admission."""
    lost_once: set[int] = field(default_factory=set)
    num_strays: int = 0
    seen_stats: EngineStats = field(default_factory=EngineStats)

    def quiet_s(self, now_s: float) -> float:
        """How long it has shown no progress; one that is not up yet need not show any."""
        stats = self.engine.stats
        if stats != self.seen_stats or self.engine.facts is None:
            self.seen_stats, self.progress_s = stats, now_s
        return now_s - self.progress_s

    def has_lost(self, quiet_s: float) -> bool:
        """Whether the engine believes that it has nothing to do, while we wait for it.

        A second answer counts as a return in the engine's books, so those are corrected by the
        strays; where an answer bore a wrong id they were right, so its statistics decide.
        """
        num = self.engine.num_in_flight
        if num + self.num_strays <= 0:
            return True
        stats = self.seen_stats
        is_idle = (stats.num_running, stats.num_waiting) == (0, 0)
        return num <= 0 and is_idle and quiet_s >= LOST_S


@dataclass(eq=False)
class SupervisedEngine:
    """One owner thread; others may look at its properties."""

    build: Build
    """Builds an engine; returns at once. If one does not start, here or in its first steps: the
    first time the caller is told, later it is tried again."""
    make_spec: Callable[[], EngineSpec]
    """Of the first engine, asked when it is built; later ones may be asked for less."""
    _: KW_ONLY
    on_death: Callable[[EngineDeath], None] = lambda death: None
    """Told of every death, before the next engine is built."""
    stall_s: float = STALL_S
    """How long an engine with work may show no progress."""
    clock: Callable[[], float] = time.monotonic
    """Monotonic seconds."""
    sleep: Callable[[float], None] = time.sleep
    """Waits between attempts to build."""

    def __post_init__(self) -> None:
        self._spec: EngineSpec | None = None
        self._work: WorkLeft | None = None
        self._log_path: str | None = None
        self._life: _Life | None = None
        self._queue: deque[Request] = deque()
        self._blamed: list[Answered] = []
        self._search = SuspectSearch()
        self._tally = Tally()
        self._notes: list[str] = []
        self._num_strays = 0
        self._num_lost = 0
        self._over: EngineDeadError | None = None
        self._num_failed_builds = 0
        self._build_s = 0.0
        self._last_facts: EngineFacts | None = None
        self._last_capacity = _FIRST_REQUESTS
        self.is_admitting = True
        """Whether requests go to the engine, and do not wait here for the next one."""

    @property
    def is_started(self) -> bool:
        """Whether anything was ever to do."""
        return self._spec is not None

    @property
    def num_members(self) -> int:
        """Engines that work at once: this one."""
        return 1

    @property
    def facts(self) -> EngineFacts | None:
        """What the engine is, or between two, what the last one was; None until it is up."""
        return (self._life.engine.facts if self._life else None) or self._last_facts

    @property
    def capacity(self) -> int:
        """How many requests the engine wants to hold; those that wait here count, too."""
        return self._life.engine.capacity if self._life else self._last_capacity

    @property
    def num_in_flight(self) -> int:
        """Requests added and not yet returned, wherever they are."""
        num_inside = len(self._life.held) if self._life else 0
        return num_inside + len(self._queue) + self._search.num_waiting + len(self._blamed)

    @property
    def stats(self) -> EngineStats:
        """The engine's latest look at its scheduler; unknown between two."""
        return self._life.engine.stats if self._life else EngineStats()

    @property
    def num_deaths(self) -> int:
        """How many engines have died."""
        return self._tally.num_deaths

    @property
    def warnings(self) -> list[str]:
        """What a person should know though the run went on, a line each; not the deaths."""
        strays = f"{self._num_strays} answers that came twice, or unasked, were dropped"
        lost = f"{self._num_lost} requests were lost by the engine and added again"
        odd = [text for text, num in ((strays, self._num_strays), (lost, self._num_lost)) if num]
        return self._notes + odd

    def start(self) -> None:
        """Build the first engine, without waiting until it is up. Idempotent.

        Raises:
            ConfigError: An option of the engine is unknown.
            EngineError: Its process could not be started.
            EngineDeadError: It died too often, or is closed.
        """
        self._check_over()
        if self._spec is None:
            spec = self.make_spec()
            spec = replace(spec, work=self._work or spec.work)
            self._build(spec)
            self._spec = spec

    def expect(self, work: WorkLeft) -> None:
        """Hear what is left to do, for the engine to start no heavier than that."""
        self._work = work
        if self._spec is not None:
            self._spec = replace(self._spec, work=work)  # For the next engine, too.
        if self._life is not None:
            expect(self._life.engine, work)

    def add(self, requests: Sequence[Request]) -> None:
        """Hand requests over, to the engine or, while it is replaced or searched, to wait.

        Raises:
            ConfigError, EngineError: As `start`.
            EngineDeadError: It died too often, or is closed.
        """
        self.start()
        if not self.is_admitting or self._life is None:
            self._queue.extend(requests)
            return
        try:
            self._let_in(self._life, requests)
        except EngineDeadError as error:
            self._queue.extend(requests)
            self._bury(self._life, str(error))

    def step(self, timeout_s: float) -> list[Answered]:
        """Return what finished, each request with its completion; wait up to `timeout_s`.

        After a death it sees to the next engine, which takes many calls.

        Raises:
            ConfigError: The job asks for what the first engine cannot do. Of a later one that is
                no fault of the job, which one engine has taken: it is tried again.
            EngineError: The first engine did not start.
            EngineDeadError: It died too often, or is closed.
        """
        self._check_over()
        if self._blamed and self.num_in_flight == len(self._blamed):
            return self._take_blamed()  # No other row is left that could come back.
        life = self._life or self._rebuild(timeout_s)
        if life is None:
            return []
        try:
            if not self.is_admitting:
                self._fill(life)
            completions = life.engine.step(timeout_s)
            answered = self._accept(life, completions) if completions else []
            if not answered and life.held:
                answered = self._look_after(life)
        except (EngineError, ConfigError) as error:
            if isinstance(error, EngineDeadError) or (life.held and self.num_deaths):
                self._bury(life, str(error))
            else:
                self._postpone(error)
            return []
        if not answered:
            return answered
        self._tally.note_completed(len(answered))
        return answered + self._take_blamed() if self._blamed else answered

    def give_up(self) -> list[Request]:
        """Close the engine for good; return all that was added and has not come back."""
        blamed = [request for request, _ in self._blamed]
        given = [*(self._life.held.values() if self._life else ()), *self._search.suspects()]
        given += [*blamed, *self._queue]
        self.close()
        return given

    def close(self) -> None:
        """Close the engine and drop everything; there will be no other. Idempotent."""
        self._over = self._over or EngineDeadError("the engine is closed")
        self._let_go()
        self._queue.clear()
        self._blamed.clear()
        self._search = SuspectSearch()

    def _check_over(self) -> None:
        if self._over is not None:
            raise self._over

    def _take_blamed(self) -> list[Answered]:
        blamed, self._blamed = self._blamed, []
        return blamed

    # The books.

    def _let_in(self, life: _Life, requests: Sequence[Request]) -> None:
        if not life.held:
            life.progress_s = self.clock()
        life.engine.add(requests)
        life.held.update((request.request_id, request) for request in requests)

    def _accept(self, life: _Life, completions: Sequence[Completion]) -> list[Answered]:
        pop = life.held.pop
        answered = [
            (request, completion)
            for completion in completions
            if (request := pop(completion.request_id, None)) is not None
        ]
        if strays := len(completions) - len(answered):
            life.num_strays += strays
            self._num_strays += strays
        if answered:
            life.progress_s = self.clock()
        return answered

    def _look_after(self, life: _Life) -> list[Answered]:
        """Nothing came back though the engine has work: has it lost it, or does it hang?"""
        quiet_s = life.quiet_s(self.clock())
        if life.has_lost(quiet_s):
            return self._add_lost_again(life)
        if quiet_s >= self.stall_s:
            problem = f"the engine hangs: no row finished, nothing changed for {quiet_s:.0f} s"
            raise EngineDeadError(problem)
        return []

    def _add_lost_again(self, life: _Life) -> list[Answered]:
        given_up = [life.held.pop(number) for number in sorted(life.lost_once & life.held.keys())]
        if again := list(life.held.values()):
            life.lost_once.update(life.held)
            life.progress_s = self.clock()
            self._num_lost += len(again)
            life.engine.add(again)
        return [(request, failed(request.request_id, LOST)) for request in given_up]

    # From one engine to the next.

    def _fill(self, life: _Life) -> None:
        """After a death: let in the next group of suspects or, after the last, who waits.

        Only once the new engine is up: what never was inside cannot be suspected.
        """
        if life.engine.facts is None or (self._search.is_on and life.held):
            return
        self._num_failed_builds = 0
        if group := self._search.next_group():
            try:
                self._let_in(life, group)
            except EngineDeadError:
                self._search.put_back()
                raise
            return
        room = max(0, life.engine.capacity - len(life.held))
        chunk = [self._queue.popleft() for _ in range(min(room, len(self._queue)))]
        if chunk:
            try:
                self._let_in(life, chunk)
            except EngineDeadError:
                self._queue.extendleft(reversed(chunk))
                raise
        self.is_admitting = not self._queue

    def _bury(self, life: _Life, reason: str) -> None:
        """Close a dead engine, draw the conclusions, tell of its death.

        Raises:
            EngineDeadError: It was one death too many.
        """
        self._let_go()
        self.is_admitting = False
        number = self._tally.note_death()
        unfinished = list(life.held.values())
        is_search = self._search.is_on
        blamed = self._search.note_death(unfinished)
        if blamed is not None:
            self._blame(blamed, reason)
        log_lines = log_tail(self._log_path, life.log_start)
        death = EngineDeath(
            number=number,
            reason=reason,
            died_at=utc_now(),
            num_in_flight=len(unfinished),
            in_flight=[row_in_flight(one) for one in unfinished[:MAX_ROWS]],
            is_search=is_search,
            blamed=row_in_flight(blamed) if blamed is not None else None,
            log_tail=log_lines[-MAX_LOG_LINES:],
        )
        self.on_death(death)
        if is_out_of_memory(reason):
            self._ask_less(life.spec)
        if problem := self._tally.problem():
            raise self._end(problem, reason)

    def _let_go(self) -> None:
        """Close the engine inside, if there is one; remember what it was."""
        if self._life is None:
            return
        engine = self._life.engine
        self._last_facts, self._last_capacity = self.facts, engine.capacity
        self._life = None
        engine.close()

    def _blame(self, request: Request, reason: str) -> None:
        self._tally.note_blamed()
        text = f"the engine died {SOLO_DEATHS} times with this row alone in it: {reason}"
        error = RowError("engine_crash", " ".join(text.split()))
        self._blamed.append((request, failed(request.request_id, error)))

    def _ask_less(self, before: EngineSpec) -> None:
        self._spec = spec = ask_less(before, self._last_facts)
        if spec != before:
            num = spec.model_kwargs.get("max_num_seqs")
            self._notes.append(f"the engine ran out of memory: max_num_seqs = {num} from then on")

    def _end(self, problem: str, reason: str) -> EngineDeadError:
        log = f"; its log: {self._log_path}" if self._log_path else ""
        self._over = EngineDeadError(
            f"the engine died {self.num_deaths} times, {problem}; the last time: {reason}"
            f"{log}; what was finished stays, run again to go on"
        )
        return self._over

    def _rebuild(self, timeout_s: float) -> _Life | None:
        """Build the next engine if it is time to; wait up to `timeout_s` if not."""
        if self._spec is None:
            return None  # Nothing was ever to do.
        wait_s = self._build_s - self.clock()
        if wait_s > 0:
            self.sleep(min(wait_s, timeout_s))
            return None
        try:
            return self._build(self._spec)
        except EngineError as error:
            self._postpone(error)
            return None

    def _build(self, spec: EngineSpec) -> _Life:
        self._log_path, log_start = spec.log_path, log_size(spec.log_path)
        self._life = _Life(self.build(spec), spec, log_start, self.clock())
        return self._life

    def _postpone(self, error: EngineError | ConfigError) -> None:
        """An engine did not start: final the first time, later perhaps for want of memory."""
        if not self.num_deaths:
            if self._life is None or not self._leave_to_vllm(self._life, str(error)):
                raise error
            return
        self._let_go()
        self._num_failed_builds += 1
        if self._num_failed_builds > len(REBUILD_WAITS_S):
            num = self._num_failed_builds
            problem = f"and {num} attempts to start another one failed"
            raise self._end(problem, str(error)) from error
        self._build_s = self.clock() + REBUILD_WAITS_S[self._num_failed_builds - 1]

    def _leave_to_vllm(self, life: _Life, reason: str) -> bool:
        """Try once more by vLLM's own settings, if memory was short for those chosen here."""
        if life.spec.defaults == "vllm" or not may_be_by_settings(reason):
            return False
        self._let_go()
        self._queue.extendleft(reversed(life.held.values()))
        self.is_admitting = False
        self._spec = replace(life.spec, defaults="vllm")
        self._notes.append(f"started again with vLLM's own settings: {reason}")
        return True
