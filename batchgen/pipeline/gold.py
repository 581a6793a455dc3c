"""Answers held against the right ones: rows carry them in a column, or a file has them by an id."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pyarrow as pa

from batchgen.core.data import pl
from batchgen.core.errors import ConfigError, SourceError, suggestion
from batchgen.core.runtime import option
from batchgen.source.columns import is_json, type_word
from batchgen.source.formats import read_whole
from batchgen.store.result_files import label_column

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from batchgen.answers.output_format import AnswerColumns
    from batchgen.job.model import JobConfig, ScoreConfig

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
    gold, wanted, column = job.score.gold, job.score.answer, job.score.column
    labels = [job.output.prefix + name for name in answer.labels]
    problems = []
    if gold is None:
        if job.gate.min_accuracy is not None or job.score.gold_path is not None:
            problems.append("gold: missing, expected the column that has the right labels")
    elif column is None or column not in carried.names:
        problems.append(missing_column(job.score, carried.names))
    elif job.score.gold_path is not None:
        read_gold(job.score)
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


def missing_column(score: ScoreConfig, names: Sequence[str]) -> str:
    """Say that the output lacks the column that right labels are in, or are found by."""
    key, name = ("on", score.on) if score.gold and score.gold_path else ("gold", score.gold)
    if name is None:
        return f"{key}: missing, expected a column: {option(f'--{key}')}"
    return f"{key}: no column {name!r} in the output{suggestion(name, names)}"


def read_gold(score: ScoreConfig) -> pl.DataFrame:
    """Read the file of right labels: `key` names a row, `label` is its label, both texts.

    Raises:
        ConfigError: It cannot be read, lacks a column, or names a row twice.
    """
    path, problem = str(score.gold_path), ""
    try:
        key, label = (pl.col(name).cast(pl.String) for name in (str(score.on), str(score.gold)))
        found = read_whole(path).select(key=key, label=label).drop_nulls()
    except (pl.exceptions.PolarsError, OSError, SourceError) as error:
        problem = f"cannot be read: {str(error).splitlines()[0]}"
    else:
        if not (twice := found.filter(pl.col("key").is_duplicated())).is_empty():
            problem = f"{score.on} = {twice['key'][0]!r} is in several rows, expected in one"
    if problem:
        raise ConfigError("[score]", [f"gold_path: {path}: {problem}"])
    return found


def right_label(score: ScoreConfig, column: str) -> pl.Expr:
    """Read the right label of rows as text, null where there is none.

    Args:
        score: What answers are scored against.
        column: Where rows have what `score.column` names.
    """
    text = pl.col(column).cast(pl.String)
    if score.gold_path is not None:
        gold = read_gold(score)
        text = text.replace_strict(gold["key"], gold["label"], default=None, return_dtype=pl.String)
    return pl.when(text != "").then(text)


def _holds_labels(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_labels(kind.value_type)
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in (*tests, *_OTHER_LABELS))


_OTHER_LABELS = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)


def count_gold(
    tables: Iterable[pa.Table], score: ScoreConfig, path: Sequence[str], prefix: str
) -> Counts:
    """Count rows by gold label and answered label; rows without a gold label do not count.

    Args:
        tables: Rows of results, piece by piece.
        score: Where right labels are; null and "" are none.
        path: See `answer_path`.
        prefix: Of batchgen's columns.
    """
    counts: Counts = Counter()
    gold = right_label(score, "gold")
    for table in tables:
        answered = label_column(table, prefix + path[0], path[1:])
        frame = pl.DataFrame(
            {
                "gold": pl.Series(table.column(str(score.column)).cast(pa.string())),
                "answered": pl.Series(answered.cast(pa.string())),
                "is_ok": pl.Series(table.column(f"{prefix}status")) == "ok",
            }
        )
        found = (
            frame.with_columns(gold.alias("gold"))
            .drop_nulls("gold")
            .group_by("gold", pl.when("is_ok").then("answered").alias("answered"))
            .len()
        )
        for right, label, num in found.iter_rows():
            counts[right, label] += num
    return counts
