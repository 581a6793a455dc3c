"""Bad and odd CSV, with exact texts."""

import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.core.errors import SourceError
from batchgen.core.ranges import Ranges
from batchgen.source.base import ReadSpec
from batchgen.source.csv import CsvReader, delimiter_hint

READER = CsvReader()


def write(tmp_path, content: bytes, name: str = "in.csv") -> str:
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


def read(path: str, **words):
    """All rows as one batch; `words` override types."""
    schema = READER.columns([path], words)
    spec = ReadSpec(schema, schema.names, frozenset(schema.names))
    (batch,) = READER.read(path, 0, Ranges.until(READER.scan(path).num_rows), spec)
    return batch


@pytest.mark.parametrize(
    ("record", "error_type", "text"),
    [
        (b"1", "bad_csv", "bad CSV: expected 2 fields, found 1"),
        (b"1,2,3", "bad_csv", "bad CSV: expected 2 fields, found 3"),
        (b'"1"x,2', "bad_csv", "bad CSV: ',' expected after '\"'"),
        (b"1,\xff", "invalid_utf8", "not UTF-8, byte 3 of the line"),
        (b'1,"\xff\n"', "invalid_utf8", "not UTF-8, byte 4 of the line"),
    ],
)
def test_a_bad_record_costs_its_row_and_no_other(tmp_path, record, error_type, text):
    path = write(tmp_path, b'a,b\n"x\ny",z\n' + record + b"\nx,z\n")
    batch = read(path)
    assert batch.rows == [0, 1, 2]
    assert {at: (e.error_type, e.error) for at, e in batch.errors.items()} == {
        1: (error_type, f"{path}:4: {text}")
    }
    good = [{"a": "x\ny", "b": "z"}, {"a": "x", "b": "z"}]
    assert batch.values == [good[0], None, good[1]]
    assert batch.carried.to_pylist() == [good[0], {"a": None, "b": None}, good[1]]


def test_a_bare_carriage_return_is_an_error_of_its_row(tmp_path):
    path = write(tmp_path, b"a,b\n1\r2,3\n4,5\n")
    batch = read(path)
    assert list(batch.errors) == [0]
    assert batch.errors[0].error.startswith(f"{path}:2: bad CSV: new-line character seen")
    assert batch.values[1] == {"a": "4", "b": "5"}


def test_an_open_quote_is_an_error(tmp_path):
    path = write(tmp_path, b'a,b\n1,2\n3,"4\n5,6\n')
    batch = read(path)
    assert batch.rows == [0, 1]
    assert batch.errors[1].error == f"{path}:3: bad CSV: unexpected end of data"


def test_nul_bytes_long_fields_and_blank_lines(tmp_path):
    long = b"x" * 200_000
    batch = read(write(tmp_path, b"a,b\r\n\0,1\r\n\r\n" + long + b",2\r\n"))
    assert batch.carried.column("a").to_pylist() == ["\0", long.decode()]
    assert (batch.rows, batch.skipped) == ([0, 2], Ranges.of([1]))


@pytest.mark.parametrize(
    ("word", "text", "value"),
    [
        ("int64", "7", 7),
        ("int64", "-7", -7),
        ("int64", str(2**63 - 1), 2**63 - 1),
        ("float64", "0.5", 0.5),
        ("float64", "7", 7.0),
        ("float64", "1e3", 1000.0),
        ("bool", "true", True),
        ("bool", "false", False),
        ("json", '{"a": [1, 2.5]}', '{"a":[1,2.5]}'),
        ("json", str(10**30), str(10**30)),
        ("int64", "", None),
        ("json", "", None),
        ("string", "", ""),
        ("string", "007", "007"),
    ],
)
def test_texts_that_are_exactly_a_value(tmp_path, word, text, value):
    quoted = text.replace('"', '""')
    batch = read(write(tmp_path, f'a,b\n"{quoted}",x\n'.encode()), a=word)
    assert not batch.errors
    assert batch.carried.column("a").to_pylist() == [value]
    assert batch.values[0]["a"] == (json.loads(value) if word == "json" and value else value)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("int64", "007"),
        ("int64", "+7"),
        ("int64", " 7"),
        ("int64", "-0"),
        ("int64", "7.0"),
        ("int64", "1_000"),
        ("int64", "\u0663"),
        ("int64", "x"),
        ("int64", str(2**63)),
        ("int64", "9" * 5000),
        ("int32", str(2**31)),
        ("float64", "nan"),
        ("float64", "inf"),
        ("float64", "1e999"),
        ("float64", "0x1p3"),
        ("float64", ".5"),
        ("float64", str(2**53 + 1)),
        ("bool", "True"),
        ("bool", "1"),
        ("json", "{"),
        ("json", "NaN"),
        ("json", "x"),
        ("json", "[" * 100_000),
    ],
)
def test_texts_that_are_not(tmp_path, word, text):
    path = write(tmp_path, f"a,b\n{text},x\n".encode())
    batch = read(path, a=word)
    found = f"column 'a' is planned as {word}, found a text that is not exactly one"
    assert (batch.errors[0].error_type, batch.errors[0].error) == (
        "type_mismatch",
        f"{path}:2: {found}",
    )
    assert batch.carried.to_pylist() == [{"a": None, "b": "x"}]


def test_files_may_order_their_columns_differently(tmp_path):
    one = write(tmp_path, b"a,b\n1,2\n", "1.csv")
    two = write(tmp_path, b"b,a\n2,1\n", "2.csv")
    schema = READER.columns([one, two], {})
    (batch,) = READER.read(two, 0, Ranges.until(1), ReadSpec(schema, ["a", "b"], frozenset()))
    assert batch.carried.to_pylist() == [{"a": "1", "b": "2"}]


def test_files_with_other_columns_are_refused(tmp_path):
    one = write(tmp_path, b"a,b\n", "1.csv")
    two = write(tmp_path, b"a,c\n", "2.csv")
    with pytest.raises(SourceError, match=r"has other columns than .*1.csv: \['b', 'c'\] are in"):
        READER.columns([one, two], {})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a,b,a\n", r"the header repeats \['a'\], expected every name once"),
        (b"\na,b\n", "begins with a blank line, expected a header"),
        (b"a,\xff\n", "the header cannot be read: not UTF-8, byte 3 of the line"),
        (b'"a"b,c\n', "the header cannot be read: bad CSV"),
    ],
)
def test_bad_headers_are_refused(tmp_path, content, text):
    with pytest.raises(SourceError, match=text):
        READER.columns([write(tmp_path, content)], {})


@pytest.mark.parametrize("content", [b"", b"a,b\n", b"a,b", b'"a",b\n', b"\xef\xbb\xbfa,b\n"])
def test_a_file_without_records_has_no_rows(tmp_path, content):
    path = write(tmp_path, content)
    assert READER.scan(path).num_rows == 0
    assert READER.columns([path], {}).names == (["a", "b"] if content else [])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"a": 1}\n', "not CSV. it looks like JSONL"),
        (b"[1]\n", "not CSV. it looks like a JSON array"),
        (b"PAR1", "it looks like Parquet"),
    ],
)
def test_what_is_not_csv_is_refused(tmp_path, content, text):
    with pytest.raises(SourceError, match=text):
        READER.sniff(write(tmp_path, content))


@given(st.text(alphabet='ab,"\n\r\0\t', max_size=40))
def test_scan_and_read_agree_on_any_content(tmp_path_factory, text):
    path = write(tmp_path_factory.mktemp("csv"), f"x,y\n{text}".encode())
    num_rows = READER.scan(path).num_rows
    schema = READER.columns([path], {})
    spec = ReadSpec(schema, schema.names, frozenset())
    batches = list(READER.read(path, 0, Ranges.until(num_rows), spec))
    seen = [row for batch in batches for row in (*batch.rows, *batch.skipped)]
    assert sorted(seen) == list(range(num_rows))
    with pytest.raises(SourceError, match=f"has {num_rows} rows, expected at least {num_rows + 1}"):
        list(READER.read(path, 0, Ranges.until(num_rows + 1), spec))
    assert pa.types.is_string(schema.field("x").type)


# --- another delimiter ---------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [";", "|", "\t", "é"])
def test_a_delimiter_may_be_given_and_counts_in_quotes_too(tmp_path, delimiter):
    content = 'a;b\n"x;y";"1\n2"\n,;z\n'.replace(";", delimiter)
    path, reader = write(tmp_path, content.encode()), CsvReader(delimiter)
    schema = reader.columns([path], {})
    spec = ReadSpec(schema, schema.names, frozenset(schema.names))
    assert reader.scan(path).num_rows == 2
    (batch,) = reader.read(path, 0, Ranges.until(2), spec)
    assert batch.values == [{"a": f"x{delimiter}y", "b": "1\n2"}, {"a": ",", "b": "z"}]


def test_a_header_that_another_character_cuts_is_told(tmp_path):
    path = write(tmp_path, b"id;body\n1;hi\n")
    with pytest.raises(SourceError, match=r"columns are \['id;body'\]: is the delimiter ';'\?"):
        READER.columns([path], {"id": "int"})
    assert delimiter_hint(["id", "a;b"]) is None
    assert delimiter_hint(["body"]) is None
