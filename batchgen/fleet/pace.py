"""How many rows each worker should get now. Pure.

While rows are plenty, a worker has what its engine holds and some seconds of work besides, so
that no engine waits for the driver. Towards the end these seconds shrink, and nobody gets more
than its share of what is left, by speed: the slow and the fast run out at about the same moment.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

HORIZON_S = 10.0
"""Of work that a worker has at least, besides what its engine holds, while rows are plenty."""
LEAST_S = 2.0
"""The same at the end: some round trips with a busy driver."""
SHARE_OF_REST = 0.25
"""The same in between, as a share of the time until the last rows are begun."""
REFILL = 0.5
"""A lease's size, as a share of the same."""
MAX_LEASE_ROWS = 50_000
"""More would make it dear to take a lease back."""
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
    """Rows/s that ended of late; 0 while unknown. See `Meter`."""
    is_up: bool
    """The engine answers."""

    @property
    def is_working(self) -> bool:
        """Rows end, or will at once; some need no engine."""
        return self.is_up or self.rate > 0


class Outlook(NamedTuple):
    """The whole fleet at one moment, as far as one worker's share depends on it."""

    each: int
    """Free rows a worker."""
    mean_rate: float
    """Of workers whose rate is known; 0 if none is."""
    left_s: float
    """How long all that is left would take the workers at work."""
    is_held_up: bool
    """Nothing is free, who works has run out, and who does not work yet has rows.

    To fire those, and free their rows, ends the job sooner than to wait for them.
    """


def outlook(workers: Sequence[Pace], num_pending: int) -> Outlook:
    """Look at the fleet; good for some tenths of a second.

    Args:
        workers: All that have been heard of.
        num_pending: Rows that are free.
    """
    each = math.ceil(num_pending / max(1, len(workers)))
    known = [worker.rate for worker in workers if worker.rate > 0]
    at_work = [worker for worker in workers if worker.is_working]
    num_left = num_pending + sum([worker.backlog for worker in workers])
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
        # As much again as the engine holds, lest it wait while its speed is measured.
        enough = most = min(worker.capacity * (1 + worker.is_up), fleet.each)
    if worker.backlog < enough:
        return min(most - worker.backlog, MAX_LEASE_ROWS)
    return int(worker.is_working and not worker.backlog and fleet.each > 0)


def _cover(worker: Pace, left_s: float) -> tuple[int, int]:
    """Up to how many rows a worker gets more, and up to how many it then gets."""
    rate = worker.rate
    until_begun_s = left_s - worker.capacity / rate
    ahead_s = min(max(until_begun_s * SHARE_OF_REST, LEAST_S), HORIZON_S)
    enough = worker.capacity + ahead_s * rate
    most = enough + ahead_s * rate * REFILL
    share = rate * left_s
    return math.ceil(min(enough, share)), math.ceil(min(most, share))


def _share(worker: Pace, rate: float, left_s: float) -> int:
    return math.ceil(min(worker.capacity, rate * left_s))


class Meter:
    """Rows/s of one worker over the last half minute."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, now_s: float, num_ended: int) -> None:
        """Take a count of rows that have ended since the worker began."""
        seen = self._seen
        if not num_ended:
            seen.clear()  # It is not slow, it has not begun.
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
