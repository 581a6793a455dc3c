"""Which rows a plan takes over from its bases, told from content and books; no row is parsed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from batchgen.core.errors import OutputError, StorageError
from batchgen.core.ranges import Ranges
from batchgen.pipeline.reuse import base_sources, without
from batchgen.store.books import NO_ROWS
from batchgen.store.dedupe import KnownKeys
from batchgen.store.matching import is_same_reading, match, restricted
from batchgen.store.parts import ROW, SEGMENT, rows_of
from batchgen.store.result_files import Index, ResultFile
from batchgen.store.reuse import Source, key_prefixes
from batchgen.store.row_digests import digest_reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import pyarrow as pa

    from batchgen.storage import LocalStorage
    from batchgen.store.books import Base, Plan
    from batchgen.store.ledger import Ledger
    from batchgen.store.matching import Span

    RowSets = Mapping[int, Ranges]
    """Segment -> rows."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """What is taken over, and what is left."""

    todo: RowSets
    """Rows that nobody has answered, as far as can be told without reading them."""
    num_taken: int
    num_edited: int
    """Left, in place of rows that the newest base had in that file."""
    num_unread: int
    """Left, of files that changed and whose rows can only be told apart by reading them: CSV,
    Parquet, or other columns than before."""
    num_again: int
    """Left, though the newest base had the same row: without an answer, or with an error."""
    num_new: int
    """Left, and neither."""


def count(rows: RowSets) -> int:
    """Rows of all segments."""
    return sum(len(found) for found in rows.values())


def take_over(ledger: Ledger, plan: Plan, todo: RowSets, digests: LocalStorage) -> Reuse:
    """Find what a plan takes over of `todo`.

    Args:
        ledger: The books, with the bases.
        plan: The plan, which need not be put yet.
        todo: Its rows that are not done.
        digests: Where the digests of rows are, of the bases' files and of the plan's.

    Raises:
        StorageError: Something cannot be read right now.
    """
    left = dict(todo)
    matched: list[Span] = []
    for at, base in enumerate(plan.bases):
        old = ledger.plan(base.plan)
        answered = _answered(ledger, base, old, takes_errors=plan.takes_errors)
        spans = match(digests, old, plan) if is_same_reading(old, plan) else []
        if not at:
            matched = restricted(spans, todo)
        left = without(left, moved(restricted(spans, left), answered))
    fresh = without(left, moved(matched, None))
    newest = ledger.plan(plan.bases[0].plan)
    unread, lost = _changed(newest, plan, matched, digests)
    num_unread = sum(len(fresh.get(number, NO_ROWS)) for number in unread)
    num_edited = sum(min(len(fresh.get(number, NO_ROWS)), num) for number, num in lost.items())
    num_left, num_fresh = count(left), count(fresh)
    return Reuse(
        todo=left,
        num_taken=count(todo) - num_left,
        num_edited=num_edited,
        num_unread=num_unread,
        num_again=num_left - num_fresh,
        num_new=num_fresh - num_edited - num_unread,
    )


def moved(spans: Iterable[Span], old_rows: RowSets | None) -> dict[int, Ranges]:
    """The new numbers of those old rows that spans name; None: of all that they name."""
    found: dict[int, list[tuple[int, int]]] = {}
    for span in spans:
        stop = span.old_start + span.length
        cuts: Iterable[tuple[int, int]] = [(span.old_start, stop)]
        if old_rows is not None:
            cuts = old_rows.get(span.old_segment, NO_ROWS).within(span.old_start, stop)
        shift = span.start - span.old_start
        found.setdefault(span.segment, []).extend((a + shift, b + shift) for a, b in cuts)
    return {segment: Ranges(those) for segment, those in found.items()}


def _changed(
    old: Plan, new: Plan, matched: Iterable[Span], digests: LocalStorage
) -> tuple[set[int], dict[int, int]]:
    """Files that both plans have: those to be read, and of the others how many rows were lost."""
    numbers = {segment.path: number for number, segment in enumerate(new.segments)}
    is_same = is_same_reading(old, new)
    unread: set[int] = set()
    lost: dict[int, int] = {}
    for before in old.segments:
        number = numbers.get(before.path)
        if number is None:
            continue
        is_told = before.digest == new.segments[number].digest or all(
            digest_reader(digests, segment.digest, segment.num_rows) is not None
            for segment in (before, new.segments[number])
        )
        if is_same and is_told:
            lost[number] = before.num_rows
        else:
            unread.add(number)
    for span in matched:
        number = numbers.get(old.segments[span.old_segment].path)
        if number in lost:
            lost[number] -= span.length
    return unread, lost


def _answered(ledger: Ledger, base: Base, old: Plan, *, takes_errors: bool) -> RowSets:
    """Rows of a base, under its numbers, that a later plan may take."""
    manifest = ledger.manifest(base.plan)
    rows: RowSets
    if manifest is not None:
        try:
            Index(ledger.storage, manifest).close()
        except StorageError:
            raise
        except OutputError:  # As in a run: rows are read, and their requests tell them.
            return {}
        rows = {at: Ranges.until(segment.num_rows) for at, segment in enumerate(old.segments)}
    else:
        durable = ledger.parts(old, base.parts)
        rows = {at: durable.done(at) for at in range(len(old.segments))}
    if takes_errors:
        return rows
    errors = _published_errors if manifest is not None else _part_errors
    for found in errors(ledger, base, old):
        rows = without(rows, found)
    return rows


def _published_errors(ledger: Ledger, base: Base, old: Plan) -> Iterator[RowSets]:
    manifest = ledger.manifest(base.plan)
    assert manifest is not None  # noqa: S101 - asked only of published ones
    index = Index(ledger.storage, manifest)
    number = 0
    for entry, chunks in zip(manifest.files, index.chunks, strict=True):
        with ResultFile(ledger.storage.path(entry.name)) as file:
            for group, statuses in file.groups([_status(old)]):
                ordinals = index.ordinals(number + group)
                yield rows_of(ordinals.filter(_is_error(statuses, old)))
        number += len(chunks) - 1
    index.close()


def _part_errors(ledger: Ledger, base: Base, old: Plan) -> Iterator[RowSets]:
    for part in ledger.parts(old, base.parts).parts:
        with ResultFile(ledger.storage.path(part.name)) as file:
            for _, table in file.groups([SEGMENT, ROW, _status(old)]):
                yield rows_of(table.filter(_is_error(table, old)))


def _status(plan: Plan) -> str:
    return f"{plan.prefix}status"


def _is_error(table: pa.Table, plan: Plan) -> pa.Array:
    return pc.equal(table.column(_status(plan)), "error")


def known_keys(
    ledger: Ledger, plan: Plan, own_parts: Sequence[str], tell: Callable[[str], None]
) -> KnownKeys | None:
    """Requests whose answer a run would copy.

    Args:
        ledger: The books.
        plan: The plan, which need not be put yet.
        own_parts: Its parts, if its rows may share answers.
        tell: Hears of damage.

    Returns:
        None if there are none.

    Raises:
        StorageError: A result cannot be read right now.
    """
    storage = ledger.storage
    sources = [Source(name, takes_errors=True) for name in own_parts]
    sources += base_sources(ledger, plan)
    if not sources:
        return None
    known = KnownKeys()
    for prefixes in key_prefixes(storage, sources, plan.prefix, tell):
        known.load(prefixes)
    return known
