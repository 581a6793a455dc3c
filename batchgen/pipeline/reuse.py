"""Rows that earlier plans have answered, made this plan's own."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pyarrow as pa

from batchgen.core.errors import BatchgenError, OutputError, StorageError
from batchgen.core.ranges import Ranges
from batchgen.pipeline.committer import Committer
from batchgen.store.books import NO_ROWS, Durable
from batchgen.store.matching import answered_by, is_same_reading, match, restricted
from batchgen.store.result_files import Index
from batchgen.store.reuse import (
    Renumbering,
    Source,
    Wanted,
    from_parts,
    from_snapshot,
    gathered,
    published_sources,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from batchgen.pipeline.committer import Commits
    from batchgen.pipeline.context import RunContext
    from batchgen.pipeline.prepare import Prepared
    from batchgen.store.books import Base, Plan
    from batchgen.store.ledger import Ledger
    from batchgen.store.matching import Span
    from batchgen.store.reuse import Piece


_WAIT_S = 0.2
# Several pieces are in memory at once, and as tables they are larger than as files.
_PIECE_MIB = 8


def missing(plan: Plan, durable: Durable) -> dict[int, Ranges]:
    """Segment -> rows that no accepted part accounts for; segments with none left out."""
    todo = {
        number: Ranges.until(segment.num_rows) - durable.done(number)
        for number, segment in enumerate(plan.segments)
    }
    return {number: rows for number, rows in todo.items() if rows}


def without(rows: Mapping[int, Ranges], others: Mapping[int, Ranges]) -> dict[int, Ranges]:
    """Segment -> those of `rows` that are not in `others`; segments with none left out."""
    left = {segment: found - others.get(segment, NO_ROWS) for segment, found in rows.items()}
    return {segment: found for segment, found in left.items() if found}


class Takeover:
    """What a plan takes from one of its bases."""

    def __init__(
        self,
        context: RunContext,
        prepared: Prepared,
        plan: Plan,
        base: Base,
        todo: Mapping[int, Ranges],
    ) -> None:
        """Find the rows of `todo` that the base has ended, without reading the input."""
        self._context = context
        self._base = base
        ledger = context.ledger
        self._old = ledger.plan(base.plan)
        self._manifest = ledger.manifest(base.plan)
        self._durable = Durable()
        spans: list[Span] = []
        if is_same_reading(self._old, plan) and self._has_index():
            spans = restricted(match(ledger.storage, self._old, plan), todo)
            if self._manifest is None:
                self._durable = self._parts()
                spans = answered_by(spans, self._durable)
        found: dict[int, list[tuple[int, int]]] = {}
        for span in spans:
            found.setdefault(span.segment, []).append((span.start, span.start + span.length))
        self.rows = {segment: Ranges(those) for segment, those in found.items()}
        """Segment -> rows that the base has ended. Errors among them may not be wanted."""
        self._wanted = Wanted(
            prepared.part_schema,
            context.job.output.prefix,
            Renumbering(spans, self._old, plan),
            plan.takes_errors,
            context.notes.add,
        )

    def _has_index(self) -> bool:
        """Whether rows of the base can be told apart; if not, their requests still can."""
        if self._manifest is None:
            return True
        try:
            Index(self._context.storage, self._manifest).close()
        except StorageError:
            raise
        except OutputError as error:
            self._context.notes.add(f"{error}; every row is read again, answers are found by key")
            return False
        return True

    def _parts(self) -> Durable:
        durable = self._context.ledger.parts(self._old, self._base.parts)
        for name, why in durable.rejected.items():
            self._context.notes.add(f"{name} cannot be taken over ({why}); its rows are done again")
        return durable

    def pieces(self) -> Iterator[Piece]:
        """Yield the rows, each piece as large as a part may be.

        Raises:
            OutputError: The base is damaged beyond telling rows apart.
            StorageError: It cannot be read right now.
        """
        if not self.rows:
            return iter(())
        storage, run = self._context.storage, self._context.job.run
        if self._manifest is not None:
            num_rows = [segment.num_rows for segment in self._old.segments]
            pieces = from_snapshot(storage, self._manifest, num_rows, self._wanted)
        else:
            pieces = from_parts(storage, self._durable.parts, self._wanted)
        return gathered(pieces, run.flush_rows, min(run.flush_mib, _PIECE_MIB) * 2**20)


def takeovers(
    context: RunContext, prepared: Prepared, plan: Plan, todo: Mapping[int, Ranges]
) -> list[Takeover]:
    """What a plan takes from each of its bases: a row from the newest that has it."""
    found: list[Takeover] = []
    for base in plan.bases:
        source = Takeover(context, prepared, plan, base, todo)
        todo = without(todo, source.rows)
        if source.rows:
            found.append(source)
    return found


def base_sources(ledger: Ledger, plan: Plan) -> list[Source]:
    """Files with answers for requests like theirs, of the plans that a plan is based on."""
    takes_errors = plan.takes_errors
    found: list[Source] = []
    for base in plan.bases:
        manifest = ledger.manifest(base.plan)
        if manifest is None:
            found += [Source(name, takes_errors) for name in base.parts]
        else:
            found += published_sources(ledger.storage, manifest, takes_errors=takes_errors)
    return found


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
