"""A run on this machine: one worker, one engine. Takes a job from its file to its snapshot.

Order matters: everything that can refuse a job comes before the engine starts; the engine starts
before the input is scanned, so that both take the time of one; the claim comes after the plan,
the snapshot after the last part, the manifest after the snapshot.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen import __version__, frozen, planning
from batchgen.books import Durable, Epoch, Plan
from batchgen.engine.start import start_engine
from batchgen.errors import (
    AccountingError,
    BatchgenError,
    ExitCode,
    FencedError,
    OutputError,
    RecipeChangedError,
    StorageError,
)
from batchgen.executor.lock import RunLock
from batchgen.executor.snapshot import publish, show
from batchgen.executor.summary import Summary, engine_dict, job_counts, state_of
from batchgen.executor.watch import Watch
from batchgen.ledger import STATE, Ledger
from batchgen.progress import Progress
from batchgen.prompts import RequestBuilder
from batchgen.ranges import Ranges
from batchgen.runlog import RunLog, new_run_id, utc_now
from batchgen.runner import Runner, Stop, StopSwitch
from batchgen.sink.parts import PartContext, PartWriter
from batchgen.stages import Committer, Feeder, OpenPart
from batchgen.stats import RunStats
from batchgen.storage import Disk, LocalStorage

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchgen.books import Manifest
    from batchgen.config.model import JobConfig
    from batchgen.engine.death import EngineDeath
    from batchgen.engine.supervised import SupervisedEngine
    from batchgen.planning import Prepared


class LocalRun:
    """One execution of a job. Use once: `LocalRun(...).run()`."""

    def __init__(
        self,
        job: JobConfig,
        *,
        stop: StopSwitch,
        fresh: bool = False,
        steal: bool = False,
        disk: Disk | None = None,
    ) -> None:
        """Bind; nothing is touched yet.

        Args:
            job: As loaded.
            stop: Asked by whoever wants the run to end early.
            fresh: Begin a new plan even if the old one is unfinished or another recipe's.
            steal: Take the job from a run that holds it and cannot be stopped, a frozen one.
            disk: The system calls; only fault tests bring their own.

        Raises:
            OutputError: The output folder is not batchgen's to use.
        """
        self._job = job
        self._fresh = fresh
        self._steal = steal
        self._stop = stop
        self._started_s = time.monotonic()
        now = utc_now()
        self._started_at = now.isoformat(timespec="seconds")
        self._run_id = new_run_id(now)
        root = Path(job.output.path)
        _refuse_foreign(root)
        self._storage = LocalStorage(root, temp_tag=self._run_id, disk=disk)
        self._ledger = Ledger(self._storage)
        self._log = RunLog(self._storage, f"{STATE}/runs", self._run_id)
        self._stats = RunStats(self._started_s, 0)
        self._resumed = Durable()
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
        plan = None if self._fresh else self._ledger.latest_plan()
        num_plans = self._ledger.latest_plan_number()
        prepared = planning.prepare(self._job, plan)
        with ExitStack() as stack:
            self._lock.acquire(steal=self._steal)
            stack.callback(self._lock.release)
            try:
                self._check_no_newer_plan(num_plans)
                return self._run(prepared, plan, stack)
            except BatchgenError as error:
                self._finish(state_of(error), error.exit_code, reason=str(error))
                raise
            except BaseException as error:
                self._finish("fault", ExitCode.FAULT, reason=repr(error))
                raise

    def _run(self, prepared: Prepared, plan: Plan | None, stack: ExitStack) -> Summary:
        if plan is not None:
            manifest = self._ledger.manifest(plan.number)
            self._ledger.settle()
            self._check_input(prepared, plan, is_published=manifest is not None)
            if manifest is not None:
                show(self._ledger, manifest)
                reason = f"already complete, published by run {manifest.run_id}"
                return self._summary("nothing_to_do", ExitCode.COMPLETE, reason, manifest)
            epoch = self._ledger.claim(plan, self._run_id, self._who())
            if missing(plan, epoch.durable):
                self._start_engine(prepared, stack)
        else:
            # Before the input is scanned: both take long, and neither needs the other.
            self._start_engine(prepared, stack)
            plan = planning.freeze(prepared, self._ledger.latest_plan_number() + 1)
            self._ledger.put_plan(plan)
            epoch = self._ledger.claim(plan, self._run_id, self._who())
        if self._stop.state is not Stop.NO or not self._compute(prepared, epoch):
            reason = "on purpose, with work left; run again to go on"
            return self._finish("stopped", ExitCode.STOPPED, reason=reason)
        if self._engine is not None:
            self._engine.close()
        manifest = publish(self._ledger, prepared, epoch)
        return self._finish("complete", ExitCode.COMPLETE, manifest=manifest)

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

    def _check_input(self, prepared: Prepared, plan: Plan, *, is_published: bool) -> None:
        """Refuse a job whose input is not the plan's.

        Raises:
            RecipeChangedError: Planned files changed; or, once published, files came.
        """
        changes = frozen.input_changes(plan, prepared.reader)
        new_files = frozen.new_files(plan, self._job)
        if is_published:
            changes += [f"input: {path} is new" for path in new_files]
        elif new_files:
            self._warnings.append(
                f"{len(new_files)} input files came after the plan was made, such as "
                f"{new_files[0]}: not in this snapshot"
            )
        if changes:
            raise RecipeChangedError(self._job.output.path, changes)

    def _who(self) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_at": self._started_at,
            "batchgen": __version__,
        }

    def _compute(self, prepared: Prepared, epoch: Epoch) -> bool:
        """Compute what is missing; return whether nothing is missing any more."""
        plan, self._resumed = epoch.plan, epoch.durable
        for name, why in epoch.durable.rejected.items():
            self._warnings.append(f"{name} does not count ({why}); its rows are done again")
        self._stats.num_rows = plan.num_rows
        self._stats.num_resumed = epoch.durable.num_done
        todo = missing(plan, epoch.durable)
        if not todo:
            return True
        rows = frozen.read_rows(plan, todo, prepared.reader, prepared.spec())
        seed = None if self._job.sampling.temperature == 0 else self._job.sampling.seed
        builder = RequestBuilder(prepared.builder, plan.recipe_fingerprint, seed)
        feeder = Feeder(rows, builder)
        try:
            complete = self._work(feeder, PartWriter(*self._part_context(prepared, epoch)), epoch)
        finally:
            feeder.close()
        num_todo = sum(len(rows) for rows in todo.values())
        num_ended = self._stats.num_results + self._stats.num_skipped
        if complete and num_ended != num_todo:
            msg = f"{num_todo} rows were to do, {num_ended} have ended; not published"
            raise AccountingError(msg)
        return complete

    def _work(self, feeder: Feeder, writer: PartWriter, epoch: Epoch) -> bool:
        assert self._engine is not None  # noqa: S101 - started whenever rows are missing

        def commit(part: OpenPart) -> None:  # In the committer's thread.
            self._lock.acquire(steal=True)  # A stolen lock is free once its holder is gone.
            self._ledger.check_fence(epoch)
            writer.commit(part.results, part.skipped, self._engine_facts())
            self._stats.num_committed += len(part.results)
            self._stats.num_committed += sum(len(rows) for rows in part.skipped.values())
            self._stats.num_parts += 1

        runner = Runner(
            self._engine,
            feeder,
            Committer(commit, self._job.run.disk_grace_s, self._tell_disk_trouble),
            self._stats,
            config=self._job.run,
            clock=time.monotonic,
        )
        with Progress(epoch.plan.num_rows, epoch.durable.num_done) as progress:
            self._note = progress.note
            for warning in self._warnings:
                progress.note(warning)
            watch = Watch(runner, self._engine, self._log, progress, self._job.run.stats_s)
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

    def _part_context(
        self, prepared: Prepared, epoch: Epoch
    ) -> tuple[LocalStorage, str, PartContext]:
        context = PartContext(
            plan_id=epoch.plan.plan_id,
            epoch=epoch.number,
            worker=0,
            run_id=self._run_id,
            schema=prepared.part_schema,
            prefix=self._job.output.prefix,
        )
        return self._storage, f"{STATE}/parts", context

    def _engine_facts(self) -> dict[str, Any]:
        facts = self._engine.facts if self._engine is not None else None
        if facts is None:
            return {"batchgen": __version__}
        return {
            "batchgen": __version__,
            "engine": facts.name,
            "version": facts.version,
            "device": facts.device,
        }

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
        before = (self._resumed.num_ok, self._resumed.num_errors, self._resumed.num_skipped)
        return Summary(
            state=state,
            exit_code=int(code),
            run_id=self._run_id,
            output=self._job.output.path,
            reason=reason,
            **job_counts(manifest, self._stats, before),
            files=[file["name"].rpartition("/")[2] for file in manifest.files] if manifest else [],
            num_durable=self._stats.num_resumed + self._stats.num_committed,
            run=self._stats.totals(now_s),
            engine=engine_dict(self._engine.facts if self._engine else None),
            started_at=self._started_at,
            elapsed_s=now_s - self._started_s,
            warnings=self._warnings + (self._engine.warnings if self._engine else []),
            num_engine_warnings=self._log.num_engine_warnings(),
            summary_path=str(self._storage.path(f"{STATE}/runs/{self._run_id}/summary.json")),
        )


def missing(plan: Plan, durable: Durable) -> dict[int, Ranges]:
    """Segment -> rows that no accepted part accounts for; segments with none left out."""
    todo = {
        number: Ranges.until(segment.num_rows) - durable.done(number)
        for number, segment in enumerate(plan.segments)
    }
    return {number: rows for number, rows in todo.items() if rows}


def _refuse_foreign(root: Path) -> None:
    """An output folder is ours, empty or absent; its state is not somewhere else."""
    for link in (root / STATE, *(root / STATE).glob("*")):
        if link.is_symlink():
            msg = f"{link}: is a link, expected a folder; remove it or choose another output.path"
            raise OutputError(msg)
    if root.exists() and not root.is_dir():
        msg = f"{root}: is a file, expected a folder; choose another output.path"
        raise OutputError(msg)
    # In this order: a run that starts beside this one makes STATE before anything else.
    if root.is_dir() and any(root.iterdir()) and not (root / STATE).is_dir():
        msg = f"{root}: holds files that are not batchgen's; choose another output.path"
        raise OutputError(msg)
