"""Who has which rows: the driver's book of one `answer()`. Pure: no clock, no I/O.

Invariant: every row of the book is in exactly one place: free, out with exactly one worker,
settled, or guilty. A row gets into a second worker's hands only by way of `take_back`.

How a row that kills whole workers is found (an engine that dies is its worker's own affair, see
`engine.suspects`):

- Rows that were begun in a worker that died are doubtful: they are leased again, before all
  others, as any rows are. Nodes are taken away, people kill processes; that costs no more.
- Doubtful rows that were begun in a second worker that died are suspects. A worker gets a 16th of
  those that were in as many deaths, one such lease at a time, among other rows, so that no engine
  is empty for it. What ends well is settled, and so innocent.
- Once the suspects of four deaths or more are few, they go one by one, each alone into a worker
  that holds nothing else. Only a row that died alone, twice, is guilty.

A killer among 100,000 rows that one worker had is found with 8 deaths, among 1,000 or fewer with 6,
two of 100,000 with 14 at most. In a fleet that loses workers all the time, rows that take long are
in many deaths: there it takes more, alone and not, one for each doubling of the deaths that no
guilty row explains. And while there are other rows, only one worker in eight has a lone suspect, so
that such a fleet still gets on.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from batchgen.cluster.hand import DEATHS_OF_SUSPECTS, Hand, Span, by_segment, count, cut, length
from batchgen.cluster.messages import Lease
from batchgen.core.errors import AccountingError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.cluster.hand import Out
    from batchgen.core.ranges import Ranges

SHARED_DEATHS = 4
"""Before a suspect goes alone: an engine that holds one row costs as much as a full one."""
SOLO_DEATHS = 2
"""One could be chance."""
FEW_DEATHS = 16
"""More than one killer needs."""
WORKERS_A_SEARCH = 8
"""One of so many may be empty but for a lone suspect, while there are other rows."""
PART = 16
"""A lease is such a part of the suspects: less finds a killer in fewer deaths, but takes longer."""
LEAST_SUSPECTS = 8
"""At a time, as long as none goes alone."""

_READ_AHEAD = 10_000


class TakenBack(NamedTuple):
    """What a worker had not settled."""

    rows: Mapping[int, Ranges]
    """Free again."""
    num_doubtful: int
    """Of these, begun in one worker that died."""
    num_suspects: int
    """Of these, begun in two."""


class LeaseBook:
    """The book of one `answer()`, in the driver's one thread."""

    def __init__(self, todo: Mapping[int, Ranges]) -> None:
        """Begin with rows that workers read themselves.

        Args:
            todo: Segment -> rows.
        """
        self._unread = (
            Span(segment, start, stop)
            for segment in sorted(todo)
            for start, stop in todo[segment].spans
        )
        self._returned: deque[Span] = deque()
        self._packed: deque[Span] = deque()
        self._files: deque[Span] = deque()
        self._suspects: dict[int, deque[Span]] = {}
        """By the number of their deaths."""
        self._guilty: list[Span] = []
        self._num_guilty = 0
        self._num_deaths = 0
        self._num_fresh_deaths = 0
        self._hands: dict[int, Hand] = {}
        self._num_leases = 0
        self.num_pending = count(todo)
        """Rows that are free; suspects among them."""
        self.is_fed = False
        """No more rows will be added. The caller sets it."""

    def add(self, rows: Mapping[int, Ranges], payload: object) -> None:
        """Take in rows that come packed.

        Args:
            rows: Not in the book yet.
            payload: Goes along in their leases; let go once all its rows are settled.

        Raises:
            AccountingError: The book is fed.
        """
        if self.is_fed:
            msg = f"{count(rows)} rows were added to a lease book after its end"
            raise AccountingError(msg)
        for segment in sorted(rows):
            for start, stop in rows[segment].spans:
                self._packed.append(Span(segment, start, stop, payload))
        self.num_pending += count(rows)

    def take(self, worker: int, num_rows: int) -> Lease | None:
        """Lease the next rows: suspects, others taken back, then packed ones, then those of files.

        Args:
            worker: Its number.
            num_rows: At most so many, fewer where a payload ends; ask again for more. Of
                suspects it may be more.

        Returns:
            None if nothing is free for this worker as long as it holds what it holds: it has a
            single suspect, or only suspects are free. If it is to get on, ask it to make durable
            what it has (`Finish`).
        """
        hand = self._hands.get(worker)
        if num_rows < 1 or (hand is not None and hand.is_alone):
            return None
        if hand is None or not hand.has_suspects:
            for suspects in self._suspects_first_to_go():
                is_alone = self._goes_alone(suspects)
                if not is_alone or (hand is None and self._has_room_for_one()):
                    num_rows = self._part(suspects)
                    return self._lend(worker, cut(suspects, num_rows), is_alone=is_alone)
        free = self._next_free()
        return self._lend(worker, cut(free, num_rows)) if free else None

    def settle(self, worker: int, rows: Mapping[int, Ranges]) -> Mapping[int, Ranges]:
        """Note that rows of a worker are durable, or need no work.

        Args:
            worker: Its number; to be told before `take_back`.
            rows: In whatever order, of any of its leases. About 0.6 us a row if they are
                scattered, next to nothing if they are not.

        Returns:
            Those that this worker does not have (any more); nothing is noted of them.
        """
        hand = self._hands.get(worker)
        if hand is None:
            return {segment: ranges for segment, ranges in rows.items() if ranges}
        strays = hand.settle(rows)
        if not hand.outs:
            del self._hands[worker]
        return strays

    def take_back(self, worker: int, *, has_died: bool, num_begun: int | None = None) -> TakenBack:
        """Free what a worker has not settled; it is leased before everything else.

        Args:
            worker: Its number. It must get none of these rows by another way any more.
            has_died: Whether its rows may be why it is gone. Not if it was sent away.
            num_begun: How many unsettled rows it can have begun at most: in flight, waiting for
                another attempt, ended but not durable, read ahead where it orders them. None: all.
                A worker reads leases in the order taken, so a lease with so many unsettled rows
                before it was surely not begun, and none of its rows is doubted.
        """
        hand = self._hands.pop(worker, None) or Hand()
        left: list[Span] = []
        begun: list[Out] = []
        num_before = 0
        for out, spans in hand.unsettled():
            if has_died and (num_begun is None or num_before < num_begun):
                begun.append(out)
                left += [_after_death(span, is_alone=out.is_alone) for span in spans]
            else:
                left += spans
            num_before += out.num_left
        self._note_death(begun)
        return self._free(left)

    def _note_death(self, begun: Sequence[Out]) -> None:
        self._num_deaths += bool(begun)
        self._num_fresh_deaths += bool(begun) and not any(out.sample.num_deaths for out in begun)

    def _free(self, spans: Sequence[Span]) -> TakenBack:
        """Put rows that came back where they belong."""
        enough = SOLO_DEATHS + self._caution
        guilty = [span for span in spans if span.num_solo_deaths >= enough]
        free = [span for span in spans if span.num_solo_deaths < enough]
        suspects = [span for span in free if span.num_deaths >= DEATHS_OF_SUSPECTS]
        others = [span for span in free if span.num_deaths < DEATHS_OF_SUSPECTS]
        self._guilty += guilty
        self._num_guilty += len(guilty)
        for span in suspects:
            self._suspects.setdefault(span.num_deaths, deque()).append(span)
        self._returned.extendleft(reversed(others))
        self.num_pending += length(free)
        num_doubtful = length(span for span in others if span.num_deaths)
        return TakenBack(by_segment(free), num_doubtful, length(suspects))

    def withdraw(self) -> dict[int, Ranges]:
        """Take out, for good, what is free and was to be read from files by workers.

        They may be added again, packed; what is doubted of them is forgotten.
        """
        out = [*self._files, *self._unread]
        self._files.clear()
        for spans in (self._returned, *self._suspects.values()):
            out += [span for span in spans if span.payload is None]
            kept = [span for span in spans if span.payload is not None]
            spans.clear()
            spans.extend(kept)
        self.num_pending -= length(out)
        return by_segment(out)

    def guilty(self) -> Sequence[Lease]:
        """Hand out each row that was found to kill workers, once, for the caller to end it.

        Its lease is nobody's: not to be settled or taken back.
        """
        rows, self._guilty = self._guilty, []
        return [self._lease([span]) for span in rows]

    def num_out(self, worker: int) -> int:
        """Rows leased to a worker and not settled."""
        hand = self._hands.get(worker)
        return hand.num_out if hand is not None else 0

    def rows_out(self, worker: int) -> Mapping[int, Ranges]:
        """Which these are."""
        hand = self._hands.get(worker) or Hand()
        return by_segment(span for _, spans in hand.unsettled() for span in spans)

    def is_alone(self, worker: int) -> bool:
        """Whether a worker has a single suspect: nothing else until that is settled."""
        hand = self._hands.get(worker)
        return hand is not None and hand.is_alone

    @property
    def num_out_total(self) -> int:
        """Rows leased and not settled."""
        return sum(hand.num_out for hand in self._hands.values())

    @property
    def num_suspects(self) -> int:
        """Rows that are free, but not for any worker at any time."""
        return sum(map(length, self._suspects.values()))

    @property
    def is_through(self) -> bool:
        """Whether every row is settled or was handed out as guilty, and none will be added."""
        return self.is_fed and not (self.num_pending or self._hands or self._guilty)

    def _next_free(self) -> deque[Span]:
        if not self._files:
            self._files.extend(islice(self._unread, _READ_AHEAD))
        return self._returned or self._packed or self._files

    def _suspects_first_to_go(self) -> list[deque[Span]]:
        """Those of the most deaths first: so a search gets to its end before the next one."""
        return [found for _, found in sorted(self._suspects.items(), reverse=True) if found]

    def _goes_alone(self, suspects: deque[Span]) -> bool:
        """Whether each of these, of the same number of deaths, is to be alone with its worker."""
        num_deaths = suspects[0].num_deaths
        return num_deaths >= SHARED_DEATHS + self._caution and length(suspects) <= PART

    def _part(self, suspects: deque[Span]) -> int:
        num = math.ceil(length(suspects) / PART)
        return num if self._goes_alone(suspects) else max(num, LEAST_SUSPECTS)

    def _has_room_for_one(self) -> bool:
        lone = [found for found in self._suspects_first_to_go() if self._goes_alone(found)]
        if self.num_pending == sum(map(length, lone)):
            return True
        num_alone = sum(hand.is_alone for hand in self._hands.values())
        return num_alone * WORKERS_A_SEARCH <= len(self._hands)

    @property
    def _caution(self) -> int:
        """How many deaths more it takes, alone and not, since deaths come from outside, too.

        A killer takes one worker with rows that nobody doubted; all others took doubtful ones.
        """
        num = self._num_fresh_deaths + self._num_deaths // FEW_DEATHS
        return (num // (1 + self._num_guilty) // 2).bit_length()

    def _lend(self, worker: int, spans: Sequence[Span], *, is_alone: bool = False) -> Lease:
        lease = self._lease(spans)
        hand = self._hands.setdefault(worker, Hand())
        hand.put(lease.rows, spans[0], is_alone=is_alone)
        self.num_pending -= length(spans)
        return lease

    def _lease(self, spans: Sequence[Span]) -> Lease:
        self._num_leases += 1
        return Lease(self._num_leases, by_segment(spans), spans[0].payload)


def _after_death(span: Span, *, is_alone: bool) -> Span:
    num_deaths, num_solo_deaths = span.num_deaths + 1, span.num_solo_deaths + is_alone
    return span._replace(num_deaths=num_deaths, num_solo_deaths=num_solo_deaths)
