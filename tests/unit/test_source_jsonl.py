"""Bad and odd JSONL, one case of the catalogue each, with exact texts."""

import json

import orjson
import pyarrow as pa
import pytest

from batchgen.core.errors import SourceError
from batchgen.core.records import Ranges
from batchgen.source.columns import parse_field, planned, type_word
from batchgen.source.jsonl import JsonlReader
from batchgen.source.reading import ReadSpec

READER = JsonlReader()
GOOD = b'{"id": "a", "n": 1}'


def write(tmp_path, *lines: bytes, name: str = "in.jsonl") -> str:
    path = tmp_path / name
    path.write_bytes(b"\n".join(lines))
    return str(path)


def read(path: str, num_rows: int, *, where=None, needed=(), **words):
    """All rows as one batch; `words` are the planned columns."""
    schema = pa.schema([parse_field(name, word) for name, word in words.items()])
    spec = ReadSpec(schema, list(words), frozenset(needed), where)
    (batch,) = READER.read(path, 0, Ranges.until(num_rows), spec)
    return batch


@pytest.mark.parametrize(
    ("line", "error_type", "text"),
    [
        (b"{", "bad_json", "invalid JSON: unexpected end of data, column 2"),
        (b'{"id": "secret" x}', "bad_json", None),
        (
            b'{"id": "\xff secret"}',
            "bad_json",
            "invalid JSON: not UTF-8, byte 9 of the line; see input.encoding",
        ),
        (b'{"id": "\x00"}', "bad_json", None),
        (b'{"id": "\x1f"}', "bad_json", None),
        (b'{"id": "\\ud800"}', "bad_json", None),
        (b'{"n": NaN}', "bad_json", None),
        (b'{"n": -Infinity}', "bad_json", None),
        (b'{"n": 1e999}', "bad_json", None),
        (b'{"id": ' + b"[" * 20_000, "bad_json", None),
        (b'{"id": "a"}{"id": "b"}', "bad_json", None),
        (b'["a"]', "not_an_object", "expected a JSON object, found list"),
        (b'"a"', "not_an_object", "expected a JSON object, found string"),
        (b"7", "not_an_object", "expected a JSON object, found integer"),
        (b"7.5", "not_an_object", "expected a JSON object, found float"),
        (b"null", "not_an_object", "expected a JSON object, found null"),
        (b"true", "not_an_object", "expected a JSON object, found bool"),
        (b'{"n": "1"}', "type_mismatch", "column 'n' is planned as int64, found string"),
        (b'{"n": 1.0}', "type_mismatch", "column 'n' is planned as int64, found float"),
        (b'{"n": true}', "type_mismatch", "column 'n' is planned as int64, found bool"),
        (b'{"n": {}}', "type_mismatch", "column 'n' is planned as int64, found object"),
        (b'{"id": 5}', "type_mismatch", "column 'id' is planned as string, found integer"),
        (
            b'{"n": 9223372036854775808}',
            "type_mismatch",
            "column 'n' is planned as int64, found integer out of range",
        ),
        (
            b'{"n": 123456789012345678901234567890}',
            "type_mismatch",
            "column 'n' is planned as int64, found integer out of range",
        ),
    ],
)
def test_a_bad_line_costs_its_row_and_no_other(tmp_path, line, error_type, text):
    path = write(tmp_path, GOOD, line, GOOD)
    batch = read(path, 3, id="string", n="int64", needed=["id"])
    assert batch.rows == [0, 1, 2]
    assert list(batch.errors) == [1]
    error = batch.errors[1]
    assert error.error_type == error_type
    assert error.error.startswith(f"{path}:2: ")
    assert "secret" not in error.error
    assert "\n" not in error.error
    if text is not None:
        assert error.error == f"{path}:2: {text}"
    assert batch.values == [{"id": "a"}, None, {"id": "a"}]
    assert batch.carried.to_pylist()[::2] == [{"id": "a", "n": 1}] * 2


def test_a_row_that_does_not_fit_carries_what_does(tmp_path):
    path = write(tmp_path, b'{"id": "a", "n": "x", "m": []}')
    batch = read(path, 1, id="string", n="int64", m="int64")
    assert batch.carried.to_pylist() == [{"id": "a", "n": None, "m": None}]
    assert batch.errors[0].error == f"{path}:1: column 'n' is planned as int64, found string"


def test_a_long_line_is_an_error_and_its_neighbours_are_not(tmp_path):
    long = b'{"id": "' + b"x" * (64 << 20) + b'"}'
    path = write(tmp_path, GOOD, long, GOOD)
    batch = read(path, 3, id="string")
    assert batch.carried.to_pylist() == [{"id": "a"}, {"id": None}, {"id": "a"}]
    assert {at: (e.error_type, e.error) for at, e in batch.errors.items()} == {
        1: ("line_too_long", f"{path}:2: line is longer than 64 MiB")
    }


def test_blank_lines_are_skipped_and_keep_their_numbers(tmp_path):
    path = write(tmp_path, b"", GOOD, b" \t\r", GOOD, b"")
    assert READER.scan(path).num_rows == 4
    batch = read(path, 4, id="string")
    assert (batch.rows, batch.skipped) == ([1, 3], Ranges.of([0, 2]))


def test_only_blank_lines_make_a_batch_of_skipped_rows(tmp_path):
    batch = read(write(tmp_path, b"", b"", b""), 2, id="string", where="id = 'a'", needed=["id"])
    assert (batch.rows, batch.values, batch.carried.num_rows) == ([], [], 0)
    assert batch.skipped == Ranges.until(2)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_byte_order_mark_and_line_endings_are_no_content(tmp_path, ending):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + ending + GOOD + ending)
    assert READER.scan(str(path)).num_rows == 2
    batch = read(str(path), 2, id="string")
    assert batch.carried.to_pylist() == [{"id": "a"}] * 2
    assert not batch.errors


def test_the_last_of_repeated_keys_wins(tmp_path):
    batch = read(write(tmp_path, b'{"id": "a", "id": "b"}'), 1, id="string", needed=["id"])
    assert batch.carried.to_pylist() == [{"id": "b"}]
    assert batch.values == [{"id": "b"}]


BIG = 123456789012345678901234567890


@pytest.mark.parametrize("value", [BIG, -BIG, 2**63, 2**64, [1, {"x": BIG}], {"y": [BIG, 1.5]}])
def test_integers_over_64_bits_are_carried_exactly_as_json(tmp_path, value):
    path = write(tmp_path, json.dumps({"v": value}).encode())
    batch = read(path, 1, v="json", needed=["v"])
    assert json.loads(batch.carried.to_pylist()[0]["v"]) == value
    assert batch.values == [{"v": value}]


@pytest.mark.parametrize(
    ("value", "fits"),
    [(2**70, True), (BIG, False), (2**53 + 1, False), (2**53 + 2, True), (1e300, True), (7, True)],
)
def test_float_columns_take_only_integers_that_are_exact(tmp_path, value, fits):
    batch = read(write(tmp_path, b'{"v": 0.5}', json.dumps({"v": value}).encode()), 2, v="float64")
    assert (1 not in batch.errors) is fits
    assert batch.carried.to_pylist() == [{"v": 0.5}, {"v": value if fits else None}]


def test_json_columns_encode_every_value_even_strings(tmp_path):
    values = ["a", 1, 1.5, True, None, [1, "\u00e9"], {"k": None}]
    path = write(tmp_path, *(json.dumps({"v": value}).encode() for value in values))
    batch = read(path, len(values), v="json")
    assert batch.carried.column("v").to_pylist() == [
        '"a"', "1", "1.5", "true", None, '[1,"\u00e9"]', '{"k":null}'
    ]  # fmt: skip


def nested(depth: int, inside: bytes) -> bytes:
    return b'{"v": ' + b"[" * depth + inside + b"]" * depth + b"}"


def test_values_are_carried_down_to_254_levels(tmp_path):
    big = str(BIG).encode()
    path = write(tmp_path, nested(254, b"1"), nested(253, big), nested(254, big), nested(255, b"1"))
    batch = read(path, 4, v="json")
    assert batch.carried.to_pylist()[:2] == [
        {"v": "[" * 254 + "1" + "]" * 254},
        {"v": "[" * 253 + str(BIG) + "]" * 253},
    ]
    too_deep = "invalid JSON: nested too deeply for integers over 64 bits"
    assert {at: e.error for at, e in batch.errors.items()} == {
        2: f"{path}:3: {too_deep}",
        3: f"{path}:4: column 'v' is planned as json, found value nested too deeply",
    }


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (["a", None], "string"),
        ([None], "string"),
        ([True, False], "bool"),
        ([1, None, 2], "int64"),
        ([1, 2.5], "float64"),
        ([2.5], "float64"),
        ([2**53 + 1, 2.5], "json"),
        ([2**63], "json"),
        ([BIG], "json"),
        ([True, 1], "json"),
        (["a", 1], "text"),
        ([[1]], "json"),
        ([{}], "json"),
        (["a"] * 1999 + [["stray"]], "text"),
        ([1] * 19 + ["stray"], "text"),
        ([None] * 1500 + [[1]], "json"),
        ([1] * 1500 + [2.5], "float64"),
        ([1] * 1500 + [2.5, 2**60], "json"),
        ([1] * 1500 + [2**63 - 1, -(2**63)], "int64"),
        ([1] * 1500 + [2**63], "json"),
        ([0.5] * 1500 + [1e300], "float64"),
        ([0.5] * 1500 + [2**64], "json"),
        ([0.5] * 1500 + [-(2**70)], "json"),
    ],
)
def test_planned_types(tmp_path, values, word):
    path = write(tmp_path, *(json.dumps({"v": value}).encode() for value in values))
    found = READER.scan(path).columns
    assert [type_word(field) for field in planned([found], {}, path)] == [word]
    of_type = {type(it): at for at, it in reversed([*enumerate(values)]) if it is not None}
    assert {*of_type.values()} <= {*found["v"].values()}
    if len(values) < 1000:
        assert [type_word(field) for field in READER.columns([path], {})] == [word]


def test_types_are_planned_over_all_files_and_bad_rows_do_not_count(tmp_path):
    one = write(tmp_path, b'{"a": 1}', b"{", b'{"b": "x"}', name="1.jsonl")
    two = write(tmp_path, b'{"a": 1.5, "c": true}', b"", name="2.jsonl")
    schema = READER.columns([one, two], {"b": "json"})
    assert [(field.name, type_word(field)) for field in schema] == [
        ("a", "float64"),
        ("b", "json"),
        ("c", "bool"),
    ]


def test_a_column_too_rare_to_be_seen_can_be_declared(tmp_path):
    path = write(tmp_path, GOOD)
    assert READER.columns([path], {"reviewer": "string"}).names == ["id", "n", "reviewer"]


def test_an_empty_file_has_no_rows_and_no_columns(tmp_path):
    path = write(tmp_path)
    assert READER.sniff(path) is None
    assert READER.columns([path], {}).names == []
    assert READER.scan(path).num_rows == 0


def test_where_never_drops_an_error_row_and_reads_planned_types(tmp_path):
    path = write(tmp_path, b'{"n": 1}', b"{", b'{"n": "x"}', b'{"n": null}', b'{"n": 5}', b" ")
    batch = read(path, 6, n="int64", where="n > 3")
    assert (batch.rows, list(batch.errors)) == ([1, 2, 4], [0, 1])
    assert batch.skipped == Ranges.of([0, 3, 5])
    assert batch.carried.to_pylist() == [{"n": None}, {"n": None}, {"n": 5}]


@pytest.mark.parametrize(
    ("content", "name", "text"),
    [
        (b'[{"a": 1},\n{"a": 2}]', "a.jsonl", "not JSONL? it looks like a JSON array, "),
        (b'{\n "a": 1\n}\n', "a.jsonl", "not JSONL? it looks like pretty-printed JSON, "),
        (b"a,b\n1,2\n", "a.jsonl", "not JSONL? it looks like CSV or TSV, "),
        (b"<html>\n</html>", "a.jsonl", "not JSONL? it looks like XML or HTML, "),
        (b"word\n" * 20, "a.jsonl", "not JSONL? it looks like plain text, "),
        (b"PAR1....", "a.jsonl", "is not text: it looks like Parquet; name it .parquet"),
        (b"\x1f\x8b\x08", "a.jsonl", "is not text: it looks like gzip; add .gz to its name"),
        (b"\x28\xb5\x2f\xfd", "a.jsonl", "is not text: it looks like zstd; add .zst to its name"),
        (
            b"\xff\xfe{\0",
            "a.jsonl",
            'is not UTF-8: it looks like UTF-16; set input.encoding = "utf-16"',
        ),
        (b"{}", "a.jsonl.gz", "is not gzip, though its name says so; rename or compress it"),
        (b"{}", "a.jsonl.zst", "is not zstd, though its name says so; rename or compress it"),
    ],
)
def test_what_is_not_jsonl_is_refused_before_the_run(tmp_path, content, name, text):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        READER.sniff(str(path))
    assert str(caught.value).startswith(f"{path}: {text}")


@pytest.mark.parametrize("content", [b"word\n" * 19, b"word\n" * 19 + GOOD, b"\n" * 50 + GOOD])
def test_what_may_be_jsonl_is_not_refused(tmp_path, content):
    assert READER.sniff(write(tmp_path, content)) is None


def test_orjson_still_makes_floats_of_large_integers():
    """Were this to change, the search for them could go."""
    assert orjson.loads(b"18446744073709551616") == 1.8446744073709552e19
    assert type(orjson.loads(b"18446744073709551616")) is float


def test_tens_of_thousands_of_keys_cost_what_they_hold(tmp_path):
    """Each column of its own list would take minutes here, and a GiB."""
    wide = {f"k{at}": at for at in range(20_000)}
    path = write(tmp_path, json.dumps(wide).encode(), *([GOOD] * 999))
    schema = planned([READER.scan(path).columns], {}, path)
    (batch,) = READER.read(path, 0, Ranges.until(1000), ReadSpec(schema, schema.names, frozenset()))
    assert not batch.errors
    assert batch.carried.num_columns == 20_002
    first = batch.carried.slice(0, 1).to_pylist()[0]
    assert first == {**wide, "id": None, "n": None}
