"""JSON Schema -> the Arrow type of a column of such answers, and parsed JSON -> its values.

Invariant: nothing is lost silently. What a schema leaves open becomes JSON text, said in
`TypedSchema.fallbacks`; a value that the column cannot hold raises. Whether a value is valid
(`required`, `pattern`, `minimum`, the labels of an enum) is for a validator, not decided here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from batchgen.answers.facts import Bound, Facts, Reader
from batchgen.answers.values import (
    JSON_TEXT,
    Unfit,
    array_of,
    boolean,
    integer,
    json_text,
    number,
    object_of,
    step,
    string,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

MAX_LEVELS = 50
"""Objects and arrays inside each other; deeper ones are JSON text."""

_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class TypedSchema:
    """A JSON Schema as a column."""

    type: pa.DataType
    """What a column of these answers is."""
    fallbacks: Sequence[str]
    """Places that became JSON text, each with why: `$.meta: an object without properties`."""
    enums: Mapping[str, Sequence[str]]
    """Top-level fields ("" for the root itself) that are one of several strings -> these labels,
    in order, without null."""
    _convert: Callable[[Any], Any] = field(repr=False, compare=False)

    def value(self, parsed: Any) -> Any:  # noqa: ANN401 - any JSON
        """Turn parsed JSON into what `pa.array([...], self.type)` takes.

        null fits everywhere: an absent key is null too.

        Raises:
            ValueError: The column cannot hold it; one line that begins with the place.
        """
        if parsed is None:
            return None
        try:
            return self._convert(parsed)
        except Unfit as unfit:
            place = "".join(reversed(unfit.steps))
            msg = f"${place}: {unfit.why}"
            raise ValueError(msg) from None


def typed_schema(schema: Mapping[str, Any]) -> TypedSchema:
    """Choose the type and compile the conversion; do it once, not for each row.

    Raises:
        ValueError: The schema is wrong: a `$ref` to nowhere or to another document, an unknown
            type. One line that begins with the place.
    """
    compiler = _Compiler(schema)
    try:
        node = compiler.compile((Bound(schema, frozenset({"#"})),), "$", 0)
    except RecursionError:
        msg = "$: the schema is nested too deeply"
        raise ValueError(msg) from None
    # One label is no choice.
    is_object = pa.types.is_struct(node.type)  # "" is the root, or a field without a name.
    enums = {
        name: labels
        for name, labels in node.labels.items()
        if len(labels) > 1 and bool(name) == is_object
    }
    return TypedSchema(node.type, node.fallbacks, enums, node.convert)


@dataclass(frozen=True, slots=True)
class _Node:
    """A compiled schema."""

    type: pa.DataType
    shape: Hashable
    """Equal for equal columns with equal conversions; the type alone is not, for JSON text."""
    convert: Callable[[Any], Any]
    """Of any value but null. Raises `Unfit`."""
    fallbacks: tuple[str, ...] = ()
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Its own under "", its fields' under their names."""


_STRING = _Node(pa.string(), "string", string)
_INTEGER = _Node(pa.int64(), "integer", integer)
_NUMBER = _Node(pa.float64(), "number", number)
_BOOLEAN = _Node(pa.bool_(), "boolean", boolean)
_SCALARS = {"string": _STRING, "integer": _INTEGER, "number": _NUMBER, "boolean": _BOOLEAN}


def _json_node(path: str, why: str) -> _Node:
    return _Node(JSON_TEXT, "json", json_text, (f"{path}: {why}",))


def _null_node(path: str) -> _Node:
    # Arrow's null type would do, but some readers of Parquet do not know it.
    return replace(_json_node(path, "nothing but null"), shape="null")


class _Compiler:
    """Lives as long as one schema is compiled."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._reader = Reader(root)

    def compile(self, bounds: Sequence[Bound], path: str, level: int) -> _Node:
        """Compile the schemas that apply together at `path`, inside `level` others."""
        facts = Facts()
        for bound in bounds:
            self._reader.add(bound, facts, path)
        return self._node(facts, path, level)

    def _node(self, facts: Facts, path: str, level: int) -> _Node:
        if facts.why is not None:
            return _json_node(path, facts.why)
        if facts.choices:
            return self._choice(facts, path, level)
        if facts.enum is not None:
            return _enum_node(facts.enum, path)
        kind = _kind(facts)
        if kind in {"object", "array"}:
            return self._nested(kind, facts, path, level)
        if kind == "null":
            return _null_node(path)
        return _SCALARS.get(kind) or _json_node(path, kind)

    def _nested(self, kind: str, facts: Facts, path: str, level: int) -> _Node:
        if level >= MAX_LEVELS:
            return _json_node(path, f"more than {MAX_LEVELS} levels")
        if kind == "array":
            return self._array(facts, path, level)
        if not facts.properties:
            return _json_node(path, "an object without properties")
        if extra := facts.extra - facts.properties.keys():
            names = ", ".join(map(repr, sorted(extra)))
            return _json_node(path, f"{names} only in if, then, else or dependentSchemas")
        return self._object(facts, path, level)

    def _object(self, facts: Facts, path: str, level: int) -> _Node:
        nodes = {
            name: self.compile(bounds, path + step(name), level + 1)
            for name, bounds in facts.properties.items()
        }
        return _Node(
            pa.struct([pa.field(name, node.type) for name, node in nodes.items()]),
            ("object", tuple((name, node.shape) for name, node in nodes.items())),
            object_of({name: node.convert for name, node in nodes.items()}),
            tuple(fallback for node in nodes.values() for fallback in node.fallbacks),
            {name: node.labels[""] for name, node in nodes.items() if "" in node.labels},
        )

    def _array(self, facts: Facts, path: str, level: int) -> _Node:
        if not facts.items:
            return _json_node(path, "an array without items")
        item = self.compile(facts.items, f"{path}[]", level + 1)
        shape = ("array", item.shape)
        return _Node(pa.list_(item.type), shape, array_of(item.convert), item.fallbacks)

    def _choice(self, facts: Facts, path: str, level: int) -> _Node:
        """S and (A or B) is (S and A) or (S and B): compile each, then see if one column fits."""
        first, *others = facts.choices
        nodes = []
        for branch in first:
            both = replace(facts, choices=tuple(others), properties=dict(facts.properties))
            self._reader.add(branch, both, path)
            if both.types != frozenset() or both.why is not None:
                nodes.append(self._node(both, path, level))
        if not nodes:
            return _json_node(path, "no type fits all that is said")
        nodes = [node for node in nodes if node.shape != "null"] or nodes[:1]
        shapes = {node.shape for node in nodes}
        if shapes == {"integer", "number"}:
            return _NUMBER
        if len(shapes) > 1:
            return _json_node(path, "anyOf or oneOf of different types")
        return replace(nodes[0], labels=_joined_labels(nodes))


def _kind(facts: Facts) -> str:
    """A type of JSON Schema's, or else why there is none."""
    types = facts.types
    if types is None:  # Not said: what it has tells.
        kinds = [("object", facts.properties), ("array", facts.items)]
        told = [kind for kind, has in kinds if has]
        return told[0] if len(told) == 1 else "any value"
    types = types - {"null"} or types
    if not types:
        return "no type fits all that is said"
    if types == {"integer", "number"}:
        return "number"
    return next(iter(types)) if len(types) == 1 else f"several types: {', '.join(sorted(types))}"


def _enum_node(values: Sequence[Any], path: str) -> _Node:
    values = [value for value in values if value is not None]
    kinds = {type(value) for value in values}
    if not values:
        return _null_node(path)
    if kinds == {str}:
        return replace(_STRING, labels={"": tuple(dict.fromkeys(values))})
    if kinds == {bool}:
        return _BOOLEAN
    if kinds == {int} and all(value in _INT64 for value in values):
        return _INTEGER
    if kinds <= {int, float} and float in kinds:
        return _NUMBER
    return _json_node(path, "an enum of different types")


def _joined_labels(nodes: Sequence[_Node]) -> dict[str, tuple[str, ...]]:
    """Labels that each branch has for a place, together."""
    names = [name for name in nodes[0].labels if all(name in node.labels for node in nodes)]
    return {
        name: tuple(dict.fromkeys(label for node in nodes for label in node.labels[name]))
        for name in names
    }
