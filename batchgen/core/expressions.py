"""SQL expressions that test one row: the `where` filter and the rules for answers.

Invariant: whether a row passes depends on that row alone, because a resumed run reads rows in
other company. Aggregates, window functions and the like are refused when the job is planned.

They are found in the parsed tree. To evaluate an expression on two batches and on both together,
and to compare, would be shorter, but it overlooks what its values do not reach: with
`id = 'x7' AND n > AVG(n)` every batch without an `x7` agrees with every other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchgen.core.data import pl
from batchgen.core.errors import suggestion

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
LATE = b"batchgen.late"
"""In the metadata of a column that first rows lack, so that its type is not known yet."""
# These are folded to a literal when the text is parsed, so that no tree shows them.
_SPARE = "__batchgen"
_CLOCK = re.compile(r"\b(now|current_\w+|localtime\w*|today|getdate)\b", re.IGNORECASE)
# `len` is what people write; polars' SQL calls it `length`.
_LEN = re.compile(r"('(?:[^']|'')*'|\"(?:[^\"]|\"\")*\")|\blen(?=\s*\()", re.IGNORECASE)
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"")


@dataclass(frozen=True, slots=True)
class RowTest:
    """A parsed expression and the columns that it reads."""

    name: str
    """The key in the job file, for messages."""
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
        try:
            return self.values(columns, num_rows).fill_null(value=False).to_arrow(), {}
        except pl.exceptions.PolarsError as error:
            if num_rows == 1:
                # What polars says after this word are values.
                reason = _first_line(error).split(" for ", 1)[0]
                problem = f"{self.name} = {self.text!r} fails: {reason}; TRY_CAST gives null"
                return pa.array([False]), {0: problem}
        # Rare, and only the row's own trouble: find the rows by halves.
        half = num_rows // 2
        left, left_why = self.keep([column[:half] for column in columns], half)
        right, right_why = self.keep([column[half:] for column in columns], num_rows - half)
        why = {**left_why, **{half + at: text for at, text in right_why.items()}}
        return pa.concat_arrays([left, right]), why

    def values(self, columns: Sequence[pa.Array], num_rows: int) -> pl.Series:
        """What the expression gives, shape (num_rows,), for the arguments of `keep`.

        Raises:
            PolarsError: It fails on a value, or cannot be evaluated at all.
        """
        # The extra column keeps the number of rows when the expression reads none.
        table = pa.table([pa.array(range(num_rows)), *columns], names=[_SPARE, *self.columns])
        return pl.DataFrame(table).with_columns(self.expression.alias(_SPARE))[_SPARE]


def parse_row_test(name: str, text: str) -> RowTest:
    """Parse an expression; `name` is its key in the job file.

    Raises:
        ValueError: It is not one SQL expression.
    """
    try:
        expression = pl.sql_expr(_LEN.sub(lambda found: found[1] or "length", text))
        names = dict.fromkeys(expression.meta.root_names())
    except pl.exceptions.PolarsError as error:
        msg = f"{name} = {text!r} is not an SQL expression: {_first_line(error)}"
        raise ValueError(msg) from error
    return RowTest(name, text, expression, tuple(names))


def check_row_test(name: str, text: str, columns: pa.Schema) -> None:
    """Refuse what cannot decide each row by itself.

    Raises:
        ValueError: Not an expression, an unknown column, not a boolean, it fails whatever the
            row holds (types, a broken regex), or it looks at other rows or at the clock.
    """
    test = parse_row_test(name, text)
    for column in test.columns:
        if column == _SPARE:
            msg = f"{name} = {text!r}: a column named {column!r} cannot be read here, rename it"
            raise ValueError(msg)
        if column not in columns.names:
            found = suggestion(column, columns.names)
            found += f"; a text is written '{column}'" if f'"{column}"' in text else ""
            raise ValueError(f"{name} = {text!r}: unknown column {column!r}{found}")
    _check_row_wise(test)
    if not any(LATE in (columns.field(column).metadata or {}) for column in test.columns):
        _check_result(test, columns)


def _check_row_wise(test: RowTest) -> None:
    name, text = test.name, test.text
    clock = _CLOCK.search(_QUOTED.sub("", text))
    if clock:
        raise ValueError(
            f"{name} = {text!r} reads the clock ({clock[0]}), so that a resumed run would choose "
            "other rows; write the time out"
        )
    for node in _looking_at_other_rows(json.loads(test.expression.meta.serialize(format="json"))):
        msg = f"{name} = {text!r} looks at other rows ({node}), expected a test of one row"
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


def _check_result(test: RowTest, columns: pa.Schema) -> None:
    """Evaluate it on a row of nulls and on one of values: some mistakes show only on values."""
    where = f"{test.name} = {test.text!r}"
    kinds = [columns.field(name).type for name in test.columns]
    rows = [[pa.nulls(1, kind) for kind in kinds], [_sample(kind) for kind in kinds]]
    for row in rows:
        try:
            found = test.values(row, 1).dtype
        except pl.exceptions.PolarsError as error:
            if row is rows[1] and _may_be_the_value(error):
                continue
            why = _first_line(error)
            if "native python" in why:  # Polars' own advice is for its Python expressions.
                why = "cannot compare a day or time to a text; a day is written DATE '2026-12-31'"
            raise ValueError(f"{where}: {why}") from error
        except pl.exceptions.PanicException as error:
            read = ", ".join(f"{n!r} ({k})" for n, k in zip(test.columns, kinds, strict=True))
            msg = f"{where}: polars cannot read column {read}: {_first_line(error)}"
            raise ValueError(msg) from error
        if found != pl.Boolean:
            raise ValueError(f"{where} gives {found}, expected a boolean")


def _may_be_the_value(error: Exception) -> bool:
    """Whether another value might do: a text that is no number, no date, no JSON.

    Source:
        polars 1.30 to 2.1: a cast that fails on a value says "conversion from", one that no value
        can pass says otherwise; what does not parse is a ComputeError, on nulls it does not fail.
    """
    is_conversion = _first_line(error).startswith("conversion from ")
    return is_conversion or isinstance(error, pl.exceptions.ComputeError)


def _sample(kind: pa.DataType) -> pa.Array:
    """One value of a type; null where there is no simple one."""
    try:
        return pa.array([_sample_value(kind)], kind)
    except (pa.ArrowException, TypeError, ValueError):
        return pa.nulls(1, kind)


def _sample_value(kind: pa.DataType) -> Any:  # noqa: ANN401 - of any type
    types = pa.types
    if types.is_dictionary(kind):
        return _sample_value(kind.value_type)
    if types.is_struct(kind):
        return {field.name: _sample_value(field.type) for field in kind}
    if types.is_map(kind):
        return [(_sample_value(kind.key_type), _sample_value(kind.item_type))]
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        size = kind.list_size if types.is_fixed_size_list(kind) else 1
        return [_sample_value(kind.value_type)] * size
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "1"  # A cast to a number passes, so that what comes after it is seen.
    return True if types.is_boolean(kind) else 1


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
