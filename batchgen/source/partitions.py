"""Columns that stand in the names of folders: `lang=de/year=2024/a.parquet`, as Hive writes them.

- Their names and values are decoded as in an URL (`%20`); `__HIVE_DEFAULT_PARTITION__` is null. A
  file that lies in no folder of that key has null as well.
- A column is `int64` if every value is an integer as one is written (`7`, not `07`), else `string`,
  so that no value is changed; `input.types` may say otherwise.
- A column of that name within the files wins over the folder.
- What counts are folders below the one that the path in the job names, or below the part of it
  that is no pattern; and, right above that, folders that are themselves `key=value`. So nothing
  hangs on where the data are mounted.

In a plan, such a column is marked in the metadata of its field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from urllib.parse import unquote_to_bytes

import pyarrow as pa

from batchgen.core.errors import SourceError
from batchgen.source.columns import is_differing, parse_field

_MARK = b"batchgen.partition"
_NULL = "__HIVE_DEFAULT_PARTITION__"
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")


def is_partition_folder(name: str) -> bool:
    """Whether a folder's name is `key=value`."""
    return name.find("=") > 0


def partition_keys(root: str, path: str) -> list[str]:
    """Name the columns that the folders of a file tell.

    Args:
        root: The folder that the job names; a beginning of `path`.
        path: Of the file.
    """
    while is_partition_folder(root.rpartition("/")[2]):
        root = root.rpartition("/")[0]
    folders = path[len(root) :].split("/")[:-1]
    return [_text(name.partition("=")[0], path) for name in folders if is_partition_folder(name)]


def _text(encoded: str, path: str) -> str:
    try:
        text = unquote_to_bytes(encoded.encode()).decode()
    except UnicodeError as error:
        problem = f"lies in a folder {encoded!r}, which is not UTF-8, expected key=value of text"
        raise SourceError(path, problem) from error
    return text


def _value(path: str, key: str) -> str | None:
    """What the folders of a file say of a key; of several the last one."""
    for name in reversed(path.split("/")[:-1]):
        found, _, value = name.partition("=")
        if is_partition_folder(name) and _text(found, path) == key:
            return None if value == _NULL else _text(value, path)
    return None


def with_partitions(
    read: Callable[[Mapping[str, str]], pa.Schema],
    files: Mapping[str, Sequence[str]],
    types: Mapping[str, str],
) -> pa.Schema:
    """Return the columns of files and of their folders.

    Args:
        read: Reads the columns within the files; gets the types that are for these.
        files: Path -> keys, see `partition_keys`.
        types: Of `input.types`.

    Raises:
        SourceError: A type does not fit a folder's value, or what `read` raises.
        ConfigError: What `read` raises.
    """
    keys = dict.fromkeys(key for found in files.values() for key in found)
    if not keys:
        return read(types)
    fields = {field.name: field for field in read(_without(types, keys))}
    others = [key for key in keys if key not in fields or is_differing(fields[key])]
    if any(key in types for key in keys.keys() - others):
        fields = {field.name: field for field in read(_without(types, others))}
    for key in others:
        fields[key] = _field(key, {path: _value(path, key) for path in files}, types.get(key))
    return pa.schema([*fields.values()])


def _without(types: Mapping[str, str], keys: Iterable[str]) -> dict[str, str]:
    gone = set(keys)
    return {name: word for name, word in types.items() if name not in gone}


def _field(key: str, values: Mapping[str, str | None], word: str | None) -> pa.Field:
    known = {value for value in values.values() if value is not None}
    if word is None:
        word = "int64" if known and all(map(_INTEGER.fullmatch, known)) else "string"
    field = parse_field(key, word)
    for path, value in values.items():
        try:
            pa.scalar(value, pa.string()).cast(field.type)
        except pa.ArrowException as error:
            problem = f"lies in a folder {key}={value}, which is no {word}; see input.types"
            raise SourceError(path, problem) from error
    return pa.field(key, field.type, metadata={_MARK: b""})


def is_partition(field: pa.Field) -> bool:
    """Whether a column is told by the names of folders."""
    return bool(field.metadata) and _MARK in field.metadata


def partition_texts(path: str, columns: pa.Schema) -> dict[str, str]:
    """Column -> the text that the folders of a file tell, nulls left out."""
    found = {field.name: _value(path, field.name) for field in columns if is_partition(field)}
    return {name: text for name, text in found.items() if text is not None}


def partition_values(path: str, columns: pa.Schema) -> dict[str, pa.Scalar]:
    """Column -> the value that all rows of a file have, of those that its folders tell."""
    texts = partition_texts(path, columns)
    return {
        field.name: pa.scalar(texts.get(field.name), pa.string()).cast(field.type)
        for field in columns
        if is_partition(field)
    }
