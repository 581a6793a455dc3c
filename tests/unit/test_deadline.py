"""Times that people write, and a switch that is asked in time; clocks are passed in."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.pipeline.context import Stop, StopSwitch
from batchgen.pipeline.deadline import (
    Deadline,
    End,
    Lead,
    duration_text,
    estimate_lead,
    parse_duration,
    parse_until,
)

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


def until(text: str, now: str, zone: str = "Europe/Berlin") -> str:
    found = parse_until(text, at(now), ZoneInfo(zone))
    assert found > at(now)
    return found.isoformat()


@pytest.mark.parametrize(
    ("text", "now", "expected"),
    [
        ("06:00", "2026-11-22T22:30:00+01:00", "2026-11-23T06:00:00+01:00"),
        ("6:00", "2026-11-23T05:59:59+01:00", "2026-11-23T06:00:00+01:00"),
        ("06:00", "2026-11-23T06:00:00+01:00", "2026-11-24T06:00:00+01:00"),
        ("06:00:30", "2026-11-23T06:00:29.5+01:00", "2026-11-23T06:00:30+01:00"),
        # The day is that of the zone, not that of `now`'s own offset.
        ("00:30", "2026-11-22T23:10:00+00:00", "2026-11-23T00:30:00+01:00"),
        ("20:00 America/New_York", "2026-11-23T00:10:00+01:00", "2026-11-22T20:00:00-05:00"),
        ("06:00 Asia/Tokyo", "2026-11-22T20:30:00+00:00", "2026-11-23T06:00:00+09:00"),
        ("06:00 UTC", "2026-11-22T06:30:00+01:00", "2026-11-22T06:00:00+00:00"),
        ("06:00Z", "2026-11-22T06:30:00+01:00", "2026-11-22T06:00:00+00:00"),
        ("06:00-05:00", "2026-11-22T06:30:00+01:00", "2026-11-22T06:00:00-05:00"),
        ("06:00 +0530", "2026-11-22T06:30:00+01:00", "2026-11-23T06:00:00+05:30"),
        ("2026-11-23 06:00", "2026-11-20T00:00:00+01:00", "2026-11-23T06:00:00+01:00"),
        ("2026-11-23T06:00:05", "2026-11-20T00:00:00+01:00", "2026-11-23T06:00:05+01:00"),
        ("2026-07-01 06:00", "2026-03-01T00:00:00+01:00", "2026-07-01T06:00:00+02:00"),
        ("2026-11-23T06:00+03:00", "2026-11-20T00:00:00+01:00", "2026-11-23T06:00:00+03:00"),
        ("2026-11-23 06:00 Europe/London", "2026-11-20T00:00:00Z", "2026-11-23T06:00:00+00:00"),
        (" 2026-11-23   06:00 ", "2026-11-20T00:00:00+01:00", "2026-11-23T06:00:00+01:00"),
    ],
)
def test_a_time_is_its_next_occurrence(text, now, expected):
    assert until(text, now) == expected


@pytest.mark.parametrize(
    ("text", "now", "expected"),
    [
        # Spring, 02:00 -> 03:00: the night is an hour shorter.
        ("06:00", "2026-03-28T22:30:00+01:00", "2026-03-29T06:00:00+02:00"),
        # A time that the clocks jump over is the first instant after the jump.
        ("02:30", "2026-03-28T22:30:00+01:00", "2026-03-29T03:00:00+02:00"),
        ("02:00", "2026-03-28T22:30:00+01:00", "2026-03-29T03:00:00+02:00"),
        ("02:59:59", "2026-03-28T22:30:00+01:00", "2026-03-29T03:00:00+02:00"),
        ("2026-03-29 02:30", "2026-03-28T22:30:00+01:00", "2026-03-29T03:00:00+02:00"),
        ("02:30", "2026-03-29T03:10:00+02:00", "2026-03-30T02:30:00+02:00"),
        # Autumn, 03:00 -> 02:00: the first of the two that is still to come.
        ("06:00", "2026-10-24T22:30:00+02:00", "2026-10-25T06:00:00+01:00"),
        ("02:30", "2026-10-24T22:30:00+02:00", "2026-10-25T02:30:00+02:00"),
        ("02:30", "2026-10-25T02:30:00+02:00", "2026-10-25T02:30:00+01:00"),
        ("02:30", "2026-10-25T02:10:00+01:00", "2026-10-25T02:30:00+01:00"),
        ("02:30", "2026-10-25T02:40:00+01:00", "2026-10-26T02:30:00+01:00"),
        ("2026-10-25 02:30", "2026-10-25T02:45:00+02:00", "2026-10-25T02:30:00+01:00"),
        ("2026-10-25T02:30+01:00", "2026-10-24T22:30:00+02:00", "2026-10-25T02:30:00+01:00"),
    ],
)
def test_changes_of_the_clocks(text, now, expected):
    assert until(text, now) == expected


@pytest.mark.parametrize(
    ("text", "now", "zone", "expected"),
    [
        # Midnight itself is jumped over.
        ("00:00", "2026-04-23T20:00:00+02:00", "Africa/Cairo", "2026-04-24T01:00:00+03:00"),
        # Half an hour, not a whole one.
        ("02:15", "2026-10-03T20:00:00+10:30", "Australia/Lord_Howe", "2026-10-04T02:30:00+11:00"),
    ],
)
def test_rarer_changes_of_the_clocks(text, now, zone, expected):
    assert until(text, now, zone) == expected


@given(
    st.integers(1_577_836_800, 2_051_222_400).map(lambda s: datetime.fromtimestamp(s, UTC)),
    st.times(),
    st.sampled_from(["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "UTC"]),
)
def test_the_next_occurrence_is_within_a_day_and_shows_the_time(now, clock, zone):
    text = clock.strftime("%H:%M:%S")
    found = parse_until(text, now, ZoneInfo(zone))
    assert timedelta(0) < found - now <= timedelta(hours=25)
    if found.strftime("%H:%M:%S") != text:  # Jumped over: the clocks have just changed.
        before = (found.astimezone(UTC) - timedelta(seconds=1)).astimezone(ZoneInfo(zone))
        assert before.utcoffset() != found.utcoffset()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("soon", "'soon' is no time, expected for example 06:00"),
        ("", "'' is no time"),
        ("6", "'6' is no time"),
        ("6pm", "'6pm' is no time"),
        ("24:00", "'24:00' is no time (hour must be in 0..23)"),
        ("06:60", "'06:60' is no time (minute must be in 0..59)"),
        ("2026-02-30 06:00", "'2026-02-30 06:00' is no time (day is out of range for month)"),
        ("06:00 Europe/Berln", "no time zone 'Europe/Berln', did you mean 'Europe/Berlin'?"),
        ("06:00 Europe", "there is no time zone 'Europe'"),
        ("06:00 xqzzzw", "no time zone 'xqzzzw', expected for example 'Europe/Berlin'"),
        ("06:00+25:00", "+25:00 is no offset from UTC, expected for example +01:00"),
        (
            "2026-11-22 06:00",
            "'2026-11-22 06:00' is past, now is 2026-11-22 22:30:00+01:00; expected a time to come",
        ),
        ("2026-10-25T02:30+02:00", "is past, now is 2026-11-22 23:30:00+02:00"),
    ],
)
def test_what_is_no_time_to_come_is_refused(text, problem):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_until(text, at("2026-11-22T22:30:00+01:00"), BERLIN)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "summer_offset_h"),
    [
        ("Europe/Berlin", 2),
        (":Asia/Tokyo", 9),
        ("", 0),
        # A rule of the C library's own.
        ("CET-1CEST,M3.5.0,M10.5.0/3", 2),
    ],
)
def test_the_machines_zone_is_that_of_its_variable(monkeypatch, variable, summer_offset_h):
    monkeypatch.setenv("TZ", variable)
    time.tzset()
    try:
        now = at("2026-01-15T12:00:00+00:00")
        found = parse_until("2026-07-01 06:00", now)
        assert found.isoformat() == f"2026-07-01T06:00:00+{summer_offset_h:02}:00"
        if summer_offset_h == 2:  # 02:30 is jumped over in March, and passed twice in October.
            jumped = parse_until("2026-03-29 02:30", now)
            assert jumped.isoformat() == "2026-03-29T03:00:00+02:00"
            twice = parse_until("2026-10-25 02:30", now)
            assert twice.isoformat() == "2026-10-25T02:30:00+02:00"
            later = parse_until("2026-10-25 02:30", twice)
            assert later.isoformat() == "2026-10-25T02:30:00+01:00"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5h", 18_000),
        ("90m", 5_400),
        ("1h30m", 5_400),
        ("1h 30m", 5_400),
        ("45s", 45),
        ("2d", 172_800),
        ("1D2H3M4S", 93_784),
        ("1.5h", 5_400),
        ("0h5m", 300),
    ],
)
def test_lengths_of_time(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "5x", "-5m", "30m1h", "h", "5 hrs", "9" * 400 + "d"])
def test_what_is_no_length_of_time_is_refused(text):
    with pytest.raises(ValueError, match="is no length of time, expected for example 5h"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["0h", "0s", "0.0m", "0h0m"])
def test_no_time_at_all_is_refused_as_that(text):
    with pytest.raises(ValueError, match="is nothing, expected more than 0, such as 5h or 90m"):
        parse_duration(text)


@given(st.integers(1, 10**7))
def test_lengths_are_written_as_they_are_read(seconds):
    assert parse_duration(duration_text(seconds)) == seconds


def test_lengths_for_people():
    assert [duration_text(s) for s in (0.2, 45, 5400, 18000, 90061)] == [
        "0s",
        "45s",
        "1h30m",
        "5h",
        "1d1h1m1s",
    ]


def test_the_lead_is_the_slow_rows_and_the_slowest_commit_twice():
    lead = estimate_lead(deque([1.0] * 980 + [8.0] * 20), [0.5, 3.0, 1.0])
    assert lead == Lead(finish_s=10.0, commit_s=7.0)
    assert estimate_lead([4.0], []) == Lead(5.0, 1.0)
    # One row in a thousand does not decide.
    assert estimate_lead([1.0] * 999 + [500.0], []).finish_s == 1.25


def test_before_anything_is_known_the_lead_is_short():
    lead = estimate_lead([], [])
    assert 0 < lead.finish_s + lead.commit_s <= 3


def test_the_lead_may_be_asked_for_while_rows_come_in():
    latencies: deque[float] = deque(maxlen=2000)
    is_over = threading.Event()

    def append():
        while not is_over.is_set():
            latencies.append(1.0)

    thread = threading.Thread(target=append)
    thread.start()
    try:
        for _ in range(300):
            estimate_lead(latencies, [])
    finally:
        is_over.set()
        thread.join()


@dataclass
class Hands:
    """Both clocks, moved by hand."""

    wall_s: float = at("2026-11-23T05:00:00+01:00").timestamp()
    monotonic_s: float = 1000.0
    lead: Lead = field(default_factory=lambda: Lead(60.0, 5.0))

    def move(self, seconds: float) -> None:
        self.wall_s += seconds
        self.monotonic_s += seconds

    def deadline(self, stop: StopSwitch, end: End) -> Deadline:
        clocks = {"wall": lambda: self.wall_s, "monotonic": lambda: self.monotonic_s}
        return Deadline(stop, end, lambda: self.lead, **clocks)


SIX = at("2026-11-23T06:00:00+01:00")


def test_the_run_drains_before_the_end_and_stops_before_it():
    hands, stop = Hands(), StopSwitch()
    deadline = hands.deadline(stop, End(until=SIX))
    states = []
    for step in (0, 3534, 2, 58, 1.5, 1, 100):  # Drain at 3,535 s, now at 3,595 s.
        hands.move(step)
        deadline.look()
        states.append(stop.state)
    assert states == [Stop.NO, Stop.NO, Stop.DRAIN, Stop.DRAIN, Stop.NOW, Stop.NOW, Stop.NOW]
    assert deadline.reason == "deadline 2026-11-23T06:00+01:00"


@pytest.mark.parametrize(
    ("until_s", "runtime_s", "reason"),
    [
        (7200, 3600, "max runtime 1h"),
        (3600, 7200, "deadline 2026-11-23T06:00+01:00"),
        (3600, None, "deadline 2026-11-23T06:00+01:00"),
        (None, 3600, "max runtime 1h"),
    ],
)
def test_the_earlier_end_counts(until_s, runtime_s, reason):
    hands, stop = Hands(), StopSwitch()
    ends = None if until_s is None else SIX + timedelta(seconds=until_s - 3600)
    deadline = hands.deadline(stop, End(ends, runtime_s, hands.monotonic_s))
    hands.move(3600 - 66)
    deadline.look()
    assert (stop.state, deadline.reason) == (Stop.NO, None)
    hands.move(2)
    deadline.look()
    assert (stop.state, deadline.reason) == (Stop.DRAIN, reason)


def test_the_lead_may_grow_while_the_run_goes():
    hands, stop = Hands(), StopSwitch()
    deadline = hands.deadline(stop, End(until=SIX))
    hands.move(3000)
    deadline.look()
    assert stop.state is Stop.NO
    hands.lead = Lead(590.0, 10.0)
    deadline.look()
    assert stop.state is Stop.DRAIN


def test_a_stepped_wall_clock_moves_until_and_not_the_runtime():
    hands, stop, other = Hands(), StopSwitch(), StopSwitch()
    by_wall = hands.deadline(stop, End(until=SIX))
    by_runtime = hands.deadline(other, End(max_runtime_s=3600, started_s=hands.monotonic_s))
    hands.wall_s += 3540
    by_wall.look()
    by_runtime.look()
    assert (stop.state, other.state) == (Stop.DRAIN, Stop.NO)
    hands.wall_s -= 3540  # Stepped back: what was asked is not taken back, and goes no further.
    by_wall.look()
    assert stop.state is Stop.DRAIN


def test_an_end_passed_in_suspension_stops_at_once():
    hands, stop = Hands(), StopSwitch()
    deadline = hands.deadline(stop, End(SIX, 18_000, hands.monotonic_s))
    hands.wall_s += 8 * 3600  # Asleep: the monotonic clock stood still.
    deadline.look()
    assert (stop.state, deadline.reason) == (Stop.NOW, "deadline 2026-11-23T06:00+01:00")


def test_a_switch_that_somebody_else_asked_is_only_hurried():
    hands, stop = Hands(), StopSwitch()
    deadline = hands.deadline(stop, End(until=SIX))
    stop.ask()
    hands.move(3550)
    deadline.look()
    assert (stop.state, deadline.reason) == (Stop.DRAIN, None)
    hands.move(48)
    deadline.look()
    assert (stop.state, deadline.reason) == (Stop.NOW, None)
    deadline.look()
    assert stop.state is Stop.NOW


def test_seconds_of_the_deadline_are_told_where_there_are_some():
    end = End(until=at("2026-11-23T06:00:30+01:00"))
    assert end.reason(0, 0) == "deadline 2026-11-23T06:00:30+01:00"
    assert End().left_s(0, 0) == math.inf


def test_looks_are_never_further_apart_than_a_second_nor_without_a_pause():
    hands, stop = Hands(), StopSwitch()
    deadline = hands.deadline(stop, End(until=SIX))
    assert deadline.look() == 1.0
    hands.move(3534.5)
    assert deadline.look() == pytest.approx(0.5)
    hands.move(600)
    assert deadline.look() == 0.05


def test_the_thread_asks_in_real_time():
    stop, started_s = StopSwitch(), time.monotonic()
    end = End(max_runtime_s=1.0, started_s=started_s)
    drained_s = stopped_s = None
    with Deadline(stop, end, lambda: Lead(0.3, 0.2)) as deadline:
        assert stop.state is Stop.NO
        while stopped_s is None and time.monotonic() < started_s + 20:
            if drained_s is None and stop.state is not Stop.NO:
                drained_s = time.monotonic() - started_s
            if stop.state is Stop.NOW:
                stopped_s = time.monotonic() - started_s
            time.sleep(0.005)
    assert drained_s is not None
    assert stopped_s is not None
    assert 0.5 <= drained_s < stopped_s
    assert stopped_s >= 0.8
    assert deadline.reason == "max runtime 1s"
    assert not [thread for thread in threading.enumerate() if thread.name == "deadline"]


def test_an_end_that_is_past_is_heard_before_the_work_begins():
    stop, askers = StopSwitch(), []

    def lead():
        askers.append(threading.current_thread())
        return Lead(1, 1)

    with Deadline(stop, End(until=at("2020-01-01T00:00:00Z")), lead):
        assert stop.state is Stop.NOW
    assert askers[0] is threading.current_thread()


def test_leaving_before_the_end_asks_nothing():
    stop = StopSwitch()
    with Deadline(stop, End(max_runtime_s=3600, started_s=time.monotonic()), lambda: Lead(1, 1)):
        assert [thread.name for thread in threading.enumerate()].count("deadline") == 1
    assert stop.state is Stop.NO
    with Deadline(stop, End(), lambda: Lead(1, 1)):
        assert "deadline" not in [thread.name for thread in threading.enumerate()]
