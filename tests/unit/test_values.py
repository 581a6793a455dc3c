"""Arrow values as prompts see them: none fails, and those that Python has are Python's."""

import datetime as dt
import decimal

import pyarrow as pa
import pytest
from hypothesis import given, settings

from batchgen.core.data import NotText, NotTextError
from batchgen.source.values import _time_text, holds_bytes, to_python
from tests.odd import arrays_beyond_parquet

MOMENT = 1_600_000_000_123_456_789


def of(kind: pa.DataType, *values: int) -> pa.Array:
    storage = pa.int32() if kind.bit_width == 32 else pa.int64()
    return pa.array(values, storage).view(kind)


@settings(max_examples=400)
@given(arrays_beyond_parquet())
def test_no_value_fails_and_each_has_its_place(column):
    values = to_python(column)
    assert len(values) == len(column)
    if not pa.types.is_union(column.type):
        assert [value is None for value in values] == column.is_null().to_pylist()


@settings(max_examples=200)
@given(arrays_beyond_parquet())
def test_what_pyarrow_gives_stays_as_it_is(column):
    """But for bytes and nanoseconds. So a prompt of before is the prompt of now."""
    kinds = str(column.type)
    if holds_bytes(column.type) or "ns" in kinds or "binary" in kinds or "dense" in kinds:
        return
    try:
        wanted = column.to_pylist()
    except Exception:  # noqa: BLE001 - pyarrow raises anything
        return
    assert repr(to_python(column)) == repr(wanted)


@pytest.mark.parametrize(
    ("column", "wanted"),
    [
        (of(pa.date32(), 3_000_000, -800_000, 0), ["10183-09-21", "-0221-09-04", "1970-01-01"]),
        (of(pa.date32(), -719_529, -719_893), ["-0001-12-31", "-0001-01-01"]),
        (of(pa.timestamp("us"), 2**62), ["148108-07-06 14:00:27.387904"]),
        (of(pa.timestamp("s"), 253_402_300_800), ["10000-01-01 00:00:00"]),
        (of(pa.timestamp("s", "UTC"), 253_402_300_800), ["10000-01-01 00:00:00+00:00"]),
        (of(pa.timestamp("s", "+0530"), 0), ["1970-01-01 05:30:00+05:30"]),
        (of(pa.timestamp("s", "Z"), 0), ["1970-01-01 00:00:00+00:00"]),
        (of(pa.timestamp("s", "Mars/X"), 0), ["1970-01-01 00:00:00+00:00"]),
        (of(pa.timestamp("ns"), MOMENT), ["2020-09-13 12:26:40.123456789"]),
        (of(pa.timestamp("ns", "Mars/X"), MOMENT), ["2020-09-13 12:26:40.123456789+0000"]),
        (of(pa.duration("s"), 2**40), ["12725829 days, 0:36:16"]),
        (of(pa.duration("s"), 2**60), ["13343998895912 days, 13:56:16"]),
        (of(pa.time64("ns"), 1), ["00:00:00.000000001"]),
        (pa.array([b"Caf\xc3\xa9", None]), ["Café", None]),
        (pa.array([b"abc"], pa.binary(3)), ["abc"]),
        (pa.array([b"abc"], pa.binary_view()), ["abc"]),
        (pa.array([b"abc"]).dictionary_encode(), ["abc"]),
    ],
)
def test_what_python_has_no_type_for_is_text(column, wanted):
    assert [None if it is None else str(it) for it in to_python(column)] == wanted


def test_nested_values_are_read_likewise():
    moments = of(pa.timestamp("ns"), MOMENT, 1000)
    struct = pa.StructArray.from_arrays([moments, pa.array([b"\xc3\xa4", b"\xff"])], ["t", "b"])
    first, second = to_python(struct)
    assert first == {"t": "2020-09-13 12:26:40.123456789", "b": "ä"}
    assert second == {"t": dt.datetime(1970, 1, 1, 0, 0, 0, 1), "b": b"\xff"}  # noqa: DTZ001
    assert isinstance(second["b"], NotText)
    days = of(pa.date32(), 3_000_000)
    keyed = pa.MapArray.from_arrays([0, 1], pa.array([b"k"]), days)
    assert to_python(keyed) == [[("k", "10183-09-21")]]


@pytest.mark.parametrize("form", ["{}", "%s", "{!r}"])
def test_bytes_that_are_no_text_never_become_it(form):
    bad = NotText(b"\xff")
    with pytest.raises(NotTextError):
        form % bad if "%" in form else form.format(bad)
    with pytest.raises(NotTextError):
        str([bad])


def test_decimals_and_infinities_are_pythons():
    numbers = pa.array([decimal.Decimal("1.10")], pa.decimal256(60, 2))
    assert to_python(numbers) == [decimal.Decimal("1.10")]
    assert to_python(pa.array([float("inf"), 1.5], pa.float16())) == [float("inf"), 1.5]


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "+05:30", "-07:00", None])
def test_nanoseconds_are_written_as_arrow_does_where_arrow_cannot(zone):
    """So that a machine without a time zone database makes the same prompts."""
    kind = pa.timestamp("ns", zone)
    assert _time_text(MOMENT, kind) == to_python(of(kind, MOMENT))[0]
