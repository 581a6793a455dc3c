"""What one worker is made of, all but its engine: the only one of a run, or one of a fleet."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any, Protocol

from batchgen import __version__
from batchgen.answers.retries import Ladder
from batchgen.engine.order import AdmissionOrder
from batchgen.job.seeds import Seeds
from batchgen.pipeline.past_lengths import lengths_of
from batchgen.pipeline.runner import Runner
from batchgen.pipeline.stages import Committer, Feeder, feds_of
from batchgen.prompt.requests import RequestBuilder
from batchgen.store.names import PARTS
from batchgen.store.parts import PartContext, PartWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import pyarrow as pa

    from batchgen.core.errors import StorageError
    from batchgen.core.ranges import Ranges
    from batchgen.core.records import EngineFacts, Request, RowBatch
    from batchgen.engine.base import Engine
    from batchgen.pipeline.prepare import Prepared
    from batchgen.pipeline.run_stats import RunStats
    from batchgen.pipeline.stages import Fed, OpenPart, Passing
    from batchgen.store.books import Part, Plan
    from batchgen.store.ledger import Ledger


class Loading(Protocol):
    """Of an engine, whether it is about to come up."""

    @property
    def is_started(self) -> bool:
        """Whether it was ever asked to."""

    @property
    def facts(self) -> EngineFacts | None:
        """None until it is up."""


class Worker:
    """Makes the stages of one worker, in one epoch."""

    def __init__(
        self,
        prepared: Prepared,
        plan: Plan,
        ledger: Ledger,
        *,
        epoch: int,
        number: int,
        run_id: str,
    ) -> None:
        """Bind; nothing is read or written but the lengths of past answers."""
        self._prepared = prepared
        self._plan = plan
        self._ids = itertools.count()
        self._seeds = Seeds(prepared.job.sampling, plan.seed_generation)
        self._lengths = lengths_of(prepared.job, ledger)
        context = _part_context(prepared, plan, epoch, number, run_id)
        self._writer = PartWriter(ledger.storage, PARTS, context)

    def commit(self, part: OpenPart, facts: EngineFacts | None) -> Part:
        """Make results of the engine durable.

        Raises:
            StorageError: Not durable; may be tried again.
        """
        return self._writer.commit(part.results, part.skipped, _told(facts))

    def commit_table(
        self, table: pa.Table, skipped: Mapping[int, Ranges], facts: Mapping[str, Any]
    ) -> Part:
        """Make results durable that are a table in the part schema.

        Raises:
            StorageError: Not durable; may be tried again.
        """
        return self._writer.commit_table(table, skipped, facts)

    def builder(self) -> RequestBuilder:
        """What makes requests of rows."""
        prepared, recipe = self._prepared, self._plan.recipe_fingerprint
        return RequestBuilder(
            prepared.builder, prepared.job, recipe, seeds=self._seeds, ids=self._ids
        )

    def feds(self, batches: Iterable[RowBatch], sieve: Passing | None) -> Iterator[Fed]:
        """Make requests of rows; `sieve` says which are to be computed."""
        return feds_of(batches, self.builder(), sieve)

    def own(self, request: Request) -> Request:
        """A request that another process has made, under an id of this one's."""
        return request._replace(request_id=next(self._ids))

    def feeder(
        self,
        feds: Iterable[Fed],
        engine: Loading,
        *,
        is_ordered: bool = False,
        long_first: bool = True,
    ) -> Feeder:
        """Begin to read and render.

        Args:
            feds: Rows as requests, in the input's order.
            engine: That they are for.
            is_ordered: They are in the job's order already.
            long_first: Whether rows with long answers may go first, where that order says so.
        """
        mode, lengths = self._prepared.job.run.order, self._lengths if long_first else None
        return Feeder(
            feds,
            order=None if is_ordered or mode == "input" else AdmissionOrder(mode, lengths),
            is_loading=lambda: engine.is_started and engine.facts is None,
        )

    def runner(
        self,
        engine: Engine,
        feeder: Feeder,
        stats: RunStats,
        commit: Callable[[OpenPart], None],
        on_retry: Callable[[StorageError], None],
    ) -> Runner:
        """The loop over all stages; `commit` runs in the committer's thread."""
        job = self._prepared.job
        return Runner(
            engine,
            feeder,
            Committer(commit, job.run.disk_grace_s, on_retry),
            stats,
            judge=self._prepared.judge(),
            ladder=Ladder(job.retry, self._seeds, self._ids),
            config=job.run,
            clock=time.monotonic,
        )


def _told(facts: EngineFacts | None) -> Mapping[str, Any]:
    """Who answers, for the footers of parts."""
    if facts is None:
        return {"batchgen": __version__}
    return {
        "batchgen": __version__,
        "engine": facts.name,
        "version": facts.version,
        "device": facts.device,
    }


def _part_context(
    prepared: Prepared, plan: Plan, epoch: int, number: int, run_id: str
) -> PartContext:
    output = prepared.job.output
    return PartContext(
        plan_id=plan.plan_id,
        epoch=epoch,
        worker=number,
        run_id=run_id,
        schema=prepared.part_schema,
        prefix=output.prefix,
        num_answer_columns=len(prepared.answer.columns),
        origin={"model": prepared.model_name, "recipe": plan.recipe_fingerprint},
        labels=prepared.answer.label_paths,
        with_seed=output.with_seed,
    )
