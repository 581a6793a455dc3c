"""Odd and bad Parquet."""

import datetime
import decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.core.errors import SourceError
from batchgen.core.records import Ranges
from batchgen.job.model import InputConfig
from batchgen.source import parquet
from batchgen.source.columns import JSON_METADATA, agreed
from batchgen.source.parquet import ParquetReader
from batchgen.source.reading import ReadSpec
from batchgen.source.text import MAX_BATCH_BYTES, MAX_LINE_BYTES

READER = ParquetReader()


def write(tmp_path, table: pa.Table, name: str = "in.parquet", **options) -> str:
    path = tmp_path / name
    pq.write_table(table, path, **options)
    return str(path)


def read(path: str, todo: Ranges, needed=(), where=None, **options):
    schema = READER.columns([path], {})
    spec = ReadSpec(schema, schema.names, frozenset(needed), where, **options)
    return list(READER.read(path, 0, todo, spec))


NS = pa.scalar(1_600_000_000_123_456_789, pa.timestamp("ns"))
ODD = {
    "nested": pa.array([{"a": [1, None]}, None], pa.struct([("a", pa.list_(pa.int32()))])),
    "dictionary": pa.array(["x", "y"]).dictionary_encode(),
    "large": pa.array(["x", None], pa.large_string()),
    "view": pa.array(["x", "y"], pa.string_view()),
    "decimal": pa.array([decimal.Decimal("1.10"), None], pa.decimal128(5, 2)),
    "ns": pa.array([NS.value, None], pa.timestamp("ns")),
    "date": pa.array([datetime.date(2026, 1, 2), None]),
    "binary": pa.array([b"\xff", None]),
    "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
    "null": pa.nulls(2),
    "a.b": pa.array([1, 2], pa.uint64()),
}


@pytest.mark.parametrize("name", list(ODD))
def test_every_type_passes_through_unchanged(tmp_path, name):
    table = pa.table({name: ODD[name], "n": [1, 2]})
    path = write(tmp_path, table)
    (batch,) = read(path, Ranges.until(2), where="n > 1")
    assert batch.carried.schema.field(name).type == ODD[name].type
    assert batch.carried.column(name).equals(ODD[name][1:])
    (whole,) = read(path, Ranges.until(2))
    assert whole.carried.column(name).equals(ODD[name])


def test_templates_see_python_values_and_nanoseconds_as_text(tmp_path):
    path = write(tmp_path, pa.table({name: ODD[name] for name in ("ns", "nested", "dictionary")}))
    (batch,) = read(path, Ranges.until(1), needed=["ns", "nested", "dictionary"])
    assert batch.values == [
        {"ns": "2020-09-13 12:26:40.123456789", "nested": {"a": [1, None]}, "dictionary": "x"}
    ]


def test_row_groups_without_wanted_rows_are_not_read(tmp_path):
    table = pa.table({"s": [f"{n:0100}" for n in range(1000)]})
    path = write(tmp_path, table, row_group_size=100, compression="none", use_dictionary=False)
    with open(path, "r+b") as file:  # noqa: PTH123
        file.seek(pq.ParquetFile(path).metadata.row_group(4).column(0).data_page_offset)
        file.write(b"\xff" * 50)
    wanted = Ranges([(0, 400), (550, 560)])
    batches = read(path, wanted)
    assert [row for batch in batches for row in batch.rows] == list(wanted)
    with pytest.raises(SourceError, match="is not readable as Parquet"):
        read(path, Ranges([(450, 451)]))


def test_nothing_is_read_after_the_last_wanted_row(tmp_path):
    """Of 16 MiB in one row group; the reader reads 8 MiB ahead."""
    table = pa.table({"s": [f"{n:016384}" for n in range(1000)]})
    path = write(tmp_path, table, compression="none", use_dictionary=False)
    with open(path, "r+b") as file:  # noqa: PTH123
        file.seek(15 << 20)
        file.write(b"\xff" * 40000)
    assert [batch.rows for batch in read(path, Ranges.until(9), batch_rows=3)] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
    ]
    with pytest.raises(SourceError):
        read(path, Ranges.of([1, 999]))


def test_a_large_row_group_makes_late_rows_dear(tmp_path, monkeypatch):
    path = write(tmp_path, pa.table({"a": range(1000)}), row_group_size=500)
    size = pq.ParquetFile(path).metadata.row_group(0).total_byte_size
    for limit in (size, size - 1):
        monkeypatch.setattr(parquet, "_MAX_GROUP_BYTES", limit)
        assert READER.is_seekable(path) == (limit == size)


def test_strings_that_are_not_utf8_are_errors_of_their_rows(tmp_path):
    bad = pa.array([b"x", b"\xff", None]).view(pa.string())
    path = write(tmp_path, pa.table({"s": bad, "n": [1, 2, 3]}))
    (batch,) = read(path, Ranges.until(3), needed=["s"], where="s LIKE 'x%'")
    assert {at: (e.error_type, e.error) for at, e in batch.errors.items()} == {
        1: ("invalid_utf8", f"{path}: row 1: column 's' is not UTF-8")
    }
    assert (batch.rows, batch.skipped) == ([0, 1], Ranges.of([2]))
    assert batch.carried.to_pylist() == [{"s": "x", "n": 1}, {"s": None, "n": 2}]
    assert batch.values == [{"s": "x"}, None]


def test_repeated_column_names_are_refused(tmp_path):
    path = write(tmp_path, pa.table([[1], [2], [3]], names=["a", "b", "a"]))
    with pytest.raises(SourceError, match=r"repeats the columns \['a'\], expected every name once"):
        READER.columns([path], {})


def test_files_that_differ_in_a_column_that_is_used_are_refused_with_the_difference(tmp_path):
    one = write(tmp_path, pa.table({"a": [1], "b": ["x"]}), "1.parquet")
    two = write(tmp_path, pa.table({"a": [1.5], "c": ["x"]}), "2.parquet")
    columns = READER.columns([one, two], {})
    with pytest.raises(SourceError) as caught:
        agreed(columns, InputConfig(path=one), lambda _: set())
    assert str(caught.value) == (
        f"{two}: has other columns than {one}: 'a' is double here, int64 there, "
        "'b' is absent here, string there, 'c' is string here, absent there; "
        "input.columns may leave columns out"
    )


def test_metadata_and_column_order_make_no_difference_but_json_marks_stay(tmp_path):
    marked = pa.schema(
        [
            pa.field("a", pa.string(), metadata={**JSON_METADATA, b"x": b"y"}),
            pa.field("b", pa.int64(), nullable=False),
        ]
    )
    one = write(tmp_path, pa.table({"a": ["1"], "b": [1]}, schema=marked), "1.parquet")
    two = write(tmp_path, pa.table({"b": [1], "a": ["1"]}), "2.parquet")
    schema = READER.columns([one, two], {})
    assert schema.field("a").metadata == JSON_METADATA
    assert schema.field("b").equals(pa.field("b", pa.int64()), check_metadata=True)


def test_a_type_that_the_file_does_not_have_is_refused(tmp_path):
    path = write(tmp_path, pa.table({"a": [1]}))
    with pytest.raises(SourceError, match="column 'a' is int64, not string; Parquet keeps its"):
        READER.columns([path], {"a": "string"})
    assert READER.columns([path], {"a": "int64"}).names == ["a"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is not Parquet: it is empty"),
        (b"\x1f\x8b\x08", "is not Parquet: it looks like gzip"),
        (b"hello", "is not Parquet: no PAR1"),
        (b"PARE" * 10, "encrypted Parquet, which cannot be read"),
    ],
)
def test_what_is_not_parquet_is_refused(tmp_path, content, text):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=text):
        READER.sniff(str(path))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"x" * 100, b"PAR1xxxx\xff\0\0\0PAR1"])
def test_damaged_footers_are_refused(tmp_path, content):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(SourceError, match="is not readable as Parquet: "):
        READER.columns([str(path)], {})
    with pytest.raises(SourceError, match="is not readable as Parquet: "):
        READER.scan(str(path))


def test_the_digest_sees_a_value_changed_in_place(tmp_path):
    tables = [pa.table({"a": [n] * 10}) for n in (1, 2)]
    paths = [write(tmp_path, table, f"{n}.parquet") for n, table in enumerate(tables)]
    digests = {READER.scan(path).digest for path in paths}
    assert len(digests) == 2


def test_a_file_with_columns_and_no_rows_is_fine(tmp_path):
    path = write(tmp_path, pa.table({"a": pa.array([], pa.int64())}))
    assert READER.sniff(path) is None
    assert READER.scan(path).num_rows == 0
    assert read(path, Ranges()) == []


LONG = "x" * (MAX_LINE_BYTES + 1)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", LONG, "c"]),
        pa.array(["a", LONG, "c"]).dictionary_encode(),
        pa.array(["a" * 20, LONG, "c" * 20], pa.string_view()),
        pa.array([["a"], [LONG[:-1], "x"], None]),
        pa.array([{"x": "a"}, {"x": LONG}, None]),
    ],
    ids=["string", "dictionary", "view", "list", "struct"],
)
def test_a_value_that_is_too_long_is_its_rows_error_and_is_not_carried(tmp_path, column):
    path = write(tmp_path, pa.table({"v": column, "n": [1, 2, 3]}))
    batches = read(path, Ranges.until(3), needed=["n"])
    errors = {batch.rows[at]: error for batch in batches for at, error in batch.errors.items()}
    assert {row: error.error_type for row, error in errors.items()} == {1: "value_too_long"}
    assert errors[1].error == f"{path}: row 1: column 'v' is longer than 64 MiB"
    carried = pa.concat_arrays([batch.carried.column("v") for batch in batches])
    assert carried.type == column.type
    assert carried.to_pylist() == [column[0].as_py(), None, column[2].as_py()]


def test_large_values_are_decoded_a_few_at_a_time(tmp_path):
    table = pa.table({"v": [str(at) * (4 << 20) for at in range(1, 9)] * 4})
    path = write(tmp_path, table, use_dictionary=False)
    sizes = [batch.carried.nbytes for batch in read(path, Ranges.until(32))]
    assert max(sizes) <= 2 * MAX_BATCH_BYTES
    assert sum(sizes) >= 32 * 4 << 20


NOT_TEXT = pa.array([b"x", b"\xff", b"y"]).view(pa.string())


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (NOT_TEXT, "invalid_utf8"),
        (pa.StructArray.from_arrays([NOT_TEXT], ["s"]), "invalid_utf8"),
        (pa.ListArray.from_arrays([0, 1, 2, 3], NOT_TEXT), "invalid_utf8"),
        (pa.array([0, 86_400_000, 1], pa.int32()).view(pa.time32("ms")), "bad_value"),
    ],
)
def test_a_value_that_its_type_does_not_allow_is_its_rows_error(tmp_path, column, kind):
    path = write(tmp_path, pa.table({"v": column, "n": [1, 2, 3]}))
    (batch,) = read(path, Ranges.until(3), needed=["n"])
    assert {at: error.error_type for at, error in batch.errors.items()} == {1: kind}
    carried = batch.carried.column("v")
    carried.validate(full=True)
    assert carried.type == column.type
    assert carried.is_null().to_pylist() == [False, True, False]
