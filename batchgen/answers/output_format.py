"""The format that answers are held to, and the columns that they become.

vLLM's constrained decoding makes most answers right already. They are checked all the same: an
answer can be cut off, a backend can leave parts of a schema out, an engine can be another one.

With `n = 1` a column of the answer holds a value; with more samples it is a list of them, null
where a sample is not of its form, except for the vote; `samples` says what became of each. Types
are fixed at plan time.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
import pyarrow as pa

from batchgen.answers.json_schema import checked_schema, row_validator, why_invalid
from batchgen.answers.probabilities import label_probabilities, value_span
from batchgen.answers.typed import TypedSchema, typed_schema
from batchgen.core.data import parse_json
from batchgen.core.errors import ConfigError
from batchgen.core.records import Request, RowError, Sample, TokenLogprobs, Verdict

if TYPE_CHECKING:
    from batchgen.job.model import JobConfig, OutputConfig

    Samples = Sequence[Sample]
    Readings = Sequence["Reading"]
    Make = Callable[[Samples, Readings], Any]

_WHERE = "[output]"
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
        raise ConfigError(_WHERE, [f"schema: {error}"]) from error

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
        raise ConfigError(_WHERE, ["choice: expected different labels, none of them empty"])
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
        raise ConfigError(_WHERE, [f"regex: {regex!r}: {error}"]) from error

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
        return _bad(Verdict.INVALID_JSON, str(error))
    if is_cut and not isinstance(value, dict | list):
        return _truncated(sample)  # A number, or a word, that may have been longer.
    if validator is not None and (why := why_invalid(validator, value)):
        return _violation(why)
    return Reading(Verdict.OK, value)


def _truncated(sample: Sample) -> Reading:
    text = f"cut off at max_tokens or max_model_len, after {len(sample.text)} characters"
    return _bad(Verdict.TRUNCATED, text)


def _violation(why: str) -> Reading:
    return _bad(Verdict.SCHEMA_VIOLATION, " ".join(why.split())[:_MAX_CHARS])


def _bad(verdict: Verdict, text: str) -> Reading:
    return Reading(verdict, error=RowError(verdict.value, text))


_CALL = pa.struct([("name", pa.string()), ("arguments", pa.string())])
_TOP = pa.struct([("token", pa.string()), ("logprob", pa.float32())])
_TOKEN = pa.struct([("token", pa.string()), ("logprob", pa.float32()), ("top", pa.list_(_TOP))])


SAMPLE = pa.struct(
    [
        ("verdict", pa.string()),
        ("finish_reason", pa.string()),
        ("num_output_tokens", pa.int32()),
        ("cumulative_logprob", pa.float32()),
        ("error", pa.string()),
    ]
)
"""What a row's `samples` say of each."""


CHOICE = pa.struct(
    [
        *(("text", pa.string()), ("finish_reason", pa.string()), ("logprobs", pa.list_(_TOKEN))),
        *(("reasoning", pa.string()), ("tool_calls", pa.list_(_CALL))),
    ]
)
"""An answer of several, or one with log probabilities, to a line of OpenAI's batch files."""


class Column(NamedTuple):
    """One column of the answer."""

    field: pa.Field
    """Its name without the job's prefix."""
    make: Make
    """Its value, from the samples and how they read."""


@dataclass(frozen=True, slots=True)
class AnswerColumns:
    """All columns of the answer, in order."""

    columns: Sequence[Column]
    label_paths: Sequence[Sequence[str]]
    """Those that hold labels, for the gate: a column, or a column and a field of its struct."""
    of_one: AnswerColumns | None = None
    """Of samples that are judged one by one: the columns as each has them, which rules read."""

    @property
    def labels(self) -> Sequence[str]:
        """The same as people write them: `label`, `output.label`."""
        return [".".join(path) for path in self.label_paths]

    @property
    def fields(self) -> Sequence[pa.Field]:
        """Names without prefix, and types."""
        return [column.field for column in self.columns]

    def values(self, samples: Samples, readings: Readings) -> list[Any]:
        """One value a column."""
        return [column.make(samples, readings) for column in self.columns]


def answer_columns(job: JobConfig, output: OutputFormat) -> AnswerColumns:
    """Lay out the answer's columns.

    Raises:
        ConfigError: The schema's fields cannot be columns of their own.
    """
    is_many, has_logprobs = job.sampling.n > 1, job.sampling.logprobs is not None

    def each(name: str, kind: pa.DataType, make: Callable[[Sample, Reading], Any]) -> Column:
        """A column with one value a sample."""
        if not is_many:
            return Column(pa.field(name, kind), lambda s, r: make(s[0], r[0]))
        return Column(
            pa.field(name, pa.list_(kind)),
            lambda samples, readings: [make(s, r) for s, r in zip(samples, readings, strict=True)],
        )

    columns = []
    if output.choice is not None:
        label, agreement = pa.field("label", pa.string()), pa.field("agreement", pa.float32())
        columns.append(Column(label, lambda _, r: _majority(r)[0]))
        columns += [Column(agreement, lambda _, r: _majority(r)[1])] * is_many
    elif output.typed is not None and job.output.flatten:
        columns += _flattened(output.typed.type, is_many=is_many)
    elif output.typed is not None:
        columns.append(each("output", output.typed.type, lambda _, r: r.value))
    if output.enums and has_logprobs:
        columns.append(_probabilities(output.enums, is_json=output.choice is None))
    columns += _of_given(job, output)
    columns.append(each("text", pa.string(), lambda s, _: s.text))
    if job.model.reasoning_parser is not None:
        columns.append(each("reasoning", pa.string(), lambda s, _: s.reasoning))
    if job.model.tool_call_parser is not None:
        columns.append(each("tool_calls", pa.list_(_CALL), lambda s, _: _calls(s)))
    if has_logprobs and not output.enums:
        columns.append(each("logprobs", pa.list_(_TOKEN), lambda s, _: _logprobs(s)))
    columns += [Column(pa.field("choices", pa.list_(CHOICE)), _choices)] * job.asks_by_line
    columns += [each("samples", SAMPLE, _told)] * job.tells_samples
    one = job.changed(sampling={"n": 1})
    of_one = answer_columns(one, output) if job.tells_samples else None
    return AnswerColumns(columns, _label_paths(job, output), of_one)


def _told(sample: Sample, reading: Reading) -> dict[str, Any]:
    """As `SAMPLE` has it."""
    logprobs = sample.logprobs
    total = None if logprobs is None else math.fsum(token.logprob for token in logprobs)
    return {
        "verdict": reading.verdict.value,
        "finish_reason": sample.finish_reason,
        "num_output_tokens": sample.num_tokens,
        "cumulative_logprob": total,
        "error": reading.error and reading.error.error,
    }


def _choices(samples: Samples, _: Readings) -> list[dict[str, Any]] | None:
    """As `CHOICE` has it; null where `text` says all."""
    if len(samples) == 1 and samples[0].logprobs is None:
        return None
    return [
        {
            "text": one.text,
            "finish_reason": one.finish_reason,
            "logprobs": _logprobs(one),
            "reasoning": one.reasoning,
            "tool_calls": _calls(one),
        }
        for one in samples
    ]


def _label_paths(job: JobConfig, output: OutputFormat) -> list[tuple[str, ...]]:
    if output.choice is not None:
        return [("label",)]
    if job.sampling.n > 1:
        return []
    start = () if job.output.flatten else ("output",)
    return [(*start, name) if name else start for name in output.enums]


def _flattened(kind: pa.DataType, *, is_many: bool) -> list[Column]:
    """A column for each field of an object."""
    if not pa.types.is_struct(kind) or is_many:
        problem = "flatten: expected a schema of an object with properties, and sampling.n = 1"
        raise ConfigError(_WHERE, [problem])

    def member(name: str) -> Make:
        return lambda _, readings: None if readings[0].value is None else readings[0].value[name]

    return [Column(field.with_nullable(True), member(field.name)) for field in kind]  # noqa: FBT003 - pyarrow's


def _majority(readings: Readings) -> tuple[str | None, float | None]:
    """The label that most samples have, the first of equals, and its share of all samples.

    Samples that a rule refused only vote where it refused all.
    """
    given = [reading for reading in readings if reading.value is not None]
    votes = Counter(reading.value for reading in given if reading.error is None)
    votes = votes or Counter(reading.value for reading in given)
    if not votes:
        return None, None
    label, num = votes.most_common(1)[0]
    return label, num / len(readings)


def _probabilities(enums: Mapping[str, Sequence[str]], *, is_json: bool) -> Column:
    """A probability for each label, of the first sample; null unless it is of its format.

    Args:
        enums: Field of the answer, "" for the answer as a whole -> its labels.
        is_json: Whether labels are JSON strings, else the answer is one as it stands.
    """
    kinds = {
        name: pa.struct([pa.field(label, pa.float32()) for label in labels])
        for name, labels in enums.items()
    }
    is_whole = "" in enums
    kind = kinds[""] if is_whole else pa.struct([pa.field(*item) for item in kinds.items()])

    def make(samples: Samples, readings: Readings) -> Any:  # noqa: ANN401
        if samples[0].logprobs is None or readings[0].value is None:
            return None
        found = {name: _of_labels(samples[0], name, enums[name], is_json) for name in enums}
        return found[""] if is_whole else found

    return Column(pa.field("probabilities", kind), make)


def _of_given(job: JobConfig, output: OutputFormat) -> list[Column]:
    """With `label_probability` a column for each enum: that of the label which the answer has."""
    if not job.output.label_probability:
        return []
    if not output.enums or job.sampling.logprobs is None or job.sampling.n > 1:
        problem = "label_probability: expected a choice or enums, sampling.logprobs, and n = 1"
        raise ConfigError(_WHERE, [problem])
    is_json = output.choice is None

    def of(name: str) -> Make:
        def make(samples: Samples, readings: Readings) -> float | None:
            value = readings[0].value
            given = value.get(name) if name and value else value
            if given is None or samples[0].logprobs is None:
                return None
            return (_of_labels(samples[0], name, output.enums[name], is_json) or {}).get(given)

        return make

    whole = "output" if is_json else "label"
    kind = pa.float32()
    return [
        Column(pa.field(f"{name or whole}_probability", kind), of(name)) for name in output.enums
    ]


def _of_labels(
    sample: Sample,
    name: str,
    labels: Sequence[str],
    is_json: bool,  # noqa: FBT001
) -> dict[str, float | None] | None:
    text = sample.text
    if not is_json:
        span: tuple[int, int] | None = (0, len(text))
    elif name:
        span = value_span(text, name)
    else:
        span = text.index('"') + 1, text.rindex('"')
    if span is None:
        return None
    written = [orjson.dumps(label).decode()[1:-1] for label in labels] if is_json else labels
    closing = '"' if is_json else ""
    found = label_probabilities(text, _answer_tokens(sample), span, written, closing)
    return None if found is None else dict(zip(labels, found, strict=True))


def _answer_tokens(sample: Sample) -> Sequence[TokenLogprobs]:
    """The tokens of the answer, without those of the reasoning before it."""
    tokens = sample.logprobs or ()
    if sample.reasoning is None:
        return tokens
    tail = ""
    for start in range(len(tokens) - 1, -1, -1):
        tail = (tokens[start].token or "") + tail
        if tail == sample.text:
            return tokens[start:]
    return ()


def _calls(sample: Sample) -> list[dict[str, str]] | None:
    if sample.tool_calls is None:
        return None
    return [{"name": name, "arguments": arguments} for name, arguments in sample.tool_calls]


def _logprobs(sample: Sample) -> list[dict[str, Any]] | None:
    if sample.logprobs is None:
        return None
    return [
        {
            "token": at.token,
            "logprob": at.logprob,
            "top": [
                {"token": token, "logprob": logprob}
                for token, logprob in at.top
                if math.isfinite(logprob)
            ],
        }
        for at in sample.logprobs
    ]
