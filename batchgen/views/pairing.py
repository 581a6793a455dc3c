"""Which row of one output is which of another, told from their books and digests of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen.storage import LocalStorage
from batchgen.store.matching import Span, has_digests, match

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from batchgen.store.books import Plan, Segment


class _TwoPlaces(LocalStorage):
    """Two outputs to read from: each has digests of the files that it was made of."""

    def __init__(self, first: LocalStorage, second: LocalStorage) -> None:
        super().__init__(first.root)
        self._places = (first, second)

    def path(self, name: str) -> Path:
        """Return where a file can be read."""
        first, second = (place.path(name) for place in self._places)
        return first if first.exists() else second


def paired(old: tuple[LocalStorage, Plan], new: tuple[LocalStorage, Plan]) -> list[Span]:
    """Pair the rows of two plans, in the order of the new one's rows; each row at most once.

    Args:
        old: The output with the digests of a plan's rows, as far as there are any; and the plan.
        new: The same of another plan, of any recipe.
    """
    storage, (was, now) = _TwoPlaces(old[0], new[0]), (old[1], new[1])
    spans = match(storage, was, now)
    return sorted([*spans, *edited(storage, spans, was.segments, now.segments)])


def edited(
    storage: LocalStorage, spans: Sequence[Span], old: Sequence[Segment], new: Sequence[Segment]
) -> Iterator[Span]:
    """Yield pairs of rows that are not equal but have taken each other's place.

    Args:
        storage: With the digests of rows.
        spans: The equal rows.
        old: Files of the old plan.
        new: Files of the new plan.
    """
    gaps = _gaps(spans, old)
    # A log that was rotated: its old rows have another name now.
    used = {span.old_segment for span in spans}
    by_path = {file.path: number for number, file in enumerate(old) if number not in used}
    spans_of: dict[int, list[Span]] = {}
    for span in sorted(spans):
        spans_of.setdefault(span.segment, []).append(span)
    for number, segment in enumerate(new):
        if here := spans_of.get(number):
            yield from _between(here, segment.num_rows, gaps)
        elif (other := by_path.get(segment.path)) is not None:
            num_rows = min(segment.num_rows, old[other].num_rows)
            # Lines that were compared, none of them equal and not as many: they are others.
            is_edited = segment.num_rows == old[other].num_rows
            if num_rows and (is_edited or not has_digests(storage, segment, old[other])):
                yield Span(number, 0, other, 0, num_rows)


def _between(
    spans: Sequence[Span], num_rows: int, gaps: Mapping[tuple[int, int], int]
) -> Iterator[Span]:
    """Pair the rows between spans of one new file, and before the first and after the last."""
    segment = spans[0].segment
    row, was = 0, (spans[0].old_segment, 0)
    for span in (*spans, Span(segment, num_rows, 0, 0, 0)):
        length = span.start - row
        if length and gaps.get(was) == length:
            yield Span(segment, row, *was, length)
        row, was = span.start + span.length, (span.old_segment, span.old_start + span.length)


def _gaps(spans: Sequence[Span], old: Sequence[Segment]) -> dict[tuple[int, int], int]:
    """Find old rows that are in no span: (file, first row) -> how many."""
    found = {}
    row_of = [0] * len(old)
    for span in sorted(spans, key=lambda span: (span.old_segment, span.old_start)):
        row = row_of[span.old_segment]
        if span.old_start > row:
            found[span.old_segment, row] = span.old_start - row
        row_of[span.old_segment] = span.old_start + span.length
    for number, (segment, row) in enumerate(zip(old, row_of, strict=True)):
        if segment.num_rows > row:
            found[number, row] = segment.num_rows - row
    return found
