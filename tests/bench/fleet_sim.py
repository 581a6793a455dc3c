"""What a fleet loses to its driver, on paper: real lease book and pace, engines in virtual time.

    python -m tests.bench.fleet_sim --replicas 1 8 64 --rows 1000000

A line for each fleet: all workers the same; `mixed`, see there; `dying`, each after some minutes,
for no reason. Times are from the first engine's start to the end of the last row.

    to_bound   against one queue for all engines, without delay or death, rows in the same order.
               Which row comes last, and where, is luck: some percent, if rows take minutes.
    to_ideal   against rows over the sum of the rates
    idle_%     engine slots that were empty before their worker's last row was begun
    end_%      the same after it
    twice_%    rows that had ended, but not durably, when their worker died
    book_s/M   CPU seconds a million rows, of the lease book; `pace_s/M`, of the pace
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from batchgen.cluster.leases import LeaseBook
from batchgen.cluster.messages import Committed, Finish, Gone, Look, Take
from batchgen.cluster.pacing import Meter, Pace, outlook, rows_for
from batchgen.core.records import Ranges
from tests.bench.sim_cluster import SimCluster
from tests.bench.sim_worker import EngineKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchgen.cluster.messages import Order, Report
    from batchgen.cluster.pacing import Outlook

SEGMENT_ROWS = 250_000
LOOK_S = 0.25
"""Between two reports of a worker to which nothing happens."""
LOOK_MORE_S = 0.004
"""A worker: with hundreds of them, the driver would do nothing but listen."""
OUTLOOK_S = 0.1

SLOW = EngineKind(rate=20, capacity=256, startup_s=120, sigma=0.6)
FAST = EngineKind(rate=600, capacity=256, startup_s=120, sigma=0.6)


@dataclass
class Member:
    """What the driver knows of a worker."""

    meter: Meter = field(default_factory=Meter)
    look: Look | None = None
    num_leased: int = 0
    num_settled: int = 0

    def pace(self) -> Pace:
        assert self.look is not None
        backlog = max(0, self.num_leased - self.look.num_ended)
        facts, capacity = self.look.facts, self.look.capacity
        is_up = facts is not None
        num_slots = facts.max_num_seqs if facts is not None else max(1, capacity // 3)
        return Pace(backlog, capacity, self.meter.rate if is_up else 0.0, is_up, num_slots)


class Drive:
    """The smallest driver that there can be."""

    def __init__(self, cluster: SimCluster, book: LeaseBook, num_replicas: int) -> None:
        self.cluster, self.book = cluster, book
        self.members: dict[int, Member] = {}
        self.numbers = itertools.count()
        self.look_s = max(LOOK_S, LOOK_MORE_S * num_replicas)
        self.book_s = self.pace_s = 0.0
        self.num_leases = self.num_guilty = self.num_done_twice = 0
        self._outlook: Outlook | None = None
        self._outlook_at_s = -1.0
        for _ in range(num_replicas):
            self.start()

    def start(self) -> None:
        number = next(self.numbers)
        self.members[number] = Member()
        self.cluster.start_number(number)
        self.cluster.exchange(number, (), self.look_s)

    def run(self) -> None:
        while not self.book.is_through:
            if self.outlook().is_held_up:
                self.fire_idlers()
            for number, answer in self.cluster.wait(1.0):
                if isinstance(answer, Gone):
                    self.lose(number)
                else:
                    self.hear(number, answer)
                    self.cluster.exchange(number, self.orders(number), self.look_s)

    def hear(self, number: int, report: Report) -> None:
        member = self.members[number]
        member.look = report.look
        assert report.look is not None
        member.meter.note(self.cluster.now_s, report.look.num_ended)
        for event in report.events:
            if isinstance(event, Committed):
                started = time.perf_counter()
                strays = self.book.settle(number, event.done)
                self.book_s += time.perf_counter() - started
                assert not strays
                member.num_settled += event.counts.num_ok

    def orders(self, number: int) -> list[Order]:
        member, book = self.members[number], self.book
        started = time.perf_counter()
        is_up = member.look is not None and member.look.facts is not None
        want = rows_for(member.pace(), self.outlook())
        asked = time.perf_counter()
        orders: list[Order] = []
        while want > 0 and (lease := book.take(number, want, is_up=is_up)) is not None:
            num_rows = sum(map(len, lease.rows.values()))
            want -= num_rows
            member.num_leased += num_rows
            orders.append(Take(lease))
        self.num_leases += len(orders)
        self.pace_s += asked - started
        self.book_s += time.perf_counter() - asked
        if want > 0 or (book.is_alone(number) and orders) or not book.num_pending:
            orders.append(Finish())  # Nothing more for now: what there is can become durable.
        return orders

    def outlook(self) -> Outlook:
        now_s = self.cluster.now_s
        before = self._outlook
        is_known = before is not None and before.mean_rate > 0  # As the driver looks.
        if before is None or not is_known or now_s - self._outlook_at_s >= OUTLOOK_S:
            heard = [member.pace() for member in self.members.values() if member.look is not None]
            found = outlook(heard, self.book.num_pending, len(self.members))
            self._outlook, self._outlook_at_s = found, now_s
            return found
        return before

    def fire_idlers(self) -> None:
        for number, member in list(self.members.items()):
            if member.look is not None and not member.pace().is_up:
                self.cluster.kill(number)
                self.book.take_back(number, has_died=False)
                del self.members[number]

    def lose(self, number: int) -> None:
        member = self.members.pop(number)
        started = time.perf_counter()
        self.book.take_back(number, has_died=True)
        self.num_guilty += len(self.book.guilty())
        self.book_s += time.perf_counter() - started
        self.num_done_twice += self.cluster.workers[number].num_ended - member.num_settled
        self.start()


def bound_s(kinds: list[EngineKind], num_rows: int) -> float:
    """One queue for all slots, no delay, nobody dies: when the last row ends."""
    times = {kind: kind.row_times() for kind in set(kinds)}
    slots = [
        (kind.startup_s, number) for number, kind in enumerate(kinds) for _ in range(kind.capacity)
    ]
    heapq.heapify(slots)
    last_s = 0.0
    for row in range(num_rows):
        at_s, number = slots[0]
        end_s = at_s + times[kinds[number]](row)
        last_s = max(last_s, end_s)
        heapq.heapreplace(slots, (end_s, number))
    return last_s


def simulate(
    kind_of: Callable[[int], EngineKind],
    num_replicas: int,
    num_rows: int,
    *,
    life_s: float = math.inf,
    killers: frozenset[int] = frozenset(),
) -> dict[str, float]:
    """One fleet; its figures."""
    starts = range(0, num_rows, SEGMENT_ROWS)
    ends = [min(start + SEGMENT_ROWS, num_rows) for start in starts]
    spans = enumerate(zip(starts, ends, strict=True))
    book = LeaseBook({segment: Ranges([span]) for segment, span in spans})
    book.is_fed = True
    cluster = SimCluster(kind_of, life_s=life_s, killers=killers)
    began = time.process_time()
    drive = Drive(cluster, book, num_replicas)
    drive.run()
    sim_s = time.process_time() - began
    kinds = [kind_of(number) for number in range(num_replicas)]
    first_s = min(kind.startup_s for kind in kinds)
    ended_s = max(worker.last_ended_s for worker in cluster.workers.values())
    bound = bound_s(kinds, num_rows)
    all_slots_s = sum(
        worker.kind.capacity * max(0.0, min(ended_s, worker.dies_s) - worker.up_s)
        for worker in cluster.workers.values()
    )
    at_end_s = sum(
        worker.idle_at_end_s + worker.kind.capacity * max(0.0, ended_s - worker.now_s)
        for worker in cluster.workers.values()
        if worker.dies_s == math.inf
    )
    million = num_rows / 1e6
    return {
        "makespan_s": ended_s - first_s,
        "to_bound": (ended_s - first_s) / (bound - first_s),
        "to_ideal": (ended_s - first_s) / (num_rows / sum(kind.rate for kind in kinds)),
        "idle_%": 100 * sum(w.idle_slot_s for w in cluster.workers.values()) / all_slots_s,
        "end_%": 100 * at_end_s / all_slots_s,
        "durable_s": cluster.now_s - ended_s,
        "reports/s": cluster.num_reports / cluster.now_s,
        "leases": drive.num_leases,
        "book_s/M": drive.book_s / million,
        "pace_s/M": drive.pace_s / million,
        "deaths": cluster.num_deaths,
        "twice_%": 100 * drive.num_done_twice / num_rows,
        "guilty": drive.num_guilty,
        "cpu_s": sim_s,
    }


def even(kind: EngineKind) -> Callable[[int], EngineKind]:
    """All the same."""
    return lambda _: kind


def mixed(kind: EngineKind) -> Callable[[int], EngineKind]:
    """Every fourth four times as fast; the last of each eight joins two minutes late."""

    def kind_of(number: int) -> EngineKind:
        found = replace(kind, rate=4 * kind.rate) if number % 4 == 0 else kind
        return replace(found, startup_s=kind.startup_s * 2) if number % 8 == 7 else found

    return kind_of


def main() -> None:
    """Print a line for each fleet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--life", type=float, default=600.0, help="seconds that workers live")
    args = parser.parse_args()
    is_told = False
    for name, kind in (("20/s", SLOW), ("600/s", FAST)):
        for num in args.replicas:
            cases = {
                "even": simulate(even(kind), num, args.rows),
                "mixed": simulate(mixed(kind), num, args.rows),
                "dying": simulate(even(kind), num, args.rows, life_s=args.life),
            }
            for case, figures in cases.items():
                if not is_told:
                    print(f"{'fleet':22}" + "".join(f"{key:>12}" for key in figures))
                    is_told = True
                line = "".join(f"{value:12.3f}" for value in figures.values())
                print(f"{num:>4} x {name:6} {case:8}" + line, flush=True)


if __name__ == "__main__":
    main()
