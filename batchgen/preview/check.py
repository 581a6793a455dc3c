"""`batchgen check`: what a job reads, asks and answers, and its first prompts; loads no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from batchgen.core.errors import ExitCode
from batchgen.core.records import Prompt, RowError
from batchgen.core.runtime import Told, printable
from batchgen.pipeline.prepare import Prepared, as_text, prepare
from batchgen.preview.sample import first_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchgen.job.model import JobConfig

PLACE = "--- "
"""Begins the line that names a row."""


@dataclass(frozen=True, slots=True, repr=False)
class Checked(Told):
    """A job that a run would start with, and its first prompts."""

    prepared: Prepared
    prompts: Sequence[tuple[str, Prompt | RowError]]
    """Where each row is, and its prompt or why it has none."""

    @property
    def reason(self) -> str | None:
        """Why the job is no good; None if some row shown has a prompt, or there is none to show."""
        if any(not isinstance(outcome, RowError) for _, outcome in self.prompts):
            return None
        return (
            f"none of the {len(self.prompts)} row(s) shown has a prompt" if self.prompts else None
        )

    @property
    def exit_code(self) -> ExitCode:
        """0, or 2 where each row shown is an error."""
        return ExitCode.REFUSED if self.reason else ExitCode.COMPLETE

    def as_text(self) -> str:
        """The lines that a person reads."""
        job = self.prepared
        num, kind = len(job.files), job.format if job.format == "parquet" else job.format.upper()
        files = f"{num} {kind.capitalize() if kind == 'parquet' else kind} file"
        first = f"{files}: {job.files[0]}" if num == 1 else f"{files}s, first {job.files[0]}"
        columns = ", ".join(f"{field.name}: {_type_text(field.type)}" for field in job.columns)
        answer = ", ".join(f"{field.name}: {field.type}" for field in job.answer.fields)
        lines = [
            f"input    {first}",
            f"columns  {printable(columns, keep='')}",
            f"carried  {printable(', '.join(job.carried), keep='')}",
            f"model    {job.model.path or job.model_name}",
            f"answer   {answer}",
            *(f"as JSON  {why}" for why in job.form.fallbacks),
            *(f"note     {note}" for note in job.notes),
            f"recipe   {job.recipe_fingerprint}",
        ]
        for where, outcome in self.prompts:
            lines += [f"{PLACE}{where}", as_text(outcome, job.job)]
        return "\n".join(lines)


def _type_text(kind: pa.DataType) -> str:
    """Name a type; of a dictionary, which pandas calls a category, only what is in it."""
    return f"{kind.value_type} (category)" if pa.types.is_dictionary(kind) else str(kind)


def check_job(job: JobConfig, num_rows: int) -> Checked:
    """Prepare a job as a run does, and render its first rows.

    Raises:
        BatchgenError: A run would refuse to start.
    """
    prepared = prepare(job)
    return Checked(prepared, list(first_prompts(prepared, num_rows)))
