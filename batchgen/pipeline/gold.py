"""Answers held against the right ones, which rows of the input carry in a column."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pyarrow as pa

from batchgen.core.data import pl
from batchgen.core.errors import ConfigError, suggestion
from batchgen.source.columns import is_json, type_word
from batchgen.store.result_files import label_column

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from batchgen.answers.output_format import AnswerColumns
    from batchgen.job.model import JobConfig

Counts = Counter[tuple[str, str | None]]
"""Rows by gold label and answered label, None for a row without an answer."""
MOST_LABELS = 1000
"""A column with more of them holds no labels."""


def answer_path(job: JobConfig, answer: AnswerColumns) -> Sequence[str] | None:
    """Find which labels are scored: a column without the prefix, and fields of structs in it.

    None if the job does not say, or says what is none.
    """
    paths = {job.output.prefix + ".".join(path): path for path in answer.label_paths}
    if job.score.answer is not None:
        return paths.get(job.score.answer)
    return next(iter(paths.values())) if len(paths) == 1 else None


def check_score(job: JobConfig, answer: AnswerColumns, carried: pa.Schema) -> None:
    """Refuse a job that cannot be scored as it says.

    Args:
        job: As loaded.
        answer: Its columns of the answer.
        carried: The input's columns that go to the output.

    Raises:
        ConfigError: With every problem.
    """
    gold, wanted = job.score.gold, job.score.answer
    labels = [job.output.prefix + name for name in answer.labels]
    problems = []
    if gold is None:
        if job.gate.min_accuracy is not None:
            problems.append("gold: missing, expected the column that gate.min_accuracy goes by")
    elif gold not in carried.names:
        problems.append(f"gold: no such column in the output{suggestion(gold, carried.names)}")
    elif is_json(carried.field(gold)) or not _holds_labels(carried.field(gold).type):
        kind = type_word(carried.field(gold)) or carried.field(gold).type
        problems.append(f"gold: {gold!r} is {kind}, expected texts or whole numbers")
    if gold is not None and answer_path(job, answer) is None:
        if not labels:
            problems.append("the answer has no labels, expected output.choice or an enum")
        elif wanted is None:
            problems.append(f"answer: missing, expected one of {', '.join(labels)}")
        else:
            problems.append(f"answer: {wanted!r} holds no labels{suggestion(wanted, labels)}")
    if problems:
        raise ConfigError("[score]", problems)


def _holds_labels(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_labels(kind.value_type)
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in (*tests, *_OTHER_LABELS))


_OTHER_LABELS = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)


def count_gold(tables: Iterable[pa.Table], gold: str, path: Sequence[str], prefix: str) -> Counts:
    """Count rows by gold label and answered label; rows without a gold label do not count.

    Args:
        tables: Rows of results, piece by piece.
        gold: The column with the right labels; null and "" are none.
        path: See `answer_path`.
        prefix: Of batchgen's columns.
    """
    counts: Counts = Counter()
    for table in tables:
        answered = label_column(table, prefix + path[0], path[1:])
        frame = pl.DataFrame(
            {
                "gold": pl.Series(table.column(gold).cast(pa.string())),
                "answered": pl.Series(answered.cast(pa.string())),
                "is_ok": pl.Series(table.column(f"{prefix}status")) == "ok",
            }
        )
        is_scored = pl.col("gold").is_not_null() & (pl.col("gold") != "")
        found = (
            frame.filter(is_scored)
            .group_by("gold", pl.when("is_ok").then("answered").alias("answered"))
            .len()
        )
        for right, label, num in found.iter_rows():
            counts[right, label] += num
    return counts
