"""Proof 9: workers, engines, nodes and drivers of a real Ray cluster killed at random moments.

    python -m tests.torture.fleet --kills 500

Three nodes on this machine. A run is the real command line; while it works, something of it is
killed or frozen every second or so. Where the driver was killed, another run goes on. In the end
the snapshot must be that of one engine, row for row, and `verify` must find nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from batchgen.store.books import STATE
from tests.e2e.support import as_vectors, command, published, run_cli, write_job, write_rows
from tests.ray.support import Nodes, nodes

ROWS = 1000
REPLICAS = 3
KILLS_A_JOB = 10
"""Then it may end in peace."""
KINDS = {"worker": 8, "engine": 4, "node": 3, "driver": 4, "frozen worker": 3, "frozen driver": 1}
ENGINE = {"max_num_seqs": 8, "step_s": 0.03, "max_steps": 6, "in_process": False}
STALL_S = 4.0
GIVE_UP_S = 180.0
STATE_OF_STOPPED = 75


class Torture:
    """One cluster, one job after another."""

    def __init__(self, folder: Path, cluster: Nodes, seed: int) -> None:
        self._folder = folder
        self._cluster = cluster
        self._moments = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self._extra = [cluster.add(cpus=REPLICAS) for _ in range(2)]
        self._thaw: list[tuple[float, psutil.Process]] = []
        write_rows(folder / "in.jsonl", ROWS)
        self._expected = [self._alone(is_vectors=False), self._alone(is_vectors=True)]

    def _alone(self, *, is_vectors: bool) -> list[dict[str, Any]]:
        """What one engine publishes."""
        folder = self._folder / f"alone-{is_vectors}"
        folder.mkdir()
        shutil.copy(self._folder / "in.jsonl", folder)
        done = run_cli("run", self._job(folder, is_vectors=is_vectors))
        assert done.returncode == 0, done.stderr
        return published(folder / "out")

    def _job(self, folder: Path, *, is_vectors: bool, **tables: Any) -> Path:
        job = write_job(folder, "in.jsonl", model={"backend": "echo", "engine": ENGINE}, **tables)
        if is_vectors:
            job.write_text(as_vectors(job.read_text()))
        return job

    def one_job(self, number: int) -> None:
        """Run a job to its end, through kills."""
        folder = self._folder / f"job-{number}"
        folder.mkdir()
        shutil.copy(self._folder / "in.jsonl", folder)
        run = {
            "replicas": REPLICAS,
            "ray_address": self._cluster.address,
            "flush_s": 0.3,
            "stall_s": STALL_S,
            "stats_s": 0.2,
            "grace_s": 1.0,
        }
        is_vectors = number % 3 == 2
        job = self._job(folder, is_vectors=is_vectors, run=run)
        left = self._moments.randint(3, KILLS_A_JOB)
        while (code := self._run(job, folder / "out", left)) != 0:
            left = 0 if code == 1 else max(0, left - 3)
        rows = published(folder / "out")
        expected = self._expected[is_vectors]
        assert rows == expected, f"{folder}: {difference(rows, expected)}"
        self.counts["jobs of vectors"] += is_vectors
        checked = run_cli("verify", job)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        self.counts["jobs: 0 lost, 0 doubled, 0 wrong"] += 1
        shutil.rmtree(folder)

    def _run(self, job: Path, out: Path, num_kills: int) -> int:
        log = job.with_name("log").open("ab")
        with log, subprocess.Popen(command("run", job), stdout=log, stderr=log) as driver:
            until_s = time.monotonic() + GIVE_UP_S
            while driver.poll() is None:
                assert time.monotonic() < until_s, job.with_name("log").read_text()[-3000:]
                time.sleep(self._moments.uniform(0.1, 1.8))
                self._thaw_some()
                if num_kills > 0 and driver.poll() is None:
                    num_kills -= self._strike(driver, out)
        self._thaw_some(everybody=True)
        code = int(driver.returncode)
        if code not in {0, -signal.SIGKILL, STATE_OF_STOPPED}:
            self.counts[f"runs that gave up with {code}"] += 1
            print(job.with_name("log").read_text()[-600:], file=sys.stderr)
        return code

    def _strike(self, driver: subprocess.Popen[bytes], out: Path) -> int:
        (kind,) = self._moments.choices([*KINDS], [*KINDS.values()])
        victim = self._victim(kind, driver, out)
        if victim is None:
            return 0
        with suppress(psutil.NoSuchProcess):
            if kind == "node":
                at = self._moments.randrange(len(self._extra))
                self._cluster.remove(self._extra[at])
                self._extra[at] = self._cluster.add(cpus=REPLICAS)
            elif kind.startswith("frozen"):
                victim.suspend()
                self._thaw.append(
                    (time.monotonic() + self._moments.uniform(1, 2 * STALL_S), victim)
                )
            else:
                victim.kill()
            self.counts[f"kills: {kind}"] += 1
            return 1
        return 0

    def _victim(
        self, kind: str, driver: subprocess.Popen[bytes], out: Path
    ) -> psutil.Process | None:
        if kind.endswith("driver"):
            return psutil.Process(driver.pid)
        workers = [pid for pid in (one.get("pid") for one in replicas_of(out)) if pid]
        if not workers:
            return None
        with suppress(psutil.NoSuchProcess):
            worker = psutil.Process(self._moments.choice(workers))
            if "ray" not in worker.name():
                return None
            if kind != "engine":
                return worker
            return next((one for one in worker.children() if "python" in one.name()), None)
        return None

    def _thaw_some(self, *, everybody: bool = False) -> None:
        now_s = time.monotonic()
        for at_s, process in list(self._thaw):
            if everybody or now_s >= at_s:
                with suppress(psutil.NoSuchProcess):
                    process.resume()
                self._thaw.remove((at_s, process))

    @property
    def num_kills(self) -> int:
        """So far."""
        return sum(num for kind, num in self.counts.items() if kind.startswith("kills"))


def replicas_of(out: Path) -> list[dict[str, Any]]:
    """The newest run's live view of its replicas."""
    for path in sorted((out / STATE / "runs").glob("*/live.json"), reverse=True):
        with suppress(ValueError, OSError):
            return list(json.loads(path.read_text()).get("replicas", []))
    return []


def difference(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> str:
    """Lost, doubled and wrong rows."""
    ids, wanted = Counter(row["id"] for row in rows), Counter(row["id"] for row in expected)
    if ids != wanted:
        return (
            f"lost {list((wanted - ids).items())[:5]}, doubled {list((ids - wanted).items())[:5]}"
        )
    return str(next((one, two) for one, two in zip(rows, expected, strict=True) if one != two))


def torture(num_kills: int, seed: int) -> Counter[str]:
    """Kill until that many kills are done, every job to its end."""
    with tempfile.TemporaryDirectory() as name, nodes(1, cpus=REPLICAS) as cluster:
        this = Torture(Path(name), cluster, seed)
        number = 0
        while this.num_kills < num_kills:
            this.one_job(number)
            number += 1
        return this.counts


def main() -> None:
    """Print what was done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    began_s = time.monotonic()
    counts = torture(args.kills, args.seed)
    for kind, num in sorted(counts.items()):
        print(f"{num:6}  {kind}")
    print(f"{time.monotonic() - began_s:.0f} s, seed {args.seed}")


if __name__ == "__main__":
    main()
