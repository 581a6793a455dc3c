"""Ray clusters on this machine, and a worker that does as it is told."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.cluster.machines import Resources
from batchgen.cluster.messages import Report, Take, WorkerInit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

STORE_BYTES = 80 << 20
SYSTEM_CONFIG = {
    # A node that is killed counts as dead after 2 s, by default after 15.
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
    "memory_monitor_refresh_ms": 0,
    "worker_niceness": 0,
    # How long a frozen worker lives that is to die; by default 5 s.
    "kill_worker_timeout_milliseconds": 1000,
}
GUARD = 'read -r orderly && exit 0; kill -KILL "-$1"'
ONE_CPU = Resources(1.0, 0.0)


class Nodes:
    """A cluster whose nodes are processes of this machine. They die with this process."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        assert not ray.is_initialized(), "a cluster was left open"
        self._cluster = Cluster()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, *, cpus: float = 2, gpus: float = 0, **resources: float) -> Any:
        """A node with so much of everything, the GPUs imagined."""
        config = {} if self._cluster.head_node else {"_system_config": SYSTEM_CONFIG}
        return self._cluster.add_node(
            **config,
            num_cpus=cpus,
            num_gpus=gpus,
            resources=resources,
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            include_log_monitor=False,
        )

    def remove(self, node: Any) -> None:
        """Kill all its processes, as a machine that loses its power."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()


@contextlib.contextmanager
def nodes(num_nodes: int = 3, *, cpus: float = 2, gpus: float = 0) -> Iterator[Nodes]:
    """A cluster to change: the first node is the head and must stay."""
    found = Nodes()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for _ in range(num_nodes):
            found.add(cpus=cpus, gpus=gpus)
        yield found
    finally:
        found.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def cluster(num_nodes: int = 3, *, cpus: float = 2, gpus: float = 0) -> Iterator[str]:
    """The address of a cluster for `run.ray_address`."""
    with nodes(num_nodes, cpus=cpus, gpus=gpus) as found:
        yield found.address


def badge(number: int = 1) -> WorkerInit:
    return WorkerInit(number, number, None, "run-a", "0")  # type: ignore[arg-type]


class StandIn:
    """A replica whose orders are words; it answers each in its report's events."""

    def __init__(self, given: WorkerInit, *, fetch: Callable[[Any], Sequence[Any]]) -> None:
        self._fetch = fetch
        self._children: list[subprocess.Popen[bytes]] = []
        self.given = given

    def exchange(self, orders: Sequence[Any], wait_s: float) -> Report:
        answers = [self._follow(order) for order in orders]
        if not answers:
            time.sleep(wait_s)
        return Report(answers, None)

    def _follow(self, order: Any) -> Any:
        if isinstance(order, Take):
            payload = order.lease.payload
            return type(payload).__name__, self._fetch(payload)
        verb, *rest = order
        return getattr(self, verb)(*rest)

    def close(self) -> None:
        for path in os.environ.get("BATCHGEN_TEST_CLOSED", "").split():
            Path(path).touch()

    def number(self) -> int:
        return self.given.number

    def pid(self) -> int:
        return os.getpid()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def fail(self, error: Exception) -> None:
        raise error

    def exit(self, code: int) -> None:
        os._exit(code)

    def niceness(self) -> int:
        return os.getpriority(os.PRIO_PROCESS, 0)

    def path(self) -> list[str]:
        return sys.path

    def environment(self, *names: str) -> dict[str, str | None]:
        """As an engine's process would see it."""
        code = f"import os; print({{name: os.environ.get(name) for name in {names!r}}})"
        command = [sys.executable, "-c", code]
        text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        found: dict[str, str | None] = eval(text)
        return found

    def start_engine(self) -> list[int]:
        """A process group with a guard, as `engine.process` starts them; pids of all three."""
        code = "sleep 600 & echo $!; sleep 600"
        host = subprocess.Popen(
            ["/bin/sh", "-c", code], stdout=subprocess.PIPE, start_new_session=True
        )
        assert host.stdout is not None
        core = int(host.stdout.readline())
        guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, "guard", str(host.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._children += [host, guard]
        return [host.pid, core, guard.pid]


class Unable:
    """A replica that cannot be made."""

    def __init__(self, given: WorkerInit, *, fetch: Any) -> None:
        msg = f"worker {given.number} finds\nno model here"
        raise LookupError(msg)


def is_running(pid: int) -> bool:
    """Whether a process lives; nobody may ever reap it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_until(is_so: Callable[[], bool], timeout_s: float, tell: Callable[[], Any] = str) -> float:
    """Seconds until something was so."""
    start = time.monotonic()
    while not is_so():
        assert time.monotonic() - start < timeout_s, f"it did not come: {tell()}"
        time.sleep(0.02)
    return time.monotonic() - start
