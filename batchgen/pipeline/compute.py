"""The seam behind which rows are computed: `Compute`, and `OneEngine` on this machine.

    Feeder thread      read -> build requests -> queue or order        runner
    Runner (caller)    engine <-> loop, judge, retry                   runner
    Committer thread   open part -> Parquet part                       runner

`Stages` makes these three for a loop, wherever its engine is. The other implementation of
`Compute` is `cluster.driver`. Nothing here or below knows of it: whoever makes a `JobRun` names
the one to use.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from batchgen import __version__
from batchgen.answers.validate import Retries
from batchgen.core.errors import StorageError
from batchgen.core.records import RowSet, WorkLeft
from batchgen.core.runtime import say
from batchgen.engine.group import Supervised, supervise
from batchgen.engine.order import AdmissionOrder, Lengths, mean_lengths
from batchgen.engine.process import build_engine
from batchgen.engine.vllm.settings import settings_text
from batchgen.engine.vllm.shares import engines_for, is_enough
from batchgen.job.recipe import Seeds
from batchgen.pipeline.context import Purse, RunContext
from batchgen.pipeline.frozen import read_rows, request_builder
from batchgen.pipeline.runner import Committer, Feeder, Runner, feed_batches
from batchgen.pipeline.stats import RUNNING, Progress
from batchgen.store.books import PARTS, STATE, Epoch, Plan
from batchgen.store.result_files import PartContext, PartWriter, ResultFile
from batchgen.store.runs import figures_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from batchgen.core.records import EngineFacts, EngineSpec, EngineStats, Request, RowBatch
    from batchgen.engine.base import Engine
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.prepare import Prepared
    from batchgen.pipeline.runner import FeedBatch, OpenPart, Passing
    from batchgen.pipeline.stats import Look, RunStats
    from batchgen.prompt.requests import RequestBuilder
    from batchgen.source.text import LineIndexes
    from batchgen.store.ledger import Ledger
    from batchgen.store.reuse import Deduper, Piece

    Rows = RowSet
    TakeOver = Callable[[Callable[[], None]], Rows]


_USUAL_ANSWER = 1024
_MAX_LENGTHS = 20_000
_MAX_EPOCHS = 20
_LIVE_EVERY_S = 2.0
_LEAST_WORKING_S = 10.0
"""Shorter work says nothing of a speed: it may all come back at once, 20,000 rows/s on a CPU."""


class Loading(Protocol):
    """Something that starts an engine, or several."""

    @property
    def is_started(self) -> bool:
        """Whether it was asked to start."""

    @property
    def facts(self) -> EngineFacts | None:
        """What the engine is; None until it is up."""


@dataclass(eq=False)
class Stages:
    """Makes the stages of loops that work on one plan in one epoch."""

    prepared: Prepared
    """The job."""
    plan: Plan
    """Whose rows they are."""
    ledger: Ledger
    """Of the output."""
    _: KW_ONLY
    epoch: int
    """The run's claim."""
    worker: int
    """In the names of parts: 0 for the process that runs the job."""
    run_id: str
    """Of the run."""

    def __post_init__(self) -> None:
        self._ids = itertools.count()
        self._seeds = Seeds(self.prepared.job.sampling, self.plan.seed_generation)
        self._lengths = lengths_of(self.prepared.job, self.ledger)
        output = self.prepared.job.output
        context = PartContext(
            plan_id=self.plan.plan_id,
            epoch=self.epoch,
            worker=self.worker,
            run_id=self.run_id,
            schema=self.prepared.part_schema,
            prefix=output.prefix,
            num_answer_columns=len(self.prepared.answer.columns),
            origin={"model": self.prepared.model_name, "recipe": self.plan.recipe_fingerprint},
            labels=self.prepared.answer.label_paths,
            with_seed=output.with_seed,
        )
        self.writer = PartWriter(self.ledger.storage, PARTS, context)

    def read(self, rows: RowSet, indexes: LineIndexes | None = None) -> Iterator[RowBatch]:
        """Yield rows of the plan, as they were planned.

        Args:
            rows: Segment -> which of it.
            indexes: What is known of where lines are; grows.

        Raises:
            InputChangedError: A file changed or vanished.
        """
        spec = replace(self.prepared.spec(), line_indexes=indexes)
        return read_rows(self.plan, rows, self.prepared.reader, spec)

    def builder(self) -> RequestBuilder:
        """Return what makes requests of rows."""
        return request_builder(self.prepared, self.plan, self._ids)

    def feed(self, rows: Iterable[RowBatch], deduper: Passing | None) -> Iterator[FeedBatch]:
        """Make requests of rows; `deduper` says which are to be computed."""
        return feed_batches(rows, self.builder(), deduper)

    def work_of(self, num_rows: int) -> WorkLeft:
        """Say how much some rows are."""
        return work_of(num_rows, self.prepared.job, self._lengths, self.ledger)

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
        mode, lengths = self.prepared.job.run.order, self._lengths if long_first else None
        return Feeder(
            batches,
            order=None if is_ordered or mode == "input" else AdmissionOrder(mode, lengths),
            is_loading=lambda: engine.is_started and engine.facts is None,
        )

    def runner(
        self,
        engine: Supervised,
        feeder: Feeder,
        stats: RunStats,
        commit: Callable[[OpenPart], None],
        on_retry: Callable[[StorageError], None],
    ) -> Runner:
        """Make the loop over all stages; `commit` runs in the committer's thread."""
        job = self.prepared.job
        budget = job.run.max_tokens_total
        return Runner(
            engine,
            feeder,
            Committer(commit, job.run.disk_grace_s, on_retry),
            stats,
            judge=self.prepared.judge(),
            retries=Retries(job.retry, self._seeds, self._ids),
            config=job.run,
            clock=time.monotonic,
            purse=Purse(budget, job.sampling) if budget is not None else None,
        )


def lengths_of(job: JobConfig, ledger: Ledger) -> Lengths:
    """Return what to expect of a job's answers; of a first run only their bound.

    A hint for the order of admission: what cannot be read is not known, and no error.
    """
    means = mean_lengths(itertools.islice(_past_lengths(ledger, job.output.prefix), _MAX_LENGTHS))
    return Lengths(job.sampling.max_tokens, bool(job.sampling.ignore_eos), means)


def work_of(num_rows: int, job: JobConfig, lengths: Lengths, ledger: Ledger) -> WorkLeft:
    """Say how much some rows are, with room to spare: earlier answers' means are no bounds."""
    means, most = lengths.means, job.sampling.max_tokens
    if job.asks_by_line:  # Its lines bound their answers, and nobody has read them yet.
        most = min(most, _USUAL_ANSWER)
    output_tokens = min(most, math.ceil(2 * max(means.values(), default=most)))
    return WorkLeft(
        num_rows, output_tokens, 2 ** max(means) if means else None, *_last_speed(ledger)
    )


def _last_speed(ledger: Ledger) -> tuple[float | None, bool]:
    """Rows per second of the last run, and whether its engine had the model compiled."""
    storage = ledger.storage
    for name in reversed(storage.list(f"{STATE}/epochs")[-_MAX_EPOCHS:]):
        claim = figures_in(storage, name)
        found = figures_in(storage, f"{STATE}/runs/{claim.get('run_id')}/summary.json")
        with suppress(LookupError, TypeError):
            run, settings = found["run"], found["engine"]["settings"]
            speed, is_long = run["requests_per_s"], run["working_s"] >= _LEAST_WORKING_S
            if speed > 0 and is_long and not claim.get("is_trial"):
                return float(speed), "cudagraph_capture_sizes" in settings
    return None, False


def _past_lengths(ledger: Ledger, prefix: str) -> Iterator[tuple[int | None, int | None]]:
    """Yield the numbers of prompt and output tokens of what was published last."""
    manifest = ledger.latest_manifest()
    names = [f"{prefix}num_prompt_tokens", f"{prefix}num_output_tokens"]
    for file in manifest.files[:1] if manifest is not None else ():
        with suppress(StorageError), ResultFile(ledger.storage.path(file.name)) as rows:
            for _, table in rows.groups(names):
                yield from zip(*(column.to_pylist() for column in table.columns), strict=True)


@dataclass(eq=False)
class Commits:
    """Makes rows of this process durable, in the committer's thread."""

    context: RunContext
    epoch: Epoch
    writer: PartWriter

    def __post_init__(self) -> None:
        self._stats = self.context.stats

    def _check(self) -> None:
        self.context.lock.acquire(steal=True)  # A stolen lock is free once its holder is gone.
        self.context.ledger.check_fence(self.epoch)

    def computed(self, part: OpenPart, facts: EngineFacts | None) -> None:
        """Commit results of the engine.

        Raises:
            FencedError: Another run has taken over.
            StorageError: Not durable; may be tried again.
        """
        began_s = time.monotonic()
        self._check()
        self.writer.commit(part.results, part.skipped, footer_facts(facts))
        self._stats.num_committed += len(part.results)
        self._stats.num_committed += part.skipped.num_rows
        self._stats.num_parts += 1
        self.context.note_commit(time.monotonic() - began_s)

    def taken(self, piece: Piece) -> None:
        """Commit rows that another row or plan has had answered.

        Raises:
            FencedError: Another run has taken over.
            StorageError: Not durable; may be tried again.
        """
        if not piece.table.num_rows and not piece.skipped:
            return
        self._check()
        facts = {"batchgen": __version__, **({"engine": piece.engine} if piece.engine else {})}
        footer = self.writer.commit_table(piece.table, piece.skipped, facts).footer
        taken, num_rows = self.context.taken, footer.num_results + footer.num_skipped
        taken.num_ok += footer.num_ok
        taken.num_errors += footer.num_errors
        taken.num_skipped += footer.num_skipped
        taken.num_rows += num_rows
        self._stats.num_resumed += num_rows
        self._stats.num_parts += 1


def footer_facts(facts: EngineFacts | None) -> dict[str, str]:
    """Who answered, for the footer of a part; `facts` is None where no engine was ever up."""
    told = {"engine": facts.name, "version": facts.version, "device": facts.device} if facts else {}
    return {"batchgen": __version__, **told}


@dataclass(frozen=True, slots=True)
class Work:
    """What a run knows of the rows that are to be computed."""

    prepared: Prepared
    epoch: Epoch
    stages: Stages
    """Of this process."""
    commits: Commits
    """The same."""


class Compute(Protocol):
    """Ends rows: by one engine here, or by many elsewhere. Used by the run's one thread.

    `facts`, `stats` and `num_in_flight` may be asked from any thread.
    """

    @property
    def facts(self) -> EngineFacts | None:
        """What an engine is; None until the first is up."""

    @property
    def stats(self) -> EngineStats:
        """The latest look at all schedulers."""

    @property
    def num_in_flight(self) -> int:
        """Requests inside all engines."""

    @property
    def warnings(self) -> list[str]:
        """What a person should know at the end of the run, and was not noted before."""

    def start(self, prepared: Prepared) -> None:
        """Begin to bring engines up waiting for them. Idempotent.

        Raises:
            BatchgenError: There is no such engine, or nothing to run it on.
        """

    def answer(
        self, work: Work, rows: Rows, deduper: Deduper | None, take_over: TakeOver | None = None
    ) -> bool:
        """Compute rows and make them durable, until all have ended or the run is stopped.

        Args:
            work: Whose rows they are.
            rows: Segment -> rows that surely have to be computed.
            deduper: Which of their requests are to be computed; None: all.
            take_over: Makes other rows durable by itself, and returns all that are left then,
                those of `rows` included. May be called while `rows` are being read; calls its
                argument now and then.

        Returns:
            Whether nobody stopped it.

        Raises:
            BatchgenError: Job error. What finished before it is durable, if it can be.
        """

    def let_go(self) -> None:
        """There will be no more work: begin to close, if that can be done beside other work."""

    def close(self) -> None:
        """Close all engines, and wait for it. Idempotent."""


@dataclass(eq=False)
class Monitor:
    """Looks at a run at its own pace and shows what it sees; never changes the run."""

    context: RunContext
    """The run."""
    look: Callable[[float], Look]
    """Looks at the engines at this time, in monotonic seconds."""
    progress: Progress
    """Is shown to a person."""
    deduper: Deduper | None = None
    """Knows which rows wait for another row's answer, if any can."""

    def __post_init__(self) -> None:
        self._next_s = 0.0
        self._next_sample_s = time.monotonic() + self.context.job.run.stats_s

    def tick(self) -> None:
        """Show the run if it is time to; called at every turn of the loop."""
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + min(_LIVE_EVERY_S, self.context.job.run.stats_s)
            self.show(now_s, is_last=False)

    def show(self, now_s: float, *, is_last: bool) -> None:
        """Show where the run is; the last look is always sampled."""
        stats, log = self.context.stats, self.context.log
        sample, state, replicas = self.look(now_s)
        num_aside = self.deduper.num_set_aside if self.deduper is not None else 0
        eta_s = stats.eta_s(now_s, num_aside)
        starting = None if state == RUNNING else state
        num_done = stats.num_rows - stats.num_left + num_aside
        self.progress.update(sample, num_done, eta_s, starting)
        live = {"state": state, "num_rows": stats.num_rows, "num_left": stats.num_left}
        log.live({**live, "eta_s": eta_s, **sample}, replicas)
        if is_last or now_s >= self._next_sample_s:
            self._next_sample_s = now_s + self.context.job.run.stats_s
            log.sample(sample)
            log.sample_replicas(replicas or (), is_last=is_last)


@contextmanager
def watching(
    context: RunContext, look: Callable[[float], Look], deduper: Deduper | None
) -> Iterator[Monitor]:
    """Show a run and its notes to a person while it computes."""
    with Progress(context.stats.num_rows, context.stats.num_resumed) as progress:
        context.notes.show_by(progress.note)
        monitor = Monitor(context, look, progress, deduper)
        try:
            yield monitor
        finally:
            monitor.show(time.monotonic(), is_last=True)
            context.notes.show = None


class OneEngine:
    """`Compute` on one engine, or a few on its GPU; starts once there is something to do."""

    def __init__(self, context: RunContext, *, build: Callable[..., Engine] = build_engine) -> None:
        """Bind; nothing is started.

        Args:
            context: The run.
            build: Builds the engine, see `supervise`; benchmarks bring one that many runs share.
        """
        self._context = context
        self._prepared: Prepared | None = None
        self._build = build
        self._engine = self._engines(1)
        self._closing: threading.Thread | None = None
        self._is_told = False

    @property
    def facts(self) -> EngineFacts | None:
        """What the engine is; None until it is up."""
        return self._engine.facts

    @property
    def stats(self) -> EngineStats:
        """The latest look at its scheduler."""
        return self._engine.stats

    @property
    def num_in_flight(self) -> int:
        """Requests that it holds, those that it prepares included."""
        return self._engine.num_in_flight

    @property
    def warnings(self) -> list[str]:
        """What the engine did that it should not."""
        return self._engine.warnings

    def start(self, prepared: Prepared) -> None:
        """Begin to start the engine. See `Compute`."""
        self._prepare(prepared)
        self._engine.start()

    def answer(
        self, work: Work, rows: Rows, deduper: Deduper | None, take_over: TakeOver | None = None
    ) -> bool:
        """Feed, loop and commit, each in a thread of its own. See `Compute`.

        The feeder has begun before anything is taken over, so that the engine starts, and has
        work, meanwhile; what could not be taken over is fed last.
        """
        self._prepare(work.prepared)
        engine, stages, context = self._engine, work.stages, self._context
        work_left = stages.work_of(rows.num_rows)
        if context.is_trial:  # It ends early, and each has other settings: compiled anew for each.
            work_left = work_left._replace(output_tokens=1, prompt_tokens=1, rows_per_s=None)
        engine.expect(work_left)
        left: Future[Rows] = Future()

        def read() -> Iterator[RowBatch]:  # In the feeder's thread.
            yield from stages.read(rows)
            yield from stages.read(left.result() - rows)

        def start_if_needed() -> None:
            if feeder.has_requests:
                engine.start()

        def commit(part: OpenPart) -> None:  # In the committer's thread.
            context.keep_server(work.prepared, engine.facts)
            work.commits.computed(part, engine.facts)

        feeder = stages.feeder(
            stages.feed(read(), deduper.passing if deduper else None),
            engine,
            long_first=not context.is_trial,
        )
        try:
            left.set_result(take_over(start_if_needed) if take_over else rows)
            if context.is_stopped():
                return False
            runner = stages.runner(
                engine,
                feeder,
                context.stats,
                commit=commit,
                on_retry=context.tell_disk_trouble,
            )
            with watching(context, self._look, deduper) as monitor:
                return runner.run(context.stop, monitor.tick)
        finally:
            if not left.done():
                left.set_result(RowSet())  # Nobody must wait in there.
            feeder.close()

    def _look(self, now_s: float) -> Look:
        engine = self._engine
        sample = self._context.stats.sample(now_s, engine.num_in_flight, engine.stats)
        if engine.facts is not None:
            self._tell(settings_text(engine.facts.settings))
            return sample, RUNNING, None
        return sample, "starting the engine" if engine.is_started else "reading rows", None

    def _tell(self, text: str) -> None:
        if text and not self._is_told:
            say(f"engine: {text}")
        self._is_told = True

    def let_go(self) -> None:
        """Begin to close: it takes seconds to let go of a GPU."""
        self._closing = threading.Thread(target=self._engine.close, name="engine-close")
        self._closing.start()

    def close(self) -> None:
        """Close the engine, or wait until it is closed. Idempotent."""
        if self._closing is not None:
            self._closing.join()
        self._engine.close()

    def _prepare(self, prepared: Prepared) -> None:
        """Before anything is started: find out how many engines there should be."""
        is_first, self._prepared = self._prepared is None, prepared
        if not is_first:
            return
        job, asked = self._context.job, self._context.job.run.engines_per_gpu
        if asked != "auto":
            self._engine = self._engines(asked)
        elif not self._context.is_trial and not (job.tuned and job.tuned.settings):
            # Tuned settings were measured with one engine.
            spec = self._spec(0)
            self._engine = self._engines(engines_for(spec), partial(is_enough, spec))

    def _engines(self, num: int, is_enough: Callable[[WorkLeft], bool] | None = None) -> Supervised:
        return supervise(
            self._build,
            [partial(self._spec, at) for at in range(num)],
            on_death=lambda death, whose: self._context.note_death(death.as_dict(), whose),
            stall_s=self._context.job.run.stall_s,
            is_enough=is_enough,
        )

    def _spec(self, at: int) -> EngineSpec:
        assert self._prepared is not None  # noqa: S101 - nothing starts before it is prepared
        log = self._context.log
        spec = self._prepared.engine_spec(log.engine_log_of(at + 1) if at else log.engine_log)
        known = self._context.known_server(self._prepared) if spec.endpoint else None
        return replace(spec, endpoint={**spec.endpoint, "known": known}) if known else spec
