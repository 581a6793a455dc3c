"""Proof 2: every call of the disk failed once; and strace says that no other call exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest

from tests.torture.disks import Log
from tests.torture.harness import REPO, prove
from tests.torture.support import Job, check_snapshot, make_job, published

if TYPE_CHECKING:
    from pathlib import Path

STRACE = shutil.which("strace")
BESIDE_THE_DISK = ("/_batchgen/lock", "/vllm.log")
"""Written past the `Disk`: neither holds a result."""
CHANGES = (
    "open,openat,creat,write,pwrite64,writev,link,linkat,symlink,symlinkat,rename,renameat,"
    "renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,truncate,ftruncate,fsync,fdatasync,"
    "chmod,fchmod,fchmodat"
)
needs_strace = pytest.mark.skipif(STRACE is None, reason="strace is not installed")


@pytest.mark.timeout(1200)
def test_every_call_failed_once_in_every_way_costs_no_row():
    told = prove("tests.torture.sweep", "--percent", "1", timeout_s=1100)
    assert int(re.search(r"([\d,]+)  points\n", told)[1].replace(",", "")) > 700


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"), 60)


@pytest.fixture(scope="module")
def expected(job: Job) -> list[dict[str, Any]]:
    out = job.path.parent / "out"
    subprocess.run([sys.executable, "-m", "batchgen", *job.argv(out)], cwd=REPO, check=True)
    return published(out)


def traced(job: Job, tmp_path: Path, *options: str) -> tuple[int, str, Path]:
    """A real run under strace: exit code, stderr, output folder."""
    out = tmp_path / "out"
    command = [STRACE, "-f", "-qq", *options, sys.executable, "-m", "tests.torture.observed"]
    done = subprocess.run(
        [*command, str(job.path), str(out), str(tmp_path / "calls.log")],
        cwd=REPO,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stderr, out


KINDS = {
    "openat": "create",
    "write": "write",
    "link": "link",
    "rename": "rename",
    "unlink": "unlink",
    "mkdir": "make_folder",
    "fsync": "sync",
    "chmod": "chmod",
    "fchmodat": "chmod",
}


def seen_by_strace(trace: Path, out: Path) -> dict[str, set[str]]:
    """Kind -> paths under `out` that it changed or synced."""
    seen: dict[str, set[str]] = defaultdict(set)
    for line in trace.read_text(encoding="utf-8").splitlines():
        call = re.match(r"\d+\s+(\w+)\((.*)", line)
        if call is None or " = -1 " in line or str(out) not in line:
            continue
        kind, rest = call[1], call[2]
        if kind == "openat" and "O_CREAT" not in rest:
            assert "O_WRONLY" not in rest, line
            continue
        # What a file descriptor stands for; else the last name, since data may look like one.
        is_open = re.match(r"\d+<(/[^>]*)>", rest)
        path = is_open[1] if is_open else re.findall(r'["<](/[^">]*)[">]', rest)[-1]
        if not path.endswith(BESIDE_THE_DISK):
            assert kind in KINDS, line
            seen[KINDS[kind]].add(path)
    return seen


@needs_strace
def test_no_system_call_changes_the_output_past_the_disk(job, tmp_path):
    trace = tmp_path / "trace"
    code, told, out = traced(job, tmp_path, "-y", "-e", f"trace={CHANGES}", "-o", str(trace))
    assert code == 0, told
    by_disk: dict[str, set[str]] = defaultdict(set)
    for kind, path in Log(tmp_path / "calls.log").calls:
        by_disk["sync" if kind == "sync_folder" else kind].add(path)
    by_strace = seen_by_strace(trace, out)
    # Removing what is absent is a call of the disk, but changes nothing.
    by_disk["unlink"] &= by_strace["unlink"]
    assert by_strace.pop("sync") <= by_disk.pop("sync")
    assert by_strace == by_disk


@needs_strace
@pytest.mark.parametrize(
    ("call", "number", "fault"),
    [
        *[("fsync", number, "error=EIO") for number in (1, 12, 24)],
        *[("fsync", number, "signal=SIGKILL") for number in (9, 21)],
        *[("link", number, "error=ENOSPC") for number in (1, 4, 8)],
        *[("link", number, "signal=SIGKILL") for number in (3, 7)],
        *[("rename", number, "error=EIO") for number in (1, 5)],
        *[("unlink", number, "signal=SIGKILL") for number in (4, 12)],
    ],
)
def test_a_call_that_the_kernel_fails_costs_no_row(job, expected, tmp_path, call, number, fault):
    inject = f"inject={call}:{fault}:when={number}"
    options = ("-e", f"trace={call}", "-e", inject, "-o", os.devnull)
    code, told, out = traced(job, tmp_path, *options)
    assert code in (0, 1, -9, 137), told
    assert "Traceback" not in told
    again = subprocess.run(
        [sys.executable, "-m", "batchgen", *job.argv(out)],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    check_snapshot(out, expected, inject)
