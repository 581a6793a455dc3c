"""What a run's driver and its workers tell each other, and `Cluster`, which carries it.

Messages are plain values, for they cross machines.

A worker is one engine with a process of its own around it. It has a number that no other worker
of the epoch has or will have, in the names of its parts; a worker that is replaced has another.
A replica is the place of a worker, what a person sees: 1, 2, ... of `run.replicas`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.core.errors import BatchgenError
    from batchgen.core.records import EngineFacts, EngineStats, Ranges, RowSet
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.context import Stop
    from batchgen.pipeline.runner import FeedBatch
    from batchgen.pipeline.stats import Counts
    from batchgen.store.books import Plan


class WorkerInit(NamedTuple):
    """Who a worker is, and what for."""

    number: int
    replica: int
    job: JobConfig
    run_id: str
    version: str
    """batchgen's at the driver: another one at the worker is refused."""


class Lease(NamedTuple):
    """Rows that a worker is to end, until the driver says otherwise."""

    rows: RowSet
    """Segment -> rows of it."""
    payload: Any = None
    """None: the worker reads the rows from the input's files. Else what its cluster's `fetch` turns
    into `FeedBatch`s, which may hold more rows than these."""


class StartEngine(NamedTuple):
    """Begin to start the engine: there will be work."""


class Begin(NamedTuple):
    """Work on this plan from now on. Comes before its first lease."""

    plan: Plan
    epoch: int
    asks: bool
    """Whether the driver is to be asked which requests have to be computed."""
    is_packed: bool
    """All leases come with payloads, in the order that they are to be done in."""


class Take(NamedTuple):
    """Do these, after those that came before."""

    lease: Lease


class Answer(NamedTuple):
    """The answer to an `Asked`."""

    ask: int
    passes: Sequence[bool]


class Finish(NamedTuple):
    """No more leases for now: end those taken, make all durable, say `Finished`."""


class Halt(NamedTuple):
    """Stop, as `StopSwitch`."""

    state: Stop
    is_patient: bool


Order = StartEngine | Begin | Take | Answer | Finish | Halt


class Ready(NamedTuple):
    """Bound to the plan."""

    sees_input: bool
    """Whether the input's files are there, as they were planned."""


class Asked(NamedTuple):
    """Which of these requests have to be computed, of those that may share an answer?"""

    ask: int
    segment: int
    rows: Sequence[int]
    prefixes: Sequence[int]
    """First 64 bits of their keys."""
    has_seed: Sequence[bool]


class Committed(NamedTuple):
    """A part is durable."""

    name: str
    done: Mapping[int, Ranges]
    counts: Counts
    """Its rows."""
    seconds: float
    """That the commit took."""
    error_types: Mapping[str, int] = {}
    """Of the errors, where known."""


class Read(NamedTuple):
    """All leases are read: more are welcome."""


class Finished(NamedTuple):
    """All leases up to a `Finish`, or up to a stop, are dealt with; what ended is durable."""

    is_complete: bool


class EngineDied(NamedTuple):
    """The worker's engine died; it sees to the next one by itself."""

    death: Mapping[str, Any]
    """`EngineDeath.as_dict`."""


class Failed(NamedTuple):
    """The worker cannot go on. What it committed before counts."""

    error: BatchgenError


class Noted(NamedTuple):
    """Worth a warning."""

    text: str


Event = Ready | Read | Asked | Committed | Finished | EngineDied | Failed | Noted


class Look(NamedTuple):
    """A worker at one moment; counts are of its whole life."""

    host: str
    pid: int
    facts: EngineFacts | None
    capacity: int
    num_in_flight: int
    engine: EngineStats
    counts: Counts
    error_types: Mapping[str, int]
    verdicts: Mapping[int, Mapping[str, int]]
    rates: Mapping[str, float]
    """As `RunStats.rates`."""
    latencies_s: Sequence[float]
    """Of some of the last rows."""
    memory_mib: float | None

    @property
    def num_ended(self) -> int:
        """Rows that need no more work, durable or not."""
        return self.counts.num_rows


class Report(NamedTuple):
    """What a worker answers to orders."""

    events: Sequence[Event]
    look: Look | None


class Gone(NamedTuple):
    """There is no such worker any more; what it committed counts."""

    reason: str


class Capacity(NamedTuple):
    """What there is room for."""

    num_now: int
    """Workers that could work at this moment, those that do included."""
    told: str
    """Of what the cluster consists, for people: `2 nodes, 8 GPUs`."""


class Cluster(Protocol):
    """Where the workers of one run are; starts them, carries their messages, sees them die.

    The driver's one thread calls everything here. Each worker that was started has at most one
    exchange under way: orders go out, and after a while a report comes back, or the news that it
    is gone.
    """

    def capacity(self) -> Capacity:
        """Count the workers that the machines that are there now have room for."""

    def start(self, init: WorkerInit) -> None:
        """Begin to start a worker, wherever there is room; does not wait for it."""

    def exchange(self, number: int, orders: Sequence[Order], wait_s: float) -> None:
        """Send orders; the worker reports once something has happened, or after `wait_s`.

        Only for a worker that was started and whose last exchange has come back. One that is not
        up yet gets them when it is.
        """

    def wait(self, timeout_s: float) -> Sequence[tuple[int, Report | Gone]]:
        """What came back, by worker number; waits for the first up to `timeout_s`.

        A worker that is `Gone` does not come back again.
        """

    def silent_s(self, number: int) -> float:
        """How long a worker that was heard of once has had an exchange under way; else 0."""

    def kill(self, number: int) -> None:
        """Kill a worker and its engine, as far as they can be reached. It does not come back."""

    def put(self, batches: Sequence[FeedBatch]) -> Any:  # noqa: ANN401 - whatever finds them again
        """Rows for a `Lease.payload`; they are kept as long as what is returned is."""

    def close(self) -> None:
        """Kill all workers. Idempotent."""
