"""A job against its input's columns: whether everything that it names is there and fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from batchgen.answers.judge import check_rules, rule_schema
from batchgen.core.errors import ConfigError
from batchgen.core.expressions import check_row_test
from batchgen.core.suggest import suggestion
from batchgen.prompt.builder import turns
from batchgen.prompt.requests import wrong_option_columns
from batchgen.source.csv import delimiter_hint
from batchgen.store.schema import part_schema

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchgen.answers.columns import AnswerColumns
    from batchgen.answers.form import Form
    from batchgen.job.model import Example, JobConfig
    from batchgen.prompt.builder import PromptBuilder


def job_schema(job: JobConfig, answer: AnswerColumns, carried: pa.Schema) -> pa.Schema:
    """Schema of the job's parts.

    Raises:
        ConfigError: Two columns would have one name.
    """
    output = job.output
    return part_schema(carried, answer.fields, output.prefix, with_seed=output.with_seed)


def check_examples(examples: Sequence[Example], form: Form) -> None:
    """Refuse few-shot answers that teach the model another form than the job's.

    Raises:
        ConfigError: With every such example.
    """
    problems = []
    for at, example in enumerate(examples):
        _, answer = turns(example)
        error = form.read_example(answer["content"])
        if error is not None:
            problems.append(f"examples[{at}]: {error.error_type}: {error.error}")
    if problems:
        where = "[prompt]"
        raise ConfigError(where, problems)


def check_columns(
    job: JobConfig, builder: PromptBuilder, answer: AnswerColumns, columns: pa.Schema
) -> None:
    """Check everything that names a column, and tell all mistakes at once.

    Raises:
        ConfigError: With every mistake.
    """
    problems = _wrong_columns(job.input.columns or [], columns.names)
    problems += wrong_option_columns(job, columns.names)
    if job.input.where is not None:
        try:
            check_row_test("where", job.input.where, columns)
        except ValueError as error:
            problems.append(f"input.where: {error}")
    carried = [name for name in job.input.columns or columns.names if name in columns.names]
    for check in (
        lambda: builder.columns(columns.names),
        lambda: check_gate(job, answer),
        lambda: _check_answer_columns(job, answer, pa.schema([columns.field(n) for n in carried])),
    ):
        try:
            check()
        except ConfigError as error:
            problems += [f"{error.where}: {problem}" for problem in error.problems]
    if problems:
        hint = delimiter_hint(columns.names) if job.input.delimiter is None else None
        problems += [hint] if hint else []
        where = "job"
        raise ConfigError(where, problems)


def check_gate(job: JobConfig, answer: AnswerColumns) -> None:
    """Refuse limits for labels that the answer does not have.

    `[gate]` may change under a plan, so that this holds for every run.

    Raises:
        ConfigError: A limit would never hold anything back.
    """
    labels = [job.output.prefix + name for name in answer.labels]
    wanted = job.gate.drift_column
    problems = []
    if wanted is not None and wanted not in labels:
        problems.append(f"drift_column: {wanted!r} holds no labels{suggestion(wanted, labels)}")
    if job.gate.max_drift is not None and not labels:
        expected = "expected output.choice or an enum in output.schema"
        problems.append(f"max_drift: the answer has no labels, {expected}")
    if problems:
        where = "[gate]"
        raise ConfigError(where, problems)


def _check_answer_columns(job: JobConfig, answer: AnswerColumns, carried: pa.Schema) -> None:
    job_schema(job, answer, carried)
    check_rules(job.checks.rules, rule_schema(carried, answer, job.output.prefix))


def _wrong_columns(wanted: Sequence[str], available: Sequence[str]) -> list[str]:
    unknown = [
        f"input.columns: no column {name!r} in the input, it has: {', '.join(available)}"
        for name in wanted
        if name not in available
    ]
    twice = sorted({name for name in wanted if wanted.count(name) > 1})
    return unknown + [f"input.columns: {name!r} is listed twice" for name in twice]
