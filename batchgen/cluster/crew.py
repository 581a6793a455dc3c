"""`Crew`: what places workers, carries their messages and sees them die.

The driver's one thread calls everything here. Each worker that was hired has at most one exchange
under way: orders go out, and after a while a report comes back, or the news that it is gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from batchgen.cluster.messages import Badge, Gone, Order, Report
    from batchgen.pipeline.feeder import FeedBatch


class Places(NamedTuple):
    """What there is room for."""

    num_now: int
    """Workers that could work at this moment, those that do included."""
    told: str
    """Of what the cluster consists, for people: `2 nodes, 8 GPUs`."""


class Needs(NamedTuple):
    """What each replica takes of its machine."""

    num_cpus: float
    num_gpus: float
    """Below 1: a share of one; else a whole number, all on one node."""


class Crew(Protocol):
    """Workers of one run."""

    def places(self) -> Places:
        """How many workers the machines that are there now have room for."""

    def hire(self, badge: Badge) -> None:
        """Begin to bring up a worker, wherever there is room; does not wait for it."""

    def exchange(self, number: int, orders: Sequence[Order], wait_s: float) -> None:
        """Send orders; the worker reports once something has happened, or after `wait_s`.

        Only for a worker that was hired and whose last exchange has come back. One that is not
        up yet gets them when it is.
        """

    def wait(self, timeout_s: float) -> Sequence[tuple[int, Report | Gone]]:
        """What came back, by worker number; waits for the first up to `timeout_s`.

        A worker that is `Gone` does not come back again.
        """

    def silent_s(self, number: int) -> float:
        """How long a worker that was heard of once has had an exchange under way; else 0."""

    def fire(self, number: int) -> None:
        """Kill a worker and its engine, as far as they can be reached. It does not come back."""

    def put(self, feds: Sequence[FeedBatch]) -> Any:  # noqa: ANN401 - whatever the crew needs to find them
        """Rows for a `Lease.payload`; they are kept as long as what is returned is."""

    def close(self) -> None:
        """Fire everybody. Idempotent."""

    def __enter__(self) -> Self:
        """For `with`."""

    def __exit__(self, *exc_info: object) -> None:
        """Close."""
