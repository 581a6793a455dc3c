"""How far one driver goes: its real loop, engines in virtual time.

    python -m tests.bench.fleet_driver --replicas 1 8 64 256 --rows 1000000 --pace 20

Real are `Driver` and all below it, the lease book, the deduper, what a run tells of itself
(`live.json`, `stats.parquet`), and where rows come packed the reading and rendering. On paper are
the workers (`sim_worker`) and what carries messages: each exchange takes `--exchange-ms` of the
driver's time. Its own CPU time is added to the virtual time, as if it had a core of its own. A
line for each fleet, which has less rows if they took it more than half an hour:

    ideal      makespan over rows / (replicas x pace); times are from the first engine's start
    bound      over that of one queue for all engines, without delay
    idle_%     engine slots that were empty before their worker's last row was begun; end_% after
    msgs/s     exchanges, each one message there and one back
    turns/s    of the loop
    cpu_s/M    CPU seconds a million rows, of the loop's thread; `feed/M` of the reading thread
    tell_s/M   of these, for `live.json` and `stats.parquet`
    loop_%     of a core, while all engines are full: the loop's thread; busy_% with the exchanges
    feed_%     the same of the reading thread; above 100 the engines wait for it
    book_MiB   the lease book at its largest

    full_at    replicas that would keep one core, or the reading thread, busy all the time: from
               this line and the one before
"""

from __future__ import annotations

import argparse
import gc
import io
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.api.jobs import load
from batchgen.cluster.driver import Driver
from batchgen.cluster.leases import LeaseBook
from batchgen.cluster.workers import ReplicaStats, WorkerPool
from batchgen.core.records import Ranges, RowSet
from batchgen.pipeline.compute import Commits, Monitor, Stages, Work
from batchgen.pipeline.context import RunContext, StopSwitch
from batchgen.pipeline.frozen import freeze
from batchgen.pipeline.prepare import prepare
from batchgen.pipeline.stats import Progress, RunStats
from batchgen.storage import LocalStorage
from batchgen.store.keys import KeySet
from batchgen.store.ledger import Ledger
from batchgen.store.reuse import Deduper
from batchgen.store.runs import RunLock, RunLog
from tests.bench.echo_rows import _write_rows
from tests.bench.fleet_sim import bound_s
from tests.bench.fleet_time import PacedFeeder, TimedCluster, size_of
from tests.bench.sim_worker import EngineKind
from tests.fakes import FACTS

if TYPE_CHECKING:
    from batchgen.pipeline.prepare import Prepared
    from batchgen.store.books import Epoch

FILE_ROWS = 50_000
STARTUP_S = 20.0
MODES = ("reference", "packed", "dedupe")
MOST_S = 1800.0
"""Small fleets get fewer rows than asked for."""


@dataclass
class Bench:
    """One job in a folder, whose input is as long as one likes."""

    folder: Path
    prepared: Prepared

    @classmethod
    def make(cls, folder: Path) -> Bench:
        _write_rows(folder / "in.jsonl", FILE_ROWS)
        job = load(
            {
                "input": {"path": str(folder / "in.jsonl")},
                "prompt": {"system": "Repeat.", "user": "{{ lang }}: {{ text }}"},
                "model": {"backend": "echo"},
                "sampling": {"max_tokens": 64, "temperature": 0},
                "output": {"path": str(folder / "out")},
                "run": {"replicas": 2},
            }
        )
        return cls(folder, prepare(job))

    def epoch(self, ledger: Ledger, num_rows: int) -> Epoch:
        """A claim on the file again and again."""
        plan = freeze(self.prepared, 1)
        (one,) = plan.segments
        whole, rest = divmod(num_rows, FILE_ROWS)
        segments = [one] * whole + [replace(one, num_rows=rest)] * (rest > 0)
        plan = replace(plan, segments=segments)
        ledger.put_plan(plan)
        return ledger.claim(plan, "bench", {})

    def run(self, mode: str, num: int, num_rows: int, args: argparse.Namespace) -> dict[str, float]:
        """One fleet; its figures."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            storage = LocalStorage(Path(name), temp_tag="bench")
            return Drive(self, storage, mode, num, num_rows, args).run()


class _Up:
    """Engines that need not be waited for."""

    is_started = True
    facts = FACTS


class Drive:
    """One fleet on one task."""

    def __init__(
        self,
        bench: Bench,
        storage: LocalStorage,
        mode: str,
        num: int,
        num_rows: int,
        args: argparse.Namespace,
    ) -> None:
        run = bench.prepared.job.run.model_copy(update={"replicas": num})
        job = bench.prepared.job.model_copy(update={"run": run})
        self._prepared, self._mode, self._num, self._num_rows = bench.prepared, mode, num, num_rows
        self._kind = EngineKind(rate=args.pace, capacity=256, startup_s=STARTUP_S, sigma=0.6)
        cluster = self._cluster = TimedCluster(
            self._kind,
            storage,
            message_s=args.exchange_ms / 1e3,
            look=self._look_at_book,
        )
        self._message_s = args.exchange_ms / 1e3
        ledger = Ledger(storage)
        self._epoch = bench.epoch(ledger, num_rows)
        stats = RunStats(cluster.now_s, num_rows)
        replicas = ReplicaStats(stats, clock=cluster.clock)
        self._pool = WorkerPool(
            cluster,
            job,
            "bench",
            stats=replicas,
            tell=print,
            clock=cluster.clock,
        )
        self._context = RunContext(
            job=job,
            run_id="bench",
            storage=storage,
            ledger=ledger,
            lock=RunLock(storage, "bench"),
            log=RunLog(storage, "bench"),
            stats=stats,
            stop=StopSwitch(),
        )
        progress = Progress(num_rows, 0, stream=io.StringIO())
        self._monitor = Monitor(
            self._context,
            lambda now_s: (replicas.whole(now_s), "running", replicas.rows(now_s)),
            progress,
        )
        self._feeder: PacedFeeder | None = None
        self._show_at_s = self._tell_s = self._book_bytes = 0.0
        self._began_s = 0.0

    def run(self) -> dict[str, float]:
        cluster, plan = self._cluster, self._epoch.plan
        rows = RowSet((at, Ranges.until(one.num_rows)) for at, one in enumerate(plan.segments))
        context, ledger = self._context, self._context.ledger
        stages = Stages(self._prepared, plan, ledger, epoch=1, worker=0, run_id="bench")
        commits = Commits(context, self._epoch, stages.writer)
        driver = Driver(
            context,
            Work(self._prepared, self._epoch, stages, commits),
            self._pool,
            deduper=Deduper(KeySet(), KeySet(), "always") if self._mode == "dedupe" else None,
            feed=partial(self._feed, stages),
            is_packed=self._mode == "packed",
        )
        gc.collect()
        self._began_s = cluster.now_s
        cluster.leave()
        self._pool.start_engines()
        assert driver.run(rows, self._tick)
        cluster.enter()
        return self._figures()

    def _tick(self) -> None:
        now_s = self._cluster.clock()
        if now_s >= self._show_at_s:
            self._show_at_s = now_s + 2.0
            began_s = time.thread_time()
            self._monitor.show(now_s, is_last=False)
            self._tell_s += time.thread_time() - began_s

    def _feed(self, stages: Stages, rows: RowSet) -> Any:
        feeder = stages.feeder(stages.feed(stages.read(rows), None), _Up())
        self._feeder = PacedFeeder(feeder, self._cluster)
        return self._feeder

    def _look_at_book(self) -> None:
        books = [found for found in gc.get_objects() if isinstance(found, LeaseBook)]
        self._book_bytes = max([self._book_bytes, *map(size_of, books)])

    def _figures(self) -> dict[str, float]:
        cluster, num, num_rows, kind = self._cluster, self._num, self._num_rows, self._kind
        workers = list(cluster.workers.values())
        first_s = min(worker.up_s for worker in workers)
        ended_s = max(worker.last_ended_s for worker in workers)
        makespan_s, whole_s = ended_s - first_s, cluster.now_s - self._began_s
        num_asked = sum(worker.num_ended for worker in workers)
        slots_s = kind.capacity * num * makespan_s
        at_end_s = sum(
            worker.idle_at_end_s + kind.capacity * (ended_s - worker.now_s) for worker in workers
        )
        feed_s = self._feeder.cpu_s if self._feeder is not None else 0.0
        rows_s = num * kind.rate
        loop = cluster.driver_s / num_rows * rows_s
        million = num_rows / 1e6
        bound = bound_s([kind] * num, num_asked) - kind.startup_s
        return {
            "rows/1e6": million,
            "makespan_s": makespan_s,
            "ideal": makespan_s / (num_asked / num / kind.rate),
            "bound": makespan_s / bound,
            "idle_%": 100 * sum(worker.idle_slot_s for worker in workers) / slots_s,
            "end_%": 100 * at_end_s / slots_s,
            "msgs/s": cluster.num_reports / whole_s,
            "turns/s": cluster.num_turns / whole_s,
            "cpu_s/M": cluster.driver_s / million,
            "tell_s/M": self._tell_s / million,
            "feed/M": feed_s / million,
            "loop_%": 100 * loop,
            "busy_%": 100 * (loop + self._message_s * cluster.num_reports / whole_s),
            "feed_%": 100 * feed_s / num_rows * rows_s,
            "book_MiB": self._book_bytes / 2**20,
        }


def main() -> None:
    """Print a line for each fleet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=0.0, help="more rows, to last so long")
    parser.add_argument("--pace", type=float, default=20.0, help="rows/s of an engine")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--exchange-ms", type=float, default=1.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench.make(Path(name))
        print(f"{'fleet':24}", end="")
        is_told = False
        for mode in args.modes:
            before: tuple[int, float] | None = None
            for num in args.replicas:
                least, most = (int(num * args.pace * s) for s in (args.seconds, MOST_S))
                num_rows = min(max(args.rows, least), most)
                figures = bench.run(mode, num, num_rows, args)
                if not is_told:
                    print("".join(f"{key:>11}" for key in [*figures, "full_at"]))
                    is_told = True
                busy, feed = figures["busy_%"] / 100, figures["feed_%"] / 100
                full_at = num / max(busy, feed)
                if before is not None and busy > before[1]:
                    a_replica = max((busy - before[1]) / (num - before[0]), 1e-9)
                    full_at = min(num + (1 - busy) / a_replica, num / max(feed, 1e-9))
                before = (num, busy)
                line = "".join(f"{value:11.2f}" for value in figures.values())
                print(f"{num:>4} x {args.pace:g}/s {mode:12}{line}{full_at:11.0f}", flush=True)


if __name__ == "__main__":
    main()
