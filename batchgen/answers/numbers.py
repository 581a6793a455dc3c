"""Numbers that an engine gives instead of a text: what they have to be, and their columns.

An embedding, a probability for each label, a score, or two numbers a token: float32, as bytes all
the way from the engine to Arrow. vLLM can give a wrong one without a word: an empty vector or a
score of 0.0 where a request has failed (vllm/outputs.py, EmbeddingRequestOutput and
ScoringRequestOutput, 0.26 to 0.33), and what is no number where a model overflows. None of these is
a row's answer.
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
_MOST_EXPONENT = 700
"""A larger one's power of e is no float64."""


def number_columns(job: JobConfig, facts: TaskFacts) -> tuple[OutputFormat, AnswerColumns]:
    """Say what the numbers of a job's task have to be, and lay out their columns."""
    lays = {"embed": _embedding, "classify": _classes, "score": _score}
    columns, labels = lays.get(job.task, _likelihood)(job, facts)
    error_type = f"bad_{job.task}"
    most = _MOST_FLOAT16 if job.pooling.dtype == "float16" else math.inf

    def read(sample: Sample, request: Request | None) -> Reading:
        found = numbers_of(sample)
        size = facts.size
        if request is not None and job.task == "score":
            size = len(request.prompt) - 1  # One a passage.
        why = _problem(found, size, job.task)
        is_over = most < math.inf and not _is_below(found, 15) and max(*found, -min(found)) > most
        if why is None and is_over:
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


def _problem(numbers: Numbers, size: int, task: str) -> str | None:
    """Say what is wrong with an answer, if anything is."""
    is_by_token = task == "loglikelihood"
    if len(numbers) != size and not (is_by_token and numbers and len(numbers) % size == 0):
        expected = f"{size}{' for each token' if is_by_token else ''}"
        return f"the engine gave {len(numbers)} numbers, expected {expected}"
    # Of finite float32 the sum, a float64, is finite, and of others it never is.
    if not _is_below(numbers, 127) and not math.isfinite(sum(numbers)):
        return "the engine gave a number that is not finite"
    if (task == "embed" and not any(numbers)) or (task == "score" and not all(numbers)):
        return "the engine gave zero, which vLLM does where a request has failed"
    if is_by_token and max(_logprobs(numbers)) > 0:
        return "the engine gave a log probability above 0"
    return None


def _is_below(numbers: Numbers, exponent: int) -> bool:
    """Whether all are surely below 2 to the power of an odd number, without looking at each.

    The last byte of a float32, as processors of today store it, is its sign and most of its
    exponent.
    """
    top = (exponent + 127) // 2
    return not numbers.tobytes()[3::4].translate(None, bytes([*range(top), *range(128, 128 + top)]))


def _column(name: str, kind: pa.DataType, of: Callable[[Numbers], Any]) -> Column:
    """A column of what can be told by the numbers; null where they are no answer."""
    return Column(pa.field(name, kind), lambda _, r: None if r[0].value is None else of(r[0].value))


def _embedding(job: JobConfig, facts: TaskFacts) -> Laid:
    kind = {"float32": pa.float32(), "float16": pa.float16()}[job.pooling.dtype]
    columns = [Column(pa.field("embedding", pa.list_(kind, facts.size)), lambda _, r: r[0].value)]
    if job.pooling.too_long == "chunk":
        columns.append(Column(pa.field("num_chunks", pa.int32()), lambda s, _: s[0].num_chunks))
    return columns, []


def _score(job: JobConfig, _: TaskFacts) -> Laid:
    if job.asks_by_line:  # For several passages, where it likes.
        return [_column("scores", pa.list_(pa.float32()), list)], []
    return [_column("score", pa.float32(), lambda numbers: numbers[0])], []


_TOKEN = pa.struct([("token", pa.string()), ("logprob", pa.float32())])


def _likelihood(job: JobConfig, _: TaskFacts) -> Laid:
    columns = [
        _column("logprob", pa.float64(), lambda numbers: sum(_logprobs(numbers))),
        _column("num_tokens", pa.int32(), lambda numbers: len(numbers) // 2),
        _column("perplexity", pa.float64(), _perplexity),
        _column("is_greedy", pa.bool_(), lambda numbers: max(numbers[len(numbers) // 2 :]) <= 1),
    ]
    if job.pooling.token_logprobs:
        columns.append(Column(pa.field("token_logprobs", pa.list_(_TOKEN)), _tokens))
    return columns, []


def _logprobs(numbers: Numbers) -> Numbers:
    """The first half; the other are the tokens' ranks, 1 for the likeliest."""
    return numbers[: len(numbers) // 2]


def _perplexity(numbers: Numbers) -> float:
    mean = sum(_logprobs(numbers)) / (len(numbers) // 2)
    return math.exp(-mean) if mean > -_MOST_EXPONENT else math.inf


def _tokens(samples: Sequence[Sample], readings: Sequence[Reading]) -> list[tuple[Any, ...]] | None:
    if readings[0].value is None:
        return None
    return [(token, logprob) for token, logprob, _ in samples[0].logprobs or ()]


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
