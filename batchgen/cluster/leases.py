"""Who has which rows: the driver's book of one task, and what fills it with rows in packs.

Invariant: every row of the book is in exactly one place: free, leased to exactly one worker,
settled, or guilty. A row gets into a second worker's hands only by way of `take_back`.

How a row that kills whole workers is found (an engine that dies is its worker's own affair, see
`engine.death`): rows of a worker that died are leased again, before all others. Nodes are taken
away, people kill processes; that costs no more. Those that a second worker dies with are suspects.
A worker gets a 16th of them at a time, among other rows, so that no engine is empty for it; if it
dies, the next gets a 16th of these, down to single rows. What ends well is innocent. A row that is
left waits for a worker that holds nothing else, and only one that was alone in a worker that died,
and then in another, is guilty: a killer among 100,000 rows takes 8 deaths, among 1,000 it takes 6.
A cluster that loses workers all the time needs more deaths, one for a suspect and two alone for
a guilty row, for each doubling of the deaths that no guilty row explains; at each of them who was
suspected for fewer is cleared. Else most rows would be suspects in the end, and go alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from batchgen.cluster.messages import Lease
from batchgen.core.errors import AccountingError
from batchgen.core.records import Ranges, RowSet
from batchgen.engine.order import held_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from batchgen.pipeline.runner import FeedBatch, Feeder

PIECES = 16
"""More find a killer in fewer deaths, but keep the engines emptier on the way."""
FEW_SUSPECTS = 8
"""So many are not cut before a worker has died with them and no other suspects."""
SUSPECT_DEATHS = 2
SOLO_DEATHS = 2
"""One could be chance."""
FEW_DEATHS = 10
"""Explained by one killer; it needs 8 among 100,000 rows."""
_READ_AHEAD = 10_000
PACK_ROWS = 1024
_PACK_BYTES = 8 << 20
"""Of a pack, and of each 1,024 rows that may wait."""
_SETTLED = 0
_OUT = 1
_stop_of = attrgetter("stop")


class RowSpan(NamedTuple):
    """Consecutive rows, and what the rows of one lease have in common."""

    segment: int
    start: int
    stop: int
    payload: Any = None
    num_deaths: int = 0
    """Of workers that held them, before they were suspects."""
    limit: int = 0
    """Of suspects the most that one worker gets; 1: and nothing else with it. 0: no suspects."""
    num_solo_deaths: int = 0
    """Of workers that held nothing but this row."""

    def goes_with(self, other: RowSpan) -> bool:
        """Whether one lease may hold both. Payloads are compared by identity."""
        return self.payload is other.payload and self[4:] == other[4:]


class LeaseBook:
    """The book of one task, in the driver's one thread."""

    def __init__(self, todo: Mapping[int, Ranges]) -> None:
        """Begin with rows that workers read themselves: segment -> rows."""
        self._unread = (
            RowSpan(segment, start, stop)
            for segment in sorted(todo)
            for start, stop in todo[segment].spans
        )
        self._returned: deque[RowSpan] = deque()
        self._packed: deque[RowSpan] = deque()
        self._files: deque[RowSpan] = deque()
        self._suspects: deque[RowSpan] = deque()
        self._singles: deque[RowSpan] = deque()
        """Suspects that go alone."""
        self._guilty: list[RowSpan] = []
        self._num_guilty = 0
        self._num_deaths = 0
        self._held: dict[int, WorkerLeases] = {}
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
            raise AccountingError(f"{count(rows)} rows were added to a lease book after its end")
        for segment in sorted(rows):
            for start, stop in rows[segment].spans:
                self._packed.append(RowSpan(segment, start, stop, payload))
        self.num_pending += count(rows)

    def take(self, worker: int, num_rows: int, *, is_up: bool = True) -> Lease | None:
        """Lease the next rows: those taken back, then packed ones, then those of files.

        A worker that has no suspects gets some before all else; a single one only if it holds
        nothing and its engine is up: a death before that says little of a row.

        Args:
            worker: Its number.
            num_rows: At most so many, fewer where a payload ends; ask again for more. Of
                suspects it may be more.
            is_up: Whether its engine is.

        Returns:
            None if nothing is free for this worker as long as it holds what it holds. If it is
            to get on, ask it to make durable what it has (`Finish`).
        """
        held = self._held.get(worker)
        if num_rows < 1 or self.is_alone(worker):
            return None
        if held is None and is_up and self._singles:
            return self._lend(worker, cut(self._singles, 1))
        if not self._files:
            self._files.extend(islice(self._unread, _READ_AHEAD))
        free = self._returned or self._packed or self._files
        if self._suspects and not (held is not None and held.limit) and (is_up or not free):
            return self._lend(worker, cut(self._suspects, self._suspects[0].limit))
        return self._lend(worker, cut(free, num_rows)) if free else None

    def _lend(self, worker: int, spans: Sequence[RowSpan]) -> Lease:
        lease = Lease(by_segment(spans), spans[0].payload)
        self._held.setdefault(worker, WorkerLeases()).put(lease.rows, spans[0])
        self.num_pending -= length(spans)
        return lease

    def settle(self, worker: int, rows: Mapping[int, Ranges]) -> RowSet:
        """Note that rows of a worker are durable, or need no work.

        Args:
            worker: Its number; to be told before `take_back`.
            rows: In whatever order, of any of its leases. About 0.6 us a row if they are
                scattered, next to nothing if they are not.

        Returns:
            Those that this worker does not have (any more); nothing is noted of them.
        """
        held = self._held.get(worker)
        if held is None:
            return RowSet(rows)
        strays = held.settle(rows)
        if not held.num_rows:
            del self._held[worker]
        return strays

    def take_back(self, worker: int, *, has_died: bool) -> RowSet:
        """Free what a worker has not settled; it is leased before everything else.

        Args:
            worker: Its number. It must get none of these rows by another way any more.
            has_died: Whether its rows may be why it is gone. Not if it was sent away.

        Returns:
            The rows that are free again.
        """
        held = self._held.pop(worker, None)
        if held is None:
            return RowSet()
        spans = held.unsettled()
        if has_died:
            self._count_death()
            suspects = self._narrowed([one for one in spans if one.limit])
            spans = suspects + self._doubted([one for one in spans if not one.limit])
        self._returned.extendleft(one for one in reversed(spans) if not one.limit)
        self._suspects.extendleft(one for one in reversed(spans) if one.limit > 1)
        self._singles.extendleft(one for one in reversed(spans) if one.limit == 1)
        self.num_pending += length(spans)
        return by_segment(spans)

    def _count_death(self) -> None:
        """Clear all suspects that wait, where it turns out that deaths say less than thought."""
        before = self._num_doubts
        self._num_deaths += 1
        if self._num_doubts > before:
            free = [*self._suspects, *self._singles]
            self._returned.extend(one._replace(limit=0) for one in free)
            self._suspects.clear()
            self._singles.clear()

    def _narrowed(self, suspects: Sequence[RowSpan]) -> list[RowSpan]:
        """What a death makes of suspects: fewer of them go together; a guilty one is kept apart."""
        if not suspects:
            return []
        if suspects[0].limit > 1:
            limit = _part(suspects) if length(suspects) > FEW_SUSPECTS else 1
            return [one._replace(limit=limit) for one in suspects]
        (row,) = suspects
        row = row._replace(num_solo_deaths=row.num_solo_deaths + 1)
        if row.num_solo_deaths < SOLO_DEATHS + 2 * self._num_doubts:
            return [row]
        self._guilty.append(row)
        self._num_guilty += 1
        return []

    def _doubted(self, spans: Sequence[RowSpan]) -> list[RowSpan]:
        """What a death makes of other rows: suspects, if it is one of several."""
        spans = [one._replace(num_deaths=one.num_deaths + 1) for one in spans]
        least = SUSPECT_DEATHS + self._num_doubts
        limit = _part([one for one in spans if one.num_deaths >= least])
        return [one._replace(limit=limit) if one.num_deaths >= least else one for one in spans]

    @property
    def _num_doubts(self) -> int:
        """Deaths that it takes beyond the least, where many are not explained by guilty rows."""
        return (self._num_deaths // (FEW_DEATHS * (1 + self._num_guilty))).bit_length()

    def withdraw(self) -> RowSet:
        """Take out, for good, what is free and was to be read from files by workers.

        They may be added again, packed; what is doubted of them is forgotten.
        """
        out = [*self._files, *self._unread]
        self._files.clear()
        for free in (self._returned, self._suspects, self._singles):
            out += [span for span in free if span.payload is None]
            packed = [span for span in free if span.payload is not None]
            free.clear()
            free.extend(packed)
        self.num_pending -= length(out)
        return by_segment(out)

    def guilty(self) -> Sequence[RowSet]:
        """Hand out each row that was found to kill workers, once, for the caller to end it."""
        rows, self._guilty = self._guilty, []
        return [by_segment([span]) for span in rows]

    def rows_out(self, worker: int) -> RowSet:
        """Return the rows that a worker has and that are not settled."""
        held = self._held.get(worker)
        return by_segment(held.unsettled() if held is not None else ())

    def is_alone(self, worker: int) -> bool:
        """Whether a worker has a single suspect: nothing else until that is settled."""
        held = self._held.get(worker)
        return held is not None and held.limit == 1

    @property
    def is_through(self) -> bool:
        """Whether every row is settled or was handed out as guilty, and none will be added."""
        return self.is_fed and not (self.num_pending or self._held or self._guilty)


class _Lease:
    """A lease that a worker has. Its blocks know it, not it them: a circle would keep payloads."""

    __slots__ = ("num_left", "sample")

    def __init__(self, num_rows: int, sample: RowSpan) -> None:
        self.num_left = num_rows
        self.sample = sample
        """Any of its spans: they have all else in common."""


class _Block:
    """Consecutive rows of a lease; of each, a byte: `_OUT` or `_SETTLED`."""

    __slots__ = ("lease", "left", "start", "stop")

    def __init__(self, start: int, stop: int, lease: _Lease) -> None:
        self.start = start
        self.stop = stop
        self.lease = lease
        self.left = bytearray([_OUT]) * (stop - start)

    def settle(self, start: int, stop: int) -> Iterable[tuple[int, int]]:
        """Mark these; returns those that were not out."""
        first, last = start - self.start, stop - self.start
        num = self.left.count(_OUT, first, last)
        strays: Iterable[tuple[int, int]] = ()
        if num < last - first:
            strays = _runs(self.left[first:last], _SETTLED, start)
        self.left[first:last] = bytes(last - first)
        self.lease.num_left -= num
        return strays


class WorkerLeases:
    """What one worker holds: of each lease the rows that are not settled.

    A commit may bring 20,000 scattered rows, and a cluster may hold millions: a row that is out
    costs one byte, and settling it about 0.6 us.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self._leases: list[_Lease] = []
        self._blocks: dict[int, list[_Block]] = {}
        """In the order of rows."""

    @property
    def limit(self) -> int:
        """`RowSpan.limit` of the suspects among them, all of one lease; 0 if there are none."""
        return max((lease.sample.limit for lease in self._leases), default=0)

    def put(self, rows: Mapping[int, Ranges], sample: RowSpan) -> None:
        """Take a lease."""
        lease = _Lease(count(rows), sample)
        self._leases.append(lease)
        self.num_rows += lease.num_left
        for segment, ranges in rows.items():
            held = self._blocks.setdefault(segment, [])
            held += [_Block(start, stop, lease) for start, stop in ranges.spans]
            held.sort(key=_stop_of)  # Two sorted runs: linear.

    def unsettled(self) -> list[RowSpan]:
        """What is left, lease by lease in the order taken."""
        left: dict[_Lease, list[RowSpan]] = {lease: [] for lease in self._leases}
        for segment, blocks in self._blocks.items():
            for block in blocks:
                for start, stop in _runs(block.left, _OUT, block.start):
                    span = block.lease.sample._replace(segment=segment, start=start, stop=stop)
                    left[block.lease].append(span)
        return [span for spans in left.values() for span in spans]

    def settle(self, rows: Mapping[int, Ranges]) -> RowSet:
        """Mark rows as settled; returns those that were not out.

        Takes time for the spans of `rows`, and for the blocks between them, not for the rows.
        """
        strays: list[tuple[int, int, int]] = []
        for segment, ranges in rows.items():
            found: list[tuple[int, int]] = []
            for block, start, stop in _meeting(self._blocks.get(segment, ()), ranges):
                found += ((start, stop),) if block is None else block.settle(start, stop)
            strays += [(segment, start, stop) for start, stop in found]
        if not all(lease.num_left for lease in self._leases):
            self._drop_settled()
        self.num_rows = sum(lease.num_left for lease in self._leases)
        return RowSet.of_spans(strays)

    def _drop_settled(self) -> None:
        self._leases = [lease for lease in self._leases if lease.num_left]
        left = {
            segment: [block for block in blocks if block.lease.num_left]
            for segment, blocks in self._blocks.items()
        }
        self._blocks = {segment: blocks for segment, blocks in left.items() if blocks}


def by_segment(spans: Iterable[RowSpan]) -> RowSet:
    """Gather the rows of spans."""
    return RowSet.of_spans((span.segment, span.start, span.stop) for span in spans)


def count(rows: Mapping[int, Ranges]) -> int:
    """How many rows."""
    return sum(map(len, rows.values()))


def length(spans: Iterable[RowSpan]) -> int:
    """How many rows."""
    return sum(span.stop - span.start for span in spans)


def cut(spans: deque[RowSpan], num_rows: int) -> list[RowSpan]:
    """Take up to `num_rows` rows off the front, of those that may go with the first."""
    taken: list[RowSpan] = []
    while num_rows > 0 and spans and spans[0].goes_with((taken or spans)[0]):
        span = spans.popleft()
        if span.stop - span.start > num_rows:
            spans.appendleft(span._replace(start=span.start + num_rows))
            span = span._replace(stop=span.start + num_rows)
        num_rows -= span.stop - span.start
        taken.append(span)
    return taken


def _part(suspects: Iterable[RowSpan]) -> int:
    """How many of these go into one lease."""
    num = length(suspects)
    return min(num, max(FEW_SUSPECTS, math.ceil(num / PIECES)))


def _runs(flags: bytearray, wanted: int, shift: int) -> Iterator[tuple[int, int]]:
    """Yield where a flag is the wanted one of two, as half-open spans, moved by `shift`."""
    first = flags.find(wanted)
    while first >= 0:
        last = flags.find(_OUT + _SETTLED - wanted, first)
        last = len(flags) if last < 0 else last
        yield shift + first, shift + last
        first = flags.find(wanted, last)


def _meeting(blocks: Sequence[_Block], rows: Ranges) -> Iterator[tuple[_Block | None, int, int]]:
    """Yield the rows cut at the borders of blocks, each with the block that it is in."""
    at = bisect_right(blocks, rows.spans[0][0], key=_stop_of) if rows else 0
    for begin, stop in rows.spans:
        start = begin
        while start < stop:
            while at < len(blocks) and blocks[at].stop <= start:
                at += 1
            block = blocks[at] if at < len(blocks) and blocks[at].start < stop else None
            if block is not None and block.start <= start:
                end = min(stop, block.stop)
                yield block, start, end
            else:
                end = stop if block is None else block.start
                yield None, start, end
            start = end


class Packer:
    """Fills a lease book with rows that are read, rendered and ordered here, in packs.

    For input that workers do not see, that cannot be read in pieces (gzip, zstd, CSV), and for an
    order by text, where rows that go together stand apart in the files.
    """

    def __init__(
        self, feeder: Feeder, put: Callable[[Sequence[FeedBatch]], Any], num_rows: int
    ) -> None:
        """Bind.

        Args:
            feeder: Belongs to the packer from now on.
            put: Stores packs where workers find them.
            num_rows: That it reads, those included that will not need an engine.
        """
        self._feeder = feeder
        self._put = put
        self._num_left = num_rows
        self._row_bytes = 1.0
        self.is_done = False
        """All rows are packed."""

    @property
    def num_left(self) -> int:
        """Rows that are yet to be packed, at most."""
        return 0 if self.is_done else self._num_left

    def fill(self, book: LeaseBook, num_wanted: int) -> None:
        """Add packs until so many rows are free, or nothing more is ready.

        Raises:
            BatchgenError: What reading raised.
        """
        while not self.is_done and book.num_pending < self._limit(num_wanted):
            if (batch := self._feeder.take(0)) is None:
                self.is_done = self._feeder.is_done
                return
            self._add(book, batch)

    def _limit(self, num_wanted: int) -> int:
        """Rows that may wait: of large ones fewer."""
        return min(num_wanted, max(1, int(num_wanted / PACK_ROWS * _PACK_BYTES / self._row_bytes)))

    def _add(self, book: LeaseBook, batch: FeedBatch) -> None:
        """Put a pack, or several if it is large."""
        if batch.requests:
            self._row_bytes = max(1.0, held_bytes(batch.requests) / len(batch.requests))
        size = max(1, int(_PACK_BYTES / self._row_bytes))
        rest = [
            batch.only(batch.requests[at : at + size], (), Ranges())
            for at in range(size, len(batch.requests), size)
        ]
        for pack in (batch.only(batch.requests[:size], batch.results, batch.skipped), *rest):
            if rows := rows_of(pack):
                book.add(rows, self._put([pack]))
                self._num_left -= sum(map(len, rows.values()))

    def close(self) -> None:
        """Stop reading."""
        self._feeder.close()


def rows_of(batch: FeedBatch) -> RowSet:
    """Gather the rows that end by way of a `FeedBatch`."""
    ordinals = [one.ordinal for one in batch.requests] + [one.ordinal for one in batch.results]
    return RowSet.of(ordinals) | RowSet({batch.segment: batch.skipped})
