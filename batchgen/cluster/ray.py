"""`RayCluster`: workers as Ray actors. The only module that imports Ray.

    driver     RayCluster      one actor handle, and at most one call under way, for each worker
    anywhere   _Actor        the actor: holds a `Worker`; its main thread waits in `exchange`
    below it   the engine   a process group of its own, killed by its guard when the actor dies

An actor is never restarted and no call is sent twice: what a dead worker leaves undone is the
driver's business, not Ray's. Actors are not detached, so that they end when the driver does.

Ray resolves a reference that is an argument, not one inside an argument: payloads in orders stay
references until `_fetch`. Facts about Ray are of 2.60, and were looked up in 2.52 as well.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import shutil
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from batchgen.cluster.machines import (
    counted,
    death_told,
    end_of_traceback,
    fit,
    guard_raylet,
    handlers_kept,
    head_refuses,
    make_folder,
    one_line,
    options_alone,
    prepare_environment,
    refusal,
    resources_of,
    worker_environment,
)
from batchgen.cluster.messages import Capacity, Failed, Gone, Order, Report, WorkerInit
from batchgen.cluster.worker import Worker
from batchgen.core.data import Lazy
from batchgen.core.errors import BatchgenError, ConfigError, EngineError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from batchgen.cluster.machines import Resources
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.runner import FeedBatch

ray: Any = Lazy("ray")
"""To be imported once the environment is prepared, see `_Session`."""
_WHERE = "[run]"
LEAVE_S = 5.0
"""How long workers may take to let go of their engines in order, before they are killed."""
_WORKER_VARIABLES = {
    # Ray would kill a dying worker's children, but not theirs: the engine's guard would be gone
    # and vLLM's core alive. The guard kills them all, however the worker dies.
    "RAY_kill_child_processes_on_worker_exit": "0",
    # A worker that asked for no GPU sees those that the machine's environment says.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class _Actor:
    """A worker's process, as Ray sees it. What may fail does so in `exchange`, which tells."""

    def __init__(self, environment: Mapping[str, str | None], folder: str, hired: bytes) -> None:
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        # Ray puts the driver's folder first on sys.path: a file json.py there must not be ours.
        sys.path.sort(key=lambda path: path == folder)
        self._started = hired
        self._worker: Any = None

    def exchange(self, orders: Sequence[Order], wait_s: float) -> Report | Gone:
        """Pass on to the worker, which is made first."""
        try:
            if self._worker is None:
                make, init = pickle.loads(self._started)  # noqa: S301 - from our driver
                self._worker = make(init, fetch=_fetch)
            report: Report = self._worker.exchange(orders, wait_s)
        except BatchgenError as exc:
            return Report([Failed(exc)], None)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the driver is to know its name
            traceback.print_exc()
            return Gone(one_line(f"{type(exc).__name__}: {exc}"))
        return report

    def close(self) -> None:
        """Let go of the engine in order."""
        if self._worker is not None:
            self._worker.close()


def _fetch(payload: Any) -> Sequence[FeedBatch]:  # noqa: ANN401 - a Ray reference
    batches: Sequence[FeedBatch] = ray.get(payload)
    return batches


class _Remote:
    """The driver's end of a worker."""

    def __init__(self, actor: Any) -> None:  # noqa: ANN401 - Ray's handle
        self.actor = actor
        self.call: Any = None
        """What is under way, a Ray reference."""
        self.called_s = 0.0
        self.was_heard = False


def ray_cluster(job: JobConfig) -> RayCluster:
    """Connect to Ray, or start it on this machine.

    Raises:
        ConfigError: Ray is not installed.
        EngineError: There is no cluster at that address.
    """
    run = job.run
    if find_spec("ray") is None:
        told = f"replicas = {run.replicas}"
        if run.ray_address is not None:
            told = f"ray_address = {run.ray_address!r}"
        raise ConfigError("[run]", [f"{told} needs Ray: pip install ray"])
    room_for = 0 if run.replicas == "auto" else run.replicas
    return RayCluster(run.ray_address, resources_of(job), room_for=room_for)


class RayCluster:
    """Implements `Cluster`. Has to be made, used and closed in the main thread."""

    def __init__(
        self,
        address: str | None,
        takes: Resources,
        *,
        room_for: int = 0,
        make: Callable[..., Any] = Worker,
    ) -> None:
        """Start Ray on this machine, or join a cluster.

        Args:
            address: None for this machine alone; else `auto`, or `host:port` of the cluster's
                head. This machine has to be one of the cluster's.
            takes: What a worker takes of its node.
            room_for: On this machine alone: so many workers fit, even if there are fewer CPU
                cores. GPUs are never counted twice.
            make: Makes a worker from its init and `fetch`; has to pickle.

        Raises:
            ConfigError: Nobody answers at that address, or it is a Ray Client's.
            EngineError: Ray does not start, or the cluster does not let us in.
        """
        self._takes, self._make = takes, make
        self._started: dict[int, _Remote] = {}
        self._environment = worker_environment(os.environ, has_gpu=takes.num_gpus > 0)
        self._session = _Session(address, math.ceil(room_for * takes.num_cpus))

    def capacity(self) -> Capacity:
        """Count from all that the live nodes have, whoever uses it now."""
        with _told("be asked for its nodes"):
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        kind = "GPU" if self._takes.num_gpus else "CPU"
        total = sum(node.get(kind, 0) for node in nodes)
        told = f"{counted(len(nodes), 'node')}, {counted(total, kind)}"
        num_now = sum(fit(self._takes, node) for node in nodes)
        return Capacity(num_now, told)

    def start(self, init: WorkerInit) -> None:
        """Queue an actor at Ray, which waits for room as long as it takes."""
        options = {
            "num_cpus": self._takes.num_cpus,
            "num_gpus": self._takes.num_gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": _WORKER_VARIABLES},
        }
        hired = ray.cloudpickle.dumps((self._make, init))
        with _told("be asked for a worker"):
            actor = ray.remote(_Actor).options(**options)
            self._started[init.number] = _Remote(
                actor.remote(self._environment, str(Path.cwd()), hired)
            )

    def exchange(self, number: int, orders: Sequence[Order], wait_s: float) -> None:
        """See `Cluster`. A reference in an order stays one: Ray resolves only plain arguments."""
        hired = self._started[number]
        with _told("take orders"):
            hired.call = hired.actor.exchange.remote(orders, wait_s)
        hired.called_s = time.monotonic()

    def wait(self, timeout_s: float) -> Sequence[tuple[int, Report | Gone]]:
        """See `Cluster`."""
        calls = ((hired.call, number) for number, hired in self._started.items())
        numbers = {call: number for call, number in calls if call is not None}
        if not numbers:
            time.sleep(timeout_s)
            return []
        with _told("be waited for"):
            back, _ = ray.wait([*numbers], timeout=timeout_s, fetch_local=False)
            if back and len(numbers) > 1:
                back, _ = ray.wait(
                    [*numbers], num_returns=len(numbers), timeout=0, fetch_local=False
                )
        return [(numbers[call], self._news(numbers[call])) for call in back]

    def _news(self, number: int) -> Report | Gone:
        hired = self._started[number]
        try:
            news: Report | Gone = ray.get(hired.call)
        except ray.exceptions.RayError as exc:
            news = Gone(_reason(exc))
        hired.call, hired.was_heard = None, True
        if isinstance(news, Gone):
            self.kill(number)  # It may live: an exception, a broken connection.
        return news

    def silent_s(self, number: int) -> float:
        """See `Cluster`."""
        hired = self._started.get(number)
        if hired is None or not hired.was_heard or hired.call is None:
            return 0.0
        return time.monotonic() - hired.called_s

    def kill(self, number: int) -> None:
        """Kill the actor: at once, within 5 s if it is frozen. Its engine's guard does the rest."""
        if (hired := self._started.pop(number, None)) is not None:
            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                ray.kill(hired.actor, no_restart=True)

    def put(self, batches: Sequence[FeedBatch]) -> Any:  # noqa: ANN401 - a Ray reference
        """Put rows into the object store of this node; workers take them from there."""
        with _told("take rows"):
            return ray.put(list(batches))

    def close(self) -> None:
        """Ask those who are up to let go of their engines, then kill everybody. Idempotent."""
        if self._session.is_over:
            return
        with contextlib.suppress(ray.exceptions.RayError):
            up = [hired for hired in self._started.values() if hired.was_heard]
            leaving = [hired.actor.close.remote() for hired in up]
            if leaving:
                ray.wait(leaving, num_returns=len(leaving), timeout=LEAVE_S, fetch_local=False)
        for number in list(self._started):
            self.kill(number)
        self._session.end()

    def __enter__(self) -> Self:
        """For `with`."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close."""
        self.close()


def _reason(error: Exception) -> str:
    """Why a worker is gone, in one line."""
    text = str(error)
    if isinstance(error, ray.exceptions.ActorDiedError | ray.exceptions.OutOfMemoryError):
        return death_told(text)
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "the connection to it broke off: its process, its node or the network is down"
    return f"{type(error).__name__}: {end_of_traceback(text)}"


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Translate what Ray raises when the cluster as a whole is in trouble."""
    try:
        yield
    except (ray.exceptions.RayError, ConnectionError) as exc:
        told = f"Ray cannot {what}: {one_line(str(exc))}"
        raise EngineError(f"{told}; what was finished stays, run again to go on") from exc


class _Session:
    """This process's connection to Ray; on this machine alone, with the processes of Ray."""

    def __init__(self, address: str | None, num_cpus: int) -> None:
        """See `RayCluster`; who has called `ray.init` in this process keeps that connection."""
        prepare_environment(is_alone=address is None)
        self.is_over = False
        self._is_ours = not ray.is_initialized()
        self._folder: Path | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        # PR_SET_PDEATHSIG: Ray's processes die with the thread that has started them, so it has
        # to last; and in a thread that is not the main one, Ray leaves SIGTERM's handler alone.
        self._starter = ThreadPoolExecutor(1, "batchgen-ray")
        if not self._is_ours:
            return
        options: dict[str, Any] = {"address": address}
        if address is None:
            self._folder = make_folder()
            options = options_alone(self._folder, num_cpus)
        elif (problem := head_refuses(address)) is not None:
            raise ConfigError(_WHERE, [f"ray_address = {address!r}: {problem}"])
        # What the raylets have to say would be printed on our stdout; what matters of it comes
        # with the calls. (`log_to_driver` is about the workers' output only.)
        ray._private.worker._worker_logs_enabled = False
        try:
            with handlers_kept():
                self._starter.submit(
                    ray.init, log_to_driver=False, logging_level=logging.CRITICAL, **options
                ).result()
        except Exception as exc:  # Ray raises just that here and there.
            self.end()
            raise EngineError(refusal(address, exc)) from exc
        except BaseException:
            self.end()
            raise
        if address is None:
            self._guard = guard_raylet()

    def end(self) -> None:
        """Leave the cluster, or stop it. Idempotent."""
        if self.is_over:
            return
        self.is_over = True
        if self._is_ours:
            with handlers_kept():
                ray.shutdown()
            ray._private.worker._worker_logs_enabled = True
        self._starter.shutdown()
        if self._guard is not None:
            self._guard.communicate(b"orderly\n")
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
