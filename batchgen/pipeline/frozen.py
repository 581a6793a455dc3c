"""The input, frozen to a plan, and read back as it was planned.

What a job is checked against in milliseconds are the columns of first rows. A JSONL file may have
other keys and other kinds of values further on: a plan has the columns that hold all of them, so
that a row whose prompt can be made runs, and all files of a snapshot have one schema. Exceptions
are columns that `input.where` or a rule of `[checks]` compares: they keep the type that they were
checked with, and what does not fit it is an error of its row, as with `input.types`.

Freezing is the one pass over the input, counting and hashing; it may run while the engine starts.
A file that an earlier plan has seen and that has not moved since is not read again. Later, a plan
is held against the present: what changed, what came, and whether each row is still the planned one.
"""

from __future__ import annotations

import itertools
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from batchgen.answers.json_schema import row_validator
from batchgen.core.errors import InputChangedError, SourceError
from batchgen.core.expressions import parse_row_test
from batchgen.core.processes import Crew, num_processes
from batchgen.core.records import Ranges, RowBatch, RowSet
from batchgen.job.model import JobConfig, is_url
from batchgen.job.recipe import Seeds
from batchgen.pipeline.prepare import Prepared, check_columns
from batchgen.prompt.requests import RequestBuilder
from batchgen.source.columns import (
    Kinds,
    is_partition,
    kinds_of,
    planned,
    read_schema,
    schema_text,
    type_word,
)
from batchgen.source.files import InputStat, stat_input
from batchgen.source.formats import InputFiles, find_files
from batchgen.source.text import Scan, digest_prefix
from batchgen.store.books import Base, Plan, Segment
from batchgen.store.matching import DigestFile
from batchgen.store.runs import utc_now

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from batchgen.source.reading import Reader, ReadSpec
    from batchgen.storage import LocalStorage


# Reading and hashing a file leave the GIL, digests of its lines do not.
_SCAN_THREADS = 2
_WORTH_BYTES = 256 << 20
"""So much has to be read before processes are worth their start, half a second each."""


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
    tell: Callable[[str], object] = len,
    on_block: Callable[[], object] = int,
) -> Plan:
    """Fix what belongs to the job.

    Args:
        prepared: The job.
        number: Of the plan.
        before: What was planned before.
        storage: Gets the digests of rows, so that a later plan can tell which rows changed.
        tell: Hears of columns that are others than first rows or the plan before had.
        on_block: Called now and then while files are read; what it raises ends the work.

    Raises:
        SourceError: A file cannot be read to its end.
        InputChangedError: A file changed while it was read.
        StorageError: The digests cannot be written.
    """
    scanner = _Scanner(prepared, before.seen, storage, on_block)
    limit = prepared.job.input.limit
    left, settled = 1, None
    found: Iterable[Segment] = map(scanner.segment, prepared.files)
    if limit is None or prepared.late:
        found = scanner.segments(prepared.files)
        settled = _settled(prepared, scanner.keys(found)[1])
    segments = found
    if limit is not None:
        segments, left = _limited(settled or prepared, found, limit)
    segments, keys = scanner.keys(segments)
    settled = settled or _settled(prepared, keys)
    if note := _column_note(prepared, settled, before, scanner.found):
        tell(note)
    num_left_out = len(settled.columns) - len(settled.carried)
    if num_left_out and prepared.job.input.columns is None:
        text = f"{num_left_out:,} keys beyond {MOST_COLUMNS:,} columns are not carried"
        tell(f"input: {text}; name them in input.columns to have them")
    return Plan(
        number=number,
        plan_id=secrets.token_hex(8),
        created_at=utc_now().isoformat(timespec="seconds"),
        job=prepared.frozen_job,
        recipe_fingerprint=prepared.recipe_fingerprint,
        input_format=prepared.format,
        columns=[f"{field.name}: {field.type}" for field in settled.columns],
        schema=schema_text(settled.columns),
        carried=settled.carried,
        segments=segments,
        is_cut=not left,
        bases=before.bases,
        takes_errors=before.takes_errors,
        generation=before.generation,
        counts_lines=prepared.format == "csv",
        keeps=KEEP if before.seen is None else before.seen.keeps,
        keys=keys,
    )


KEEP = 30
"""So many snapshots of a new output stay where its job does not say how many."""
MOST_COLUMNS = 50_000
"""Keys beyond are carried only if they are named: where each row has keys of its own, each of them
would be a column of the whole snapshot."""
_EXAMPLES = 3


def _settled(prepared: Prepared, keys: Sequence[Mapping[str, str]]) -> Prepared:
    """Return the job with the columns of its whole input.

    Args:
        prepared: As checked against first rows.
        keys: See `Plan.keys`; none of a format whose files name their columns.

    Raises:
        ConfigError: Columns that the job names, or batchgen adds, do not fit.
    """
    job = prepared.job
    if not any(keys):
        return prepared
    compared, types = _compared(prepared), dict(job.input.types)
    of_folders = {field.name: field for field in prepared.columns if is_partition(field)}
    for name in of_folders:
        types.pop(name, None)
    fields = [
        prepared.columns.field(field.name)
        if type_word(field) in {"json", "text"} and field.name in compared
        else field
        for field in planned(map(kinds_of, keys), types, prepared.files[0])
    ]
    for name in {field.name for field in fields} & of_folders.keys():
        del of_folders[name]  # A column of the files wins.
    columns, carried = pa.schema([*fields, *of_folders.values()]), prepared.carried
    if job.input.columns is None:
        first = (*job.input.types, *carried) if len(fields) > MOST_COLUMNS else ()
        carried = list(dict.fromkeys((*first, *columns.names)))[:MOST_COLUMNS]
    check_columns(job, prepared.builder, prepared.answer, columns)
    return replace(prepared, columns=columns, carried=carried)


def _compared(prepared: Prepared) -> set[str]:
    """Columns whose type decides what an expression of the job means."""
    where, rules = prepared.job.input.where, prepared.job.checks.rules
    texts = [*rules, *([where] if where is not None else [])]
    names = {name for text in texts for name in parse_row_test("", text).columns}
    return names & set(prepared.columns.names) - prepared.late


def _column_note(
    prepared: Prepared,
    settled: Prepared,
    before: Before,
    found: Mapping[str, Mapping[str, Kinds]],
) -> str | None:
    """Say which columns are not as first rows, or the plan before, had them."""
    is_later = before.seen is not None and bool(before.bases)
    schema = read_schema(before.seen.schema) if before.seen and is_later else prepared.columns
    known = {field.name: type_word(field) for field in schema if field.name not in prepared.late}
    told = []
    for field in settled.carried_schema:
        firsts: dict[str, str] = {}
        for path in settled.files:
            for kind, row in found.get(path, {}).get(field.name, {}).items():
                firsts.setdefault(kind, f"{kind} from {path}:{row + 1} on")
        now, was = type_word(field), known.get(field.name)
        is_odd = now in {"json", "text"} and len(firsts) > 1 and not is_later
        if was != now or is_odd:
            why = f" ({', '.join(firsts.values())})" if firsts else ""
            change = "comes late" if was is None else f"was {was}" if was != now else "is mixed"
            told.append(f"{field.name!r} {change} and is carried as {now}{why}")
    if not told:
        return None
    more = f"; and {len(told) - _EXAMPLES} more" if len(told) > _EXAMPLES else ""
    remedy = "name it in input.types to have one type, and errors of rows that do not fit it"
    anew = "rows of the last snapshot are written again with it" if is_later else remedy
    return f"input: column {'; column '.join(told[:_EXAMPLES])}{more}: {anew}"


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
    known = {segment.stat for segment in seen.segments}
    for path in files:
        now = stat_input(path)
        if now.size_bytes > sizes[path] if path in sizes else now not in known:
            return True
    return False


class Scanned(NamedTuple):
    """A file that was read to its end."""

    path: str
    stat: InputStat
    scan: Scan


def scan_file(
    reader: Reader,
    storage: LocalStorage | None,
    path: str,
    on_block: Callable[[], object] = int,
) -> Scanned:
    """Read a file to its end; may run in a process of its own.

    Args:
        reader: Of its format.
        storage: Gets the digests of its rows, if there is one.
        path: The file.
        on_block: Called now and then; what it raises ends the work.

    Raises:
        SourceError: It cannot be read.
        InputChangedError: It changed meanwhile.
        StorageError: The digests cannot be written.
    """
    before = stat_input(path)
    if storage is None:
        scan = reader.scan(path, on_block=on_block)
    else:
        digests = DigestFile(storage, before.size_bytes)
        try:
            scan = reader.scan(path, digests.add, on_block)
            digests.commit(scan.digest)
        except BaseException:
            digests.discard()
            raise
    if stat_input(path) != before:
        raise InputChangedError(path, "changed while it was read; run again when it is at rest")
    return Scanned(path, before, scan)


def _is_much(paths: Sequence[str]) -> bool:
    """Whether files are local and so large that reading them takes longer than starting to."""
    if any(map(is_url, paths)):
        return False
    sizes = sorted(stat_input(path).size_bytes for path in paths)
    # One file that is larger than all others together is read by one process anyway.
    return sum(sizes) >= _WORTH_BYTES and sum(sizes[:-1]) >= _WORTH_BYTES // 4


@dataclass(eq=False)
class _Scanner:
    """Makes segments of input files."""

    prepared: Prepared
    seen: Plan | None
    storage: LocalStorage | None
    on_block: Callable[[], object]

    def __post_init__(self) -> None:
        segments: Sequence[Segment] = ()
        self._keys: Sequence[Mapping[str, str]] = ()
        if self.seen is not None and _counts_alike(self.seen, self.prepared):
            # The last file of a cut plan was not counted to its end.
            segments = self.seen.segments[:-1] if self.seen.is_cut else self.seen.segments
            self._keys = self.seen.keys
        self._seen = {segment.path: segment for segment in segments}
        self.found: dict[str, Mapping[str, Kinds]] = {}
        """What the keys of each file hold that was read now."""

    def segments(self, paths: Sequence[str]) -> list[Segment]:
        """Whole files, several at a time: by processes where there is much to read."""
        found = {path: seen for path in paths if (seen := self._known(path)) is not None}
        fresh = [path for path in paths if path not in found]
        num = num_processes(len(fresh))
        if num > 1 and self._is_plain() and _is_much(fresh):
            reader, pieces = self.prepared.reader, [(path,) for path in fresh]
            with Crew(num) as crew:
                scan = partial(scan_file, reader, self.storage)
                for scanned in crew.map(scan, pieces, self.on_block):
                    found[scanned.path] = self._segment(scanned)
        else:
            with ThreadPoolExecutor(_SCAN_THREADS) as pool:
                found |= zip(fresh, pool.map(self.segment, fresh), strict=True)
        return [found[path] for path in paths]

    def _is_plain(self) -> bool:
        """Whether another process can write digests as this one would."""
        return self.storage is None or self.storage.is_plain

    def segment(self, path: str) -> Segment:
        """A whole file."""
        if (seen := self._known(path)) is not None:
            return seen
        return self._segment(
            scan_file(self.prepared.reader, self.storage, path, on_block=self.on_block)
        )

    def _known(self, path: str) -> Segment | None:
        """A file that has not changed since it was read."""
        seen = self._seen.get(path)
        is_known = seen is not None and (seen.keys is not None or self.prepared.format != "jsonl")
        if seen is not None and is_known and stat_input(path).is_still(seen.stat):
            return seen
        return None

    def _segment(self, scanned: Scanned) -> Segment:
        path, stat, scan = scanned
        if scan.columns is not None:
            self.found[path] = scan.columns
        return Segment(path, stat.size_bytes, stat.version, scan.digest, scan.num_rows)

    def keys(
        self, segments: Iterable[Segment]
    ) -> tuple[list[Segment], tuple[Mapping[str, str], ...]]:
        """Return segments that say which keys they have, and the keys, see `Plan.keys`."""
        numbers: dict[tuple[tuple[str, str], ...], int] = {}
        keyed = []
        for segment in segments:
            if (found := self.found.get(segment.path)) is not None:
                keys = {name: ",".join(sorted(kinds)) for name, kinds in found.items()}
            elif segment.keys is not None:
                keys = dict(self._keys[segment.keys])
            else:
                keyed.append(segment)
                continue
            number = numbers.setdefault(tuple(keys.items()), len(numbers))
            keyed.append(replace(segment, keys=number))
        return keyed, tuple(dict(keys) for keys in numbers)


def _counts_alike(seen: Plan, prepared: Prepared) -> bool:
    """Tell whether an unchanged file has as many rows as it had: quotes hang on the delimiter."""
    table, job = seen.job["input"], prepared.job.input
    was = (seen.input_format, table.get("delimiter"), table.get("encoding"), seen.counts_lines)
    return was == (prepared.format, job.delimiter, job.encoding, prepared.format == "csv")


def _limited(prepared: Prepared, found: Iterable[Segment], limit: int) -> tuple[list[Segment], int]:
    """Return segments cut after the row that fills the limit, and what is left of the limit.

    Only rows that `where` keeps count.
    """
    segments = []
    left = limit
    for segment in found:
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


def input_changes(plan: Plan) -> list[str]:
    """Return which planned files changed or are gone."""
    found = []
    for segment in plan.segments:
        try:
            why = difference(segment)
        except SourceError as error:
            why = f"is gone: {error.problem}"
        if why:
            found.append(f"input: {segment.path} {why}")
    return found


def same_files(plan: Plan, job: JobConfig) -> InputFiles | None:
    """Find the input's files; None if they are others than the plan's, or in another order.

    Raises:
        SourceError: There is none any more, or it is not what its name says.
    """
    paths = [job.input.path] if isinstance(job.input.path, str) else job.input.path
    found = find_files(paths, job.input.format)
    files = list(found.paths)
    planned = [segment.path for segment in plan.segments]
    # A limit that is filled wants no more files.
    is_same = (files[: len(planned)] if plan.is_cut else files) == planned
    return found if is_same else None


def difference(segment: Segment) -> str | None:
    """Say how a file differs from what was planned; None if it does not.

    Size and version (mtime) decide without reading; a file that was only touched or copied back
    is told by its content.
    """
    now = stat_input(segment.path)
    if now.size_bytes != segment.size_bytes:
        return f"has {now.size_bytes} bytes, planned with {segment.size_bytes}"
    if now.is_still(segment.stat):
        return None
    if digest_prefix(segment.path, segment.size_bytes) == segment.digest:
        return None
    return "has other content than planned"


def check_unchanged(segment: Segment) -> None:
    """Stop a run whose input moves under it.

    Raises:
        InputChangedError: The file changed or vanished.
    """
    try:
        why = difference(segment)
    except SourceError as error:
        raise InputChangedError(
            segment.path, f"vanished during the run: {error.problem}"
        ) from error
    if why:
        raise InputChangedError(segment.path, f"{why}; it must not change while a job runs")


def request_builder(
    prepared: Prepared, plan: Plan, ids: Iterator[int] | None = None
) -> RequestBuilder:
    """Return what makes requests of a plan's rows, with its keys and seeds.

    Args:
        prepared: The job.
        plan: Whose rows they are.
        ids: Request ids, unique within a run; None for requests that no engine gets.
    """
    return RequestBuilder(
        prepared.builder,
        prepared.job,
        plan.recipe_fingerprint,
        seeds=Seeds(prepared.job.sampling, plan.seed_generation),
        ids=itertools.count() if ids is None else ids,
        check_schema=row_validator,
    )


def read_rows(plan: Plan, todo: RowSet, reader: Reader, spec: ReadSpec) -> Iterator[RowBatch]:
    """Yield the rows of `todo`, segment by segment.

    Each batch was read before its file was seen to be the plan's, so that no row of a file that
    moves is taken for the row that was planned there.

    Raises:
        InputChangedError: A file changed or vanished.
    """
    for number, segment in enumerate(plan.segments):
        if rows := todo.get(number):
            check_unchanged(segment)
            seen = segment.stat
            for batch in reader.read(segment.path, number, rows, spec):
                # Asking for a remote file's state takes a round trip: it is asked once, at the end.
                if not is_url(segment.path):
                    seen = _still(segment, seen)
                yield batch
            check_unchanged(segment)


def _still(segment: Segment, seen: InputStat) -> InputStat:
    """Check a file whose state is not the one that was last found good; return its state."""
    try:
        now = stat_input(segment.path)
    except SourceError:
        now = seen  # It vanished: told by the check.
        check_unchanged(segment)
    if now != seen:
        check_unchanged(segment)
    return now
