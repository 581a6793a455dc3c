"""JSON Schemas that strangers wrote, made safe to apply: in bounded time, and to this process only.

A row brings its own schema, so a schema is input like any other. Nesting is bounded, `$ref` stays
inside the document and has a target, and patterns run on RE2, which never backtracks.
"""

from __future__ import annotations

import copy
import json
import math
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jsonschema
import orjson
import referencing
from jsonschema.validators import validator_for
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012, specification_with

from batchgen.answers.patterns import safe_kind, why_not_linear
from batchgen.answers.values import step

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MAX_LEVELS = 64
"""Objects and arrays inside each other in a schema, or in a row's own sampling parameters.
jsonschema recurses, some ten frames a level, and Python stops at a thousand."""

_MAX_CHARS = 300
_LONG_INTEGER = re.compile(r"[0-9]{19}")  # orjson makes floats of those over 64 bits,
_HUGE_INTEGER = re.compile(r"[0-9]{300}")  # and refuses those over what a float can be.

# Of all drafts together. One schema or a list of them:
_NESTED = (
    *("additionalItems", "additionalProperties", "allOf", "anyOf", "contains", "contentSchema"),
    *("disallow", "else", "extends", "if", "items", "not", "oneOf", "prefixItems"),
    *("propertyNames", "then", "type", "unevaluatedItems", "unevaluatedProperties"),
)
# Schemas by name:
_NAMED = (
    *("$defs", "definitions", "dependencies", "dependentSchemas"),
    *("patternProperties", "properties"),
)
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


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


def _children(value: object) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()


def checked_schema(schema: dict[str, Any], *, may_backtrack: bool = True) -> Any:  # noqa: ANN401
    """Return jsonschema's validator of a schema, which retrieves nothing.

    The draft is that of `$schema` at the top, by default 2020-12; deeper ones are passed over.

    Args:
        schema: Is not kept, nor changed.
        may_backtrack: Whether patterns that RE2 cannot run go to Python's `re`. That can take
            for ever, so it is for schemas that the job's author wrote, not for those of rows.

    Raises:
        ValueError: Not a JSON Schema, one that refers to another document or to nowhere, is nested
            too deeply, or has a pattern that cannot be run. One line.
    """
    check_levels(schema)
    try:
        return _checked(schema, may_backtrack=may_backtrack)
    except RecursionError:
        msg = "the schema is nested too deeply"
        raise ValueError(msg) from None


@lru_cache(maxsize=256)
def row_validator(schema_text: str) -> Any:  # noqa: ANN401 - jsonschema's validator
    """`checked_schema` of a row's own schema, given as JSON, which few of them differ in."""
    return checked_schema(parse_json(schema_text), may_backtrack=False)


def _checked(schema: dict[str, Any], *, may_backtrack: bool) -> Any:  # noqa: ANN401
    if not isinstance(schema.get("$schema", ""), str):
        msg = f"$.$schema: expected the name of a draft, found {schema['$schema']!r}"
        raise ValueError(msg[:_MAX_CHARS])  # noqa: TRY004 - a value of the user's
    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    _check_form(kind, schema, "$")
    root = copy.deepcopy(schema)
    has_unevaluated = False
    for place in _Walk(kind, root).places():
        has_unevaluated |= "unevaluatedProperties" in place.schema
        for pattern in _patterns(place.schema):
            _check_pattern(pattern, place.path, may_backtrack=may_backtrack)
    if has_unevaluated:
        _check_unevaluated(root, kind, may_backtrack=may_backtrack)
    return safe_kind(kind, may_backtrack=may_backtrack)(root, registry=referencing.Registry())


def _check_form(kind: Any, schema: Any, path: str) -> None:  # noqa: ANN401
    try:
        # Formats are left out: "regex" there is Python's, patterns here are RE2's.
        kind.check_schema(schema, format_checker=None)
    except jsonschema.SchemaError as error:
        msg = f"{path}{error.json_path[1:]}: {error.message}"[:_MAX_CHARS]
        raise ValueError(msg) from error


class _Place(NamedTuple):
    """A schema where it stands."""

    path: str
    schema: dict[str, Any]
    resolver: Any


class _Walk:
    """Every schema that can be applied, each once. Lives as long as one document is walked.

    Only what stands at a schema's place, or is referred to, is one: a `const` may hold anything.
    """

    def __init__(self, kind: Any, root: dict[str, Any]) -> None:  # noqa: ANN401
        self._kind = kind
        dialect = kind.ID_OF(kind.META_SCHEMA)
        self._specification = specification_with(dialect, default=DRAFT202012)
        self._seen: set[int] = set()
        self._waiting = [_Place("$", root, None)]
        # jsonschema would change to the stock validator, which has none of the limits, wherever
        # it meets a $schema, the top included when it comes back to it.
        for place in self._structure():
            place.schema.pop("$schema", None)
        self._seen.clear()
        resource = self._specification.create_resource(root)
        self._waiting = [_Place("$", root, referencing.Registry().resolver_with_root(resource))]

    def places(self) -> Iterator[_Place]:
        """Yield them; raises ValueError for a reference that leads nowhere."""
        referred: list[_Place] = []
        while self._waiting or referred:
            for place in self._structure():
                yield place
                referred += self._targets(place)
            if referred and id((target := referred.pop()).schema) not in self._seen:
                # Not where schemas stand, so that nothing has looked at it yet.
                _check_form(self._kind, target.schema, target.path)
                target.schema.pop("$schema", None)
                self._waiting.append(target)

    def _structure(self) -> Iterator[_Place]:
        while self._waiting:
            place = self._waiting.pop()
            if id(place.schema) in self._seen:
                continue
            self._seen.add(id(place.schema))
            if place.resolver is not None:
                resource = self._specification.create_resource(place.schema)
                place = place._replace(resolver=place.resolver.in_subresource(resource))
            self._waiting += (
                _Place(place.path + path, schema, place.resolver)
                for path, schema in _subschemas(place.schema)
            )
            yield place

    def _targets(self, place: _Place) -> Iterator[_Place]:
        for keyword in _REFERENCES:
            if not isinstance(place.schema.get(keyword), str):
                continue
            name = place.schema[keyword]
            what = f"{place.path}: {keyword} {name!r:.120}"
            if not name.startswith("#"):
                msg = f"{what} is another document, expected one that begins with #"
                raise ValueError(msg)
            try:
                found = place.resolver.lookup(name)
            except (Unresolvable, LookupError, TypeError, ValueError, AttributeError) as error:
                msg = f"{what} leads nowhere, expected a place such as '#/$defs/name'"
                raise ValueError(msg) from error
            if isinstance(found.contents, dict):
                yield _Place(f"${name[1:]}", found.contents, found.resolver)
            elif not isinstance(found.contents, bool):
                msg = f"{what} leads to {found.contents!r:.60}, expected a schema"
                raise ValueError(msg)  # noqa: TRY004 - a value of the user's


def _subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for keyword in _NESTED:
        value = schema.get(keyword)
        if isinstance(value, dict):
            yield f".{keyword}", value
        elif isinstance(value, list):
            for at, item in enumerate(value):
                if isinstance(item, dict):
                    yield f".{keyword}[{at}]", item
    for keyword in _NAMED:
        named = schema.get(keyword)
        for name, item in named.items() if isinstance(named, dict) else ():
            if isinstance(item, dict):
                yield f".{keyword}{step(name)}", item


def _patterns(schema: Mapping[str, Any]) -> list[str]:
    own, named = schema.get("pattern"), schema.get("patternProperties")
    return [
        *([own] if isinstance(own, str) else ()),
        *(named if isinstance(named, dict) else ()),
    ]


def _check_pattern(pattern: str, path: str, *, may_backtrack: bool) -> None:
    why = why_not_linear(pattern)
    if why is None:
        return
    if not may_backtrack:
        msg = f"{path}: pattern {pattern!r:.120} needs backtracking, which could run for ever"
        raise ValueError(f"{msg}, or is wrong (RE2: {why})"[:_MAX_CHARS])
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        msg = f"{path}: pattern {pattern!r:.120}: {error}"
        raise ValueError(msg[:_MAX_CHARS]) from error


def _check_unevaluated(root: dict[str, Any], kind: Any, *, may_backtrack: bool) -> None:  # noqa: ANN401
    """To tell what is unevaluated, jsonschema runs the patterns on `re` itself."""
    for place in _Walk(kind, root).places():
        for pattern in place.schema.get("patternProperties", ()):
            what = f"{place.path}: patternProperties {pattern!r:.120}"
            if not may_backtrack:
                msg = f"{what} together with unevaluatedProperties, which could run for ever"
                raise ValueError(msg)
            try:
                re.compile(pattern)
            except (re.error, OverflowError) as error:
                msg = f"{what} together with unevaluatedProperties has to be Python's, too: {error}"
                raise ValueError(msg[:_MAX_CHARS]) from error
