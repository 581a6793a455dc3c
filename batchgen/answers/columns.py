"""The columns that an answer becomes: their types, fixed at plan time, and their values.

With `n = 1` each is a value; with more samples it is a list of them, null where a sample is not
of its form, except for the vote.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
import pyarrow as pa

from batchgen.answers.output_format import WHERE
from batchgen.answers.probabilities import label_probabilities, value_span
from batchgen.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.answers.output_format import OutputFormat, Reading
    from batchgen.core.records import Sample, TokenLogprobs
    from batchgen.job.model import JobConfig

    Samples = Sequence[Sample]
    Readings = Sequence[Reading]
    Make = Callable[[Samples, Readings], Any]

_CALL = pa.struct([("name", pa.string()), ("arguments", pa.string())])
_TOP = pa.struct([("token", pa.string()), ("logprob", pa.float32())])
_TOKEN = pa.struct([("token", pa.string()), ("logprob", pa.float32()), ("top", pa.list_(_TOP))])


@dataclass(frozen=True, slots=True)
class Column:
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


def answer_columns(job: JobConfig, form: OutputFormat) -> AnswerColumns:
    """Lay out the answer's columns.

    Raises:
        ConfigError: The schema's fields cannot be columns of their own.
    """
    is_many = job.sampling.n > 1
    columns = [*_value_columns(job, form, is_many=is_many)]
    columns.append(_each("text", pa.string(), lambda s, _: s.text, is_many=is_many))
    if job.model.reasoning_parser is not None:
        columns.append(_each("reasoning", pa.string(), lambda s, _: s.reasoning, is_many=is_many))
    if job.model.tool_call_parser is not None:
        calls = pa.list_(_CALL)
        columns.append(_each("tool_calls", calls, lambda s, _: _calls(s), is_many=is_many))
    if job.sampling.logprobs is not None and not form.enums:
        tokens = pa.list_(_TOKEN)
        columns.append(_each("logprobs", tokens, lambda s, _: _logprobs(s), is_many=is_many))
    return AnswerColumns(columns, _label_paths(job, form))


def _label_paths(job: JobConfig, form: OutputFormat) -> list[tuple[str, ...]]:
    if form.choice is not None:
        return [("label",)]
    if job.sampling.n > 1:
        return []
    start = () if job.output.flatten else ("output",)
    return [(*start, name) if name else start for name in form.enums]


def _each(
    name: str,
    kind: pa.DataType,
    make: Callable[[Sample, Reading], Any],
    *,
    is_many: bool,
) -> Column:
    """A column with one value a sample."""
    if not is_many:
        return Column(pa.field(name, kind), lambda s, r: make(s[0], r[0]))
    return Column(
        pa.field(name, pa.list_(kind)),
        lambda samples, readings: [make(s, r) for s, r in zip(samples, readings, strict=True)],
    )


def _value_columns(job: JobConfig, form: OutputFormat, *, is_many: bool) -> list[Column]:
    if form.choice is not None:
        return _choice_columns(form.choice, is_many=is_many, has_logprobs=_has_logprobs(job))
    if form.typed is None:
        return []
    kind = form.typed.type
    if job.output.flatten:
        if not pa.types.is_struct(kind) or is_many:
            problem = "flatten: expected a schema of an object with properties, and sampling.n = 1"
            raise ConfigError(WHERE, [problem])
        columns = [Column(field.with_nullable(True), _member(field.name)) for field in kind]  # noqa: FBT003 - pyarrow's
    else:
        columns = [_each("output", kind, lambda _, r: r.value, is_many=is_many)]
    if form.enums and _has_logprobs(job):
        columns.append(_enum_probabilities(form))
    return columns


def _has_logprobs(job: JobConfig) -> bool:
    return job.sampling.logprobs is not None


def _member(name: str) -> Make:
    return lambda _, readings: None if readings[0].value is None else readings[0].value[name]


def _choice_columns(choice: Sequence[str], *, is_many: bool, has_logprobs: bool) -> list[Column]:
    columns = [Column(pa.field("label", pa.string()), lambda _, r: _majority(r)[0])]
    if is_many:
        share = Column(pa.field("agreement", pa.float32()), lambda _, r: _majority(r)[1])
        columns.append(share)
    if has_logprobs:
        kind = _probability_type(choice)
        columns.append(
            Column(
                pa.field("probabilities", kind),
                lambda samples, readings: _if_good(
                    samples, readings, lambda sample: _choice_probabilities(sample, choice)
                ),
            )
        )
    return columns


def _majority(readings: Readings) -> tuple[str | None, float | None]:
    """The label that most samples have, the first of equals, and its share of all samples."""
    votes = Counter(reading.value for reading in readings if reading.value is not None)
    if not votes:
        return None, None
    label, num = votes.most_common(1)[0]
    return label, num / len(readings)


def _probability_type(labels: Sequence[str]) -> pa.DataType:
    return pa.struct([pa.field(label, pa.float32()) for label in labels])


def _choice_probabilities(sample: Sample, choice: Sequence[str]) -> dict[str, float | None] | None:
    span = (0, len(sample.text))
    found = label_probabilities(sample.text, _answer_tokens(sample), span, choice, "")
    return None if found is None else dict(zip(choice, found, strict=True))


def _enum_probabilities(form: OutputFormat) -> Column:
    if "" in form.enums:  # The answer as a whole is a label.
        labels = form.enums[""]
        return Column(
            pa.field("probabilities", _probability_type(labels)),
            lambda samples, readings: _if_good(
                samples, readings, lambda s: _probabilities(s, _inside_quotes(s.text), labels)
            ),
        )
    enums = form.enums
    kind = pa.struct([pa.field(name, _probability_type(enums[name])) for name in enums])

    def of_fields(sample: Sample) -> dict[str, Any]:
        return {
            name: _probabilities(sample, value_span(sample.text, name), labels)
            for name, labels in enums.items()
        }

    return Column(
        pa.field("probabilities", kind),
        lambda samples, readings: _if_good(samples, readings, of_fields),
    )


def _if_good(
    samples: Samples, readings: Readings, make: Callable[[Sample], dict[str, Any] | None]
) -> dict[str, Any] | None:
    """Of the first sample, if it has log probabilities and is of its form."""
    if samples[0].logprobs is None or readings[0].value is None:
        return None
    return make(samples[0])


def _inside_quotes(text: str) -> tuple[int, int]:
    return text.index('"') + 1, text.rindex('"')


def _probabilities(
    sample: Sample, span: tuple[int, int] | None, labels: Sequence[str]
) -> dict[str, float | None] | None:
    """Of labels in a JSON string; `span` is where it stands, inside its quotes."""
    if span is None:
        return None
    written = [orjson.dumps(label).decode()[1:-1] for label in labels]
    found = label_probabilities(sample.text, _answer_tokens(sample), span, written, '"')
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
