"""A worker on paper, see `sim_cluster`."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from batchgen.cluster.messages import (
    Answer,
    Asked,
    Begin,
    Committed,
    Finish,
    Finished,
    Look,
    Read,
    Ready,
    Report,
    Take,
)
from batchgen.core.records import EngineFacts, EngineStats, Ranges
from batchgen.pipeline.stats import Counts
from batchgen.store.books import PARTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.cluster.messages import Event, Order

COMMIT_S = 24.0
COMMIT_ROWS = 20_000
PROCESS_S = 2.0
"""From hiring to the first report."""
KILLS_AFTER_S = 0.5
BATCH_ROWS = 1024
READ_AHEAD_ROWS = 4 * BATCH_ROWS
TWIN = 10
"""Every so many-th row asks what the row before it asks."""
_DRAWS = 1 << 16
_SEGMENT = 32
"""Bits below it are the row's number: rows are plain integers here, cheap for the collector."""
_ROW = (1 << _SEGMENT) - 1
_LATENCIES = [1.0] * 50


@dataclass(frozen=True)
class EngineKind:
    """An engine."""

    rate: float
    """Rows/s when full."""
    capacity: int
    startup_s: float
    """From hiring to the first row."""
    sigma: float
    """Of the lognormal time that rows take."""
    holds: int = 0
    """Rows that it wants to hold, if more than its capacity."""

    def row_times(self) -> Callable[[int], float]:
        """Seconds that a row takes, by its number: long ones are long everywhere."""
        draws = random.Random(7)
        table = [draws.lognormvariate(0, self.sigma) for _ in range(_DRAWS)]
        unit = self.capacity / self.rate / math.exp(self.sigma**2 / 2)
        return lambda row: table[row * 2_654_435_761 % _DRAWS] * unit


@dataclass
class SimWorker:
    """One worker; its time goes on in `run`."""

    number: int
    kind: EngineKind
    killers: frozenset[int]
    now_s: float
    up_s: float
    dies_s: float
    row_s: Callable[[int], float]
    keep: Callable[[str], None]
    """Told each part's name."""
    waiting: deque[int] = field(default_factory=deque)
    slots: list[tuple[float, int]] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    commit_s: float = math.inf
    num_ended: int = 0
    num_parts: int = 0
    events: list[Event] = field(default_factory=list)
    num_finishing: int = 0
    is_reading: bool = False
    asks: bool = False
    unasked: deque[int] = field(default_factory=deque)
    asked: list[int] = field(default_factory=list)
    """Rows that the driver has been asked about."""
    num_asks: int = 0
    last_admitted_s: float = 0.0
    last_ended_s: float = 0.0
    idle_slot_s: float = 0.0
    """Empty slots x time, between the engine's start and the last row admitted."""
    idle_at_end_s: float = 0.0
    """The same, since then."""

    def hear(self, orders: Sequence[Order]) -> None:
        """Take orders; those that are not about rows mean nothing here."""
        for order in orders:
            if isinstance(order, Take):
                unread = self.unasked if self.asks else self.waiting
                for segment, rows in order.lease.rows.items():
                    unread.extend(segment << _SEGMENT | row for row in rows)
                self.is_reading = True
            elif isinstance(order, Finish):
                self.num_finishing += 1
            elif isinstance(order, Begin):
                self.asks = order.asks
                self.events.append(Ready(sees_input=True))
            elif isinstance(order, Answer):
                self.waiting.extend(
                    row for row, passed in zip(self.asked, order.passes, strict=True) if passed
                )
                self.asked = []
        self._admit()
        self._finish()

    def run(self, until_s: float, *, pauses: bool) -> None:
        """Go on until something happens, if it pauses then, at the latest until `until_s`."""
        while not (pauses and self.events):
            next_s = min(self.slots[0][0] if self.slots else math.inf, self.commit_s)
            if self.now_s < self.up_s:
                next_s = min(next_s, self.up_s)
            next_s = min(next_s, self.dies_s)
            if next_s > until_s:
                self._go_to(until_s)
                return
            self._go_to(next_s)
            if next_s == self.dies_s:
                return
            self._end_rows()
            self._admit()
            if self.now_s >= self.commit_s or len(self.ended) >= COMMIT_ROWS:
                self._commit()
            self._finish()

    def _go_to(self, now_s: float) -> None:
        if now_s > self.up_s:
            empty = self.kind.capacity - len(self.slots)
            self.idle_at_end_s += empty * (now_s - max(self.now_s, self.up_s))
        self.now_s = max(self.now_s, now_s)

    def _end_rows(self) -> None:
        while self.slots and self.slots[0][0] <= self.now_s:
            self.ended.append(heapq.heappop(self.slots)[1])
            self.num_ended += 1
            self.last_ended_s = self.now_s
            if self.commit_s == math.inf:
                self.commit_s = self.now_s + COMMIT_S

    def _admit(self) -> None:
        if self.now_s >= self.up_s:
            while self.waiting and len(self.slots) < self.kind.capacity:
                self._begin(self.waiting.popleft())
        if self.is_reading and len(self.waiting) <= READ_AHEAD_ROWS:
            self._read()

    def _begin(self, row: int) -> None:
        end_s = self.now_s + self.row_s(row & _ROW)
        if self.killers and row & _ROW in self.killers:
            end_s = math.inf
            self.dies_s = min(self.dies_s, self.now_s + KILLS_AFTER_S)
        heapq.heappush(self.slots, (end_s, row))
        self.idle_slot_s += self.idle_at_end_s
        self.idle_at_end_s = 0.0
        self.last_admitted_s = self.now_s

    def _read(self) -> None:
        """Ask about the next batch, or say that all is read."""
        if self.unasked and not self.asked:
            unasked, segment = self.unasked, self.unasked[0] >> _SEGMENT
            while unasked and unasked[0] >> _SEGMENT == segment and len(self.asked) < BATCH_ROWS:
                self.asked.append(unasked.popleft())
            self.num_asks += 1
            rows = [row & _ROW for row in self.asked]
            keys = [_key(row) for row in self.asked]
            self.events.append(Asked(self.num_asks, segment, rows, keys, [False] * len(rows)))
        elif not self.asked:
            self.is_reading = False
            self.events.append(Read())

    def _finish(self) -> None:
        if self.num_finishing and not (self.waiting or self.slots or self.unasked or self.asked):
            self._commit()
            self.events += [Finished(is_complete=True)] * self.num_finishing
            self.num_finishing = 0

    def _commit(self) -> None:
        rows: dict[int, list[int]] = {}
        for row in self.ended:
            rows.setdefault(row >> _SEGMENT, []).append(row & _ROW)
        if rows:
            done = {segment: Ranges.of(those) for segment, those in rows.items()}
            self.num_parts += 1
            name = f"{PARTS}/e000001-w{self.number:02d}-s{self.num_parts:06d}.parquet"
            self.keep(name)
            self.events.append(Committed(name, done, Counts(len(self.ended)), 0.0))
        self.ended, self.commit_s = [], math.inf

    def report(self) -> Report:
        """What happened since the last one, and a look."""
        events, self.events = self.events, []
        facts = EngineFacts("sim", "0", "paper", None, self.kind.capacity, self.kind.startup_s)
        look = Look(
            host="paper",
            pid=self.number,
            facts=facts if self.now_s >= self.up_s else None,
            capacity=self.kind.holds or self.kind.capacity,
            num_in_flight=len(self.slots),
            engine=EngineStats(len(self.slots), 0, 0.5, 0),
            counts=Counts(num_ok=self.num_ended),
            error_types={},
            verdicts={1: {"ok": self.num_ended}} if self.num_ended else {},
            rates={
                "requests_per_s": self.kind.rate,
                "prompt_tokens_per_s": 0.0,
                "output_tokens_per_s": 0.0,
            },
            latencies_s=_LATENCIES,
            memory_mib=1000.0,
        )
        return Report(events, look)


def _key(row: int) -> int:
    """The first 64 bits of a request's key; asked in the segment's order."""
    return (row - (row % TWIN == 0)) * 0x9E3779B97F4A7C15 % (1 << 64)
