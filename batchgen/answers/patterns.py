r"""The keywords of JSON Schema that match patterns, on RE2: in linear time, whatever the pattern.

jsonschema runs them on Python's `re`, where `^(a+)+$` takes for ever on some sixty characters. A
pattern is searched for, it need not match the whole. RE2's `\d` and `\w` are ASCII's, as in
ECMAScript, whose patterns JSON Schema's are.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jsonschema
import pyarrow as pa
import pyarrow.compute as pc
from jsonschema.validators import extend

from batchgen.answers.effort import bounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Matches = Callable[[str, Sequence[str]], Sequence[bool]]
    """Pattern, texts -> in which of them it is found."""


@lru_cache(maxsize=1024)
def why_not_linear(pattern: str) -> str | None:
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


def _matches_any(pattern: str, texts: Sequence[str]) -> Sequence[bool]:
    if why_not_linear(pattern) is None:
        return _matches_linear(pattern, texts)
    # Look-around or a backreference, by the author's own choice: no row can bring one.
    return [re.search(pattern, text) is not None for text in texts]


@lru_cache(maxsize=32)
def safe_kind(kind: Any, *, may_backtrack: bool) -> Any:  # noqa: ANN401
    """Make of a draft's validator one whose patterns run here.

    Not those that it looks at for `unevaluatedProperties`, inside jsonschema.

    Args:
        kind: jsonschema's validator class.
        may_backtrack: Whether patterns that RE2 cannot run go to Python's `re`, and the work of
            one validation has no bound: for schemas of the job's author.
    """
    matches = _matches_any if may_backtrack else _matches_linear
    keywords = {
        "pattern": _pattern_keyword(matches),
        "patternProperties": _pattern_properties_keyword(matches),
        "additionalProperties": _additional_properties_keyword(matches),
    }
    safe = extend(kind, keywords)  # type: ignore[no-untyped-call]
    return safe if may_backtrack else bounded(safe)


def _pattern_keyword(matches: Matches) -> Any:  # noqa: ANN401 - as jsonschema takes it
    def pattern(validator: Any, regex: str, instance: Any, _: Any) -> Iterator[Any]:  # noqa: ANN401
        if validator.is_type(instance, "string") and not matches(regex, [instance])[0]:
            yield jsonschema.ValidationError(f"{instance!r} does not match {regex!r}")

    return pattern


def _pattern_properties_keyword(matches: Matches) -> Any:  # noqa: ANN401
    def pattern_properties(
        validator: Any,  # noqa: ANN401
        schemas: dict[str, Any],
        instance: Any,  # noqa: ANN401
        _: Any,  # noqa: ANN401
    ) -> Iterator[Any]:
        if not validator.is_type(instance, "object"):
            return
        names = list(instance)
        for regex, schema in schemas.items():
            for name, is_match in zip(names, matches(regex, names), strict=True):
                if is_match:
                    yield from validator.descend(
                        instance[name], schema, path=name, schema_path=regex
                    )

    return pattern_properties


def _additional_properties_keyword(matches: Matches) -> Any:  # noqa: ANN401
    def additional_properties(
        validator: Any,  # noqa: ANN401
        allowed: Any,  # noqa: ANN401
        instance: Any,  # noqa: ANN401
        schema: dict[str, Any],
    ) -> Iterator[Any]:
        if not validator.is_type(instance, "object"):
            return
        extras = [name for name in instance if name not in schema.get("properties", {})]
        for regex in schema.get("patternProperties", {}):
            found = matches(regex, extras)
            extras = [name for name, is_match in zip(extras, found, strict=True) if not is_match]
        if validator.is_type(allowed, "object"):
            for name in extras:
                yield from validator.descend(instance[name], allowed, path=name)
        elif not allowed and extras:
            names = ", ".join(map(repr, extras))
            yield jsonschema.ValidationError(
                f"Additional properties are not allowed ({names} "
                f"{'was' if len(extras) == 1 else 'were'} unexpected)"
            )

    return additional_properties
