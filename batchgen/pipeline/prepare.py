"""A job file, its model and its input, checked: all that can refuse a job in milliseconds.

Neither the model nor the input is loaded. A model is always handed to the engine as a local
folder, resolved before anything else starts: a wrong name fails at once, and the recipe names the
exact content, not a moving branch. `frozen` makes a plan of what is prepared here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import pyarrow as pa

from batchgen.answers.numbers import number_columns
from batchgen.answers.output_format import AnswerColumns, OutputFormat, answer_columns, make_format
from batchgen.answers.validate import Judge, check_retries, check_rules, rule_schema
from batchgen.core.errors import ConfigError, SourceError, nearest, suggestion
from batchgen.core.expressions import LATE, check_row_test, parse_row_test
from batchgen.core.records import EngineSpec, Prompt, RowError, writable_text
from batchgen.core.runtime import job_name
from batchgen.engine.base import task_facts
from batchgen.engine.vllm.encoder import refuse_model
from batchgen.engine.vllm.settings import leaves_open, refuse_sampling
from batchgen.job import recipe as recipes
from batchgen.pipeline.gold import check_score
from batchgen.pipeline.model_files import ModelFiles, other_model, resolve_lora, resolve_model
from batchgen.prompt.builder import BYTE_ORDER_MARK, PromptBuilder, turns
from batchgen.prompt.requests import RowOptions, wrong_option_columns
from batchgen.source.columns import agreed, read_schema, with_partitions
from batchgen.source.csv import delimiter_hint
from batchgen.source.formats import InputFiles, find_files, reader_for
from batchgen.source.reading import Reader, ReadSpec
from batchgen.store.result_files import part_schema

if TYPE_CHECKING:
    from batchgen.job.model import Example, JobConfig
    from batchgen.store.books import Plan


SAMPLES = "samples"
"""Key of a plan's `output`: samples are told one by one. Absent in plans of before 0.2."""


def job_schema(job: JobConfig, answer: AnswerColumns, carried: pa.Schema) -> pa.Schema:
    """Schema of the job's parts.

    Raises:
        ConfigError: Two columns would have one name.
    """
    output = job.output
    return part_schema(carried, answer.fields, output.prefix, with_seed=output.with_seed)


def check_examples(examples: Sequence[Example], form: OutputFormat) -> None:
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
        raise ConfigError("[prompt]", problems)


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
    names = set(columns.names)
    carried = [name for name in job.input.columns or columns.names if name in names]
    for check in (
        lambda: builder.columns(columns.names),
        lambda: check_gate(job, answer),
        lambda: check_score(job, answer, pa.schema([columns.field(n) for n in carried])),
        lambda: _check_answer_columns(job, answer, pa.schema([columns.field(n) for n in carried])),
    ):
        try:
            check()
        except ConfigError as error:
            problems += [f"{error.where}: {problem}" for problem in error.problems]
    if problems:
        hint = delimiter_hint(columns.names) if job.input.delimiter is None else None
        problems += [hint] if hint else []
        raise ConfigError(job_name(), problems)


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
        raise ConfigError("[gate]", problems)


def _check_answer_columns(job: JobConfig, answer: AnswerColumns, carried: pa.Schema) -> None:
    job_schema(job, answer, carried)
    check_rules(job.checks.rules, rule_schema(carried, answer, job.output.prefix))


def _wrong_columns(wanted: Sequence[str], available: Sequence[str]) -> list[str]:
    there = set(available)
    unknown = [
        f"input.columns: no column {name!r} in the input, it has: {', '.join(available)}"
        for name in wanted
        if name not in there
    ]
    twice = sorted(name for name, num in Counter(wanted).items() if num > 1)
    return unknown + [f"input.columns: {name!r} is listed twice" for name in twice]


@dataclass(frozen=True, slots=True)
class Checked:
    """A job by itself, without its input: tables, model, prompt template and form of answers."""

    job: JobConfig
    model: ModelFiles
    recipe: recipes.Recipe
    builder: PromptBuilder
    form: OutputFormat
    answer: AnswerColumns

    @property
    def frozen_job(self) -> dict[str, Any]:
        """What must not change under a plan, see `frozen_job`."""
        return frozen_job(self.job, self.recipe)

    def changes(self, plan: Plan) -> list[str]:
        """Return what differs from a plan's job, one line a key, each beginning with its table."""
        was, now = plan.job, self.frozen_job
        found = recipes.diff(*(recipes.without_speed(job["recipe"]) for job in (was, now)))
        for table in ("input", "output", "checks"):
            found += [f"{table}.{line}" for line in recipes.diff(was[table], now[table])]
        return found

    def answers_alike(self, plan: Plan) -> bool:
        """Tell whether a plan's rows are answered as the job's would be, whichever they are."""
        return all(change.startswith("input.") for change in self.changes(plan))

    def by_recipe_of(self, plan: Plan) -> Self:
        """Return the job by the very recipe of a plan that it does not change.

        An older batchgen may have counted something to the recipe that only changes the speed; the
        keys of its rows are made of that. Nor had it a column that says what became of each sample.
        """
        recipe, job = plan.job["recipe"], self.job
        had_many = recipe.get("sampling", {}).get("n", 1) > 1 and SAMPLES not in plan.job["output"]
        if had_many and job.output.samples is None and job.tells_samples:
            job = job.changed(output={SAMPLES: False})
            told = replace(self, job=job, answer=answer_columns(job, self.form))
            return told.by_recipe_of(plan)
        is_same = recipes.without_speed(recipe) == recipes.without_speed(self.recipe)
        return replace(self, recipe=recipe) if is_same else self

    def engine_spec(self, log_path: str | None) -> EngineSpec:
        """Return what the engine needs to know of the job."""
        spec = engine_spec(self.job, self.model.path, self.form.structured_outputs, log_path)
        if not spec.endpoint:
            return spec
        told = {"digest": recipes.engine_digest(self.recipe), "trial": self.builder.probe()}
        return replace(spec, endpoint={**spec.endpoint, **told})

    def with_plan(self, plan: Plan) -> Prepared:
        """Return the job as its plan froze it: files, columns and types hold, whatever is there.

        Raises:
            ConfigError: A limit of the gate is for labels that the answer has not.
        """
        check_gate(self.job, self.answer)
        columns = read_schema(plan.schema)
        carried = pa.schema([columns.field(name) for name in plan.carried])
        check_score(self.job, self.answer, carried)
        reader = _reader(self.job, plan.input_format, counts_lines=plan.counts_lines)
        files = [segment.path for segment in plan.segments]
        read_by = (plan.input_format, reader)
        return self._prepared(read_by, files, read_schema(plan.schema), plan.carried)

    def with_input(self, seen: Plan | None = None) -> Prepared:
        """Return the job with its input as it is now.

        Args:
            seen: The newest plan: its columns hold for input that has no row to tell any by.

        Raises:
            ConfigError: Columns that the job names are not there or do not fit.
            SourceError: The input does not exist or is not what its name says.
        """
        job = self.job
        found = find_input(job)
        reader = _reader(job, found.format)
        read = partial(reader.columns, found.paths)
        columns = with_partitions(read, found.partitions, job.input.types)
        columns = agreed(columns, job.input, self.reads)
        if not columns.names and seen is not None and seen.input_format == found.format:
            columns = read_schema(seen.schema)
        late, available = self._named_beyond(columns), columns.names
        if late and not reader.is_all_seen(found.paths):
            for name in late:
                columns = columns.append(pa.field(name, pa.null(), metadata={LATE: b""}))
        carried = columns.names if job.input.columns is None else job.input.columns
        check_columns(job, self.builder, self.answer, columns)
        prepared = self._prepared((found.format, reader), found.paths, columns, carried)
        told = []
        for name in sorted(prepared.late):
            near = nearest(name, available)
            more = f", did you mean {near!r}?" if near else ";"
            if f'"{name}"' in (job.input.where or ""):
                more = f"; a text is written '{name}';"
            text = f"the first rows have no column {name!r}{more} a run or plan looks at all rows"
            told.append(f"input: {text}")
        return replace(prepared, notes=[*prepared.notes, *found.notes, *told])

    def _named_beyond(self, columns: pa.Schema) -> list[str]:
        """Name the columns that the job names and the input, as far as it is seen, lacks."""
        job = self.job
        names = {*(job.input.columns or ()), *RowOptions(job).columns(columns.names).values()}
        names |= {job.score.column} if job.score.column is not None else set()
        names |= self.builder.missing(columns.names)
        known = rule_schema(columns, self.answer, job.output.prefix).names
        for text in (job.input.where or "TRUE", *job.checks.rules):
            with suppress(ValueError):  # It is no expression: refused by `check_columns`.
                names |= {*parse_row_test("", text).columns}.difference(known)
        return sorted(names.difference(columns.names))

    def reads(self, available: Sequence[str]) -> frozenset[str]:
        """Name the columns that requests are made of; raises ConfigError if one is not there."""
        own = RowOptions(self.job).columns(available).values()
        return self.builder.columns(available) | {*own}

    def _prepared(
        self,
        read_by: tuple[str, Reader],
        files: Sequence[str],
        columns: pa.Schema,
        carried: Sequence[str],
    ) -> Prepared:
        mine = (self.job, self.model, self.recipe, self.builder, self.form, self.answer)
        notes = [*self.builder.notes(columns.names), *plain_http(self.job.model.urls)]
        if self.recipe["prompt"].get("chat_template", "").startswith(BYTE_ORDER_MARK):
            file = "prompt.chat_template_file begins with a byte order mark"
            notes.append(f"{file}, which up to batchgen 0.1.0 was part of every prompt")
        return Prepared(*mine, *read_by, files, columns, carried, notes)


@dataclass(frozen=True, slots=True)
class Prepared(Checked):
    """A job and its input, all of it checked."""

    format: str
    """The input's: jsonl, csv or parquet."""
    reader: Reader
    files: Sequence[str]
    """Paths or URLs of the input files, in the order of their rows."""
    columns: pa.Schema
    """Every column of the input."""
    carried: Sequence[str]
    """Names of the columns that go to the output."""
    notes: Sequence[str] = ()
    """What a person should know of the prompts, and of what of the input's folders and patterns is
    not read, if that was just looked up."""

    @property
    def late(self) -> frozenset[str]:
        """Columns that the job names and first rows lack: whether there are such, a scan tells."""
        return frozenset(field.name for field in self.columns if LATE in (field.metadata or {}))

    @property
    def recipe_fingerprint(self) -> str:
        """128-bit hash, 32 hex digits."""
        return recipes.fingerprint(self.recipe)

    @property
    def model_name(self) -> str:
        """Hub id and commit, or a folder's name and a hash of what is in it."""
        identity = self.model.identity
        if "commit" in identity:
            return f"{identity['hub']}@{identity['commit']}"
        if "served" in identity:
            return identity["served"]
        if not self.model.path and self.job.model.backend != "openai":
            return self.job.model.backend
        name = writable_text(Path(self.model.path or self.job.model.name).name)
        return f"{name}@{recipes.fingerprint(dict(identity))[:12]}"

    def judge(self) -> Judge:
        """Make what reads the job's answers."""
        return Judge(self.job, self.form, self.answer)

    def spec(self) -> ReadSpec:
        """Return how the input is to be read."""
        return ReadSpec(
            columns=self.columns,
            carried=self.carried,
            needed=self.reads(self.columns.names),
            as_bytes=frozenset({self.job.prompt.images or ""}),
            where=self.job.input.where,
        )

    @property
    def part_schema(self) -> pa.Schema:
        """Schema of the job's parts."""
        return job_schema(self.job, self.answer, self.carried_schema)

    @property
    def carried_schema(self) -> pa.Schema:
        """Schema of the columns that go to the output."""
        return pa.schema([self.columns.field(name) for name in self.carried])


def frozen_job(job: JobConfig, recipe: recipes.Recipe) -> dict[str, Any]:
    """Return what must not change under a plan: recipe, choice of rows, checks, output layout."""
    # Plans of before there was a delimiter have no such key.
    absent = {key for key in ("delimiter", "encoding") if getattr(job.input, key) is None}
    output = job.output.model_dump(include={"prefix", "flatten", "with_seed"})
    optional = {SAMPLES: job.tells_samples, "label_probability": job.output.label_probability}
    unsaid = {"min_ok_samples"} if job.checks.min_ok_samples == 1 else set()
    return {
        "recipe": recipe,
        "input": job.input.model_dump(exclude={"path", *absent}),
        "output": output | {key: True for key, is_set in optional.items() if is_set},
        "checks": job.checks.model_dump(exclude=unsaid),
    }


def check(job: JobConfig) -> Checked:
    """Check a job's tables and find its model; loads neither input nor model.

    Raises:
        ConfigError: Templates, schema or the model's name are wrong.
    """
    builder = PromptBuilder(job.prompt)
    form = make_format(job.output)
    answer = answer_columns(job, form)
    check_examples(job.prompt.examples, form)
    check_retries(job.retry, job.sampling, is_chat=job.prompt.is_chat)
    is_named = not job.model.is_pinned and job.model.backend == "openai"
    loras = {
        name: {"served": name} if is_named else resolve_lora(name, path)
        for name, path in job.model.lora.items()
    }
    if job.model.is_vllm:
        is_dummy = job.model.engine.get("load_format") == "dummy"  # Reads no weights at all.
        allow_pickle = job.model.allow_pickle or is_dummy
        model = resolve_model(job.model.name, job.model.revision, allow_pickle=allow_pickle)
    else:
        model = other_model(job.model)
    if job.task != "generate":
        facts = task_facts(engine_spec(job, model.path))
        builder = PromptBuilder(job.prompt, facts.prefix, may_be_empty=True)
        form, answer = number_columns(job, facts)
    elif job.model.is_vllm:
        lists_labels = job.sampling.logprobs == "labels"
        refuse_sampling([*job.sampling.extra, *["logprob_token_ids"] * lists_labels])
        refuse_model(engine_spec(job, model.path), builder.probe())
    recipe = recipes.make_recipe(job, model.identity, loras)
    return Checked(job, model, recipe, builder, form, answer)


def prepare(job: JobConfig) -> Prepared:
    """Check a job, as loaded, against its input and its model; loads neither.

    Raises:
        ConfigError: Templates, columns or the model's name do not fit; all of it at once.
        SourceError: The input does not exist or is not what its name says.
    """
    return check(job).with_input()


def find_input(job: JobConfig) -> InputFiles:
    """Find the input's files and look at the beginning of each.

    Raises:
        SourceError: There is none, or it is not what its name says.
    """
    paths = [job.input.path] if isinstance(job.input.path, str) else job.input.path
    found = find_files(paths, job.input.format)
    _refuse_output_as_input(found.paths, job.output.path)
    reader = _reader(job, found.format)
    for path in found.paths:
        reader.sniff(path)
    return found


def _reader(job: JobConfig, format_name: str, *, counts_lines: bool = True) -> Reader:
    table = job.input
    return reader_for(format_name, table.delimiter, table.encoding, counts_lines=counts_lines)


def _refuse_output_as_input(files: Sequence[str], output: str) -> None:
    root = Path(output).resolve()
    for path in files:
        if root in Path(path).resolve().parents:
            raise SourceError(path, f"lies in the output folder {output}; choose another one")


def as_text(outcome: Prompt | RowError, job: JobConfig) -> str:
    """A prompt of a job, or why there is none, for people."""
    if isinstance(outcome, RowError):
        return f"{outcome.error_type}: {outcome.error}"
    if isinstance(outcome, str):
        return outcome
    if isinstance(outcome, tuple):
        keys = ("prompt", "continuation") if job.task == "loglikelihood" else ("query", "passage")
        return "\n".join(f"[{key}]\n{text}" for key, text in zip(keys, outcome, strict=True))
    return "\n".join(f"[{message['role']}]\n{message.get('content')}" for message in outcome)


def engine_spec(
    job: JobConfig,
    model_path: str,
    structured_outputs: Mapping[str, Any] | None = None,
    log_path: str | None = None,
) -> EngineSpec:
    """Return what the engine needs to know of a job.

    Args:
        job: As loaded.
        model_path: The model's folder on this machine.
        structured_outputs: The constraint on answers, see `OutputFormat.structured_outputs`.
        log_path: Where the engine's own log goes; None: nowhere.
    """
    model, prompt = job.model, job.prompt
    names = {"dtype", "quantization", "max_model_len", "max_num_seqs", "gpu_memory_utilization"}
    names |= {"tensor_parallel_size", "trust_remote_code"}
    kwargs = model.model_dump(include=names, exclude_none=True, exclude_defaults=True)
    params = job.sampling.model_dump(exclude={"seed", "column", "extra"}, exclude_none=True)
    params |= job.sampling.extra
    if structured_outputs is not None:
        params["structured_outputs"] = dict(structured_outputs)
    template = prompt.chat_template_file
    is_open = model.is_vllm and leaves_open(model.engine) and job.task != "loglikelihood"
    return EngineSpec(
        backend="auto" if model.is_auto else model.backend,
        model=model_path or model.name,
        model_kwargs={**kwargs, **model.engine},
        sampling_params=params,
        chat_template=Path(template).read_text(encoding="utf-8-sig") if template else None,
        chat_template_kwargs=prompt.chat_template_kwargs,
        tools=prompt.tools,
        loras=model.lora,
        reasoning_parser=model.reasoning_parser,
        tool_call_parser=model.tool_call_parser,
        log_path=log_path,
        max_in_flight=job.run.max_in_flight,
        defaults=job.run.engine_defaults if is_open else "vllm",
        endpoint=_endpoint(job) if model.urls else {},
        task=job.task,
        pooling=job.pooling.model_dump(exclude_none=True) if job.task != "generate" else {},
    )


def _endpoint(job: JobConfig) -> dict[str, Any]:
    """Where the job's servers are, and how they may be used."""
    names = {"requests_per_minute", "tokens_per_minute", "request_timeout_s", "endpoint_grace_s"}
    model = job.model
    place = {"urls": model.urls, "api_key_env": model.api_key_env, "is_pinned": model.is_pinned}
    return {**place, **job.run.model_dump(include=names)}


def plain_http(urls: Sequence[str]) -> list[str]:
    """Say of which servers everybody on the way can read what is sent there."""
    hosts = {urlsplit(url).hostname: url for url in urls if url.startswith("http://")}
    return [
        f"model.base_url: {url} is not encrypted: prompts, answers and the key can be read on the "
        "way there, expected https"
        for host, url in hosts.items()
        if host != "localhost" and not re.fullmatch(r"127(\.\d+){3}|::1", host or "")
    ]
