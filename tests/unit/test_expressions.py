"""The `where` filter decides each row by itself, or is refused."""

import pyarrow as pa
import pytest

from batchgen.core.expressions import check_row_test, parse_row_test

SCHEMA = pa.schema(
    {"id": pa.string(), "n": pa.int64(), "good": pa.bool_(), "at": pa.timestamp("us")}
)
ODD = pa.schema(
    [
        *SCHEMA,
        pa.field("tags", pa.list_(pa.string())),
        pa.field("wide", pa.decimal256(50)),
        pa.field("__batchgen", pa.int64()),
        pa.field("both", pa.struct({"a": pa.string(), "b": pa.list_(pa.int8(), 2)})),
        pa.field("code", pa.dictionary(pa.int32(), pa.string())),
        pa.field("day", pa.date32()),
        pa.field("raw", pa.binary()),
        pa.field("none", pa.null()),
        pa.field("price", pa.decimal128(9, 2)),
    ]
)
N = pa.array([1, None, 3, 4])


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("n > 2", [False, False, True, True]),
        ("n IS NULL", [False, True, False, False]),
        ("NOT n > 2", [True, False, False, False]),
        ("n IN (1, 4)", [True, False, False, True]),
        ("n BETWEEN 3 AND 9 OR n = 1", [True, False, True, True]),
        ("CASE WHEN n > 3 THEN true ELSE false END", [False, False, False, True]),
        ("COALESCE(n, 0) = 0", [False, True, False, False]),
        ("n % 2 = 0", [False, False, False, True]),
        ("true", [True] * 4),
        ("1 = 2", [False] * 4),
    ],
)
def test_null_counts_as_false(text, passed):
    check_row_test("where", text, SCHEMA)
    where = parse_row_test("where", text)
    columns = [N for _ in where.columns]
    assert where.keep(columns, 4)[0].to_pylist() == passed
    one_by_one = [where.keep([c[i : i + 1] for c in columns], 1)[0][0].as_py() for i in range(4)]
    assert one_by_one == passed


@pytest.mark.parametrize(
    "text",
    [
        "id LIKE 'a%'",
        "LOWER(id) = 'now() is text'",
        "STARTS_WITH(id, 'count')",
        "LENGTH(id) > 3 AND good",
        "at > TIMESTAMP '2026-01-01 00:00:00'",
        "LEFT(id, 1) = 'a' AND SPLIT_PART(id, '-', 1) = 'a'",
        "GREATEST(n, 2) > 1 AND REGEXP_LIKE(id, 'a')",
        "EXTRACT(year FROM at) > 2025 AND id || 'x' = 'ax'",
        "id IN ('Agg', 'Over')",
        "id = 'Shift'",
        "ABS(n) > 1",
        "CAST(n AS DOUBLE) / 2 > 0.5",
        "CAST(id AS INTEGER) > 1",
        "CAST(id || 'x' AS INTEGER) > 1",
        "CAST(n + 500 AS TINYINT) > 1",
        "DATE(id) > DATE '2020-01-01'",
        "STRPTIME(id, '%Y-%m-%d') > DATE '2020-01-01'",
        "ARRAY_LENGTH(tags) > 1 AND ARRAY_CONTAINS(tags, 'a')",
        "both IS NOT NULL AND raw IS NOT NULL AND none IS NULL",
        "code = 'a' AND price > 1 AND day > DATE '2020-01-01'",
        "1 / n > 0 OR n % 0 = 1",
    ],
)
def test_tests_of_one_row_are_accepted(text):
    assert check_row_test("where", text, ODD) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n >", "is not an SQL expression"),
        ("n > 1; DROP TABLE x", "is not an SQL expression"),
        ("", "is not an SQL expression"),
        ("random() > 0.5", "is not an SQL expression"),
        ("idd = 'a'", r"unknown column 'idd'; did you mean 'id'\?"),
        ('id = "web"', "unknown column 'web'; there are .*; a text is written 'web'"),
        ("zzzzz = 1", "unknown column 'zzzzz'; there are 'id', 'n', 'good', 'at', 'tags'"),
        ("n + 1", "gives Int64, expected a boolean"),
        ("id", "gives String, expected a boolean"),
        ("n > AVG(n)", "looks at other rows"),
        ("SUM(n) > 1", "looks at other rows"),
        ("COUNT(*) > 1", "looks at other rows"),
        ("n = MAX(n)", "looks at other rows"),
        ("n > MEDIAN(n)", "looks at other rows"),
        ("n > QUANTILE_CONT(n, 0.5)", "looks at other rows"),
        ("n = FIRST(n)", "looks at other rows"),
        ("ROW_NUMBER() OVER () < 5", "looks at other rows"),
        ("RANK() OVER (ORDER BY n) < 5", "looks at other rows"),
        ("LAG(n) OVER (ORDER BY n) > 1", "looks at other rows"),
        ("n > AVG(n) OVER (PARTITION BY id)", "looks at other rows"),
        ("COVAR_POP(n, n) > 1", "looks at other rows"),
        ("COLUMNS('n') > 1", "looks at other rows"),
        ("id IN (STRING_AGG(id, ','))", "looks at other rows"),
        ("n > (SELECT 1)", "looks at other rows"),
        ("at < NOW()", "reads the clock"),
        ("at < CURRENT_TIMESTAMP", "reads the clock"),
        ("at < CURRENT_DATE", "reads the clock"),
        ("len(tags) < 4", r"where = 'len\(tags\) < 4': .*expected `String`, got `list"),
        ("id = 1", "cannot compare string with numeric type"),
        ("at > '2024-01-01'", "compare a day or time to a text; a day is written DATE '2026-12"),
        ("id ~ '('", "regex error"),
        ("id ~ 'a' AND tags = 'a'", "cannot cast List"),
        ("NOT id", "String|Utf8|casting|conversion"),
        ("CAST('x' AS INT) = 1", "conversion from"),
        ("__batchgen > 1", "a column named '__batchgen' cannot be read here, rename it"),
        ("wide > 1", r"polars cannot read column 'wide' \(decimal256\(50, 0\)\)"),
    ],
)
def test_what_cannot_decide_a_row_by_itself_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        check_row_test("where", text, ODD)


def test_a_failing_cast_names_the_reason_and_not_the_value():
    where = parse_row_test("where", "CAST(id AS INTEGER) > 1")
    passed, failed = where.keep([pa.array(["1", "2", "secret", "3", "hidden"])], 5)
    assert passed.to_pylist() == [False, True, False, True, False]
    assert list(failed) == [2, 4]
    assert failed[2].startswith(
        "where = 'CAST(id AS INTEGER) > 1' fails: conversion from `str` to `i32`"
    )
    assert "secret" not in failed[2]
    tried = parse_row_test("where", "TRY_CAST(id AS INTEGER) > 1").keep(
        [pa.array(["2", "secret"])], 2
    )
    assert (tried[0].to_pylist(), tried[1]) == ([True, False], {})


def test_a_column_named_as_ours_is_read():
    assert parse_row_test("where", "column_0 = 5").keep([pa.array([5, 6])], 2)[0].to_pylist() == [
        True,
        False,
    ]


def test_len_is_understood_and_left_alone_in_quotes():
    test = parse_row_test("where", "len(a) < 4 and a <> 'len(x)'")
    kept, why = test.keep([pa.array(["abc", "abcd", "len(x)"])], 3)
    assert (kept.to_pylist(), why) == ([True, False, False], {})
