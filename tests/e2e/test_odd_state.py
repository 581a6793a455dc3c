"""State files that are no files, or nest without end: each command ends, with a line."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from batchgen.cli import cli as commands
from batchgen.core.errors import BatchgenError
from tests.e2e.support import write_job, write_rows

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
        for command in COMMANDS:
            folder = tmp_path / f"{number}-{command}"
            shutil.copytree(finished, folder)
            (folder / name).unlink()
            KINDS[kind](folder / name)
            with ended():
                done = CliRunner().invoke(commands, [command, str(folder / "job.toml")])
            assert isinstance(done.exception, BatchgenError | SystemExit | None), (name, command)
            if isinstance(done.exception, BatchgenError):
                assert str(folder / "out") in str(done.exception)
                assert done.exception.exit_code in {1, 2}
            shutil.rmtree(folder)
