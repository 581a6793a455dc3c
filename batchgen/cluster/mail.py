"""A worker's mail: orders come in, events go out, between the threads of one process."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

from batchgen.cluster.messages import Asked, Passing
from batchgen.store.dedupe import prefix_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.cluster.messages import Event, Order
    from batchgen.core.records import Request

_WAIT_S = 0.2


class Mail:
    """Any thread may call anything."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._bell = threading.Condition()
        self._events: list[Event] = []
        self._answers: dict[int, Sequence[bool]] = {}
        self._num_asked = 0
        self._crash: BaseException | None = None

    def hear(self, order: Order) -> None:
        """Take an order in."""
        if isinstance(order, Passing):
            with self._bell:
                self._answers[order.ask] = order.passes
                self._bell.notify_all()
        else:
            self._orders.put(order)

    @property
    def has_orders(self) -> bool:
        """Whether an order waits."""
        return not self._orders.empty()

    def next_order(self, is_over: Callable[[], bool]) -> Order | None:
        """Wait for the next order; None once it is over."""
        while not is_over():
            try:
                return self._orders.get(timeout=_WAIT_S)
            except queue.Empty:
                continue
        return None

    def say(self, event: Event) -> None:
        """Put an event with what the next report brings."""
        with self._bell:
            self._events.append(event)
            self._bell.notify_all()

    def say_crash(self, error: BaseException) -> None:
        """Let the next `collect` raise."""
        with self._bell:
            self._crash = error
            self._bell.notify_all()

    def collect(self, wait_s: float) -> list[Event]:
        """Return what was said since the last time; waits for something up to `wait_s`.

        Raises:
            BaseException: What `say_crash` was told.
        """
        with self._bell:
            self._bell.wait_for(lambda: self._events or self._crash is not None, wait_s)
            if self._crash is not None:
                raise self._crash
            events, self._events = self._events, []
        return events

    def ask(self, requests: Sequence[Request], is_over: Callable[[], bool]) -> list[Request]:
        """Ask the driver which requests of one segment have to be computed; none if over."""
        if not requests:
            return []
        with self._bell:
            self._num_asked += 1
            ask = self._num_asked
        self.say(
            Asked(
                ask,
                requests[0].ordinal.segment,
                [request.ordinal.row for request in requests],
                [prefix_of(request.request_key) for request in requests],
                [request.seed is not None for request in requests],
            )
        )
        with self._bell:
            while ask not in self._answers:
                if is_over():
                    return []
                self._bell.wait(_WAIT_S)
            passes = self._answers.pop(ask)
        return [request for request, passed in zip(requests, passes, strict=True) if passed]
