"""Parsed JSON -> values for Arrow, as closures: compiled once for a schema, run for each row.

Each takes any value but null, which its caller leaves null, and raises `Unfit` for what the
column cannot hold.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, NoReturn

import orjson
import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Convert = Callable[[Any], Any]

JSON_TEXT = pa.string()
"""The type of what `json_text` returns."""

_FOUND = {
    type(None): "null",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


class Unfit(Exception):  # noqa: N818 - never leaves the package
    """A value that its column cannot hold."""

    def __init__(self, why: str) -> None:
        self.why = why
        self.steps: list[str] = []
        """The way to it, innermost first."""


def step(name: str) -> str:
    """A property as a step of a path: `.name`, or `['odd name']`."""
    return f".{name}" if _PLAIN_KEY.fullmatch(name) else f"[{name!r}]"


def found(value: Any) -> str:  # noqa: ANN401
    """What a value is, for messages."""
    return _FOUND.get(type(value), type(value).__name__)


def _refuse(expected: str, value: Any) -> NoReturn:  # noqa: ANN401
    msg = f"expected {expected}, found {found(value)}"
    raise Unfit(msg)


def string(value: Any) -> str:  # noqa: ANN401
    """Take a string of whole characters."""
    if not isinstance(value, str):
        _refuse("a string", value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            msg = "expected a string, found one with half a character (a lone surrogate)"
            raise Unfit(msg) from None
    return value


def integer(value: Any) -> int:  # noqa: ANN401
    """Take an integer of 64 bits; JSON Schema calls 1.0 one."""
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int:
        _refuse("an integer", value)
    if not -(2**63) <= value < 2**63:
        msg = "expected an integer of 64 bits, found a larger one"
        raise Unfit(msg)
    return value


def number(value: Any) -> float:  # noqa: ANN401
    """Take a number as a float of 64 bits."""
    if type(value) is float:
        return value
    if type(value) is not int:
        _refuse("a number", value)
    try:
        return float(value)
    except OverflowError:
        msg = "expected a number of 64 bits, found a larger one"
        raise Unfit(msg) from None


def boolean(value: Any) -> bool:  # noqa: ANN401
    """Take true or false."""
    if value is True or value is False:
        return value
    _refuse("a boolean", value)


def json_text(value: Any) -> str:  # noqa: ANN401
    """Write any JSON as text."""
    try:
        written = orjson.dumps(value)
    except TypeError:  # An integer over 64 bits, half a character, more than 254 levels.
        return _slow_json_text(value)
    if b"null" in written and not _is_finite(value):  # orjson writes them as null.
        msg = "expected JSON, found NaN or an infinite number"
        raise Unfit(msg)
    return written.decode()


def _slow_json_text(value: Any) -> str:  # noqa: ANN401
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (ValueError, RecursionError) as error:
        msg = f"expected JSON that can be written, found otherwise: {error}"
        raise Unfit(msg) from None


def _is_finite(value: Any) -> bool:  # noqa: ANN401
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        value = list(value.values())
    return not isinstance(value, list) or all(map(_is_finite, value))


def array_of(convert: Convert) -> Convert:
    """Make the conversion of an array from that of its items."""

    def array(value: Any) -> list[Any]:  # noqa: ANN401
        if not isinstance(value, list):
            _refuse("an array", value)
        converted: list[Any] = []
        try:
            for item in value:
                converted.append(None if item is None else convert(item))  # noqa: PERF401
        except Unfit as unfit:
            unfit.steps.append(f"[{len(converted)}]")
            raise
        return converted

    return array


def object_of(fields: Mapping[str, Convert]) -> Convert:
    """Make the conversion of an object from those of its properties; an absent one is null."""
    converts = list(fields.items())
    known = frozenset(fields)

    def object_(value: Any) -> dict[str, Any]:  # noqa: ANN401
        if not isinstance(value, dict):
            _refuse("an object", value)
        if not value.keys() <= known:
            unknown = repr(next(key for key in value if key not in known))
            short = unknown if len(unknown) <= 80 else f"{unknown[:80]}..."
            msg = f"unknown key {short}, which the column cannot hold"
            raise Unfit(msg)
        converted = {}
        name = ""
        try:
            for name, convert in converts:
                item = value.get(name)
                converted[name] = None if item is None else convert(item)
        except Unfit as unfit:
            unfit.steps.append(step(name))
            raise
        return converted

    return object_
