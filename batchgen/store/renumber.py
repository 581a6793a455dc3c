"""Rows of an earlier plan under the ordinals of a later one."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from batchgen.core import arrow
from batchgen.core.ranges import Ranges
from batchgen.store.books import NO_ROWS
from batchgen.store.matching import Span
from batchgen.store.schema import ROW, SEGMENT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pyarrow as pa

    from batchgen.store.books import Plan


class Renumbering:
    """Spans between two plans, ready for use. Immutable."""

    def __init__(self, spans: Sequence[Span], old: Plan, new: Plan) -> None:
        """Prepare.

        Args:
            spans: See `matching.match`; disjoint in both plans.
            old: The earlier plan.
            new: The later plan.
        """
        import polars as pl

        by_old: dict[int, list[Span]] = {}
        for span in sorted(spans, key=lambda span: (span.old_segment, span.old_start)):
            by_old.setdefault(span.old_segment, []).append(span)
        self._by_old = by_old
        self.old_rows = {
            segment: Ranges((span.old_start, span.old_start + span.length) for span in found)
            for segment, found in by_old.items()
        }
        """Old segment -> the rows that are in the later plan."""
        names = Span._fields
        ordered = [span for found in by_old.values() for span in found]
        self._frame = pl.DataFrame(ordered, schema=dict.fromkeys(names, pl.Int64), orient="row")
        self._same_path = [
            segment
            for segment, found in by_old.items()
            if old.segments[segment].path == new.segments[found[0].segment].path
        ]

    def table(self, table: pa.Table, prefix: str, *, takes_errors: bool) -> pa.Table:
        """Rows of a table in the part schema that are in the later plan, with its ordinals.

        Error texts of rows that never became a request name the file and the line: those are
        taken only where both still hold.

        Args:
            table: Rows of the earlier plan, in ordinal order.
            prefix: Of batchgen's columns.
            takes_errors: Whether rows that are errors are wanted too.
        """
        import polars as pl

        facts = pl.DataFrame(
            {
                "old_segment": pl.Series(table.column(SEGMENT)).cast(pl.Int64),
                "row": pl.Series(table.column(ROW)),
                "is_ok": pl.Series(table.column(f"{prefix}status")) == "ok",
                "has_key": pl.Series(table.column(f"{prefix}request_key")).is_not_null(),
            }
        ).with_row_index("at")
        found = facts.sort("old_segment", "row").join_asof(
            self._frame,
            left_on="row",
            right_on="old_start",
            by="old_segment",
            strategy="backward",
            coalesce=False,
            check_sortedness=False,
        )
        offset = pl.col("row") - pl.col("old_start")
        is_wanted = pl.col("is_ok")
        if takes_errors:
            stays = pl.col("old_segment").is_in(self._same_path) & (
                pl.col("old_start") == pl.col("start")
            )
            is_wanted = is_wanted | pl.col("has_key") | stays
        found = found.filter((offset < pl.col("length")) & is_wanted).select(
            "at", "segment", row=pl.col("start") + offset
        )
        rows = arrow.take(table, found["at"].cast(pl.Int64).to_arrow())
        for name in (SEGMENT, ROW):
            at = rows.schema.get_field_index(name)
            field = rows.schema.field(at)
            values = found["segment" if name == SEGMENT else "row"].to_arrow().cast(field.type)
            rows = rows.set_column(at, field, values)
        return rows

    def ranges(self, rows: Mapping[int, Ranges]) -> dict[int, Ranges]:
        """Segment -> rows in the later plan of rows of the earlier one."""
        spans: dict[int, list[tuple[int, int]]] = {}
        for segment, found in rows.items():
            moves = self._by_old.get(segment, [])
            starts = [span.old_start for span in moves]
            for first, stop in found.spans:
                at = max(bisect_right(starts, first) - 1, 0)
                while at < len(moves) and moves[at].old_start < stop:
                    span = moves[at]
                    here = max(first, span.old_start)
                    end = min(stop, span.old_start + span.length)
                    if here < end:
                        shift = span.start - span.old_start
                        spans.setdefault(span.segment, []).append((here + shift, end + shift))
                    at += 1
        return {segment: Ranges(found) for segment, found in spans.items()}


def rows_of(table: pa.Table) -> dict[int, Ranges]:
    """Segment -> row numbers of a table with ordinals."""
    import polars as pl

    if not table.num_rows:
        return {}
    ordinals = pl.DataFrame(
        {"segment": pl.Series(table.column(SEGMENT)), "row": pl.Series(table.column(ROW))}
    ).sort("segment", "row")
    starts = ordinals.with_row_index("at").filter(
        ((pl.col("row").diff() != 1) | (pl.col("segment").diff() != 0)).fill_null(value=True)
    )
    stops = [*starts["at"][1:], len(ordinals)]
    spans: dict[int, list[tuple[int, int]]] = {}
    for at, stop, segment, row in zip(
        starts["at"], stops, starts["segment"], starts["row"], strict=True
    ):
        spans.setdefault(segment, []).append((row, row + stop - at))
    return {segment: Ranges(found) for segment, found in spans.items()}


def common_rows(rows: Mapping[int, Ranges], others: Mapping[int, Ranges]) -> dict[int, Ranges]:
    """Segment -> rows in both; segments with none left out."""
    both = {segment: found & others.get(segment, NO_ROWS) for segment, found in rows.items()}
    return {segment: found for segment, found in both.items() if found}
