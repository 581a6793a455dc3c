"""Bad and odd CSV, with exact texts."""

import csv
import datetime as dt
import gzip
import io
import json
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from batchgen.core.errors import SourceError
from batchgen.core.records import Ranges
from batchgen.source.csv import CsvReader, delimiter_hint
from batchgen.source.jsonl import JsonlReader
from batchgen.source.reading import ReadSpec
from batchgen.source.text import MAX_LINE_BYTES

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


DAY, TIME = dt.date(2024, 2, 29), dt.datetime(2024, 2, 29, 10, 0, 0, 5)  # noqa: DTZ001


@pytest.mark.parametrize(
    ("word", "text", "value"),
    [
        ("date", "2024-02-29", DAY),
        ("date", "", None),
        *(("date", text, ...) for text in ("2023-02-29", "29.2.2024", "2024-02-29T10:00", "x")),
        ("timestamp", "2024-02-29T10:00:00.000005", TIME),
        ("timestamp", "2024-02-29 10:00:00,000005", TIME),
        ("timestamp", "2024-02-29T10:00:00.0000051", ...),
        ("timestamp", "2024-02-29T10:00:00Z", ...),
        ("timestamptz", "2024-02-29T12:00:00.000005+02:00", TIME.replace(tzinfo=dt.UTC)),
        ("timestamptz", "2024-02-29T10:00:00", ...),
    ],
)
def test_days_and_times_are_iso_8601_or_the_row_is_an_error(tmp_path, word, text, value):
    path = write(tmp_path, f'a,b\n"{text}",x\n'.encode())
    batch = read(path, a=word)
    lines = str(tmp_path / "in.jsonl")
    Path(lines).write_text(json.dumps({"a": text or None}))
    schema = JsonlReader().columns([lines], {"a": word})
    spec = ReadSpec(schema, ["a"], frozenset())
    (rows,) = JsonlReader().read(lines, 0, Ranges.until(1), spec)
    if value is ...:
        error = f"column 'a' is planned as {word}, found a text that is not exactly one"
        assert batch.errors[0].error == f"{path}:2: {error}"
        assert rows.errors[0].error == f"{lines}:1: {error}"
        return
    assert (batch.errors, batch.values) == ({}, [{"a": value, "b": "x"}])
    assert batch.carried.to_pylist() == [{"a": value, "b": "x"}]
    assert rows.carried.to_pylist() == [{"a": value}]


@pytest.mark.parametrize(
    ("record", "error_type", "text"),
    [
        (b"1", "bad_csv", "bad CSV: expected 2 fields, found 1"),
        (b"1,2,3", "bad_csv", "bad CSV: expected 2 fields, found 3"),
        (b'"1"x,2', "bad_csv", "bad CSV: ',' expected after '\"'"),
        (b"1,\xff", "invalid_utf8", "not UTF-8, byte 3 of the line; see input.encoding"),
        (b'1,"\xff\n"', "invalid_utf8", "not UTF-8, byte 4 of the line; see input.encoding"),
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


# --- quotes that are not closed ------------------------------------------------------------------


def read_all(path: str, reader: CsvReader = READER, todo: Ranges | None = None):
    """Row -> its texts, or its error; None for a blank line."""
    schema = reader.columns([path], {})
    spec = ReadSpec(schema, schema.names, frozenset(schema.names))
    todo = Ranges.until(reader.scan(path).num_rows) if todo is None else todo
    found: dict[int, object] = {}
    for batch in reader.read(path, 0, todo, spec):
        for at, row in enumerate(batch.rows):
            value = batch.values[at]
            found[row] = batch.errors[at].error if value is None else list(value.values())
        found |= dict.fromkeys(batch.skipped)
    return found


def lost(path: str, first: int, last: int, why: str) -> list[str]:
    text = f"bad CSV: lines {first} to {last} are one record by their quotes: {why}"
    hint = f"{text}; is a quote in line {first} not closed?"
    return [f"{path}:{line}: {hint}" for line in range(first, last + 1)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("lines", "bad", "why"),
    [
        (['3,"4', "5,6", "7,8"], (3, 5), "unexpected end of data"),
        (['3,"4', "5,6", '7,"8', "9,0"], (3, 5), "',' expected after '\"'"),
        (['3,"4', "5,6", '7,"8" x', "9,0"], (3, 5), "',' expected after '\"'"),
        (['3,"4', "5,6", '7",8,9', "9,0"], (3, 5), "expected 2 fields, found 4"),
        (['3,"4', "5,6", '7,8"', "9,0"], (3, 5), "but each line by itself is one, of 2 fields"),
        (['"3,4', "5,6", '7",8', "9,0"], (3, 5), "but each line by itself is one, of 2 fields"),
        (['3,"4', '4,5"', "9,0"], (3, 4), "but each line by itself is one, of 2 fields"),
        (
            ['2f-8a1c90,"4', '77-03be11,5"', "9,0"],
            (3, 4),
            "but each line by itself is one, of 2 fields",
        ),
        (['3,"say', '"hi" to', 'me",x'], (3, 4), "',' expected after '\"'"),
    ],
)
def test_a_quote_that_is_not_closed_costs_every_line_that_hangs_on_it(
    tmp_path, lines, bad, why, end
):
    path = write(tmp_path, end.join(["a,b", "1,2", *lines, ""]).encode())
    found = read_all(path)
    assert list(found) == list(range(len(lines) + 1))
    first, last = bad
    assert [found[line - 2] for line in range(first, last + 1)] == lost(path, first, last, why)
    assert [found[line - 2] for line in range(last + 1, len(lines) + 3)] == [
        line.split(",") for line in lines[last - 2 :]
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Dear Sir,\nthank you, and\nbye, you",
        "Sum up:\nname,age\nbob,3\namy,4",
        "1\n2, 3\n4, 5",
        "{\n 'a': 1,\n 'b': 2\n}",
        "7,8\n9,10",
        "12 Main Street\n7,Springfield",
        "12 Main Street\n62701, Springfield",
        "seven\n8,nine",
        "\n\n\n",
        'say "hi",\nsay "ho",\nsay ""',
    ],
)
def test_a_text_of_many_lines_stays_one_record(tmp_path, text):
    rows = [["id", "text"], ["5", text], ["6", "x"]]
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    path = write(tmp_path, out.getvalue().encode())
    assert list(read_all(path).values()) == rows[1:]


GLUED = {
    "blank lines": [
        "id,text",
        *(f"{n},t {n}\n" for n in range(1, 4)),
        '4,"t 4\n',
        "5,t 5\n",
        '6,t"',
    ],
    "spaced": ["text, id", '"t 3, 3', "t 4, 4", 't 5", 5'],
    "in the number": ["c0,c1", '"7,w x', "8,w yy", "9,w z", '11",w v'],
    "a delimiter too many": [
        "id,text",
        '3,"t 3',
        *(f"{n},t" for n in range(4, 50)),
        "50,c,f",
        *(f"{n},t" for n in range(51, 70)),
        '70,x"',
    ],
    "counting down": ["id,text", "1001,t", '1000,"t', '999,t"'],
    "in steps": ["id,text", "0,t", '10,"t', '20,t"'],
    "bytes that are not UTF-8": ["id,text", '3,"t 3', "4,t", "5,caf\udce9", '6,t"'],
}


@pytest.mark.parametrize("lines", GLUED.values(), ids=GLUED)
def test_records_that_two_stray_quotes_glue_are_told_apart(tmp_path, lines):
    content = "\n".join([*lines, ""])
    name = "in.csv"
    path = write(tmp_path, content.encode(errors="surrogateescape"), name)
    found = read_all(path)
    texts = [line for value in found.values() if isinstance(value, list) for line in value]
    assert all("\n" not in text for text in texts)
    at = next(n for n, line in enumerate(content.splitlines()) if '"' in line)
    assert sum(isinstance(value, str) for value in found.values()) >= len(content.splitlines()) - at


@pytest.mark.parametrize("text", ["Kaffee und Kuchen\n3,50 Euro\n4,20 Euro", "Steps:\n1,a\n2,b"])
def test_a_list_within_a_text_begins_anew_and_stays_text(tmp_path, text):
    path = write(tmp_path, f'id,text\n11,x\n12,"{text}"\n13,y\n'.encode())
    assert list(read_all(path).values()) == [["11", "x"], ["12", text], ["13", "y"]]


def test_a_header_that_swallows_one_record_is_refused(tmp_path):
    path = write(tmp_path, b'text,"label\nabc,pos"\ndef,neg\n')
    with pytest.raises(SourceError, match="the header goes on to line 2"):
        read_all(path)


def test_a_header_that_swallows_records_is_refused(tmp_path):
    path = write(tmp_path, b'id,"text\n1,a\n2,b"\n3,c\n')
    message = "the header goes on to line 3; is a quote in line 1 not closed?"
    with pytest.raises(SourceError, match=re.escape(message)):
        READER.columns([path], {})


PLAIN = st.text(alphabet="ab1é", max_size=4)


@given(
    st.lists(st.tuples(PLAIN, PLAIN, PLAIN), min_size=1, max_size=12),
    st.lists(
        st.tuples(st.integers(0, 11), st.integers(0, 2), st.sampled_from(['%s"', '"%s'])),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(["in.csv", "in.csv.gz", "in.csv.zst"]),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_stray_quotes_hide_no_line(tmp_path_factory, rows, quotes, name, bom):
    """Every line is a record of its own, was; none may be in no row, or in another's text."""
    table = [["id", "x", "y", "z"], *([f"n{at}", *row] for at, row in enumerate(rows))]
    for at, column, shape in quotes:
        row = table[1 + at % len(rows)]
        row[1 + column] = shape % row[1 + column]
    content = bom + "\n".join(map(",".join, table)).encode() + b"\n"
    pack = {"csv": bytes, "gz": gzip.compress, "zst": zstandard.compress}[name.rpartition(".")[2]]
    path = write(tmp_path_factory.mktemp("csv"), pack(content), name)
    found = read_all(path)
    texts = [line for value in found.values() if isinstance(value, list) for line in value]
    assert all("\n" not in text for text in texts)
    assert len(found) + sum(text.count("\n") for text in texts) == len(rows)
    for row, value in found.items():
        assert value == read_all(path, todo=Ranges.of([row]))[row]


FIELD = st.text(alphabet='ab ,"\n1;\té', max_size=12)


@given(
    st.integers(1, 3).flatmap(
        lambda width: st.lists(st.lists(FIELD, min_size=width, max_size=width), max_size=8)
    ),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_well_formed_files_are_read_as_pythons_csv_reads_them(tmp_path_factory, rows, quoting, end):
    header = [f"c{at}" for at in range(len(rows[0]) if rows else 2)]
    out = io.StringIO()
    csv.writer(out, quoting=quoting, lineterminator=end).writerows([header, *rows])
    path = write(tmp_path_factory.mktemp("csv"), out.getvalue().encode())
    expected = list(csv.reader(io.StringIO(out.getvalue(), newline=""), strict=True))[1:]
    found = list(read_all(path).values())
    assert [value or [] for value in found] == expected
    before = CsvReader(counts_lines=False)
    assert before.scan(path) == READER.scan(path)


def test_a_plan_of_before_counts_a_bad_record_once(tmp_path):
    path = write(tmp_path, b'a,b\n1,2\n3,"4\n5,6\n7,"8\n9,0\n3,"4\n5,6\n7,8"\n1,2\n')
    before = CsvReader(counts_lines=False)
    assert (before.scan(path).num_rows, READER.scan(path).num_rows) == (5, 9)
    found = read_all(path, before)
    assert found[1] == f"{path}:3: bad CSV: ',' expected after '\"'"
    assert [found[row] for row in (0, 2, 3, 4)] == [
        ["1", "2"],
        ["9", "0"],
        ["3", "4\n5,6\n7,8"],
        ["1", "2"],
    ]


def test_a_quote_that_is_open_over_a_large_file_takes_little_memory(tmp_path):
    path = write(tmp_path, b'a,b\n1,"2\n')
    with Path(path).open("ab") as file:
        for _ in range(50):
            file.write((b"1," + b"2" * 2000 + b"\n") * 1000)
    tracemalloc.start()
    try:
        num_rows = READER.scan(path).num_rows
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_rows == 50_001
    assert peak < 8 * MAX_LINE_BYTES


def test_a_field_of_very_many_lines_is_told_by_its_first(tmp_path):
    """Two stray quotes, a million records apart: two lists a line would take some 200 MB."""
    path = write(tmp_path, b'a,b\n1,"2\n' + b"1,2\n" * 1_000_000 + b'1,2"\n')
    tracemalloc.start()
    try:
        num_rows = READER.scan(path).num_rows
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_rows == 1_000_002
    assert peak < 128 * 2**20


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
        ("json", "1e999"),
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
        (
            b"a,\xff\n",
            "the header cannot be read: not UTF-8, byte 3 of the line; see input.encoding",
        ),
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
