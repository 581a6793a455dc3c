"""Published rows, read back to be taken over by a later plan under its ordinals.

Of a damaged file those row groups are believed whose bytes have the hash that the index keeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from batchgen.core.errors import OutputError
from batchgen.core.ranges import Ranges
from batchgen.store.books import NO_ROWS
from batchgen.store.carry import Piece
from batchgen.store.renumber import common_rows, rows_of
from batchgen.store.result_files import Index, ResultFile
from batchgen.store.schema import ROW, SEGMENT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from batchgen.storage import LocalStorage
    from batchgen.store.books import Manifest
    from batchgen.store.carry import Wanted

_ENGINE_KEY = b"batchgen.engine"


def from_snapshot(
    storage: LocalStorage, manifest: Manifest, num_rows: Sequence[int], wanted: Wanted
) -> Iterator[Piece]:
    """Yield the wanted rows of a snapshot, answered or skipped, in its ordinal order.

    Args:
        storage: Where it is.
        manifest: Of the snapshot.
        num_rows: Planned rows of each segment.
        wanted: What to take.

    Raises:
        OutputError: Its index is damaged, or it has other columns.
        StorageError: Something cannot be read right now.
    """
    index = Index(storage, manifest)
    moves = wanted.moves
    try:
        cursor, number = (0, 0), 0
        for entry, chunks in zip(manifest.files, index.chunks, strict=True):
            file = ResultFile(storage.path(entry["name"]), chunks)
            num_damaged, engine = 0, ""
            for group in range(len(chunks) - 1):
                ordinals = index.ordinals(number)
                number += 1
                here = rows_of(ordinals)
                last = (ordinals[SEGMENT][-1].as_py(), ordinals[ROW][-1].as_py() + 1)
                skipped = moves.ranges(_gaps(cursor, last, here, num_rows))
                cursor = last
                table = wanted.schema.empty_table()
                if rows := common_rows(here, moves.old_rows):
                    found = file.group(group)
                    engine = file.metadata.get(_ENGINE_KEY, b"").decode()
                    if found is None:
                        num_damaged += sum(len(those) for those in rows.values())
                    else:
                        table = wanted.of(_in_part_schema(file, found, ordinals, wanted.schema))
                if table.num_rows or skipped:
                    yield Piece(table, skipped, engine)
            file.close()
            if num_damaged:
                name = entry["name"]
                wanted.tell(f"{name}: damaged ({file.problem}); {num_damaged:,} rows done again")
        end = (len(num_rows) - 1, num_rows[-1]) if num_rows else cursor
        if skipped := moves.ranges(_gaps(cursor, end, {}, num_rows)):
            yield Piece(wanted.schema.empty_table(), skipped, "")
    finally:
        index.close()


def _gaps(
    start: tuple[int, int],
    stop: tuple[int, int],
    rows: Mapping[int, Ranges],
    num_rows: Sequence[int],
) -> dict[int, Ranges]:
    """Rows from ordinal `start` up to, not including, `stop` that are not in `rows`."""
    found = {}
    for segment in range(start[0], stop[0] + 1):
        first = start[1] if segment == start[0] else 0
        end = stop[1] if segment == stop[0] else num_rows[segment]
        found[segment] = Ranges([(first, end)]) - rows.get(segment, NO_ROWS)
    return found


def _in_part_schema(
    file: ResultFile, rows: pa.Table, ordinals: pa.Table, schema: pa.Schema
) -> pa.Table:
    """Published rows with their ordinals."""
    if rows.column_names != schema.names[ordinals.num_columns :]:
        msg = (
            f"{file.path}: has other columns than this job's parts; use the batchgen that wrote "
            "it, or begin anew with --fresh"
        )
        raise OutputError(msg)
    columns = [*ordinals.columns, *rows.columns]
    return pa.table(dict(zip(schema.names, columns, strict=True))).cast(schema)
