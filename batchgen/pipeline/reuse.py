"""Rows of earlier plans: which of them a plan takes over, and which of them it leaves behind.

Both are told from the books and from digests of rows; no input is parsed, but for `input.where`.
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.core.errors import BatchgenError, OutputError
from batchgen.core.records import NO_ROWS, Ranges, RowSet
from batchgen.pipeline.runner import Committer
from batchgen.store.books import Durable
from batchgen.store.dedupe import KnownKeys
from batchgen.store.matching import (
    answered_by,
    count_common,
    is_same_reading,
    match,
    match_files,
    pairs,
    restricted,
)
from batchgen.store.parts import ROW, SEGMENT, rows_of
from batchgen.store.result_files import Index, ResultFile
from batchgen.store.reuse import (
    Renumbering,
    Source,
    Wanted,
    from_parts,
    from_snapshot,
    gathered,
    key_prefixes,
    published_sources,
)
from batchgen.store.visible import damage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from batchgen.pipeline.compute import Commits
    from batchgen.pipeline.context import RunContext
    from batchgen.pipeline.prepare import Prepared
    from batchgen.storage import LocalStorage
    from batchgen.store.books import Base, Manifest, Plan, Segment
    from batchgen.store.ledger import Ledger
    from batchgen.store.matching import Span
    from batchgen.store.reuse import Piece


_WAIT_S = 0.2
# Several pieces are in memory at once, and as tables they are larger than as files.
_PIECE_MIB = 8


def missing(plan: Plan, durable: Durable) -> RowSet:
    """Map each segment to its rows that no accepted part accounts for, if there are any."""
    return RowSet(
        (number, Ranges.until(segment.num_rows) - durable.done(number))
        for number, segment in enumerate(plan.segments)
    )


def rejected_notes(durable: Durable) -> list[str]:
    """Say which parts of the plan do not count, a line each."""
    return [
        f"{name} does not count ({why}); its rows are done again"
        for name, why in durable.rejected.items()
    ]


class Takeover:
    """Rows that a plan takes from one of its bases."""

    def __init__(
        self,
        ledger: Ledger,
        prepared: Prepared,
        plan: Plan,
        base: Base,
        tell: Callable[[str], None],
    ) -> None:
        """Find the rows that the base has ended, without reading the input.

        Args:
            ledger: The job's books.
            prepared: The job.
            plan: The plan that takes, which need not be put yet.
            base: The plan that it takes from.
            tell: Hears of damage.
        """
        self._ledger = ledger
        self._prepared = prepared
        self._plan = plan
        self._base = base
        self._tell = tell
        self.old = ledger.plan(base.plan)
        """The base's plan."""
        self._manifest = ledger.manifest(base.plan)
        self._durable = Durable()
        is_same = is_same_reading(self.old, plan)
        self.matched: Sequence[Span] = match(ledger.storage, self.old, plan) if is_same else []
        """Rows that both plans have, answered or not."""
        spans = self.matched
        if is_same and self._manifest is None:
            self._durable = self._parts()
            spans = answered_by(spans, self._durable)
        elif is_same and not self._has_index():
            spans = []
        self._take(spans)

    def _take(self, spans: Sequence[Span]) -> None:
        self._spans = spans
        self.rows = new_rows(spans)
        """Segment -> rows that the base has ended. Errors among them may not be wanted."""

    def restrict(self, todo: RowSet) -> None:
        """Take only rows of `todo`."""
        self._take(restricted(self._spans, todo))

    def _has_index(self) -> bool:
        """Tell whether rows of the base can be told apart; if not, their requests still can."""
        assert self._manifest is not None  # noqa: S101 - asked only of published plans
        try:
            with Index(self._ledger.storage, self._manifest):
                return True
        except OutputError as error:
            self._tell(f"{error}; every row is read again, answers are found by key")
            return False

    def _parts(self) -> Durable:
        durable = self._ledger.parts(self.old, self._base.parts)
        for name, why in durable.rejected.items():
            self._tell(f"{name} cannot be taken over ({why}); its rows are done again")
        return durable

    def pieces(self) -> Iterator[Piece]:
        """Yield the rows, each piece as large as a part may be.

        Raises:
            OutputError: The base is damaged beyond telling rows apart.
            StorageError: It cannot be read right now.
        """
        if not self.rows:
            return iter(())
        storage, run = self._ledger.storage, self._prepared.job.run
        wanted = Wanted(
            self._prepared.part_schema,
            self._prepared.job.output.prefix,
            Renumbering(self._spans, self.old, self._plan),
            self._plan.takes_errors,
            self._tell,
        )
        if self._manifest is not None:
            num_rows = [segment.num_rows for segment in self.old.segments]
            pieces = from_snapshot(storage, self._manifest, num_rows, wanted)
        else:
            pieces = from_parts(storage, self._durable.parts, wanted)
        return gathered(pieces, run.flush_rows, min(run.flush_mib, _PIECE_MIB) * 2**20)

    def wanted_rows(self) -> RowSet:
        """Map each segment to the rows that `pieces` will yield, as far as damage shows.

        Reads statuses where errors are not wanted, and published files that are not what was
        published.

        Raises:
            StorageError: Something cannot be read right now.
        """
        left = self.rows
        if self.rows:
            moves = Renumbering(self._spans, self.old, self._plan)
            errors = () if self._plan.takes_errors else self._errors()
            for unwanted in itertools.chain(errors, self._damaged()):
                left -= moves.ranges(unwanted)
        return left

    def _damaged(self) -> Iterator[RowSet]:
        """Yield the rows of a snapshot's row groups that are not what was published."""
        storage, manifest = self._ledger.storage, self._manifest
        if manifest is None or not (names := damage(storage, manifest.files)):
            return
        paths = {storage.path(name) for name in names}
        for file, group, ordinals in _row_groups(storage, manifest):
            if file.path in paths and file.group(group) is None:
                yield rows_of(ordinals())

    def _errors(self) -> Iterator[RowSet]:
        """Yield the base's rows that are errors, piece by piece."""
        storage, status = self._ledger.storage, f"{self.old.prefix}status"
        for part in self._durable.parts:
            with ResultFile(storage.path(part.name)) as file:
                for _, table in file.groups([SEGMENT, ROW, status]):
                    yield rows_of(table.filter(pc.equal(table.column(status), "error")))
        for file, group, ordinals in _row_groups(storage, self._manifest):
            if (statuses := file.group(group, [status], is_proven=False)) is not None:
                yield rows_of(ordinals().filter(pc.equal(statuses.column(status), "error")))


def _row_groups(
    storage: LocalStorage, manifest: Manifest | None
) -> Iterator[tuple[ResultFile, int, Callable[[], pa.Table]]]:
    """Yield each row group of a snapshot: its file, its number in it, and what reads its ordinals.

    Raises:
        OutputError: There is no index of rows, or it is damaged.
        StorageError: The index cannot be read right now.
    """
    if manifest is None:
        return
    with Index(storage, manifest) as index:
        for _, file, numbers in index.files():
            for group, number in enumerate(numbers):
                yield file, group, partial(index.ordinals, number)


def new_rows(spans: Iterable[Span]) -> RowSet:
    """Map each segment of the later plan to its rows that spans name."""
    return RowSet.of_spans((span.segment, span.start, span.start + span.length) for span in spans)


def takeovers(
    ledger: Ledger,
    prepared: Prepared,
    plan: Plan,
    todo: RowSet,
    tell: Callable[[str], None],
) -> list[Takeover]:
    """Find what a plan takes from each of its bases: a row from the newest that has it.

    Args:
        ledger: The job's books.
        prepared: The job.
        plan: The plan that takes, which need not be put yet.
        todo: Its rows that are not done.
        tell: Hears of damage.

    Returns:
        One for each base, in the plan's order; those without rows are among them.
    """
    found: list[Takeover] = []
    for base in plan.bases:
        source = Takeover(ledger, prepared, plan, base, tell)
        source.restrict(todo)
        todo -= source.rows
        found.append(source)
    return found


def base_sources(ledger: Ledger, plan: Plan) -> list[Source]:
    """List the result files of a plan's bases, whose answers serve equal requests."""
    takes_errors = plan.takes_errors
    found: list[Source] = []
    for base in plan.bases:
        manifest = ledger.manifest(base.plan)
        if manifest is None:
            found += [Source(name, takes_errors) for name in base.parts]
        else:
            found += published_sources(ledger.storage, manifest, takes_errors=takes_errors)
    return found


def answered_keys(
    storage: LocalStorage, sources: Sequence[Source], prefix: str, tell: Callable[[str], None]
) -> KnownKeys:
    """Read which requests have an answer in result files, see `key_prefixes`."""
    known = KnownKeys()
    for prefixes in key_prefixes(storage, sources, prefix, tell):
        known.load(prefixes)
    return known


def commit_all(
    context: RunContext, commits: Commits, pieces: Iterable[Piece], on_piece: Callable[[], None]
) -> None:
    """Make pieces durable, one after the other, until the end or until stopped.

    Raises:
        BatchgenError: A commit failed, or the pieces cannot be read.
    """
    committer: Committer[Piece] = Committer(
        commits.taken, context.job.run.disk_grace_s, context.tell_disk_trouble
    )
    try:
        for piece in pieces:
            while not committer.put(piece, _WAIT_S):
                if context.is_stopped():
                    committer.hurry()
            on_piece()
            pa.default_memory_pool().release_unused()
            if context.is_stopped():
                committer.hurry()
                break
    except BaseException:
        committer.hurry()
        with suppress(BatchgenError):  # The first trouble is the one to tell.
            committer.close()
        raise
    committer.close()


@dataclass(frozen=True, slots=True)
class Leaving:
    """Published rows that the next snapshot will not have."""

    num_rows: int = 0
    is_exact: bool = True
    """False: at most so many, as rows without digests may stand in another file now."""
    why: str = ""

    @property
    def text(self) -> str:
        """A sentence for people."""
        most = "" if self.is_exact else "at most "
        leave = "row leaves" if self.num_rows == 1 else "rows leave"
        return f"{self.why}: {most}{self.num_rows:,} {leave} the snapshot"


NOTHING_LEAVES = Leaving()


class _FileChange(NamedTuple):
    """How an input file has changed between two plans."""

    before: Segment | None
    """The old plan's segment; None for a file that is new."""
    after: Segment | None
    """The new plan's segment; None for a file that is gone."""
    lost: Ranges
    """Published rows of the old segment that are not in the new one."""
    fresh: Ranges
    """Rows of the new segment that are not in the old one."""
    num_more: int
    """By how many rows the next snapshot has more of this file than the last one."""


def leaving_rows(ledger: Ledger, prepared: Prepared, plan: Plan) -> Leaving:
    """Count the rows of the last snapshot that a plan has no row for.

    A row that stands in another place of its file, or in a file of another name, is there; one
    that was edited in place is there, too. So a file loses as many rows as it has fewer.

    Raises:
        SourceError: A file cannot be read.
        StorageError: The snapshot's index cannot be read right now.
    """
    manifest = ledger.manifest_before(plan.number)
    if manifest is None:
        return NOTHING_LEAVES
    storage, old = ledger.storage, ledger.plan(manifest.number)
    is_alike = _selects_alike(old, plan)
    if not _may_leave(old, plan, is_alike=is_alike):
        return NOTHING_LEAVES
    published = _published_rows(storage, manifest, old)
    changes = list(_file_changes(storage, prepared, (old, plan), published, is_alike=is_alike))
    fewer = [change for change in changes if change.num_more < 0]
    more = [change for change in changes if change.num_more > 0]
    num_rows, num_came = (abs(sum(one.num_more for one in those)) for those in (fewer, more))
    num_moved: int | None = 0
    if num_rows and num_came:
        losers = [(one.before, one.lost) for one in fewer if one.before is not None]
        others = [(one.after, one.fresh) for one in more if one.after is not None]
        num_moved = count_common(storage, losers, others) if is_alike else None
    num_rows -= min(num_moved or 0, num_rows, num_came)
    if not num_rows:
        return NOTHING_LEAVES
    return Leaving(num_rows, num_moved is not None, _why_rows_leave(old, plan, fewer))


def _selects_alike(old: Plan, new: Plan) -> bool:
    """Tell whether a line that is a row of one plan is a row of the other."""
    tables = [(plan.input_format, *map(plan.job["input"].get, _SELECTING)) for plan in (old, new)]
    return tables[0] == tables[1]


_SELECTING = ("where", "delimiter")


def _may_leave(old: Plan, new: Plan, *, is_alike: bool) -> bool:
    """Tell from the books whether a file is gone or shrunk, or rows of it may be left out."""
    found = dict(pairs(old.segments, new.segments))
    if len(found) < len(old.segments):
        return True
    has_filter = new.job["input"].get("where") is not None
    for number, other in found.items():
        before, after = old.segments[other], new.segments[number]
        is_same = is_alike and before.digest == after.digest
        if after.num_rows < before.num_rows or (has_filter and not is_same):
            return True
    return False


def _file_changes(
    storage: LocalStorage,
    prepared: Prepared,
    plans: tuple[Plan, Plan],
    published: RowSet,
    *,
    is_alike: bool,
) -> Iterator[_FileChange]:
    old, new = plans
    found = dict(pairs(old.segments, new.segments))
    for number, after in enumerate(new.segments):
        fresh, lost, before = Ranges.until(after.num_rows), Ranges(), None
        if (other := found.get(number)) is not None:
            before, lost = old.segments[other], published[other]
            if not is_alike and before.digest == after.digest:  # Another filter of the same lines.
                kept = _kept(prepared, number, after, fresh)
                lost, fresh = lost - kept, kept - lost
                yield _FileChange(before, after, lost, fresh, -len(lost) or len(fresh))
                continue
            runs = list(match_files(storage, before, after)) if is_alike else []
            lost -= Ranges((was, was + num) for _, was, num in runs)
            fresh -= Ranges((at, at + num) for at, _, num in runs)
        num_more = len(_kept(prepared, number, after, fresh)) - len(lost)
        yield _FileChange(before, after, lost, fresh, num_more)
    for other in set(range(len(old.segments))) - set(found.values()):
        lost = published[other]
        yield _FileChange(old.segments[other], None, lost, NO_ROWS, -len(lost))


def _kept(prepared: Prepared, number: int, segment: Segment, rows: Ranges) -> Ranges:
    """Find rows of a file that `input.where` keeps; reads them where there is such a filter."""
    if prepared.job.input.where is None or not rows:
        return rows
    spec = replace(prepared.spec(), carried=(), needed=frozenset())
    batches = prepared.reader.read(segment.path, number, rows, spec)
    return Ranges(span for batch in batches for span in Ranges.of(batch.rows).spans)


def _published_rows(storage: LocalStorage, manifest: Manifest, old: Plan) -> RowSet:
    """Map each segment to its rows in the snapshot: not blank, not left out by `where`."""
    planned = RowSet((at, Ranges.until(file.num_rows)) for at, file in enumerate(old.segments))
    if not manifest.num_skipped:
        return planned
    try:
        tables = (ordinals() for _, _, ordinals in _row_groups(storage, manifest))
        return RowSet.of_spans(span for table in tables for span in rows_of(table).spans())
    except OutputError:  # Told where rows are taken over.
        return planned


def _why_rows_leave(old: Plan, new: Plan, fewer: Sequence[_FileChange]) -> str:
    if new.is_cut:
        return f"input.limit = {new.job['input']['limit']}"
    gone = [one.before.path for one in fewer if one.after is None and one.before is not None]
    shrunk = [one.after.path for one in fewer if one.after is not None]
    reasons = [f"{len(gone)} input files are gone, such as {gone[0]}"] if gone else []
    if old.job["input"].get("where") != new.job["input"].get("where"):
        reasons.append("input.where has changed")
    elif shrunk:
        more = f" and {len(shrunk) - 1} more files" if len(shrunk) > 1 else ""
        reasons.append(f"fewer rows in {shrunk[0]}{more}")
    return ", ".join(reasons)
