"""Who is hired, replaced and given up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from batchgen.cluster.crew import Places
from batchgen.cluster.messages import Gone, StartEngine
from batchgen.cluster.pace import Pace
from batchgen.cluster.roster import REST_S, RETRY_WAITS_S, Member, Roster
from batchgen.core.errors import ConfigError, EngineDeadError
from tests import fakes
from tests.fakes import FACTS, FakeClock
from tests.unit.test_fleet_board import look

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchgen.cluster.messages import Badge, Order, Report


class PaperCrew:
    """Notes what it is asked; nobody works."""

    def __init__(self, room: int = 2) -> None:
        self.room = room
        self.hired: list[Badge] = []
        self.sent: dict[int, list[Order]] = {}
        self.fired: list[int] = []
        self.news: list[tuple[int, Report | Gone]] = []
        self.silent: dict[int, float] = {}

    def places(self) -> Places:
        return Places(self.room, f"{self.room} desks")

    def hire(self, badge: Badge) -> None:
        self.hired.append(badge)

    def exchange(self, number: int, orders: Sequence[Order], wait_s: float) -> None:
        self.sent.setdefault(number, []).extend(orders)

    def wait(self, timeout_s: float) -> Sequence[tuple[int, Report | Gone]]:
        news, self.news = self.news, []
        return news

    def silent_s(self, number: int) -> float:
        return self.silent.get(number, 0.0)

    def fire(self, number: int) -> None:
        self.fired.append(number)

    def put(self, feds: Any) -> Any:
        return feds

    def close(self) -> None:
        pass


class Office:
    """A roster, its crew and its clock."""

    def __init__(self, *, room: int = 2, **run: Any) -> None:
        self.crew = PaperCrew(room)
        self.clock = FakeClock()
        self.told: list[str] = []
        self.hired: list[Member] = []
        self.roster = Roster(
            self.crew,  # type: ignore[arg-type]
            fakes.job(run=run),
            "run-1",
            on_hired=self.hired.append,
            tell=self.told.append,
            clock=self.clock,
        )

    def numbers(self) -> list[int]:
        return [badge.number for badge in self.crew.hired]


def test_more_replicas_than_this_machine_has_room_for_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"replicas = 3, but .* room for 2 \(2 desks\)"):
        Office(replicas=3).roster.care()
    Office(replicas=3, ray_address="auto").roster.care()


def test_each_replica_gets_a_worker_with_a_number_of_its_own() -> None:
    office = Office(room=3, replicas=3)
    office.roster.is_starting_engines = True
    office.roster.care()
    office.roster.care()
    assert [(badge.number, badge.replica) for badge in office.crew.hired] == [
        (1, 1),
        (2, 2),
        (3, 3),
    ]
    office.roster.send()
    assert office.crew.sent == {1: [StartEngine()], 2: [StartEngine()], 3: [StartEngine()]}


def test_who_waits_for_room_is_not_expected_and_others_not_for_ever() -> None:
    office = Office(room=2, replicas=6, ray_address="auto")
    office.roster.care()
    assert len(office.hired) == 6
    assert office.roster.num_expected == 2
    office.crew.room = 6
    office.clock.advance(10)
    office.roster.care()
    assert office.roster.num_expected == 6
    office.hired[0].look = look()
    office.clock.advance(60)
    assert office.roster.num_expected == 1


def test_a_worker_that_is_gone_is_replaced_under_a_new_number() -> None:
    office = Office(replicas=2)
    office.roster.care()
    office.roster.dismiss(office.hired[0], "it died")
    office.roster.care()
    assert office.numbers() == [1, 2, 3]
    assert office.crew.hired[2].replica == 1
    assert office.crew.fired == [1]
    assert "it died" in office.told[0]


def test_workers_that_do_nothing_are_replaced_ever_later_and_then_no_more() -> None:
    office = Office(replicas=1)
    office.roster.care()
    for wait_s in RETRY_WAITS_S:
        office.roster.dismiss(office.hired[-1], "it died")
        num = len(office.hired)
        if wait_s:
            office.clock.now_s += wait_s - 0.1
            office.roster.care()
            assert len(office.hired) == num
        office.clock.now_s += 0.2
        office.roster.care()
        assert len(office.hired) == num + 1
    office.roster.dismiss(office.hired[-1], "no memory")
    assert office.told[-1].endswith("no memory; tried again in 10 min")
    with pytest.raises(EngineDeadError, match=r"every replica has failed; .*no memory"):
        office.roster.care()


def test_auto_follows_the_room_that_there_is() -> None:
    office = Office(room=1, replicas="auto")
    office.roster.care()
    assert office.numbers() == [1]
    office.crew.room = 3
    office.roster.care()
    assert office.numbers() == [1]  # It does not ask at every turn.
    office.clock.now_s += 10.0
    office.roster.care()
    assert office.numbers() == [1, 2, 3]
    office.crew.room = 2
    office.clock.now_s += 10.0
    office.roster.care()
    assert office.crew.fired == [3]
    assert [member.number for member in office.roster.members] == [1, 2]


def test_a_silent_worker_counts_as_gone() -> None:
    office = Office(replicas=2, stall_s=50.0)
    office.roster.care()
    office.crew.silent = {2: 51.0}
    ((member, news),) = office.roster.talk()
    assert member.number == 2
    assert isinstance(news, Gone)
    assert "said nothing for 51 s" in news.reason


def test_a_replica_that_rests_is_tried_again_while_others_work() -> None:
    office = Office(replicas=2)
    office.roster.care()
    for _ in range(len(RETRY_WAITS_S) + 1):
        (last,) = [one for one in office.roster.members if one.replica == 2]
        office.roster.dismiss(last, "it died")
        office.clock.advance(max(RETRY_WAITS_S))
        office.roster.care()
    assert [member.replica for member in office.roster.members] == [1]
    office.clock.advance(REST_S)
    office.roster.care()
    assert [member.replica for member in office.roster.members] == [1, 2]


def test_a_worker_that_has_committed_is_replaced_at_once_however_many_went_before() -> None:
    office = Office(replicas=1)
    for _ in range(3 * len(RETRY_WAITS_S)):
        office.roster.care()
        office.hired[-1].parts.add("a part")
        office.roster.dismiss(office.hired[-1], "it died")
    assert len(office.hired) == 3 * len(RETRY_WAITS_S)


def test_rows_that_need_no_engine_tell_nothing_of_a_workers_speed() -> None:
    member = Member(1, 1, 0.0, num_leased=1000)
    for now_s in range(5):
        member.look = look(8 * now_s, facts=None, capacity=1536)
        assert member.pace(now_s) == Pace(1000 - 8 * now_s, 1536, 0.0, is_up=False, num_slots=512)
    for now_s in range(5, 20):
        member.look = look(32, facts=FACTS, capacity=1536)
        assert member.pace(now_s).rate == 0
    member.look = look(132, facts=FACTS, capacity=1536)
    assert member.pace(20) == Pace(868, 1536, 100.0, is_up=True, num_slots=FACTS.max_num_seqs)
