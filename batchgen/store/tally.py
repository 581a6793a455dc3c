"""Counts of a part's rows that the gate needs, so that it never has to read the rows.

{"verdict":   {"ok": 95, "truncated": 5},       over all results
 "attempts":  {"1": 97, "2": 3},                over all results
 "gen_label": {"refund": 60, "invoice": 35}}    over ok rows, for each column of labels
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from collections.abc import Sequence

VERDICT, ATTEMPTS = "verdict", "attempts"


def tally(
    table: pa.Table, prefix: str, labels: Sequence[Sequence[str]] = ()
) -> dict[str, dict[str, int]]:
    """Count what is written.

    Args:
        table: Rows in the part schema.
        prefix: Of batchgen's columns.
        labels: Paths to labels: a column without the prefix, and the fields of structs in it.
            A list of labels counts each.

    Returns:
        As above. A label column that has no label in any row has no counts.
    """
    found = {
        name: _counts(table.column(prefix + name))
        for name in (VERDICT, ATTEMPTS)
        if prefix + name in table.column_names
    }
    if labels:
        is_ok = pc.equal(table.column(f"{prefix}status"), "ok")
        for path in labels:
            values = _column(table, prefix + path[0], path[1:]).filter(is_ok)
            found[prefix + ".".join(path)] = _counts(values)
    return found


def _column(table: pa.Table, name: str, path: Sequence[str]) -> pa.ChunkedArray:
    """A column, or a field of a struct. By index: names may hold dots, or be empty."""
    column = table.column(name)
    for field in path:
        column = pc.struct_field(column, column.type.get_field_index(field))
    return column


def _counts(values: pa.ChunkedArray) -> dict[str, int]:
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        values = pc.list_flatten(values)
    counted = pc.value_counts(values.drop_null()).to_pylist()
    return {str(entry["values"]): entry["counts"] for entry in counted}
