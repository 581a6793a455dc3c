"""What `fleet_driver` measures with: the driver's time, its reading thread's, the book's size."""

from __future__ import annotations

import gc
import sys
import time
from typing import TYPE_CHECKING, Any

from batchgen.pipeline.runner import FeedBatch
from batchgen.store.books import PARTS
from tests.bench.sim_cluster import SimCluster

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.cluster.leases import LeaseBook
    from batchgen.cluster.messages import Gone, Order, Report, WorkerInit
    from batchgen.pipeline.runner import Feeder
    from batchgen.storage import LocalStorage
    from tests.bench.sim_worker import EngineKind

LOOK_S = 5.0
"""Between two looks at the book."""


class TimedCluster(SimCluster):
    """A cluster on paper that knows what the driver does between two calls."""

    def __init__(
        self,
        kind: EngineKind,
        storage: LocalStorage,
        *,
        message_s: float,
        look: Callable[[], None],
    ) -> None:
        (storage.root / PARTS).mkdir(parents=True, exist_ok=True)
        super().__init__(
            lambda _: kind,
            message_s=message_s,
            now_s=time.monotonic(),
            keep=lambda name: storage.path(name).touch(),
        )
        self.driver_s = 0.0
        self.num_turns = 0
        self._look, self._look_at_s = look, 0.0
        self._left_s = time.thread_time()

    def enter(self) -> None:
        """The driver's time until now is the driver's."""
        spent_s = time.thread_time() - self._left_s
        self.driver_s += spent_s
        self.now_s += spent_s

    def leave(self) -> None:
        self._left_s = time.thread_time()

    def start(self, badge: WorkerInit) -> None:
        self.enter()
        super().start(badge)
        self.leave()

    def exchange(self, number: int, orders: Sequence[Order], wait_s: float) -> None:
        self.enter()
        super().exchange(number, orders, wait_s)
        self.leave()

    def wait(self, timeout_s: float) -> Sequence[tuple[int, Report | Gone]]:
        self.enter()
        found = super().wait(timeout_s)
        self.num_turns += 1
        if self.now_s >= self._look_at_s:
            self._look_at_s = self.now_s + LOOK_S
            self._look()
        self.leave()
        return found


class PacedFeeder:
    """A feeder that is no faster in virtual time than its thread was in CPU time."""

    def __init__(self, feeder: Feeder, cluster: TimedCluster) -> None:
        self._feeder, self._cluster = feeder, cluster
        thread = feeder._thread.ident
        assert thread is not None
        self._clock = time.pthread_getcpuclockid(thread)
        self._ready_s = cluster.now_s
        self.cpu_s = 0.0

    @property
    def is_done(self) -> bool:
        return self._feeder.is_done

    def take(self, timeout_s: float) -> FeedBatch | None:
        del timeout_s
        if self._feeder.is_done or self._cluster.clock() < self._ready_s:
            return None
        fed = self._feeder.take(60.0)
        cost_s = 0.0
        if self._feeder._thread.is_alive():
            now_s = time.clock_gettime(self._clock)
            cost_s, self.cpu_s = now_s - self.cpu_s, now_s
        # Its queue holds some batches that were made while nobody took any.
        self._ready_s = max(self._ready_s, self._cluster.clock() - 4 * cost_s) + cost_s
        return fed

    def close(self) -> None:
        self._feeder.close()


def size_of(book: LeaseBook) -> int:
    """Bytes of all that a book holds, but for what rows come packed in."""
    seen: dict[int, Any] = {}
    todo: list[Any] = [book]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type | FeedBatch) or callable(one):
            continue
        seen[id(one)] = one
        todo += gc.get_referents(one)
    return sum(map(_size, seen.values()))


def _size(one: object) -> int:
    return sys.getsizeof(one)
