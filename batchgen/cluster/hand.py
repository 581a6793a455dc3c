"""What one worker holds: leases, and of each the rows that are not settled. Pure.

A commit may bring 20,000 scattered rows, and a fleet may hold millions: a row that is out costs
one byte, and settling it about 0.6 us.
"""

from __future__ import annotations

from bisect import bisect_right
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from batchgen.core.ranges import Ranges

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Iterable, Iterator, Mapping, Sequence

DEATHS_OF_SUSPECTS = 2

_SETTLED = 0
_OUT = 1
_stop_of = attrgetter("stop")


class Span(NamedTuple):
    """Consecutive rows, and what the rows of one lease have in common."""

    segment: int
    start: int
    stop: int
    payload: Any = None
    num_deaths: int = 0
    """Of workers that had begun them."""
    num_solo_deaths: int = 0
    """Of these, while they had nothing else."""

    def goes_with(self, other: Span) -> bool:
        """Whether one lease may hold both. Payloads are compared by identity."""
        return self.payload is other.payload and self.num_deaths == other.num_deaths


class _Block:
    """Consecutive rows of a lease that is out; of each, a byte: `_OUT` or `_SETTLED`."""

    __slots__ = ("left", "out", "start", "stop")

    def __init__(self, start: int, stop: int, out: Out) -> None:
        self.start = start
        self.stop = stop
        self.out = out
        self.left = bytearray([_OUT]) * (stop - start)

    def settle(self, start: int, stop: int) -> Iterable[tuple[int, int]]:
        """Mark these; returns those that were not out."""
        first, last = start - self.start, stop - self.start
        num = self.left.count(_OUT, first, last)
        strays: Iterable[tuple[int, int]] = ()
        if num < last - first:
            strays = _runs(self.left[first:last], _SETTLED, start)
        self.left[first:last] = bytes(last - first)
        self.out.num_left -= num
        return strays


class Out:
    """A lease that a worker has. Its blocks know it, not it them: a circle would keep payloads."""

    __slots__ = ("is_alone", "num_left", "sample")

    def __init__(self, num_rows: int, sample: Span, *, is_alone: bool) -> None:
        self.num_left = num_rows
        self.sample = sample
        """Any of its spans: they have all else in common."""
        self.is_alone = is_alone

    @property
    def is_suspect(self) -> bool:
        """Whether its rows were in two deaths."""
        return self.sample.num_deaths >= DEATHS_OF_SUSPECTS


class Hand:
    """What one worker has: leases in the order taken, and their blocks in the order of rows."""

    def __init__(self) -> None:
        self.outs: list[Out] = []
        self.num_out = 0
        self._blocks: dict[int, list[_Block]] = {}

    @property
    def is_alone(self) -> bool:
        """Whether it has a lone suspect, and nothing else."""
        return any(out.is_alone for out in self.outs)

    @property
    def has_suspects(self) -> bool:
        """Whether suspects are among the rows."""
        return any(out.is_suspect for out in self.outs)

    def put(self, rows: Mapping[int, Ranges], sample: Span, *, is_alone: bool) -> None:
        """Take a lease."""
        out = Out(count(rows), sample, is_alone=is_alone)
        self.outs.append(out)
        self.num_out += out.num_left
        for segment, ranges in rows.items():
            held = self._blocks.setdefault(segment, [])
            held += [_Block(start, stop, out) for start, stop in ranges.spans]
            held.sort(key=_stop_of)  # Two sorted runs: linear.

    def unsettled(self) -> list[tuple[Out, list[Span]]]:
        """What is left of each lease, in the order taken."""
        left: dict[Out, list[Span]] = {out: [] for out in self.outs}
        for segment, blocks in self._blocks.items():
            for block in blocks:
                for start, stop in _runs(block.left, _OUT, block.start):
                    span = block.out.sample._replace(segment=segment, start=start, stop=stop)
                    left[block.out].append(span)
        return list(left.items())

    def settle(self, rows: Mapping[int, Ranges]) -> dict[int, Ranges]:
        """Mark rows as settled; returns those that were not out.

        Takes time for the spans of `rows`, and for the blocks between them, not for the rows.
        """
        strays: dict[int, Ranges] = {}
        for segment, ranges in rows.items():
            found: list[tuple[int, int]] = []
            for block, start, stop in _meeting(self._blocks.get(segment, ()), ranges):
                found += ((start, stop),) if block is None else block.settle(start, stop)
            if found:
                strays[segment] = Ranges(found)
        if not all(out.num_left for out in self.outs):
            self._drop_settled()
        self.num_out = sum(out.num_left for out in self.outs)
        return strays

    def _drop_settled(self) -> None:
        self.outs = [out for out in self.outs if out.num_left]
        left = {
            segment: [block for block in blocks if block.out.num_left]
            for segment, blocks in self._blocks.items()
        }
        self._blocks = {segment: blocks for segment, blocks in left.items() if blocks}


def by_segment(spans: Iterable[Span]) -> dict[int, Ranges]:
    """As leases have them."""
    found: dict[int, list[tuple[int, int]]] = {}
    for span in spans:
        found.setdefault(span.segment, []).append((span.start, span.stop))
    return {segment: Ranges(those) for segment, those in found.items()}


def count(rows: Mapping[int, Ranges]) -> int:
    """How many rows."""
    return sum(map(len, rows.values()))


def length(spans: Iterable[Span]) -> int:
    """How many rows."""
    return sum(span.stop - span.start for span in spans)


def cut(spans: deque[Span], num_rows: int) -> list[Span]:
    """Take up to `num_rows` rows off the front, of those that may go with the first."""
    taken: list[Span] = []
    while num_rows > 0 and spans and spans[0].goes_with((taken or spans)[0]):
        span = spans.popleft()
        if span.stop - span.start > num_rows:
            spans.appendleft(span._replace(start=span.start + num_rows))
            span = span._replace(stop=span.start + num_rows)
        num_rows -= span.stop - span.start
        taken.append(span)
    return taken


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
