"""`BookedEngine`: one engine, with books of what was asked of it and what it gave back.

For an engine that keeps the protocol this is a dictionary and nothing more. One that does not:

- Answers to what is not in flight (never asked, or answered already) are dropped and counted.
- A request that it lost is added once more; lost again, it becomes that row's `engine_lost`.
- No row finished and no statistic changed for `stall_s`: it counts as dead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchgen.core.errors import EngineDeadError
from batchgen.core.records import Completion, EngineStats, RowError
from batchgen.engine.base import failed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.engine.base import Engine, EngineRequest

LOST_S = 2.0
"""Patience where an engine's own count cannot be trusted; its statistics are 0.5 s old at most."""
LOST = RowError("engine_lost", "the engine lost the request twice: no answer, no error")


@dataclass(slots=True)
class Oddities:
    """What engines did that they should not; counted over all engines of a run."""

    num_strays: int = 0
    """Answers dropped: second ones, and such that nobody asked for."""
    num_lost: int = 0
    """Requests that had to be added again."""

    def warnings(self) -> list[str]:
        """One line for each kind that occurred."""
        strays = f"{self.num_strays} answers that came twice, or unasked, were dropped"
        lost = f"{self.num_lost} requests were lost by the engine and added again"
        return [text for text, num in ((strays, self.num_strays), (lost, self.num_lost)) if num]


class BookedEngine:
    """One engine from its start to its end; not for another one after it."""

    def __init__(
        self, engine: Engine, oddities: Oddities, stall_s: float, clock: Callable[[], float]
    ) -> None:
        """Take an engine over; `oddities` is shared with those before and after it."""
        self.engine = engine
        self.held: dict[int, EngineRequest] = {}
        """In flight, in the order of admission."""
        self._oddities = oddities
        self._stall_s = stall_s
        self._clock = clock
        self._lost_once: set[int] = set()
        self._num_strays = 0
        self._seen_stats = EngineStats()
        self._progress_s = clock()

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """Put requests into the engine.

        Raises:
            EngineDeadError: It is dead, and these were never in it.
        """
        if not self.held:
            self._progress_s = self._clock()
        self.engine.add(requests)
        self.held.update((request.request_id, request) for request in requests)

    def step(self, timeout_s: float) -> list[Completion]:
        """Return what finished, each request once, and the errors of those that got lost.

        Raises:
            EngineError: The engine did not start.
            EngineDeadError: It died, or hangs.
        """
        completions = self.engine.step(timeout_s)
        accepted = self._accept(completions) if completions else completions
        if accepted or not self.held:
            return accepted
        return self._look_after()

    def _accept(self, completions: list[Completion]) -> list[Completion]:
        pop = self.held.pop
        accepted = [done for done in completions if pop(done.request_id, None) is not None]
        if strays := len(completions) - len(accepted):
            self._num_strays += strays
            self._oddities.num_strays += strays
        if accepted:
            self._progress_s = self._clock()
        return accepted

    def _look_after(self) -> list[Completion]:
        """Nothing came back though the engine has work: has it lost it, or does it hang?"""
        stats, now_s = self.engine.stats, self._clock()
        if stats != self._seen_stats or self.engine.facts is None:
            self._seen_stats, self._progress_s = stats, now_s
        quiet_s = now_s - self._progress_s
        if self._has_lost(stats, quiet_s):
            return self._add_lost_again()
        if quiet_s >= self._stall_s:
            problem = f"the engine hangs: no row finished, nothing changed for {quiet_s:.0f} s"
            raise EngineDeadError(problem)
        return []

    def _has_lost(self, stats: EngineStats, quiet_s: float) -> bool:
        """Whether the engine believes that it has nothing to do, while we wait for it.

        A second answer counts as a return in the engine's books, so those are corrected by the
        strays; where an answer bore a wrong id they were right, so its statistics decide.
        """
        num = self.engine.num_in_flight
        if num + self._num_strays <= 0:
            return True
        is_idle = (stats.num_running, stats.num_waiting) == (0, 0)
        return num <= 0 and is_idle and quiet_s >= LOST_S

    def _add_lost_again(self) -> list[Completion]:
        given_up = self._lost_once & self.held.keys()
        for request_id in given_up:
            del self.held[request_id]
        again = list(self.held.values())
        self._lost_once.update(self.held)
        self._oddities.num_lost += len(again)
        if again:
            self._progress_s = self._clock()
            self.engine.add(again)
        return [failed(request_id, LOST) for request_id in sorted(given_up)]
