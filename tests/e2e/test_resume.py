"""SIGKILL, SIGTERM and two runs at once, through the real command line on the echo engine."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from batchgen.storage import LocalStorage
from batchgen.store.books import STATE
from batchgen.store.ledger import Ledger
from tests.e2e.support import (
    command,
    published,
    run_cli,
    summary_of,
    wait_until,
    write_job,
    write_rows,
)
from tests.harm import overwrite

if TYPE_CHECKING:
    from pathlib import Path

# Some 0.6 s of work: long enough for kills to land in reading, running, committing, publishing.
SLOW = {"backend": "echo", "engine": {"max_num_seqs": 16, "step_s": 0.008, "max_steps": 6}}
ROWS = 1000
SLOWER = ("--set", "model.engine.max_num_seqs=2")
"""Some ten seconds: until a busy machine has done what is to be done meanwhile."""
TWO = ("--set", "run.engines_per_gpu=2")
"""Engines in processes of their own."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_rows(folder / "in.jsonl", ROWS)
    assert run_cli("run", write_job(folder, "in.jsonl", model=SLOW)).returncode == 0
    return published(folder / "out")


@pytest.fixture
def slow_job(tmp_path: Path) -> Path:
    write_rows(tmp_path / "in.jsonl", ROWS)
    return write_job(tmp_path, "in.jsonl", model=SLOW)


def test_an_uninterrupted_run_answers_every_row_that_is_not_blank(
    expected: list[dict[str, object]],
) -> None:
    blank = [n for n in range(ROWS) if n % 70 == 69 and n % 50 != 49]
    bad = [n for n in range(ROWS) if n % 50 == 49]
    assert len(expected) == ROWS - len(blank)
    assert [row["id"] for row in expected if row["gen_status"] == "ok"] == [
        n for n in range(ROWS) if n not in blank and n not in bad
    ]
    assert {row["gen_error_type"] for row in expected if row["gen_status"] == "error"} == {
        "bad_json"
    }


@pytest.mark.parametrize("seed", range(8))
def test_kills_at_random_moments_lose_nothing_and_repeat_nothing(
    slow_job: Path, expected: list[dict[str, object]], seed: int
) -> None:
    moments = random.Random(seed)
    for number in range(2):
        options = TWO if seed % 2 and number else ()
        with subprocess.Popen(
            command("run", slow_job, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            time.sleep(moments.uniform(0.3, 2.0))
            process.kill()
    done = run_cli("run", slow_job)
    assert done.returncode == 0, done.stderr
    assert published(slow_job.parent / "out") == expected


def test_a_resume_computes_only_what_is_missing(slow_job: Path) -> None:
    ledger = Ledger(LocalStorage(slow_job.parent / "out"))
    with subprocess.Popen(command("run", slow_job), stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: bool(ledger.storage.list(f"{STATE}/parts")))
        process.kill()
    plan = ledger.latest_plan()
    assert plan is not None
    num_durable = ledger.durable(plan).num_done
    assert 0 < num_durable < ROWS
    done = run_cli("run", slow_job, "--json")
    assert f'"num_resumed": {num_durable}' in done.stdout


@pytest.mark.parametrize("change", ["longer", "edited", "renamed"])
def test_an_input_that_moves_on_under_an_unfinished_job_costs_only_what_changed(
    slow_job: Path, tmp_path_factory: pytest.TempPathFactory, change: str
) -> None:
    """What the killed run has committed is taken over, and the snapshot is that of one run."""
    ledger = Ledger(LocalStorage(slow_job.parent / "out"))
    with subprocess.Popen(command("run", slow_job), stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: len(ledger.storage.list(f"{STATE}/parts")) >= 4)
        process.kill()
    plan = ledger.latest_plan()
    assert plan is not None
    done = ledger.durable(plan).done(0)
    assert 0 < len(done) < ROWS
    source = slow_job.parent / "in.jsonl"
    text = source.read_text()
    lost = 0
    if change == "longer":
        source.write_text(text + '{"id": 5000, "text": "new"}\n')
    elif change == "edited":
        source.write_text(text.replace('"row 0 ', '"row X ').replace('"row 998 ', '"row Y '))
        lost = (0 in done) + (998 in done)
    else:
        source = source.rename(source.with_name("renamed.jsonl"))
        write_job(slow_job.parent, source.name, model=SLOW)
        lost = sum(row % 50 == 49 for row in done)  # Their errors name the file.
    summary = summary_of(slow_job)
    assert (summary["state"], summary["num_carried"]) == ("complete", len(done) - lost)
    later = ledger.latest_plan()
    assert later is not None
    assert (later.number, [base.plan for base in later.bases]) == (2, [1])
    whole = tmp_path_factory.mktemp("whole")
    (whole / source.name).write_bytes(source.read_bytes())
    assert run_cli("run", write_job(whole, source.name, model=SLOW)).returncode == 0
    assert published(slow_job.parent / "out") == published(whole / "out")


@pytest.mark.parametrize("options", [(), TWO], ids=["one", "two"])
def test_sigterm_commits_what_finished_and_exits_75(
    slow_job: Path, expected: list[dict[str, object]], options: tuple[str, ...]
) -> None:
    ledger = Ledger(LocalStorage(slow_job.parent / "out"))
    with subprocess.Popen(
        command("run", slow_job, "--set", "run.flush_rows=20", *SLOWER, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        wait_until(lambda: bool(ledger.storage.list(f"{STATE}/parts")))
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped: on purpose, with work left; run again to go on" in told
    assert not list((slow_job.parent / "out").glob("part-*.parquet"))
    assert run_cli("run", slow_job).returncode == 0
    assert published(slow_job.parent / "out") == expected


def test_a_second_run_at_once_exits_75_and_says_who(
    slow_job: Path, expected: list[dict[str, object]]
) -> None:
    with subprocess.Popen(
        command("run", slow_job, *SLOWER), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as first:
        lock = slow_job.parent / "out" / STATE / "lock"
        wait_until(lambda: lock.exists() and bool(lock.read_text()))
        second = run_cli("run", slow_job)
        first.wait(timeout=240)
    assert second.returncode == 75
    assert f"process {first.pid} on" in second.stderr
    assert first.returncode == 0
    assert published(slow_job.parent / "out") == expected


def test_a_torn_part_is_not_believed_and_its_rows_are_done_again(
    slow_job: Path, expected: list[dict[str, object]]
) -> None:
    storage = LocalStorage(slow_job.parent / "out")
    with subprocess.Popen(command("run", slow_job), stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: len(storage.list(f"{STATE}/parts")) >= 2)
        process.kill()
    torn = storage.path(storage.list(f"{STATE}/parts")[0])
    overwrite(torn, torn.read_bytes()[:-100])
    done = run_cli("run", slow_job)
    assert done.returncode == 0, done.stderr
    assert "does not count" in done.stdout
    assert published(slow_job.parent / "out") == expected


def test_a_part_with_a_flipped_bit_is_redone_by_the_next_run(
    slow_job: Path, expected: list[dict[str, object]]
) -> None:
    storage = LocalStorage(slow_job.parent / "out")
    assert run_cli("run", slow_job, "--set", "gate.max_error_rate=0.001").returncode == 3
    flipped = storage.path(storage.list(f"{STATE}/parts")[2])
    data = bytearray(flipped.read_bytes())
    data[300] ^= 1
    overwrite(flipped, data)
    stopped = run_cli("run", slow_job)
    assert stopped.returncode == 1
    assert f"{flipped.name}: damaged" in stopped.stderr
    done = run_cli("run", slow_job)
    assert done.returncode == 0, done.stderr
    assert published(slow_job.parent / "out") == expected
