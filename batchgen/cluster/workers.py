"""`WorkerPool`: a worker for each replica, and another one where one is gone; their figures.

A worker is never restarted: a new one takes its place, under a new number, so that nothing that
the old one may still write is taken for the new one's.

A worker tells its counts since it began, with each look. What is new of them goes to the run's
`RunStats`, so that a look costs the same with two workers as with hundreds.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

from batchgen import __version__
from batchgen.cluster.messages import Gone, StartEngine, WorkerInit
from batchgen.cluster.pacing import Meter, Pace
from batchgen.core.errors import ConfigError, EngineDeadError
from batchgen.core.records import EngineFacts, EngineStats, Verdict
from batchgen.engine.group import combined
from batchgen.pipeline.stats import Counts, RunStats, engine_figures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from batchgen.cluster.messages import Asked, Capacity, Cluster, Committed, Look, Order, Report
    from batchgen.job.model import JobConfig

_WHERE = "[run]"
RETRY_WAITS_S = (0.0, 2.0, 10.0, 30.0)
"""Before the next worker of a replica, after so many in a row that have committed no row."""
REST_S = 600.0
"""The same once these are used up, as long as there are other replicas."""
MAX_SILENT_S = 120.0
"""A worker that says nothing for so long counts as hung; it reports every second or two."""
_TALK_WAIT_S = 0.2
_REPORT_S = 0.25
_REPORTS_A_SECOND = 250.0
"""Of all workers together, while nothing happens: a report costs the driver about a millisecond."""
_LOOK_FOR_ROOM_S = 5.0
_FIRST_CAPACITY = 1024
"""Of an engine that is not up: enough for a start."""
_SOON_S = 60.0
"""Within it a worker that was started is heard of, or waits for room that it may never get."""
_ROWS_A_REPLICA = 16
"""For less it is not worth starting an engine beside another."""
_NOTHING = Counts()
_NO_RATES = {"requests_per_s": 0.0, "prompt_tokens_per_s": 0.0, "output_tokens_per_s": 0.0}
# Latencies of one look that count at most: the run keeps some 2,000, of all its workers.
_LATENCIES_A_LOOK = 50


@dataclass(slots=True)
class WorkerHandle:
    """One worker, as the driver knows it."""

    number: int
    replica: int
    started_s: float
    look: Look | None = None
    """None until it is up."""
    orders: list[Order] = field(default_factory=list)
    """Not sent yet."""
    is_exchanging: bool = False
    is_begun: bool = False
    """Has been told the task's plan."""
    is_busy: bool = False
    """Has leases that no `Finish` has followed yet."""
    num_finishing: int = 0
    """`Finish`es that it has not answered."""
    num_leased: int = 0
    num_set_aside: int = 0
    """Of these, rows that wait for another row's answer."""
    sees_input: bool = False
    """Known once it has been told the plan."""
    parts: set[str] = field(default_factory=set)
    """That it has told of."""
    meter: Meter = field(default_factory=Meter)
    passed: deque[tuple[Asked, Sequence[bool]]] = field(default_factory=deque)
    """What it was told to compute."""
    is_gone: bool = False
    host: str | None = None
    pid: int | None = None
    seen_s: float = 0.0
    counts: Counts = _NOTHING
    """What of it is in the run's stats."""
    durable: Counts = _NOTHING
    """Rows only."""
    error_types: Mapping[str, int] = field(default_factory=dict)
    verdicts: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    durable_errors: Counter[str] = field(default_factory=Counter)

    @property
    def state(self) -> str:
        """One of the five."""
        if self.is_gone:
            return "gone"
        if self.look is None:
            return "waiting for room"
        if self.look.facts is None:
            return "starting the engine"
        return "running" if self.look.num_in_flight else "idle"

    def forget_task(self) -> None:
        """Be told anew what to work on."""
        self.is_begun = self.sees_input = False
        self.passed.clear()

    def pace(self, now_s: float) -> Pace:
        """How it gets on; it has been heard of."""
        look = self.look
        assert look is not None  # noqa: S101 - see above
        if look.facts is None:
            # Rows that need no engine tell nothing of its speed. It will hold what runs, what
            # waits for that inside vLLM, and some more.
            capacity = max(look.capacity, _FIRST_CAPACITY)
            return Pace(self.backlog, capacity, 0.0, is_up=False, num_slots=capacity // 3)
        self.meter.note(now_s, look.num_ended)
        num_slots = min(look.facts.max_num_seqs * look.facts.num_engines, look.capacity)
        return Pace(self.backlog, look.capacity, self.meter.rate, is_up=True, num_slots=num_slots)

    @property
    def is_at_work(self) -> bool:
        """Whether it may hold rows that are not durable."""
        return self.is_busy or self.num_finishing > 0

    @property
    def num_ended(self) -> int:
        """Rows that need no more work, durable or not, as far as it has told."""
        return self.look.num_ended if self.look is not None else 0

    @property
    def backlog(self) -> int:
        """Rows that it has yet to end."""
        return self.num_leased - self.num_set_aside - self.num_ended


@dataclass(slots=True)
class Place:
    """A replica: the place of one worker after another."""

    replica: int
    worker: WorkerHandle | None = None
    """Who is there now."""
    last: WorkerHandle | None = None
    """Who is or was there."""
    counts: Counts = _NOTHING
    """Of all its workers: what of them is in the run's stats."""
    num_committed: int = 0
    restarts: int = 0
    lost: str | None = None
    """Why the last one that is gone is gone."""
    num_failures: int = 0
    """Workers in a row that were gone before they had committed a row."""
    start_at_s: float = 0.0
    is_resting: bool = False
    """Too many of them: nobody is there for a while."""


@dataclass(eq=False)
class WorkerPool:
    """The workers of one run. For the driver's one thread."""

    cluster: Cluster
    """Places workers; closed by whoever made it."""
    job: JobConfig
    """What they work on."""
    run_id: str
    """Of this run."""
    _: KW_ONLY
    stats: ReplicaStats
    """Gets the figures of each worker."""
    tell: Callable[[str], None]
    """Told what is worth a warning."""
    clock: Callable[[], float] = time.monotonic
    """Monotonic seconds."""

    def __post_init__(self) -> None:
        self._places: dict[int, Place] = {}
        self._num_started = 0
        self._room_at_s = 0.0
        self._num_room = 0
        self._last_trouble = ""
        self._facts: EngineFacts | None = None
        self._max_silent_s = min(MAX_SILENT_S, self.job.run.stall_s)
        self._is_starting_engines = False
        self._max_replicas: int | None = None
        """More would have next to nothing to do."""

    @property
    def workers(self) -> Iterator[WorkerHandle]:
        """Everybody who was started, up or not."""
        return (place.worker for place in self._places.values() if place.worker is not None)

    @property
    def up(self) -> list[WorkerHandle]:
        """Who can be given work."""
        return [worker for worker in self.workers if worker.look is not None]

    @property
    def facts(self) -> EngineFacts | None:
        """What one of the engines is, or the last one was; None until the first is up."""
        looks = (worker.look for worker in self.workers if worker.look is not None)
        self._facts = next((one.facts for one in looks if one.facts is not None), self._facts)
        return self._facts

    @property
    def num_replicas(self) -> int:
        """Places that are filled, or will be soon."""
        return sum(not place.is_resting for place in self._places.values())

    @property
    def num_expected(self) -> int:
        """Workers that have been heard of, or will be soon, as far as there is room."""
        now_s = self.clock()
        soon = [one.look is not None or now_s - one.started_s < _SOON_S for one in self.workers]
        return min(sum(soon), self._num_room)

    def start_engines(self) -> None:
        """Begin to bring up everybody, and all engines before there is work for them."""
        if not self._is_starting_engines:
            self._is_starting_engines = True
            self.care()
            self.send()

    def begin(self, num_rows: int) -> None:
        """A task of so many rows begins: nobody knows of it yet."""
        for worker in self.workers:
            worker.forget_task()
        if not self._is_starting_engines:
            self._max_replicas = -(-num_rows // _ROWS_A_REPLICA)
            self._room_at_s = self.clock()

    def care(self) -> None:
        """Fill empty places, as many as the job asks for or the cluster has room for.

        Raises:
            EngineDeadError: No place is left at which a worker lives.
        """
        now_s = self.clock()
        if now_s >= self._room_at_s:
            self._room_at_s = now_s + _LOOK_FOR_ROOM_S
            self._open_places()
        for place in self._places.values():
            if place.worker is None and now_s >= place.start_at_s:
                self._start(place)
        if self._places and not self.num_replicas:
            raise EngineDeadError(
                f"every replica has failed; the last one: {self._last_trouble}; what was finished "
                "stays, run again to go on"
            )

    def _open_places(self) -> None:
        replicas = self.job.run.replicas
        capacity = self.cluster.capacity()
        self._num_room = capacity.num_now
        wanted = capacity.num_now if replicas == "auto" else replicas
        wanted = min(wanted, self._max_replicas or wanted)
        if not self._places and self.job.run.ray_address is None:
            self._refuse_too_many(capacity)
        if not self._places and capacity.num_now < max(wanted, 1):
            told = f"of {replicas} replicas {capacity.num_now} have room now"
            self.tell(f"{told} ({capacity.told}); the others wait for it")
        for replica in range(1, wanted + 1):
            self._places.setdefault(replica, self.stats.place(replica))
        for replica, place in list(self._places.items()):
            # A node is gone for good: nobody waits there.
            if replica > wanted and (place.worker is None or place.worker.look is None):
                if place.worker is not None:
                    self.cluster.kill(place.worker.number)
                place.worker, place.num_failures, place.start_at_s = None, 0, 0.0
                del self._places[replica]

    def _refuse_too_many(self, capacity: Capacity) -> None:
        """A cluster may grow; this machine alone does not."""
        replicas = self.job.run.replicas
        if capacity.num_now < (1 if replicas == "auto" else replicas):
            told = f"replicas = {replicas}, but this machine has room for {capacity.num_now}"
            raise ConfigError(_WHERE, [f"{told} ({capacity.told}); set fewer, or ray_address"])

    def _start(self, place: Place) -> None:
        self._num_started += 1
        worker = WorkerHandle(self._num_started, place.replica, self.clock())
        place.is_resting = False
        if self._is_starting_engines or place.num_failures:  # All that is left may go alone.
            worker.orders.append(StartEngine())
        self.cluster.start(
            WorkerInit(worker.number, worker.replica, self.job, self.run_id, __version__)
        )
        self.stats.note_started(worker)

    def send(self) -> None:
        """Send what is to be sent, to those who are not busy with an earlier exchange."""
        workers = list(self.workers)
        wait_s = max(_REPORT_S, len(workers) / _REPORTS_A_SECOND)
        for worker in workers:
            if not worker.is_exchanging:
                orders, worker.orders = worker.orders, []
                worker.is_exchanging = True
                # A new one is to be heard of as soon as it is up.
                is_new = worker.look is None
                self.cluster.exchange(worker.number, orders, 0.0 if is_new else wait_s)

    def talk(self) -> Iterator[tuple[WorkerHandle, Report | Gone]]:
        """Send what is to be sent, and yield what has come back; waits a moment for something."""
        self.send()
        workers = {worker.number: worker for worker in self.workers}
        for number, news in self.cluster.wait(_TALK_WAIT_S):
            if (found := workers.pop(number, None)) is not None:
                found.is_exchanging = False
                yield found, news
        for worker in workers.values():
            silent_s = self.cluster.silent_s(worker.number)
            if silent_s > self._max_silent_s:
                yield worker, Gone(f"it has said nothing for {silent_s:.0f} s")

    def dismiss(self, worker: WorkerHandle, reason: str) -> None:
        """A worker is gone, or is to go: kill what is left of it, see to the next one."""
        self.cluster.kill(worker.number)
        place = self._places.get(worker.replica)
        if place is None or place.worker is not worker:
            return
        place.worker = None
        # Rows that ended and were never committed are no progress.
        place.num_failures = 1 if worker.parts else place.num_failures + 1
        host = f" ({worker.look.host})" if worker.look is not None else ""
        self._last_trouble = f"replica {worker.replica}{host}: {reason}"
        place.is_resting = place.num_failures > len(RETRY_WAITS_S)
        if place.is_resting:
            wait_s, told = REST_S, f"tried again in {REST_S / 60:.0f} min"
        else:
            wait_s, told = RETRY_WAITS_S[place.num_failures - 1], "replaced"
        place.start_at_s = self.clock() + wait_s
        self.tell(f"{self._last_trouble}; {told}")


@dataclass(eq=False)
class ReplicaStats:
    """The replicas of one run. For one thread."""

    stats: RunStats
    _: KW_ONLY
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._places: dict[int, Place] = {}

    def place(self, replica: int) -> Place:
        """Return a replica's place."""
        return self._places.setdefault(replica, Place(replica))

    def note_started(self, worker: WorkerHandle) -> None:
        """A worker is on its way to its replica; before all else of that worker."""
        place = self.place(worker.replica)
        place.worker = place.last = worker

    def note(self, worker: WorkerHandle, look: Look) -> None:
        """Count what is new in a worker's newest look. One that is gone is not listened to."""
        if worker.is_gone:
            return
        now_s, num_ended = self.clock(), worker.num_ended
        worker.look, worker.seen_s = look, now_s
        worker.host, worker.pid = look.host, look.pid
        change = look.counts.minus(worker.counts)
        self.stats.count(change)
        self._add(worker, change)
        self._count_kinds(worker, look)
        if (num_new := min(look.num_ended - num_ended, _LATENCIES_A_LOOK)) > 0:
            self.stats.latencies_s.extend(look.latencies_s[-num_new:])
        if self.stats.engine_ready_s is None and look.facts is not None:
            self.stats.engine_ready_s = now_s
        if any(change._replace(num_skipped=0)):
            self.stats.note_progress(now_s)

    def note_committed(self, worker: WorkerHandle, committed: Committed) -> None:
        """A worker's part is durable. May come after the news that the worker is gone.

        Only for a part that counts.
        """
        rows = committed.counts
        worker.durable = worker.durable.plus(rows)
        worker.durable_errors.update(committed.error_types)
        self.stats.num_committed += rows.num_rows
        self.stats.num_parts += 1
        self._places[worker.replica].num_committed += rows.num_rows
        if worker.is_gone:
            self.stats.correct(rows)
            self._add(worker, rows)

    def note_gone(self, worker: WorkerHandle, reason: str) -> None:
        """A worker is gone before its time: rows that it has not made durable are done again.

        They do not count as ended any more. Their tokens, attempts and verdicts do, being spent.
        """
        if worker.is_gone:
            return
        place = self._places[worker.replica]
        worker.is_gone, worker.look = True, None
        lost = Counter(worker.error_types) - worker.durable_errors
        self.stats.error_types = self.stats.error_types - lost
        worker.error_types, worker.verdicts = {}, {}
        place.restarts += 1
        place.lost = reason
        change = Counts(*worker.durable.minus(worker.counts)[:3])  # Rows come first in it.
        self.stats.correct(change)
        self._add(worker, change)

    @property
    def has_seen_engine(self) -> bool:
        """Whether any engine was ever up."""
        return self.stats.engine_ready_s is not None

    def note_engine_death(self, worker: WorkerHandle) -> None:
        """A worker's engine died; the worker starts another one."""
        self._places[worker.replica].restarts += 1

    def rows(self, now_s: float) -> list[dict[str, Any]]:
        """A line for each replica, by number; rates and the engine's figures as last told.

        Counts are of all workers that were there, the engine's figures of the present one: 0 or
        None while there is none. `look_age_s` is how long ago it was heard of, `lost` why the last
        one that is gone is gone.
        """
        elapsed_s = now_s - self.stats.started_s
        return [
            {"replica": at, "elapsed_s": elapsed_s, **_row(self._places[at], now_s)}
            for at in sorted(self._places)
        ]

    def whole(self, now_s: float) -> dict[str, Any]:
        """The run: `RunStats.sample` with the sums of all engines, and how many replicas are up.

        `kv_cache_usage` and `gpu_busy` are means over the engines that tell them.
        """
        places = self._places.values()
        return {
            **self.stats.sample(now_s, self.num_in_flight, self.engines()),
            "restarts": sum([place.restarts for place in places]),
            "num_replicas": len(places),
            "num_replicas_up": sum([look.facts is not None for look in self._looks()]),
        }

    def engines(self) -> EngineStats:
        """All engines that are up, as one."""
        return combined([one.engine for one in self._looks() if one.facts is not None])

    @property
    def num_in_flight(self) -> int:
        """Requests that all engines hold."""
        return sum([look.num_in_flight for look in self._looks()])

    def _looks(self) -> list[Look]:
        lasts = (place.last for place in self._places.values())
        return [one.look for one in lasts if one is not None and one.look is not None]

    def _add(self, worker: WorkerHandle, change: Counts) -> None:
        """Remember what of a worker is in the stats."""
        worker.counts = worker.counts.plus(change)
        place = self._places[worker.replica]
        place.counts = place.counts.plus(change)

    def _count_kinds(self, worker: WorkerHandle, look: Look) -> None:
        """Errors by type, attempts by verdict. What came may change at its sender: copied."""
        if look.error_types != worker.error_types:
            self.stats.error_types.update(_new(look.error_types, worker.error_types))
            worker.error_types = dict(look.error_types)
        if look.verdicts != worker.verdicts:
            for attempt, found in look.verdicts.items():
                new = _new(found, worker.verdicts.get(attempt, {}))
                counter = self.stats.verdicts.setdefault(attempt, Counter())
                counter.update({Verdict(name): num for name, num in new.items()})
            worker.verdicts = {attempt: dict(found) for attempt, found in look.verdicts.items()}


def _row(place: Place, now_s: float) -> dict[str, Any]:
    worker = place.last
    assert worker is not None  # noqa: S101 - nobody opens a place for nobody
    look = worker.look
    rates = look.rates if look is not None else _NO_RATES
    return {
        "worker": worker.number,
        "host": worker.host,
        "pid": worker.pid,
        "state": worker.state,
        **place.counts._asdict(),
        "num_committed": place.num_committed,
        **{name: rates.get(name, 0.0) for name in _NO_RATES},
        "num_in_flight": look.num_in_flight if look is not None else 0,
        **engine_figures(look.engine if look is not None else EngineStats()),
        "restarts": place.restarts,
        "memory_mib": look.memory_mib if look is not None else None,
        "look_age_s": now_s - worker.seen_s if look is not None else None,
        "lost": place.lost,
    }


def _new(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {name: num - before.get(name, 0) for name, num in now.items() if num != before.get(name)}
