"""Sets of row numbers as sorted, disjoint, half-open intervals. Pure arithmetic.

Progress is kept as ranges, never as a count or a prefix: rows finish out of order, and a resume
that counts loses rows.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


class Ranges:
    """An immutable set of non-negative integers.

    Invariant: `spans` is ascending, spans neither overlap nor touch, each has start < stop.
    """

    __slots__ = ("spans",)

    def __init__(self, spans: Iterable[tuple[int, int]] = ()) -> None:
        """Take spans in any order; overlaps and touching neighbours are merged."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(spans):
            if start >= stop:
                continue
            if merged and start <= merged[-1][1]:
                if stop > merged[-1][1]:
                    merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        self.spans: tuple[tuple[int, int], ...] = tuple(merged)

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Ranges:
        """The set of these numbers."""
        ordered = sorted(set(numbers))
        if not ordered:
            return cls()
        starts = [ordered[0], *(b for a, b in pairwise(ordered) if b != a + 1)]
        stops = [*(a + 1 for a, b in pairwise(ordered) if b != a + 1), ordered[-1] + 1]
        return cls(zip(starts, stops, strict=True))

    @classmethod
    def until(cls, stop: int) -> Ranges:
        """Every number from 0 up to, not including, `stop`."""
        return cls([(0, stop)])

    def __len__(self) -> int:
        """How many numbers, not how many spans."""
        return sum(stop - start for start, stop in self.spans)

    def __bool__(self) -> bool:
        return bool(self.spans)

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self.spans, (number, float("inf"))) - 1
        return at >= 0 and number < self.spans[at][1]

    def __iter__(self) -> Iterator[int]:
        for start, stop in self.spans:
            yield from range(start, stop)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and self.spans == other.spans

    def __hash__(self) -> int:
        return hash(self.spans)

    def __repr__(self) -> str:
        return f"Ranges({list(self.spans)})"

    def __or__(self, other: Ranges) -> Ranges:
        return Ranges(self.spans + other.spans)

    def __and__(self, other: Ranges) -> Ranges:
        found = []
        mine, theirs = 0, 0
        while mine < len(self.spans) and theirs < len(other.spans):
            start = max(self.spans[mine][0], other.spans[theirs][0])
            stop = min(self.spans[mine][1], other.spans[theirs][1])
            if start < stop:
                found.append((start, stop))
            if self.spans[mine][1] <= other.spans[theirs][1]:
                mine += 1
            else:
                theirs += 1
        return Ranges(found)

    def __sub__(self, other: Ranges) -> Ranges:
        left = []
        cuts = iter(other.spans)
        cut = next(cuts, None)
        for start, stop in self.spans:
            at = start
            while cut is not None and cut[0] < stop:
                if cut[1] > at:
                    left.append((at, cut[0]))
                    at = max(at, cut[1])
                if cut[1] > stop:
                    break
                cut = next(cuts, None)
            left.append((at, stop))
        return Ranges(left)

    def within(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the spans, cut to `start` up to, not including, `stop`."""
        at = max(bisect_right(self.spans, (start, float("inf"))) - 1, 0)
        while at < len(self.spans) and self.spans[at][0] < stop:
            first, end = self.spans[at]
            if max(first, start) < min(end, stop):
                yield max(first, start), min(end, stop)
            at += 1

    def to_json(self) -> list[int]:
        """Return a flat list: start, stop, start, stop, ..."""
        return [number for span in self.spans for number in span]

    @classmethod
    def from_json(cls, flat: Any) -> Ranges:  # noqa: ANN401 - foreign JSON, checked here
        """Read what `to_json` wrote.

        Raises:
            ValueError: The value is not a flat list of ascending integers of even length.
        """
        good = isinstance(flat, list) and len(flat) % 2 == 0 and all(type(n) is int for n in flat)
        if not good or any(a >= b for a, b in pairwise(flat)) or (flat and flat[0] < 0):
            msg = f"not a list of ranges: {flat!r:.80}"
            raise ValueError(msg)
        return cls(zip(flat[::2], flat[1::2], strict=True))


NO_ROWS = Ranges()


class RowSet(dict[int, Ranges]):
    """Rows of a plan: segment -> rows, those segments only that have some.

    To look up another segment gives no rows. Treated as a value: never changed once it is made.
    """

    def __init__(self, rows: Mapping[int, Ranges] | Iterable[tuple[int, Ranges]] = ()) -> None:
        """Take rows by segment; segments without rows are left out."""
        super().__init__((segment, found) for segment, found in dict(rows).items() if found)

    @classmethod
    def of_spans(cls, spans: Iterable[tuple[int, int, int]]) -> RowSet:
        """Gather spans in any order: segment, first row, row after the last."""
        found: dict[int, list[tuple[int, int]]] = {}
        for segment, start, stop in spans:
            found.setdefault(segment, []).append((start, stop))
        return cls((segment, Ranges(those)) for segment, those in sorted(found.items()))

    @classmethod
    def of(cls, ordinals: Iterable[tuple[int, int]]) -> RowSet:
        """Gather rows in any order: segment, row."""
        found: dict[int, list[int]] = {}
        for segment, row in ordinals:
            found.setdefault(segment, []).append(row)
        return cls((segment, Ranges.of(rows)) for segment, rows in sorted(found.items()))

    @property
    def num_rows(self) -> int:
        """Number of rows in all segments."""
        return sum(map(len, self.values()))

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """Yield segment, first row, row after the last, segment by segment."""
        for segment, rows in self.items():
            for start, stop in rows.spans:
                yield segment, start, stop

    def __missing__(self, segment: int) -> Ranges:
        return NO_ROWS

    def __sub__(self, other: Mapping[int, Ranges]) -> RowSet:
        return RowSet((at, rows - other.get(at, NO_ROWS)) for at, rows in self.items())

    def __and__(self, other: Mapping[int, Ranges]) -> RowSet:
        return RowSet((at, rows & other.get(at, NO_ROWS)) for at, rows in self.items())

    def __or__(self, other: Mapping[int, Ranges]) -> RowSet:  # type: ignore[override]
        """Return the rows in either; of sets, and not as dicts are joined."""
        return RowSet.of_spans((*self.spans(), *RowSet(other).spans()))

    def __ior__(self, other: Mapping[int, Ranges]) -> RowSet:  # type: ignore[override]
        return self | other  # Not dict's, which would change it.
