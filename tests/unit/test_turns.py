"""Engines on one GPU come up one after the other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from batchgen.engine.devices import turn_file, turn_to_start

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

BOTH = multiprocessing.get_context("spawn")


def test_the_turn_is_taken_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "turn"
    with turn_to_start(path, wait_s=0) as first:
        with turn_to_start(path, wait_s=0) as second:
            assert (first, second) == (True, False)
        with turn_to_start(path, wait_s=0) as third:
            assert not third  # The second did not let go of the first one's.
    with turn_to_start(path, wait_s=0) as fourth:
        assert fourth


def _hold(path: Path, tell: Connection) -> None:
    with turn_to_start(path) as has_it:
        tell.send(has_it)
        signal.pause()


def test_the_turn_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "turn"
    ours, theirs = BOTH.Pipe()
    holder = BOTH.Process(target=_hold, args=(path, theirs))
    holder.start()
    try:
        assert ours.poll(30)
        assert ours.recv() is True
        with turn_to_start(path, wait_s=0) as has_it:
            assert not has_it
    finally:
        holder.kill()
        holder.join()
    with turn_to_start(path, wait_s=10) as has_it:
        assert has_it


def test_who_waits_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with turn_to_start(tmp_path / "turn") as first:
        assert first
        assert capfd.readouterr().err == ""
        with turn_to_start(tmp_path / "turn", wait_s=0.3) as second:
            assert not second
    assert capfd.readouterr().err == "batchgen: waits until another engine on this GPU is up\n"


def test_an_engine_comes_up_where_there_is_no_turn_to_have(tmp_path: Path) -> None:
    with turn_to_start(None) as has_it:
        assert not has_it
    with turn_to_start(tmp_path / "missing" / "turn") as has_it:
        assert not has_it
    (tmp_path / "victim").touch()
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with turn_to_start(tmp_path / "link") as has_it:
        assert not has_it


def test_who_has_inherited_the_file_does_not_keep_the_turn(tmp_path: Path) -> None:
    path = tmp_path / "turn"
    with turn_to_start(path):
        ours = [fd for fd in Path("/proc/self/fd").iterdir() if fd.exists() and fd.samefile(path)]
        heir = subprocess.Popen(["sleep", "60"], pass_fds=[int(fd.name) for fd in ours])
        assert ours
    try:
        with turn_to_start(path, wait_s=0) as has_it:
            assert has_it
    finally:
        heir.kill()
        heir.wait()


def test_a_pipe_of_that_name_does_not_hold_anybody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "turn")
    with turn_to_start(tmp_path / "turn", wait_s=0) as has_it:
        assert has_it


def test_the_file_is_for_all_users(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with turn_to_start(tmp_path / "turn"):
            assert (tmp_path / "turn").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_an_error_gives_the_turn_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), turn_to_start(tmp_path / "turn"):
        raise KeyError
    with turn_to_start(tmp_path / "turn", wait_s=0) as has_it:
        assert has_it


def test_turns_are_of_the_gpus_that_are_seen(tmp_path: Path) -> None:
    names = {
        turn_file({**seen}, tmp_path).name
        for seen in (
            {},
            {"CUDA_VISIBLE_DEVICES": "0"},
            {"CUDA_VISIBLE_DEVICES": "1"},
            {"CUDA_VISIBLE_DEVICES": "0,1"},
            {"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"},
        )
    }
    assert names == {
        "batchgen-start-all.lock",
        "batchgen-start-0.lock",
        "batchgen-start-1.lock",
        "batchgen-start-0_1.lock",
        "batchgen-start-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6.lock",
    }
    assert turn_file({}).parent.is_dir()
    assert os.fspath(turn_file({"CUDA_VISIBLE_DEVICES": "../x"}, tmp_path)).count("..") == 0
