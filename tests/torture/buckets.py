"""Proof 9: runs on an object store, killed, frozen, at once, and with replies that go wrong.

The server is a real one on 127.0.0.1. Whatever happens, a run that completes has published what an
uninterrupted run on a local folder publishes. Nothing here uses the object store's library but in
children: its threads do not survive a fork.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from batchgen.core.places import Bucket
from batchgen.storage.remote import storage_at
from batchgen.store.ledger import Ledger
from batchgen.store.verify import verify
from tests import s3
from tests.torture.harness import main
from tests.torture.support import (
    Child,
    Job,
    ProofError,
    expected_of,
    first_day,
    make_job,
    next_day,
    replayable,
    rows_of,
    spawn,
    spawn_cli,
    whole_run,
)

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 80
PROBES, POINTS = 24, 160
"""How many requests a run begins with that only look whether the store can be used; and all."""
KINDLY_CODES = {0, 1, 75}
"""How a run may end that others disturb: complete, fenced, a part of it tidied up, busy."""
ZOMBIE_SHARE, RACE_SHARE, NIGHT_SHARE = 0.15, 0.15, 0.4


def shard(folder: Path, seed: str, amount: int) -> Counter[str]:
    """Kill until `amount` kills are done, every job to its end; then let replies go wrong."""
    job = make_job(folder / "job", ROWS, step_s=0.001)
    days = [expected_of(job, folder / "expected")]
    next_day(job)
    days.append(whole_run(job, folder / "expected-next"))
    counts: Counter[str] = Counter()
    with s3.s3_server(folder / "s3") as endpoint:
        number = 0
        while counts["kills"] < amount:
            moments = random.Random(f"{seed}/{number}")
            with replayable(f"seed {seed!r}, job {number}"):
                _torture(job, f"s3://{s3.BUCKET}/out/{number}", days, moments, counts)
            number += 1
        for fault in s3.FAULTS:
            with s3.proxy_process(endpoint, fault) as proxy, replayable(f"fault {fault!r}"):
                _spoil(job, f"s3://{s3.BUCKET}/{fault}", days, proxy)
            counts[f"jobs whose replies go wrong: {fault}"] += 1
    return counts


def points(folder: Path, seed: str, most: int) -> Counter[str]:
    """Let each request of a job go wrong once, in each way; of two workers, each every second."""
    job = make_job(folder / "job", 12, step_s=0)
    expected = expected_of(job, folder / "expected")
    counts: Counter[str] = Counter()
    with s3.s3_server(folder / "s3") as endpoint:
        for fault in s3.POINT_FAULTS:
            for point in range(int(seed.rpartition(".")[2]), most, 2):
                out = f"s3://{s3.BUCKET}/{fault}/{point}"
                place = replayable(f"{fault} at request {point}")
                with s3.proxy_process(endpoint, fault, point) as proxy, place:
                    # What is refused before the engine starts is right, too: it goes on.
                    end = _run(job, out, "--set", "storage.timeout_s=1", endpoint=proxy)
                    code = end.end().code
                    _check_end(end, {0, 2, 75} if point < PROBES else {0})
                    if code:
                        _check_end(_run(job, out).end(), {0})
                    _check(job, out, expected)
                counts[f"requests that went wrong: {fault}"] += 1
    return counts


def _torture(
    job: Job, out: str, days: list[Any], moments: random.Random, counts: Counter[str]
) -> None:
    first_day(job)
    began_s = time.monotonic()
    is_night = moments.random() < NIGHT_SHARE
    if is_night:
        _check_end(_run(job, out).end(), {0})
        next_day(job)
        counts["jobs that are a second night"] += 1
    usual_s = max(time.monotonic() - began_s, 0.5) if is_night else 1.5
    while True:
        kind = moments.random()
        if kind < ZOMBIE_SHARE:
            frozen = _run(job, out)
            if not frozen.wait(moments.uniform(0, usual_s)):
                os.kill(frozen.pid, signal.SIGSTOP)
                _check_end(_run(job, out, "--steal").end(), KINDLY_CODES)
                _check_end(frozen.thaw().end(), KINDLY_CODES)
                counts["zombies"] += 1
        elif kind < ZOMBIE_SHARE + RACE_SHARE:
            for child in [_run(job, out, "--steal") for _ in range(2)]:
                _check_end(child.end(), KINDLY_CODES)
            counts["races"] += 1
        child = _run(job, out)
        if child.wait(moments.uniform(0, 1.15 * usual_s)):
            _check_end(child, {0})
            break
        child.kill()
        counts["kills"] += child.code == -signal.SIGKILL
    _check(job, out, days[is_night])
    counts["jobs: 0 lost, 0 doubled, 0 wrong"] += 1


def _spoil(job: Job, out: str, days: list[Any], proxy: str) -> None:
    """A night and the next, through a proxy that spoils each reply to a PUT, or a GET, once."""
    for day, change in enumerate((first_day, next_day)):
        change(job)
        _check_end(_run(job, out, endpoint=proxy).end(), {0})
        _check(job, out, days[day])


def _run(job: Job, out: str, *extra: str, endpoint: str | None = None) -> Child:
    there = ("--set", f"storage.endpoint={endpoint}") if endpoint else ()
    return spawn_cli(job, out, *there, *extra)  # type: ignore[arg-type]


def _check(job: Job, out: str, expected: list[dict[str, Any]]) -> None:
    """Raise unless every byte is whole and the rows are the expected ones."""
    found = job.path.parent / "found.json"

    def look() -> None:
        storage = storage_at(root := Bucket(out))
        manifest = Ledger(storage).latest_manifest()
        rows = [row for file in manifest.files for row in rows_of(storage.path(file.name))]
        found.write_text(json.dumps([verify(root).problems, rows], default=str))

    with ExitStack() as stack:
        stack.callback(found.unlink, missing_ok=True)
        _check_end(spawn(look, job.path.parent / "look").end(), {0})
        problems, rows = json.loads(found.read_text())
    if problems or rows != json.loads(json.dumps(expected, default=str)):
        ids = [row["id"] for row in rows]
        msg = f"{out}: {problems}; {len(rows)} rows published, {len(expected)} expected: {ids}"
        raise ProofError(msg)


def _check_end(child: Child, codes: set[int]) -> None:
    text = str(child.told.get("text", ""))
    if child.code not in codes or "Traceback" in text:
        msg = f"a run ended with {child.code}, expected one of {sorted(codes)}: {text}"
        raise ProofError(msg)


if __name__ == "__main__":
    if "--faults" in sys.argv:
        main("tests.torture.buckets", "faults", points, POINTS, is_split=False)
    else:
        main("tests.torture.buckets", "kills", shard, 1_000)
