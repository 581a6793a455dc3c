"""JSON objects of a model's files: what anyone may have written, or a broken download left."""

from __future__ import annotations

import json
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_BYTES = 256 << 20
"""The largest files of this kind, indexes of models with many experts, have some 10 MB."""
MAX_DEPTH = 32
"""Of objects and lists in each other; a config.json has five or so."""


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: It is something else, or nested deeper than Python can follow.
    """
    try:
        found = json.loads(data)
    except RecursionError as error:
        msg = "its objects and lists are nested too deep"
        raise ValueError(msg) from error
    if not isinstance(found, dict):
        msg = f"it holds no JSON object but {short(found)}"
        raise ValueError(msg)  # noqa: TRY004 - of what a file holds
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file with an object in it, nested no deeper than `MAX_DEPTH`.

    Raises:
        ConfigError: It is absent, no file, too large or something else; names it and says why.
    """
    try:
        return _read(path)
    except (OSError, ValueError) as error:
        raise damaged(path, f"cannot be read: {error}") from error


def damaged(path: Path, why: str) -> ConfigError:
    """The error for a file of a model.

    Args:
        path: Of the file.
        why: Follows its name.
    """
    return ConfigError("model.name", [f"{path} {why}; fetch the model again"])


def _read(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if not path.is_file():
        msg = "it is no file"  # A pipe would be waited for, for ever.
        raise ValueError(msg)
    if size > MAX_BYTES:
        msg = f"it has {size:,} bytes, expected {MAX_BYTES:,} at most"
        raise ValueError(msg)
    found = parse_object(path.read_bytes())
    if _is_deeper(found, MAX_DEPTH):
        msg = f"its objects and lists are nested deeper than {MAX_DEPTH}"
        raise ValueError(msg)
    return found


def _is_deeper(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [inner for item in level for inner in _inside(item)]
    return bool(level)


def _inside(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value
