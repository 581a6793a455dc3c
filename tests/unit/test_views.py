"""What `status` tells of a job from its folder, and how a person reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from batchgen.core.records import EngineStats
from batchgen.pipeline.stats import RunStats
from batchgen.store.books import STATE
from batchgen.store.ledger import Ledger
from batchgen.store.runs import RunLock, RunLog
from batchgen.views.rows import Rows
from batchgen.views.status import as_text, exit_code_of, not_begun, status_of
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
    found = [line.split(maxsplit=1)[1] for line in lines if line.startswith("  silent ")]
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
    assert said.startswith("for 4 min 0")
    assert said.endswith(f" s ({means})")


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


LIVE = {
    **RunStats(0.0, 2000).sample(9.0, 1030, EngineStats(3, 1, 0.42)),
    "state": "running",
    "num_rows": 2000,
    "num_left": 972,
    "eta_s": 53.0,
    "num_errors": 21,
}


def test_a_run_at_work_is_told_in_words_with_percent(storage, log, held) -> None:
    assert held is not None
    log.live(LIVE)
    facts = status_of(storage.root)
    lines = as_text(storage.root, {**facts, "num_rows": 2000, "num_durable": 1000}).splitlines()
    assert lines[:4] == [
        str(storage.root),
        "  state    at work: running, 53 s left",
        "  rows     51%: 1,028 of 2,000 ended; 1,000 are durable",
        "  speed    0 rows/s, 0 tok/s in, 0 out, 4 in flight, KV 42%, 21 errors",
    ]
    assert exit_code_of(facts) == 0


def test_a_run_that_has_only_begun_has_no_figures_yet(storage, log, held) -> None:
    assert held is not None
    assert log.run_id
    assert as_text(storage.root, status_of(storage.root)).splitlines()[1] == (
        "  state    at work: planning"
    )


@pytest.mark.parametrize(
    ("live", "code"),
    [
        ({"state": "running"}, 1),  # Killed: it has left no word.
        ({"state": "fault", "reason": "no"}, 1),
        ({"state": "refused", "reason": "no"}, 2),
        ({"state": "over_limit", "reason": "no\nmore"}, 3),
        ({"state": "stopped", "reason": "no"}, 75),
        ({"state": "answered", "reason": "no"}, 75),
    ],
    ids=lambda value: value["state"] if isinstance(value, dict) else None,
)
def test_a_monitor_goes_by_what_the_last_run_ended_with(storage, log, live, code) -> None:
    log.live(live)
    facts = status_of(storage.root)
    assert exit_code_of(facts) == code
    line = as_text(storage.root, facts).splitlines()[1]
    assert "the last run: " in line
    assert ("killed" if live["state"] == "running" else live["state"]) in line
    assert exit_code_of({"state": "complete", "damaged": ["x"]}) == 1
    assert exit_code_of({"state": "complete"}) == exit_code_of({"state": "new"}) == 0


def test_it_is_watched_until_the_run_ends(storage, log, held) -> None:
    """Each look is printed; when nobody is at work any more, the last one decides."""
    log.live(LIVE)
    command = [sys.executable, "-m", "batchgen", "status", str(storage.root), "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        seen = [watching.stdout.readline() for _ in range(2)]
        log.live({"state": "stopped", "reason": "asked to"})
        held.release()
        rest = watching.stdout.read()
    assert seen[1] == "  state    at work: running, 53 s left\n"
    assert "not complete; the last run: stopped, asked to" in rest
    assert watching.returncode == 75


def test_people_see_nine_digits_of_a_number_and_programs_all():
    row = {"a": 9.069599764188752e-05, "b": {"c": [0.9999998807907104, 7, None]}, "d": 0.5}
    shown = Rows(Path(), [row])
    told = [line.split(maxsplit=1)[1] for line in shown.as_text().splitlines()[1:]]
    assert told == ["9.06959976e-05", "{'c': [0.999999881, 7, None]}", "0.5"]
    assert shown[0] is row
