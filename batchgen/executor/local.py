"""A run on this machine: one worker, one engine. Takes a job from its file to its snapshot.

Order matters: everything that can refuse a job comes before the engine starts; the engine starts
before the input is scanned wherever it will surely be needed, so that both take the time of one;
the claim comes after the plan, the snapshot after the last part, the manifest after the snapshot.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen import __version__, planning
from batchgen.deadline import Deadline, End, estimate_lead
from batchgen.engine.lazy import LazyEngine
from batchgen.engine.start import start_engine
from batchgen.errors import BatchgenError, BusyError, ExitCode, FencedError, GateError, StorageError
from batchgen.executor.computing import Computation
from batchgen.executor.context import RunContext
from batchgen.executor.lock import RunLock
from batchgen.executor.nights import decide
from batchgen.executor.notify import run_hook, write_metrics
from batchgen.executor.options import RunOptions
from batchgen.executor.refusals import refuse_foreign
from batchgen.executor.retry import NO_ERRORS, UNFINISHED, retry_plan
from batchgen.executor.snapshot import gate_figures, overridden, publish, show
from batchgen.executor.summary import Summary, engine_dict, job_counts, state_of
from batchgen.freezing import freeze, has_new_rows
from batchgen.ledger import STATE, Ledger
from batchgen.pruning import prune
from batchgen.runlog import RunLog, new_run_id, utc_now
from batchgen.stats import RunStats
from batchgen.storage import Disk, LocalStorage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.books import Epoch, Manifest, Plan
    from batchgen.config.model import JobConfig
    from batchgen.engine.death import EngineDeath
    from batchgen.engine.supervised import SupervisedEngine
    from batchgen.executor.nights import Decision
    from batchgen.planning import Prepared
    from batchgen.runner import StopSwitch


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
        """
        self._job = job
        self._options = options or RunOptions()
        self._options.check()
        self._started_s = time.monotonic()
        now = utc_now()
        self._started_at = now.isoformat(timespec="seconds")
        run_id = new_run_id(now)
        root = Path(job.output.path)
        storage = LocalStorage(root, temp_tag=run_id, disk=disk)
        self._ledger = Ledger(storage)
        self._prepared: Prepared | None = None
        self._context = RunContext(
            job=job,
            run_id=run_id,
            storage=storage,
            ledger=self._ledger,
            lock=RunLock(storage, f"{STATE}/lock", run_id),
            log=RunLog(storage, f"{STATE}/runs", run_id),
            stats=RunStats(self._started_s, 0),
            stop=stop,
            engine=LazyEngine(self._build_engine),
        )
        self._before = (0, 0, 0)
        self._planned_at_s = self._started_s
        self._is_busy = False
        end = End(self._options.until, self._options.max_runtime_s, self._started_s)
        self._deadline = Deadline(
            stop,
            end,
            lambda: estimate_lead(self._context.stats.latencies_s, self._context.commits_s),
        )
        self.summary: Summary | None = None
        """How the run ended, also where `run` raised."""

    def run(self) -> Summary:
        """Run to the end, or as far as it goes; then tell whom the job says.

        Raises:
            BatchgenError: Job trouble, with its exit code. What finished is committed, and the
                run's summary says what happened.
        """
        try:
            with self._deadline:
                return self._begin()
        except BatchgenError as error:
            self._is_busy = isinstance(error, BusyError)
            if self.summary is None:
                self.summary = self._summary(state_of(error), error.exit_code, str(error), None)
            raise
        finally:
            if self.summary is not None:
                self._announce(self.summary)

    def _begin(self) -> Summary:
        context = self._context
        refuse_foreign(context.storage.root)
        with ExitStack() as stack:
            if self._options.wait:
                context.lock.wait(context.is_stopped)
                stack.callback(context.lock.release)
            num_plans = self._ledger.latest_plan_number()
            decision = decide(self._ledger, self._job, self._options)
            self._prepared = decision.prepared
            context.lock.acquire(steal=self._options.steal)
            stack.callback(context.lock.release)
            stack.callback(context.engine.close)
            try:
                self._check_no_newer_plan(num_plans)
                for note in decision.notes:
                    context.notes.add(note)
                return self._run(decision)
            except BatchgenError as error:
                gate = error.gate if isinstance(error, GateError) else ()
                self._finish(state_of(error), error.exit_code, str(error), gate=gate)
                raise
            except KeyboardInterrupt:
                self._finish("stopped", ExitCode.STOPPED, "interrupted; run again to go on")
                raise
            except BaseException as error:
                self._finish("fault", ExitCode.FAULT, repr(error))
                raise

    def _check_no_newer_plan(self, num_plans: int) -> None:
        if self._ledger.latest_plan_number() != num_plans:
            msg = f"{self._context.storage.where}: another run has just planned this job; run again"
            raise FencedError(msg)

    def _announce(self, summary: Summary) -> None:
        """Tell whom the job says; what fails here is a warning."""
        run = self._job.run
        told = []
        # The run that holds the job writes the figures.
        if run.metrics_file is not None and not self._is_busy:
            told.append(write_metrics(run.metrics_file, summary.as_dict()))
        if run.on_finish:
            told.append(run_hook(run.on_finish, summary.as_dict()))
        summary.warnings.extend(text for text in told if text is not None)

    def _run(self, decision: Decision) -> Summary:
        context = self._context
        if context.is_stopped():
            return self._stopped()
        plan, manifest = self._plan(decision)
        self._planned_at_s = time.monotonic()
        if manifest is not None:
            reason = f"already complete, published by run {manifest.run_id}"
            if self._options.retry_errors:
                reason = f"{NO_ERRORS}; {reason}"
            self.summary = self._summary("nothing_to_do", ExitCode.COMPLETE, reason, manifest)
            return self.summary
        epoch = self._ledger.claim(plan, context.run_id, self._who())
        durable = epoch.durable
        self._before = (durable.num_ok, durable.num_errors, durable.num_skipped)
        for name, why in durable.rejected.items():
            context.notes.add(f"{name} does not count ({why}); its rows are done again")
        context.stats.num_rows = plan.num_rows
        context.stats.num_resumed = durable.num_done
        if not Computation(context, decision.prepared, epoch).run():
            return self._stopped()
        return self._publish(decision.prepared, epoch)

    def _stopped(self) -> Summary:
        reason = f"{self._deadline.reason or 'on purpose'}, with work left; run again to go on"
        return self._finish("stopped", ExitCode.STOPPED, reason)

    def _publish(self, prepared: Prepared, epoch: Epoch) -> Summary:
        self._context.engine.close()
        manifest = publish(self._ledger, prepared, epoch, anyway=self._options.publish_anyway)
        for text in overridden(manifest):
            self._context.notes.add(text)
        if (keep := self._job.output.keep_snapshots) is not None:
            try:
                prune(self._ledger, keep)
            except StorageError as error:  # The night is published; the next one prunes.
                self._context.notes.add(f"old snapshots are not removed yet: {error}")
        return self._finish("complete", ExitCode.COMPLETE, manifest=manifest)

    def _plan(self, decision: Decision) -> tuple[Plan, Manifest | None]:
        """The plan to work on, put if it is new; and its manifest, if there is nothing to do."""
        if decision.plan is not None:
            return self._go_on_with(decision.plan)
        ledger, before, prepared = self._ledger, decision.before, decision.prepared
        ledger.settle()
        newest = ledger.latest_manifest()
        if newest is not None and before.bases and not self._is_gone(newest):
            show(ledger, newest)
        if self._options.retry_errors and before.seen is None:
            self._context.notes.add(UNFINISHED)
        if not before.bases or before.seen is None or has_new_rows(prepared.files, before.seen):
            # Before the input is scanned: both take long, and neither needs the other.
            self._context.engine.start()
        number = ledger.latest_plan_number() + 1
        plan = freeze(prepared, number, before, self._context.storage)
        ledger.put_plan(plan)
        return plan, None

    def _go_on_with(self, plan: Plan) -> tuple[Plan, Manifest | None]:
        """The newest plan, or one that tries its errors again; and its manifest, if it has one."""
        ledger, retry_errors = self._ledger, self._options.retry_errors
        manifest = ledger.manifest(plan.number)
        ledger.settle()
        # What is to be repaired cannot be shown.
        if manifest is not None and not (retry_errors and self._is_gone(manifest)):
            show(ledger, manifest)
        if not retry_errors or (manifest is None and self._is_retried(plan)):
            return plan, manifest
        again = retry_plan(ledger, plan, manifest)
        if isinstance(again, str):
            if manifest is None:
                self._context.notes.add(again)
            return plan, manifest
        ledger.put_plan(again)
        return again, None

    def _is_retried(self, plan: Plan) -> bool:
        """Whether errors have just been tried again, with an end that only has to be published."""
        assert self._prepared is not None  # noqa: S101 - decided before
        durable = self._ledger.durable(plan)
        if plan.takes_errors or durable.num_done != plan.num_rows:
            return False
        limits = gate_figures(self._ledger, self._prepared, plan, durable)
        return not any(limit.is_exceeded for limit in limits)

    def _is_gone(self, manifest: Manifest) -> bool:
        """Whether a published file is missing."""
        storage = self._context.storage
        return not all(storage.path(file["name"]).exists() for file in manifest.files)

    def _build_engine(self) -> SupervisedEngine:
        assert self._prepared is not None  # noqa: S101 - nothing starts before it is prepared
        return start_engine(
            planning.engine_spec(self._prepared, self._context.log.engine_log),
            stall_s=self._job.run.stall_s,
            on_death=self._record_death,
        )

    def _record_death(self, death: EngineDeath) -> None:
        path = self._context.log.engine_death(death.number, death.as_dict())
        self._context.notes.add(f"engine death {death.number}: {death.reason}; see {path}")

    def _who(self) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_at": self._started_at,
            "batchgen": __version__,
        }

    def _finish(
        self,
        state: str,
        code: ExitCode,
        reason: str | None = None,
        *,
        manifest: Manifest | None = None,
        gate: Sequence[Mapping[str, Any]] = (),
    ) -> Summary:
        self.summary = self._summary(state, code, reason, manifest, gate)
        self.summary = replace(self.summary, summary_path=self._context.log.summary_path)
        self._context.log.live({"state": state, "reason": reason})
        self._context.log.finish(self.summary.as_dict())
        return self.summary

    def _summary(
        self,
        state: str,
        code: ExitCode,
        reason: str | None,
        manifest: Manifest | None,
        gate: Sequence[Mapping[str, Any]] = (),
    ) -> Summary:
        context = self._context
        taken, stats, now_s = context.taken, context.stats, time.monotonic()
        return Summary(
            state=state,
            exit_code=int(code),
            run_id=context.run_id,
            run_date=self._job.run_date.isoformat(),
            output=self._job.output.path,
            reason=reason,
            **job_counts(manifest, stats, taken, self._before),
            files=[file["name"].rpartition("/")[2] for file in manifest.files] if manifest else [],
            num_durable=stats.num_resumed + stats.num_committed,
            num_carried=taken.num_rows - taken.num_copied,
            num_copied=taken.num_copied,
            gate=[dict(entry) for entry in (manifest.gate if manifest else gate)],
            run=stats.totals(now_s),
            engine=engine_dict(context.engine.facts),
            started_at=self._started_at,
            planned_s=(taken.known_at_s or self._planned_at_s) - self._started_s,
            elapsed_s=now_s - self._started_s,
            warnings=context.notes.texts + context.engine.warnings,
            num_engine_warnings=context.log.num_engine_warnings(),
            summary_path=None,
        )
