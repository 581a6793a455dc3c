"""A run: takes a job from its file to its snapshot, by one engine here or by a fleet.

Order matters: everything that can refuse a job comes before the engine starts; the engine starts
before the input is scanned wherever it will surely be needed, so that both take the time of one;
the claim comes after the plan, the snapshot after the last part, the manifest after the snapshot.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from batchgen import __version__
from batchgen.core.errors import (
    BatchgenError,
    BusyError,
    ConfigError,
    EngineError,
    ExitCode,
    FencedError,
    GateError,
    OutputError,
    StoppedError,
    StorageError,
)
from batchgen.core.records import RowSet
from batchgen.core.runtime import option, say
from batchgen.engine.death import is_out_of_memory
from batchgen.engine.vllm.settings import SETTINGS
from batchgen.pipeline.compute import Compute, OneEngine
from batchgen.pipeline.context import (
    SERVED,
    Moment,
    RunContext,
    RunOptions,
    StopSwitch,
    Summary,
    engine_dict,
    job_counts,
    state_of,
    tuned_dict,
)
from batchgen.pipeline.deadline import Deadline, End, estimate_lead
from batchgen.pipeline.decide import Decision, Hooks, begin, decide
from batchgen.pipeline.notify import run_hook, write_metrics
from batchgen.pipeline.publish import overridden, publish
from batchgen.pipeline.rows import Computation, rejected_notes
from batchgen.pipeline.stats import RunStats, advise
from batchgen.storage.remote import storage_at
from batchgen.store.books import STATE, TRIES, Epoch, Manifest, Plan
from batchgen.store.ledger import Ledger
from batchgen.store.prune import Keep, prune
from batchgen.store.runs import RunLock, RunLog, new_run_id, utc_now

if TYPE_CHECKING:
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.prepare import Prepared
    from batchgen.storage import Disk


def tuned_notes(job: JobConfig) -> list[str]:
    """Say why the tuned file is not used, or what of it is not; empty if all is well."""
    return [job.tuned.note] if job.tuned is not None and job.tuned.note is not None else []


@contextmanager
def naming_tuned(job: JobConfig, compute: Compute) -> Iterator[None]:
    """Name the tuned settings where the engine does not start, or runs out of memory.

    They need not be at fault, but whoever reads the job file would look for them there.

    Raises:
        ConfigError, EngineError: The same, with more text.
    """
    try:
        yield
    except (ConfigError, EngineError) as error:
        tuned = job.tuned
        is_startup = compute.facts is None
        if tuned is None or not tuned.settings or not (is_startup or is_out_of_memory(str(error))):
            raise
        told = ", ".join(f"{name} = {value}" for name, value in tuned.settings.items())
        had = f"it had {told} from {tuned.path}: {option('--no-tuned')} runs without"
        if isinstance(error, ConfigError):
            if error.where != SETTINGS:  # A grammar, say: no settings of these.
                raise
            *before, last = error.problems
            raise ConfigError(error.where, [*before, f"{last}; {had}"]) from error
        msg = f"{error}; {had}"
        raise type(error)(msg) from error


class JobRun:
    """One execution of a job. Use once: `JobRun(...).run()`."""

    def __init__(  # noqa: PLR0913 - how a run may differ from one of `batchgen run`
        self,
        job: JobConfig,
        *,
        stop: StopSwitch,
        options: RunOptions | None = None,
        disk: Disk | None = None,
        publishes: bool = True,
        sample: Callable[[Prepared, Plan], RowSet] | None = None,
        compute: Callable[[RunContext], Compute] = OneEngine,
    ) -> None:
        """Bind; nothing is touched yet.

        Args:
            job: As loaded.
            stop: Asked by whoever wants the run to end early.
            options: Of `batchgen run`.
            disk: The system calls; only fault tests bring their own.
            publishes: False: leave the snapshot of a job that is answered to a later run.
            sample: Chooses the rows that are asked, for a try-out; the others are skipped.
            compute: Makes what computes the job's rows; a job with replicas needs another.

        Raises:
            ConfigError: The options do not go together.
        """
        self._job = job
        self._options = options or RunOptions()
        self._options.check()
        self._publishes = publishes
        self._sample = sample
        self._started_s = time.monotonic()
        now = utc_now()
        self._started_at = now.isoformat(timespec="seconds")
        self._context = self._make_context(stop, disk, new_run_id(now))
        self._compute = compute(self._context)
        self._ledger = self._context.ledger
        self._before = (0, 0, 0)
        self._num_leaving = 0
        self._num_old = 0
        self._planned_at_s = self._started_s
        self._published_at_s: float | None = None
        self._is_busy = False
        end = End(self._options.until, self._options.max_runtime_s, self._started_s)
        stats, commits_s = self._context.stats, self._context.commits_s
        self._deadline = Deadline(stop, end, lambda: estimate_lead(stats.latencies_s, commits_s))
        self.summary: Summary | None = None
        """How the run ended, also where `run` raised."""
        self.at_end: Callable[[Summary], object] = lambda _: None
        """Called once that is written down and before others are told; must not raise."""

    @property
    def death(self) -> str | None:
        """Why the last engine that died did so."""
        return self._context.deaths[-1] if self._context.deaths else None

    def _make_context(self, stop: StopSwitch, disk: Disk | None, run_id: str) -> RunContext:
        job = self._job
        storage = storage_at(job.root, temp_tag=run_id, disk=disk)
        return RunContext(
            job=job,
            run_id=run_id,
            storage=storage,
            ledger=Ledger(storage),
            lock=RunLock(storage, run_id),
            log=RunLog(storage, run_id),
            stats=RunStats(self._started_s, 0),
            stop=stop,
            is_trial=not self._publishes,
            sample=self._sample,
            tries="" if self._sample else None if self._options.fresh else TRIES,
        )

    def run(self) -> Summary:
        """Run to the end, or as far as it goes; then tell whom the job says.

        Raises:
            BatchgenError: Job error, with its exit code. What finished is committed, and the
                run's summary says what happened.
        """
        try:
            with self._deadline, self._holding_job() as decision, self._recording_end():
                with self._waiting():
                    begun = self._claim(decision)
                if isinstance(begun, Summary):
                    return begun
                prepared, epoch = begun
                if not Computation(self._context, self._compute, prepared, epoch).run():
                    return self._stopped()
                if not self._publishes:
                    return self._finish("answered", ExitCode.STOPPED, "run again to publish")
                with self._waiting():
                    return self._publish(prepared, epoch)
        except BatchgenError as error:
            self._is_busy = isinstance(error, BusyError)
            if self.summary is None:
                self.summary = self._summary(state_of(error), error.exit_code, str(error), None)
            raise
        finally:
            if self.summary is not None:
                self.at_end(self.summary)
                self._announce(self.summary)

    def _waiting(self) -> AbstractContextManager[None]:
        """Wait for a store that is away, before and after rows are computed.

        While they are, it is `Committer` that does, so that the engine goes on meanwhile.
        """
        context, grace_s = self._context, self._job.run.disk_grace_s

        def tell(error: StorageError) -> None:
            context.notes.add(f"the store is away and is waited for, {grace_s:.0f} s: {error}")

        return context.storage.patient(grace_s, context.is_stopped, tell)

    @contextmanager
    def _holding_job(self) -> Iterator[Decision]:
        """Decide what there is to do, and hold the job's lock while it is done."""
        context, lock, options = self._context, self._context.lock, self._options
        context.storage.check(STATE)
        with ExitStack() as stack:
            if options.wait:
                lock.wait(context.is_stopped)
                stack.callback(lock.release)
            with self._waiting():
                num_plans = self._ledger.latest_plan_number()
                self._telling_late = partial(
                    self._ledger.telling_late, context.run_id, self._ledger.at_work()
                )
                with self._telling_late():
                    decision = decide(self._ledger, self._job, options)
                lock.acquire(steal=options.steal)
            stack.callback(lock.release)
            stack.callback(self._compute.close)
            with self._recording_end():
                self._check_no_newer_plan(num_plans)
            notes = decision.prepared.notes, decision.notes, tuned_notes(self._job)
            for note in chain.from_iterable(notes):
                context.notes.add(note)
            yield decision

    @contextmanager
    def _recording_end(self) -> Iterator[None]:
        """Write down how the run ended where it ends by an exception."""
        try:
            with naming_tuned(self._job, self._compute), self._telling_late():
                yield
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

    def _claim(self, decision: Decision) -> tuple[Prepared, Epoch] | Summary:
        """Settle on a plan and claim it; or say how the run ends before that."""
        context = self._context
        if context.is_stopped():
            return self._stopped()
        if self._options.fresh:
            context.storage.remove(SERVED)
        start = partial(self._compute.start, decision.prepared)
        hooks = Hooks(context.notes.add, start, context.storage, self._check_not_stopped)
        try:
            begun = begin(self._ledger, self._options, decision, hooks)
        except StoppedError:
            return self._stopped()
        self._num_leaving, self._num_old = begun.leaving.num_rows, begun.old.num
        self._planned_at_s = time.monotonic()
        if (why := begun.nothing_to_do) is not None:
            self.summary = self._summary("nothing_to_do", ExitCode.COMPLETE, why, begun.manifest)
            return self.summary
        epoch = self._ledger.claim(begun.plan, context.run_id, self._who())
        durable = epoch.durable
        self._before = (durable.num_ok, durable.num_errors, durable.num_skipped)
        if begun.plan is not decision.plan:  # Nothing is done yet but what is kept.
            context.taken.num_rows = durable.num_done
        for text in rejected_notes(durable):
            context.notes.add(text)
        context.stats.num_rows = begun.plan.num_rows
        context.stats.num_resumed = durable.num_done
        return begun.prepared, epoch

    def _check_not_stopped(self) -> None:
        if self._context.is_stopped():
            raise StoppedError(f"{self._context.storage.where}: stopped while the input was read")

    def moment(self) -> Moment:
        """Return where the run is; waits for nobody, may be asked from another thread."""
        stats, compute = self._context.stats, self._compute
        return Moment(
            at_s=time.monotonic(),
            facts=compute.facts,
            engine=compute.stats,
            num_in_flight=compute.num_in_flight,
            num_ended=stats.num_results,
            prompt_tokens=stats.prompt_tokens,
            cached_tokens=stats.cached_tokens,
            output_tokens=stats.output_tokens,
        )

    def _stopped(self) -> Summary:
        why = self._deadline.reason or self._context.stop.reason or "on purpose"
        reason = f"{why}, with work left; run again to go on"
        return self._finish("stopped", ExitCode.STOPPED, reason)

    def _publish(self, prepared: Prepared, epoch: Epoch) -> Summary:
        self._compute.let_go()
        manifest = publish(self._ledger, prepared, epoch, anyway=self._options.publish_anyway)
        self._published_at_s = time.monotonic()
        self._compute.close()
        for text in overridden(manifest):
            self._context.notes.add(text)
        keep = self._job.output.keep_snapshots
        if keep := epoch.plan.keeps if keep is None else keep:
            try:
                prune(self._ledger, Keep(keep))
            except (OutputError, StorageError) as error:  # Published it is; the next one prunes.
                self._context.notes.add(f"old snapshots are not removed yet: {error}")
        return self._finish("complete", ExitCode.COMPLETE, manifest=manifest)

    def _who(self) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_at": self._started_at,
            "batchgen": __version__,
            **({} if self._publishes else {"is_trial": True}),
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
        self._advise()
        self.summary = self._summary(state, code, reason, manifest, gate)
        self.summary = replace(self.summary, summary_path=self._context.log.summary_path)
        self._context.log.live({"state": state, "reason": reason})
        self._context.log.finish(self.summary.as_dict())
        return self.summary

    def _files(self, manifest: Manifest) -> list[str]:
        """Names of what readers read."""
        shows = self._context.storage.shows
        return [file.alias if shows else file.name for file in manifest.files]

    def _advise(self) -> None:
        """Say what the run's last sample tells of its settings."""
        samples = self._context.log.samples if self._publishes else ()
        if samples and (text := advise(samples[-1], self._compute.facts)):
            self._context.notes.add(text)
            say(text)

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
        published_s = self._published_at_s
        return Summary(
            state=state,
            exit_code=int(code),
            run_id=context.run_id,
            run_date=self._job.run_date.isoformat(),
            output=self._job.output.path,
            reason=reason,
            **job_counts(manifest, stats, taken, self._before),
            files=self._files(manifest) if manifest else [],
            num_durable=stats.num_resumed + stats.num_committed,
            num_carried=taken.num_rows - taken.num_copied,
            num_copied=taken.num_copied,
            num_old_rendering=self._num_old,
            num_leaving=self._num_leaving,
            gate=[dict(entry) for entry in (manifest.gate if manifest else gate)],
            run=stats.totals(now_s),
            engine=engine_dict(self._compute.facts),
            started_at=self._started_at,
            planned_s=(taken.known_at_s or self._planned_at_s) - self._started_s,
            published_s=published_s - self._started_s if published_s is not None else None,
            elapsed_s=now_s - self._started_s,
            tuned=tuned_dict(self._job.tuned),
            warnings=context.notes.texts + self._compute.warnings,
            error_examples=[],
            num_engine_warnings=context.log.num_engine_warnings(),
            summary_path=None,
        )
