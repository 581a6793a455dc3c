"""`SupervisedEngine`: one `Engine` over many: it outlives the death of each engine inside it.

The runner sees an engine that answers every request exactly once and whose failures are rows'
errors. Inside, an engine may die, hang, run out of memory, lose a request, answer twice or answer
what nobody asked:

- Answers for requests that are not in flight are dropped and counted, never passed on.
- A request that the engine lost is added once more, then becomes that row's error `engine_lost`.
- A dead engine is closed, never spoken to again, and another is built; what was in flight goes
  through `suspects`, and while that search is on nothing else is inside. Rows that come
  meanwhile wait here. A row found guilty becomes the error `engine_crash`.
- An engine that neither finishes a row nor changes its statistics for `stall_s` counts as dead.
- Out of memory: the next engine runs half as much at once.
- Deaths without progress end the run (`death.Tally`).

It must not know what kind of engine it holds. An engine in this process whose `step` never
returns cannot be helped from here; that is what `EngineProcess` is for.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from batchgen.engine.death import (
    MAX_LOG_LINES,
    EngineDeath,
    Tally,
    ask_less,
    is_out_of_memory,
    row_in_flight,
    rows_in_flight,
    utc_now,
)
from batchgen.engine.log import log_size, log_tail
from batchgen.engine.suspects import SOLO_DEATHS, SuspectSearch
from batchgen.errors import EngineDeadError, EngineError
from batchgen.records import Completion, EngineStats, RowError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from batchgen.engine.base import Engine, EngineRequest
    from batchgen.records import EngineFacts, EngineSpec

STALL_S = 900.0
"""The longest step known is a first one that compiles, minutes."""
REBUILD_WAITS_S = (2.0, 10.0, 30.0, 60.0)
"""A dead engine's GPU memory may be taken for a while: vllm#20305, #18974, #55169."""
LOST_S = 2.0
"""Patience where an engine's own count cannot be trusted; its statistics are 0.5 s old at most."""


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
            factory: Builds an engine; returns at once. Whether it fails here or in its first
                steps: at the first start that is the caller's to know, later it is tried again.
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
        self._held: dict[int, EngineRequest] = {}
        self._queue: deque[EngineRequest] = deque()
        self._ready: list[Completion] = []
        self._search = SuspectSearch()
        self._tally = Tally()
        self._lost_once: set[int] = set()
        self._over: EngineDeadError | None = None
        self._facts: EngineFacts | None = None
        self._notes: list[str] = []
        self.num_strays = 0
        """Answers dropped: second ones, and such that nobody asked for."""
        self.num_lost = 0
        """Times that a request had to be added again because the engine lost it."""
        self._num_failed_builds = 0
        self._build_s = 0.0
        self._inner: Engine | None = None
        self._build()
        self._capacity = self.capacity
        self._is_admitting = True

    @property
    def facts(self) -> EngineFacts | None:
        """What the engine is, or while there is none, what the last one was."""
        inner = self._inner
        return (inner.facts if inner is not None else None) or self._facts

    @property
    def capacity(self) -> int:
        """The engine's own: rows that wait here for a search to end are among those in flight."""
        return self._inner.capacity if self._inner is not None else self._capacity

    @property
    def num_in_flight(self) -> int:
        """Requests added and not yet returned, wherever they are."""
        waiting = len(self._queue) + self._search.num_waiting
        return len(self._held) + len(self._ready) + waiting

    @property
    def stats(self) -> EngineStats:
        """The engine's; unknown while there is none."""
        return self._inner.stats if self._inner is not None else EngineStats()

    @property
    def inner(self) -> Engine | None:
        """The engine at work; None between two."""
        return self._inner

    @property
    def num_deaths(self) -> int:
        """How many engines have died."""
        return self._tally.num_deaths

    @property
    def warnings(self) -> list[str]:
        """What a person should know though the run went on, a line each; deaths are not here."""
        strays = f"{self.num_strays} answers that were not asked for, or came twice, were dropped"
        lost = f"{self.num_lost} requests were lost by the engine and added again"
        counted = [text for text, num in ((strays, self.num_strays), (lost, self.num_lost)) if num]
        return self._notes + counted

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """Hand requests over, to the engine or, while it is being replaced or searched, to wait.

        Raises:
            EngineDeadError: It died too often, or is closed.
        """
        self._check_over()
        if not self._is_admitting:
            self._queue.extend(requests)
            return
        try:
            self._send(requests)
        except EngineDeadError as error:
            self._queue.extend(requests)
            self._bury(str(error))

    def step(self, timeout_s: float) -> list[Completion]:
        """Return what finished; on a death see to the next engine, which takes several calls.

        Raises:
            EngineError: The first engine did not start.
            EngineDeadError: It died too often, or is closed.
        """
        self._check_over()
        if self._ready:
            return self._take_ready()
        try:
            if self._inner is None and not self._rebuild(timeout_s):
                return []
            if not self._is_admitting:
                self._fill()
            accepted = self._accept(self._inner.step(timeout_s))  # type: ignore[union-attr]
            if not accepted and self._held:
                self._look_after()
        except EngineDeadError as error:
            self._bury(str(error))
            accepted = []
        except EngineError as error:
            self._postpone(error)
            return []
        return accepted or self._take_ready()

    def close(self) -> None:
        """Close the engine and drop everything; there will be no other. Idempotent."""
        self._facts = self.facts
        inner, self._inner = self._inner, None
        self._over = self._over or EngineDeadError("the engine is closed")
        if inner is not None:
            self._capacity = inner.capacity
            inner.close()
        self._held.clear()
        self._queue.clear()
        self._ready.clear()
        self._search = SuspectSearch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _check_over(self) -> None:
        if self._over is not None:
            raise self._over

    def _take_ready(self) -> list[Completion]:
        ready, self._ready = self._ready, []
        return ready

    def _send(self, requests: Sequence[EngineRequest]) -> None:
        """Put requests into the engine; if it turns out to be dead, they were never in it."""
        assert self._inner is not None  # noqa: S101
        if not self._held:
            self._progress_s = self._clock()
        self._inner.add(requests)
        self._held.update((request.request_id, request) for request in requests)

    def _fill(self) -> None:
        """After a death: let in the next group of suspects, or after the last one who waits.

        Only once the new engine is up: what never was inside cannot be suspected.
        """
        assert self._inner is not None  # noqa: S101
        if self._inner.facts is None or (self._search.is_on and self._held):
            return
        self._num_failed_builds = 0
        if group := self._search.next_group():
            try:
                self._send(group)
            except EngineDeadError:
                self._search.put_back()
                raise
            return
        self._admit_waiting(self._inner.capacity - len(self._held))
        self._is_admitting = not self._queue

    def _admit_waiting(self, room: int) -> None:
        chunk = [self._queue.popleft() for _ in range(min(room, len(self._queue)))]
        if not chunk:
            return
        try:
            self._send(chunk)
        except EngineDeadError:
            self._queue.extendleft(reversed(chunk))
            raise

    def _accept(self, completions: list[Completion]) -> list[Completion]:
        """Keep the answers to what is in flight, the first of each."""
        if not completions:
            return completions
        pop = self._held.pop
        accepted = [done for done in completions if pop(done.request_id, None) is not None]
        if strays := len(completions) - len(accepted):
            self.num_strays += strays
            self._num_strays_here += strays
        if accepted:
            self._tally.note_completed(len(accepted))
            self._progress_s = self._clock()
        return accepted

    def _look_after(self) -> None:
        """Nothing came back though the engine has work: has it lost it, or does it hang?"""
        assert self._inner is not None  # noqa: S101
        stats, now_s = self._inner.stats, self._clock()
        if stats != self._seen_stats or self._inner.facts is None:
            self._seen_stats, self._progress_s = stats, now_s
        quiet_s = now_s - self._progress_s
        if self._has_lost(self._inner, quiet_s):
            self._add_lost_again(self._inner)
        elif quiet_s >= self._stall_s:
            problem = f"the engine died: no row finished and nothing changed for {quiet_s:.0f} s"
            raise EngineDeadError(problem)

    def _has_lost(self, inner: Engine, quiet_s: float) -> bool:
        """Whether the engine thinks that it has nothing to do, while we wait for it.

        A second answer counts as a return in the engine's books, so those are corrected; where
        an answer bore a wrong id they were right, so its statistics have the last word.
        """
        num = inner.num_in_flight
        if num + self._num_strays_here <= 0:
            return True
        is_idle = (inner.stats.num_running, inner.stats.num_waiting) == (0, 0)
        return num <= 0 and is_idle and quiet_s >= LOST_S

    def _add_lost_again(self, inner: Engine) -> None:
        again = []
        for request_id, request in list(self._held.items()):
            if request_id in self._lost_once:
                del self._held[request_id]
                self._ready.append(_failed(request_id, "engine_lost", LOST_TEXT))
            else:
                again.append(request)
        self._lost_once.update(request.request_id for request in again)
        self.num_lost += len(again)
        if again:
            inner.add(again)

    def _bury(self, reason: str) -> None:
        """Close a dead engine, tell of its death, draw the conclusions.

        Raises:
            EngineDeadError: It was one death too many.
        """
        inner, unfinished = self._inner, list(self._held.values())
        assert inner is not None  # noqa: S101
        self._facts, self._capacity = self.facts, inner.capacity
        self._inner = None
        self._is_admitting = False
        self._held.clear()
        inner.close()
        number = self._tally.note_death()
        is_search = self._search.is_on
        blamed = self._search.note_death(unfinished)
        if blamed is not None:
            self._blame(blamed, reason)
        self._on_death(
            EngineDeath(
                number,
                reason,
                utc_now(),
                len(unfinished),
                rows_in_flight(unfinished),
                is_search=is_search,
                blamed=row_in_flight(blamed) if blamed is not None else None,
                log_tail=tuple(log_tail(self._spec.log_path, self._log_start)[-MAX_LOG_LINES:]),
            )
        )
        if is_out_of_memory(reason):
            self._ask_less()
        if problem := self._tally.problem():
            raise self._end(problem, reason)

    def _blame(self, request: EngineRequest, reason: str) -> None:
        self._tally.note_blamed()
        text = f"the engine died {SOLO_DEATHS} times with this row alone in it: {reason}"
        self._ready.append(_failed(request.request_id, "engine_crash", text))

    def _ask_less(self) -> None:
        before, self._spec = self._spec, ask_less(self._spec, self._facts)
        if self._spec != before:
            num = self._spec.model_kwargs.get("max_num_seqs")
            self._notes.append(f"the engine ran out of memory; max_num_seqs is {num} from then on")

    def _end(self, problem: str, reason: str) -> EngineDeadError:
        log = f"; its log: {self._spec.log_path}" if self._spec.log_path else ""
        self._over = EngineDeadError(
            f"the engine died {self._tally.num_deaths} times, {problem}; the last time: {reason}"
            f"{log}; what was finished stays, run again to go on"
        )
        return self._over

    def _rebuild(self, timeout_s: float) -> bool:
        """Build the next engine if it is time to; wait up to `timeout_s` if not."""
        wait_s = self._build_s - self._clock()
        if wait_s > 0:
            self._sleep(min(wait_s, timeout_s))
            return False
        self._build()
        return True

    def _build(self) -> None:
        self._log_start = log_size(self._spec.log_path)
        self._num_strays_here = 0
        self._seen_stats = EngineStats()
        self._progress_s = self._clock()
        self._inner = self._factory(self._spec)

    def _postpone(self, error: EngineError) -> None:
        """An engine did not start: at first that is final, later it may be for want of memory."""
        self._facts = self.facts
        if self._facts is None:
            raise error
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.close()
        self._num_failed_builds += 1
        if self._num_failed_builds > len(REBUILD_WAITS_S):
            num = self._num_failed_builds
            raise self._end(f"and {num} attempts to start it again failed", str(error)) from error
        self._build_s = self._clock() + REBUILD_WAITS_S[self._num_failed_builds - 1]


LOST_TEXT = "the engine lost the request twice: no answer, no error"


def _failed(request_id: int, error_type: str, text: str) -> Completion:
    error = RowError(error_type, " ".join(text.split()))
    return Completion(request_id, None, None, None, None, None, None, error)
