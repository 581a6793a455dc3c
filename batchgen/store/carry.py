"""Rows that an earlier plan has answered, read back to be taken over under new ordinals.

What is damaged is left out and told of: its rows are then computed again. Nothing is believed
that cannot be shown to be what was written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.core import arrow
from batchgen.store.books import NO_ROWS
from batchgen.store.renumber import common_rows, rows_of
from batchgen.store.result_files import ResultFile
from batchgen.store.schema import ROW, SEGMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from batchgen.core.ranges import Ranges
    from batchgen.storage import LocalStorage
    from batchgen.store.books import Part
    from batchgen.store.renumber import Renumbering


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to take over."""

    schema: pa.Schema
    """Of parts."""
    prefix: str
    moves: Renumbering
    """Which rows, and where they go."""
    takes_errors: bool
    """Whether rows that are errors are wanted too."""
    tell: Callable[[str], None]
    """Hears of damage."""

    def of(self, table: pa.Table) -> pa.Table:
        """The wanted rows of a table in the part schema, under their new ordinals."""
        return self.moves.table(table, self.prefix, takes_errors=self.takes_errors)


class Piece(NamedTuple):
    """Rows taken over."""

    table: pa.Table
    """Results in the part schema."""
    skipped: Mapping[int, Ranges]
    """Rows that end without a result."""
    engine: str
    """Who answered."""


def from_parts(storage: LocalStorage, parts: Sequence[Part], wanted: Wanted) -> Iterator[Piece]:
    """Yield the wanted rows of parts, answered or skipped, part by part.

    Raises:
        StorageError: Something cannot be read right now.
    """
    for part in parts:
        if not common_rows(part.footer.done, wanted.moves.old_rows):
            continue
        facts = part.footer.engine
        engine = f"{facts.get('engine', '')} {facts.get('version', '')}".strip()
        try:
            tables, skipped = _read_part(storage.path(part.name), part)
        except ValueError as error:
            wanted.tell(f"{part.name}: damaged ({error}); its rows are done again")
            continue
        if skipped is None:
            wanted.tell(f"{part.name}: damaged; rows that cannot be read are done again")
        found = [wanted.of(rows.cast(wanted.schema)) for rows in tables]
        table = pa.concat_tables([wanted.schema.empty_table(), *found])
        yield Piece(table, wanted.moves.ranges(skipped or {}), engine)


def _read_part(path: Path, part: Part) -> tuple[list[pa.Table], dict[int, Ranges] | None]:
    """The row groups that can be read, and the skipped rows, None if they cannot be told.

    Raises:
        ValueError: Nothing of the part can be believed.
    """
    with ResultFile(path) as file:
        tables = [table for _, table in file.groups()]
        if not file.num_groups and file.problem is not None:
            raise ValueError(file.problem)
        is_whole = file.problem is None
    seen: dict[int, Ranges] = {}
    for table in tables:
        for segment, rows in rows_of(table).items():
            seen[segment] = seen.get(segment, NO_ROWS) | rows
    num_rows = sum(table.num_rows for table in tables)
    done = part.footer.done
    if (
        sum(len(rows) for rows in seen.values()) != num_rows
        or any(rows - done.get(segment, NO_ROWS) for segment, rows in seen.items())
        or (is_whole and num_rows != part.footer.num_results)
    ):
        msg = "its rows are not those that its footer names"
        raise ValueError(msg)
    if not is_whole:
        return tables, None
    return tables, {segment: rows - seen.get(segment, NO_ROWS) for segment, rows in done.items()}


def gathered(pieces: Iterable[Piece], max_rows: int, max_bytes: int) -> Iterator[Piece]:
    """Join pieces to ones worth a part each, their rows in ordinal order.

    Args:
        pieces: Disjoint.
        max_rows: Yield as soon as there are so many rows.
        max_bytes: Or so many bytes of Arrow memory.
    """
    held: list[Piece] = []
    num_rows = num_bytes = 0
    for piece in pieces:
        held.append(piece)
        num_rows += piece.table.num_rows
        num_bytes += piece.table.nbytes
        if num_rows >= max_rows or num_bytes >= max_bytes:
            yield _joined(held)
            held, num_rows, num_bytes = [], 0, 0
    if held and (joined := _joined(held)).table.num_rows + len(joined.skipped):
        yield joined


def _joined(pieces: Sequence[Piece]) -> Piece:
    table = pa.concat_tables([piece.table for piece in pieces])
    order = pc.sort_indices(table, sort_keys=[(SEGMENT, "ascending"), (ROW, "ascending")])
    skipped: dict[int, Ranges] = {}
    for piece in pieces:
        for segment, rows in piece.skipped.items():
            skipped[segment] = skipped.get(segment, NO_ROWS) | rows
    engines = sorted({name for piece in pieces for name in piece.engine.split(", ")} - {""})
    return Piece(arrow.take(table, order), skipped, ", ".join(engines))
