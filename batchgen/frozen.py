"""A frozen plan against the present: what changed, what came, and the rows as they were planned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchgen.config import recipe as recipes
from batchgen.errors import InputChangedError, SourceError
from batchgen.inputs import stat_input
from batchgen.source.files import find_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from batchgen.books import Plan, Segment
    from batchgen.config.model import JobConfig
    from batchgen.ranges import Ranges
    from batchgen.records import RowBatch
    from batchgen.source.base import Reader, ReadSpec


def job_changes(plan: Plan, frozen_job: Mapping[str, Any]) -> list[str]:
    """Return what differs between a plan's job and the job as it is now; empty if nothing."""
    found = recipes.diff(plan.job["recipe"], frozen_job["recipe"])
    for table in ("input", "output", "checks"):
        lines = recipes.diff(plan.job[table], frozen_job[table])
        found += [f"{table}.{line}" for line in lines]
    return found


def input_changes(plan: Plan, reader: Reader) -> list[str]:
    """Return which planned files changed or are gone."""
    found = []
    for segment in plan.segments:
        try:
            why = difference(segment, reader)
        except SourceError as error:
            why = f"is gone: {error.problem}"
        if why:
            found.append(f"input: {segment.path} {why}")
    return found


def new_files(plan: Plan, job: JobConfig) -> Sequence[str]:
    """Files that came after the plan was frozen. A limit that is filled wants no more."""
    if plan.is_cut:
        return []
    planned = {segment.path for segment in plan.segments}
    paths = [job.input.path] if isinstance(job.input.path, str) else job.input.path
    try:
        _, files = find_files(paths, job.input.format)
    except SourceError:
        return []  # What is gone or of another format is no new file; changes are told apart.
    return [path for path in files if path not in planned]


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


def read_rows(
    plan: Plan, todo: Mapping[int, Ranges], reader: Reader, spec: ReadSpec
) -> Iterator[RowBatch]:
    """Yield the rows of `todo`, segment by segment, checking each file before and after."""
    for number, segment in enumerate(plan.segments):
        if rows := todo.get(number):
            check_unchanged(segment, reader)
            yield from reader.read(segment.path, number, rows, spec)
            check_unchanged(segment, reader)
