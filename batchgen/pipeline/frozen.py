"""The input, frozen to a plan, and read back as it was planned.

Freezing is the one pass over the input, counting and hashing; it may run while the engine starts.
A file that an earlier plan has seen and that has not moved since is not read again. Later, a plan
is held against the present: what changed, what came, and whether each row is still the planned one.
"""

from __future__ import annotations

import base64
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from batchgen.core.errors import InputChangedError, SourceError
from batchgen.core.records import Ranges, RowSet
from batchgen.job.model import is_url
from batchgen.source.files import InputStat, stat_input
from batchgen.source.formats import find_files
from batchgen.store.books import Plan, Segment
from batchgen.store.matching import DigestFile
from batchgen.store.runs import utc_now

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from batchgen.core.records import RowBatch
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.prepare import Prepared
    from batchgen.source.reading import Reader, ReadSpec
    from batchgen.storage import LocalStorage
    from batchgen.store.books import Base


# Reading and hashing a file leave the GIL, digests of its lines do not.
_SCAN_THREADS = 2


@dataclass(frozen=True, slots=True)
class Before:
    """Earlier plans that a new one goes back to."""

    seen: Plan | None = None
    """The newest plan: what it knows of files holds while they do not change."""
    bases: Sequence[Base] = ()
    takes_errors: bool = True
    generation: int = 0


NOTHING_BEFORE = Before()


def freeze(
    prepared: Prepared,
    number: int,
    before: Before = NOTHING_BEFORE,
    storage: LocalStorage | None = None,
) -> Plan:
    """Fix what belongs to the job.

    Args:
        prepared: The job.
        number: Of the plan.
        before: What was planned before.
        storage: Gets the digests of rows, so that a later plan can tell which rows changed.

    Raises:
        SourceError: A file cannot be read to its end.
        InputChangedError: A file changed while it was read.
        StorageError: The digests cannot be written.
    """
    scanner = _Scanner(prepared, before.seen, storage)
    limit = prepared.job.input.limit
    left = 1
    if limit is None:
        with ThreadPoolExecutor(_SCAN_THREADS) as pool:
            segments = list(pool.map(scanner.segment, prepared.files))
    else:
        segments, left = _limited(prepared, scanner, limit)
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
        bases=before.bases,
        takes_errors=before.takes_errors,
        generation=before.generation,
        counts_lines=prepared.format == "csv",
    )


def has_new_rows(files: Sequence[str], seen: Plan) -> bool:
    """Guess, without reading, whether there are rows that a plan has not seen.

    That is: a file that is longer than it was, or one that has neither the name of one that was
    seen nor the size and time of one.

    Raises:
        SourceError: A file cannot be found.
    """
    if seen.is_cut:
        return False  # What else there is may not be wanted.
    sizes = {segment.path: segment.size_bytes for segment in seen.segments}
    known = {InputStat(segment.size_bytes, segment.version) for segment in seen.segments}
    for path in files:
        now = stat_input(path)
        if now.size_bytes > sizes[path] if path in sizes else now not in known:
            return True
    return False


class _Scanner:
    """Makes segments of input files."""

    def __init__(self, prepared: Prepared, seen: Plan | None, storage: LocalStorage | None) -> None:
        self._reader = prepared.reader
        self._storage = storage
        segments: Sequence[Segment] = ()
        if seen is not None and _counts_alike(seen, prepared):
            # The last file of a cut plan was not counted to its end.
            segments = seen.segments[:-1] if seen.is_cut else seen.segments
        self._seen = {segment.path: segment for segment in segments}

    def segment(self, path: str) -> Segment:
        """A whole file."""
        before = stat_input(path)
        seen = self._seen.get(path)
        if seen is not None and before.is_still(InputStat(seen.size_bytes, seen.version)):
            return seen
        if self._storage is None:
            scan = self._reader.scan(path)
        else:
            digests = DigestFile(self._storage)
            try:
                scan = self._reader.scan(path, digests.add)
                digests.commit(scan.digest)
            except BaseException:
                digests.discard()
                raise
        if stat_input(path) != before:
            raise InputChangedError(path, "changed while it was read; run again when it is at rest")
        return Segment(path, before.size_bytes, before.version, scan.digest, scan.num_rows)


def _counts_alike(seen: Plan, prepared: Prepared) -> bool:
    """Tell whether an unchanged file has as many rows as it had: quotes hang on the delimiter."""
    delimiter, counts_lines = seen.job["input"].get("delimiter"), prepared.format == "csv"
    was = (seen.input_format, delimiter, seen.counts_lines)
    return was == (prepared.format, prepared.job.input.delimiter, counts_lines)


def _limited(prepared: Prepared, scanner: _Scanner, limit: int) -> tuple[list[Segment], int]:
    """Return segments cut after the row that fills the limit, and what is left of the limit.

    Only rows that `where` keeps count.
    """
    segments = []
    left = limit
    for path in prepared.files:
        segment = scanner.segment(path)
        num_rows, left = _cut(prepared, segment, left)
        segments.append(replace(segment, num_rows=num_rows))
        if not left:
            break
    return segments, left


def _cut(prepared: Prepared, segment: Segment, left: int) -> tuple[int, int]:
    """Count the physical rows of a segment that fill the limit, and what is left of it."""
    todo = Ranges.until(segment.num_rows)
    for batch in prepared.reader.read(segment.path, 0, todo, prepared.spec()):
        if len(batch.rows) >= left:
            return batch.rows[left - 1] + 1, 0
        left -= len(batch.rows)
    return segment.num_rows, left


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
    """Tell whether the input's files are others than the plan's, or in another order.

    Raises:
        SourceError: There is none any more, or it is not what its name says.
    """
    paths = [job.input.path] if isinstance(job.input.path, str) else job.input.path
    files = list(find_files(paths, job.input.format).paths)
    planned = [segment.path for segment in plan.segments]
    # A limit that is filled wants no more files.
    return (files[: len(planned)] if plan.is_cut else files) != planned


def difference(segment: Segment, reader: Reader) -> str | None:
    """Say how a file differs from what was planned; None if it does not.

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


def read_rows(plan: Plan, todo: RowSet, reader: Reader, spec: ReadSpec) -> Iterator[RowBatch]:
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
