r"""JSON Schemas that strangers wrote, made safe to apply: in bounded time, without retrieval.

A row brings its own schema, so a schema is input like any other. Nesting is bounded, `$ref` stays
inside the document and has a target. Patterns run on RE2, in linear time: jsonschema runs them on
Python's `re`, where `^(a+)+$` takes for ever on some sixty characters. A pattern is searched for,
it need not match the whole; RE2's `\d` and `\w` are ASCII's, as in ECMAScript, whose patterns JSON
Schema's are.

A small schema can also double the work at each step, by two references to the next one or by
alternatives inside alternatives, so that thirty steps take hours. Nesting alone does not tell:
recursion also doubles with the answer's depth. So each keyword that is applied counts.

`jsonschema_rs` (0.61.2, tried on 2026-11-30) checks a label's schema in 0.7 us where this takes 29,
and gets numbers and patterns right. But it bounds no work: a schema that refers twice to the next
one, in 22 steps, took it 0.13 s, and twice as long for each step more, with no way to stop it. Its
messages differ, too, which rows keep and `tell_error` shows to the model.
"""

from __future__ import annotations

import re
import threading
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jsonschema
import pyarrow as pa
import pyarrow.compute as pc
import referencing
from jsonschema.validators import extend, validator_for
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012, specification_with

from batchgen.answers.typed import step
from batchgen.core.data import check_levels, parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Keyword = Callable[[Any, Any, Any, Any], Iterator[Any] | None]
    """Validator, the keyword's value, the instance, the schema -> what is wrong."""

MAX_KEYWORDS = 100_000
"""Keywords that one validation applies: about a second. An answer of a thousand values under a
rich schema takes some ten thousand."""

_MAX_CHARS = 300

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


class TooMuchWorkError(Exception):
    """A validation has applied `MAX_KEYWORDS` keywords."""


class _Effort(threading.local):
    num_left = MAX_KEYWORDS


_effort = _Effort()


def why_invalid(validator: Any, value: object) -> str | None:  # noqa: ANN401 - jsonschema's
    """Say what is wrong with a value, beginning with its place; None if nothing is."""
    _effort.num_left = MAX_KEYWORDS
    try:
        problem = next(validator.iter_errors(value), None)
    except Exception as error:  # noqa: BLE001 - row border: a schema can lead jsonschema anywhere
        return f"the schema cannot be applied: {type(error).__name__}: {error}"
    return None if problem is None else f"{problem.json_path}: {problem.message}"


@lru_cache(maxsize=256)
def row_validator(schema_text: str) -> Any:  # noqa: ANN401 - jsonschema's validator
    """`checked_schema` of a row's own schema, given as JSON, which few of them differ in."""
    return checked_schema(parse_json(schema_text), may_backtrack=False)


def checked_schema(schema: dict[str, Any], *, may_backtrack: bool = True) -> Any:  # noqa: ANN401
    """Return jsonschema's validator of a schema, which retrieves nothing.

    The draft is that of `$schema` at the top, by default 2020-12; deeper ones are passed over.

    Args:
        schema: Must not change afterwards.
        may_backtrack: Whether patterns that RE2 cannot run go to Python's `re`, and the work of
            one validation has no bound: for schemas of the job's author, not for those of rows.

    Raises:
        ValueError: Not a JSON Schema, one that refers to another document or to nowhere, is nested
            too deeply, or has a pattern that cannot be run. One line.
    """
    check_levels(schema)
    if not isinstance(schema.get("$schema", ""), str):
        msg = f"$.$schema: expected the name of a draft, found {schema['$schema']!r}"
        raise ValueError(msg[:_MAX_CHARS])  # noqa: TRY004 - a value of the user's
    draft = validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        _check_form(draft, schema, "$")
        places = list(_places(draft, schema))
    except RecursionError:
        raise ValueError("the schema is nested too deeply") from None
    has_unevaluated = any("unevaluatedProperties" in place.schema for place in places)
    for place in places:
        _check_patterns(place, may_backtrack=may_backtrack, has_unevaluated=has_unevaluated)
    kind = _safe_kind(draft, may_backtrack=may_backtrack)
    return kind(schema, registry=referencing.Registry())


def _check_form(draft: Any, schema: Any, path: str) -> None:  # noqa: ANN401
    try:
        # Formats are left out: "regex" there is Python's, patterns here are RE2's.
        draft.check_schema(schema, format_checker=None)
    except jsonschema.SchemaError as error:
        raise ValueError(f"{path}{error.json_path[1:]}: {error.message}"[:_MAX_CHARS]) from error


class _Place(NamedTuple):
    """A schema where it stands."""

    path: str
    schema: dict[str, Any]
    resolver: Any


def _places(draft: Any, root: dict[str, Any]) -> Iterator[_Place]:  # noqa: ANN401
    """Yield every schema that can be applied, once; raise ValueError for a wrong reference.

    Only what stands at a schema's place, or is referred to, is one: a `const` may hold anything.
    """
    specification = specification_with(draft.ID_OF(draft.META_SCHEMA), default=DRAFT202012)
    resource = specification.create_resource(root)
    waiting = [_Place("$", root, referencing.Registry().resolver_with_root(resource))]
    referred: list[_Place] = []
    seen: set[int] = set()
    while waiting or referred:
        is_referred = not waiting
        place = referred.pop() if is_referred else waiting.pop()
        if id(place.schema) in seen:
            continue
        seen.add(id(place.schema))
        if is_referred:  # Not where schemas stand, so that nothing has looked at it yet.
            _check_form(draft, place.schema, place.path)
        resource = specification.create_resource(place.schema)
        resolver = place.resolver.in_subresource(resource)
        waiting += [
            _Place(place.path + path, schema, resolver)
            for path, schema in _subschemas(place.schema)
        ]
        referred += _targets(place._replace(resolver=resolver))
        yield place


def _targets(place: _Place) -> Iterator[_Place]:
    for keyword in _REFERENCES:
        name = place.schema.get(keyword)
        if not isinstance(name, str):
            continue
        what = f"{place.path}: {keyword} {name!r:.120}"
        if not name.startswith("#"):
            raise ValueError(f"{what} is another document, expected one that begins with #")
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
    """Yield what stands in a schema at the place of one, with its path from there."""
    for keyword in _NESTED:
        value = schema.get(keyword)
        one = {f".{keyword}": value}
        many = {f".{keyword}[{at}]": v for at, v in enumerate(value if type(value) is list else ())}
        yield from ((path, item) for path, item in (one | many).items() if type(item) is dict)
    for keyword in _NAMED:
        named = schema.get(keyword)
        for name, item in named.items() if isinstance(named, dict) else ():
            if isinstance(item, dict):
                yield f".{keyword}{step(name)}", item


def _check_patterns(place: _Place, *, may_backtrack: bool, has_unevaluated: bool) -> None:
    own, named = place.schema.get("pattern"), place.schema.get("patternProperties")
    names = named if isinstance(named, dict) else {}
    for pattern in (*([own] if isinstance(own, str) else ()), *names):
        # To tell what is unevaluated, jsonschema runs the patterns on `re` itself.
        is_shared = has_unevaluated and pattern in names
        why = _why_not_linear(pattern)
        if why is None and not is_shared:
            continue
        what = f"{place.path}: pattern {pattern!r:.120}"
        if not may_backtrack:
            reason = "together with unevaluatedProperties, which could run for ever"
            if why is not None:
                reason = f"needs backtracking, which could run for ever, or is wrong (RE2: {why})"
            raise ValueError(f"{what} {reason}"[:_MAX_CHARS])
        try:
            re.compile(pattern)
        except (re.error, OverflowError) as error:
            also = ": beside unevaluatedProperties it has to be Python's, too" if is_shared else ""
            raise ValueError(f"{what}: {error}{also}"[:_MAX_CHARS]) from error


@lru_cache(maxsize=1024)
def _why_not_linear(pattern: str) -> str | None:
    """Say what RE2 has against a pattern; None if it runs it."""
    try:
        _matches_linear(pattern, [""])
    except ValueError as error:  # ArrowInvalid is one, and so is half a character.
        return str(error)
    return None


def _matches_linear(pattern: str, texts: Sequence[str]) -> Sequence[bool]:
    # Arrow compiles it at each call, some microseconds; it offers nothing to keep.
    found: Sequence[bool] = pc.match_substring_regex(
        pa.array(texts, pa.string()), pattern=pattern
    ).to_pylist()
    return found


def _matches(validator: Any, pattern: str, texts: Sequence[str]) -> Sequence[bool]:  # noqa: ANN401
    """Tell in which of some texts a pattern is found."""
    if not validator.may_backtrack or _why_not_linear(pattern) is None:
        return _matches_linear(pattern, texts)
    # Look-around or a backreference, by the author's own choice: no row can bring one.
    return [re.search(pattern, text) is not None for text in texts]


@lru_cache(maxsize=32)
def _safe_kind(draft: Any, *, may_backtrack: bool) -> Any:  # noqa: ANN401
    """Make of a draft's validator one with the keywords of this module, and a bound for rows'."""
    ours = {name: apply for name, apply in _KEYWORDS.items() if name in draft.VALIDATORS}
    keywords = draft.VALIDATORS | ours
    if not may_backtrack:
        keywords = {name: _counted(apply) for name, apply in keywords.items()}
    kind = extend(draft, keywords)  # type: ignore[no-untyped-call]
    evolve = kind.evolve

    def evolve_as_this(validator: Any, **changes: Any) -> Any:  # noqa: ANN401
        # At a $schema jsonschema would change to the stock validator, which has no limits.
        schema = changes.get("schema")
        if isinstance(schema, dict) and "$schema" in schema:
            changes["schema"] = {k: v for k, v in schema.items() if k != "$schema"}
        return evolve(validator, **changes)

    kind.evolve, kind.may_backtrack = evolve_as_this, may_backtrack
    return kind


def _counted(apply: Keyword) -> Keyword:
    def counted(*args: Any) -> Iterator[Any]:  # noqa: ANN401
        _effort.num_left -= 1
        if _effort.num_left < 0:
            raise TooMuchWorkError(f"more than {MAX_KEYWORDS} keywords to apply")
        yield from apply(*args) or ()

    return counted


def _multiple_of(validator: Any, divisor: Any, instance: Any, _: Any) -> Iterator[Any]:  # noqa: ANN401
    """Tell multiples of decimal numbers as they are written: 4.02 is one of 0.01."""
    if validator.is_type(instance, "number"):
        quotient = _exact(instance) / _exact(divisor)
        if quotient.denominator != 1:
            yield jsonschema.ValidationError(f"{instance!r} is not a multiple of {divisor!r}")


def _exact(number: float) -> Fraction:
    return Fraction(number if isinstance(number, int) else repr(number))


def _pattern(validator: Any, regex: str, instance: Any, _: Any) -> Iterator[Any]:  # noqa: ANN401
    if validator.is_type(instance, "string") and not _matches(validator, regex, [instance])[0]:
        yield jsonschema.ValidationError(f"{instance!r} does not match {regex!r}")


def _pattern_properties(validator: Any, schemas: Any, instance: Any, _: Any) -> Iterator[Any]:  # noqa: ANN401
    names = list(instance) if validator.is_type(instance, "object") else []
    for regex, schema in schemas.items():
        for name, is_match in zip(names, _matches(validator, regex, names), strict=True):
            if is_match:
                yield from validator.descend(instance[name], schema, path=name, schema_path=regex)


def _additional_properties(
    validator: Any,  # noqa: ANN401
    allowed: Any,  # noqa: ANN401
    instance: Any,  # noqa: ANN401
    schema: Any,  # noqa: ANN401
) -> Iterator[Any]:
    if not validator.is_type(instance, "object"):
        return
    extras = [name for name in instance if name not in schema.get("properties", {})]
    for regex in schema.get("patternProperties", {}):
        found = _matches(validator, regex, extras)
        extras = [name for name, is_match in zip(extras, found, strict=True) if not is_match]
    if validator.is_type(allowed, "object"):
        for name in extras:
            yield from validator.descend(instance[name], allowed, path=name)
    elif not allowed and extras:
        names = ", ".join(map(repr, extras))
        verb = "was" if len(extras) == 1 else "were"
        yield jsonschema.ValidationError(
            f"Additional properties are not allowed ({names} {verb} unexpected)"
        )


_KEYWORDS: Mapping[str, Keyword] = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
    "multipleOf": _multiple_of,
    "divisibleBy": _multiple_of,  # Its name in draft 3.
}
