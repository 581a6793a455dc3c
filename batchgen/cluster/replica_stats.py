"""What the driver knows of its replicas: sums for the run, and a line for each of them.

A worker tells its counts since it began, with each look. What is new of them goes to the run's
`RunStats`, so that a look costs the same with two workers as with hundreds.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchgen.core.records import EngineStats, Verdict
from batchgen.engine.group import combined
from batchgen.pipeline.stats import Counts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from batchgen.cluster.messages import Committed, Look
    from batchgen.pipeline.stats import RunStats

_NOTHING = Counts()
_NO_RATES = {"requests_per_s": 0.0, "prompt_tokens_per_s": 0.0, "output_tokens_per_s": 0.0}
# Latencies of one look that count at most: the run keeps some 2,000, of all its workers.
_LATENCIES_A_LOOK = 50


@dataclass(slots=True)
class _Place:
    """A replica: the place of one worker after another."""

    replica: int
    worker: _Worker
    """The last one that was hired for it."""
    counts: Counts = _NOTHING
    """Of all its workers: what of them is in the run's stats."""
    num_committed: int = 0
    restarts: int = 0
    lost: str | None = None


@dataclass(slots=True)
class _Worker:
    """One engine's process. Of those that are gone, only the counts are kept."""

    number: int
    replica: int
    counts: Counts = _NOTHING
    """What of it is in the run's stats."""
    durable: Counts = _NOTHING
    """Rows only."""
    error_types: Mapping[str, int] = field(default_factory=dict)
    verdicts: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    durable_errors: Counter[str] = field(default_factory=Counter)
    look: Look | None = None
    seen_s: float = 0.0
    is_gone: bool = False
    host: str | None = None
    pid: int | None = None

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


class ReplicaStats:
    """The replicas of one run. For one thread."""

    def __init__(self, stats: RunStats, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Bind; `clock` is the one of `stats`' times."""
        self._stats = stats
        self._clock = clock
        self._workers: dict[int, _Worker] = {}
        self._places: dict[int, _Place] = {}

    def note_started(self, replica: int, number: int) -> None:
        """Worker `number` is on its way to replica `replica`; before all else of that worker."""
        worker = self._workers[number] = _Worker(number, replica)
        place = self._places.setdefault(replica, _Place(replica, worker))
        place.worker = worker

    def note(self, replica: int, number: int, look: Look) -> None:
        """Count what is new in a worker's newest look. One that is gone is not listened to."""
        if number not in self._workers:
            self.note_started(replica, number)
        worker, now_s = self._workers[number], self._clock()
        if worker.is_gone:
            return
        num_ended = worker.look.num_ended if worker.look is not None else 0
        worker.look, worker.seen_s = look, now_s
        worker.host, worker.pid = look.host, look.pid
        change = look.counts.minus(worker.counts)
        self._stats.count(change)
        self._add(worker, change)
        self._count_kinds(worker, look)
        if (num_new := min(look.num_ended - num_ended, _LATENCIES_A_LOOK)) > 0:
            self._stats.latencies_s.extend(look.latencies_s[-num_new:])
        if self._stats.engine_ready_s is None and look.facts is not None:
            self._stats.engine_ready_s = now_s
        if any(change._replace(num_skipped=0)):
            self._stats.note_progress(now_s)

    def note_committed(self, number: int, committed: Committed) -> None:
        """A worker's part is durable. May come after the news that the worker is gone.

        Only for a part that counts.
        """
        worker = self._workers[number]
        rows = committed.counts
        worker.durable = worker.durable.plus(rows)
        worker.durable_errors.update(committed.error_types)
        self._stats.num_committed += rows.num_rows
        self._stats.num_parts += 1
        self._places[worker.replica].num_committed += rows.num_rows
        if worker.is_gone:
            self._stats.correct(rows)
            self._add(worker, rows)

    def note_gone(self, number: int, reason: str) -> None:
        """A worker is gone before its time: rows that it has not made durable are done again.

        They do not count as ended any more. Their tokens, attempts and verdicts do, being spent.
        """
        worker = self._workers[number]
        if worker.is_gone:
            return
        place = self._places[worker.replica]
        worker.is_gone, worker.look = True, None
        lost = Counter(worker.error_types) - worker.durable_errors
        self._stats.error_types = self._stats.error_types - lost
        worker.error_types, worker.verdicts = {}, {}
        place.restarts += 1
        place.lost = reason
        change = Counts(*worker.durable.minus(worker.counts)[:3])  # Rows come first in it.
        self._stats.correct(change)
        self._add(worker, change)

    @property
    def has_seen_engine(self) -> bool:
        """Whether any engine was ever up."""
        return self._stats.engine_ready_s is not None

    def note_engine_death(self, number: int) -> None:
        """A worker's engine died; the worker starts another one."""
        self._places[self._workers[number].replica].restarts += 1

    def rows(self, now_s: float) -> list[dict[str, Any]]:
        """A line for each replica, by number; rates and the engine's figures as last told.

        Counts are of all workers that were there, the engine's figures of the present one: 0 or
        None while there is none. `look_age_s` is how long ago it was heard of, `lost` why the last
        one that is gone is gone.
        """
        elapsed_s = now_s - self._stats.started_s
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
            **self._stats.sample(now_s, self.num_in_flight, self.engines()),
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
        places = self._places.values()
        return [place.worker.look for place in places if place.worker.look is not None]

    def _add(self, worker: _Worker, change: Counts) -> None:
        """Remember what of a worker is in the stats."""
        worker.counts = worker.counts.plus(change)
        place = self._places[worker.replica]
        place.counts = place.counts.plus(change)

    def _count_kinds(self, worker: _Worker, look: Look) -> None:
        """Errors by type, attempts by verdict. What came may change at its sender: copied."""
        if look.error_types != worker.error_types:
            self._stats.error_types.update(_new(look.error_types, worker.error_types))
            worker.error_types = dict(look.error_types)
        if look.verdicts != worker.verdicts:
            for attempt, found in look.verdicts.items():
                new = _new(found, worker.verdicts.get(attempt, {}))
                counter = self._stats.verdicts.setdefault(attempt, Counter())
                counter.update({Verdict(name): num for name, num in new.items()})
            worker.verdicts = {attempt: dict(found) for attempt, found in look.verdicts.items()}


def _row(place: _Place, now_s: float) -> dict[str, Any]:
    worker, look = place.worker, place.worker.look
    engine = look.engine if look is not None else EngineStats()
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
        "num_running": engine.num_running,
        "num_waiting": engine.num_waiting,
        "kv_cache_usage": engine.kv_cache_usage,
        "gpu_busy": engine.gpu_busy,
        "num_preemptions": engine.num_preemptions,
        "restarts": place.restarts,
        "memory_mib": look.memory_mib if look is not None else None,
        "look_age_s": now_s - worker.seen_s if look is not None else None,
        "lost": place.lost,
    }


def _new(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {name: num - before.get(name, 0) for name, num in now.items() if num != before.get(name)}
