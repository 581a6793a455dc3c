"""Whom an output is open to: readers that are other users, and writers of one group."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from batchgen.storage import LocalStorage
from batchgen.store.books import STATE
from batchgen.store.runs import RunLock
from tests.e2e.support import shown, write_job, write_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")

ANNA, BERT, GUEST = 41001, 41002, 41003
TEAM, GUESTS = 42001, 42003


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of a group's, below nothing that is closed, with a job and 60 rows."""
    folder = Path(tempfile.mkdtemp(prefix="batchgen-rights-"))
    write_rows(folder / "in.jsonl", 60)
    write_job(folder, "in.jsonl", output={"rows_per_file": 40}, gate={"max_error_rate": 1.0})
    os.chown(folder, ANNA, TEAM)
    folder.chmod(0o2775)
    yield folder
    shutil.rmtree(folder)


def act(user: int, *args: str | Path, umask: int = 0o022) -> subprocess.CompletedProcess[str]:
    """Run a command as somebody."""
    group = GUESTS if user == GUEST else TEAM
    who = map(str, (user, group, f"{umask:o}"))
    command = [sys.executable, "-m", "tests.acting", *who, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_another_user_reads_what_is_published_and_nothing_else(place: Path) -> None:
    first = act(ANNA, "run", place / "job.toml")
    assert first.returncode == 0, first.stderr
    for verb in (["status"], ["show", "-n", "1"], ["snapshots"], ["verify"]):
        done = act(GUEST, verb[0], place / "job.toml", *verb[1:])
        assert done.returncode == 0, (verb, done.stderr)
    status = json.loads(act(GUEST, "status", place / "job.toml", "--json").stdout)
    assert status["state"] == "complete"
    assert [Path(name).stat().st_uid for name in status["files"]] == [ANNA, ANNA]
    assert status["sizes"]["published"] > 0
    assert not {"parts", "runs"} & status["sizes"].keys()
    read = act(GUEST, "read", place / "out")
    assert read.stdout == "60 60\n", read.stderr
    closed = place / "out" / STATE
    for name in ("parts", "rows", "runs"):
        assert stat.S_IMODE((closed / name).stat().st_mode) & 0o777 == 0o700


def test_another_user_who_may_not_is_told_so_and_breaks_nothing(place: Path) -> None:
    assert (
        act(ANNA, "run", place / "job.toml", "--set", "gate.max_error_rate=0.001").returncode == 3
    )
    done = act(GUEST, "show", place / "job.toml")
    assert done.returncode == 2
    assert "is not open to this user" in done.stderr
    assert "run again" not in done.stderr
    status = json.loads(act(GUEST, "status", place / "job.toml", "--json").stdout)
    assert (status["num_rows"], status["num_durable"]) == (60, None)
    done = act(GUEST, "run", place / "job.toml")
    assert done.returncode in {1, 2}
    assert "Traceback" not in done.stderr
    assert act(ANNA, "run", place / "job.toml").returncode == 0


def test_an_output_that_is_closed_says_whose_it_is_to_open(place: Path) -> None:
    assert act(ANNA, "run", place / "job.toml").returncode == 0
    (place / "out" / STATE).chmod(0o700)  # As version 0.1.0 made it.
    for verb in ("status", "show", "snapshots", "verify"):
        done = act(GUEST, verb, place / "job.toml")
        assert done.returncode == 2, verb
        assert "is not open to this user" in done.stderr
        assert "Traceback" not in done.stderr


def test_another_user_sees_that_a_run_is_at_work(place: Path) -> None:
    assert act(ANNA, "run", place / "job.toml").returncode == 0
    lock = RunLock(LocalStorage(place / "out"), "run-9")
    lock.acquire()
    try:
        status = json.loads(act(GUEST, "status", place / "job.toml", "--json").stdout)
    finally:
        lock.release()
    assert status["state"] == "running"
    assert status["run"]["run_id"] == "run-9"


def test_writers_of_a_group_share_a_job(place: Path) -> None:
    assert act(ANNA, "run", place / "job.toml", umask=0o002).returncode == 0
    with (place / "in.jsonl").open("a") as rows:
        rows.write('{"id": 99, "text": "one more"}\n')
    done = act(BERT, "run", place / "job.toml", "--json", umask=0o002)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["num_carried"], summary["num_planned"]) == (60, 61)
    assert act(ANNA, "verify", place / "job.toml").returncode == 0
    first = place / "out" / shown(place / "out")[0]
    first.unlink()  # The snapshot's own stays; whoever runs next shows it again.
    mended = act(ANNA, "run", place / "job.toml", umask=0o002)
    assert mended.returncode == 0, mended.stderr
    assert first.exists()
    first.unlink()
    mended = act(BERT, "run", place / "job.toml", umask=0o002)
    assert mended.returncode == 0, mended.stderr
    assert first.exists()
    assert act(BERT, "prune", place / "job.toml", "--keep", "1", umask=0o002).returncode == 0
    assert act(ANNA, "run", place / "job.toml", "--fresh", umask=0o002).returncode == 0
    assert act(BERT, "verify", place / "job.toml").returncode == 0
    assert act(GUEST, "status", place / "job.toml").returncode == 0
    modes = {
        stat.S_IMODE(path.stat().st_mode)
        for path in (place / "out").rglob("*")
        if path.suffix == ".parquet"
    }
    assert modes == {0o444}
