"""`ThreadCluster`: workers in threads of this process, for tests of what stands around a cluster.

A worker that "dies" here is only unheard from then on: it works on and goes on writing parts, as
a worker behind a broken network does, which is the harder case for the books.
"""

from __future__ import annotations

import pickle
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from batchgen.cluster.messages import Capacity, Gone, Report, Take
from batchgen.cluster.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.cluster.messages import Lease, Order, WorkerInit
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.runner import FeedBatch


class _Hired:
    """A worker and the thread that speaks with it."""

    def __init__(self, cluster: ThreadCluster, badge: WorkerInit) -> None:
        self.mail: queue.SimpleQueue[tuple[Sequence[Order], float] | None] = queue.SimpleQueue()
        self.asked_s: float | None = None
        self.was_heard = False
        self.is_mute = False
        self.worker: Worker | None = None
        self._cluster, self._badge = cluster, badge
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        number = self._badge.number
        try:
            self.worker = Worker(pickle.loads(pickle.dumps(self._badge)), fetch=pickle.loads)
            while (letter := self.mail.get()) is not None:
                orders, wait_s = pickle.loads(pickle.dumps(letter))
                report = pickle.loads(pickle.dumps(self.worker.exchange(orders, wait_s)))
                if not self.is_mute:
                    self._cluster.returned.put((number, report))
        except Exception as error:  # noqa: BLE001 - as an actor's
            self._cluster.returned.put((number, Gone(repr(error))))


class ThreadCluster:
    """A `Cluster`. `on_report` sees each report first; it kills its worker by returning False."""

    def __init__(
        self,
        job: JobConfig | None = None,
        *,
        room: int = 4,
        on_report: Callable[[ThreadCluster, int, Report], bool] | None = None,
    ) -> None:
        self.room = room
        self.returned: queue.SimpleQueue[tuple[int, Report | Gone]] = queue.SimpleQueue()
        self.hired: dict[int, _Hired] = {}
        self.num_hired = 0
        self.leases: dict[int, list[Lease]] = {}
        """That each worker was given, ever."""
        self.fired: list[int] = []
        self._on_report = on_report or (lambda *_: True)

    def capacity(self) -> Capacity:
        return Capacity(self.room, f"{self.room} threads")

    def start(self, badge: WorkerInit) -> None:
        self.hired[badge.number] = _Hired(self, badge)
        self.num_hired += 1

    def exchange(self, number: int, orders: Sequence[Order], wait_s: float) -> None:
        hired = self.hired[number]
        self.leases.setdefault(number, []).extend(
            order.lease for order in orders if isinstance(order, Take)
        )
        hired.asked_s = time.monotonic()
        hired.mail.put((orders, wait_s))

    def wait(self, timeout_s: float) -> Sequence[tuple[int, Report | Gone]]:
        found: list[tuple[int, Report | Gone]] = []
        until_s = time.monotonic() + timeout_s
        while True:
            left_s = 0.0 if found else max(0.0, until_s - time.monotonic())
            try:
                number, news = (
                    self.returned.get(timeout=left_s) if left_s else (self.returned.get_nowait())
                )
            except queue.Empty:
                return found
            hired = self.hired.get(number)
            if hired is None:
                continue
            hired.was_heard, hired.asked_s = True, None
            if isinstance(news, Report) and not self._on_report(self, number, news):
                hired.is_mute = True
                news = Gone("killed by the test")
            if isinstance(news, Gone):
                del self.hired[number]
            found.append((number, news))

    def silent_s(self, number: int) -> float:
        hired = self.hired.get(number)
        if hired is None or hired.asked_s is None or not hired.was_heard:
            return 0.0
        return time.monotonic() - hired.asked_s

    def kill(self, number: int) -> None:
        hired = self.hired.pop(number, None)
        self.fired.append(number)
        if hired is not None:
            hired.is_mute = True
            hired.mail.put(None)

    def put(self, feds: Sequence[FeedBatch]) -> Any:
        return pickle.dumps(feds)

    def close(self) -> None:
        for number, hired in list(self.hired.items()):
            self.kill(number)
            if hired.worker is not None:
                hired.worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
