"""Hypothesis strategies: Arrow arrays of every type, with values that Python may not hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
from hypothesis import strategies as st

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

UNITS = ("s", "ms", "us", "ns")
ZONES = (None, "UTC", "Z", "+0530", "-07:30", "Europe/Berlin", "Mars/Olympus")


def _integers(bits: int) -> SearchStrategy[int]:
    most = 2 ** (bits - 1) - 1
    edges = st.sampled_from([-most - 1, -1, 0, 1, 1000, most])
    return edges | st.integers(-most - 1, most)


def _of_integers(kind: pa.DataType, bits: int) -> SearchStrategy[pa.Array]:
    """A type that is integers beneath, of any value."""
    storage = pa.int32() if bits == 32 else pa.int64()
    ranges = _integers(bits)
    if pa.types.is_date64(kind):
        ranges = _integers(32).map(lambda days: days * 86_400_000)  # Whole days.
    values = st.lists(st.none() | ranges, min_size=3, max_size=3)
    return values.map(lambda found: pa.array(found, storage).view(kind))


def _of_python(kind: pa.DataType, values: SearchStrategy[Any]) -> SearchStrategy[pa.Array]:
    return st.lists(st.none() | values, min_size=3, max_size=3).map(
        lambda found: pa.array(found, kind)
    )


def temporal() -> SearchStrategy[pa.Array]:
    """Dates, times and durations of any integer that they may be."""
    kinds = [(pa.date32(), 32), (pa.date64(), 64)]
    kinds += [(pa.timestamp(unit, zone), 64) for unit in UNITS for zone in ZONES]
    kinds += [(pa.duration(unit), 64) for unit in UNITS]
    kinds += [(pa.time32("s"), 32), (pa.time32("ms"), 32), (pa.time64("us"), 64)]
    kinds += [(pa.time64("ns"), 64)]
    return st.sampled_from(kinds).flatmap(lambda one: _of_integers(*one))


def _leaves() -> SearchStrategy[pa.Array]:
    decimals = st.decimals(-999, 999, places=2, allow_nan=False, allow_infinity=False)
    return st.one_of(
        temporal(),
        *(_of_python(kind, st.text(max_size=5)) for kind in (pa.string(), pa.large_string())),
        _of_python(pa.string_view(), st.text(max_size=20)),
        *(_of_python(kind, st.binary(max_size=5)) for kind in (pa.binary(), pa.large_binary())),
        _of_python(pa.binary_view(), st.binary(max_size=20)),
        _of_python(pa.binary(3), st.binary(min_size=3, max_size=3)),
        st.lists(st.binary(max_size=3), min_size=3, max_size=3).map(
            lambda found: pa.array(found, pa.binary()).view(pa.string())
        ),
        *(_of_python(kind, st.floats(width=32)) for kind in (pa.float32(), pa.float64())),
        _of_python(pa.float16(), st.floats(width=16)),
        _of_python(pa.bool_(), st.booleans()),
        _of_python(pa.int64(), _integers(64)),
        _of_python(pa.uint64(), st.integers(0, 2**64 - 1)),
        _of_python(pa.decimal128(5, 2), decimals),
        _of_python(pa.decimal256(60, 2), decimals),
        st.just(pa.nulls(3)),
    )


def _nested(child: SearchStrategy[pa.Array]) -> SearchStrategy[pa.Array]:
    bounds = pa.array([0, 2, None, 3], pa.int32())
    wide = bounds.cast(pa.int64())
    keys = pa.array(["k", "k", "l"])
    is_null = pa.array([False, True, False])
    return st.one_of(
        child.map(lambda it: pa.ListArray.from_arrays(bounds, it)),
        child.map(lambda it: pa.LargeListArray.from_arrays(wide, it)),
        child.map(lambda it: pa.FixedSizeListArray.from_arrays(it, 1)),
        child.map(lambda it: pa.StructArray.from_arrays([it], ["x"], mask=is_null)),
        child.map(lambda it: pa.StructArray.from_arrays([it, keys], ["x", "y"])),
        child.map(lambda it: pa.MapArray.from_arrays(bounds, keys, it)),
    )


def arrays() -> SearchStrategy[pa.Array]:
    """Three values of any type that a Parquet file can have."""
    encoded = _of_python(pa.string(), st.text(max_size=3)) | _of_python(pa.binary(), st.binary())
    leaves = _leaves() | encoded.map(lambda it: it.dictionary_encode())
    return st.recursive(leaves, _nested, max_leaves=3)


def arrays_beyond_parquet() -> SearchStrategy[pa.Array]:
    """The same, and of types that only Arrow has."""
    small = st.integers(-(2**31), 2**31 - 1)
    spans = st.tuples(small, small, _integers(64))
    ends = pa.array([2, 3], pa.int32())
    tags, at = pa.array([0, 1, 0], pa.int8()), pa.array([0, 0, 1], pa.int32())
    return st.one_of(
        arrays(),
        _of_python(pa.month_day_nano_interval(), spans),
        _of_integers(pa.timestamp("ns"), 64).map(
            lambda it: pa.RunEndEncodedArray.from_arrays(ends, it.slice(0, 2))
        ),
        temporal().map(lambda it: pa.UnionArray.from_dense(tags, at, [it, pa.array([b"\xff"])])),
        temporal().map(lambda it: pa.ListViewArray.from_arrays([0, 0, 1], [1, 0, 2], it)),
        st.lists(st.binary(min_size=16, max_size=16), min_size=3, max_size=3).map(
            lambda it: pa.ExtensionArray.from_storage(pa.uuid(), pa.array(it, pa.binary(16)))
        ),
        st.just(pa.StructArray.from_arrays([pa.array([1, 2, 3])] * 2, ["x", "x"])),
    )
