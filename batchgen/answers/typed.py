"""JSON Schema -> the Arrow type of a column of such answers, and parsed JSON -> its values.

Invariant: nothing is lost silently. What a schema leaves open becomes JSON text, said in
`TypedSchema.fallbacks`; a value that the column cannot hold raises. Whether a value is valid
(`required`, `pattern`, `minimum`, the labels of an enum) is for a validator, not decided here.

A `Shape` is what a schema says of a value's shape: its type, its fields, its items, its
choices. `$ref` and `allOf` are dissolved there, so that all that applies to one value is in one
`Shape`. Words: JSON Schema 2020-12; of older drafts `definitions`, `dependencies` and `items` with
a list. A schema has passed `json_schema.checked_schema`; what that does not know of, such as a
keyword of another draft, may be of any form here and is passed over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
import pyarrow as pa
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

if TYPE_CHECKING:
    Place = tuple["Place", str | int] | None
    """Where a value stands: what holds it, and its key there; written down only if it is wrong."""

MAX_LEVELS = 50
"""Objects and arrays inside each other; deeper ones are JSON text."""

_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class TypedSchema:
    """A JSON Schema as a column, or a part of one."""

    type: pa.DataType
    """What a column of these answers is."""
    kind: str
    """A type of JSON Schema; `json` is JSON text, `null` the same where nothing else is allowed."""
    fields: Mapping[str, TypedSchema] = field(default_factory=dict)
    """Of an object."""
    item: TypedSchema | None = None
    """Of an array."""
    fallbacks: Sequence[str] = ()
    """Places that became JSON text, each with why: `$.meta: an object without properties`."""
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Strings that it is one of, under ""; those of its fields under their names."""

    @property
    def enums(self) -> Mapping[str, Sequence[str]]:
        """Top-level fields ("" for the root itself) that are one of several strings -> these.

        In order, without null. One label is no choice.
        """
        is_object = self.kind == "object"  # "" is the root, or a field without a name.
        return {
            name: labels
            for name, labels in self.labels.items()
            if len(labels) > 1 and bool(name) == is_object
        }

    @property
    def signature(self) -> Hashable:
        """Equal for equal columns with equal conversions; the type alone is not, for JSON text."""
        inner = tuple((name, part.signature) for name, part in self.fields.items())
        return self.kind, inner, self.item and self.item.signature

    def value(self, parsed: Any, place: Place = None) -> Any:  # noqa: ANN401 - any JSON
        """Turn what `core.data.parse_json` returns into what `pa.array` takes.

        null fits everywhere: an absent key is null too.

        Raises:
            ValueError: The column cannot hold it; one line that begins with the place.
        """
        if parsed is None:
            return None
        found = type(parsed)
        if found is not _TYPES_OF.get(self.kind):
            return _of_other_type(self.kind, parsed, place)
        if found is dict:
            return self._object(parsed, place)
        if found is list and (item := self.item) is not None:
            return [item.value(one, (place, at)) for at, one in enumerate(parsed)]
        if found is int and parsed not in _INT64:
            raise _larger(self.kind, place)
        return parsed

    def _object(self, parsed: dict[str, Any], place: Place) -> dict[str, Any]:
        if not parsed.keys() <= self.fields.keys():
            unknown = repr(next(key for key in parsed if key not in self.fields))
            short = unknown if len(unknown) <= 80 else f"{unknown[:80]}..."
            msg = f"{_written(place)}: unknown key {short}, which the column cannot hold"
            raise ValueError(msg)
        return {
            name: part.value(parsed.get(name), (place, name)) for name, part in self.fields.items()
        }


def typed_schema(schema: Mapping[str, Any]) -> TypedSchema:
    """Choose the type; do it once, not for each row.

    Args:
        schema: Has passed `json_schema.checked_schema`.

    Raises:
        ValueError: It is nested too deeply.
    """
    try:
        return _Compiler(schema).compile((Bound(schema, frozenset({"#"})),), "$", 0)
    except RecursionError:
        raise ValueError("$: the schema is nested too deeply") from None


_TYPES_OF: Mapping[str, type] = {
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": float,
    "array": list,
    "object": dict,
}
"""Kind -> what Python has for it."""
_WORDS = {type_: f"a{'n' * (kind[0] in 'aio')} {kind}" for kind, type_ in _TYPES_OF.items()}


def _of_other_type(kind: str, value: Any, place: Place) -> Any:  # noqa: ANN401
    """A value that may be of a kind all the same: JSON Schema calls 1.0 an integer, 1 a number."""
    if kind not in _TYPES_OF:
        return _json_text(value, place)
    if kind == "number" and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise _larger(kind, place) from None
    if kind == "integer" and type(value) is float and value.is_integer():
        if int(value) in _INT64:
            return int(value)
        raise _larger(kind, place)
    found = _WORDS.get(type(value), type(value).__name__)
    raise ValueError(f"{_written(place)}: expected {_WORDS[_TYPES_OF[kind]]}, found {found}")


def _larger(kind: str, place: Place) -> ValueError:
    expected = _WORDS[_TYPES_OF[kind]]
    return ValueError(f"{_written(place)}: expected {expected} of 64 bits, found a larger one")


def _json_text(value: Any, place: Place) -> str:  # noqa: ANN401
    """Write any JSON as text."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # An integer over 64 bits, more than 254 levels.
        pass
    try:
        return json.dumps(value, separators=(",", ":"))
    except RecursionError as error:
        msg = f"{_written(place)}: expected JSON that can be written, found otherwise: {error}"
        raise ValueError(msg) from None


def _written(place: Place) -> str:
    """A place as people read it: `$.items[3].name`."""
    if place is None:
        return "$"
    parent, key = place
    return _written(parent) + (f"[{key}]" if isinstance(key, int) else step(key))


_SCALARS = {
    "string": TypedSchema(pa.string(), "string"),
    "integer": TypedSchema(pa.int64(), "integer"),
    "number": TypedSchema(pa.float64(), "number"),
    "boolean": TypedSchema(pa.bool_(), "boolean"),
}


def _json_node(path: str, why: str, kind: str = "json") -> TypedSchema:
    return TypedSchema(pa.string(), kind, fallbacks=(f"{path}: {why}",))


def _null_node(path: str) -> TypedSchema:
    # Arrow's null type would do, but some readers of Parquet do not know it.
    return _json_node(path, "nothing but null", "null")


def _kind(shape: Shape) -> str:
    """A type of JSON Schema's, or else why there is none."""
    types = shape.types
    if types is None:  # Not said: what it has tells.
        kinds = [("object", shape.properties), ("array", shape.items)]
        told = [kind for kind, has in kinds if has]
        return told[0] if len(told) == 1 else "any value"
    types = types - {"null"} or types
    if not types:
        return "no type fits all that is said"
    if types == {"integer", "number"}:
        return "number"
    return next(iter(types)) if len(types) == 1 else f"several types: {', '.join(sorted(types))}"


def _enum_node(values: Sequence[Any], path: str) -> TypedSchema:
    values = [value for value in values if value is not None]
    kinds = {type(value) for value in values}
    if not values:
        return _null_node(path)
    if kinds == {str}:
        return replace(_SCALARS["string"], labels={"": tuple(dict.fromkeys(values))})
    if kinds == {bool}:
        return _SCALARS["boolean"]
    if kinds == {int} and all(value in _INT64 for value in values):
        return _SCALARS["integer"]
    if kinds <= {int, float} and float in kinds:
        return _SCALARS["number"]
    return _json_node(path, "an enum of different types")


def _joined_labels(nodes: Sequence[TypedSchema]) -> dict[str, tuple[str, ...]]:
    """Labels that each branch has for a place, together."""
    names = [name for name in nodes[0].labels if all(name in node.labels for node in nodes)]
    return {
        name: tuple(dict.fromkeys(label for node in nodes for label in node.labels[name]))
        for name in names
    }


MAX_SCHEMAS = 5_000
"""Schemas looked at, a `$ref`'s each time: few lines of them can describe endless columns."""

_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
# Keywords that may tell of a value's shape; a branch of anyOf without them does not change it.
_SHAPE = frozenset(
    {
        *("type", "enum", "const", "items", "prefixItems", "$ref", "$dynamicRef", "$recursiveRef"),
        *("properties", "patternProperties", "additionalProperties", "unevaluatedProperties"),
        *("allOf", "anyOf", "oneOf", "if", "then", "else", "dependentSchemas", "dependencies"),
    }
)
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


class Bound(NamedTuple):
    """A schema where it stands."""

    schema: Any
    refs: frozenset[str]
    """The `$ref`s that it is inside of."""


@dataclass(slots=True)
class Shape:
    """What all the schemas that apply to one value say of its shape."""

    types: frozenset[str] | None = None
    """None: nothing said; empty: they contradict each other."""
    enum: Sequence[Any] | None = None
    properties: dict[str, tuple[Bound, ...]] = field(default_factory=dict)
    items: tuple[Bound, ...] = ()
    choices: tuple[tuple[Bound, ...], ...] = ()
    """Each anyOf or oneOf, of which one branch applies."""
    extra: frozenset[str] = frozenset()
    """Properties that `if` and its kind speak of."""
    why: str | None = None
    """Why no type can be given."""

    def give_up(self, why: str) -> None:
        """Give no type; the first reason stays."""
        self.why = self.why or why


def step(name: str) -> str:
    """A property as a step of a path: `.name`, or `['odd name']`."""
    return f".{name}" if _PLAIN_KEY.fullmatch(name) else f"[{name!r}]"


class _Compiler:
    """Reads the schemas of one document. Lives as long as that is compiled."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._resolver = Registry().resolver_with_root(DRAFT202012.create_resource(root))
        self._num_schemas = 0

    def compile(self, bounds: Sequence[Bound], path: str, level: int) -> TypedSchema:
        """Compile the schemas that apply together at `path`, inside `level` others."""
        shape = Shape()
        for bound in bounds:
            self._add(bound, shape)
        return self._node(shape, path, level)

    def _node(self, shape: Shape, path: str, level: int) -> TypedSchema:
        if shape.why is not None:
            return _json_node(path, shape.why)
        if shape.choices:
            return self._choice(shape, path, level)
        if shape.enum is not None:
            return _enum_node(shape.enum, path)
        kind = _kind(shape)
        if kind in {"object", "array"}:
            return self._nested(kind, shape, path, level)
        if kind == "null":
            return _null_node(path)
        return _SCALARS.get(kind) or _json_node(path, kind)

    def _nested(self, kind: str, shape: Shape, path: str, level: int) -> TypedSchema:
        if level >= MAX_LEVELS:
            return _json_node(path, f"more than {MAX_LEVELS} levels")
        if kind == "array":
            return self._array(shape, path, level)
        if not shape.properties:
            return _json_node(path, "an object without properties")
        if extra := shape.extra - shape.properties.keys():
            names = ", ".join(map(repr, sorted(extra)))
            return _json_node(path, f"{names} only in if, then, else or dependentSchemas")
        return self._object(shape, path, level)

    def _object(self, shape: Shape, path: str, level: int) -> TypedSchema:
        nodes = {
            name: self.compile(bounds, path + step(name), level + 1)
            for name, bounds in shape.properties.items()
        }
        return TypedSchema(
            pa.struct([pa.field(name, node.type) for name, node in nodes.items()]),
            "object",
            nodes,
            fallbacks=[fallback for node in nodes.values() for fallback in node.fallbacks],
            labels={name: node.labels[""] for name, node in nodes.items() if "" in node.labels},
        )

    def _array(self, shape: Shape, path: str, level: int) -> TypedSchema:
        if not shape.items:
            return _json_node(path, "an array without items")
        item = self.compile(shape.items, f"{path}[]", level + 1)
        return TypedSchema(pa.list_(item.type), "array", item=item, fallbacks=item.fallbacks)

    def _choice(self, shape: Shape, path: str, level: int) -> TypedSchema:
        """S and (A or B) is (S and A) or (S and B): compile each, then see if one column fits."""
        first, *others = shape.choices
        nodes = []
        for branch in first:
            both = replace(shape, choices=tuple(others), properties=dict(shape.properties))
            self._add(branch, both)
            if both.types != frozenset() or both.why is not None:
                nodes.append(self._node(both, path, level))
        if not nodes:
            return _json_node(path, "no type fits all that is said")
        nodes = [node for node in nodes if node.kind != "null"] or nodes[:1]
        if {node.kind for node in nodes} == {"integer", "number"}:
            return _SCALARS["number"]
        if len({node.signature for node in nodes}) > 1:
            return _json_node(path, "anyOf or oneOf of different types")
        return replace(nodes[0], labels=_joined_labels(nodes))

    def _add(self, bound: Bound, shape: Shape) -> None:
        """Add to `shape` what one more schema says."""
        schema, refs = bound
        self._num_schemas += 1
        if self._num_schemas > MAX_SCHEMAS:
            shape.give_up(f"more than {MAX_SCHEMAS} schemas in one")
        elif schema is False:
            shape.give_up("nothing fits `false`")
        elif isinstance(schema, Mapping):
            self._add_applied(schema, refs, shape)
            _add_type(schema, shape)
            _add_object(schema, refs, shape)
            _add_array(schema, refs, shape)
            _add_choices(schema, refs, shape)

    def _add_applied(self, schema: Mapping[str, Any], refs: frozenset[str], shape: Shape) -> None:
        ref = schema.get("$ref")
        if isinstance(ref, str) and ref in refs:
            shape.give_up(f"$ref {ref!r} is recursive")
        elif isinstance(ref, str):
            try:
                target = self._resolver.lookup(ref).contents
            except (Unresolvable, LookupError, TypeError, ValueError, AttributeError):
                shape.give_up(f"$ref {ref!r} leads out of the document's root")
            else:
                self._add(Bound(target, refs | {ref}), shape)
        for member in _list(schema, "allOf"):
            self._add(Bound(member, refs), shape)
        if "$dynamicRef" in schema or "$recursiveRef" in schema:
            shape.give_up("a $dynamicRef")


def _list(schema: Mapping[str, Any], keyword: str) -> Sequence[Any]:
    members = schema.get(keyword)
    return members if isinstance(members, (list, tuple)) else ()


def _map(schema: Mapping[str, Any], keyword: str) -> Mapping[str, Any]:
    members = schema.get(keyword)
    return members if isinstance(members, Mapping) else {}


def _add_type(schema: Mapping[str, Any], shape: Shape) -> None:
    names = schema.get("type")
    if isinstance(names, str):
        names = [names]
    if names is not None:
        if not all(name in _TYPES for name in names):  # Draft 3 has `any`, and schemas.
            shape.give_up(f"type {names!r:.60}")
        else:
            shape.types = _in_both(shape.types, frozenset(names))
    if "enum" in schema:
        shape.enum = _values_in_both(shape.enum, _list(schema, "enum"))
    if "const" in schema:
        shape.enum = _values_in_both(shape.enum, [schema["const"]])


def _in_both(left: frozenset[str] | None, right: frozenset[str]) -> frozenset[str]:
    if left is None:
        return right
    # An integer is a number.
    wide = [types | {"integer"} if "number" in types else types for types in (left, right)]
    return wide[0] & wide[1]


def _values_in_both(left: Sequence[Any] | None, right: Sequence[Any]) -> Sequence[Any]:
    if left is None:
        return right
    written = {json.dumps(value) for value in right}  # Python's 1 == True is not JSON's.
    return [value for value in left if json.dumps(value) in written]


def _add_object(schema: Mapping[str, Any], refs: frozenset[str], shape: Shape) -> None:
    for name, value in _map(schema, "properties").items():
        shape.properties[name] = (*shape.properties.get(name, ()), Bound(value, refs))
    for keyword in ("additionalProperties", "unevaluatedProperties"):
        if isinstance(schema.get(keyword), Mapping):
            shape.give_up(f"an object with any keys ({keyword})")
    if schema.get("patternProperties"):
        shape.give_up("an object with any keys (patternProperties)")
    conditional = [schema.get(keyword) for keyword in ("if", "then", "else")]
    for keyword in ("dependentSchemas", "dependencies"):
        conditional += _map(schema, keyword).values()
    shape.extra = shape.extra.union(*map(_property_names, conditional))


def _property_names(schema: object) -> frozenset[str]:
    """Properties that a conditional schema speaks of; a `$ref` in it counts as one."""
    if not isinstance(schema, Mapping):
        return frozenset()
    names = frozenset(_map(schema, "properties")) | (schema.keys() & {"$ref"})
    inner = [schema.get(keyword) for keyword in ("then", "else")]
    for keyword in ("allOf", "anyOf", "oneOf"):
        inner += _list(schema, keyword)
    return names.union(*map(_property_names, inner))


def _add_array(schema: Mapping[str, Any], refs: frozenset[str], shape: Shape) -> None:
    items = schema.get("items")
    if schema.get("prefixItems") or isinstance(items, (list, tuple)):
        shape.give_up("an array with a schema for each place")
    elif items is not None:
        shape.items += (Bound(items, refs),)


def _add_choices(schema: Mapping[str, Any], refs: frozenset[str], shape: Shape) -> None:
    for keyword in ("anyOf", "oneOf"):
        branches = [b for b in _list(schema, keyword) if b is not False]
        if any(not isinstance(b, Mapping) or b.keys() & _SHAPE for b in branches):
            shape.choices += (tuple(Bound(branch, refs) for branch in branches),)
