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

from batchgen import prompts
from batchgen.books import Plan, Segment
from batchgen.config import recipe as recipes
from batchgen.errors import ConfigError, InputChangedError, SourceError
from batchgen.inputs import stat_input
from batchgen.model_files import ModelFiles, resolve_model
from batchgen.ranges import Ranges
from batchgen.records import Prompt, RowError
from batchgen.runlog import utc_now
from batchgen.sink.schema import part_schema
from batchgen.source.base import ReadSpec
from batchgen.source.files import find_files, reader_for
from batchgen.source.where import check_where

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from batchgen.config.model import JobConfig
    from batchgen.records import RowBatch
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

    @property
    def recipe_fingerprint(self) -> str:
        """128-bit hash, 32 hex digits."""
        return recipes.fingerprint(self.recipe)

    @property
    def frozen_job(self) -> dict[str, Any]:
        """What must not change under a plan."""
        chosen = self.job.input
        return {
            "recipe": self.recipe,
            "input": {
                "where": chosen.where,
                "limit": chosen.limit,
                "columns": chosen.columns,
                "types": chosen.types,
                "format": self.format,
            },
            "output": {"prefix": self.job.output.prefix},
        }

    def spec(self, columns: pa.Schema | None = None) -> ReadSpec:
        """How to read; `columns` are the plan's where there is one."""
        columns = self.columns if columns is None else columns
        return ReadSpec(
            columns=columns,
            carried=self.carried,
            needed=self.builder.columns(columns.names),
            where=self.job.input.where,
        )

    @property
    def part_schema(self) -> pa.Schema:
        """Schema of the job's parts."""
        return part_schema(self.carried_schema, self.job.output.prefix)

    @property
    def carried_schema(self) -> pa.Schema:
        """The columns that go to the output."""
        return pa.schema([self.columns.field(name) for name in self.carried])


def prepare(job: JobConfig) -> Prepared:
    """Check a job against its input and its model; loads neither.

    Raises:
        ConfigError: Templates, columns or the model's name do not fit.
        SourceError: The input does not exist or is not what its name says.
    """
    paths = [job.input.path] if isinstance(job.input.path, str) else job.input.path
    format_name, files = find_files(paths, job.input.format)
    _refuse_output_as_input(files, job.output.path)
    reader = reader_for(format_name)
    for path in files:
        reader.sniff(path)
    columns = reader.columns(files, job.input.types)
    if job.input.where is not None:
        try:
            check_where(job.input.where, columns)
        except ValueError as error:
            where = "input.where"
            raise ConfigError(where, [str(error)]) from error
    builder = prompts.PromptBuilder(job.prompt)
    builder.columns(columns.names)
    model = ModelFiles("", {})
    if job.model.backend == "vllm":
        model = resolve_model(job.model.name, job.model.revision)
    prepared = Prepared(
        job=job,
        model=model,
        recipe=recipes.make_recipe(job, model.identity),
        format=format_name,
        reader=reader,
        files=files,
        columns=columns,
        carried=_carried(job.input.columns, columns.names),
        builder=builder,
    )
    _ = prepared.part_schema  # Refuses clashing names.
    return prepared


def _carried(wanted: Sequence[str] | None, available: Sequence[str]) -> Sequence[str]:
    if wanted is None:
        return list(available)
    problems = [
        f"no column {name!r} in the input, it has: {', '.join(available)}"
        for name in wanted
        if name not in available
    ]
    problems += [f"{name!r} is listed twice" for name in set(wanted) if wanted.count(name) > 1]
    if problems:
        where = "input.columns"
        raise ConfigError(where, problems)
    return list(wanted)


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


def planned_columns(plan: Plan) -> pa.Schema:
    """The input's columns as the plan froze them."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(plan.schema)))


def changes(plan: Plan, prepared: Prepared) -> list[str]:
    """Return what differs between a plan and the job as it is now; empty if nothing does."""
    found = recipes.diff(plan.job["recipe"], prepared.recipe)
    for table in ("input", "output"):
        lines = recipes.diff(plan.job[table], prepared.frozen_job[table])
        found += [f"{table}.{line}" for line in lines]
    planned = {segment.path: segment for segment in plan.segments}
    for path, segment in planned.items():
        if path not in prepared.files:
            found.append(f"input: {path} is gone")
        elif why := difference(segment, prepared.reader):
            found.append(f"input: {path} {why}")
    return found


def new_files(plan: Plan, prepared: Prepared) -> list[str]:
    """Files that came after the plan was frozen. A limit that is filled wants no more."""
    if plan.is_cut:
        return []
    planned = {segment.path for segment in plan.segments}
    return [path for path in prepared.files if path not in planned]


def difference(segment: Segment, reader: Reader) -> str | None:
    """How a file differs from what was planned, None if it does not.

    Size and version (mtime) decide without reading; a file that was only touched or copied back
    is told by its content.
    """
    now = stat_input(segment.path)
    if now.size_bytes != segment.size_bytes:
        return f"has {now.size_bytes} bytes, planned with {segment.size_bytes}"
    if now.version == segment.version:
        return None
    if reader.digest_prefix(segment.path, segment.size_bytes) == segment.digest:
        return None
    return "has other content than planned"


def check_unchanged(segment: Segment, reader: Reader) -> None:
    """Stop a run whose input moves under it.

    Raises:
        InputChangedError: The file changed or vanished.
    """
    try:
        why = difference(segment, reader)
    except SourceError as error:
        raise InputChangedError(
            segment.path, f"vanished during the run: {error.problem}"
        ) from error
    if why:
        raise InputChangedError(segment.path, f"{why}; it must not change while a job runs")


def read_rows(prepared: Prepared, plan: Plan, todo: Mapping[int, Ranges]) -> Iterator[RowBatch]:
    """Yield the rows of `todo`, segment by segment, checking each file before and after."""
    spec = prepared.spec(planned_columns(plan))
    for number, segment in enumerate(plan.segments):
        if rows := todo.get(number):
            check_unchanged(segment, prepared.reader)
            yield from prepared.reader.read(segment.path, number, rows, spec)
            check_unchanged(segment, prepared.reader)


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
