"""A run on this machine: one worker, one engine. Takes a job from its file to its snapshot.

Order matters: everything that can refuse a job comes before the engine starts; the engine starts
before the input is scanned, so that both take the time of one; the claim comes after the plan,
the snapshot after the last part, the manifest after the snapshot.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen import __version__, frozen, planning
from batchgen.answers.retries import Ladder
from batchgen.engine.start import start_engine
from batchgen.errors import (
    AccountingError,
    BatchgenError,
    ExitCode,
    FencedError,
    GateError,
    StorageError,
)
from batchgen.executor.carry_over import carry_over, missing
from batchgen.executor.commits import Commits
from batchgen.executor.lock import RunLock
from batchgen.executor.options import RunOptions
from batchgen.executor.refusals import check_input, refuse_foreign
from batchgen.executor.retry import NO_ERRORS, UNFINISHED, carried_over, retry_plan
from batchgen.executor.snapshot import overridden, publish, show
from batchgen.executor.summary import Summary, engine_dict, job_counts, state_of
from batchgen.executor.watch import Watch
from batchgen.ledger import STATE, Ledger
from batchgen.progress import Progress
from batchgen.requests import RequestBuilder
from batchgen.runlog import RunLog, new_run_id, utc_now
from batchgen.runner import Runner, Stop, StopSwitch
from batchgen.seeds import Seeds
from batchgen.sink.carry import Wanted
from batchgen.sink.parts import PartContext, PartWriter
from batchgen.stages import Committer, Feeder, OpenPart
from batchgen.stats import RunStats
from batchgen.storage import Disk, LocalStorage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from batchgen.books import Epoch, Manifest, Plan
    from batchgen.config.model import JobConfig
    from batchgen.engine.death import EngineDeath
    from batchgen.engine.supervised import SupervisedEngine
    from batchgen.planning import Prepared
    from batchgen.ranges import Ranges


class LocalRun:
    """One execution of a job. Use once: `LocalRun(...).run()`."""

    def __init__(
        self,
        job: JobConfig,
        *,
        stop: StopSwitch,
        options: RunOptions | None = None,
        disk: Disk | None = None,
    ) -> None:
        """Bind; nothing is touched yet.

        Args:
            job: As loaded.
            stop: Asked by whoever wants the run to end early.
            options: Of `batchgen run`.
            disk: The system calls; only fault tests bring their own.

        Raises:
            ConfigError: The options do not go together.
            OutputError: The output folder is not batchgen's to use.
        """
        self._job = job
        self._options = options or RunOptions()
        self._options.check()
        self._stop = stop
        self._started_s = time.monotonic()
        now = utc_now()
        self._started_at = now.isoformat(timespec="seconds")
        self._run_id = new_run_id(now)
        root = Path(job.output.path)
        refuse_foreign(root)
        self._storage = LocalStorage(root, temp_tag=self._run_id, disk=disk)
        self._ledger = Ledger(self._storage)
        self._log = RunLog(self._storage, f"{STATE}/runs", self._run_id)
        self._stats = RunStats(self._started_s, 0)
        self._before = (0, 0, 0)
        self._num_carried = 0
        self._gate: Sequence[Mapping[str, Any]] = ()
        self._engine: SupervisedEngine | None = None
        self._warnings: list[str] = []
        self._note: Callable[[str], None] = self._warnings.append
        self._lock = RunLock(self._storage, f"{STATE}/lock", self._run_id)
        self.summary: Summary | None = None
        """How the run ended, also where `run` raised."""

    def run(self) -> Summary:
        """Run to the end, or as far as it goes.

        Raises:
            BatchgenError: Job trouble, with its exit code. What finished is committed, and the
                run's summary says what happened.
        """
        plan = None if self._options.fresh else self._ledger.latest_plan()
        num_plans = self._ledger.latest_plan_number()
        prepared = planning.prepare(self._job, plan)
        with ExitStack() as stack:
            self._lock.acquire(steal=self._options.steal)
            stack.callback(self._lock.release)
            try:
                self._check_no_newer_plan(num_plans)
                return self._run(prepared, plan, stack)
            except BatchgenError as error:
                if isinstance(error, GateError):
                    self._gate = error.gate
                self._finish(state_of(error), error.exit_code, reason=str(error))
                raise
            except BaseException as error:
                self._finish("fault", ExitCode.FAULT, reason=repr(error))
                raise

    def _run(self, prepared: Prepared, plan: Plan | None, stack: ExitStack) -> Summary:
        if plan is not None:
            plan, manifest = self._go_on_with(prepared, plan)
            if manifest is not None:
                reason = f"already complete, published by run {manifest.run_id}"
                if self._options.retry_errors:
                    reason = f"{NO_ERRORS}; {reason}"
                return self._summary("nothing_to_do", ExitCode.COMPLETE, reason, manifest)
        else:
            if self._options.retry_errors:
                self._warnings.append(UNFINISHED)
            # Before the input is scanned: both take long, and neither needs the other.
            self._start_engine(prepared, stack)
            plan = planning.freeze(prepared, self._ledger.latest_plan_number() + 1)
            self._ledger.put_plan(plan)
        epoch = self._ledger.claim(plan, self._run_id, self._who())
        if self._stop.state is not Stop.NO or not self._compute(prepared, epoch, stack):
            reason = "on purpose, with work left; run again to go on"
            return self._finish("stopped", ExitCode.STOPPED, reason=reason)
        if self._engine is not None:
            self._engine.close()
        manifest = publish(self._ledger, prepared, epoch, anyway=self._options.publish_anyway)
        self._warnings += overridden(manifest)
        return self._finish("complete", ExitCode.COMPLETE, manifest=manifest)

    def _go_on_with(self, prepared: Prepared, plan: Plan) -> tuple[Plan, Manifest | None]:
        """The newest plan, or one that tries its errors again; and its manifest, if it has one."""
        manifest = self._ledger.manifest(plan.number)
        self._ledger.settle()
        is_published = manifest is not None
        self._warnings += check_input(prepared, plan, is_published=is_published)
        # What is to be repaired cannot be shown.
        if manifest is not None and not (self._options.retry_errors and self._is_gone(manifest)):
            show(self._ledger, manifest)
        if not self._options.retry_errors:
            return plan, manifest
        again = retry_plan(self._ledger, plan, manifest)
        if isinstance(again, str):
            if manifest is None:
                self._warnings.append(again)
            return plan, manifest
        self._ledger.put_plan(again)
        return again, None

    def _is_gone(self, manifest: Manifest) -> bool:
        """Whether a published file is missing."""
        return not all(self._storage.path(file["name"]).exists() for file in manifest.files)

    def _check_no_newer_plan(self, num_plans: int) -> None:
        if self._ledger.latest_plan_number() != num_plans:
            msg = f"{self._storage.where}: another run has just planned this job; run again"
            raise FencedError(msg)

    def _start_engine(self, prepared: Prepared, stack: ExitStack) -> None:
        self._engine = start_engine(
            planning.engine_spec(prepared, self._log.engine_log),
            stall_s=self._job.run.stall_s,
            on_death=self._record_death,
        )
        stack.callback(self._engine.close)

    def _who(self) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_at": self._started_at,
            "batchgen": __version__,
        }

    def _compute(self, prepared: Prepared, epoch: Epoch, stack: ExitStack) -> bool:
        """Compute what is missing; return whether nothing is missing any more."""
        plan, durable = epoch.plan, epoch.durable
        self._before = (durable.num_ok, durable.num_errors, durable.num_skipped)
        for name, why in durable.rejected.items():
            self._warnings.append(f"{name} does not count ({why}); its rows are done again")
        self._stats.num_rows = plan.num_rows
        self._stats.num_resumed = durable.num_done
        writer = PartWriter(self._storage, f"{STATE}/parts", self._part_context(prepared, epoch))
        commits = Commits(self._lock, self._ledger, epoch, writer, self._stats)
        todo = missing(plan, durable)
        if todo and plan.base is not None:
            if not durable.num_done:
                self._start_engine(prepared, stack)  # Needed for sure: begin while rows are copied.
            todo = self._carry_over(prepared, plan, todo, commits)
        if not todo or self._stop.state is not Stop.NO:
            return not todo
        if self._engine is None:
            self._start_engine(prepared, stack)
        rows = frozen.read_rows(plan, todo, prepared.reader, prepared.spec())
        ids = itertools.count()
        seeds = Seeds(self._job.sampling, plan.generation)
        recipe = plan.recipe_fingerprint
        builder = RequestBuilder(prepared.builder, self._job, recipe, seeds=seeds, ids=ids)
        ladder = Ladder(self._job.retry, seeds, ids)
        feeder = Feeder(rows, builder)
        try:
            complete = self._work(prepared, feeder, ladder, commits)
        finally:
            feeder.close()
        num_todo = sum(len(rows) for rows in todo.values())
        num_ended = self._stats.num_results + self._stats.num_skipped
        if complete and num_ended != num_todo:
            msg = f"{num_todo} rows were to do, {num_ended} have ended; not published"
            raise AccountingError(msg)
        return complete

    def _carry_over(
        self, prepared: Prepared, plan: Plan, todo: dict[int, Ranges], commits: Commits
    ) -> dict[int, Ranges]:
        """Take over what the plan's base has of `todo`; return the rest."""
        self._log.live({"state": "taking over rows", "num_rows": plan.num_rows})
        wanted = Wanted(prepared.part_schema, self._job.output.prefix, todo, self._warnings.append)
        pieces = carried_over(self._ledger, plan, wanted, self._job.run)
        committer = Committer(commits.carried, self._job.run.disk_grace_s, self._tell_disk_trouble)
        carried = carry_over(pieces, committer, lambda: self._stop.state is not Stop.NO)
        num_ok, num_errors, num_skipped = self._before
        self._before = (num_ok + carried.num_ok, num_errors, num_skipped + carried.num_skipped)
        self._num_carried = carried.num_rows
        self._stats.num_resumed += carried.num_rows
        return carried.left(todo)

    def _work(self, prepared: Prepared, feeder: Feeder, ladder: Ladder, commits: Commits) -> bool:
        engine = self._engine
        assert engine is not None  # noqa: S101 - started whenever rows are missing

        def commit(part: OpenPart) -> None:  # In the committer's thread.
            commits.computed(part, engine)

        runner = Runner(
            engine,
            feeder,
            Committer(commit, self._job.run.disk_grace_s, self._tell_disk_trouble),
            self._stats,
            judge=prepared.judge(),
            ladder=ladder,
            config=self._job.run,
            clock=time.monotonic,
        )
        with Progress(self._stats.num_rows, self._stats.num_resumed) as progress:
            self._note = progress.note
            for warning in self._warnings:
                progress.note(warning)
            watch = Watch(runner, engine, self._log, progress, self._job.run.stats_s)
            try:
                return runner.run(self._stop, watch.tick)
            finally:
                watch.show(time.monotonic(), is_last=True)

    def _tell_disk_trouble(self, error: StorageError) -> None:
        grace = f"{self._job.run.disk_grace_s:.0f} s"
        text = f"a commit was refused and is tried again for {grace}: {error}"
        if text not in self._warnings:
            self._warnings.append(text)
            self._note(text)

    def _record_death(self, death: EngineDeath) -> None:
        path = self._log.engine_death(death.number, death.as_dict())
        self._warnings.append(f"engine death {death.number}: {death.reason}; see {path}")

    def _part_context(self, prepared: Prepared, epoch: Epoch) -> PartContext:
        return PartContext(
            plan_id=epoch.plan.plan_id,
            epoch=epoch.number,
            worker=0,
            run_id=self._run_id,
            schema=prepared.part_schema,
            prefix=self._job.output.prefix,
            num_answer_columns=len(prepared.answer.columns),
            origin={"model": prepared.model_name, "recipe": epoch.plan.recipe_fingerprint},
            labels=prepared.answer.label_paths,
            with_seed=self._job.output.with_seed,
        )

    def _finish(
        self,
        state: str,
        code: ExitCode,
        *,
        reason: str | None = None,
        manifest: Manifest | None = None,
    ) -> Summary:
        summary = self._summary(state, code, reason, manifest)
        self._log.live({"state": state, "reason": reason})
        self._log.finish(summary.as_dict())
        self.summary = summary
        return summary

    def _summary(
        self, state: str, code: ExitCode, reason: str | None, manifest: Manifest | None
    ) -> Summary:
        now_s = time.monotonic()
        return Summary(
            state=state,
            exit_code=int(code),
            run_id=self._run_id,
            output=self._job.output.path,
            reason=reason,
            **job_counts(manifest, self._stats, self._before),
            files=[file["name"].rpartition("/")[2] for file in manifest.files] if manifest else [],
            num_durable=self._stats.num_resumed + self._stats.num_committed,
            num_carried=self._num_carried,
            gate=[dict(entry) for entry in (manifest.gate if manifest else self._gate)],
            run=self._stats.totals(now_s),
            engine=engine_dict(self._engine.facts if self._engine else None),
            started_at=self._started_at,
            elapsed_s=now_s - self._started_s,
            warnings=self._warnings + (self._engine.warnings if self._engine else []),
            num_engine_warnings=self._log.num_engine_warnings(),
            summary_path=str(self._storage.path(f"{STATE}/runs/{self._run_id}/summary.json")),
        )
