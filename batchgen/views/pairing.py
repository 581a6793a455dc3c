"""Which row of one snapshot is which of another, by where they stand in the input.

Beside the equal rows that `matching` finds, rows between the same neighbours are paired if they
are as many as before: they were edited in place. Of files without digests of rows (CSV, Parquet)
that changed, the first row is paired with the first. What is left came or went.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen.store.matching import Span, match
from batchgen.store.row_digests import digest_reader

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from batchgen.storage import LocalStorage
    from batchgen.store.books import Plan, Segment


def paired(storage: LocalStorage, old: Plan, new: Plan) -> list[Span]:
    """Pair the rows of two plans, in the order of the new one's rows; each row at most once.

    Args:
        storage: With the digests of rows, as far as there are any.
        old: One plan.
        new: Another, of any recipe.
    """
    spans = match(storage, old, new)
    return sorted([*spans, *edited(storage, spans, old.segments, new.segments)])


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
            if num_rows and (is_edited or not _has_digests(storage, segment, old[other])):
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
    """Where old rows stand that are in no span, and how many: (file, first row) -> number."""
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


def _has_digests(storage: LocalStorage, *segments: Segment) -> bool:
    return all(
        digest_reader(storage, segment.digest, segment.num_rows) is not None for segment in segments
    )
