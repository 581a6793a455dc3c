"""How many rows each worker should get now: arithmetic, no clock and no I/O.

While rows are plenty, a worker has what its engine holds and some seconds of work besides, so
that no engine waits for the driver. Towards the end this shrinks to what the engine works on and
two seconds of work, and nobody gets more than its share of what is left, by speed: the slow and
the fast run out at about the same moment. What is leased stays leased, so that a small job is not
given out as a whole before speeds are known, even if the engines could hold it. Nor is who has no
engine yet: the others may be through before it has.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

HORIZON_S = 10.0
"""Of work that a worker has at least, besides what its engine holds, while rows are plenty."""
LEAST_S = 2.0
"""The same at the end, besides what the engine works on: some round trips with a busy driver."""
SHARE_OF_REST = 0.25
"""The same in between, as a share of the time until the last rows are begun."""
REFILL = 0.5
"""A lease's size, as a share of the same."""
FIRST = 0.5
"""Of its equal share, what a worker gets before any speed is known."""
FIRST_REFILL = 0.25
"""A lease's size then, as a share of that."""
MAX_LEASE_ROWS = 50_000
"""More would make it expensive to take a lease back."""
STARTING_S = 180.0
"""A worker that does nothing yet gets nothing that the others will have done by then."""
RATE_WINDOW_S = 30.0
_SAMPLE_S = 1.0


class Pace(NamedTuple):
    """A worker at one moment."""

    backlog: int
    """Rows leased to it that have not ended, durable or not."""
    capacity: int
    """Rows that its engine holds at once; what is expected of it, before it is up."""
    rate: float
    """Rows/s that ended of late; 0 while unknown, or while there is no engine. See `Meter`."""
    is_up: bool
    """The engine answers."""
    num_slots: int
    """Rows that its engine may work on at once, no more than it holds; guessed before it is up."""


class Outlook(NamedTuple):
    """The whole fleet at one moment, as far as one worker's share depends on it."""

    each: int
    """An equal share of all rows that are left, as far as rows are free."""
    mean_rate: float
    """Of workers whose rate is known; 0 if none is."""
    left_s: float
    """How long all that is left would take the workers at work."""
    is_held_up: bool
    """Nothing is free, who works has run out, and who does not work yet has rows.

    To fire those, and free their rows, ends the job sooner than to wait for them.
    """


def outlook(workers: Sequence[Pace], num_pending: int, num_workers: int = 0) -> Outlook:
    """Look at the fleet; good for some tenths of a second.

    Args:
        workers: All that have been heard of.
        num_pending: Rows that are free.
        num_workers: How many there will be soon. Who is heard of first must not take the others'
            share with it: an engine holds thousands of rows, often a whole small job.
    """
    at_work = [worker for worker in workers if worker.is_up]
    known = [worker.rate for worker in at_work if worker.rate > 0]
    num_left = num_pending + sum([worker.backlog for worker in workers])
    each = min(num_pending, math.ceil(num_left / max(1, len(workers), num_workers)))
    is_dry = not num_pending and not any(worker.backlog for worker in at_work)
    is_held_up = is_dry and num_left > 0 and bool(at_work)
    if not known:
        return Outlook(each, 0.0, math.inf, is_held_up)
    mean = statistics.fmean(known)
    speed = sum([worker.rate or mean for worker in at_work])
    return Outlook(each, mean, num_left / speed, is_held_up)


def rows_for(worker: Pace, fleet: Outlook) -> int:
    """How many rows to lease to a worker now; 0 if it has enough, or should get none.

    That many may not be free any more: who asks first is served first.
    """
    if worker.rate > 0:
        enough, most = _cover(worker, fleet.left_s)
    elif fleet.mean_rate:
        is_in_time = worker.is_up or fleet.left_s >= STARTING_S
        enough = most = _share(worker, fleet.mean_rate, fleet.left_s) if is_in_time else 0
    else:
        enough, most = _first(worker, fleet.each)
    if worker.backlog < enough:
        return min(most - worker.backlog, MAX_LEASE_ROWS)
    return int(worker.is_up and not worker.backlog and fleet.each > 0)


def _first(worker: Pace, each: int) -> tuple[int, int]:
    """As `_cover`, before any speed is known."""
    # As much again as the engine holds, lest it wait while its speed is measured.
    holds = worker.capacity * (1 + worker.is_up)
    at_once = worker.num_slots if worker.is_up else 0
    most = min(holds, each, max(at_once, math.ceil(each * FIRST)))
    return math.ceil(most * (1 - FIRST_REFILL)), most


def _cover(worker: Pace, left_s: float) -> tuple[int, int]:
    """Up to how many rows a worker gets more, and up to how many it then gets."""
    rate, num_slots = worker.rate, worker.num_slots
    until_begun_s = left_s - num_slots / rate
    plenty_s = HORIZON_S + (worker.capacity - num_slots) / rate
    ahead_s = min(max(until_begun_s * SHARE_OF_REST, LEAST_S), plenty_s)
    enough = num_slots + ahead_s * rate
    most = enough + min(ahead_s, HORIZON_S) * rate * REFILL
    share = rate * left_s
    return math.ceil(min(enough, share)), math.ceil(min(most, share))


def _share(worker: Pace, rate: float, left_s: float) -> int:
    """Up to how many rows a worker gets whose speed is not known, where others' are."""
    ahead_s = LEAST_S if worker.is_up else 0.0
    at_once = min(worker.num_slots + ahead_s * rate, worker.capacity)
    return math.ceil(min(at_once, rate * left_s))


class Meter:
    """Rows/s of one worker over the last half minute."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, now_s: float, num_ended: int) -> None:
        """Take a count of rows that have ended, from the moment when the engine is up."""
        seen = self._seen
        if seen and num_ended == seen[0][1]:
            seen.clear()  # It is not slow, it has not begun; what ended before needed no engine.
        if not seen or now_s - seen[-1][0] >= _SAMPLE_S:
            seen.append((now_s, num_ended))
        while len(seen) > 2 and now_s - seen[1][0] >= RATE_WINDOW_S:
            seen.popleft()

    @property
    def rate(self) -> float:
        """0 while unknown."""
        if len(self._seen) < 2:
            return 0.0
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return (last - first) / (last_s - first_s)
