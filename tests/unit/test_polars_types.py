"""What people look at may be of any type that Parquet holds, whether polars has it or not."""

from __future__ import annotations

import datetime as dt
import decimal

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.core.data import with_polars_types
from batchgen.core.errors import OutputError
from batchgen.storage import LocalStorage
from batchgen.store.result_files import scan
from batchgen.views.rows import readable

D = decimal.Decimal
MOMENT = dt.datetime(2024, 5, 1, 12, 30, 0, 250_000, tzinfo=dt.UTC)


def zoned(name: str, unit: str = "us") -> pa.DataType:
    return pa.timestamp(unit, name)


LACKING = {
    "an offset": (zoned("+05:30"), [MOMENT, None], [MOMENT, None]),
    "an offset without a colon": (zoned("+0530", "ms"), [MOMENT], [MOMENT]),
    "Z": (zoned("Z", "s"), [MOMENT.replace(microsecond=0)], [MOMENT.replace(microsecond=0)]),
    "a zone of nowhere": (zoned("Mars/Base"), [MOMENT], [MOMENT]),
    "wide": (pa.decimal256(76, 2), [D("1.50"), None], ["1.50", None]),
    "wide and few digits": (pa.decimal256(20, 2), [D("1.50")], [D("1.50")]),
    "a view": (pa.list_view(pa.int64()), [[1], None, [], [2, 3]], [[1], None, [], [2, 3]]),
    "a large view": (pa.large_list_view(pa.string()), [["a", None]], [["a", None]]),
    "a view of views": (
        pa.list_view(pa.list_view(pa.int8())),
        [[[1], [2, 3]], [None]],
        [[[1], [2, 3]], [None]],
    ),
    "a view of moments": (pa.list_view(zoned("+01:15")), [[MOMENT]], [[MOMENT]]),
    "a list": (pa.list_(pa.decimal256(50, 1)), [[D("2.5")], None], [["2.5"], None]),
    "pairs": (pa.list_(zoned("-03:30"), 2), [[MOMENT, MOMENT]], [[MOMENT, MOMENT]]),
    "a struct": (
        pa.struct([("a", pa.list_(zoned("Z"))), ("b", pa.int8())]),
        [{"a": [MOMENT], "b": 1}, None],
        [{"a": [MOMENT], "b": 1}, None],
    ),
    "views inside": (
        pa.struct([("a", pa.list_(pa.list_view(pa.int8())))]),
        [{"a": [[1], None, [2, 3]]}, None, {"a": None}, {"a": [[4]]}],
        [{"a": [[1], None, [2, 3]]}, None, {"a": None}, {"a": [[4]]}],
    ),
    "a map": (
        pa.map_(pa.string(), pa.decimal256(50, 1)),
        [[("k", D("2.5"))]],
        [[["k", "2.5"]]],
    ),
    "a year beyond Python's": (
        pa.timestamp("us", "+01:15"),
        pa.array([2**60], pa.timestamp("us", "+01:15")),
        ["38504-08-17 21:30:06.846976+00:00"],
    ),
}


def held(folder, values, kind, num_files=1):
    """Rows of a file each, beside a column that polars has."""
    column = values if isinstance(values, pa.Array) else pa.array(values, kind)
    names = [f"{at}.parquet" for at in range(num_files)]
    for name in names:
        table = pa.table({"at": list(range(len(column))), "odd": column})
        pq.write_table(table, folder / name)
    return scan(LocalStorage(folder), names)


@pytest.mark.parametrize(("kind", "given", "shown"), LACKING.values(), ids=LACKING.keys())
def test_a_column_that_polars_lacks_is_shown(tmp_path, kind, given, shown):
    assert with_polars_types(pa.schema([("odd", kind)])).field("odd").type != kind
    frame = held(tmp_path, given, kind, num_files=2)
    rows = readable(frame.collect())
    assert [row["odd"] for row in rows] == shown * 2
    # However polars asks for them.
    num = len(shown)
    assert frame.select("at").collect()["at"].to_list() == [*range(num)] * 2
    assert frame.select(pl.len()).collect().item() == 2 * num
    assert frame.with_row_index("n").collect()["n"].to_list() == [*range(2 * num)]
    assert len(frame.filter(pl.col("at") == 0).collect()) == 2
    assert readable(frame.head(1).collect()) == rows[:1]
    assert readable(frame.slice(2 * num - 1, 1).collect()) == rows[-1:]
    assert len(frame.select(pl.struct("odd").hash()).collect(engine="streaming")) == 2 * num


PLAIN = [
    *(
        pa.bool_(),
        pa.int8(),
        pa.uint64(),
        pa.float16(),
        pa.float64(),
        pa.string(),
        pa.string_view(),
    ),
    *(pa.large_string(), pa.binary(), pa.binary_view(), pa.binary(4), pa.date32(), pa.date64()),
    *(pa.time32("s"), pa.time64("ns"), pa.timestamp("ns"), zoned("UTC"), zoned("Europe/Berlin")),
    *(pa.duration("s"), pa.decimal32(5, 2), pa.decimal64(10, 2), pa.decimal128(38, 2)),
    *(pa.list_(pa.int8()), pa.large_list(pa.string()), pa.list_(pa.int8(), 2), pa.null()),
    *(pa.struct([("a", pa.int8())]), pa.map_(pa.string(), pa.int8()), pa.uuid(), pa.json_()),
    *(pa.dictionary(pa.int8(), pa.string()), pa.bool8(), pa.opaque(pa.int8(), "a", "b")),
    pa.fixed_shape_tensor(pa.int8(), [2]),
]


@pytest.mark.parametrize("kind", PLAIN, ids=str)
def test_a_column_that_polars_has_is_read_by_polars_alone(tmp_path, kind):
    schema = pa.schema([("odd", kind)])
    assert with_polars_types(schema) == schema
    frame = held(tmp_path, pa.nulls(2, kind), kind)
    assert [row["odd"] for row in readable(frame.collect())] == [None, None]


def test_a_view_inside_a_map_is_told_and_no_panic(tmp_path):
    kind = pa.map_(pa.string(), pa.list_view(pa.int8()))
    with pytest.raises(OutputError, match=r"map<string, list_view<.*no counterpart in polars"):
        held(tmp_path, [[("a", [1])]], kind).collect()


@given(values=st.lists(st.none() | st.lists(st.none() | st.integers(-128, 127), max_size=3)))
def test_views_of_any_shape_are_lists(values, tmp_path_factory):
    frame = held(tmp_path_factory.mktemp("views"), values, pa.list_view(pa.int8()))
    assert frame.collect()["odd"].to_list() == values


def test_bytes_that_are_no_text_are_shown_as_such():
    frame = pl.DataFrame({"a": [b"caf\xc3\xa9", b"\xff"], "b": [[b"\xfe"], None]})
    assert readable(frame) == [{"a": "caf\u00e9", "b": [b"\xfe"]}, {"a": b"\xff", "b": None}]
