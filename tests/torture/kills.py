"""Proof 1: kill -9 at random moments, and frozen runs that wake up after another took over.

Each attempt is the real command line in a forked child, killed after a uniformly random time,
until one completes; then the snapshot must be the uninterrupted run's, row for row.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import time
from collections import Counter
from typing import TYPE_CHECKING

from batchgen.store.books import STATE
from tests.torture.harness import main
from tests.torture.support import (
    Child,
    Job,
    ProofError,
    check_snapshot,
    expected_of,
    first_day,
    leftovers,
    make_job,
    manifest_of,
    next_day,
    replayable,
    spawn_cli,
    whole_run,
)

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 120
ZOMBIE_SHARE = 0.12
NIGHT_SHARE = 0.3
"""Jobs that were published before their input changed."""
KINDLY_CODES = {0, 75}
"""How a run may end that nobody killed: complete, fenced, busy."""


def shard(folder: Path, seed: str, amount: int) -> Counter[str]:
    """Kill until `amount` kills are done, every job to its end."""
    worlds = []
    for place in (folder / "texts", folder / "vectors"):
        job = make_job(place, ROWS, step_s=0.001, is_vectors=place.name == "vectors")
        expected = expected_of(job, place / "expected")
        next_day(job)
        worlds.append((job, expected, whole_run(job, place / "expected-next")))
    counts: Counter[str] = Counter()
    number = 0
    while counts["kills"] < amount:
        job, expected, expected_next = worlds[number % 3 == 2]
        first_day(job)
        counts["jobs of vectors"] += number % 3 == 2
        if number % 20 == 0:  # Anew, because others come and go on the machine.
            usual_s = _usual_s(job, folder)
        moments = random.Random(f"{seed}/{number}")
        out = folder / f"out-{number}"
        is_night = moments.random() < NIGHT_SHARE
        if is_night:
            shutil.copytree(job.path.parent / "expected", out)
            next_day(job)
            counts["jobs that are a second night"] += 1
        with replayable(f"seed {seed!r}, job {number}, usual {usual_s:.3f} s"):
            _torture(job, out, moments, usual_s, counts)
            check_snapshot(out, expected_next if is_night else expected, "after the kills")
            for kind, count in leftovers(out).items():
                counts[f"left over: {kind}"] += count
            if number % 10 == 0:  # A finished job stays as it is.
                if spawn_cli(job, out).end().code != 0:
                    msg = "a run of a finished job did not end with 0"
                    raise ProofError(msg)
                check_snapshot(out, expected_next if is_night else expected, "after one more run")
        counts["jobs: 0 lost, 0 doubled, 0 wrong"] += 1
        shutil.rmtree(out)
        number += 1
    return counts


def _usual_s(job: Job, folder: Path) -> float:
    times = []
    for number in range(3):
        began_s = time.monotonic()
        spawn_cli(job, folder / f"usual-{number}").end()
        times.append(time.monotonic() - began_s)
        shutil.rmtree(folder / f"usual-{number}")
    return statistics.median(times)


def _torture(
    job: Job, out: Path, moments: random.Random, usual_s: float, counts: Counter[str]
) -> None:
    while True:
        if moments.random() < ZOMBIE_SHARE:
            if _zombie(job, out, moments, usual_s, counts):
                return
            continue
        num_epochs = _num_epochs(out)
        child = spawn_cli(job, out)
        if child.wait(moments.uniform(0, 1.15 * usual_s)):
            _check_end(child, {0})
            return
        child.kill()
        _count_kill(child, out, num_epochs, counts)


def _count_kill(child: Child, out: Path, num_epochs: int, counts: Counter[str]) -> None:
    if child.code != -signal.SIGKILL:
        return  # It ended by itself just before.
    counts["kills"] += 1
    counts[f"kills {_phase(out, num_epochs)}"] += 1


def _num_epochs(out: Path) -> int:
    return sum(1 for _ in (out / STATE / "epochs").glob("[0-9]*.json"))


def _phase(out: Path, num_epochs_before: int) -> str:
    number = _num_epochs(out)
    if number == num_epochs_before:
        return "before the claim"
    manifest = manifest_of(out)
    if manifest is not None and manifest["epoch"] == number:
        return "after the manifest"
    if any((out / STATE / "files").glob(f"e{number:06d}-*")):
        return "while publishing"
    return "while computing"


def _zombie(
    job: Job, out: Path, moments: random.Random, usual_s: float, counts: Counter[str]
) -> bool:
    """Freeze a run, let others take over, thaw it. Return whether the job is complete."""
    frozen = spawn_cli(job, out, *(["--steal"] if moments.random() < 0.5 else []))
    wait_s = moments.uniform(0, 1.1 * usual_s)
    if moments.random() < 0.5:
        _wait_for_publishing(frozen, out, usual_s)
        wait_s = moments.uniform(0, 0.1 * usual_s)
    if frozen.wait(wait_s):
        _check_end(frozen, {0})
        return True
    os.kill(frozen.pid, signal.SIGSTOP)
    counts["zombies"] += 1
    if _phase(out, 0) == "while publishing":
        counts["zombies frozen while publishing"] += 1
    is_fresh = moments.random() < 0.2
    while True:
        num_epochs = _num_epochs(out)
        heir = spawn_cli(job, out, "--steal", *(["--fresh"] if is_fresh else []))
        early = moments.random() < 0.3
        if early and not heir.wait(moments.uniform(0, usual_s)):
            frozen.thaw()  # Both at work at once.
        if moments.random() < 0.7 or heir.wait(moments.uniform(0, usual_s)):
            break
        heir.kill()
        _count_kill(heir, out, num_epochs, counts)
    _check_end(heir.end(), KINDLY_CODES)
    _check_end(frozen.thaw().end() if frozen.code is None else frozen, KINDLY_CODES | {1})
    return manifest_of(out) is not None and _settled(job, out)


def _settled(job: Job, out: Path) -> bool:
    """After --fresh the newest plan may be unpublished: one more run settles it."""
    _check_end(spawn_cli(job, out).end(), {0})
    return True


def _wait_for_publishing(child: Child, out: Path, usual_s: float) -> None:
    deadline = time.monotonic() + 2 * usual_s
    while time.monotonic() < deadline and not child.wait(0.0005):
        if _phase(out, 0) == "while publishing":
            return


def _check_end(child: Child, codes: set[int]) -> None:
    text = str(child.told.get("text", ""))
    if child.code not in codes or "Traceback" in text or "rows planned" in text:
        msg = f"a run ended with {child.code}, expected one of {sorted(codes)}: {text}"
        raise ProofError(msg)


if __name__ == "__main__":
    main("tests.torture.kills", "kills", shard, 10_000)
