"""`Replica`: one worker of a fleet, in a process of its own, spoken to by `exchange`.

Two threads: whoever calls `exchange`, and the one that owns the engine and runs the same loop as a
run on one machine does. Leases come one after the other into one inbox, and the feeder reads on
from one to the next, so that no engine idles at a lease's end.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen import __version__
from batchgen.cluster.mail import Mail
from batchgen.cluster.messages import (
    Begin,
    EngineDied,
    Failed,
    Finish,
    Finished,
    Halt,
    Look,
    Ready,
    Report,
    StartEngine,
    Take,
)
from batchgen.cluster.session import Session
from batchgen.core.errors import BatchgenError, ConfigError, OutputError, RecipeChangedError
from batchgen.engine.process import build_engine
from batchgen.engine.supervised import SupervisedEngine
from batchgen.pipeline.context import Stop, StopSwitch
from batchgen.pipeline.frozen import input_changes
from batchgen.pipeline.prepare import check
from batchgen.pipeline.run_stats import RunStats
from batchgen.pipeline.stages import Stages
from batchgen.storage import LocalStorage
from batchgen.store.books import Durable, Epoch, numbered
from batchgen.store.ledger import Ledger
from batchgen.store.runs import RunLog, memory_mib

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.cluster.messages import Badge, Order
    from batchgen.core.records import EngineSpec
    from batchgen.engine.death import EngineDeath
    from batchgen.engine.supervised import Build
    from batchgen.pipeline.feeder import FeedBatch

_LOOK_S = 0.2
_CLOSE_S = 10.0
_LATENCIES = 50


class Replica:
    """See the module. Made where the worker is to be."""

    def __init__(
        self,
        badge: Badge,
        *,
        fetch: Callable[[Any], Sequence[FeedBatch]],
        build: Build = build_engine,
    ) -> None:
        """Look at the job; nothing is started but a thread.

        Args:
            badge: Who we are.
            fetch: Brings what a lease's payload stands for.
            build: Builds the engine.

        Raises:
            ConfigError: This machine has another batchgen, or not the job's model.
        """
        self._where = f"worker {badge.number} on {socket.gethostname()}"
        if badge.version != __version__:
            told = f"batchgen {__version__} is installed here, the driver has {badge.version}"
            raise ConfigError(self._where, [f"{told}; install the same on every node"])
        self._badge = badge
        self._fetch = fetch
        tag = f"{badge.run_id}-w{badge.number:02d}"
        storage = LocalStorage(Path(badge.job.output.path), temp_tag=tag)
        self._ledger = Ledger(storage)
        self._log = RunLog(storage, badge.run_id)
        self._checked = check(badge.job)
        self._engine = SupervisedEngine(
            build, self._engine_spec, on_death=self._tell_death, stall_s=badge.job.run.stall_s
        )
        self._stop = StopSwitch()
        self._stats = RunStats(time.monotonic(), 0)
        self._mail = Mail()
        self._stages: Stages | None = None
        self._session: Session | None = None
        self._counted = self._count()
        self._counted_s = 0.0
        self._thread = threading.Thread(target=self._work, name="replica", daemon=True)
        self._thread.start()

    def exchange(self, orders: Sequence[Order], wait_s: float) -> Report:
        """Take orders, and report once something has happened, at the latest after `wait_s`.

        Raises:
            BaseException: What the worker's own thread died of, a bug.
        """
        for order in orders:
            if isinstance(order, Halt):
                self._halt(order)
            else:
                self._mail.hear(order)
        events = self._mail.collect(wait_s)
        return Report(events, self._look())

    def close(self) -> None:
        """Stop at once and let go of the engine. Idempotent."""
        self._stop.now()
        self._thread.join(_CLOSE_S)
        self._engine.close()

    def _halt(self, order: Halt) -> None:
        if order.state is Stop.NOW:
            self._stop.now()
        elif order.is_patient:
            self._stop.drain()
        elif self._stop.state is Stop.NO:
            self._stop.ask()

    def _is_stopped(self) -> bool:
        return self._stop.state is not Stop.NO

    # The worker's own thread.

    def _work(self) -> None:
        try:
            while (order := self._mail.next_order(self._is_stopped)) is not None:
                self._follow(order)
            self._mail.say(Finished(is_complete=False))
        except BatchgenError as error:
            self._mail.say(Failed(error))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._mail.say_crash(error)

    def _follow(self, order: Order) -> None:
        if isinstance(order, StartEngine):
            self._engine.start()
        elif isinstance(order, Begin):
            self._session = self._make_session(order)
        elif isinstance(order, Take):
            assert self._session is not None  # noqa: S101 - `Begin` comes first
            try:
                is_complete = self._session.run(
                    order.lease, self._engine, self._stats, self._stop, self._tick
                )
            finally:
                self._counted = self._count()
            if is_complete:  # Else it was stopped, and that is told in the end.
                self._mail.say(Finished(is_complete=True))
        elif isinstance(order, Finish):
            self._mail.say(Finished(is_complete=True))

    def _make_session(self, begin: Begin) -> Session:
        """Bind to a plan, once it is sure that this machine sees what the driver sees."""
        ledger = self._ledger
        if ledger.storage.read(numbered("epochs", begin.epoch)) is None:
            msg = (
                f"{self._where}: {ledger.storage.where} is not the folder that the driver sees; "
                "set output.path to one that all nodes share"
            )
            raise OutputError(msg)
        if changes := self._checked.changes(begin.plan):
            raise RecipeChangedError(self._where, changes, is_finished=False)
        prepared = self._checked.with_plan(begin.plan)
        number, run_id = self._badge.number, self._badge.run_id
        if self._stages is None:  # One for all tasks: its parts are numbered through.
            self._stages = Stages(
                prepared, begin.plan, ledger, epoch=begin.epoch, worker=number, run_id=run_id
            )
        epoch = Epoch(begin.epoch, begin.plan, run_id, Durable())
        self._mail.say(Ready(not input_changes(begin.plan, prepared.reader)))
        return Session(
            self._stages,
            epoch,
            ledger,
            self._mail,
            number=number,
            asks=begin.asks,
            is_packed=begin.is_packed,
            fetch=self._fetch,
        )

    def _engine_spec(self) -> EngineSpec:
        return self._checked.engine_spec(self._log.engine_log_of(self._badge.number))

    def _tell_death(self, death: EngineDeath) -> None:
        self._mail.say(EngineDied(death.as_dict()))

    # What the driver sees.

    def _tick(self) -> None:
        now_s = time.monotonic()
        if now_s - self._counted_s >= _LOOK_S:
            self._counted_s = now_s
            self._counted = self._count()

    def _look(self) -> Look:
        """Counts as the worker's thread has last seen them, and the engine as it is now."""
        engine = self._engine
        return self._counted._replace(
            facts=engine.facts,
            capacity=engine.capacity,
            num_in_flight=engine.num_in_flight,
            engine=engine.stats,
            memory_mib=memory_mib(),
        )

    def _count(self) -> Look:
        stats, engine = self._stats, self._engine
        return Look(
            host=socket.gethostname(),
            pid=os.getpid(),
            facts=engine.facts,
            capacity=engine.capacity,
            num_in_flight=engine.num_in_flight,
            engine=engine.stats,
            num_ok=stats.num_ok,
            num_errors=stats.num_errors,
            num_skipped=stats.num_skipped,
            prompt_tokens=stats.prompt_tokens,
            cached_tokens=stats.cached_tokens,
            output_tokens=stats.output_tokens,
            num_retries=stats.num_retries,
            error_types=dict(stats.error_types),
            verdicts={
                attempt: {verdict.value: num for verdict, num in found.items()}
                for attempt, found in stats.verdicts.items()
            },
            rates=stats.rates(time.monotonic()),
            latencies_s=list(stats.latencies_s)[-_LATENCIES:],
            memory_mib=None,
        )
