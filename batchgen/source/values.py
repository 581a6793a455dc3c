"""Arrow values as prompts see them: Python's, by a way that no value can fail.

What Python has a type for comes as that, as pyarrow gives it. The rest is text:

- Binary is text, as old Hive, Impala and Spark write it, where it is UTF-8; else `NotText`, whose
  printing is the row's error.
- A date or time beyond Python's years 1 to 9999, or finer than microseconds, is written as Arrow
  writes it: `10183-09-21`, `2024-01-31 12:00:00.123456789`.
- A time in a zone that is not known here is told in UTC; one that is written without a colon
  (`+0530`) or as `Z` is known.

Nothing here depends on whether pandas, pytz or a time zone database is installed, but for the
names of zones.
"""

from __future__ import annotations

import datetime as dt
import zoneinfo
from collections.abc import Callable
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.core.data import NotText, parts_of

_PER_S = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DAY_S = 86_400
_ERA_DAYS = 146_097
"""Days of 400 years, after which the Gregorian calendar repeats."""
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether values of a type are bytes, or hold some."""
    return any(
        pa.types.is_binary(part)
        or pa.types.is_large_binary(part)
        or pa.types.is_binary_view(part)
        or pa.types.is_fixed_size_binary(part)
        for part in parts_of(kind)
    )


def to_python(column: pa.Array) -> list[Any]:
    """Return a column's values for templates; see above."""
    kinds = list(parts_of(column.type))
    if pa.types.is_temporal(column.type) and getattr(column.type, "unit", None) == "ns":
        return _told_by_arrow(column)
    is_odd = any(getattr(kind, "unit", None) == "ns" for kind in kinds)
    if not is_odd and not holds_bytes(column.type):
        try:
            values: list[Any] = column.to_pylist()
        except Exception:  # noqa: BLE001, S110 - one value fails by any error; it is found below
            pass
        else:
            return values
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        try:
            return pc.cast(column, pa.large_string()).to_pylist()  # type: ignore[no-any-return]
        except pa.ArrowInvalid:
            pass  # One of them is not UTF-8.
    return [_value(scalar) for scalar in column]


def _told_by_arrow(column: pa.Array) -> list[Any]:
    """Nanoseconds as text, all of a column alike."""
    try:
        return pc.cast(column, pa.string()).to_pylist()  # type: ignore[no-any-return]
    except pa.ArrowException:  # A zone that Arrow does not know.
        return [None if not it.is_valid else _time_text(it.value, it.type) for it in column]


def _value(scalar: pa.Scalar) -> Any:  # noqa: ANN401 - of any type
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.UnionScalar | pa.RunEndEncodedScalar | pa.DictionaryScalar):
        return _value(scalar.value)
    if isinstance(scalar, pa.StructScalar | pa.ListScalar):  # Any kind of list, maps too.
        return _nested(scalar)
    if isinstance(scalar, pa.ExtensionScalar):
        found = _leaf(scalar, lambda: _value(scalar.value))
    elif pa.types.is_temporal(scalar.type):
        found = _leaf(scalar, lambda: _time(scalar.value, scalar.type))
    else:
        found = _leaf(scalar, lambda: scalar.as_buffer().to_pybytes())
    return _text(found) if isinstance(found, bytes) else found


def _nested(scalar: pa.StructScalar | pa.ListScalar) -> Any:  # noqa: ANN401
    if isinstance(scalar, pa.StructScalar):
        return {field.name: _value(scalar[at]) for at, field in enumerate(scalar.type)}
    if isinstance(scalar, pa.MapScalar):
        return [(_value(entry[0]), _value(entry[1])) for entry in scalar.values]
    return [_value(item) for item in scalar.values]


def _leaf(scalar: pa.Scalar, otherwise: Callable[[], Any]) -> Any:  # noqa: ANN401
    """A value as pyarrow gives it, else by another way."""
    kind = scalar.type
    if getattr(kind, "unit", None) == "ns":
        # pyarrow would give pandas' types where pandas is installed.
        if scalar.value % 1000:
            return otherwise()
        scalar = pa.scalar(scalar.value // 1000, pa.int64()).cast(_in_microseconds(kind))
    try:
        return scalar.as_py()
    except Exception:  # noqa: BLE001 - by whatever error: overflow, a zone, a library that lacks
        return otherwise()


def _in_microseconds(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    return pa.duration("us") if pa.types.is_duration(kind) else pa.time64("us")


def _text(value: bytes) -> str | NotText:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return NotText(value)


def _time(value: int, kind: pa.DataType) -> dt.datetime | str:
    """A moment in a zone that pyarrow does not know, else the text of what Python cannot hold."""
    if pa.types.is_timestamp(kind) and kind.tz and kind.unit != "ns":
        try:
            since = dt.timedelta(microseconds=value * 10**6 // _PER_S[kind.unit])
            return (_EPOCH + since).astimezone(_zone(kind.tz))
        except OverflowError:
            pass
    return _time_text(value, kind)


def _time_text(value: int, kind: pa.DataType) -> str:
    if pa.types.is_date32(kind):
        return _date_text(value)
    if pa.types.is_date64(kind):
        return _date_text(value // (_DAY_S * 1000))
    seconds, parts = divmod(value, _PER_S[kind.unit])
    digits = len(str(_PER_S[kind.unit])) - 1
    fraction = f".{parts:0{digits}d}" if parts or kind.unit == "ns" else ""
    if pa.types.is_duration(kind):
        days, seconds = divmod(seconds, _DAY_S)
        start = f"{days} day{'' if abs(days) == 1 else 's'}, " if days else ""
        return start + _clock(seconds, fraction if parts else "", hours="d")
    if pa.types.is_time(kind):
        return _clock(seconds, fraction)
    offset_s, suffix = (0, "") if kind.tz is None else _offset(kind.tz, seconds)
    if kind.unit == "ns":  # As Arrow writes it, whether or not it knows the zone on this machine.
        suffix = "Z" if kind.tz == "UTC" else suffix.replace(":", "")
    days, seconds = divmod(seconds + offset_s, _DAY_S)
    return f"{_date_text(days)} {_clock(seconds, fraction)}{suffix}"


def _date_text(days: int) -> str:
    """Write a date by its days since 1970, in the Gregorian calendar, of any year."""
    era, day = divmod(days + dt.date(1970, 1, 1).toordinal() - 1, _ERA_DAYS)
    date = dt.date.fromordinal(day + 1)
    year = date.year + 400 * era
    return f"{'-' if year < 0 else ''}{abs(year):04d}-{date:%m-%d}"


def _clock(seconds: int, fraction: str, hours: str = "02d") -> str:
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60:{hours}}:{minutes % 60:02d}:{seconds:02d}{fraction}"


def _offset(name: str, seconds: int) -> tuple[int, str]:
    """A zone's seconds east of UTC at a moment, and how that is written; of UTC if unknown."""
    zone = _zone(name)
    try:
        moment = dt.datetime.fromtimestamp(seconds, dt.UTC).astimezone(zone)
        found = moment.utcoffset() or dt.timedelta()
    except (OverflowError, ValueError, OSError):
        found = dt.timedelta()
    total = int(found.total_seconds())
    sign, (hours, minutes) = "-" if total < 0 else "+", divmod(abs(total) // 60, 60)
    return total, f"{sign}{hours:02d}:{minutes:02d}"


@cache
def _zone(name: str) -> dt.tzinfo:
    try:
        if name[:1] in {"+", "-"} or name == "Z":
            return dt.datetime.fromisoformat(f"2000-01-01T00:00:00{name}").tzinfo or dt.UTC
        return zoneinfo.ZoneInfo(name)
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        return dt.UTC
