"""The format that answers are held to.

vLLM's constrained decoding makes most answers right already. They are checked all the same: an
answer can be cut off, a backend can leave parts of a schema out, an engine can be another one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from batchgen.answers.json_schema import checked_schema, row_validator, why_invalid
from batchgen.answers.typed import typed_schema
from batchgen.core.data import parse_json
from batchgen.core.errors import ConfigError
from batchgen.core.records import RowError, Sample, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from batchgen.answers.typed import TypedSchema
    from batchgen.core.records import Request
    from batchgen.job.model import OutputConfig

WHERE = "[output]"
_MAX_CHARS = 300


class Reading(NamedTuple):
    """One sample, read."""

    verdict: Verdict
    value: Any = None
    """For the typed column, as `pa.array` takes it; the label of a choice; else None."""
    error: RowError | None = None


_OK = Reading(Verdict.OK)


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """What an answer has to be."""

    structured_outputs: Mapping[str, Any] | None
    """For vLLM: one field of StructuredOutputsParams; None for free text."""
    read: Callable[[Sample, Request | None], Reading]
    """Judge one sample; never raises for what is in it."""
    typed: TypedSchema | None = None
    """Of a JSON Schema."""
    choice: Sequence[str] | None = None
    is_free: bool = False
    """Free text, which may be useful though it was cut off."""

    def read_example(self, text: str) -> RowError | None:
        """What is wrong with an answer that a person wrote."""
        return self.read(Sample(text, "stop"), None).error

    @property
    def fallbacks(self) -> Sequence[str]:
        """Parts of the schema that Arrow cannot carry: they become JSON text."""
        return self.typed.fallbacks if self.typed is not None else ()

    @property
    def enums(self) -> Mapping[str, Sequence[str]]:
        """Label sets by field of the answer; "" for the answer as a whole."""
        if self.choice is not None:
            return {"": self.choice}
        return self.typed.enums if self.typed is not None else {}


def make_format(config: OutputConfig) -> OutputFormat:
    """Compile the format of `[output]`.

    Raises:
        ConfigError: The schema or the regex is wrong, as far as can be told without vLLM.
    """
    if config.json_schema is not None:
        assert isinstance(config.json_schema, dict)  # noqa: S101 - files are read on loading
        return _schema_format(config.json_schema)
    if config.choice is not None:
        return _choice_format(config.choice)
    if config.regex is not None:
        return _regex_format(config.regex)
    if config.schema_column is not None:
        return OutputFormat(None, _read_own_schema)
    if config.grammar is not None:
        return OutputFormat({"grammar": config.grammar}, _read_text)
    of_object = OutputFormat({"json_object": True}, _read_object)
    return of_object if config.json_object else OutputFormat(None, _read_text, is_free=True)


def _schema_format(schema: dict[str, Any]) -> OutputFormat:
    try:
        validator = checked_schema(schema)
        typed = typed_schema(schema)
    except ValueError as error:
        raise ConfigError(WHERE, [f"schema: {error}"]) from error

    def read(sample: Sample, _: Request | None) -> Reading:
        reading = _read_json(sample, validator)
        if reading.error is not None:
            return reading
        try:
            return reading._replace(value=typed.value(reading.value))
        except ValueError as error:
            return _violation(str(error))

    return OutputFormat({"json": schema}, read, typed=typed)


def _choice_format(choice: Sequence[str]) -> OutputFormat:
    labels = frozenset(choice)
    if len(labels) < len(choice) or "" in labels:
        raise ConfigError(WHERE, ["choice: expected different labels, none of them empty"])
    # Cut off, these could have become a longer one, which then is the next in order.
    open_ended = {short for short, long in pairwise(sorted(labels)) if long.startswith(short)}

    def read(sample: Sample, _: Request | None) -> Reading:
        text, is_cut = sample.text, sample.finish_reason == "length"
        if is_cut and (text not in labels or text in open_ended):
            return _truncated(sample)
        if text not in labels:
            return _violation(f"{text[:60]!r} is none of the {len(choice)} labels")
        return Reading(Verdict.OK, text)

    return OutputFormat({"choice": list(choice)}, read, choice=list(choice))


def _regex_format(regex: str) -> OutputFormat:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise ConfigError(WHERE, [f"regex: {regex!r}: {error}"]) from error

    def read(sample: Sample, _: Request | None) -> Reading:
        if sample.finish_reason == "length":
            return _truncated(sample)
        if pattern.fullmatch(sample.text) is None:
            return _violation(f"does not match {regex[:60]!r}")
        return _OK

    return OutputFormat({"regex": regex}, read)


def _read_text(sample: Sample, _: Request | None) -> Reading:
    if sample.finish_reason == "length":
        return _truncated(sample)
    return _OK


def _read_object(sample: Sample, _: Request | None) -> Reading:
    reading = _read_json(sample, None)
    if reading.error is None and not isinstance(reading.value, dict):
        return _violation(f"is {type(reading.value).__name__}, expected a JSON object")
    return reading._replace(value=None)


def _read_own_schema(sample: Sample, request: Request | None) -> Reading:
    if request is None:
        return _OK
    first = request.retry.first if request.retry is not None else request
    schema = (first.params or {})["structured_outputs"]["json"]
    return _read_json(sample, row_validator(json.dumps(schema)))._replace(value=None)


def _read_json(sample: Sample, validator: Any) -> Reading:  # noqa: ANN401
    is_cut = sample.finish_reason == "length"
    try:
        value = parse_json(sample.text)
    except ValueError as error:
        if is_cut:
            return _truncated(sample)
        problem = RowError(Verdict.INVALID_JSON.value, str(error))
        return Reading(Verdict.INVALID_JSON, error=problem)
    if is_cut and not isinstance(value, dict | list):
        return _truncated(sample)  # A number, or a word, that may have been longer.
    if validator is not None and (why := why_invalid(validator, value)):
        return _violation(why)
    return Reading(Verdict.OK, value)


def _truncated(sample: Sample) -> Reading:
    text = f"cut off at max_tokens or max_model_len, after {len(sample.text)} characters"
    return Reading(Verdict.TRUNCATED, error=RowError(Verdict.TRUNCATED.value, text))


def _violation(why: str) -> Reading:
    text = " ".join(why.split())[:_MAX_CHARS].encode("utf-8", "backslashreplace").decode()
    error = RowError(Verdict.SCHEMA_VIOLATION.value, text)
    return Reading(Verdict.SCHEMA_VIOLATION, error=error)
