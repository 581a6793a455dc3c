"""What a driver and Ray cost with real workers: echo engines as slow as GPUs, on this machine.

    python -m tests.bench.fleet_ray --replicas 1 2 4 8 --seconds 40

Whole runs, rows of about 1 KB, 20 rows/s a replica (32 slots, 1.6 s a row). A line for each fleet:

    rows/s     from the first worker's first row to the last row's end, over replicas x 20
    exch/s     exchanges
    thread_%   of a core: the driver's own thread; process_% with Ray's threads beside it
    ms/ex      CPU milliseconds of that process for each exchange, all else that it does included
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.api.jobs import load
from batchgen.cluster.driver import ManyEngines
from batchgen.cluster.machines import resources_of
from batchgen.cluster.ray import RayCluster
from batchgen.pipeline.context import StopSwitch
from batchgen.pipeline.job_run import JobRun
from tests.bench.echo_rows import _write_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchgen.cluster.messages import Cluster, Gone, Report
    from batchgen.job.model import JobConfig

PACE = 20.0
ENGINE = {"max_num_seqs": 32, "step_s": 0.2, "max_steps": 15}


class Counting:
    """A cluster, and what the driver used between the first ended row and the last."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._ended: dict[int, int] = {}
        self.num_exchanges = 0
        self.first: tuple[float, float, float] | None = None
        self.last = (0.0, 0.0, 0.0)
        self.num_counted = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cluster, name)

    def wait(self, timeout_s: float) -> Sequence[tuple[int, Report | Gone]]:
        found = self._cluster.wait(timeout_s)
        before = sum(self._ended.values())
        for number, news in found:
            look = getattr(news, "look", None)
            self._ended[number] = look.num_ended if look is not None else 0
        now = (time.monotonic(), time.thread_time(), time.process_time())
        if sum(self._ended.values()) > before:
            self.first, self.last = self.first or now, now
            self.num_counted = self.num_exchanges
        if self.first is not None:
            self.num_exchanges += len(found)
        return found


def measure(folder: Path, num: int, num_rows: int) -> dict[str, float]:
    """One run; its figures."""
    _write_rows(folder / "in.jsonl", num_rows)
    job = load(
        {
            "input": {"path": str(folder / "in.jsonl")},
            "prompt": {"user": "{{ lang }}: {{ text }}"},
            "model": {"backend": "echo", "engine": ENGINE},
            "sampling": {"max_tokens": 64, "temperature": 0},
            "output": {"path": str(folder / "out")},
            "checks": {"allow_truncated": True},
            "run": {"replicas": num, "ray_address": "none", "cpus_per_replica": 0.1},
        }
    )
    clusters: list[Counting] = []

    def make(job: JobConfig) -> Any:
        clusters.append(Counting(RayCluster(None, resources_of(job), room_for=num)))
        return clusters[0]

    summary = JobRun(job, stop=StopSwitch(), compute=partial(ManyEngines, connect=make)).run()
    assert summary.num_ok == num_rows, summary
    (cluster,) = clusters
    assert cluster.first is not None
    wall_s, thread_s, process_s = (b - a for a, b in zip(cluster.first, cluster.last, strict=True))
    return {
        "rows": num_rows,
        "working_s": wall_s,
        "rows/s": num_rows / wall_s,
        "of ideal": num_rows / wall_s / (num * PACE),
        "exch/s": cluster.num_counted / wall_s,
        "thread_%": 100 * thread_s / wall_s,
        "process_%": 100 * process_s / wall_s,
        "ms/ex": 1e3 * process_s / cluster.num_counted,
    }


def main() -> None:
    """Print a line for each fleet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=40.0)
    args = parser.parse_args()
    is_told = False
    for num in args.replicas:
        with tempfile.TemporaryDirectory() as name:
            found = measure(Path(name), num, int(PACE * num * args.seconds))
        if not is_told:
            print(f"{'replicas':10}" + "".join(f"{key:>11}" for key in found))
            is_told = True
        print(f"{num:<10}" + "".join(f"{value:11.2f}" for value in found.values()), flush=True)


if __name__ == "__main__":
    main()
