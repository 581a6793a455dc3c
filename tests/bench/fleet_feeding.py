"""Several replicas against one: same rows, same engine options, one machine.

    python -m tests.bench.fleet_feeding --shape 0.6b --work label=12000 --replicas 1 2 \
        --gpus-per-replica 1 --tokenizer DIR --prompts FILE --repeats 3

Times are as in `feeding`: from the start of a run to the moment when its snapshot can be read, with
engines that are up: workers and their engines are kept from run to run, as many as the largest
number asks for; a run with fewer leaves the others idle. `--gpus-per-replica 0.5` puts two replicas
on one GPU. Prints one JSON line a run, then medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from batchgen.api.jobs import load
from batchgen.cluster.driver import ManyEngines
from batchgen.cluster.machines import resources_of
from batchgen.cluster.messages import Report, StartEngine
from batchgen.cluster.ray import RayCluster
from batchgen.cluster.worker import Worker
from batchgen.engine.devices import device_name
from batchgen.engine.process import EngineProcess
from batchgen.engine.vllm.settings import is_cpu_build
from batchgen.pipeline.context import StopSwitch
from batchgen.pipeline.job_run import JobRun
from batchgen.store.books import STATE
from tests.bench import works
from tests.bench.feeding import KEYS, LOADING, make_work
from tests.bench.random_model import make_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from batchgen.cluster.messages import Gone, Order, WorkerInit
    from batchgen.core.records import EngineSpec
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.runner import FeedBatch
    from tests.bench.works import Work


WARM_UP_ROWS = 300


class KeptEngine(EngineProcess):
    """One engine for many runs."""

    def close(self) -> None:
        """Not yet."""

    def end(self) -> None:
        """Now."""
        super().close()


class Rebadge(NamedTuple):
    """Become another worker, with the same engine."""

    badge: WorkerInit


class KeptReplica:
    """A replica whose engine outlives it."""

    def __init__(self, badge: WorkerInit, *, fetch: Callable[[Any], Sequence[FeedBatch]]) -> None:
        self._fetch = fetch
        self._engine: KeptEngine | None = None
        self._replica = self._become(badge)

    def _become(self, badge: WorkerInit) -> Worker:
        return Worker(badge, fetch=self._fetch, build=self._build)

    def _build(self, spec: EngineSpec) -> KeptEngine:
        if self._engine is None:
            self._engine = KeptEngine(spec)
        return self._engine

    def exchange(self, orders: Sequence[Any], wait_s: float) -> Report:
        for order in orders:
            if isinstance(order, Rebadge):
                self._replica.close()
                self._replica = self._become(order.badge)
        return self._replica.exchange([o for o in orders if not isinstance(o, Rebadge)], wait_s)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.end()


class KeptCluster(RayCluster):
    """Workers for one run after another; nobody is heard before all engines are up."""

    def __init__(self, job: JobConfig, num_replicas: int) -> None:
        super().__init__(None, resources_of(job), room_for=num_replicas, make=KeptReplica)
        self._num_replicas = num_replicas
        self._actors: dict[int, int] = {}
        """Worker -> number of its first worker."""
        self._of: dict[int, int] = {}
        """Number of a worker now -> of its first."""
        self._new: dict[int, WorkerInit] = {}
        self._held: dict[int, Report] = {}
        self.up_at_s: float | None = None

    def start(self, badge: WorkerInit) -> None:
        first = self._actors.get(badge.replica)
        if first is None:
            self._actors[badge.replica] = first = badge.number
            super().start(badge)
        else:
            self._new[badge.number] = badge
        self._of = {now: then for now, then in self._of.items() if then != first}
        self._of[badge.number] = first

    def exchange(self, number: int, orders: Sequence[Order], wait_s: float) -> None:
        badge = self._new.pop(number, None)
        first: list[Any] = [Rebadge(badge)] if badge is not None else []
        super().exchange(self._of[number], [*first, *orders], wait_s)

    def wait(self, timeout_s: float) -> Sequence[tuple[int, Report | Gone]]:
        now = {then: number for number, then in self._of.items()}
        news = super().wait(timeout_s)
        if self.up_at_s is not None:
            return [(now[number], one) for number, one in news]
        for number, one in news:
            assert isinstance(one, Report), one
            self._held[number] = one
            if one.look is None or one.look.facts is None:
                super().exchange(number, [StartEngine()], 0.2)
        is_up = [one.look is not None and one.look.facts is not None for one in self._held.values()]
        if sum(is_up) < self._num_replicas:
            return []
        self.up_at_s = time.monotonic()
        return [(now[number], one) for number, one in self._held.items()]

    def silent_s(self, number: int) -> float:
        return 0.0

    def kill(self, number: int) -> None:
        if number in self._started and number not in self._of:
            super().kill(number)

    def close(self) -> None:
        """Not yet."""

    def end(self) -> None:
        """Now."""
        self._of.clear()
        super().close()


def main() -> None:
    """Time every number of replicas."""
    args = _arguments()
    questions = works.read_questions(args.prompts)
    jobs = [make_work(name, questions) for name in args.work]
    seen: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model or make_model(folder / "model", args.shape, args.tokenizer)
        cluster: KeptCluster | None = None

        def kept(job: JobConfig) -> KeptCluster:
            nonlocal cluster
            cluster = cluster or KeptCluster(job, max(args.replicas))
            return cluster

        for work, number, system in _repeated(jobs, args.repeats):
            for num_replicas in sorted(args.replicas, reverse=True):  # All start with the first.
                own = f"By {num_replicas}. {system}"  # Not in the prefix cache.
                figures = _run(args, model, work, own, num_replicas, kept, folder / "run")
                entry = {"work": work.name, "replicas": num_replicas, "repeat": number}
                print(json.dumps({**entry, **figures}), flush=True)
                if number:
                    seen.setdefault((work.name, num_replicas), []).append(figures["seconds"])
        assert cluster is not None
        cluster.end()
    import vllm

    print(f"{device_name()}, vllm {vllm.__version__}, Python {platform.python_version()}")
    fewest = min(args.replicas)
    for (work_name, num_replicas), times in seen.items():
        median = statistics.median(times)
        alone = statistics.median(seen[work_name, fewest])
        told = " ".join(f"{seconds:.1f}" for seconds in times)
        ratio = f"{alone / median:.2f}x as fast as {fewest}"
        print(f"{work_name}: {num_replicas} replicas  median {median:.1f} s  ({told})  {ratio}")


def _repeated(jobs: list[Work], repeats: int) -> Iterator[tuple[Work, int, str]]:
    """A little of each work to warm up, then all of them so many times."""
    for number in range(repeats + 1):
        for work in jobs:
            rows = work if number else work.warm_up(WARM_UP_ROWS)
            yield rows, number, f"Part {number} of {work.name}. {work.system}"


def _run(  # noqa: PLR0917 - a bench
    args: argparse.Namespace,
    model: Path,
    work: Work,
    system: str,
    num_replicas: int,
    cluster: Callable[[JobConfig], KeptCluster],
    folder: Path,
) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = work.write(folder / "in.jsonl")
    options: dict[str, Any] = {"max_model_len": args.max_model_len, "enforce_eager": args.eager}
    if is_cpu_build():
        options["kv_cache_memory_bytes"] = 256 << 20
    own = {key: value for key, value in options.items() if key in KEYS}
    rest = {key: value for key, value in options.items() if key not in KEYS}
    run: dict[str, Any] = {"replicas": num_replicas, "gpus_per_replica": args.gpus_per_replica}
    if num_replicas == 1:
        run["ray_address"] = "here"  # One replica, and a fleet all the same.
    started_s = time.monotonic()
    job = load(
        {
            "input": {"path": str(path)},
            "prompt": {"system": system, "user": "{{ user }}"},
            "model": {"name": str(model), **own, "engine": {**rest, **LOADING}},
            "sampling": {
                "max_tokens": works.MAX_TOKENS,
                "temperature": works.TEMPERATURE,
                "ignore_eos": True,
                "column": "sampling",
            },
            "output": {
                "path": str(folder / "out"),
                **({"schema_column": "schema"} if work.with_schema else {}),
            },
            "checks": {"allow_truncated": True},
            "gate": {"max_error_rate": 1.0},
            "run": run,
        }
    )
    used = cluster(job)
    was_up_s = used.up_at_s
    summary = JobRun(job, stop=StopSwitch(), compute=partial(ManyEngines, connect=cluster)).run()
    assert summary.published_s is not None
    published_at_s = time.monotonic() - (summary.elapsed_s - summary.published_s)
    assert used.up_at_s is not None
    return {
        "seconds": published_at_s - (started_s if was_up_s is not None else used.up_at_s),
        "ok": summary.num_ok,
        "errors": summary.num_errors,
        "output_tokens": summary.run["num_output_tokens"],
        "cached_tokens": summary.run["num_cached_tokens"],
        "rows_by_replica": _rows_by_replica(folder / "out" / STATE / "runs"),
        "warnings": summary.warnings,
    }


def _rows_by_replica(runs: Path) -> list[int]:
    (path,) = runs.glob("*/stats.parquet")
    lines = pl.read_parquet(path).drop_nulls("replica").group_by("replica").last()
    return lines.sort("replica")["num_ok"].to_list()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=["8b", "0.6b"], default="0.6b")
    parser.add_argument("--model", type=Path, help="a model's folder, instead of a random one")
    parser.add_argument("--work", action="append", required=True, help="decode, label=12000, ...")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--gpus-per-replica", type=float, default=1.0)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with `question`")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
