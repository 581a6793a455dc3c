"""`ManyEngines`: computes a job's rows by many workers, wherever there is room for them."""

from __future__ import annotations

import time
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from batchgen.cluster.driver import Driver
from batchgen.cluster.machines import resources_of, share_gpu
from batchgen.cluster.workers import ReplicaStats, WorkerPool
from batchgen.core.errors import ConfigError
from batchgen.pipeline.compute import watching
from batchgen.pipeline.stats import RUNNING

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchgen.cluster.messages import Cluster
    from batchgen.core.records import EngineFacts, EngineStats
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.compute import Rows, TakeOver, Work
    from batchgen.pipeline.context import RunContext
    from batchgen.pipeline.prepare import Prepared
    from batchgen.pipeline.runner import Feeder
    from batchgen.pipeline.stats import Look
    from batchgen.store.reuse import Deduper


def ray_cluster(job: JobConfig) -> Cluster:
    """Connect to Ray, or start it on this machine.

    Raises:
        ConfigError: Ray is not installed.
        EngineError: There is no cluster at that address.
    """
    run = job.run
    if find_spec("ray") is None:
        told = f"replicas = {run.replicas}"
        if run.ray_address is not None:
            told = f"ray_address = {run.ray_address!r}"
        where = "[run]"
        raise ConfigError(where, [f"{told} needs Ray: pip install ray"])
    from batchgen.cluster.ray import RayCluster

    room_for = 0 if run.replicas == "auto" else run.replicas
    return RayCluster(run.ray_address, resources_of(job), room_for=room_for)


class ManyEngines:
    """`Compute` by the workers of one run: started when it is sure that there is work."""

    def __init__(
        self,
        context: RunContext,
        *,
        connect: Callable[[JobConfig], Cluster] = ray_cluster,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bind; nothing is started.

        Args:
            context: The run.
            connect: Makes what places workers.
            clock: Monotonic seconds.

        Raises:
            ConfigError: Replicas of a size that cannot be had.
        """
        self._context = context
        self._job = share_gpu(context.job, resources_of(context.job))
        self._connect = connect
        self._clock = clock
        self._replicas = ReplicaStats(context.stats, clock=clock)
        self._pool: WorkerPool | None = None

    @property
    def is_started(self) -> bool:
        """Whether workers were ever asked for."""
        return self._pool is not None

    @property
    def facts(self) -> EngineFacts | None:
        """What one of the engines is; None until one is up."""
        return self._pool.facts if self._pool is not None else None

    @property
    def stats(self) -> EngineStats:
        """The sums and means of what all schedulers tell."""
        return self._replicas.engines()

    @property
    def num_in_flight(self) -> int:
        """Requests that all engines hold."""
        return self._replicas.num_in_flight

    @property
    def warnings(self) -> list[str]:
        """Empty: all is noted as it comes."""
        return []

    def start(self, prepared: Prepared) -> None:
        """Begin to bring up all workers and their engines. See `Compute`.

        Raises:
            BatchgenError: There is nothing to place them.
        """
        del prepared  # Each worker prepares the job where it is.
        self._workers().start_engines()

    def _workers(self) -> WorkerPool:
        if self._pool is None:
            self._pool = WorkerPool(
                self._connect(self._job),
                self._job,
                self._context.run_id,
                stats=self._replicas,
                tell=self._context.notes.add,
                clock=self._clock,
            )
        return self._pool

    def answer(
        self, work: Work, rows: Rows, deduper: Deduper | None, take_over: TakeOver | None = None
    ) -> bool:
        """Lease the rows to workers. See `Compute`; rows are taken over first."""
        context = self._context
        if take_over is not None:
            rows = take_over(lambda: None)
        if context.is_stopped() or not rows:
            return not context.is_stopped()
        driver = Driver(
            context,
            work,
            self._workers(),
            deduper=deduper,
            feed=partial(self._feed, work, deduper),
            is_packed=self._is_packed(work, rows),
        )
        with watching(context, self._look) as monitor:
            return driver.run(rows, monitor.tick)

    def _look(self, now_s: float) -> Look:
        state = RUNNING if self.facts is not None else "starting the engines"
        return self._replicas.whole(now_s), state, self._replicas.rows(now_s)

    def _is_packed(self, work: Work, rows: Rows) -> bool:
        """Whether rows travel by way of the driver.

        For an order over the whole job; or where a worker would have to read a file from its
        start for each lease.
        """
        if self._context.job.run.order == "prefix":
            return True
        reader, segments = work.prepared.reader, work.epoch.plan.segments
        return not all(reader.is_seekable(segments[number].path) for number in rows)

    def _feed(self, work: Work, deduper: Deduper | None, rows: Rows) -> Feeder:
        stages = work.stages
        passing = deduper.passing if deduper is not None else None
        return stages.feeder(stages.feed(stages.read(rows), passing), self)

    def advice(self) -> list[str]:
        """Empty: the samples are of all engines together."""
        return []

    def let_go(self) -> None:
        """Nothing yet: Ray wants to be closed by the thread that has started it."""

    def close(self) -> None:
        """Let go of all workers. Idempotent."""
        if self._pool is not None:
            self._pool.cluster.close()
