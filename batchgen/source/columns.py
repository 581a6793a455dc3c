"""Column types: the words for them, what a sample of values implies, and values to Arrow.

Invariant: no value is altered on its way to Arrow. What does not fit its column's type exactly
is reported as not fitting, never coerced, rounded or cut.

Two kinds of string columns say in their field's metadata what they are. A `json` column holds every
value as JSON text, strings with their quotes, so that any value comes back exactly. A `text` column
is one of strings in which something else stands here and there: strings are as they are, so that
one odd value costs a reader nothing, and everything else is JSON text.

Columns may also stand in the names of folders: `lang=de/year=2024/a.parquet`, as Hive writes them.

- Their names and values are decoded as in an URL (`%20`); `__HIVE_DEFAULT_PARTITION__` is null. A
  file that lies in no folder of that key has null as well.
- Such a column is `int64` if every value is an integer as one is written (`7`, not `07`), else
  `string`, so that no value is changed; `input.types` may say otherwise.
- A column of that name within the files wins over the folder.
- What counts are folders below the one that the path in the job names, or below the part of it
  that is no pattern; and, right above that, folders that are themselves `key=value`. So nothing
  hangs on where the data are mounted.

In a plan, such a column is marked in the metadata of its field.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from operator import itemgetter
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from batchgen.core.data import is_deeper
from batchgen.core.errors import ConfigError, SourceError, nearest, suggestion
from batchgen.core.expressions import parse_row_test

if TYPE_CHECKING:
    from batchgen.job.model import InputConfig


Word = str
MAX_DEPTH = 254
"""Levels of lists and objects that a value may have; what orjson 3.x writes at most. Where Python's
own json gives up depends on the caller's stack and on its version."""
_TYPE_KEY = b"batchgen.type"
JSON_METADATA = {_TYPE_KEY: b"json"}
_DIFFERS = b"batchgen.differs"

_TYPES: dict[Word, pa.DataType] = {
    "string": pa.string(),
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "json": pa.string(),
    "text": pa.string(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
    "timestamptz": pa.timestamp("us", "UTC"),
}
# type() and not isinstance(): True is an int to isinstance, and to Arrow a float.
_FITTING: dict[pa.DataType, frozenset[type]] = {
    pa.string(): frozenset({str, type(None)}),
    pa.bool_(): frozenset({bool, type(None)}),
    pa.int32(): frozenset({int, type(None)}),
    pa.int64(): frozenset({int, type(None)}),
    pa.float64(): frozenset({float, int, type(None)}),
    pa.date32(): frozenset({dt.date, type(None)}),
    pa.timestamp("us"): frozenset({dt.datetime, type(None)}),
    pa.timestamp("us", "UTC"): frozenset({dt.datetime, type(None)}),
}
_NANOSECONDS = re.compile(r"[.,]\d{7}")
_INT_BITS = {pa.int32(): 31, pa.int64(): 63}
_KIND_WORDS = {str: "string", bool: "bool", int: "integer", float: "float", list: "list"}
BIG = float(2**63)
"""From here on, a float may be an integer that orjson could not hold (it goes to 2**64 - 1)."""
_EXACT_INT = 2**53
"""Up to here every integer is a float, too."""

Kind = str
"""What a value is: a word of `kind_word`, `big integer` beyond 2**53, `huge integer` beyond 64
bits."""


Kinds = dict[Kind, int]
"""What one column of a file holds, nulls left out: with each kind the first such row, from 0."""


def parse_field(name: str, word: Word) -> pa.Field:
    """Make the field of a column from a type's word, one of `string`, `bool`, `int64`, ...

    Raises:
        ValueError: An unknown word.
    """
    if word not in _TYPES:
        raise ValueError(f"unknown type {word!r} for column {name!r}{suggestion(word, _TYPES)}")
    metadata = {_TYPE_KEY: word.encode()} if word in {"json", "text"} else None
    return pa.field(name, _TYPES[word], metadata=metadata)


def is_json(field: pa.Field) -> bool:
    """Whether the column holds JSON text."""
    return _own_type(field) == b"json"


def is_text(field: pa.Field) -> bool:
    """Whether the column holds strings, and JSON text of what is none."""
    return _own_type(field) == b"text"


def _own_type(field: pa.Field) -> bytes | None:
    return (field.metadata or {}).get(_TYPE_KEY)


def differing(name: str, path: str, other: str, problem: str) -> pa.Field:
    """Make the field of a column in which files differ: it may be there if nobody reads it."""
    why = json.dumps([path, other, problem])
    return pa.field(name, pa.null(), metadata={_DIFFERS: why.encode()})


def is_differing(field: pa.Field) -> bool:
    """Whether files differ in the column."""
    return bool(field.metadata) and _DIFFERS in field.metadata


def agreed(
    columns: pa.Schema, table: InputConfig, reads: Callable[[Sequence[str]], Collection[str]]
) -> pa.Schema:
    """Leave out columns in which files differ and that nobody reads.

    Args:
        columns: All of them.
        table: The job's `[input]`.
        reads: Names those that requests are made of, out of all.

    Raises:
        SourceError: One of them is carried, filtered by or made a request of.
    """
    wrong = [field for field in columns if is_differing(field)]
    if not wrong:
        return columns
    names = {*(table.columns or columns.names), *reads(columns.names)}
    with suppress(ValueError):  # It is no expression: refused by whoever checks the job.
        names |= {*parse_row_test("where", table.where or "TRUE").columns}
    problems = [json.loads(field.metadata[_DIFFERS]) for field in wrong if field.name in names]
    if problems:
        path, other, _ = problems[0]
        told = ", ".join(problem for *files, problem in problems if files == [path, other])
        text = f"has other columns than {other}: {told}; input.columns may leave columns out"
        raise SourceError(path, text)
    return pa.schema([field for field in columns if not is_differing(field)])


def type_word(field: pa.Field) -> Word:
    """The type as users write and read it."""
    words = (word for word, data_type in _TYPES.items() if data_type == field.type)
    own = _own_type(field)
    return own.decode() if own is not None else next(words, str(field.type))


def kind_word(value: object, *, by_size: bool = False) -> Kind:
    """What a JSON value is, in a word; of an integer also how large, if that is asked for."""
    if by_size and type(value) is int and abs(value) > _EXACT_INT:
        return "big integer" if fits(pa.int64(), value) else "huge integer"
    return "null" if value is None else _KIND_WORDS.get(type(value), "object")


class Census:
    """What each key of a file's objects holds, told by whole columns, where values cost little.

    A key that is nothing but null is there as well, without a kind.
    """

    def __init__(self) -> None:
        self.columns: dict[str, Kinds] = {}

    def add(
        self,
        rows: Sequence[int],
        objects: Sequence[dict[str, Any]],
        exact: Callable[[int], Mapping[str, Any]],
    ) -> None:
        """Note the kinds of the values of objects.

        Args:
            rows: Where they stand.
            objects: As orjson reads them, who makes floats of integers over 64 bits.
            exact: Index -> the object with all its integers.
        """
        by_names: dict[tuple[str, ...], Sequence[int]] = {}
        # Neither many tuples nor many views are held at once: they wake the garbage collector.
        if len(shapes := set(map(tuple, objects))) == 1:
            by_names[shapes.pop()] = range(len(objects))
        else:
            for at, names in enumerate(map(tuple, objects)):
                by_names.setdefault(names, []).append(at)  # type: ignore[attr-defined]
        for names, places in by_names.items():
            alike = objects if len(by_names) == 1 else [objects[at] for at in places]
            for name in names:
                values = list(map(itemgetter(name), alike))
                found = self.columns.setdefault(name, {})
                for kind, at in _firsts(name, values, places, exact, found):
                    found[kind] = min(rows[places[at]], found.get(kind, rows[places[at]]))


_NUMBERS = {int, float}


def _firsts(
    name: str,
    values: Sequence[Any],
    places: Sequence[int],
    exact: Callable[[int], Mapping[str, Any]],
    known: Collection[Kind],
) -> Iterator[tuple[Kind, int]]:
    """Yield kinds that are not known, and the index of the first such value."""
    types = list(map(type, values))
    distinct = {*types} - {type(None)}
    if distinct & _NUMBERS:
        numbers = values if {*types} <= _NUMBERS else [it for it in values if type(it) in _NUMBERS]
        if not -_EXACT_INT <= min(numbers) <= max(numbers) <= _EXACT_INT:
            for at, value in enumerate(values):
                # What may be an integer over 64 bits.
                is_unsure = type(value) is float and abs(value) >= BIG
                it = exact(places[at])[name] if is_unsure else value
                word = kind_word(it, by_size=True)
                if it is not None and word not in known:
                    yield word, at
            return
    for kind in distinct:
        word = _KIND_WORDS.get(kind, "object")
        if word not in known:
            yield word, types.index(kind)


def kinds_of(keys: Mapping[str, str]) -> dict[str, list[Kind]]:
    """Read kinds as plans have them, joined by commas."""
    return {name: words.split(",") if words else [] for name, words in keys.items()}


def planned(
    censuses: Iterable[Mapping[str, Iterable[Kind]]], types: Mapping[str, Word], path: str
) -> pa.Schema:
    """Decide the columns of files, in the order in which they come, by all kinds that each has.

    Args:
        censuses: Of each file, key -> kinds.
        types: See `override`.
        path: See `override`.

    Raises:
        ConfigError, SourceError: See `override`.
    """
    kinds: dict[str, set[Kind]] = {}
    for census in censuses:
        for name, found in census.items():
            kinds.setdefault(name, set()).update(found)
    fields = {name: _field_of(name, found) for name, found in kinds.items()}
    return override(fields, types, path, may_add=True)


def _field_of(name: str, kinds: Collection[Kind]) -> pa.Field:
    """Choose the narrowest type that holds all values of these kinds; nulls fit all."""
    for word, held in _HELD.items():
        if held.issuperset(kinds):
            return parse_field(name, word)
    return parse_field(name, "text" if "string" in kinds else "json")


_HELD: dict[Word, set[Kind]] = {
    "string": {"string"},
    "bool": {"bool"},
    "int64": {"integer", "big integer"},
    "float64": {"integer", "float"},
}


def moment(data_type: pa.DataType, text: str) -> dt.date:
    """Read a day or a time of one of our types, in ISO 8601; a time with an offset as UTC.

    Raises:
        ValueError: It is none, is finer than microseconds, or has an offset where `timestamp` has
            none, or none where `timestamptz` has one.
    """
    with suppress(ValueError):
        if pa.types.is_date(data_type):
            return dt.date.fromisoformat(text)
        found = dt.datetime.fromisoformat(text)
        if (found.tzinfo is None) == (data_type.tz is None) and not _NANOSECONDS.search(text):
            return found if found.tzinfo is None else found.astimezone(dt.UTC)
    raise ValueError("a text that is not exactly one")


def fits(data_type: pa.DataType, value: object) -> bool:
    """Whether a value goes into a column of this type, one of ours, without any change."""
    if type(value) not in _FITTING[data_type]:
        return False
    if type(value) is int and data_type in _INT_BITS:
        limit = 1 << _INT_BITS[data_type]
        return -limit <= value < limit
    if type(value) is int:
        try:
            # Python compares an int with a float exactly.
            return float(value) == value
        except OverflowError:
            return False
    return True


def schema_text(columns: pa.Schema) -> str:
    """Write columns as plans have them: Arrow's IPC format in base64."""
    return base64.b64encode(columns.serialize().to_pybytes()).decode()


def read_schema(text: str) -> pa.Schema:
    """Read what `schema_text` wrote."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def override(
    found: Mapping[str, pa.Field], types: Mapping[str, str], path: str, *, may_add: bool
) -> pa.Schema:
    """Replace found fields by the user's.

    Args:
        found: Name -> field, in order.
        types: Name -> type word, of some.
        path: For error texts.
        may_add: Whether a name that is not in `found`, nor close to one that is, may be a column
            too rare to be seen.

    Raises:
        ConfigError: Unknown type words, all of them.
        SourceError: `types` names a column that is not there.
    """
    fields = dict(found)
    problems = []
    for name, word in types.items():
        if name not in found and (nearest(name, found) or not may_add):
            text = f"has no column {name!r} to set the type of{suggestion(name, found)}"
            raise SourceError(path, text)
        try:
            fields[name] = parse_field(name, word)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("input.types", problems)
    return pa.schema(list(fields.values()))


def to_array(field: pa.Field, values: Sequence[Any]) -> tuple[pa.Array, dict[int, str]]:
    """Turn a column's values into Arrow.

    Args:
        field: One that `parse_field` made.
        values: str, bool, int (of any size), float, list, dict or None.

    Returns:
        The array, null where a value does not fit; and index -> what was found there instead.
    """
    if is_json(field):
        return _convert(values, pa.string(), json_text)
    if is_text(field):
        return _convert(values, pa.string(), lambda it: it if type(it) is str else json_text(it))
    data_type = field.type
    if set(map(type, values)) <= _FITTING[data_type]:
        try:
            return pa.array(values, data_type), {}
        except (pa.ArrowInvalid, OverflowError):
            pass  # one of them does not fit, found below

    def fitted(value: object) -> Any:  # noqa: ANN401 - whatever the column holds
        if type(value) is str and pa.types.is_temporal(data_type):
            return moment(data_type, value)
        if not fits(data_type, value):
            is_number = type(value) is int and int in _FITTING[data_type]
            raise ValueError("integer out of range" if is_number else kind_word(value))
        return float(value) if data_type == pa.float64() else value  # type: ignore[arg-type]

    return _convert(values, data_type, fitted)


def _convert(
    values: Sequence[Any], data_type: pa.DataType, convert: Callable[[Any], Any]
) -> tuple[pa.Array, dict[int, str]]:
    converted: list[Any] = []
    misfits: dict[int, str] = {}
    for index, value in enumerate(values):
        try:
            converted.append(None if value is None else convert(value))
        except ValueError as error:
            converted.append(None)
            misfits[index] = str(error)
    return pa.array(converted, data_type), misfits


def retyped(
    column: pa.ChunkedArray, old: pa.Field, new: pa.Field
) -> tuple[pa.Array | pa.ChunkedArray, dict[int, str]]:
    """Turn the values of one of our types into those of another, see `to_array`.

    Numbers that were carried as floats, since others were, become integers again.
    """
    if old.type == new.type and is_json(old) == is_json(new):
        return column, {}
    if is_text(old) and is_json(new):  # Nobody knows whether a text was a string.
        return column, dict.fromkeys(pc.indices_nonzero(column.is_valid()).to_pylist(), "text")
    if new.type not in _FITTING or pa.types.is_temporal(old.type):
        return column.cast(new.type), {}
    values = column.to_pylist()
    if is_json(old) or is_text(old):
        values = [None if text is None else _written(text) for text in values]
    if new.type in _INT_BITS:
        values = [int(it) if type(it) is float and it.is_integer() else it for it in values]
    return to_array(new, values)


def _written(text: str) -> Any:  # noqa: ANN401 - any JSON
    """Read a value of a `json` or `text` column; a string that is no JSON is itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def json_text(value: object) -> str:
    """Encode as compact JSON; integers keep all digits.

    Raises:
        ValueError: Nested too deeply.
    """
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # an integer over 64 bits, or too many levels
        if is_deeper(value, MAX_DEPTH):
            raise ValueError("value nested too deeply") from None
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


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
