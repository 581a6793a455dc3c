"""A job file and its input, checked: everything that can refuse a job in milliseconds.

Neither the model nor the input is loaded; `freezing` makes a plan of what is prepared here.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from batchgen.answers.columns import AnswerColumns, answer_columns
from batchgen.answers.form import Form, make_form
from batchgen.answers.judge import Judge
from batchgen.answers.retries import check_ladder
from batchgen.core.errors import RecipeChangedError, SourceError
from batchgen.core.ranges import Ranges
from batchgen.core.records import EngineSpec, Prompt, RowError
from batchgen.job import recipe as recipes
from batchgen.pipeline import frozen
from batchgen.pipeline.job_checks import check_columns, check_examples, check_gate, job_schema
from batchgen.pipeline.model_files import ModelFiles, resolve_lora, resolve_model
from batchgen.prompt.builder import PromptBuilder
from batchgen.prompt.requests import RowOptions
from batchgen.source.base import ReadSpec
from batchgen.source.files import find_files, reader_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from batchgen.job.model import JobConfig
    from batchgen.source.base import Reader
    from batchgen.store.books import Plan


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job whose every part has been looked at."""

    job: JobConfig
    model: ModelFiles
    recipe: recipes.Recipe
    format: str
    reader: Reader
    files: Sequence[str]
    columns: pa.Schema
    carried: Sequence[str]
    builder: PromptBuilder
    form: Form
    answer: AnswerColumns

    @property
    def recipe_fingerprint(self) -> str:
        """128-bit hash, 32 hex digits."""
        return recipes.fingerprint(self.recipe)

    @property
    def model_name(self) -> str:
        """Hub id and commit, or a folder's name and a hash of what is in it."""
        if not self.model.path:
            return self.job.model.backend
        identity = self.model.identity
        if "commit" in identity:
            return f"{identity['hub']}@{identity['commit']}"
        return f"{Path(self.model.path).name}@{recipes.fingerprint(dict(identity))[:12]}"

    @property
    def frozen_job(self) -> dict[str, Any]:
        """What must not change under a plan."""
        return frozen_job(self.job, self.recipe)

    def judge(self) -> Judge:
        """What reads the job's answers."""
        return Judge(
            self.form,
            self.answer,
            rules=self.job.checks.rules,
            prefix=self.job.output.prefix,
            allow_cut=self.job.checks.allow_truncated or bool(self.job.sampling.ignore_eos),
        )

    def spec(self) -> ReadSpec:
        """How to read."""
        return ReadSpec(
            columns=self.columns,
            carried=self.carried,
            needed=self.builder.columns(self.columns.names)
            | set(RowOptions(self.job).columns().values()),
            where=self.job.input.where,
        )

    @property
    def part_schema(self) -> pa.Schema:
        """Schema of the job's parts."""
        return job_schema(self.job, self.answer, self.carried_schema)

    @property
    def carried_schema(self) -> pa.Schema:
        """The columns that go to the output."""
        return pa.schema([self.columns.field(name) for name in self.carried])


def frozen_job(job: JobConfig, recipe: recipes.Recipe) -> dict[str, Any]:
    """What must not change under a plan: recipe, choice of rows, checks, layout of the output."""
    # Plans of before there was a delimiter have no such key.
    by_default = {"delimiter"} if job.input.delimiter is None else set()
    return {
        "recipe": recipe,
        "input": job.input.model_dump(exclude={"path"} | by_default),
        "output": job.output.model_dump(include={"prefix", "flatten", "with_seed"}),
        "checks": job.checks.model_dump(),
    }


@dataclass(frozen=True, slots=True)
class Look:
    """A job by itself: what can be told of it without its input."""

    job: JobConfig
    model: ModelFiles
    recipe: recipes.Recipe
    builder: PromptBuilder
    form: Form
    answer: AnswerColumns

    def changes(self, plan: Plan) -> list[str]:
        """What differs from a plan's job, one line a key, each beginning with its table."""
        return frozen.job_changes(plan, frozen_job(self.job, self.recipe))


def look_at(job: JobConfig) -> Look:
    """Check a job's tables and find its model; loads neither input nor model.

    Raises:
        ConfigError: Templates, schema or the model's name are wrong.
    """
    builder = PromptBuilder(job.prompt)
    form = make_form(job.output)
    answer = answer_columns(job, form)
    check_examples(job.prompt.examples, form)
    check_ladder(job.retry, job.sampling, is_chat=job.prompt.text is None)
    loras = {name: resolve_lora(name, path) for name, path in job.model.lora.items()}
    model = ModelFiles("", {})
    if job.model.backend == "vllm":
        is_dummy = job.model.engine.get("load_format") == "dummy"  # Reads no weights at all.
        allow_pickle = job.model.allow_pickle or is_dummy
        model = resolve_model(job.model.name, job.model.revision, allow_pickle=allow_pickle)
    recipe = recipes.make_recipe(job, model.identity, loras)
    return Look(job, model, recipe, builder, form, answer)


def prepare(job: JobConfig, plan: Plan | None = None) -> Prepared:
    """Check a job against its input and its model; loads neither.

    Args:
        job: As loaded.
        plan: The plan to go on with; None for a new one.

    Raises:
        ConfigError: Templates, columns or the model's name do not fit; all of it at once.
        SourceError: The input does not exist or is not what its name says.
        RecipeChangedError: The job is not the plan's.
    """
    look = look_at(job)
    if plan is None:
        return with_input(look)
    if changes := look.changes(plan):
        raise RecipeChangedError(job.output.path, changes)
    return with_plan(look, plan)


def with_plan(look: Look, plan: Plan) -> Prepared:
    """A job as its plan froze it: files, columns and types hold, whatever there is by now.

    Raises:
        ConfigError: A limit of the gate is for labels that the answer has not.
    """
    check_gate(look.job, look.answer)
    files = [segment.path for segment in plan.segments]
    columns = planned_columns(plan)
    return _prepared(look, plan.input_format, files, columns, plan.carried)


def with_input(look: Look, seen: Plan | None = None) -> Prepared:
    """A job with its input as it is now.

    Args:
        look: The job.
        seen: The newest plan: its columns hold for input that has no row to tell any by.

    Raises:
        ConfigError: Columns that the job names are not there or do not fit.
        SourceError: The input does not exist or is not what its name says.
    """
    job = look.job
    format_name, files = find_input(job)
    columns = reader_for(format_name, job.input.delimiter).columns(files, job.input.types)
    if not columns.names and seen is not None and seen.input_format == format_name:
        columns = planned_columns(seen)
    carried = columns.names if job.input.columns is None else job.input.columns
    check_columns(job, look.builder, look.answer, columns)
    return _prepared(look, format_name, files, columns, carried)


def _prepared(
    look: Look, format_name: str, files: Sequence[str], columns: pa.Schema, carried: Sequence[str]
) -> Prepared:
    return Prepared(
        job=look.job,
        model=look.model,
        recipe=look.recipe,
        format=format_name,
        reader=reader_for(format_name, look.job.input.delimiter),
        files=files,
        columns=columns,
        carried=carried,
        builder=look.builder,
        form=look.form,
        answer=look.answer,
    )


def find_input(job: JobConfig) -> tuple[str, Sequence[str]]:
    """The input's format and its files, in order.

    Raises:
        SourceError: There is none, or it is not what its name says.
    """
    paths = [job.input.path] if isinstance(job.input.path, str) else job.input.path
    format_name, files = find_files(paths, job.input.format)
    _refuse_output_as_input(files, job.output.path)
    reader = reader_for(format_name, job.input.delimiter)
    for path in files:
        reader.sniff(path)
    return format_name, files


def _refuse_output_as_input(files: Sequence[str], output: str) -> None:
    root = Path(output).resolve()
    for path in files:
        if root in Path(path).resolve().parents:
            raise SourceError(path, f"lies in the output folder {output}; choose another one")


def first_prompts(prepared: Prepared, num_rows: int) -> Iterator[tuple[str, str]]:
    """Yield where a row stands and its prompt as text, or why it has none, for `check`."""
    spec = replace(prepared.spec(), batch_rows=1)
    batches = chain.from_iterable(
        prepared.reader.read(path, 0, Ranges.until(prepared.reader.scan(path).num_rows), spec)
        for path in prepared.files
    )
    for batch in islice((batch for batch in batches if batch.rows), num_rows):
        (row,), (values,) = batch.rows, batch.values
        outcome = batch.errors[0] if values is None else prepared.builder.build(values)
        yield f"row {row}", _as_text(outcome)


def _as_text(outcome: Prompt | RowError) -> str:
    if isinstance(outcome, RowError):
        return f"{outcome.error_type}: {outcome.error}"
    if isinstance(outcome, str):
        return outcome
    return "\n".join(f"[{message['role']}]\n{message.get('content')}" for message in outcome)


def planned_columns(plan: Plan) -> pa.Schema:
    """The input's columns as the plan froze them."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(plan.schema)))


def engine_spec(prepared: Prepared | Look, log_path: str | None) -> EngineSpec:
    """What the engine needs to know of the job."""
    model, prompt = prepared.job.model, prepared.job.prompt
    names = {"dtype", "quantization", "max_model_len", "max_num_seqs", "gpu_memory_utilization"}
    names |= {"tensor_parallel_size", "trust_remote_code"}
    kwargs = model.model_dump(include=names, exclude_none=True, exclude_defaults=True)
    template = prompt.chat_template_file
    return EngineSpec(
        backend=model.backend,
        model=prepared.model.path,
        model_kwargs={**kwargs, **model.engine},
        sampling_params=_sampling_params(prepared),
        chat_template=Path(template).read_text(encoding="utf-8") if template else None,
        chat_template_kwargs=prompt.chat_template_kwargs,
        tools=prompt.tools,
        loras=model.lora,
        reasoning_parser=model.reasoning_parser,
        tool_call_parser=model.tool_call_parser,
        log_path=log_path,
        max_in_flight=prepared.job.run.max_in_flight,
    )


def _sampling_params(prepared: Prepared | Look) -> dict[str, Any]:
    params = prepared.job.sampling.model_dump(exclude={"seed", "column"}, exclude_none=True)
    if prepared.form.structured_outputs is not None:
        params["structured_outputs"] = dict(prepared.form.structured_outputs)
    return params
