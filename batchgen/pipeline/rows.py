"""From a plan to its last row, and the only place where its ways meet.

A row that no earlier run of the plan has ended ends in one of three ways, tried in this order:

    taken over   it stands in an earlier plan, unchanged       Takeover: is not even read
    copied       its request has an answer in another row      copies:   reads and renders
    computed     its request is new                            Compute:  reads, renders, asks

What cannot be taken over or copied after all (damage, a rule that reads the row's own columns) is
computed in the end. The engine starts as soon as one row is known to need it, and not before.
"""

from __future__ import annotations

import itertools
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.answers.validate import refusal
from batchgen.core.data import gather_rows
from batchgen.core.errors import AccountingError, BatchgenError, OutputError
from batchgen.core.expressions import RowTest, parse_row_test
from batchgen.core.records import Ordinal, Request, RowBatch, RowSet
from batchgen.pipeline.compute import Commits, Stages, Work
from batchgen.pipeline.rendering import changes_since, old_rows
from batchgen.pipeline.runner import Committer
from batchgen.pipeline.sources import answered_keys, base_sources, ended_rows, tried_sources
from batchgen.store.books import Base, Durable, Epoch, Plan, Segment
from batchgen.store.matching import (
    Renumbering,
    answered_by,
    has_digests,
    is_same_reading,
    match,
    restricted,
)
from batchgen.store.published import PublishedRows
from batchgen.store.result_files import ROW, SEGMENT, rows_of
from batchgen.store.reuse import (
    AnsweredKeys,
    Deduper,
    Piece,
    Source,
    Wanted,
    from_parts,
    from_snapshot,
    gathered,
)
from batchgen.store.visible import damage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from batchgen.pipeline.compute import Compute, Rows
    from batchgen.pipeline.context import RunContext
    from batchgen.pipeline.prepare import Prepared
    from batchgen.prompt.requests import RequestBuilder
    from batchgen.storage import LocalStorage
    from batchgen.store.keys import KeySet
    from batchgen.store.ledger import Ledger
    from batchgen.store.matching import Span


_WAIT_S = 0.2
# Several pieces are in memory at once, and as tables they are larger than as files.
_PIECE_MIB = 8


def missing(plan: Plan, durable: Durable) -> RowSet:
    """Map each segment to its rows that no accepted part accounts for, if there are any."""
    return plan.rows - durable.rows


def rejected_notes(durable: Durable) -> list[str]:
    """Say which parts of the plan do not count, a line each."""
    return [
        f"{name} does not count ({why}); its rows are done again"
        for name, why in durable.rejected.items()
    ]


@dataclass(eq=False)
class Takeover:
    """Rows that a plan takes from one of its bases."""

    ledger: Ledger
    """The job's books."""
    prepared: Prepared
    """The job."""
    plan: Plan
    """The plan that takes, which need not be put yet."""
    base: Base
    """The plan that it takes from."""
    tell: Callable[[str], None]
    """Hears of damage."""

    def __post_init__(self) -> None:
        self.old = self.ledger.plan(self.base.plan)
        """The base's plan."""
        self.manifest = self.ledger.manifest(self.base.plan)
        """Its snapshot; None while it is unpublished."""
        self._durable = Durable()
        is_same, storage = is_same_reading(self.old, self.plan), self.ledger.storage
        self.matched: Sequence[Span] = match(storage, self.old, self.plan) if is_same else []
        """Rows that both plans have, answered or not."""
        spans = self.matched
        if is_same and self.manifest is None:
            self._durable = self._parts()
            spans = answered_by(spans, self._durable)
        elif is_same and not self._tells_rows():
            spans = []
        self._take(spans)

    def _take(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        """Rows that are taken, and where they were."""
        self.rows = new_rows(spans)
        """Segment -> rows that the base has ended. Errors among them may not be wanted."""

    def restrict(self, todo: RowSet) -> None:
        """Take only rows of `todo`."""
        self._take(restricted(self.spans, todo))

    def _tells_rows(self) -> bool:
        """Tell whether rows of the base can be told apart; if not, their requests still can."""
        assert self.manifest is not None  # noqa: S101 - asked only of published plans
        try:
            with PublishedRows(self.ledger.storage, self.manifest, self.old):
                return True
        except OutputError as error:
            self.tell(f"{error}; every row is read again, answers are found by key")
            return False

    def _parts(self) -> Durable:
        durable = self.ledger.parts(self.old, self.base.parts)
        for name, why in durable.rejected.items():
            self.tell(f"{name} cannot be taken over ({why}); its rows are done again")
        return durable

    def pieces(self) -> Iterator[Piece]:
        """Yield the rows, each piece as large as a part may be.

        Raises:
            OutputError: The base is damaged beyond telling rows apart.
            StorageError: It cannot be read right now.
        """
        if not self.rows:
            return iter(())
        storage, run = self.ledger.storage, self.prepared.job.run
        wanted = Wanted(
            self.prepared.part_schema,
            self.prepared.job.output.prefix,
            Renumbering(self.spans, self.old, self.plan),
            self.plan.takes_errors,
            self.tell,
            frozenset(self.prepared.carried),
        )
        if self.manifest is not None:
            pieces = from_snapshot(storage, self.manifest, self.old, wanted)
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
            moves = Renumbering(self.spans, self.old, self.plan)
            errors = () if self.plan.takes_errors else self._errors()
            for unwanted in itertools.chain(errors, self._damaged()):
                left -= moves.ranges(unwanted)
        return left

    def _damaged(self) -> Iterator[RowSet]:
        """Yield the rows of a snapshot's row groups that are not what was published."""
        storage, manifest = self.ledger.storage, self.manifest
        if manifest is None or not (names := damage(storage, manifest.files)):
            return
        paths = {storage.path(name) for name in names}
        with PublishedRows(storage, manifest, self.old) as snapshot:
            for one in snapshot.files(self.rows):
                if one.file.path in paths:
                    yield from one.damaged()

    def _errors(self) -> Iterator[RowSet]:
        """Yield the base's rows that are errors, piece by piece."""
        for table in self._answers("status"):
            yield rows_of(table.filter(pc.equal(table.column(2), "error")))

    def _answers(self, *names: str) -> Iterator[pa.Table]:
        """Yield the base's rows: ordinals, and columns of batchgen's, piece by piece."""
        columns = [f"{self.old.prefix}{name}" for name in names]
        published = self.manifest, self.old
        return ended_rows(self.ledger.storage, self._durable, published, columns)

    def old_rows(self, on_batch: Callable[[], object] = int) -> RowSet:
        """Map each segment to those of `rows` that were made by another rendering than today's.

        Reads and renders them, where the job's prompts may differ at all.

        Args:
            on_batch: Called now and then; what it raises ends the work.

        Raises:
            SourceError: They cannot be read.
            StorageError: Their keys cannot be read right now.
        """
        if not self.rows or not changes_since(self.old.rendering, self.prepared):
            return RowSet()
        moves, prefix = Renumbering(self.spans, self.old, self.plan), self.old.prefix
        tables = (
            moves.table(table, prefix, takes_errors=True).drop([f"{prefix}status"])
            for table in self._answers("status", "request_key", "recipe")
        )
        return old_rows(self.prepared, self.plan, self.rows, tables, on_batch)

    def leave_old_rows(self) -> None:
        """Take none of a rendering that is older than the plan's, unless the prompt is the same."""
        if self.old.rendering < self.plan.rendering:
            self.restrict(self.rows - self.old_rows())


def new_rows(spans: Iterable[Span]) -> RowSet:
    """Map each segment of the later plan to its rows that spans name."""
    return RowSet.of_spans((span.segment, span.start, span.start + span.length) for span in spans)


def unread_rows(storage: LocalStorage, plan: Plan, source: Takeover, fresh: RowSet) -> RowSet:
    """Pick of rows that were not found in a base those that may be in it all the same.

    They are of files that changed and whose rows have no digests: only their requests tell them.
    """
    numbers = {segment.path: number for number, segment in enumerate(plan.segments)}
    is_same = is_same_reading(source.old, plan)

    def is_told(before: Segment, after: Segment) -> bool:
        return before.digest == after.digest or has_digests(storage, before, after)

    return RowSet(
        (number, fresh[number])
        for before in source.old.segments
        if (number := numbers.get(before.path)) is not None
        and not (is_same and is_told(before, plan.segments[number]))
    )


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
        source.leave_old_rows()
        todo -= source.rows
        found.append(source)
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


class Computation:
    """Ends every row that is left of a plan. Use once: `Computation(...).run()`."""

    def __init__(
        self, context: RunContext, compute: Compute, prepared: Prepared, epoch: Epoch
    ) -> None:
        """Bind; nothing is done yet."""
        self._context = context
        self._compute = compute
        self._prepared = prepared
        self._plan = epoch.plan
        self._epoch = epoch
        stages = Stages(
            prepared,
            epoch.plan,
            context.ledger,
            epoch=epoch.number,
            worker=0,
            run_id=context.run_id,
        )
        self._stages = stages
        self._commits = Commits(context, epoch, stages.writer)
        self._work = Work(prepared, epoch, stages, self._commits)

    def run(self) -> bool:
        """Work until nothing is left or somebody stops it; return whether nothing is left.

        Raises:
            BatchgenError: Job error. What finished before it is committed, if it can be.
        """
        context, plan, durable = self._context, self._plan, self._epoch.durable
        todo: Rows = missing(plan, durable)
        if todo and context.sample is not None:
            self._skip(todo - context.sample(self._prepared, plan))
            todo = self._missing()
        if not todo or context.is_stopped():
            return not todo
        found = takeovers(context.ledger, self._prepared, plan, todo, context.notes.add)
        sources = [source for source in found if source.rows]
        context.taken.known_at_s = time.monotonic()
        if sources and not self._all_share():
            # Which answers the rows that are taken over have used up must be known first.
            todo, sources = self._take_over(sources), []
            durable = context.ledger.durable(plan)
        for source in sources:
            todo -= source.rows
        deduper = self._deduper(durable) if todo else None
        take_over = partial(self._take_over, sources) if sources else None
        if not self._compute.answer(self._work, todo, deduper, take_over):
            return False
        num_set_aside = deduper.num_set_aside if deduper is not None else 0
        num_taken_back = deduper.num_taken_back if deduper is not None else 0
        del deduper  # And the keys that it knows, 8 bytes a row.
        return self._finish(num_set_aside, num_taken_back)

    def _skip(self, rows: RowSet) -> None:
        """End rows without a result: a try-out does not ask them."""
        pieces = [Piece(self._prepared.part_schema.empty_table(), rows, "")]
        commit_all(self._context, self._commits, pieces, lambda: None)

    def _all_share(self) -> bool:
        """Whether equal requests have one answer, whoever asks."""
        sampling, dedupe = self._context.job.sampling, self._context.job.run.dedupe
        if dedupe == "auto":
            return sampling.temperature == 0 and sampling.column is None
        return dedupe == "always"

    def _finish(self, num_set_aside: int, num_taken_back: int) -> bool:
        """End the rows that were set aside, and those that could not be copied after all.

        Args:
            num_set_aside: Rows that wait for another row's answer.
            num_taken_back: Requests whose worker died, so that rows wait in vain, perhaps.
        """
        todo = self._missing()
        if todo and num_set_aside:
            todo = self._copy(todo)
        if todo and num_taken_back:
            # Of each kind one is to be computed still.
            again = self._deduper(self._context.ledger.durable(self._plan))
            if self._context.is_stopped() or not self._compute.answer(self._work, todo, again):
                return False
            todo = self._copy(self._missing())
        if todo:
            if self._context.is_stopped() or not self._compute.answer(self._work, todo, None):
                return False
            todo = self._missing()
        if todo:
            msg = f"{sum(map(len, todo.values()))} rows have not ended; not published"
            raise AccountingError(msg)
        return True

    def _missing(self) -> Rows:
        self._context.ledger.check_fence(self._epoch)
        return missing(self._plan, self._context.ledger.durable(self._plan))

    def _take_over(
        self, sources: Sequence[Takeover], on_piece: Callable[[], None] = lambda: None
    ) -> Rows:
        """Make rows of earlier plans this plan's own; return all that are left then."""
        context = self._context
        for source in sources:
            context.log.live({"state": "taking over rows", "num_rows": self._plan.num_rows})
            commit_all(context, self._commits, source.pieces(), on_piece)
            if context.is_stopped():
                break
        return self._missing()

    def _deduper(self, durable: Durable) -> Deduper | None:
        """What tells the rows that need no engine; None if there can be none."""
        base, own = self._base_sources(), self._own_sources(durable)
        if not base and not self._may_share():
            return None
        return Deduper(self._keys(base), self._keys(own), self._context.job.run.dedupe)

    def _may_share(self) -> bool:
        return self._all_share() or (
            self._context.job.run.dedupe == "auto" and self._context.job.sampling.column is not None
        )

    def _keys(self, sources: Sequence[Source]) -> KeySet:
        context = self._context
        prefix, tell = context.job.output.prefix, context.notes.add
        return answered_keys(context.storage, sources, prefix, tell)

    def _base_sources(self) -> list[Source]:
        """List what was answered before: in the plan's bases, and in try-outs of the recipe."""
        context = self._context
        tried = tried_sources(context.storage, context.tries, self._prepared)
        return [*base_sources(context.ledger, self._plan), *tried]

    def _own_sources(self, durable: Durable) -> list[Source]:
        own = [Source(part.name, takes_errors=True) for part in durable.parts]
        if not self._all_share():  # Else the base's answers are shared, kept or not.
            files = (one.file for one in durable.kept)
            own += [Source(file.name, takes_errors=True, chunks=file.chunks) for file in files]
        return own

    def _copy(self, todo: Rows) -> Rows:
        """Give rows that were set aside the answers that they waited for; return what is left."""
        context, prepared = self._context, self._prepared
        context.log.live({"state": "copying answers", "num_rows": self._plan.num_rows})
        # The base first: a row with a draw of its own may have been set aside for the base's alone.
        durable = context.ledger.durable(self._plan)
        answered = AnsweredKeys(
            context.storage,
            [*self._base_sources(), *self._own_sources(durable)],
            # All but ordinal and carried columns.
            list(prepared.part_schema)[2 + len(prepared.carried) :],
            context.job.output.prefix,
            context.notes.add,
        )
        before = context.taken.num_rows
        pieces = copies(self._stages.read(todo), self._stages.builder(), answered, prepared)
        commit_all(context, self._commits, pieces, lambda: None)
        context.taken.num_copied += context.taken.num_rows - before
        return self._missing()


# Rows looked up together: many, since each row group with an answer is read once for them; not
# too many, since all their answers are in memory at once.
_LOOK_UP_ROWS = 20_000
_LOOK_UP_BYTES = 32 * 2**20


class _Asked(NamedTuple):
    """What is kept of a row that looks for an answer: not its prompt, which may be long."""

    key: str
    ordinal: Ordinal
    carried: pa.RecordBatch
    at: int


def copies(
    batches: Iterable[RowBatch],
    builder: RequestBuilder,
    answered: AnsweredKeys,
    prepared: Prepared,
) -> Iterator[Piece]:
    """Yield the rows that have an answer already, as results in the part schema.

    Args:
        batches: Rows to look at.
        builder: Makes their keys.
        answered: The answers.
        prepared: The job.

    Raises:
        SourceError: The input cannot be read.
        StorageError: An answer cannot be read right now.
    """
    rules = _rules_over_input(prepared)
    held: list[_Asked] = []
    num_bytes = 0
    for batch in batches:
        held += [
            _Asked(request.request_key, request.ordinal, batch.carried, request.index)
            for request in builder.of(batch)
            if isinstance(request, Request)
        ]
        num_bytes += batch.carried.nbytes
        if len(held) >= _LOOK_UP_ROWS or num_bytes >= _LOOK_UP_BYTES:
            yield _copied(held, answered, prepared, rules)
            held, num_bytes = [], 0
    if held:
        yield _copied(held, answered, prepared, rules)


def _copied(
    asked: Sequence[_Asked],
    answered: AnsweredKeys,
    prepared: Prepared,
    rules: Sequence[RowTest],
) -> Piece:
    places, answers = answered.find([row.key for row in asked])
    found = [asked[at] for at in places]
    schema = prepared.part_schema
    if not found:
        return Piece(schema.empty_table(), RowSet(), "")
    rows = [(row.carried, row.at) for row in found]
    columns = [
        pa.array([row.ordinal.segment for row in found], schema.field(SEGMENT).type),
        pa.array([row.ordinal.row for row in found], schema.field(ROW).type),
        *(gather_rows(rows, prepared.carried) if prepared.carried else ()),
        *answers.columns,
    ]
    table = pa.Table.from_arrays(columns, schema=schema)
    prefix = prepared.job.output.prefix
    if rules:
        table = table.filter(_stands(table, rules, prefix))
    engines = pc.unique(table.column(f"{prefix}engine")).drop_null().to_pylist()
    return Piece(table, RowSet(), ", ".join(sorted(engines)))


def _rules_over_input(prepared: Prepared) -> list[RowTest]:
    """The rules that may judge another row's answer otherwise, since they read carried columns."""
    tests = [
        parse_row_test(f"rules[{at}]", text) for at, text in enumerate(prepared.job.checks.rules)
    ]
    return [test for test in tests if set(test.columns) & set(prepared.carried)]


def _stands(table: pa.Table, rules: Sequence[RowTest], prefix: str) -> pa.Array:
    """Rows for which the rules decide as they did for the row that was asked.

    The others, and all whose refusal may have another reason here, have to be asked themselves.
    """
    is_ok = pc.equal(table.column(f"{prefix}status"), "ok").combine_chunks()
    # A further attempt may have been made because of the asked row's own columns.
    stands = pc.less_equal(table.column(f"{prefix}attempts"), 1).combine_chunks()
    for rule in rules:
        arrays = [table.column(name).combine_chunks() for name in rule.columns]
        passed, _ = rule.keep(arrays, table.num_rows)
        refused = pc.equal(table.column(f"{prefix}error"), refusal(rule))
        refused = pc.fill_null(refused, False).combine_chunks()  # noqa: FBT003 - pyarrow's
        stands = pc.and_(stands, pc.or_(pc.invert(is_ok), passed))
        stands = pc.and_(stands, pc.or_(pc.invert(refused), pc.invert(passed)))
    return stands
