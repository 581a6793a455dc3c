"""A frozen plan against the present: what changed, what came, and the rows as they were planned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchgen.core.errors import InputChangedError, SourceError
from batchgen.inputs import InputStat, is_url, stat_input
from batchgen.job import recipe as recipes
from batchgen.source.files import find_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from batchgen.core.ranges import Ranges
    from batchgen.core.records import RowBatch
    from batchgen.job.model import JobConfig
    from batchgen.source.base import Reader, ReadSpec
    from batchgen.store.books import Plan, Segment


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


def has_other_files(plan: Plan, job: JobConfig) -> bool:
    """Whether the input's files are others than the plan's, or in another order.

    Raises:
        SourceError: There is none any more, or it is not what its name says.
    """
    paths = [job.input.path] if isinstance(job.input.path, str) else job.input.path
    _, files = find_files(paths, job.input.format)
    planned = [segment.path for segment in plan.segments]
    # A limit that is filled wants no more files.
    return (files[: len(planned)] if plan.is_cut else files) != planned


def difference(segment: Segment, reader: Reader) -> str | None:
    """How a file differs from what was planned, None if it does not.

    Size and version (mtime) decide without reading; a file that was only touched or copied back
    is told by its content.
    """
    now = stat_input(segment.path)
    if now.size_bytes != segment.size_bytes:
        return f"has {now.size_bytes} bytes, planned with {segment.size_bytes}"
    if now.is_still(InputStat(segment.size_bytes, segment.version)):
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
    """Yield the rows of `todo`, segment by segment.

    Each batch was read before its file was seen to be the plan's, so that no row of a file that
    moves is taken for the row that was planned there.

    Raises:
        InputChangedError: A file changed or vanished.
    """
    for number, segment in enumerate(plan.segments):
        if rows := todo.get(number):
            check_unchanged(segment, reader)
            seen = InputStat(segment.size_bytes, segment.version)
            for batch in reader.read(segment.path, number, rows, spec):
                # Asking for a remote file's state takes a round trip: it is asked once, at the end.
                if not is_url(segment.path):
                    seen = _still(segment, reader, seen)
                yield batch
            check_unchanged(segment, reader)


def _still(segment: Segment, reader: Reader, seen: InputStat) -> InputStat:
    """Check a file whose state is not the one that was last found good; return its state."""
    try:
        now = stat_input(segment.path)
    except SourceError:
        now = seen  # It vanished: told by the check.
        check_unchanged(segment, reader)
    if now != seen:
        check_unchanged(segment, reader)
    return now
