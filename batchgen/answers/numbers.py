"""Numbers that an engine gives instead of a text: what they have to be, and their columns.

An embedding, a probability for each label, or a score: float32, as bytes all the way from the
engine to Arrow. vLLM can give a wrong one without a word: an empty vector or a score of 0.0 where
a request has failed (vllm/outputs.py, EmbeddingRequestOutput and ScoringRequestOutput, 0.26 to
0.33), and what is no number where a model overflows. None of these is a row's answer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from batchgen.answers.output_format import AnswerColumns, Column, OutputFormat, Reading
from batchgen.core.records import Request, RowError, Sample, TaskFacts, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.job.model import JobConfig

    Numbers = memoryview[float]
    Laid = tuple[list[Column], list[tuple[str, ...]]]


_MOST_FLOAT16 = 65_504


def number_columns(job: JobConfig, facts: TaskFacts) -> tuple[OutputFormat, AnswerColumns]:
    """Say what the numbers of a job's task have to be, and lay out their columns."""
    lay = {"embed": _embedding, "classify": _classes, "score": _score}[job.task]
    columns, labels = lay(job, facts)
    error_type, may_be_zero = f"bad_{job.task}", job.task == "classify"
    most = _MOST_FLOAT16 if job.pooling.dtype == "float16" else math.inf

    def read(sample: Sample, _: Request | None) -> Reading:
        found = numbers_of(sample)
        why = _problem(found, facts.size, may_be_zero=may_be_zero)
        if why is None and most < math.inf and max(*found, -min(found)) > most:
            why = f"a number is over {most:,}, the most that float16 holds"
        if why is not None:
            return Reading(Verdict.ERROR, error=RowError(error_type, why))
        is_cut = sample.finish_reason == "length"
        return Reading(Verdict.TRUNCATED if is_cut else Verdict.OK, found)

    return OutputFormat(None, read), AnswerColumns(columns, labels)


def numbers_of(sample: Sample) -> Numbers:
    """See what an engine gave as numbers."""
    data = sample.numbers or b""
    return memoryview(data[: len(data) // 4 * 4]).cast("f")


def _problem(numbers: Numbers, size: int, *, may_be_zero: bool) -> str | None:
    """Say what is wrong with an answer, if anything is."""
    if len(numbers) != size:
        return f"the engine gave {len(numbers)} numbers, expected {size}"
    # Of finite float32 the sum, a float64, is finite, and of others it never is.
    if not math.isfinite(sum(numbers)):
        return "the engine gave a number that is not finite"
    if not may_be_zero and not any(numbers):
        return "the engine gave zero, which vLLM does where a request has failed"
    return None


def _column(name: str, kind: pa.DataType, of: Callable[[Numbers], Any]) -> Column:
    """A column of what can be told by the numbers; null where they are no answer."""
    return Column(pa.field(name, kind), lambda _, r: None if r[0].value is None else of(r[0].value))


def _embedding(job: JobConfig, facts: TaskFacts) -> Laid:
    kind = {"float32": pa.float32(), "float16": pa.float16()}[job.pooling.dtype]
    columns = [Column(pa.field("embedding", pa.list_(kind, facts.size)), lambda _, r: r[0].value)]
    if job.pooling.too_long == "chunk":
        columns.append(Column(pa.field("num_chunks", pa.int32()), lambda s, _: s[0].num_chunks))
    return columns, []


def _score(_: JobConfig, __: TaskFacts) -> Laid:
    return [_column("score", pa.float32(), lambda numbers: numbers[0])], []


def _classes(job: JobConfig, facts: TaskFacts) -> Laid:
    labels = facts.labels
    by_label = pa.struct([pa.field(label, pa.float32()) for label in labels])
    all_of_them = _column("probabilities", by_label, lambda ns: dict(zip(labels, ns, strict=True)))
    if facts.is_multi_label:
        least = job.pooling.threshold

        def those_that_hold(numbers: Numbers) -> list[str]:
            return [label for label, p in zip(labels, numbers, strict=True) if p >= least]

        return [_column("labels", pa.list_(pa.string()), those_that_hold), all_of_them], [
            ("labels",)
        ]
    columns = [
        _column("label", pa.string(), lambda numbers: labels[_likeliest(numbers)]),
        _column("probability", pa.float32(), max),
        all_of_them,
    ]
    return columns, [("label",)]


def _likeliest(numbers: Sequence[float]) -> int:
    return max(range(len(numbers)), key=numbers.__getitem__)
