"""The `where` filter: one SQL expression over the columns of one row.

Invariant: whether a row passes depends on that row alone, because a resumed run reads rows in
other company. Aggregates, window functions and the like are refused when the job is planned.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from batchgen.source.columns import suggestion

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import polars as pl

# Names of expression nodes and functions, as polars 1.30 to 2.1 serializes them, whose value at
# a row depends on other rows or on how many there are.
_ROW_WISE_NODES = frozenset({"Alias", "BinaryExpr", "Cast", "Column", "Function", "Literal"})
_ROW_WISE_NODES |= {"Ternary", "KeepName", "RenameAlias"}
_OTHER_ROWS = re.compile(
    r"^(Agg|Len|Over|Window|Rolling\w*|SubPlan|Sort\w*|Gather\w*|Filter|Slice|Explode|AnonymousFunction"
    r"|AnonymousAgg|Range|IntRange|Shift\w*|Cum\w*|Diff|Rank|Unique\w*|IsUnique|IsDuplicated"
    r"|IsFirstDistinct|IsLastDistinct|Reverse|TopK\w*|Random|Sample\w*|RowIndex|Head|Tail|Implode"
    r"|DropNulls|DropNans|NullCount|ArgWhere|Mode|Interpolate\w*|ForwardFill|BackwardFill"
    r"|FillNullWithStrategy|Ewm\w*|Hist|ValueCounts|Repeat|Eval)$"
)
# These are folded to a literal when the text is parsed, so that no tree shows them.
_CLOCK = re.compile(r"\b(now|current_\w+|localtime\w*|today|getdate)\b", re.IGNORECASE)
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"")


@dataclass(frozen=True, slots=True)
class Where:
    """A parsed expression and the columns that it reads."""

    expression: pl.Expr
    columns: tuple[str, ...]

    def keep(self, columns: Sequence[pa.Array], num_rows: int) -> pa.Array:
        """Evaluate; null counts as false.

        Args:
            columns: Arrays of `num_rows` values, in the order of `self.columns`.
            num_rows: Rows to judge.

        Returns:
            Booleans without nulls, shape (num_rows,).
        """
        import polars as pl

        table = pa.table([pa.array(range(num_rows)), *columns], names=["", *self.columns])
        frame = pl.DataFrame(table)
        passed = frame.with_columns(self.expression.alias(""))[""].fill_null(value=False)
        return passed.to_arrow()


def parse_where(text: str) -> Where:
    """Parse an expression.

    Raises:
        ValueError: It is not one SQL expression.
    """
    import polars as pl

    try:
        expression = pl.sql_expr(text)
        names = dict.fromkeys(expression.meta.root_names())
    except pl.exceptions.PolarsError as error:
        msg = f"where = {text!r} is not an SQL expression: {_first_line(error)}"
        raise ValueError(msg) from error
    return Where(expression, tuple(names))


def check_where(text: str, columns: pa.Schema) -> None:
    """Refuse what cannot decide each row by itself.

    Raises:
        ValueError: Not an expression, an unknown column, not a boolean, or it looks at other
            rows or at the clock.
    """
    where = parse_where(text)
    for name in where.columns:
        if name not in columns.names:
            msg = f"where = {text!r}: unknown column {name!r}{suggestion(name, columns.names)}"
            raise ValueError(msg)
    _check_row_wise(text, where.expression)
    _check_result(text, where, columns)


def _check_row_wise(text: str, expression: pl.Expr) -> None:
    clock = _CLOCK.search(_QUOTED.sub("", text))
    if clock:
        msg = (
            f"where = {text!r} reads the clock ({clock[0]}), so that a resumed run would choose "
            "other rows; write the time out"
        )
        raise ValueError(msg)
    tree = json.loads(expression.meta.serialize(format="json"))
    for name in _node_names(tree):
        if _OTHER_ROWS.match(name):
            msg = f"where = {text!r} looks at other rows ({name}), expected a test of one row"
            raise ValueError(msg)


def _node_names(tree: Any) -> Iterator[str]:  # noqa: ANN401 - polars' own JSON
    if isinstance(tree, dict):
        for key, value in tree.items():
            # What a literal holds is data; names in it mean nothing.
            if key == "Literal" and "Series" not in str(value)[:20]:
                continue
            if key == "Column":
                continue
            yield key
            if key == "Function" and isinstance(value.get("function"), str):
                yield value["function"]
            if key != "Literal":
                yield from _node_names(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _node_names(value)
    elif isinstance(tree, str):
        yield tree


def _check_result(text: str, where: Where, columns: pa.Schema) -> None:
    import polars as pl

    empty = pl.DataFrame(
        pa.table(
            [
                pa.array([], pa.int64()),
                *(pa.array([], columns.field(n).type) for n in where.columns),
            ],
            names=["", *where.columns],
        )
    )
    try:
        found = empty.lazy().select(where.expression.alias("")).collect_schema()[""]
    except pl.exceptions.PolarsError as error:
        msg = f"where = {text!r}: {_first_line(error)}"
        raise ValueError(msg) from error
    if found != pl.Boolean:
        msg = f"where = {text!r} gives {found}, expected a boolean"
        raise ValueError(msg)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
