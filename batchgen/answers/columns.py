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
    from collections.abc import Callable, Mapping, Sequence

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
    columns.append(each("text", pa.string(), lambda s, _: s.text))
    if job.model.reasoning_parser is not None:
        columns.append(each("reasoning", pa.string(), lambda s, _: s.reasoning))
    if job.model.tool_call_parser is not None:
        columns.append(each("tool_calls", pa.list_(_CALL), lambda s, _: _calls(s)))
    if has_logprobs and not output.enums:
        columns.append(each("logprobs", pa.list_(_TOKEN), lambda s, _: _logprobs(s)))
    return AnswerColumns(columns, _label_paths(job, output))


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
        raise ConfigError(WHERE, [problem])

    def member(name: str) -> Make:
        return lambda _, readings: None if readings[0].value is None else readings[0].value[name]

    return [Column(field.with_nullable(True), member(field.name)) for field in kind]  # noqa: FBT003 - pyarrow's


def _majority(readings: Readings) -> tuple[str | None, float | None]:
    """The label that most samples have, the first of equals, and its share of all samples."""
    votes = Counter(reading.value for reading in readings if reading.value is not None)
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
