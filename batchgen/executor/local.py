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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen import __version__, planning
from batchgen.engine.start import start_engine
from batchgen.errors import (
    AccountingError,
    BatchgenError,
    ExitCode,
    GateError,
    OutputError,
    RecipeChangedError,
)
from batchgen.executor.lock import RunLock
from batchgen.ledger import STATE, Durable, Epoch, Ledger, Manifest, Plan
from batchgen.progress import Progress
from batchgen.prompts import RequestBuilder
from batchgen.ranges import Ranges
from batchgen.records import EngineSpec
from batchgen.runlog import RunLog, new_run_id, utc_now
from batchgen.runner import Committer, Feeder, OpenPart, Runner, StopSwitch
from batchgen.sink.parts import PartContext, PartWriter
from batchgen.sink.publish import SnapshotFormat, write_snapshot
from batchgen.stats import RunStats
from batchgen.storage import LocalStorage

if TYPE_CHECKING:
    from batchgen.config.model import JobConfig
    from batchgen.engine.base import Engine
    from batchgen.planning import Prepared

_LIVE_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended."""

    state: str
    """complete, nothing_to_do, stopped, over_limit, fault."""
    exit_code: int
    run_id: str
    output: str
    reason: str | None = None
    """One line, for every state but complete."""
    num_planned: int = 0
    num_ok: int = 0
    num_errors: int = 0
    num_skipped: int = 0
    num_left: int = 0
    files: list[str] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    """Totals of this run alone, see `RunStats.totals`."""
    engine: dict[str, Any] = field(default_factory=dict)
    started_at: str = ""
    elapsed_s: float = 0.0
    warnings: list[str] = field(default_factory=list)
    summary_path: str | None = None


class LocalRun:
    """One execution of a job. Use once: `LocalRun(...).run()`."""

    def __init__(self, job: JobConfig, *, fresh: bool, stop: StopSwitch) -> None:
        """Bind; nothing is touched yet.

        Args:
            job: As loaded.
            fresh: Begin a new plan even if the old one is unfinished or another recipe's.
            stop: Asked by whoever wants the run to end early.
        """
        self._job = job
        self._fresh = fresh
        self._stop = stop
        self._started_s = time.monotonic()
        now = utc_now()
        self._started_at = now.isoformat(timespec="seconds")
        self._run_id = new_run_id(now)
        root = Path(job.output.path)
        _refuse_foreign(root)
        self._storage = LocalStorage(root, temp_tag=self._run_id)
        self._ledger = Ledger(self._storage)
        self._log = RunLog(self._storage, f"{STATE}/runs", self._run_id)
        self._stats = RunStats(self._started_s, 0)
        self._engine: Engine | None = None
        self._warnings: list[str] = []

    def run(self) -> Summary:
        """Run to the end, or as far as it goes.

        Raises:
            BatchgenError: Job trouble, with its exit code. What finished is committed, and the
                run's summary says what happened.
        """
        prepared = planning.prepare(self._job)
        with ExitStack() as stack:
            stack.enter_context(RunLock(self._storage, f"{STATE}/lock", self._run_id))
            try:
                return self._run(prepared, stack)
            except BatchgenError as error:
                state = "over_limit" if isinstance(error, GateError) else "fault"
                self._finish(state, error.exit_code, reason=str(error))
                raise

    def _run(self, prepared: Prepared, stack: ExitStack) -> Summary:
        plan = self._current_plan(prepared)
        if plan is not None and (manifest := self._ledger.manifest(plan.number)) is not None:
            self._expose(manifest)
            reason = f"already complete, published by run {manifest.run_id}"
            return self._summary("nothing_to_do", ExitCode.COMPLETE, manifest, reason=reason)
        if plan is None or self._ledger.durable(plan).num_done < plan.num_rows:
            self._engine = start_engine(engine_spec(prepared, self._log.engine_log))
            stack.callback(self._engine.close)
        if plan is None:
            latest = self._ledger.latest_plan()
            plan = planning.freeze(prepared, latest.number + 1 if latest else 1)
            self._ledger.put_plan(plan)
        epoch = self._ledger.claim(plan, self._run_id, self._who())
        for name, why in epoch.durable.rejected.items():
            self._warnings.append(f"{name} does not count ({why}); its rows are done again")
        if not self._work(prepared, epoch):
            reason = "stopped on purpose with work left; run again to go on"
            return self._finish("stopped", ExitCode.STOPPED, reason=reason)
        if self._engine is not None:
            self._engine.close()
        return self._publish(prepared, epoch)

    def _current_plan(self, prepared: Prepared) -> Plan | None:
        """The plan to go on with; None if a new one is to be made."""
        plan = self._ledger.latest_plan()
        if plan is None or self._fresh:
            return None
        changes = planning.changes(plan, prepared)
        new_files = planning.new_files(plan, prepared)
        if new_files and self._ledger.manifest(plan.number) is not None:
            changes += [f"input: {path} is new" for path in new_files]
        elif new_files:
            self._warnings.append(f"{len(new_files)} input files came after the plan: not in it")
        if changes:
            raise RecipeChangedError(self._job.output.path, changes)
        return plan

    def _who(self) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_at": self._started_at,
            "batchgen": __version__,
        }

    def _work(self, prepared: Prepared, epoch: Epoch) -> bool:
        """Compute what is missing; return whether nothing is missing any more."""
        todo = missing(epoch.plan, epoch.durable)
        self._stats.num_rows = epoch.plan.num_rows
        self._stats.num_resumed = epoch.durable.num_done
        if not todo:
            return True
        assert self._engine is not None  # noqa: S101 - started whenever rows are missing
        seed = None if self._job.sampling.temperature == 0 else self._job.sampling.seed
        builder = RequestBuilder(prepared.builder, epoch.plan.recipe_fingerprint, seed)
        feeder = Feeder(planning.read_rows(prepared, epoch.plan, todo), builder)
        writer = PartWriter(self._storage, f"{STATE}/parts", self._part_context(prepared, epoch))
        committer = Committer(lambda part: self._commit(part, writer, epoch))
        runner = Runner(
            self._engine,
            feeder,
            committer,
            self._stats,
            config=self._job.run,
            clock=time.monotonic,
        )
        with Progress(epoch.plan.num_rows, epoch.durable.num_done) as progress:
            ticker = _Ticker(runner, self._stats, self._engine, self._log, self._job, progress)
            try:
                complete = runner.run(self._stop, ticker.tick)
            finally:
                feeder.close()
                ticker.last()
        num_todo = sum(len(rows) for rows in todo.values())
        num_ended = self._stats.num_results + self._stats.num_skipped
        if complete and num_ended != num_todo:
            msg = f"{num_todo} rows were to do, {num_ended} have ended; not published"
            raise AccountingError(msg)
        return complete

    def _part_context(self, prepared: Prepared, epoch: Epoch) -> PartContext:
        return PartContext(
            plan_id=epoch.plan.plan_id,
            epoch=epoch.number,
            worker=0,
            run_id=self._run_id,
            schema=prepared.part_schema,
            prefix=self._job.output.prefix,
        )

    def _commit(self, part: OpenPart, writer: PartWriter, epoch: Epoch) -> None:
        """Runs in the committer's thread."""
        self._ledger.check_fence(epoch)
        writer.commit(part.results, part.skipped, self._engine_facts())
        self._stats.num_committed += len(part.results)
        self._stats.num_parts += 1

    def _engine_facts(self) -> dict[str, Any]:
        facts = self._engine.facts if self._engine is not None else None
        known = (
            {"engine": facts.name, "version": facts.version, "device": facts.device}
            if facts
            else {}
        )
        return {"batchgen": __version__, **known}

    def _publish(self, prepared: Prepared, epoch: Epoch) -> Summary:
        """Prove the books from what is on disk, then write the snapshot and its manifest."""
        plan = epoch.plan
        durable = self._ledger.durable(plan)
        if durable.num_done != plan.num_rows:
            self._ledger.check_fence(epoch)
            msg = f"{plan.num_rows} rows planned, {durable.num_done} durable; not published"
            raise AccountingError(msg)
        num_ok = sum(part.footer.num_ok for part in durable.parts)
        num_errors = sum(part.footer.num_errors for part in durable.parts)
        self._check_error_limit(num_ok, num_errors)
        for segment in plan.segments:
            planning.check_unchanged(segment, prepared.reader)
        folder = f"{STATE}/snapshots/e{epoch.number:06d}"
        files = write_snapshot(
            self._storage,
            folder,
            [(part.name, part.footer) for part in durable.parts],
            self._snapshot_format(prepared, plan),
        )
        self._ledger.check_fence(epoch)
        manifest = self._ledger.put_manifest(
            Manifest(
                number=plan.number,
                plan_id=plan.plan_id,
                run_id=self._run_id,
                created_at=utc_now().isoformat(timespec="seconds"),
                files=files,
                num_planned=plan.num_rows,
                num_ok=num_ok,
                num_errors=num_errors,
                num_skipped=plan.num_rows - num_ok - num_errors,
            )
        )
        self._expose(manifest)
        self._ledger.remove_unneeded(epoch)
        return self._finish("complete", ExitCode.COMPLETE, manifest=manifest)

    def _check_error_limit(self, num_ok: int, num_errors: int) -> None:
        limit = self._job.run.max_error_rate
        num_results = num_ok + num_errors
        if num_results and num_errors / num_results > limit:
            common = ", ".join(f"{kind} {n}" for kind, n in self._stats.error_types.most_common(3))
            detail = f" (in this run: {common})" if common else ""
            msg = (
                f"{num_errors:,} of {num_results:,} rows are errors{detail}, over "
                f"run.max_error_rate = {limit:g}; nothing published. See them with "
                "`batchgen show --errors`; to publish all the same, raise the limit and run again"
            )
            raise GateError(msg)

    def _snapshot_format(self, prepared: Prepared, plan: Plan) -> SnapshotFormat:
        facts = self._engine_facts()
        metadata = {
            "batchgen.version": __version__,
            "batchgen.plan": plan.plan_id,
            "batchgen.recipe": plan.recipe_fingerprint,
            "batchgen.run": self._run_id,
            "batchgen.model": self._job.model.name,
            "batchgen.engine": f"{facts.get('engine', '')} {facts.get('version', '')}".strip(),
        }
        return SnapshotFormat(
            schema=prepared.part_schema,
            prefix=self._job.output.prefix,
            compression=self._job.output.compression,
            rows_per_file=self._job.output.rows_per_file,
            metadata={key.encode(): value.encode() for key, value in metadata.items()},
        )

    def _expose(self, manifest: Manifest) -> None:
        """Show the newest snapshot as `part-*.parquet` in the output folder itself."""
        aliases = []
        for file in manifest.files:
            alias = file["name"].rpartition("/")[2]
            self._storage.expose(file["name"], alias)
            aliases.append(alias)
        for name in self._storage.list(""):
            if name.startswith("part-") and name not in aliases:
                self._storage.remove(name)

    def _finish(
        self,
        state: str,
        code: ExitCode,
        *,
        reason: str | None = None,
        manifest: Manifest | None = None,
    ) -> Summary:
        summary = self._summary(state, code, manifest, reason=reason)
        self._log.live({"state": state, "reason": reason})
        self._log.finish({name: getattr(summary, name) for name in summary.__slots__})
        return summary

    def _summary(
        self, state: str, code: ExitCode, manifest: Manifest | None, *, reason: str | None
    ) -> Summary:
        now_s = time.monotonic()
        facts = self._engine.facts if self._engine is not None else None
        stats = self._stats
        counts = {
            "num_planned": manifest.num_planned if manifest else stats.num_rows,
            "num_ok": manifest.num_ok if manifest else stats.num_ok,
            "num_errors": manifest.num_errors if manifest else stats.num_errors,
            "num_skipped": manifest.num_skipped if manifest else stats.num_skipped,
            "num_left": 0 if manifest else stats.num_left,
        }
        return Summary(
            state=state,
            exit_code=int(code),
            run_id=self._run_id,
            output=self._job.output.path,
            reason=reason,
            **counts,
            files=[file["name"].rpartition("/")[2] for file in manifest.files] if manifest else [],
            run=stats.totals(now_s),
            engine={name: getattr(facts, name) for name in facts.__slots__} if facts else {},
            started_at=self._started_at,
            elapsed_s=now_s - self._started_s,
            warnings=self._warnings,
            summary_path=str(self._storage.path(f"{STATE}/runs/{self._run_id}/summary.json")),
        )


class _Ticker:
    """What happens beside the work, at its own pace: progress, live view, samples."""

    def __init__(
        self,
        runner: Runner,
        stats: RunStats,
        engine: Engine,
        log: RunLog,
        job: JobConfig,
        progress: Progress,
    ) -> None:
        self._runner = runner
        self._stats = stats
        self._engine = engine
        self._log = log
        self._every_s = job.run.stats_s
        self._progress = progress
        self._next_s = 0.0
        self._next_sample_s = time.monotonic() + self._every_s

    def tick(self) -> None:
        """Called at every turn of the loop; does something every `_LIVE_EVERY_S` or so."""
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + _LIVE_EVERY_S
            self._show(now_s)

    def last(self) -> None:
        """The state at the end."""
        self._next_sample_s = 0.0
        self._show(time.monotonic())

    def _show(self, now_s: float) -> None:
        stats = self._stats
        sample = stats.sample(now_s, self._runner.num_in_flight, self._engine.stats)
        eta_s = stats.eta_s(now_s)
        self._progress.update(sample, stats.num_rows - stats.num_left, eta_s)
        state = "running" if self._engine.facts is not None else "starting the engine"
        live = {"state": state, "num_rows": stats.num_rows, "num_left": stats.num_left}
        self._log.live({**live, "eta_s": eta_s, **sample})
        if now_s >= self._next_sample_s:
            self._next_sample_s = now_s + self._every_s
            self._log.sample(sample)


def missing(plan: Plan, durable: Durable) -> dict[int, Ranges]:
    """Segment -> rows that no accepted part accounts for; segments with none left out."""
    todo = {
        number: Ranges.until(segment.num_rows) - durable.done(number)
        for number, segment in enumerate(plan.segments)
    }
    return {number: rows for number, rows in todo.items() if rows}


def engine_spec(prepared: Prepared, log_path: str | None) -> EngineSpec:
    """What the engine needs to know of the job."""
    model, prompt = prepared.job.model, prepared.job.prompt
    names = {"dtype", "quantization", "max_model_len", "max_num_seqs", "gpu_memory_utilization"}
    names |= {"tensor_parallel_size", "trust_remote_code"}
    kwargs = model.model_dump(include=names, exclude_none=True, exclude_defaults=True)
    template = prompt.chat_template_file
    return EngineSpec(
        backend=model.backend,
        model=prepared.model.path,
        model_kwargs={**kwargs, **model.engine},
        sampling_params=prepared.job.sampling.model_dump(exclude={"seed"}, exclude_none=True),
        chat_template=Path(template).read_text(encoding="utf-8") if template else None,
        chat_template_kwargs=prompt.chat_template_kwargs,
        log_path=log_path,
        max_in_flight=prepared.job.run.max_in_flight,
    )


def _refuse_foreign(root: Path) -> None:
    """An output folder is ours, empty or absent."""
    if root.exists() and not root.is_dir():
        msg = f"{root}: is a file, expected a folder; choose another output.path"
        raise OutputError(msg)
    if root.is_dir() and not (root / STATE).is_dir() and any(root.iterdir()):
        msg = f"{root}: holds files that are not batchgen's; choose another output.path"
        raise OutputError(msg)
