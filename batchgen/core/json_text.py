"""JSON as text: parsed strictly, with integers of any length kept exact."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import orjson

MAX_LEVELS = 64
"""Objects and arrays inside each other in a schema, or in a row's own sampling parameters.
jsonschema recurses, some ten frames a level, and Python stops at a thousand."""

_LONG_INTEGER = re.compile(r"[0-9]{19}")  # orjson makes floats of those over 64 bits,
_HUGE_INTEGER = re.compile(r"[0-9]{300}")  # and refuses those over what a float can be.


def parse_json(text: str | bytes) -> Any:  # noqa: ANN401 - any JSON
    """Parse JSON as strictly as orjson does, with integers of any length kept exact.

    Raises:
        ValueError: Not JSON: also NaN, infinite numbers, half a character, too many levels.
    """
    if isinstance(text, bytes):
        text = text.decode()
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        if _HUGE_INTEGER.search(text) is None:
            raise
    else:
        if _LONG_INTEGER.search(text) is None:
            return value
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        json.dumps(value, ensure_ascii=False).encode()  # Half a character: UnicodeEncodeError.
    except RecursionError:
        msg = "too many levels, beside an integer of 19 digits or more"
        raise ValueError(msg) from None
    return value


def _finite(written: str) -> float:
    number = float(written)
    if not math.isfinite(number):
        msg = f"{written} is no JSON number of 64 bits"
        raise ValueError(msg)
    return number


def check_levels(value: object) -> None:
    """Refuse what is nested more than `MAX_LEVELS` deep, before anything recurses into it.

    Raises:
        ValueError: It is.
    """
    level = [value]
    for _ in range(MAX_LEVELS + 1):
        level = [item for parent in level for item in _children(parent)]
        if not level:
            return
    msg = f"more than {MAX_LEVELS} objects and arrays inside each other"
    raise ValueError(msg)


def _children(value: object) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
