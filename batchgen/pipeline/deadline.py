"""When a run has to be through: `--until`, `--max-runtime`, and who asks it to stop in time.

A wall-clock time is turned into an instant once, by the rules of its zone. From then on `until`
is held against `time.time` and `max_runtime_s` against `time.monotonic`, and whichever comes first
counts:

- A wall clock that is stepped takes the end of `until` with it: that is what a time of day means.
  `max_runtime_s` does not notice. What has been asked once is never taken back.
- While the machine is suspended nothing is asked. Linux's monotonic clock stands still in
  suspension, so that `max_runtime_s` counts time awake; an `until` that has passed in the meantime
  is noticed within a second of waking up, and the run is then asked to stop at once.
"""

from __future__ import annotations

import math
import re
import threading
import time
import zoneinfo
from dataclasses import KW_ONLY, dataclass
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from datetime import time as dt_time
from typing import TYPE_CHECKING, NamedTuple, Self

from batchgen.core.errors import nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from batchgen.pipeline.context import StopSwitch

_WHEN = re.compile(
    r"(?:(?P<date>\d{4}-\d\d-\d\d)(?:T|\s+))?"
    r"(?P<hour>\d{1,2}):(?P<minute>\d\d)(?::(?P<second>\d\d))?"
    r"\s*(?P<zone>Z|[+-]\d\d:?\d\d|[A-Za-z][\w+/-]*)?"
)
_EXPECTED = "expected for example 06:00, '06:00 Europe/Berlin' or '2026-11-23 06:00'"
_UNITS_S = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_DURATION = re.compile(r"\s*".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in _UNITS_S))

# How often the thread looks: the clock may be stepped and the lead grows while it sleeps.
_LOOK_EVERY_S = 1.0
# Before anything is known of the work: enough for short answers and a commit on a local disk. More
# would keep a short run from ever beginning, and so from ever knowing.
_FIRST_FINISH_S, _FIRST_COMMIT_S = 1.0, 1.0
_QUANTILE, _MARGIN = 0.99, 1.25


def parse_until(text: str, now: datetime, local: tzinfo | None = None) -> datetime:
    """Turn `06:00`, `06:00:30 Europe/Berlin`, `2026-11-23 06:00` or ISO with an offset into a time.

    A time of day is its next occurrence. A time that the clocks jump over is the first instant
    after the jump; one that they pass twice is the first of the two that is still to come.

    Args:
        text: As a person wrote it.
        now: Aware.
        local: Zone where the text names none; None: this machine's.

    Returns:
        Aware, in the zone of the text, after `now`.

    Raises:
        ValueError: It cannot be read, names no known zone, or is past.
    """
    found = _WHEN.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no time, {_EXPECTED}")
    zone = _zone(found["zone"], text) if found["zone"] else local
    try:
        clock = dt_time(int(found["hour"]), int(found["minute"]), int(found["second"] or 0))
        day = date.fromisoformat(found["date"]) if found["date"] else None
    except ValueError as error:
        raise ValueError(f"{text!r} is no time ({error}), {_EXPECTED}") from None
    today = now.astimezone(zone).date()
    for candidate in [day] if day else [today, today + timedelta(days=1)]:
        for instant in _instants(datetime.combine(candidate, clock), zone):
            if instant > now:
                return instant
    shown = now.astimezone(zone).isoformat(sep=" ", timespec="seconds")
    raise ValueError(f"{text!r} is past, now is {shown}; expected a time to come")


def _zone(name: str, text: str) -> tzinfo:
    if name == "Z":
        return UTC
    if name[0] in "+-":
        sign = -1 if name[0] == "-" else 1
        offset = sign * timedelta(hours=int(name[1:3]), minutes=int(name[-2:]))
        if abs(offset) >= timedelta(days=1):
            raise ValueError(f"{text!r}: {name} is no offset from UTC, expected for example +01:00")
        return timezone(offset)
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        known = zoneinfo.available_timezones()
        if not known:
            msg = f"{text!r}: this machine knows no time zones, install tzdata or write an offset"
        else:
            near = nearest(name, known)
            hint = f"did you mean {near!r}?" if near else "expected for example 'Europe/Berlin'"
            msg = f"{text!r}: there is no time zone {name!r}, {hint}"
        raise ValueError(msg) from error


def _instants(clock: datetime, zone: tzinfo | None) -> list[datetime]:
    """Return when the clocks of a zone show a time, in order: once, twice, or after a jump.

    No zone is this machine's, by the rules of its C library.
    """
    # By the offsets before and after a change, if there is one (PEP 495).
    found = sorted({clock.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1)})
    local = [instant.astimezone(zone) for instant in found]
    if shown := [one for one in local if one.replace(tzinfo=None) == clock]:
        return shown
    # They jump over it, between the two; on a whole minute, as all have since 1972.
    at = found[0].replace(second=0)
    while at.astimezone(zone).utcoffset() != local[-1].utcoffset():
        at += timedelta(minutes=1)
    return [at.astimezone(zone)]


def parse_duration(text: str) -> float:
    """Turn `5h`, `90m`, `1h30m`, `45s` or `2d` into seconds.

    Raises:
        ValueError: It cannot be read, or is nothing or without end.
    """
    found = _DURATION.fullmatch(text.strip().lower())
    numbers = found.groups() if found else ()
    units = _UNITS_S.values()
    seconds = sum(float(n) * unit for n, unit in zip(numbers, units, strict=False) if n)
    if not seconds and any(numbers):
        raise ValueError(f"{text!r} is nothing, expected more than 0, such as 5h or 90m")
    if not seconds or not math.isfinite(seconds):
        msg = f"{text!r} is no length of time, expected for example 5h, 90m, 1h30m or 45s"
        raise ValueError(msg)
    return seconds


def duration_text(seconds: float) -> str:
    """Write a duration as `parse_duration` reads it, in whole seconds: `1h30m`."""
    left, parts = round(seconds), []
    for unit, unit_s in _UNITS_S.items():
        number, left = divmod(left, unit_s)
        parts += [f"{number}{unit}"] if number else []
    return "".join(parts) or "0s"


@dataclass(frozen=True, slots=True)
class End:
    """The time by which a run has to be through; the earlier of the two counts."""

    until: datetime | None = None
    """Aware."""
    max_runtime_s: float | None = None
    started_s: float = 0.0
    """The run's start on the monotonic clock, for `max_runtime_s`."""

    def left_s(self, wall_s: float, monotonic_s: float) -> float:
        """Seconds to go, below 0 when over; infinite without an end.

        Args:
            wall_s: `time.time()`.
            monotonic_s: `time.monotonic()`.
        """
        return min(self._left_s(wall_s, monotonic_s))

    def reason(self, wall_s: float, monotonic_s: float) -> str:
        """Say which of the two ends it is, for people."""
        by_until_s, by_runtime_s = self._left_s(wall_s, monotonic_s)
        if self.until is None or by_runtime_s < by_until_s:
            return f"max runtime {duration_text(self.max_runtime_s or 0)}"
        timespec = "seconds" if self.until.second else "minutes"
        return f"deadline {self.until.isoformat(timespec=timespec)}"

    def _left_s(self, wall_s: float, monotonic_s: float) -> tuple[float, float]:
        by_until_s = math.inf if self.until is None else self.until.timestamp() - wall_s
        if self.max_runtime_s is None:
            return by_until_s, math.inf
        return by_until_s, self.max_runtime_s - (monotonic_s - self.started_s)


class Lead(NamedTuple):
    """The time before its end at which a run has to stop."""

    finish_s: float
    """For the rows in flight to finish."""
    commit_s: float
    """For what has finished to become durable, and the process to end."""


def estimate_lead(latencies_s: Iterable[float], commits_s: Iterable[float]) -> Lead:
    """Guess from what has been seen.

    Args:
        latencies_s: Of recent rows, from admission into the engine to the last token: so long
            may take what was admitted just now. May be a deque that another thread appends to,
            and may hold the ages of rows in flight, which are the long ones.
        commits_s: How long the last commits took; likewise.
    """
    rows, commits = sorted(list(latencies_s)), list(commits_s)  # noqa: C414 - copied in one go
    finish_s = _FIRST_FINISH_S
    if rows:
        finish_s = _MARGIN * rows[min(math.ceil(_QUANTILE * len(rows)), len(rows)) - 1]
    # Twice: one commit may be under way when the last one is handed over.
    return Lead(finish_s, _FIRST_COMMIT_S + 2 * max(commits, default=0.0))


@dataclass(eq=False)
class Deadline:
    """Asks a run to stop in time, from a thread of its own. Without an end it does nothing."""

    stop: StopSwitch
    """Asked once when what is in flight has just time enough to finish and be committed, and once
    more when only the commit has."""
    end: End
    """When to be through."""
    lead: Callable[[], Lead]
    """Called in the thread, again and again: the answer may change."""
    _: KW_ONLY
    wall: Callable[[], float] = time.time
    """A clock in seconds; only tests bring their own."""
    monotonic: Callable[[], float] = time.monotonic
    """Likewise."""

    def __post_init__(self) -> None:
        self._clocks = self.wall, self.monotonic
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None
        self.reason: str | None = None
        """Why the run was stopped, if it was this that asked first."""

    def __enter__(self) -> Self:
        if self.end.until is not None or self.end.max_runtime_s is not None:
            self.look()  # An end that is past already does not wait for a thread to start.
            self._thread = threading.Thread(target=self._watch, name="deadline", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join()

    def look(self) -> float:
        """Ask if it is time to; return the seconds until the next look."""
        now = self._clocks[0](), self._clocks[1]()
        left_s = self.end.left_s(*now)
        lead = self.lead()
        if left_s <= lead.finish_s + lead.commit_s and self.stop.state == "no":
            self.reason = self.end.reason(*now)
            self.stop.drain()
        if left_s <= lead.commit_s and self.stop.state == "drain":
            self.stop.now()
        next_s = lead.commit_s if self.stop.state != "no" else lead.finish_s + lead.commit_s
        return min(max(left_s - next_s, 0.05), _LOOK_EVERY_S)

    def _watch(self) -> None:
        pause_s = 0.0
        while not self._is_closed.wait(pause_s):
            pause_s = self.look()
