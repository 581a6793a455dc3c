"""Proof 4: six processes run one job at the same moment, no lock between them.

Exactly one consistent snapshot comes of it, and every process ends well or says why not.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

from tests.torture.harness import main
from tests.torture.support import (
    Job,
    ProofError,
    check_snapshot,
    expected_of,
    first_day,
    make_job,
    manifest_of,
    next_day,
    published,
    replayable,
    spawn_run,
    whole_run,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.torture.support import Child

RUNNERS = 6
ROWS = 60
OTHERS = {
    "fresh among them": "fresh",
    "fresh over published": "fresh",
    "retries over published": "retry_errors",
    "retries over held back": "retry_errors",
    "night over published": None,
}
Rows = list[dict[str, Any]]
GOOD_ENDS = {None, "FencedError", "BusyError", "StorageError"}


def shard(folder: Path, seed: str, amount: int) -> Counter[str]:
    """So many rounds."""
    job = make_job(folder / "job", ROWS, step_s=0.0005)
    expected = expected_of(job, folder / "expected")
    next_day(job)
    expected_next = whole_run(job, folder / "expected-next")
    counts: Counter[str] = Counter()
    for number in range(amount):
        with replayable(f"seed {seed!r}, round {number}"):
            chance = random.Random(f"{seed}/{number}")
            first_day(job)
            _race(job, (expected, expected_next), folder / f"out-{number}", chance, counts)
        counts["rounds: 0 lost, 0 doubled, 0 wrong"] += 1
    return counts


def _race(
    job: Job, days: tuple[Rows, Rows], out: Path, chance: random.Random, counts: Counter[str]
) -> None:
    """One round: all at once, then one more run, which finds or finishes the newest plan.

    Args:
        job: Its input is the first day's.
        days: What is expected of the input on the first and on the next day.
        out: A new folder.
        chance: Of this round.
        counts: Added to.
    """
    kind = chance.choice(["alike", "alike", "alike", *OTHERS])
    if kind.endswith("over published"):
        _wait(spawn_run(job, out, steal=True))
    if kind.endswith("over held back"):
        _wait(spawn_run(job.strict(), out, steal=True), {"GateError"})
    expected = days[0]
    if kind == "night over published":
        next_day(job)
        expected = days[1]
    option = OTHERS.get(kind)
    gate, opening = os.pipe()
    runners = [
        spawn_run(
            job.flushing(chance.randrange(7, 40)),
            out,
            gate=gate,
            steal=True,
            **({option: True} if option and chance.random() < 0.5 else {}),
        )
        for _ in range(RUNNERS)
    ]
    os.write(opening, b"!" * RUNNERS)
    for runner in runners:
        _wait(runner)
        counts[f"ends: {runner.told['error'] or runner.told['text']}"] += 1
    os.close(gate)
    os.close(opening)
    counts[f"rounds, {kind}"] += 1
    if kind == "alike":
        if not any(runner.code == 0 for runner in runners):
            msg = f"nobody won: {[runner.told for runner in runners]}"
            raise ProofError(msg)
        check_snapshot(out, expected, "after the race")
    elif manifest_of(out) is not None and published(out) != days[0]:
        check_snapshot(out, expected, "after the race")
    _wait(spawn_run(job, out, steal=True), {None})
    check_snapshot(out, expected, "after one more run")
    shutil.rmtree(out)


def _wait(child: Child, ends: set[str | None] = GOOD_ENDS) -> None:
    child.end()
    if child.told.get("error") not in ends:
        msg = f"a run ended with {child.code}, {child.told}; expected one of {ends}"
        raise ProofError(msg)


if __name__ == "__main__":
    main("tests.torture.races", "rounds", shard, 1000, in_memory=True)
