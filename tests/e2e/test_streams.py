"""Words that nobody can read: no run ends by them, and no command complains."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

import batchgen
from batchgen.cli import cli
from tests.e2e.support import command, wait_until, write_job, write_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FULL = "/dev/full"


def job_of(folder: Path, **tables: object) -> Path:
    """A job with error rows, within its gate."""
    write_rows(folder / "in.jsonl", 60)
    return write_job(folder, "in.jsonl", **{"gate": {"max_error_rate": 1.0}, **tables})


@pytest.fixture(scope="module")
def done_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that is published."""
    job = job_of(tmp_path_factory.mktemp("done"))
    batchgen.run(job)
    return job


def in_shell(redirection: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command with streams as a shell makes them."""
    line = ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *command(*args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


def without_reader(
    *args: str | Path, stream: str = "stdout"
) -> tuple[subprocess.Popen[str], str, str]:
    """Run a command with a pipe that nobody reads; the process, its stdout and its stderr."""
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writing}
    process = subprocess.Popen(command(*args), text=True, **streams)
    os.close(writing)
    out, err = process.communicate(timeout=120)
    return process, out or "", err or ""


def assert_published(job: Path) -> None:
    """Nothing of what was said went into a file of the output."""
    assert CliRunner().invoke(cli, ["verify", str(job)]).exit_code == 0
    assert batchgen.read(job).collect().height == 60
    words = (b"batchgen: ", b"complete", b"rows/s")
    for path in job.parent.joinpath("out").rglob("*.parquet"):
        assert not path.read_bytes().startswith(words)


@pytest.mark.parametrize(
    "redirection",
    ["2>&-", "<&- >&- 2>&-", ">/dev/full 2>&1", "2</dev/null"],
)
def test_a_run_goes_on_without_words(tmp_path: Path, redirection: str) -> None:
    job = job_of(tmp_path)
    done = in_shell(redirection, "run", job, "--json")
    assert done.returncode == 0
    if redirection.startswith("2"):
        assert json.loads(done.stdout)["state"] == "complete"
    assert_published(job)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_run_whose_reader_is_gone_ends_with_its_own_code(tmp_path: Path, stream: str) -> None:
    job = job_of(tmp_path)
    process, _, err = without_reader("run", job, "--json", stream=stream)
    assert (process.returncode, "Error" in err) == (0, False)
    assert_published(job)


def test_the_code_tells_what_the_json_cannot(tmp_path: Path) -> None:
    job = job_of(tmp_path, gate={"max_error_rate": 0.0})
    assert in_shell(f">{FULL}", "run", job, "--json").returncode == 3


def test_a_program_that_runs_a_job_may_have_a_stderr_that_fails(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    with contextlib.suppress(OSError), Path(FULL).open("w") as full, redirect_stderr(full):
        summary = batchgen.run(job)
    assert summary.state == "complete"


COMMANDS: dict[str, tuple[str, ...]] = {
    "help": ("--help",),
    "schema": ("schema",),
    "show": ("show", "JOB", "-n", "50"),
    "plan": ("plan", "JOB", "--json"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_whose_reader_has_had_enough_is_quiet(done_job: Path, name: str) -> None:
    args = [done_job if arg == "JOB" else arg for arg in COMMANDS[name]]
    process, _, err = without_reader(*args)
    assert (process.returncode, err) == (0, "")


def test_a_command_that_has_only_to_print_and_cannot_says_so() -> None:
    done = in_shell(f">{FULL}", "schema")
    assert done.returncode == 1
    assert done.stderr == "batchgen: stdout cannot be written: No space left on device\n"


def test_a_refusal_that_nobody_can_read_keeps_its_code(tmp_path: Path) -> None:
    assert in_shell("2>&-", "run", tmp_path / "none.toml").returncode == 2
    assert in_shell(f"2>{FULL}", "run").returncode == 2


@contextlib.contextmanager
def at_a_terminal(
    job: Path, *, ignores: bool
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], None]]]:
    """A run at a terminal of its own, and what takes the terminal away."""

    def begin() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignores else signal.SIG_DFL)
        os.setsid()
        os.open(os.ttyname(0), os.O_RDWR)  # The controlling one: its end sends SIGHUP.

    master, slave = pty.openpty()
    process = subprocess.Popen(
        command("run", job),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        preexec_fn=begin,  # noqa: PLW1509 - this process has no threads that hold locks
    )
    os.close(slave)
    try:
        yield process, lambda: os.close(master)
    finally:
        process.kill()
        process.wait()


SLOW = {"model": {"engine": {"max_num_seqs": 1, "step_s": 0.1}}, "run": {"flush_rows": 5}}


@pytest.mark.parametrize("ignores", [False, True], ids=["asks for a stop", "nohup"])
def test_a_terminal_that_is_gone(tmp_path: Path, *, ignores: bool) -> None:
    job = job_of(tmp_path, **SLOW)
    with at_a_terminal(job, ignores=ignores) as (process, hang_up):
        wait_until(lambda: any((tmp_path / "out").rglob("e*-s000001.parquet")))
        hang_up()
        assert process.wait(60) == (0 if ignores else 75)
    if not ignores:
        assert batchgen.run(job).run["num_resumed"] > 5
    assert_published(job)


def test_sighup_is_answered_as_sigterm_is(tmp_path: Path) -> None:
    job = job_of(tmp_path, **SLOW)
    process = subprocess.Popen(
        command("run", job),
        stderr=subprocess.PIPE,
        text=True,
        # These tests may run under nohup, and what is ignored is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509
    )
    wait_until(lambda: any((tmp_path / "out").rglob("e*-s000001.parquet")))
    process.send_signal(signal.SIGHUP)
    assert "SIGHUP again to drop them" in process.communicate(timeout=60)[1]
    assert process.returncode == 75
