"""Who is hired, replaced and given up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from batchgen.cluster.messages import Capacity, Gone, StartEngine
from batchgen.cluster.pacing import Pace
from batchgen.cluster.workers import (
    REST_S,
    RETRY_WAITS_S,
    ReplicaStats,
    WorkerHandle,
    WorkerPool,
)
from batchgen.core.errors import ConfigError, EngineDeadError
from batchgen.pipeline.stats import RunStats
from tests import fakes
from tests.fakes import FACTS, FakeClock
from tests.unit.test_replica_stats import look

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchgen.cluster.messages import Order, Report, WorkerInit


class PaperCluster:
    """Notes what it is asked; nobody works."""

    def __init__(self, room: int = 2) -> None:
        self.room = room
        self.hired: list[WorkerInit] = []
        self.sent: dict[int, list[Order]] = {}
        self.fired: list[int] = []
        self.news: list[tuple[int, Report | Gone]] = []
        self.silent: dict[int, float] = {}

    def capacity(self) -> Capacity:
        return Capacity(self.room, f"{self.room} desks")

    def start(self, badge: WorkerInit) -> None:
        self.hired.append(badge)

    def exchange(self, number: int, orders: Sequence[Order], wait_s: float) -> None:
        self.sent.setdefault(number, []).extend(orders)

    def wait(self, timeout_s: float) -> Sequence[tuple[int, Report | Gone]]:
        news, self.news = self.news, []
        return news

    def silent_s(self, number: int) -> float:
        return self.silent.get(number, 0.0)

    def kill(self, number: int) -> None:
        self.fired.append(number)

    def put(self, feds: Any) -> Any:
        return feds

    def close(self) -> None:
        pass


class Office:
    """A pool, its cluster and its clock."""

    def __init__(self, *, room: int = 2, **run: Any) -> None:
        self.cluster = PaperCluster(room)
        self.clock = FakeClock()
        self.told: list[str] = []
        self.pool = WorkerPool(
            self.cluster,  # type: ignore[arg-type]
            fakes.job(run=run),
            "run-1",
            stats=ReplicaStats(RunStats(0.0, 0), clock=self.clock),
            tell=self.told.append,
            clock=self.clock,
        )

    def worker(self, replica: int = 1) -> WorkerHandle:
        """Who is at a place now."""
        (found,) = [one for one in self.pool.workers if one.replica == replica]
        return found

    def numbers(self) -> list[int]:
        return [badge.number for badge in self.cluster.hired]


def test_more_replicas_than_this_machine_has_room_for_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"replicas = 3, but .* room for 2 \(2 desks\)"):
        Office(replicas=3).pool.care()
    Office(replicas=3, ray_address="auto").pool.care()


def test_each_replica_gets_a_worker_with_a_number_of_its_own() -> None:
    office = Office(room=3, replicas=3)
    office.pool.start_engines()
    office.pool.care()
    assert [(badge.number, badge.replica) for badge in office.cluster.hired] == [
        (1, 1),
        (2, 2),
        (3, 3),
    ]
    assert office.cluster.sent == {1: [StartEngine()], 2: [StartEngine()], 3: [StartEngine()]}


def test_who_waits_for_room_is_not_expected_and_others_not_for_ever() -> None:
    office = Office(room=2, replicas=6, ray_address="auto")
    office.pool.care()
    assert len(office.cluster.hired) == 6
    assert office.pool.num_expected == 2
    office.cluster.room = 6
    office.clock.advance(10)
    office.pool.care()
    assert office.pool.num_expected == 6
    office.worker().look = look()
    office.clock.advance(60)
    assert office.pool.num_expected == 1


def test_a_worker_that_is_gone_is_replaced_under_a_new_number() -> None:
    office = Office(replicas=2)
    office.pool.care()
    office.pool.dismiss(office.worker(), "it died")
    office.pool.care()
    assert office.numbers() == [1, 2, 3]
    assert office.cluster.hired[2].replica == 1
    assert office.cluster.fired == [1]
    assert "it died" in office.told[0]
    office.pool.send()  # It may get no row before its engine is up.
    assert office.cluster.sent == {2: [], 3: [StartEngine()]}


def test_workers_that_do_nothing_are_replaced_ever_later_and_then_no_more() -> None:
    office = Office(replicas=1)
    office.pool.care()
    for wait_s in RETRY_WAITS_S:
        office.pool.dismiss(office.worker(), "it died")
        num = len(office.cluster.hired)
        if wait_s:
            office.clock.now_s += wait_s - 0.1
            office.pool.care()
            assert len(office.cluster.hired) == num
        office.clock.now_s += 0.2
        office.pool.care()
        assert len(office.cluster.hired) == num + 1
    office.pool.dismiss(office.worker(), "no memory")
    assert office.told[-1].endswith("no memory; tried again in 10 min")
    with pytest.raises(EngineDeadError, match=r"every replica has failed; .*no memory"):
        office.pool.care()


def test_auto_follows_the_room_that_there_is() -> None:
    office = Office(room=1, replicas="auto")
    office.pool.care()
    assert office.numbers() == [1]
    office.cluster.room = 3
    office.pool.care()
    assert office.numbers() == [1]  # It does not ask at every turn.
    office.clock.now_s += 10.0
    office.pool.care()
    assert office.numbers() == [1, 2, 3]
    office.cluster.room = 2
    office.clock.now_s += 10.0
    office.pool.care()
    assert office.cluster.fired == [3]
    assert [member.number for member in office.pool.workers] == [1, 2]


def test_a_silent_worker_counts_as_gone() -> None:
    office = Office(replicas=2, stall_s=50.0)
    office.pool.care()
    office.cluster.silent = {2: 51.0}
    ((member, news),) = office.pool.talk()
    assert member.number == 2
    assert isinstance(news, Gone)
    assert "said nothing for 51 s" in news.reason


def test_a_replica_that_rests_is_tried_again_while_others_work() -> None:
    office = Office(replicas=2)
    office.pool.care()
    for _ in range(len(RETRY_WAITS_S) + 1):
        office.pool.dismiss(office.worker(2), "it died")
        office.clock.advance(max(RETRY_WAITS_S))
        office.pool.care()
    assert [member.replica for member in office.pool.workers] == [1]
    office.clock.advance(REST_S)
    office.pool.care()
    assert [member.replica for member in office.pool.workers] == [1, 2]


def test_a_worker_that_has_committed_is_replaced_at_once_however_many_went_before() -> None:
    office = Office(replicas=1)
    for _ in range(3 * len(RETRY_WAITS_S)):
        office.pool.care()
        office.worker().parts.add("a part")
        office.pool.dismiss(office.worker(), "it died")
    assert len(office.cluster.hired) == 3 * len(RETRY_WAITS_S)


def test_rows_that_need_no_engine_tell_nothing_of_a_workers_speed() -> None:
    member = WorkerHandle(1, 1, 0.0, num_leased=1000)
    for now_s in range(5):
        member.look = look(8 * now_s, facts=None, capacity=1536)
        assert member.pace(now_s) == Pace(1000 - 8 * now_s, 1536, 0.0, is_up=False, num_slots=512)
    for now_s in range(5, 20):
        member.look = look(32, facts=FACTS, capacity=1536)
        assert member.pace(now_s).rate == 0
    member.look = look(132, facts=FACTS, capacity=1536)
    assert member.pace(20) == Pace(868, 1536, 100.0, is_up=True, num_slots=FACTS.max_num_seqs)
