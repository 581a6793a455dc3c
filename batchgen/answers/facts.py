"""What a JSON Schema says of a value's form: its type, its fields, its items, its choices.

Keywords that say nothing of it (`required`, `pattern`, `minimum`) are passed over. `$ref` and
`allOf` are dissolved here, so that all that applies to one value is in one `Facts`.

Words: JSON Schema 2020-12; of older drafts `definitions`, `dependencies` and `items` with a list.
`$id` inside a schema and anchors are not followed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from batchgen.answers.values import found

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_SCHEMAS = 5_000
"""Schemas looked at, a `$ref`'s each time: few lines of them can describe endless columns."""

_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
# Keywords that may tell of a value's form; a branch of anyOf without them does not change it.
_FORM = frozenset(
    {
        *("type", "enum", "const", "items", "prefixItems", "$ref", "$dynamicRef", "$recursiveRef"),
        *("properties", "patternProperties", "additionalProperties", "unevaluatedProperties"),
        *("allOf", "anyOf", "oneOf", "if", "then", "else", "dependentSchemas", "dependencies"),
    }
)


class Bound(NamedTuple):
    """A schema where it stands."""

    schema: Any
    refs: frozenset[str]
    """The targets of `$ref` that it is inside of."""


@dataclass(slots=True)
class Facts:
    """What all the schemas that apply to one value say of its form."""

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
    """Why no type can be told."""

    def give_up(self, why: str) -> None:
        """Tell no type; the first reason stays."""
        self.why = self.why or why


class Reader:
    """Reads the schemas of one document."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._num_schemas = 0

    def add(self, bound: Bound, facts: Facts, path: str) -> None:
        """Add to `facts` what one more schema says.

        Raises:
            ValueError: The schema is wrong; one line that begins with `path`.
        """
        schema, refs = bound
        self._num_schemas += 1
        if self._num_schemas > MAX_SCHEMAS:
            facts.give_up(f"more than {MAX_SCHEMAS} schemas in one")
        elif schema is False:
            facts.give_up("nothing fits `false`")
        elif schema is not True:
            if not isinstance(schema, Mapping):
                raise _wrong(path, "a schema, which is an object", schema)
            self._add_applied(Bound(schema, refs), facts, path)
            _add_type(schema, facts, path)
            _add_object(bound, facts, path)
            _add_array(bound, facts)
            _add_choices(bound, facts, path)

    def _add_applied(self, bound: Bound, facts: Facts, path: str) -> None:
        schema, refs = bound
        if "$ref" in schema:
            pointer, target = self._resolve(schema["$ref"], path)
            if pointer in refs:
                facts.give_up(f"$ref {pointer!r} is recursive")
            else:
                self.add(Bound(target, refs | {pointer}), facts, path)
        for member in _schemas(schema, "allOf", path):
            self.add(Bound(member, refs), facts, path)
        if "$dynamicRef" in schema or "$recursiveRef" in schema:
            facts.give_up("a $dynamicRef")

    def _resolve(self, ref: object, path: str) -> tuple[str, Any]:
        """Follow a `$ref`; returns its JSON pointer and what is there."""
        own = self._root.get("$id")
        if isinstance(ref, str) and isinstance(own, str) and own.rstrip("#"):
            ref = ref.removeprefix(own.rstrip("#")) or "#"
        if not isinstance(ref, str) or not ref.startswith("#"):
            msg = f"{path}: $ref {ref!r} leads to another document; copy what it names to $defs"
            raise ValueError(msg)
        pointer = unquote(ref)
        target: Any = self._root
        for part in pointer.split("/")[1:]:
            target = _child(target, part.replace("~1", "/").replace("~0", "~"))
        if target is None or pointer.partition("/")[0] != "#":
            msg = f"{path}: $ref {ref!r} leads nowhere, expected a place such as '#/$defs/name'"
            raise ValueError(msg)
        return pointer, target


def _child(parent: object, name: str) -> Any:  # noqa: ANN401
    """One step of a JSON pointer; None if there is nothing."""
    if isinstance(parent, Mapping):
        return parent.get(name)
    if isinstance(parent, (list, tuple)) and name.isdecimal() and int(name) < len(parent):
        return parent[int(name)]
    return None


def _wrong(path: str, expected: str, value: object) -> ValueError:
    return ValueError(f"{path}: expected {expected}, found {found(value)}")


def _schemas(schema: Mapping[str, Any], keyword: str, path: str) -> Sequence[Any]:
    members = schema.get(keyword, ())
    if not isinstance(members, (list, tuple)):
        raise _wrong(path, f"an array in {keyword}", members)
    return members


def _named_schemas(schema: Mapping[str, Any], keyword: str, path: str) -> Mapping[str, Any]:
    members = schema.get(keyword, {})
    if not isinstance(members, Mapping):
        raise _wrong(path, f"an object in {keyword}", members)
    return members


def _add_type(schema: Mapping[str, Any], facts: Facts, path: str) -> None:
    if "type" in schema:
        told = schema["type"]
        names = [told] if isinstance(told, str) else told
        if not isinstance(names, (list, tuple)) or not all(name in _TYPES for name in names):
            msg = f"{path}: unknown type {told!r}, expected {', '.join(_TYPES)}"
            raise ValueError(msg)
        facts.types = _in_both(facts.types, frozenset(names))
    if "enum" in schema:
        facts.enum = _values_in_both(facts.enum, _schemas(schema, "enum", path))
    if "const" in schema:
        facts.enum = _values_in_both(facts.enum, [schema["const"]])


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


def _add_object(bound: Bound, facts: Facts, path: str) -> None:
    schema, refs = bound
    for name, value in _named_schemas(schema, "properties", path).items():
        facts.properties[name] = (*facts.properties.get(name, ()), Bound(value, refs))
    for keyword in ("additionalProperties", "unevaluatedProperties"):
        if isinstance(schema.get(keyword), Mapping):
            facts.give_up(f"an object with any keys ({keyword})")
    if schema.get("patternProperties"):
        facts.give_up("an object with any keys (patternProperties)")
    for keyword in ("if", "then", "else"):
        facts.extra |= _property_names(schema.get(keyword), path)
    for keyword in ("dependentSchemas", "dependencies"):
        for value in _named_schemas(schema, keyword, path).values():
            facts.extra |= _property_names(value, path)


def _property_names(schema: object, path: str) -> frozenset[str]:
    """Properties that a conditional schema speaks of; a `$ref` in it counts as one."""
    if not isinstance(schema, Mapping):
        return frozenset()
    names = frozenset(_named_schemas(schema, "properties", path)) | (schema.keys() & {"$ref"})
    inner = [schema.get(keyword) for keyword in ("then", "else")]
    for keyword in ("allOf", "anyOf", "oneOf"):
        inner += _schemas(schema, keyword, path)
    return names.union(*(_property_names(member, path) for member in inner))


def _add_array(bound: Bound, facts: Facts) -> None:
    schema, refs = bound
    items = schema.get("items")
    if schema.get("prefixItems") or isinstance(items, (list, tuple)):
        facts.give_up("an array with a schema for each place")
    elif items is not None:
        facts.items += (Bound(items, refs),)


def _add_choices(bound: Bound, facts: Facts, path: str) -> None:
    schema, refs = bound
    for keyword in ("anyOf", "oneOf"):
        branches = [b for b in _schemas(schema, keyword, path) if b is not False]
        if any(not isinstance(b, Mapping) or b.keys() & _FORM for b in branches):
            facts.choices += (tuple(Bound(branch, refs) for branch in branches),)
