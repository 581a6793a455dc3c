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

# Expression nodes, as polars 1.30 to 2.1 serializes them, whose value at a row depends on that row
# alone if their children's do: node -> where the children are.
_ROW_WISE: dict[str, tuple[str | int, ...]] = {
    "Alias": (0,),
    "BinaryExpr": ("left", "right"),
    "Cast": ("expr",),
    "Column": (),
    "Function": ("input",),
    "Literal": (),
    "Ternary": ("predicate", "truthy", "falsy"),
}
# Functions that SQL text can reach, or might in a later polars, and that look at other rows.
_OTHER_ROWS = re.compile(
    r"Quantile|Correlation|Rank|Shift.*|Cum.*|Diff|Unique.*|IsUnique|IsDuplicated|IsFirstDistinct"
    r"|IsLastDistinct|Any|All|Reverse|TopK.*|Random|Sample.*|RowIndex|Range|Drop(Nulls|Nans)|Skew"
    r"|NullCount|ArgWhere|Mode|Interpolate.*|FillNullWithStrategy|Ewm.*|Hist|ValueCounts|Repeat"
    r"|Kurtosis|PctChange|Rolling.*|RLE.*|SearchSorted|ArgUnique|ArgSort|ApproxNUnique|Entropy"
)
# These are folded to a literal when the text is parsed, so that no tree shows them.
_SPARE = "__batchgen"
_CLOCK = re.compile(r"\b(now|current_\w+|localtime\w*|today|getdate)\b", re.IGNORECASE)
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"")


@dataclass(frozen=True, slots=True)
class Where:
    """A parsed expression and the columns that it reads."""

    text: str
    expression: pl.Expr
    columns: tuple[str, ...]

    def keep(self, columns: Sequence[pa.Array], num_rows: int) -> tuple[pa.Array, dict[int, str]]:
        """Evaluate; null counts as false.

        Args:
            columns: Arrays of `num_rows` values, in the order of `self.columns`.
            num_rows: Rows to judge.

        Returns:
            Booleans without nulls, shape (num_rows,), and index -> why it fails on a row, such
            as a strict cast of a value that does not fit. The text holds no value.
        """
        import polars as pl

        try:
            return self._evaluate(columns, num_rows), {}
        except pl.exceptions.PolarsError as error:
            if num_rows == 1:
                # What polars says after this word are values.
                reason = _first_line(error).split(" for ", 1)[0]
                problem = f"where = {self.text!r} fails: {reason}; TRY_CAST gives null"
                return pa.array([False]), {0: problem}
        # Rare, and only the row's own trouble: find the rows by halves.
        half = num_rows // 2
        left, left_why = self.keep([column[:half] for column in columns], half)
        right, right_why = self.keep([column[half:] for column in columns], num_rows - half)
        why = {**left_why, **{half + at: text for at, text in right_why.items()}}
        return pa.concat_arrays([left, right]), why

    def _evaluate(self, columns: Sequence[pa.Array], num_rows: int) -> pa.Array:
        import polars as pl

        # The extra column keeps the number of rows when the expression reads none.
        table = pa.table([pa.array(range(num_rows)), *columns], names=[_SPARE, *self.columns])
        passed = pl.DataFrame(table).with_columns(self.expression.alias(_SPARE))[_SPARE]
        return passed.fill_null(value=False).to_arrow()


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
    return Where(text, expression, tuple(names))


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
    for name in _looking_at_other_rows(json.loads(expression.meta.serialize(format="json"))):
        msg = f"where = {text!r} looks at other rows ({name}), expected a test of one row"
        raise ValueError(msg)


def _looking_at_other_rows(node: Any) -> Iterator[str]:  # noqa: ANN401 - polars' own JSON
    kind, body = next(iter(node.items())) if isinstance(node, dict) else (str(node), {})
    if kind not in _ROW_WISE:
        yield kind
        return
    if kind == "Function":
        name = _function_name(body["function"])
        if _OTHER_ROWS.fullmatch(name):
            yield name
    for key in _ROW_WISE[kind]:
        children = body[key] if isinstance(body[key], list) else [body[key]]
        for child in children:
            yield from _looking_at_other_rows(child)


def _function_name(function: Any) -> str:  # noqa: ANN401 - polars' own JSON
    """The function's name; within `Boolean` the inner one, since other families are row-wise."""
    if isinstance(function, str):
        return function
    name, inner = next(iter(function.items()))
    return _function_name(inner) if name == "Boolean" else str(name)


def _check_result(text: str, where: Where, columns: pa.Schema) -> None:
    import polars as pl

    empty = pl.DataFrame(
        pa.table(
            [
                pa.array([], pa.int64()),
                *(pa.array([], columns.field(n).type) for n in where.columns),
            ],
            names=[_SPARE, *where.columns],
        )
    )
    try:
        found = empty.lazy().select(where.expression.alias(_SPARE)).collect_schema()[_SPARE]
    except pl.exceptions.PolarsError as error:
        msg = f"where = {text!r}: {_first_line(error)}"
        raise ValueError(msg) from error
    if found != pl.Boolean:
        msg = f"where = {text!r} gives {found}, expected a boolean"
        raise ValueError(msg)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
