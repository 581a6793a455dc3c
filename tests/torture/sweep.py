"""Proof 2: every call that changes the output, failed once, in every way.

Modes are those of `disks`; `freeze` stops the run before the call, lets another one take over,
and wakes it. Scenes: a new job, one resumed half-done, `--fresh` and `--retry-errors` over a
published one, a night: published, the input changed since; and a new job that embeds. That one has
the calls of any other, so that most of its points are twins.

Some points are twins: they leave the very state that another point leaves. Killed after a call is
killed before the next one; a write inside a file is like the file's first; an error leaves what a
kill leaves, and how a run ends by it is seen with a new job; so is a freeze before every call,
elsewhere it is one of two. `--percent` says how many of the twins are run: each kind of call is
always failed in every mode, and every call that is not a twin always.

`TORTURE_SWEEP="new/EIO,resume/freeze"` runs only these.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

from batchgen.store.books import STATE
from tests.torture.disks import MODES, Log, SpoiltDisk
from tests.torture.harness import main
from tests.torture.support import (
    Child,
    Job,
    ProofError,
    check_snapshot,
    expected_of,
    make_job,
    manifest_of,
    next_day,
    replayable,
    spawn_run,
    whole_run,
)

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 60
SCENES = ("new", "resume", "fresh", "retry", "night", "vectors")
"""The night comes late: it changes the input. Vectors have a job of their own."""
PUBLISHED = {"fresh", "retry", "night"}
"""Scenes that begin with a snapshot."""
FAULTS = {"StorageError"}
"""How a run may end that the disk failed."""
TAKEN_OVER = {None, "FencedError", "StorageError", "DamagedPartError", "BusyError"}


def shard(folder: Path, seed: str, amount: int) -> Counter[str]:
    """One of two workers: every other point, and of the twins `amount` percent by chance."""
    worker = int(seed.rpartition(".")[2])
    job = make_job(folder / "job", ROWS)
    expected = expected_of(job, folder / "expected")
    sweep = Sweep(job, expected, folder, random.Random(seed))
    every = ",".join(f"{scene}/{mode}" for scene in SCENES for mode in MODES)
    wanted = os.environ.get("TORTURE_SWEEP", every).split(",")
    for scene in SCENES:
        modes = [mode for mode in MODES if f"{scene}/{mode}" in wanted]
        if modes:
            sweep.prepare(scene)
        for mode in modes:
            sweep.mode(mode, worker, amount)
    return sweep.counts


class Sweep:
    """One job, failed at one point after another."""

    def __init__(
        self, job: Job, expected: list[dict[str, Any]], folder: Path, chance: random.Random
    ) -> None:
        self.job = job
        self.expected = expected
        self.folder = folder
        self.chance = chance
        self.counts: Counter[str] = Counter()
        self._num_begun = 0
        self._num_new = job.num_rows

    def prepare(self, scene: str) -> None:
        """Make the folder that every point of the scene starts from."""
        self._start = self.folder / f"start-{scene}"
        self._num_begun = 0
        self._scene = scene
        if scene == "vectors":
            self.job = make_job(self.folder / scene, ROWS, is_vectors=True)
            self.expected = whole_run(self.job, self.folder / "expected-vectors")
            self._num_new = ROWS
        elif scene in PUBLISHED:
            spawn_run(self.job, self._start).end()
            if scene == "night":
                self._num_new = next_day(self.job)
                self.expected = whole_run(self.job, self.folder / "expected-night")
        elif scene == "resume":
            log = self.folder / "log-start"
            for at in range(1000):
                shutil.rmtree(self._start, ignore_errors=True)
                log.unlink(missing_ok=True)
                spawn_run(self.job, self._start, disk=SpoiltDisk(at, "kill before", log)).end()
                if Log(log).num_durable:
                    break
            self._num_begun = Log(log).num_durable
        self.point(scene, "none", -1)
        self._calls = Log(self.folder / "log").calls

    def mode(self, mode: str, worker: int, percent: int) -> None:
        """Every point of one way to fail; ends with the first that the run does not reach."""
        for at in range(worker, 10_000, 2):
            if self._is_twin(mode, at) and self.chance.randrange(100) >= percent:
                continue
            with replayable(f"scene {self._scene}, mode {mode}, point {at}"):
                if not self.point(self._scene, mode, at):
                    return
            self.counts[f"points: {self._scene}, {mode}"] += 1
            self.counts["points"] += 1

    def _is_twin(self, mode: str, at: int) -> bool:
        """Whether another point leaves the same state; by the calls of a run without a fault."""
        if at >= len(self._calls):
            return False
        if self._scene == "vectors":
            return at % 240 > 1  # A worker has every other call.
        kind, path = self._calls[at]
        if kind == "write" and self._calls[at - 1] == (kind, path):
            return True
        if mode == "ENOSPC torn":
            return kind != "write"
        if self._scene == "new" or mode == "kill before":
            return False
        return mode != "freeze" or at % 4 > 1  # A worker has every other call.

    def point(self, scene: str, mode: str, at: int) -> bool:
        """Fail one call, run again, compare; False if the run ended before that call."""
        out = self.folder / "out"
        log_path = self.folder / "log"
        shutil.rmtree(out, ignore_errors=True)
        log_path.unlink(missing_ok=True)
        if self._start.exists():
            shutil.copytree(self._start, out)
        disk = SpoiltDisk(at, mode, log_path)
        how = {
            "fresh": scene == "fresh",
            "retry_errors": scene == "retry",
            "steal": self.chance.random() < 0.5,
        }
        child = spawn_run(self.job, out, disk=disk, **how)
        heir = None
        if mode == "freeze" and child.wait_until_frozen():
            heir = self._take_over(out, child, how)
        child.end()
        log = Log(log_path)
        if log.spoilt is None:
            _expect(child, {None})
            return False
        if heir is None and not mode.startswith("kill"):
            self._check_error(child, mode, log)
        self._check_rerun(out, log, scene, is_alone=heir is None)
        return True

    def _take_over(self, out: Path, child: Child, how: dict[str, Any]) -> Child:
        """While `child` is frozen: run to the end, or freeze too and go on after it."""
        heir_log = self.folder / "log-heir"
        heir_log.unlink(missing_ok=True)
        at = self.chance.choice([self.chance.randrange(120), 10_000])
        disk = SpoiltDisk(at, "freeze", heir_log)
        is_alike = self.chance.random() < 0.5
        again = {name: how[name] and is_alike for name in ("fresh", "retry_errors")}
        job = self.job.flushing(self.chance.randrange(7, 40))
        heir = spawn_run(job, out, disk=disk, steal=True, **again)
        if heir.wait_until_frozen():
            self.counts["two frozen at once"] += 1
            child.thaw().end()
            heir.thaw().end()
        else:
            child.thaw().end()
        _expect(heir, TAKEN_OVER)
        _expect(child, TAKEN_OVER)
        if 0 in (heir.code, child.code):
            check_snapshot(out, self.expected, "after a frozen run woke up")
        return heir

    def _check_error(self, child: Child, mode: str, log: Log) -> None:
        kind, path = log.spoilt or ("", "")
        is_part = f"/{STATE}/parts/" in f"{path}/" and kind != "make_folder"
        is_commit = is_part and log.kinds["link"] and not _is_clean_up(kind, path)
        _expect(child, {None} if is_commit else {None, *FAULTS})
        if is_commit:
            self.counts["recovered by the same run"] += 1

    def _check_rerun(self, out: Path, log: Log, scene: str, *, is_alone: bool) -> None:
        is_done = manifest_of(out) is not None and scene not in PUBLISHED
        child = spawn_run(self.job, out).end()
        _expect(child, {None})
        check_snapshot(out, self.expected, "after a clean run")
        if child.told["computed"] > self._num_new:
            msg = f"{child.told['computed']} rows computed, {self._num_new} were new"
            raise ProofError(msg)
        durable = log.num_durable + self._num_begun
        is_same_plan = scene not in PUBLISHED or child.told["text"] != "nothing_to_do"
        if is_alone and not is_done and is_same_plan and child.told["resumed"] < durable:
            msg = f"{durable} rows were durable, {child.told['resumed']} were taken over"
            raise ProofError(msg)


def _is_clean_up(kind: str, path: str) -> bool:
    return kind == "unlink" and not path.endswith(".tmp")


def _expect(child: Child, errors: set[str | None]) -> None:
    if child.code is not None and child.code < 0:
        return
    if child.told.get("error") not in errors:
        msg = f"a run ended with {child.code}, {child.told}; expected one of {errors}"
        raise ProofError(msg)


if __name__ == "__main__":
    main("tests.torture.sweep", "percent", shard, 100, is_split=False, in_memory=True)
