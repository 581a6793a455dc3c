"""What is left to do: not what this plan has, and not what it can take over from its base."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from batchgen.books import NO_ROWS
from batchgen.errors import BatchgenError
from batchgen.ranges import Ranges
from batchgen.sink.parts import rows_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from batchgen.books import Durable, Plan
    from batchgen.sink.carry import Piece
    from batchgen.stages import Committer

_WAIT_S = 0.2


def missing(plan: Plan, durable: Durable) -> dict[int, Ranges]:
    """Segment -> rows that no accepted part accounts for; segments with none left out."""
    todo = {
        number: Ranges.until(segment.num_rows) - durable.done(number)
        for number, segment in enumerate(plan.segments)
    }
    return {number: rows for number, rows in todo.items() if rows}


@dataclass(slots=True)
class Carried:
    """What a run took over."""

    rows: dict[int, Ranges] = field(default_factory=dict)
    num_ok: int = 0
    num_skipped: int = 0

    @property
    def num_rows(self) -> int:
        """Physical rows."""
        return self.num_ok + self.num_skipped

    def add(self, piece: Piece) -> None:
        """Count a piece."""
        self.num_ok += piece.table.num_rows
        self.num_skipped += sum(len(rows) for rows in piece.skipped.values())
        for found in (rows_of(piece.table), piece.skipped):
            for segment, rows in found.items():
                self.rows[segment] = self.rows.get(segment, NO_ROWS) | rows

    def left(self, todo: dict[int, Ranges]) -> dict[int, Ranges]:
        """What of `todo` is still to do."""
        rest = {segment: rows - self.rows.get(segment, NO_ROWS) for segment, rows in todo.items()}
        return {segment: rows for segment, rows in rest.items() if rows}


def carry_over(
    pieces: Iterable[Piece], committer: Committer[Piece], is_stopped: Callable[[], bool]
) -> Carried:
    """Make pieces durable, one after the other, until the end or until stopped.

    Args:
        pieces: Rows of an earlier plan.
        committer: Of this run; closed at the end.
        is_stopped: Asked between commits, and while one is refused.

    Raises:
        BatchgenError: A commit failed, or the earlier plan cannot be read.
    """
    carried = Carried()
    try:
        for piece in pieces:
            while not committer.put(piece, _WAIT_S):
                if is_stopped():
                    committer.hurry()
            carried.add(piece)
            if is_stopped():
                committer.hurry()
                break
    except BaseException:
        committer.hurry()
        with suppress(BatchgenError):  # The first trouble is the one to tell.
            committer.close()
        raise
    committer.close()
    return carried
