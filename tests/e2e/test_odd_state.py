"""State files that are no files, or nest without end: each command ends, with a line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from batchgen.cli import cli as commands
from batchgen.core.errors import BatchgenError
from tests.e2e.support import command, write_job, write_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HANG_S = 120
DEEP = 100_000
COMMANDS = ("run", "plan", "status", "verify", "show", "snapshots")
KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "lists": lambda path: path.write_text("[" * DEEP + "]" * DEEP),
    "objects": lambda path: path.write_text('{"format":' * DEEP + "1" + "}" * DEEP),
    "digits": lambda path: path.write_text('{"format": ' + "9" * 6000 + "}"),
}


@contextmanager
def ended() -> Iterator[None]:
    """What waits for a pipe, or reads a device to its end, raises after a long time."""

    def give_up(*_: object) -> None:
        msg = "it hangs"
        raise AssertionError(msg)

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    write_rows(folder / "in.jsonl", 5)
    job = write_job(folder, "in.jsonl")
    assert CliRunner().invoke(commands, ["run", str(job)]).exit_code == 0
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_place_of_a_state_file_is_told_and_never_waited_for(
    finished: Path, tmp_path: Path, kind: str
) -> None:
    state = finished / "out" / "_batchgen"
    names = [path.relative_to(finished) for path in state.rglob("*") if path.is_file()]
    assert {"json", "parquet", "bin"} <= {name.suffix[1:] for name in names}
    if kind not in {"pipe", "device"}:
        names = [name for name in names if name.suffix == ".json"]
    for number, name in enumerate(names):
        for verb in COMMANDS:
            folder = tmp_path / f"{number}-{verb}"
            shutil.copytree(finished, folder)
            (folder / name).unlink()
            KINDS[kind](folder / name)
            with ended():
                done = CliRunner().invoke(commands, [verb, str(folder / "job.toml")])
            assert isinstance(done.exception, BatchgenError | SystemExit | None), (name, verb)
            if isinstance(done.exception, BatchgenError):
                assert str(folder / "out") in str(done.exception)
                assert done.exception.exit_code in {1, 2}
            shutil.rmtree(folder)


@pytest.mark.parametrize("limit", ["-v 100000", "-v 300000", "-v 1500000", "-n 12"])
def test_a_limit_that_breaks_libraries_is_told_in_a_line(finished: Path, limit: str) -> None:
    script = f'ulimit {limit}; exec "$@"'
    shell = ["/bin/sh", "-c", script, "sh", *command("plan", finished / "job.toml")]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    option, _, given = limit.partition(" ")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"batchgen: ulimit {option}: ")
    assert f"limited to {given}, expected at least" in line


@pytest.mark.parametrize("num", ["0", "99999999999999999999999"])
def test_any_number_of_rows_may_be_asked_for(finished: Path, num: str) -> None:
    done = CliRunner().invoke(commands, ["show", str(finished / "job.toml"), "-n", num])
    assert done.exit_code == 0
