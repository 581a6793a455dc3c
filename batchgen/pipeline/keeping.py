"""What the next snapshot has of the last: files that both share, and rows that only the last has.

Both are known when a plan is made, before a run computes any row. Rows that leave are told from
the books and from digests of rows; input is read only where it has no digests, or where
`input.where` has to say which rows it keeps.

A file is kept if all its rows are in the plan, one after the other, and would be taken over as they
are. Nobody reads it then, and nobody writes its rows again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from batchgen.core.errors import OutputError
from batchgen.core.records import NO_ROWS, Ranges, RowSet
from batchgen.pipeline.rows import Takeover, takeovers
from batchgen.store.books import Manifest, Places, Plan, PublishedFile, Segment
from batchgen.store.matching import Span, count_common, match_files, pairs
from batchgen.store.published import PublishedRows
from batchgen.store.result_files import published_schema, schema_digest
from batchgen.store.snapshot import target_bytes
from batchgen.store.visible import damage

if TYPE_CHECKING:
    from batchgen.pipeline.prepare import Prepared
    from batchgen.storage import LocalStorage
    from batchgen.store.ledger import Ledger


_SMALL = 1 / 3
"""A file of less than so much of its wanted size is small."""


class _Run(NamedTuple):
    """Rows that follow each other in both plans, by position; over ends of files, too."""

    old: int
    new: int
    length: int


class _Found(NamedTuple):
    """A file that may be kept."""

    start: int
    """Position in the new plan."""
    number: int
    """In the base's manifest."""
    file: PublishedFile

    @property
    def stop(self) -> int:
        return self.start + self.file.num_done


def with_kept(ledger: Ledger, prepared: Prepared, plan: Plan) -> Plan:
    """Return a plan that says which files of its base's snapshot it keeps.

    Args:
        ledger: The job's books.
        prepared: The job, with the plan's columns.
        plan: Not put yet.

    Raises:
        StorageError: A file cannot be looked at right now.
    """
    plan = replace(plan, kept=(), kept_of=0)
    schema = schema_digest(published_schema(prepared.part_schema))
    manifests = (ledger.manifest(base.plan) for base in plan.bases)
    if not any(one is not None and one.is_tiled and one.schema == schema for one in manifests):
        return plan
    for source in takeovers(ledger, prepared, plan, plan.rows, lambda _: None):
        manifest = source.manifest
        if manifest is not None and manifest.is_tiled and manifest.schema == schema:
            damaged = damage(ledger.storage, manifest.files)
            found = [
                one for one in _keepable(source, manifest, plan) if one.file.name not in damaged
            ]
            rows_per_file = prepared.job.output.rows_per_file
            kept = _without_small(sorted(found), plan.num_rows, manifest, rows_per_file)
            return replace(plan, kept=tuple(_joined(kept)), kept_of=manifest.number)
    return plan


def leave_damaged(ledger: Ledger, plan: Plan) -> list[tuple[str, str]]:
    """Keep no file any more that is not what was published; return which, and how they differ.

    Raises:
        StorageError: A file cannot be looked at right now.
    """
    kept = {one.file.name for one in ledger.durable(plan).kept}
    manifest = ledger.manifest(plan.kept_of) if kept else None
    if manifest is None:
        return []
    damaged = damage(ledger.storage, manifest.files)
    found = [(name, why) for name, why in damaged.items() if name in kept]
    for name, why in found:
        ledger.reject(name, why, plan.number)
    return found


def _keepable(source: Takeover, manifest: Manifest, plan: Plan) -> Iterator[_Found]:
    """Yield files whose rows are all taken over and follow each other."""
    old, places = Places(source.old), Places(plan)
    runs = _runs(source.spans, old, places)
    # Errors of rows that became no request tell file and line.
    still = _runs((span for span in source.spans if _is_still(span, source.old, plan)), old, places)
    start = 0
    for number, file in enumerate(manifest.files):
        known = runs if not file.num_errors else still if plan.takes_errors else []
        position = _position(known, start, file.num_done)
        if position is not None and file.num_done:
            yield _Found(position, number, file)
        start += file.num_done


def _is_still(span: Span, old: Plan, new: Plan) -> bool:
    was, now = old.segments[span.old_segment], new.segments[span.segment]
    return span.old_start == span.start and was.path == now.path


def _runs(spans: Iterable[Span], old: Places, new: Places) -> list[_Run]:
    moved = sorted(
        _Run(
            old.starts[span.old_segment] + span.old_start,
            new.starts[span.segment] + span.start,
            span.length,
        )
        for span in spans
    )
    found: list[_Run] = []
    for run in moved:
        last = found[-1] if found else None
        if last and (run.old, run.new) == (last.old + last.length, last.new + last.length):
            found[-1] = last._replace(length=last.length + run.length)
        else:
            found.append(run)
    return found


def _position(runs: Sequence[_Run], start: int, num_rows: int) -> int | None:
    """Where rows of the old plan are in the new one, if they follow each other there."""
    at = bisect_right(runs, start, key=lambda run: run.old) - 1
    if at < 0 or start + num_rows > runs[at].old + runs[at].length:
        return None
    return runs[at].new + start - runs[at].old


def _without_small(
    found: Sequence[_Found], num_rows: int, manifest: Manifest, rows_per_file: int
) -> list[_Found]:
    """Leave out small files beside a gap, one on each side: they are written together with it."""
    target = target_bytes(sum(file.size_bytes for file in manifest.files))
    starts = [*(one.start for one in found[1:]), num_rows]
    stops = [0, *(one.stop for one in found)]
    kept = []
    for one, stop_before, start_after in zip(found, stops, starts, strict=False):
        is_large = one.file.size_bytes >= _SMALL * target
        is_full = one.file.num_rows >= _SMALL * rows_per_file
        if is_large or is_full or (stop_before == one.start and one.stop == start_after):
            kept.append(one)
    return kept


def _joined(kept: Sequence[_Found]) -> Iterator[tuple[int, int, int]]:
    """Yield runs of consecutive files, see `Plan.kept`."""
    first = 0
    for at, one in enumerate(kept, 1):
        after = kept[at] if at < len(kept) else None
        if after is None or (after.number, after.start) != (one.number + 1, one.stop):
            yield kept[first].number, one.number + 1, kept[first].start
            first = at


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


_SELECTING = ("where", "delimiter", "encoding")


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
                kept = kept_rows(prepared, number, after, fresh)
                lost, fresh = lost - kept, kept - lost
                yield _FileChange(before, after, lost, fresh, -len(lost) or len(fresh))
                continue
            runs = list(match_files(storage, before, after)) if is_alike else []
            lost -= Ranges((was, was + num) for _, was, num in runs)
            fresh -= Ranges((at, at + num) for at, _, num in runs)
        num_more = len(kept_rows(prepared, number, after, fresh)) - len(lost)
        yield _FileChange(before, after, lost, fresh, num_more)
    for other in set(range(len(old.segments))) - set(found.values()):
        lost = published[other]
        yield _FileChange(old.segments[other], None, lost, NO_ROWS, -len(lost))


def kept_rows(prepared: Prepared, number: int, segment: Segment, rows: Ranges) -> Ranges:
    """Find rows of a file that `input.where` keeps; reads them where there is such a filter."""
    if prepared.job.input.where is None or not rows:
        return rows
    spec = replace(prepared.spec(), carried=(), needed=frozenset())
    batches = prepared.reader.read(segment.path, number, rows, spec)
    return Ranges(span for batch in batches for span in Ranges.of(batch.rows).spans)


def _published_rows(storage: LocalStorage, manifest: Manifest, old: Plan) -> RowSet:
    """Map each segment to its rows in the snapshot: not blank, not left out by `where`."""
    if not manifest.num_skipped:
        return old.rows
    try:
        with PublishedRows(storage, manifest, old) as snapshot:
            return old.rows - snapshot.skipped(old.rows)
    except OutputError:  # Told where rows are taken over.
        return old.rows


def _why_rows_leave(old: Plan, new: Plan, fewer: Sequence[_FileChange]) -> str:
    if new.is_cut:
        return f"input.limit = {new.job['input']['limit']}"
    gone = [one.before.path for one in fewer if one.after is None and one.before is not None]
    shrunk = [one.after.path for one in fewer if one.after is not None]
    reasons = [f"the input file {gone[0]} is gone"] if len(gone) == 1 else []
    if len(gone) > 1:
        reasons = [f"{len(gone)} input files are gone, such as {gone[0]}"]
    if old.job["input"].get("where") != new.job["input"].get("where"):
        reasons.append("input.where has changed")
    elif shrunk:
        more = f" and {len(shrunk) - 1} more files" if len(shrunk) > 1 else ""
        reasons.append(f"fewer rows in {shrunk[0]}{more}")
    return ", ".join(reasons)
