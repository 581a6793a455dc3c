"""`RayCluster` on a cluster of three nodes: what comes back, and what is heard of deaths."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from batchgen.cluster.machines import Resources
from batchgen.cluster.messages import Failed, Gone, Lease, Report, Take
from batchgen.cluster.ray import RayCluster, _Actor
from batchgen.core.errors import ConfigError
from batchgen.core.records import RowSet
from tests.ray.support import ONE_CPU, StandIn, Unable, badge, is_running, nodes, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.ray.support import Nodes

UP_S = 20.0


@pytest.fixture(scope="module")
def three() -> Iterator[Nodes]:
    with nodes(3, cpus=2, gpus=2) as found:
        yield found


@pytest.fixture(scope="module")
def standing(three: Nodes) -> Iterator[RayCluster]:
    """A cluster with one worker, for what does no harm. Its connection is everybody's."""
    with RayCluster(three.address, ONE_CPU, make=StandIn) as cluster:
        cluster.start(badge())
        yield cluster


@pytest.fixture
def cluster(three: Nodes, standing: RayCluster) -> Iterator[RayCluster]:
    assert standing.capacity().num_now == 6
    with RayCluster(three.address, ONE_CPU, make=StandIn) as cluster:
        yield cluster


def news_of(cluster: RayCluster, timeout_s: float = UP_S) -> tuple[int, Report | Gone]:
    """The next that comes back."""
    (news, *more) = cluster.wait(timeout_s)
    assert not more
    return news


def ask(cluster: RayCluster, number: int, *orders: Any) -> Any:
    """A worker's answer to the last order."""
    cluster.exchange(number, orders, 0.1)
    found, news = news_of(cluster)
    assert found == number
    assert isinstance(news, Report), news
    return news.events[-1]


def end_of(cluster: RayCluster, timeout_s: float = UP_S) -> str:
    """The reason of the only worker's end."""
    _, news = news_of(cluster, timeout_s)
    assert isinstance(news, Gone), news
    assert "\n" not in news.reason
    return news.reason


def test_workers_answer_each_for_itself(cluster: RayCluster) -> None:
    for number in (1, 2, 3):
        cluster.start(badge(number))
        cluster.exchange(number, [("number",)], 0.1)
    back: dict[int, Any] = {}
    while len(back) < 3:
        back |= dict(cluster.wait(UP_S))
    assert {number: news.events for number, news in back.items()} == {n: [n] for n in (1, 2, 3)}
    assert cluster.wait(0.05) == []


def test_silence_counts_from_when_a_worker_was_first_heard(cluster: RayCluster) -> None:
    cluster.start(badge())
    assert cluster.silent_s(1) == 0
    cluster.exchange(1, [], 0.0)
    assert cluster.silent_s(1) == 0, "it was never heard of"
    news_of(cluster)
    cluster.exchange(1, [], 0.5)
    assert cluster.wait(0.2) == []
    assert cluster.silent_s(1) >= 0.2
    news_of(cluster)
    assert cluster.silent_s(1) == 0


def test_rows_travel_as_references(standing: RayCluster) -> None:
    payload = standing.put([{"row": 1}])
    kind, rows = ask(standing, 1, Take(Lease(RowSet(), payload)))
    assert (kind, rows) == ("ObjectRef", [{"row": 1}])


def test_a_killed_worker_is_gone(cluster: RayCluster) -> None:
    cluster.start(badge())
    pid = ask(cluster, 1, ("pid",))
    cluster.exchange(1, [("sleep", 60)], 0.1)
    os.kill(pid, signal.SIGKILL)
    reason = end_of(cluster, 5)
    assert "was killed or crashed" in reason
    assert len(reason) < 120
    assert cluster.wait(0.05) == []


def test_a_worker_that_exits_is_gone(cluster: RayCluster) -> None:
    cluster.start(badge())
    cluster.exchange(1, [("exit", 3)], 0.1)
    assert "its process" in end_of(cluster)


def test_a_replica_that_cannot_be_made_is_gone(three: Nodes, standing: RayCluster) -> None:
    assert standing.capacity().num_now == 6
    with RayCluster(three.address, ONE_CPU, make=Unable) as cluster:
        cluster.start(badge(7))
        cluster.exchange(7, [], 0.1)
        assert end_of(cluster) == "LookupError: worker 7 finds no model here"


def test_an_exception_ends_the_worker(cluster: RayCluster) -> None:
    cluster.start(badge())
    pid = ask(cluster, 1, ("pid",))
    cluster.exchange(1, [("fail", LookupError("no room"))], 0.1)
    assert end_of(cluster) == "LookupError: no room"
    wait_until(lambda: not is_running(pid), 40)


def test_a_seat_tells_what_was_raised() -> None:
    seat = _Actor({}, "", pickle.dumps((StandIn, badge())))
    assert seat.exchange([("number",)], 0) == Report([1], None)
    bug = ValueError("a bug\nof two lines")
    assert seat.exchange([("fail", bug)], 0) == Gone("ValueError: a bug of two lines")
    refused = ConfigError("job.toml", ["a", "b"])
    assert seat.exchange([("fail", refused)], 0) == Report([Failed(refused)], None)


def test_who_is_fired_takes_the_engine_along(cluster: RayCluster) -> None:
    cluster.start(badge())
    pids = [*ask(cluster, 1, ("start_engine",)), ask(cluster, 1, ("pid",))]
    assert all(map(is_running, pids))
    cluster.exchange(1, [("sleep", 60)], 0.1)
    cluster.kill(1)
    wait_until(lambda: not any(map(is_running, pids)), 40)
    assert cluster.wait(0.05) == []
    cluster.kill(1)


def test_a_frozen_worker_can_be_fired(cluster: RayCluster) -> None:
    cluster.start(badge())
    pids = [ask(cluster, 1, ("pid",)), *ask(cluster, 1, ("start_engine",))]
    os.kill(pids[0], signal.SIGSTOP)
    cluster.kill(1)
    wait_until(lambda: not any(map(is_running, pids)), 40)


def test_close_lets_replicas_end_in_order(
    three: Nodes, standing: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert standing.capacity().num_now == 6
    monkeypatch.setenv("BATCHGEN_TEST_CLOSED", str(tmp_path / "closed"))
    with RayCluster(three.address, ONE_CPU, make=StandIn) as cluster:
        cluster.start(badge())
        pids = [ask(cluster, 1, ("pid",)), *ask(cluster, 1, ("start_engine",))]
        for number in (2, 3, 4, 5, 6, 7):  # The last finds no room, and must not be waited for.
            cluster.start(badge(number))
    assert (tmp_path / "closed").exists()
    wait_until(lambda: not any(map(is_running, pids)), 40)
    cluster.close()


def test_a_node_comes_and_goes(three: Nodes, standing: RayCluster) -> None:
    assert standing.capacity() == (6, "3 nodes, 6 CPUs")
    with RayCluster(three.address, Resources(3.0, 0.0), make=StandIn) as cluster:
        cluster.start(badge())
        cluster.exchange(1, [("start_engine",)], 0.1)
        assert cluster.wait(0.3) == []
        assert cluster.capacity() == (0, "3 nodes, 6 CPUs")
        extra = three.add(cpus=4)
        assert cluster.capacity() == (1, "4 nodes, 10 CPUs")
        _, report = news_of(cluster)
        assert isinstance(report, Report)
        cluster.exchange(1, [("sleep", 60)], 0.1)
        three.remove(extra)
        assert end_of(cluster, 10)
        wait_until(lambda: not any(map(is_running, report.events[0])), 40)
        wait_until(lambda: cluster.capacity().num_now == 0, 40)


@pytest.mark.parametrize(
    ("needs", "num_places"),
    [
        (Resources(0.5, 0), 12),
        (Resources(1.0, 0.5), 6),
        (Resources(0.5, 0.5), 12),
        (Resources(1.0, 2), 3),
    ],
)
def test_places_are_counted_by_node(
    three: Nodes, standing: RayCluster, needs: Resources, num_places: int
) -> None:
    assert standing.capacity().num_now == 6
    with RayCluster(three.address, needs, make=StandIn) as cluster:
        assert cluster.capacity().num_now == num_places


@pytest.mark.parametrize(("num_gpus", "visible"), [(0, {None}), (0.5, {"0", "1"}), (2, {"0,1"})])
def test_an_engine_sees_the_gpus_of_its_worker(
    three: Nodes,
    standing: RayCluster,
    num_gpus: float,
    visible: set[str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert standing.capacity().num_now == 6
    monkeypatch.setenv("VLLM_TEST_WORD", "told")
    monkeypatch.setenv("VLLM_HOST_IP", "10.0.0.1")
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "VLLM_TEST_WORD", "VLLM_HOST_IP")
    with RayCluster(three.address, Resources(1.0, num_gpus), make=StandIn) as cluster:
        cluster.start(badge())
        seen = ask(cluster, 1, ("environment", *names))
    assert seen.pop("CUDA_VISIBLE_DEVICES") in visible
    threads = None if num_gpus else "1"
    assert seen == {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "VLLM_TEST_WORD": "told",
        "VLLM_HOST_IP": None,
    }


def test_the_drivers_folder_hides_no_module(standing: RayCluster) -> None:
    path = ask(standing, 1, ("path",))
    assert path[-1] == str(Path.cwd())
    assert path.index(str(Path.cwd())) == len(path) - path.count(str(Path.cwd()))


def test_workers_end_with_a_driver_that_is_killed(three: Nodes) -> None:
    code = f"""
import time
from batchgen.cluster.ray import RayCluster
from tests.ray.support import ONE_CPU, StandIn, badge
cluster = RayCluster({three.address!r}, ONE_CPU, make=StandIn)
cluster.start(badge())
cluster.exchange(1, [("pid",), ("start_engine",)], 0.1)
(_, news), = cluster.wait(20)
cluster.exchange(1, [("sleep", 60)], 0.1)
print(news.events[0], *news.events[1], flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 4
        assert all(map(is_running, pids))
        driver.kill()
    wait_until(lambda: not any(map(is_running, pids)), 40)
