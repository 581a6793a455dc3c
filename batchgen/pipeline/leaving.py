"""Published rows that the next snapshot will not have: counted before a run computes any.

Told from the books and from digests of rows; input is read only where it has no digests, or where
`input.where` has to say which rows it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from batchgen.core.errors import OutputError
from batchgen.core.records import NO_ROWS, Ranges, RowSet
from batchgen.store.matching import count_common, match_files, pairs
from batchgen.store.published import PublishedRows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from batchgen.pipeline.prepare import Prepared
    from batchgen.storage import LocalStorage
    from batchgen.store.books import Manifest, Plan, Segment
    from batchgen.store.ledger import Ledger


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
