"""From a plan to its last row, and the only place where its ways meet.

A row that no earlier run of the plan has ended ends in one of three ways, tried in this order:

    taken over   it stands in an earlier plan, unchanged       carry_over: is not even read
    copied       its request has an answer in another row      copies: reads and renders
    computed     its request is new                            the runner: reads, renders, asks

What cannot be taken over or copied after all (damage, a rule that reads the row's own columns) is
computed in the end. The engine starts as soon as one row is known to need it, and not before.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from batchgen.cluster.by_fleet import FleetWork
from batchgen.cluster.fleet import Fleet
from batchgen.core.errors import AccountingError
from batchgen.engine.lazy import LazyEngine
from batchgen.pipeline.commits import Commits
from batchgen.pipeline.copies import answer_fields, copies
from batchgen.pipeline.frozen import read_rows
from batchgen.pipeline.progress import Progress
from batchgen.pipeline.reuse import (
    Takeover,
    base_sources,
    commit_all,
    missing,
    takeovers,
    without,
)
from batchgen.pipeline.watch import RUNNING, Sight, Watch
from batchgen.pipeline.worker import Worker
from batchgen.store.answered import AnsweredKeys, Source, key_prefixes
from batchgen.store.known import KnownKeys, Sieve
from batchgen.store.tally import ATTEMPTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from batchgen.core.ranges import Ranges
    from batchgen.core.records import RowBatch
    from batchgen.pipeline.context import RunContext
    from batchgen.pipeline.prepare import Prepared
    from batchgen.pipeline.stages import Feeder, OpenPart
    from batchgen.store.books import Base, Durable, Epoch, Manifest


class Computation:
    """Ends every row that is left of a plan. Use once: `Computation(...).run()`."""

    def __init__(self, context: RunContext, prepared: Prepared, epoch: Epoch) -> None:
        """Bind; nothing is done yet."""
        self._context = context
        self._prepared = prepared
        self._plan = epoch.plan
        self._epoch = epoch
        self._worker = Worker(
            prepared,
            epoch.plan,
            context.ledger,
            epoch=epoch.number,
            number=0,
            run_id=context.run_id,
        )
        self._commits = Commits(context, epoch, self._worker)
        self._is_taken_over = threading.Event()
        self._left: Mapping[int, Ranges] = {}

    def run(self) -> bool:
        """Work until nothing is left or somebody stops it; return whether nothing is left.

        Raises:
            BatchgenError: Job trouble. What finished before it is committed, if it can be.
        """
        context, plan, durable = self._context, self._plan, self._epoch.durable
        todo = missing(plan, durable)
        if not todo or context.is_stopped():
            return not todo
        if not plan.takes_errors and not durable.num_done and self._has_errors_to_try():
            context.engine.start()
        sources = takeovers(context, self._prepared, plan, todo)
        context.taken.known_at_s = time.monotonic()
        first = todo
        for source in sources:
            first = without(first, source.rows)
        if sources and not self._all_share():
            # Which answers the rows that are taken over have used up must be known first.
            self._take_over(sources, first, None)
            durable, sources = context.ledger.durable(plan), []
        sieve = self._sieve(durable)
        if isinstance(context.engine, Fleet):
            self._take_over(sources, first, None)
            if context.is_stopped() or not self._by_fleet(self._missing(), sieve):
                return False
            return self._finish(has_copies=sieve.num_set_aside > 0)
        with self._feeding(self._in_turn(first), sieve) as feeder:
            self._take_over(sources, first, feeder)
            if context.is_stopped() or not self._work(feeder):
                return False
        has_copies = sieve.num_set_aside > 0
        del sieve, feeder  # And the keys that they know, 8 bytes a row.
        return self._finish(has_copies=has_copies)

    def _has_errors_to_try(self) -> bool:
        """Whether a base has errors that an engine had a part in: most will be here again."""
        ledger = self._context.ledger

        def ended(base: Base) -> Manifest | Durable:
            manifest = ledger.manifest(base.plan)
            return manifest or ledger.parts(ledger.plan(base.plan), base.parts)

        # Rows of no attempt never reached the engine: they are not JSON, or lack a column.
        return any(
            one.num_errors > one.tally.get(ATTEMPTS, {}).get("0", 0)
            for one in map(ended, self._plan.bases)
        )

    def _all_share(self) -> bool:
        """Whether equal requests have one answer, whoever asks."""
        sampling, dedupe = self._context.job.sampling, self._context.job.run.dedupe
        if dedupe == "auto":
            return sampling.temperature == 0 and sampling.column is None
        return dedupe == "always"

    def _finish(self, *, has_copies: bool) -> bool:
        """End the rows that were set aside, and those that could not be copied after all."""
        todo = self._missing()
        if todo and has_copies:
            self._copy(todo)
            if self._context.is_stopped():
                return False
            todo = self._missing()
        if todo and has_copies and isinstance(self._context.engine, Fleet):
            # They waited for rows whose worker died: of each kind one is to be computed still.
            sieve = self._sieve(self._context.ledger.durable(self._plan))
            if not self._by_fleet(todo, sieve):
                return False
            self._copy(self._missing())
            todo = self._missing()
        if todo:
            if self._context.is_stopped() or not self._compute(todo):
                return False
            todo = self._missing()
        if todo:
            msg = f"{sum(map(len, todo.values()))} rows have not ended; not published"
            raise AccountingError(msg)
        return True

    def _compute(self, todo: Mapping[int, Ranges]) -> bool:
        if isinstance(self._context.engine, Fleet):
            return self._by_fleet(todo, None)
        with self._feeding(self._read(todo), None) as feeder:
            return self._work(feeder)

    def _by_fleet(self, todo: Mapping[int, Ranges], sieve: Sieve | None) -> bool:
        context = self._context
        assert isinstance(context.engine, Fleet)  # noqa: S101 - asked by whoever calls
        if sieve is not None and not self._plan.bases and not self._may_share():
            sieve = None  # Nothing is ever set aside: nobody needs to ask.
        work = FleetWork(
            context, context.engine, self._prepared, self._epoch, self._worker, self._commits
        )
        return not todo or work.answer(todo, sieve)

    def _missing(self) -> dict[int, Ranges]:
        self._context.ledger.check_fence(self._epoch)
        return missing(self._plan, self._context.ledger.durable(self._plan))

    def _read(self, rows: Mapping[int, Ranges]) -> Iterator[RowBatch]:
        prepared = self._prepared
        return read_rows(self._plan, rows, prepared.reader, prepared.spec())

    def _in_turn(self, first: Mapping[int, Ranges]) -> Iterator[RowBatch]:
        """Yield the rows that nobody has for us; then, once it is known, what was not taken over.

        In the feeder's thread: so the engine has work while rows are being taken over.
        """
        yield from self._read(first)
        self._is_taken_over.wait()
        yield from self._read(self._left)

    @contextmanager
    def _feeding(self, batches: Iterator[RowBatch], sieve: Sieve | None) -> Iterator[Feeder]:
        feds = self._worker.feds(batches, sieve.passing if sieve else None)
        context = self._context
        feeder = self._worker.feeder(feds, context.engine, long_first=not context.is_trial)
        try:
            yield feeder
        finally:
            self._is_taken_over.set()  # Nobody must wait in there.
            feeder.close()

    def _take_over(
        self, sources: Sequence[Takeover], first: Mapping[int, Ranges], feeder: Feeder | None
    ) -> None:
        """Make rows of earlier plans this plan's own, and let the feeder go on with the others."""
        context = self._context

        def look() -> None:
            if feeder is not None and feeder.has_requests():
                context.engine.start()

        for source in sources:
            context.log.live({"state": "taking over rows", "num_rows": self._plan.num_rows})
            commit_all(context, self._commits, source.pieces(), look)
            if context.is_stopped():
                return
        if sources:
            self._left = without(self._missing(), first)
        self._is_taken_over.set()

    def _sieve(self, durable: Durable) -> Sieve:
        """What tells the rows that need no engine."""
        base, own = base_sources(self._context.ledger, self._plan), self._own_sources(durable)
        if not base and not self._may_share():
            own = []  # Then nothing is ever set aside.
        return Sieve(self._keys(base), self._keys(own), self._context.job.run.dedupe)

    def _may_share(self) -> bool:
        return self._all_share() or (
            self._context.job.run.dedupe == "auto" and self._context.job.sampling.column is not None
        )

    def _keys(self, sources: Sequence[Source]) -> KnownKeys:
        known, context = KnownKeys(), self._context
        prefix, tell = context.job.output.prefix, context.notes.add
        for prefixes in key_prefixes(context.storage, sources, prefix, tell):
            known.load(prefixes)
        return known

    def _own_sources(self, durable: Durable) -> list[Source]:
        return [Source(part.name, takes_errors=True) for part in durable.parts]

    def _answered(self, sources: Sequence[Source]) -> AnsweredKeys:
        prefix = self._context.job.output.prefix
        fields = answer_fields(self._prepared)
        return AnsweredKeys(self._context.storage, sources, fields, prefix, self._context.notes.add)

    def _copy(self, todo: Mapping[int, Ranges]) -> None:
        """Give rows that were set aside the answers that they waited for."""
        context = self._context
        context.log.live({"state": "copying answers", "num_rows": self._plan.num_rows})
        # The base first: a row with a draw of its own may have been set aside for the base's alone.
        durable = context.ledger.durable(self._plan)
        base = base_sources(context.ledger, self._plan)
        answered = self._answered([*base, *self._own_sources(durable)])
        before = context.taken.num_rows
        pieces = copies(self._read(todo), self._worker.builder(), answered, self._prepared)
        commit_all(context, self._commits, pieces, lambda: None)
        context.taken.num_copied += context.taken.num_rows - before

    def _work(self, feeder: Feeder) -> bool:
        """Let the engine answer what the feeder brings."""
        context = self._context
        engine, run = context.engine, context.job.run
        assert isinstance(engine, LazyEngine)  # noqa: S101 - not a fleet

        def commit(part: OpenPart) -> None:  # In the committer's thread.
            self._commits.computed(part, engine.facts)

        def look(now_s: float) -> Sight:
            sample = context.stats.sample(now_s, runner.num_in_flight, engine.stats)
            if engine.facts is not None:
                return Sight(sample, RUNNING)
            return Sight(sample, "starting the engine" if engine.is_started else "reading rows")

        tell = context.tell_disk_trouble
        runner = self._worker.runner(engine, feeder, context.stats, commit, tell)
        with Progress(context.stats.num_rows, context.stats.num_resumed) as progress:
            context.notes.show_by(progress.note)
            watch = Watch(look, context.stats, context.log, progress, run.stats_s)
            try:
                return runner.run(context.stop, watch.tick)
            finally:
                watch.show(time.monotonic(), is_last=True)
                context.notes.show = None
