"""One type for a column that files hold by different ones: it holds every value of both."""

from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.source.shards import common_type
from batchgen.source.values import to_python
from tests.odd import arrays

WIDTHS = [
    ((pa.string(), pa.large_string(), pa.string_view()), pa.large_string()),
    ((pa.string(), pa.dictionary(pa.int8(), pa.string())), pa.string()),
    ((pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.string())), pa.string()),
    ((pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(3)), pa.large_binary()),
    ((pa.string(), pa.binary()), pa.large_binary()),
    ((pa.int8(), pa.int64(), pa.uint32()), pa.int64()),
    ((pa.uint8(), pa.uint16()), pa.uint16()),
    ((pa.uint8(), pa.int8()), pa.int16()),
    ((pa.float16(), pa.float32(), pa.float64()), pa.float64()),
    ((pa.list_(pa.int32()), pa.large_list(pa.int64())), pa.large_list(pa.int64())),
    ((pa.list_(pa.int32()), pa.list_(pa.int64())), pa.list_(pa.int64())),
    ((pa.list_(pa.int32(), 2), pa.list_(pa.int64(), 2)), pa.list_(pa.int64(), 2)),
    ((pa.list_(pa.int32(), 2), pa.list_(pa.int32(), 3)), pa.large_list(pa.int32())),
    ((pa.list_view(pa.null()), pa.list_(pa.string())), pa.large_list(pa.string())),
    ((pa.timestamp("s"), pa.timestamp("us"), pa.timestamp("ms")), pa.timestamp("us")),
    ((pa.timestamp("us", "UTC"), pa.timestamp("us", "+00:00")), pa.timestamp("us", "UTC")),
    ((pa.date32(), pa.date64()), pa.date64()),
    ((pa.time32("s"), pa.time64("us")), pa.time64("us")),
    ((pa.duration("s"), pa.duration("ns")), pa.duration("ns")),
    ((pa.decimal128(5, 2), pa.decimal128(9, 4)), pa.decimal128(9, 4)),
    ((pa.decimal128(38, 0), pa.decimal128(5, 2)), pa.decimal256(40, 2)),
    (
        (pa.struct([("a", pa.int32())]), pa.struct([("a", pa.int64())])),
        pa.struct([("a", pa.int64())]),
    ),
    (
        (pa.map_(pa.string(), pa.int8()), pa.map_(pa.large_string(), pa.null())),
        pa.map_(pa.large_string(), pa.int8()),
    ),
    ((pa.uuid(), pa.binary(16)), pa.binary(16)),
]
UNLIKE = [
    (pa.int64(), pa.float64()),
    (pa.int64(), pa.uint64()),
    (pa.string(), pa.int64()),
    (pa.timestamp("us"), pa.timestamp("us", "UTC")),
    (pa.timestamp("us", "Europe/Berlin"), pa.timestamp("us", "UTC")),
    (pa.list_(pa.string()), pa.list_(pa.int64())),
    (pa.struct([("a", pa.string())]), pa.struct([("a", pa.int64())])),
    (pa.list_(pa.string()), pa.string()),
    (pa.decimal256(76, 0), pa.decimal128(5, 2)),
]


@pytest.mark.parametrize(("kinds", "wanted"), WIDTHS, ids=lambda it: str(it)[:40])
def test_kinds_of_one_column_have_one_type_in_any_order(kinds, wanted):
    for order in (sorted(kinds, key=str), sorted(kinds, key=str, reverse=True)):
        found = order[0]
        for kind in [*order[1:], pa.null(), *order]:
            found = common_type(found, kind)
        assert found == wanted


@pytest.mark.parametrize(("one", "other"), UNLIKE, ids=str)
def test_unlike_types_have_none(one, other):
    assert common_type(one, other) is None
    assert common_type(other, one) is None


@given(arrays(), st.sampled_from([kind for kinds, _ in WIDTHS for kind in kinds]))
@settings(max_examples=300)
def test_what_has_a_common_type_can_be_cast_to_it_and_a_type_is_like_itself(column, kind):
    assert common_type(column.type, column.type) == column.type
    assert common_type(column.type, pa.null()) == column.type
    found = common_type(column.type, kind)
    if found is not None:
        assert len(column.slice(0, 0).cast(found)) == 0
        assert len(pa.array([], kind).cast(found)) == 0


def test_values_stay_exact():
    for values, kind, wider in (
        ([Decimal("1.10"), None], pa.decimal128(5, 2), pa.decimal128(9, 4)),
        ([2**31 - 1], pa.int32(), pa.int64()),
        ([0.1], pa.float32(), pa.float64()),
    ):
        narrow = pa.array(values, kind)
        assert to_python(narrow.cast(wider)) == to_python(narrow)
