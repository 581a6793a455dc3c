"""A job file to a frozen plan: cheap checks first, the pass over the input after.

`prepare` finds everything that can refuse a job in milliseconds, before a model is loaded.
`freeze` reads the input once, counting and hashing; it may run while the engine starts.
"""

from __future__ import annotations

import base64
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from batchgen import frozen, prompts
from batchgen.answers.columns import AnswerColumns, answer_columns
from batchgen.answers.form import Form, make_form
from batchgen.answers.judge import Judge
from batchgen.answers.retries import check_ladder
from batchgen.books import Plan, Segment
from batchgen.config import recipe as recipes
from batchgen.errors import InputChangedError, RecipeChangedError, SourceError
from batchgen.inputs import stat_input
from batchgen.job_checks import check_columns, check_examples, check_gate, job_schema
from batchgen.model_files import ModelFiles, resolve_lora, resolve_model
from batchgen.ranges import Ranges
from batchgen.records import EngineSpec, Prompt, RowError
from batchgen.requests import RowOptions
from batchgen.runlog import utc_now
from batchgen.source.base import ReadSpec
from batchgen.source.files import find_files, reader_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from batchgen.config.model import JobConfig
    from batchgen.source.base import Reader

# Hashing and counting leave the GIL; more threads than this only fight for the disk.
_SCAN_THREADS = 4


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
    builder: prompts.PromptBuilder
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
    return {
        "recipe": recipe,
        "input": job.input.model_dump(exclude={"path"}),
        "output": job.output.model_dump(include={"prefix", "flatten", "with_seed"}),
        "checks": job.checks.model_dump(),
    }


def prepare(job: JobConfig, plan: Plan | None = None) -> Prepared:
    """Check a job against its input and its model; loads neither.

    Args:
        job: As loaded.
        plan: The plan to go on with, whose files, columns and types then hold, whatever else
            lies beside them by now; None for a new one.

    Raises:
        ConfigError: Templates, columns or the model's name do not fit; all of it at once.
        SourceError: The input does not exist or is not what its name says.
        RecipeChangedError: The job is not the plan's.
    """
    builder = prompts.PromptBuilder(job.prompt)
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
    if plan is not None:
        if changes := frozen.job_changes(plan, frozen_job(job, recipe)):
            raise RecipeChangedError(job.output.path, changes)
        format_name = plan.input_format
        files: Sequence[str] = [segment.path for segment in plan.segments]
        columns, carried = planned_columns(plan), plan.carried
        check_gate(job, answer)
    else:
        format_name, files = _find_input(job)
        columns = reader_for(format_name).columns(files, job.input.types)
        carried = columns.names if job.input.columns is None else job.input.columns
        check_columns(job, builder, answer, columns)
    return Prepared(
        job=job,
        model=model,
        recipe=recipe,
        format=format_name,
        reader=reader_for(format_name),
        files=files,
        columns=columns,
        carried=carried,
        builder=builder,
        form=form,
        answer=answer,
    )


def _find_input(job: JobConfig) -> tuple[str, Sequence[str]]:
    paths = [job.input.path] if isinstance(job.input.path, str) else job.input.path
    format_name, files = find_files(paths, job.input.format)
    _refuse_output_as_input(files, job.output.path)
    for path in files:
        reader_for(format_name).sniff(path)
    return format_name, files


def _refuse_output_as_input(files: Sequence[str], output: str) -> None:
    root = Path(output).resolve()
    for path in files:
        if root in Path(path).resolve().parents:
            raise SourceError(path, f"lies in the output folder {output}; choose another one")


def freeze(prepared: Prepared, number: int) -> Plan:
    """Read the input once and fix what belongs to the job.

    Raises:
        SourceError: A file cannot be read to its end.
        InputChangedError: A file changed while it was read.
    """
    limit = prepared.job.input.limit
    files = prepared.files
    left = 1
    if limit is None:
        with ThreadPoolExecutor(_SCAN_THREADS) as pool:
            segments = list(pool.map(lambda path: _scan(prepared.reader, path), files))
    else:
        segments, left = _limited(prepared, limit)
    return Plan(
        number=number,
        plan_id=secrets.token_hex(8),
        created_at=utc_now().isoformat(timespec="seconds"),
        job=prepared.frozen_job,
        recipe_fingerprint=prepared.recipe_fingerprint,
        input_format=prepared.format,
        columns=[f"{field.name}: {field.type}" for field in prepared.columns],
        schema=base64.b64encode(prepared.columns.serialize().to_pybytes()).decode(),
        carried=prepared.carried,
        segments=segments,
        is_cut=not left,
    )


def _scan(reader: Reader, path: str) -> Segment:
    before = stat_input(path)
    scan = reader.scan(path)
    if stat_input(path) != before:
        raise InputChangedError(path, "changed while it was read; run again when it is at rest")
    return Segment(path, before.size_bytes, before.version, scan.digest, scan.num_rows)


def _limited(prepared: Prepared, limit: int) -> tuple[list[Segment], int]:
    """Segments cut after the row that fills the limit, and what is left of it.

    Only rows that `where` keeps count.
    """
    segments = []
    left = limit
    for path in prepared.files:
        segment = _scan(prepared.reader, path)
        num_rows, left = _cut(prepared, segment, left)
        segments.append(
            Segment(path, segment.size_bytes, segment.version, segment.digest, num_rows)
        )
        if not left:
            break
    return segments, left


def _cut(prepared: Prepared, segment: Segment, left: int) -> tuple[int, int]:
    """How many physical rows of the segment it takes, and what is left of the limit."""
    todo = Ranges.until(segment.num_rows)
    for batch in prepared.reader.read(segment.path, 0, todo, prepared.spec()):
        if len(batch.rows) >= left:
            return batch.rows[left - 1] + 1, 0
        left -= len(batch.rows)
    return segment.num_rows, left


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


def engine_spec(prepared: Prepared, log_path: str | None) -> EngineSpec:
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


def _sampling_params(prepared: Prepared) -> dict[str, Any]:
    params = prepared.job.sampling.model_dump(exclude={"seed", "column"}, exclude_none=True)
    if prepared.form.structured_outputs is not None:
        params["structured_outputs"] = dict(prepared.form.structured_outputs)
    return params
