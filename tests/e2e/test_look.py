"""What can be asked of a job before it was run, of a wrong place, and while the gate holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import batchgen
from batchgen.core.errors import ConfigError, GateError
from batchgen.store.books import STATE
from tests.e2e.support import run_cli, write_job, write_rows

if TYPE_CHECKING:
    from pathlib import Path

NOT_YET = "the job has not been run yet; start it with `batchgen run`"
OVER = ["gate.max_error_rate=0.001"]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_rows(tmp_path / "in.jsonl", 60)
    return write_job(tmp_path, "in.jsonl")


def test_a_job_that_was_never_run_says_so_to_each_command(job: Path) -> None:
    out = job.parent / "out"
    told = {name: run_cli(name, job) for name in ("status", "show", "snapshots", "verify")}
    ends = {name: (done.returncode, done.stdout, done.stderr) for name, done in told.items()}
    assert ends == {
        "status": (0, f"{'output':24} {out}\n{'state':24} new: {NOT_YET}\n", ""),
        "show": (0, "", f"{out}: {NOT_YET}\n"),
        "snapshots": (0, "", f"{out}: {NOT_YET}\n"),
        "verify": (2, "", f"batchgen: {out}: nothing to verify, {NOT_YET}\n"),
    }


def test_a_folder_that_holds_no_job_is_refused_by_that_name(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    problem = (
        f"{foreign}: holds no batchgen job (no {STATE}/ in it), expected a job file or an output "
        "folder"
    )
    done = run_cli("status", foreign)
    assert (done.returncode, done.stderr) == (2, f"batchgen: {problem}\n")
    with pytest.raises(ConfigError) as caught:
        batchgen.read(foreign)
    assert str(caught.value) == problem
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError) as caught:
        batchgen.read(nowhere)
    assert str(caught.value) == (
        f"{nowhere}: does not exist, expected a job file or an output folder"
    )


def test_status_of_a_job_that_is_held_back_says_what_readers_see(job: Path) -> None:
    with pytest.raises(GateError):
        batchgen.run(job, overrides=OVER)
    lines = run_cli("status", job).stdout.splitlines()
    assert f"{'published':24} nothing yet" in lines
    assert run_cli("snapshots", job).stderr == "nothing is published yet\n"
    batchgen.run(job)
    with pytest.raises(GateError):
        batchgen.run(job, fresh=True, overrides=OVER)
    lines = run_cli("status", job).stdout.splitlines()
    assert f"{'state':24} held_back" in lines
    (line,) = [line for line in lines if line.startswith("published ")]
    assert line.startswith(f"{'published':24} snapshot 1 of 20")
    assert line.endswith("+00:00: 59 ok, 1 errors")
    batchgen.run(job)
    assert "published " not in run_cli("status", job).stdout
