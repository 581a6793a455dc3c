"""A few rows that show why a job is held back, read with bounded work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen.store.schema import ROW, SEGMENT
from batchgen.store.tally import ATTEMPTS, VERDICT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from batchgen.storage import LocalStorage
    from batchgen.store.books import Durable, Plan

NUM_EXAMPLES = 3
_MAX_GROUPS = 50
_MAX_CHARS = 200


def example_rows(
    storage: LocalStorage, plan: Plan, durable: Durable, prefix: str, limit: str
) -> list[str]:
    """Return where a few rows are that count for a limit, and what is wrong with them.

    Args:
        storage: Where the parts are.
        plan: Theirs.
        durable: The parts.
        prefix: Of batchgen's columns.
        limit: Key of `[gate]`.
    """
    found: list[str] = []
    columns = [
        SEGMENT,
        ROW,
        *(prefix + name for name in ("status", VERDICT, ATTEMPTS, "error_type", "error")),
    ]
    try:
        for group in _row_groups(storage, durable, columns):
            table = group.filter(_counting(group, prefix, limit))
            for row in table.slice(0, NUM_EXAMPLES - len(found)).to_pylist():
                why = f"{row[f'{prefix}error_type'] or 'ok'}: {row[f'{prefix}error'] or ''}"
                if limit == "max_retry_rate":
                    why = f"{row[f'{prefix}attempts']} attempts, {why}"
                path = plan.segments[row[SEGMENT]].path
                if path not in why:  # Error texts of the reader tell the line.
                    why = f"{path} row {row[ROW]}: {why}"
                found.append(why.removesuffix(": ")[:_MAX_CHARS])
            if len(found) >= NUM_EXAMPLES:
                break
    except (OSError, pa.ArrowException, MemoryError):
        return found  # Only examples: damage is told where rows are published.
    return found


def _row_groups(
    storage: LocalStorage, durable: Durable, columns: Sequence[str]
) -> Iterator[pa.Table]:
    left = _MAX_GROUPS
    parts = sorted(durable.parts, key=lambda part: -part.footer.num_errors)
    for part in parts:
        with pq.ParquetFile(storage.path(part.name), page_checksum_verification=True) as file:
            for group in range(min(left, file.num_row_groups)):
                yield file.read_row_group(group, columns=columns)
            left -= file.num_row_groups
        if left <= 0:
            return


def _counting(rows: pa.Table, prefix: str, limit: str) -> pa.Array:
    if limit == "max_truncated_rate":
        return pc.equal(rows.column(prefix + VERDICT), "truncated")
    if limit == "max_retry_rate":
        return pc.greater(rows.column(prefix + ATTEMPTS), 1)
    return pc.equal(rows.column(f"{prefix}status"), "error")
