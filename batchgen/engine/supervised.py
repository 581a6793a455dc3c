"""`SupervisedEngine`: one `Engine` that outlives the death of each engine inside it.

The runner sees an engine that answers every request exactly once, and whose troubles are rows'
errors. Inside, one engine after the other:

- Each is checked by `booked`: lost requests, unasked answers, hangs.
- A dead one is closed, never spoken to again, and another is built. What was in flight goes
  through `suspects`; while that search is on nothing else is inside, and rows that come wait
  here. A row found guilty becomes the error `engine_crash`, but is told only once another row
  has come back: an engine that answers nothing proves nothing against a row.
- Out of memory: the next one runs half as much at once.
- Deaths without progress end the run (`death.Tally`).

It must not know what kind of engine it holds. An engine in this process whose `step` never
returns cannot be helped from here; that is what `EngineProcess` is for.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from batchgen.core.errors import ConfigError, EngineDeadError, EngineError
from batchgen.core.records import EngineStats, RowError
from batchgen.engine.base import failed
from batchgen.engine.booked import BookedEngine, Oddities
from batchgen.engine.death import (
    MAX_LOG_LINES,
    SOLO_DEATHS,
    EngineDeath,
    SuspectSearch,
    Tally,
    ask_less,
    is_out_of_memory,
    log_size,
    log_tail,
    row_in_flight,
    rows_in_flight,
    utc_now,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from batchgen.core.records import Completion, EngineFacts, EngineSpec
    from batchgen.engine.base import Engine, EngineRequest

STALL_S = 900.0
"""The longest step known is a first one that compiles, minutes."""
REBUILD_WAITS_S = (2.0, 10.0, 30.0, 60.0)
"""A dead engine's GPU memory may be taken for a while: vllm#20305, #18974, #55169."""


class SupervisedEngine:
    """Implements `Engine` around a factory of engines. One owner thread."""

    def __init__(
        self,
        factory: Callable[[EngineSpec], Engine],
        spec: EngineSpec,
        *,
        on_death: Callable[[EngineDeath], None] = lambda death: None,
        stall_s: float = STALL_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Build the first engine.

        Args:
            factory: Builds an engine; returns at once. If one does not start, here or in its
                first steps: the first time the caller is told, later it is tried again.
            spec: Of the first engine; later ones may be asked for less.
            on_death: Told of every death, before the next engine is built.
            stall_s: How long an engine with work may show no progress.
            clock: Monotonic seconds.
            sleep: Waits between attempts to build.

        Raises:
            BatchgenError: What the factory raises.
        """
        self._factory = factory
        self._spec = spec
        self._on_death = on_death
        self._stall_s = stall_s
        self._clock = clock
        self._sleep = sleep
        self._queue: deque[EngineRequest] = deque()
        self._blamed: list[Completion] = []
        self._search = SuspectSearch()
        self._tally = Tally()
        self._notes: list[str] = []
        self.oddities = Oddities()
        self._over: EngineDeadError | None = None
        self._num_failed_builds = 0
        self._build_s = 0.0
        self._facts: EngineFacts | None = None
        self._inner: BookedEngine | None = None
        self._build()
        self._capacity = self.capacity
        self._is_admitting = True

    @property
    def facts(self) -> EngineFacts | None:
        """What the engine is, or between two, what the last one was."""
        inner = self._inner
        return (inner.engine.facts if inner is not None else None) or self._facts

    @property
    def capacity(self) -> int:
        """The engine's own: rows that wait here for a search to end are in flight, too."""
        inner = self._inner
        return inner.engine.capacity if inner is not None else self._capacity

    @property
    def num_in_flight(self) -> int:
        """Requests added and not yet returned, wherever they are."""
        num_inside = len(self._inner.held) if self._inner is not None else 0
        num_waiting = len(self._queue) + self._search.num_waiting
        return num_inside + num_waiting + len(self._blamed)

    @property
    def stats(self) -> EngineStats:
        """The engine's; unknown between two."""
        inner = self._inner
        return inner.engine.stats if inner is not None else EngineStats()

    @property
    def inner(self) -> Engine | None:
        """The engine at work; None between two."""
        return self._inner.engine if self._inner is not None else None

    @property
    def num_deaths(self) -> int:
        """How many engines have died."""
        return self._tally.num_deaths

    @property
    def warnings(self) -> list[str]:
        """What a person should know though the run went on, a line each; not the deaths."""
        return self._notes + self.oddities.warnings()

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """Hand requests over, to the engine or, while it is replaced or searched, to wait.

        Raises:
            EngineDeadError: It died too often, or is closed.
        """
        self._check_over()
        if not self._is_admitting or self._inner is None:
            self._queue.extend(requests)
            return
        try:
            self._inner.add(requests)
        except EngineDeadError as error:
            self._queue.extend(requests)
            self._bury(self._inner, str(error))

    def step(self, timeout_s: float) -> list[Completion]:
        """Return what finished; after a death see to the next engine, which takes many calls.

        Raises:
            ConfigError: The job asks for what the first engine cannot do. Of a later one that is
                no fault of the job, which one engine has taken: it is tried again.
            EngineError: The first engine did not start.
            EngineDeadError: It died too often, or is closed.
        """
        self._check_over()
        if self._blamed and self.num_in_flight == len(self._blamed):
            return self._take_blamed()  # No other row is left that could come back.
        if self._inner is None:
            self._rebuild(timeout_s)
        return self._step(self._inner, timeout_s) if self._inner is not None else []

    def close(self) -> None:
        """Close the engine and drop everything; there will be no other. Idempotent."""
        self._over = self._over or EngineDeadError("the engine is closed")
        self._let_go()
        self._queue.clear()
        self._blamed.clear()
        self._search = SuspectSearch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _check_over(self) -> None:
        if self._over is not None:
            raise self._over

    def _take_blamed(self) -> list[Completion]:
        blamed, self._blamed = self._blamed, []
        return blamed

    def _step(self, inner: BookedEngine, timeout_s: float) -> list[Completion]:
        try:
            if not self._is_admitting:
                self._fill(inner)
            completions = inner.step(timeout_s)
        except (EngineError, ConfigError) as error:
            if isinstance(error, EngineDeadError) or (inner.held and self.num_deaths):
                self._bury(inner, str(error))
            else:
                self._postpone(error)
            return []
        if not completions:
            return completions
        self._tally.note_completed(len(completions))
        return completions + self._take_blamed() if self._blamed else completions

    def _fill(self, inner: BookedEngine) -> None:
        """After a death: let in the next group of suspects or, after the last, who waits.

        Only once the new engine is up: what never was inside cannot be suspected.
        """
        if inner.engine.facts is None or (self._search.is_on and inner.held):
            return
        self._num_failed_builds = 0
        if group := self._search.next_group():
            self._let_in(inner, group, self._search.put_back)
            return
        room = max(0, inner.engine.capacity - len(inner.held))
        chunk = [self._queue.popleft() for _ in range(min(room, len(self._queue)))]
        if chunk:
            self._let_in(inner, chunk, lambda: self._queue.extendleft(reversed(chunk)))
        self._is_admitting = not self._queue

    def _let_in(
        self, inner: BookedEngine, requests: Sequence[EngineRequest], undo: Callable[[], None]
    ) -> None:
        try:
            inner.add(requests)
        except EngineDeadError:
            undo()
            raise

    def _bury(self, inner: BookedEngine, reason: str) -> None:
        """Close a dead engine, draw the conclusions, tell of its death.

        Raises:
            EngineDeadError: It was one death too many.
        """
        self._let_go()
        self._is_admitting = False
        number = self._tally.note_death()
        unfinished = list(inner.held.values())
        is_search = self._search.is_on
        blamed = self._search.note_death(unfinished)
        if blamed is not None:
            self._blame(blamed, reason)
        log_lines = log_tail(self._spec.log_path, self._log_start)
        death = EngineDeath(
            number=number,
            reason=reason,
            died_at=utc_now(),
            num_in_flight=len(unfinished),
            in_flight=rows_in_flight(unfinished),
            is_search=is_search,
            blamed=row_in_flight(blamed) if blamed is not None else None,
            log_tail=tuple(log_lines[-MAX_LOG_LINES:]),
        )
        self._on_death(death)
        if is_out_of_memory(reason):
            self._ask_less()
        if problem := self._tally.problem():
            raise self._end(problem, reason)

    def _let_go(self) -> None:
        """Close the engine inside, if there is one; remember what it was."""
        if self._inner is None:
            return
        engine = self._inner.engine
        self._facts, self._capacity = self.facts, engine.capacity
        self._inner = None
        engine.close()

    def _blame(self, request: EngineRequest, reason: str) -> None:
        self._tally.note_blamed()
        text = f"the engine died {SOLO_DEATHS} times with this row alone in it: {reason}"
        self._blamed.append(
            failed(request.request_id, RowError("engine_crash", " ".join(text.split())))
        )

    def _ask_less(self) -> None:
        before, self._spec = self._spec, ask_less(self._spec, self._facts)
        if self._spec != before:
            num = self._spec.model_kwargs.get("max_num_seqs")
            self._notes.append(f"the engine ran out of memory: max_num_seqs = {num} from then on")

    def _end(self, problem: str, reason: str) -> EngineDeadError:
        log = f"; its log: {self._spec.log_path}" if self._spec.log_path else ""
        self._over = EngineDeadError(
            f"the engine died {self.num_deaths} times, {problem}; the last time: {reason}"
            f"{log}; what was finished stays, run again to go on"
        )
        return self._over

    def _rebuild(self, timeout_s: float) -> None:
        """Build the next engine if it is time to; wait up to `timeout_s` if not."""
        wait_s = self._build_s - self._clock()
        if wait_s > 0:
            self._sleep(min(wait_s, timeout_s))
            return
        try:
            self._build()
        except EngineError as error:
            self._postpone(error)

    def _build(self) -> None:
        self._log_start = log_size(self._spec.log_path)
        engine = self._factory(self._spec)
        self._inner = BookedEngine(engine, self.oddities, self._stall_s, self._clock)

    def _postpone(self, error: EngineError | ConfigError) -> None:
        """An engine did not start: final the first time, later perhaps for want of memory."""
        if not self.num_deaths:
            raise error
        self._let_go()
        self._num_failed_builds += 1
        if self._num_failed_builds > len(REBUILD_WAITS_S):
            num = self._num_failed_builds
            problem = f"and {num} attempts to start another one failed"
            raise self._end(problem, str(error)) from error
        self._build_s = self._clock() + REBUILD_WAITS_S[self._num_failed_builds - 1]
