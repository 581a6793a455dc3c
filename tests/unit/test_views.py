"""What `status` tells of a job from its folder, and how a person reads it."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING

import pytest

from batchgen.store.books import STATE
from batchgen.store.ledger import Ledger
from batchgen.store.runs import RunLock, RunLog
from batchgen.views.status import as_text, not_begun, status_of
from tests.fakes import plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchgen.storage import LocalStorage


@pytest.fixture
def log(storage: LocalStorage) -> RunLog:
    """Of a run that has planned the job and does not hold it any more."""
    Ledger(storage).put_plan(plan())
    return RunLog(storage, "run-a")


@pytest.fixture
def held(storage: LocalStorage) -> Iterator[RunLock]:
    """The job's lock, in the hands of that run."""
    lock = RunLock(storage, "run-a")
    lock.acquire()
    yield lock
    lock.release()


def make_silent(storage: LocalStorage, seconds: float) -> None:
    path = storage.path(f"{STATE}/runs/run-a/live.json")
    os.utime(path, times=(time.time() - seconds,) * 2)


def sign_of_life(storage: LocalStorage) -> str | None:
    """What a person reads of it."""
    lines = as_text(storage.root, status_of(storage.root)).splitlines()
    found = [line.split(maxsplit=1)[1] for line in lines if line.startswith("run.last_sign")]
    return found[0] if found else None


def test_a_run_that_left_no_word_of_its_end_was_killed(storage, log):
    log.live({"state": "running", "num_left": 3})
    facts = status_of(storage.root)
    assert facts["state"] == "interrupted"
    assert facts["last_run"] == {
        "run_id": "run-a",
        "state": "killed",
        "reason": "it has left no word of its end: killed, or the machine went down; run again to "
        "go on",
    }


def test_a_run_that_ended_by_itself_keeps_its_own_words(storage, log):
    log.live({"state": "stopped", "reason": None})
    assert status_of(storage.root)["last_run"] == {
        "run_id": "run-a",
        "state": "stopped",
        "reason": None,
    }


def test_before_any_live_view_nobody_is_said_to_be_killed(storage, log):
    assert log.run_id
    assert status_of(storage.root)["last_run"] == {"run_id": None, "state": None, "reason": None}


@pytest.mark.parametrize(
    ("live", "means"),
    [
        (
            {"state": "running", "num_left": 3, "elapsed_s": 9.0},
            "if it is frozen, take the job from it: batchgen run JOB --steal",
        ),
        (
            {"state": "running", "num_left": 0, "elapsed_s": 9.0},
            "every row has ended, publishing gives none",
        ),
        ({"state": "taking over rows"}, "taking over rows, it gives none until that is done"),
    ],
)
@pytest.mark.usefixtures("held")
def test_a_run_that_is_silent_is_told_with_how_long(storage, log, live, means):
    log.live(live)
    assert sign_of_life(storage) is None
    make_silent(storage, 243)
    assert status_of(storage.root)["run"]["sign_of_life_age_s"] == pytest.approx(243, abs=5)
    said = sign_of_life(storage)
    assert said is not None
    assert said.startswith("4 min 0")
    assert said.endswith(f" s ago ({means})")


@pytest.mark.usefixtures("held")
def test_a_live_view_from_the_future_is_of_now(storage, log):
    log.live({"state": "running"})
    make_silent(storage, -100)
    facts = json.loads(json.dumps(status_of(storage.root)))
    assert facts["run"]["sign_of_life_age_s"] == 0


def test_why_nothing_is_to_be_seen_yet(storage: LocalStorage) -> None:
    assert not_begun(storage.root) == (
        "the job has not been run yet; start it with `batchgen run JOB`"
    )
    lock = RunLock(storage, "run-a")
    lock.acquire()
    assert not_begun(storage.root) == "its first run is at work and has not planned it yet"
    lock.release()
    assert not_begun(storage.root) == (
        "no run has planned the job yet; start one with `batchgen run JOB`"
    )
    Ledger(storage).put_plan(plan())
    assert not_begun(storage.root) is None


def test_of_runs_of_one_second_the_last_that_wrote_is_the_newest(storage, log):
    assert log.run_id
    for run_id, ago_s in (("20260101T000000-bbb", 5), ("20260101T000000-aaa", 1)):
        RunLog(storage, run_id).live({"state": "stopped", "reason": None})
        path = storage.path(f"{STATE}/runs/{run_id}/live.json")
        os.utime(path, times=(time.time() - ago_s,) * 2)
    assert status_of(storage.root)["last_run"]["run_id"] == "20260101T000000-aaa"
    # A copy of the folder has other times, and ids that tell all the same.
    RunLog(storage, "20250101T000000-ccc").live({"state": "running"})
    assert status_of(storage.root)["last_run"]["run_id"] == "20260101T000000-aaa"


def test_with_the_clock_set_back_the_newest_run_is_the_last_to_claim(storage, log):
    ledger = Ledger(storage)
    for run_id in ("20260301T000000-aaa", "20260101T000000-bbb"):  # As the clock had it.
        ledger.claim(plan(), run_id, {})
        RunLog(storage, run_id).live({"state": "stopped", "reason": None})
    path = storage.path(f"{STATE}/runs/20260101T000000-bbb/live.json")
    os.utime(path, times=(time.time() - 9999,) * 2)
    assert status_of(storage.root)["last_run"]["run_id"] == "20260101T000000-bbb"
    # One that was refused before it claimed anything is newer than what had begun by then.
    RunLog(storage, "20260201T000000-ccc").live({"state": "refused", "reason": "no"})
    assert status_of(storage.root)["last_run"]["run_id"] == "20260201T000000-ccc"
