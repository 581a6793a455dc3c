"""What one loop is made of, all but its engine: the only loop of a run, or one of many."""

from __future__ import annotations

import itertools
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from batchgen.answers.json_schema import row_validator
from batchgen.answers.validate import Retries
from batchgen.core.errors import StorageError
from batchgen.engine.order import AdmissionOrder, Lengths, mean_lengths
from batchgen.job.recipe import Seeds
from batchgen.pipeline.committer import Committer
from batchgen.pipeline.feeder import Feeder, feed_batches
from batchgen.pipeline.frozen import read_rows
from batchgen.pipeline.runner import Runner
from batchgen.prompt.requests import RequestBuilder
from batchgen.store.books import PARTS
from batchgen.store.parts import PartContext, PartWriter
from batchgen.store.result_files import ResultFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from batchgen.core.ranges import Ranges
    from batchgen.core.records import EngineFacts, Request, RowBatch
    from batchgen.engine.supervised import SupervisedEngine
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.committer import OpenPart
    from batchgen.pipeline.feeder import FeedBatch, Passing
    from batchgen.pipeline.prepare import Prepared
    from batchgen.pipeline.run_stats import RunStats
    from batchgen.source.text import LineIndexes
    from batchgen.store.books import Plan
    from batchgen.store.ledger import Ledger

_MAX_LENGTHS = 20_000


class Loading(Protocol):
    """Something that starts an engine, or several."""

    @property
    def is_started(self) -> bool:
        """Whether it was asked to start."""

    @property
    def facts(self) -> EngineFacts | None:
        """What the engine is; None until it is up."""


class Stages:
    """Makes the stages of loops that work on one plan in one epoch."""

    def __init__(
        self,
        prepared: Prepared,
        plan: Plan,
        ledger: Ledger,
        *,
        epoch: int,
        worker: int,
        run_id: str,
    ) -> None:
        """Bind; nothing is read or written but the lengths of past answers.

        Args:
            prepared: The job.
            plan: Whose rows they are.
            ledger: Of the output.
            epoch: The run's claim.
            worker: In the names of parts: 0 for the process that runs the job.
            run_id: Of the run.
        """
        self._prepared = prepared
        self._plan = plan
        self._ids = itertools.count()
        self._seeds = Seeds(prepared.job.sampling, plan.seed_generation)
        self._lengths = lengths_of(prepared.job, ledger)
        output = prepared.job.output
        context = PartContext(
            plan_id=plan.plan_id,
            epoch=epoch,
            worker=worker,
            run_id=run_id,
            schema=prepared.part_schema,
            prefix=output.prefix,
            num_answer_columns=len(prepared.answer.columns),
            origin={"model": prepared.model_name, "recipe": plan.recipe_fingerprint},
            labels=prepared.answer.label_paths,
            with_seed=output.with_seed,
        )
        self.writer = PartWriter(ledger.storage, PARTS, context)

    def read(
        self, rows: Mapping[int, Ranges], indexes: LineIndexes | None = None
    ) -> Iterator[RowBatch]:
        """Yield rows of the plan, as they were planned.

        Args:
            rows: Segment -> which of it.
            indexes: What is known of where lines are; grows.

        Raises:
            InputChangedError: A file changed or vanished.
        """
        spec = replace(self._prepared.spec(), line_indexes=indexes)
        return read_rows(self._plan, rows, self._prepared.reader, spec)

    def builder(self) -> RequestBuilder:
        """Return what makes requests of rows."""
        prepared, recipe = self._prepared, self._plan.recipe_fingerprint
        return RequestBuilder(
            prepared.builder,
            prepared.job,
            recipe,
            seeds=self._seeds,
            ids=self._ids,
            check_schema=row_validator,
        )

    def feed(self, rows: Iterable[RowBatch], sieve: Passing | None) -> Iterator[FeedBatch]:
        """Make requests of rows; `sieve` says which are to be computed."""
        return feed_batches(rows, self.builder(), sieve)

    def own(self, request: Request) -> Request:
        """Give a request that another process has made an id of this one's."""
        return request._replace(request_id=next(self._ids))

    def feeder(
        self,
        batches: Iterable[FeedBatch],
        engine: Loading,
        *,
        is_ordered: bool = False,
        long_first: bool = True,
    ) -> Feeder:
        """Begin to read and render.

        Args:
            batches: Rows as requests, in the input's order.
            engine: That they are for.
            is_ordered: They are in the job's order already.
            long_first: Whether rows with long answers may go first, where that order says so.
        """
        mode, lengths = self._prepared.job.run.order, self._lengths if long_first else None
        return Feeder(
            batches,
            order=None if is_ordered or mode == "input" else AdmissionOrder(mode, lengths),
            is_loading=lambda: engine.is_started and engine.facts is None,
        )

    def runner(
        self,
        engine: SupervisedEngine,
        feeder: Feeder,
        stats: RunStats,
        commit: Callable[[OpenPart], None],
        on_retry: Callable[[StorageError], None],
    ) -> Runner:
        """Make the loop over all stages; `commit` runs in the committer's thread."""
        job = self._prepared.job
        return Runner(
            engine,
            feeder,
            Committer(commit, job.run.disk_grace_s, on_retry),
            stats,
            judge=self._prepared.judge(),
            retries=Retries(job.retry, self._seeds, self._ids),
            config=job.run,
            clock=time.monotonic,
        )


def lengths_of(job: JobConfig, ledger: Ledger) -> Lengths:
    """Return what to expect of a job's answers; of a first run only their bound.

    A hint for the order of admission: what cannot be read is not known, and no error.
    """
    means = mean_lengths(itertools.islice(_past_lengths(ledger, job.output.prefix), _MAX_LENGTHS))
    return Lengths(job.sampling.max_tokens, bool(job.sampling.ignore_eos), means)


def _past_lengths(ledger: Ledger, prefix: str) -> Iterator[tuple[int | None, int | None]]:
    """Yield the numbers of prompt and output tokens of what was published last."""
    manifest = ledger.latest_manifest()
    names = [f"{prefix}num_prompt_tokens", f"{prefix}num_output_tokens"]
    for file in manifest.files[:1] if manifest is not None else ():
        with suppress(StorageError), ResultFile(ledger.storage.path(file.name)) as rows:
            for _, table in rows.groups(names):
                yield from zip(*(column.to_pylist() for column in table.columns), strict=True)
