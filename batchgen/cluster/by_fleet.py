"""A run's computation, left to a fleet."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from batchgen.answers.retries import final
from batchgen.cluster.answering import Task
from batchgen.core.records import Request, RowError
from batchgen.engine.base import failed
from batchgen.pipeline.frozen import input_changes, read_rows
from batchgen.pipeline.progress import Progress
from batchgen.pipeline.stages import OpenPart
from batchgen.pipeline.watch import Sight, Watch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchgen.cluster.fleet import Fleet
    from batchgen.cluster.roster import Member
    from batchgen.core.ranges import Ranges
    from batchgen.pipeline.commits import Commits
    from batchgen.pipeline.context import RunContext
    from batchgen.pipeline.prepare import Prepared
    from batchgen.pipeline.stages import Feeder
    from batchgen.pipeline.worker import Worker
    from batchgen.store.books import Epoch
    from batchgen.store.known import Sieve


class FleetWork:
    """What of a computation a fleet's driver does itself: its own reading, and telling."""

    def __init__(
        self,
        context: RunContext,
        fleet: Fleet,
        prepared: Prepared,
        epoch: Epoch,
        worker: Worker,
        commits: Commits,
    ) -> None:
        """Bind; `worker` and `commits` are the driver's own."""
        self._context = context
        self._fleet = fleet
        self._prepared = prepared
        self._epoch = epoch
        self._worker = worker
        self._commits = commits

    def answer(self, todo: Mapping[int, Ranges], sieve: Sieve | None) -> bool:
        """End these rows; return whether nobody stopped it.

        Raises:
            BatchgenError: Job trouble.
        """
        context, stats = self._context, self._context.stats
        task = Task(
            epoch=self._epoch,
            todo=todo,
            is_packed=self._is_packed(todo),
            by_prefix=context.job.run.order == "prefix",
            sieve=sieve,
            feed=lambda rows: self._feed(rows, sieve),
            is_input_still=self._is_input_still,
            end_guilty=self._end_guilty,
            on_commit=context.note_commit,
            on_death=self._note_death,
            on_disk_trouble=context.tell_disk_trouble,
            disk_grace_s=context.job.run.disk_grace_s,
            tell=context.notes.add,
        )
        with Progress(stats.num_rows, stats.num_resumed) as progress:
            context.notes.show_by(progress.note)
            run = context.job.run
            watch = Watch(self._look, stats, context.log, progress, run.stats_s)
            try:
                return self._fleet.answer(task, context.ledger, context.stop, watch.tick)
            finally:
                watch.show(time.monotonic(), is_last=True)
                context.notes.show = None

    def _look(self, now_s: float) -> Sight:
        board = self._fleet.board
        state = "running" if self._fleet.facts is not None else "starting the engines"
        return Sight(board.whole(now_s), state, board.rows(now_s))

    def _is_packed(self, todo: Mapping[int, Ranges]) -> bool:
        """Whether rows travel by way of the driver.

        For an order over the whole job; or where a worker would have to read a file from its
        start for each lease.
        """
        if self._context.job.run.order == "prefix":
            return True
        reader, segments = self._prepared.reader, self._epoch.plan.segments
        return not all(reader.is_seekable(segments[number].path) for number in todo)

    def _feed(self, rows: Mapping[int, Ranges], sieve: Sieve | None) -> Feeder:
        prepared = self._prepared
        batches = read_rows(self._epoch.plan, rows, prepared.reader, prepared.spec())
        feds = self._worker.feds(batches, sieve.passing if sieve is not None else None)
        return self._worker.feeder(feds, self._fleet)

    def _is_input_still(self) -> bool:
        return not input_changes(self._epoch.plan, self._prepared.reader)

    def _end_guilty(self, rows: Mapping[int, Ranges]) -> None:
        """Make errors of rows that were alone in workers that died, twice."""
        prepared, part = self._prepared, OpenPart(since_s=time.monotonic())
        text = "workers died with this row alone in them"
        for batch in read_rows(self._epoch.plan, rows, prepared.reader, prepared.spec()):
            for outcome in self._worker.builder().of(batch):
                if not isinstance(outcome, Request):
                    part.results.append(outcome)
                    continue
                completion = failed(outcome.request_id, RowError("engine_crash", text))
                (result,) = prepared.judge().judge([(outcome, completion)])
                part.results.append(final(outcome, result))
        self._commits.computed(part, self._fleet.facts)  # May be refused, and done again.
        self._context.stats.note_ends(part.results)

    def _note_death(self, member: Member, death: Mapping[str, Any]) -> None:
        number = next(self._fleet.deaths)
        path = self._context.log.engine_death(number, death)
        told = f"engine death {number}, replica {member.replica}"
        self._context.notes.add(f"{told}: {death['reason']}; see {path}")
