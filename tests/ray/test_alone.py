"""Ray started by the cluster itself, and addresses that lead nowhere."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from batchgen.cluster.machines import Resources, fit, make_folder
from batchgen.cluster.ray import RayCluster
from batchgen.core.errors import ConfigError
from tests.ray.support import ONE_CPU, is_running, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

DRIVER = """
import os, signal, sys, tempfile, time
from pathlib import Path
from batchgen.cluster.machines import Resources
from batchgen.cluster.ray import RayCluster
from tests.ray.support import StandIn, badge, is_running

heard = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: heard.append(number))

def check_signals(when):
    heard.clear()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert heard == [signal.SIGTERM, signal.SIGINT], (when, heard)
    # What Ray installs below Python's handlers ends the process by an alarm.
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0), when

for again in (False, True):
    with RayCluster(None, Resources(0.5, 0.0), room_for=100, make=StandIn) as cluster:
        assert cluster.capacity().num_now == 100
        check_signals("after the start")
        cluster.start(badge())
        cluster.exchange(1, [("pid",), ("start_engine",), ("niceness",)], 0.1)
        ((_, news),) = cluster.wait(20)
        pid, engine, niceness = news.events
        assert niceness == os.getpriority(os.PRIO_PROCESS, 0)
        os.killpg(os.getpgrp(), signal.SIGINT)  # Ctrl-C in a terminal.
        cluster.exchange(1, [("sleep", 60)], 0.1)
        if again:
            print(os.getpid(), pid, *engine, flush=True)
            time.sleep(60)
        os.kill(pid, signal.SIGKILL)  # Of this Ray would tell on stdout.
        ((_, gone),) = cluster.wait(20)
        assert "killed" in gone.reason, gone
    check_signals("after the end")
    assert not list(Path(tempfile.gettempdir()).glob(f"batchgen-ray-{os.getpid()}-*"))
"""


def test_a_cluster_of_this_machine_alone(tmp_path: Path) -> None:
    with (
        (tmp_path / "stderr").open("w+") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        ) as driver,
    ):
        assert driver.stdout is not None
        line = driver.stdout.readline()
        assert (tmp_path / "stderr").read_text() == ""
        pids = [int(word) for word in line.split()]
        assert len(pids) == 5, "nothing else is printed"
        assert all(map(is_running, pids))
        raylets = [pid for pid in pids_of("raylet") if parent_of(pid) == driver.pid]
        children = [pid for pid in pids_of("") if parent_of(pid) in raylets]
        assert len(children) >= 3, "the worker and two agents"
        driver.kill()
    ours = [*pids, *raylets, *children]
    wait_until(lambda: not any(map(is_running, ours)), 20, lambda: list(map(told_of, ours)))
    make_folder().rmdir()
    assert not list(Path("/tmp").glob(f"batchgen-ray-{pids[0]}-*"))


def pids_of(name: str) -> list[int]:
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/comm")
        if name in path.read_text()
    ]


def told_of(pid: int) -> str:
    return f"{pid} {Path(f'/proc/{pid}/status').read_text()[:90]!r}" if is_running(pid) else "-"


def parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


@pytest.fixture
def silent_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize(
    ("address", "told"),
    [
        (lambda _: "ray://127.0.0.1:10001", "Ray Client is not supported"),
        (lambda port: f"127.0.0.1:{port}", "nobody answers at it: [Errno 111]"),
        (lambda _: "127.0.0.1:ray", "nobody answers at it: invalid literal"),
        (lambda _: "head", "expected auto or HOST:PORT"),
        (lambda _: "auto", "where auto leads: [Errno 111]"),
    ],
    ids=["client", "silent", "no-port", "no-host", "stale"],
)
def test_an_address_that_leads_nowhere(
    address: Callable[[int], str],
    told: str,
    silent_port: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent_port}")
    with pytest.raises(ConfigError) as caught:
        RayCluster(address(silent_port), ONE_CPU)
    assert str(caught.value).startswith(f"[run]: ray_address = {address(silent_port)!r}: ")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("needs", "node", "num"),
    [
        (Resources(1.0, 0.0), {"CPU": 8.0}, 8),
        (Resources(3.0, 0.0), {"CPU": 8.0}, 2),
        (Resources(0.1, 0.0), {"CPU": 1.0}, 10),
        (Resources(1.0, 1.0), {"CPU": 8.0}, 0),
        (Resources(1.0, 1.0), {"CPU": 8.0, "GPU": 2.0}, 2),
        (Resources(1.0, 2.0), {"CPU": 8.0, "GPU": 7.0}, 3),
        (Resources(1.0, 0.4), {"CPU": 8.0, "GPU": 2.0}, 4),
        (Resources(1.0, 0.7), {"CPU": 8.0, "GPU": 2.0}, 2),
        (Resources(4.0, 0.5), {"CPU": 8.0, "GPU": 2.0}, 2),
    ],
)
def test_what_fits_on_a_node(needs: Resources, node: dict[str, float], num: int) -> None:
    assert fit(needs, node) == num
