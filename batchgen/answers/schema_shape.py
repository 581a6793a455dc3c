"""What a JSON Schema says of a value's shape: its type, its fields, its items, its choices.

Keywords that say nothing of it (`required`, `pattern`, `minimum`) are passed over. `$ref` and
`allOf` are dissolved here, so that all that applies to one value is in one `Shape`.

Words: JSON Schema 2020-12; of older drafts `definitions`, `dependencies` and `items` with a list.
A schema has passed `json_schema.checked_schema`; what it does not know of, such as a keyword of
another draft, may be of any form here and is passed over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

if TYPE_CHECKING:
    from collections.abc import Sequence

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


class ShapeReader:
    """Reads the schemas of one document."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._resolver = Registry().resolver_with_root(DRAFT202012.create_resource(root))
        self._num_schemas = 0

    def add(self, bound: Bound, shape: Shape) -> None:
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
                self.add(Bound(target, refs | {ref}), shape)
        for member in _list(schema, "allOf"):
            self.add(Bound(member, refs), shape)
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
