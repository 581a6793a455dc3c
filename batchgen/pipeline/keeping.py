"""Published files that the next snapshot shares with the last: chosen when a plan is made.

A file is kept if all its rows are in the plan, one after the other, and would be taken over as they
are. Nobody reads it then, and nobody writes its rows again.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from batchgen.pipeline.rows import Takeover, takeovers
from batchgen.store.books import Manifest, Places, Plan, PublishedFile
from batchgen.store.result_files import published_schema, schema_digest
from batchgen.store.snapshot import target_bytes
from batchgen.store.visible import damage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from batchgen.pipeline.prepare import Prepared
    from batchgen.store.ledger import Ledger
    from batchgen.store.matching import Span

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
