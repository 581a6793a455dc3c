"""A cluster of workers on paper: engines that answer at real GPUs' pace, in virtual time.

`SimCluster` is a `Cluster`; its `clock` goes on only in `wait`. A worker has an engine with so many
slots, a row takes its slot for as long as it takes, however full the engine is, and the next row
begins at the moment when one ends. Rows become durable as the runner would make them, and the
driver is told and asked what a real worker tells and asks.
"""

from __future__ import annotations

import heapq
import math
import random
from typing import TYPE_CHECKING, Any

from batchgen.cluster.messages import Capacity, Gone, Report
from tests.bench.sim_worker import PROCESS_S, EngineKind, SimWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from batchgen.cluster.messages import Order, WorkerInit


class SimCluster:
    """See the module."""

    def __init__(
        self,
        kind_of: Callable[[int], EngineKind],
        *,
        latency_s: float = 0.02,
        message_s: float = 0.001,
        life_s: float = math.inf,
        killers: frozenset[int] = frozenset(),
        seed: int = 1,
        now_s: float = 0.0,
        keep: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Nobody is hired yet.

        Args:
            kind_of: Worker number -> its engine.
            latency_s: Of a message, one way.
            message_s: Of the driver's time that each report costs.
            life_s: After which workers die, on average, for no reason.
            killers: Row numbers, in any segment, that kill their worker.
            seed: Of the deaths.
            now_s: Where the clock begins.
            keep: Told the name of each part.
        """
        self._kind_of = kind_of
        self._row_s: dict[EngineKind, Callable[[int], float]] = {}
        self._latency_s, self._message_s, self._life_s = latency_s, message_s, life_s
        self._killers = killers
        self._random = random.Random(seed)
        self._due: list[tuple[float, int, Report | Gone]] = []
        self._fired: set[int] = set()
        self.now_s = now_s
        self._keep = keep
        self.workers: dict[int, SimWorker] = {}
        self.num_reports = 0
        self.num_deaths = 0

    def clock(self) -> float:
        """Virtual seconds."""
        return self.now_s

    def capacity(self) -> Capacity:
        """As many as one likes."""
        return Capacity(1 << 20, "paper")

    def start(self, badge: WorkerInit) -> None:
        """Only `badge.number` is of interest."""
        self.start_number(badge.number)

    def start_number(self, number: int) -> None:
        """As `hire`."""
        kind = self._kind_of(number)
        if kind not in self._row_s:
            self._row_s[kind] = kind.row_times()
        life_s = self._random.expovariate(1 / self._life_s) if self._life_s < math.inf else math.inf
        self.workers[number] = SimWorker(
            number,
            kind,
            self._killers,
            now_s=self.now_s + PROCESS_S,
            up_s=self.now_s + kind.startup_s,
            dies_s=self.now_s + PROCESS_S + life_s,
            row_s=self._row_s[kind],
            keep=self._keep,
        )

    def exchange(self, number: int, orders: Sequence[Order], wait_s: float) -> None:
        """The worker's answer is known at once, but not told before its time."""
        worker = self.workers[number]
        worker.run(max(worker.now_s, self.now_s + self._latency_s), pauses=False)
        worker.hear(orders)
        worker.run(worker.now_s + wait_s, pauses=True)
        is_dead = worker.now_s >= worker.dies_s
        answer = Gone("killed") if is_dead else worker.report()
        heapq.heappush(self._due, (worker.now_s + self._latency_s, number, answer))

    def wait(self, timeout_s: float) -> Sequence[tuple[int, Report | Gone]]:
        """Time goes on to the next report."""
        if not self._due or self._due[0][0] > self.now_s + timeout_s:
            self.now_s += timeout_s
            return ()
        self.now_s = max(self.now_s, self._due[0][0])
        found = []
        while self._due and self._due[0][0] <= self.now_s:
            _, number, answer = heapq.heappop(self._due)
            if number in self._fired:
                continue
            self.num_deaths += isinstance(answer, Gone)
            found.append((number, answer))
        self.num_reports += len(found)
        self.now_s += self._message_s * len(found)
        return found

    def silent_s(self, number: int) -> float:
        """Nobody hangs."""
        del number
        return 0.0

    def kill(self, number: int) -> None:
        """Not heard of again."""
        self._fired.add(number)

    def put(self, feds: Sequence[Any]) -> Any:
        """Kept as it is."""
        return feds

    def close(self) -> None:
        """Nothing to let go of."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
