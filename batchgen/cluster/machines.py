"""What replicas need of machines: their share of each, and what Ray must find there.

Imports nothing of Ray. What Ray says of a worker's end becomes one line for people here, too.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from batchgen.core.errors import ConfigError
from batchgen.core.processes import start_guard, stat_of
from batchgen.engine.vllm.settings import engine_gpus, is_cpu_build

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Mapping

    from batchgen.job.model import JobConfig

_OF_ONE = 0.9
"""Of a GPU's memory, what all engines on it get together: a little less than vLLM gives one
(`GPU_MEMORY_UTILIZATION`), since each takes some beyond its share, as its CUDA context."""
_WHERE = "[run]"
CARRIED = ("BATCHGEN_", "VLLM_", "HF_", "HUGGING_FACE_", "TRANSFORMERS_", "NCCL_")
"""Variables of the driver's environment, by how they begin, that every worker gets."""
NOT_CARRIED = {"VLLM_HOST_IP"}
"""Each machine has its own."""
_CONNECT_S = 5.0
STORE_BYTES = 256 << 20
"""Ray's object store where we start Ray: rows seldom travel on one machine, and what is more than
this goes to disk. Ray's own default is 30 % of memory in /dev/shm, which vLLM needs too."""
_PREFIX = "batchgen-ray-"
_MAX_FOLDER_CHARS = 16
"""A Unix socket's path has at most 107; Ray puts 66 behind its folder, and we 25."""
_GUARD = """read -r orderly && exit 0
for found in $(grep -lszx "RAY_RAYLET_PID=$1" /proc/[0-9]*/environ); do
  found=${found#/proc/}; kill -KILL "${found%/environ}"
done"""
_TOKEN = secrets.token_hex(32)
_MAX_CHARS = 400
_NODE = re.compile(r"^\s*ip: (\S+)", re.MULTILINE)
_SIGNS = ("End of file", "connection error code")
_IS_INDENTED = re.compile(r"^\s")


class Resources(NamedTuple):
    """What each replica takes of its machine."""

    num_cpus: float
    num_gpus: float
    """Below 1: a share of one; else a whole number, all on one node."""


def resources_of(job: JobConfig) -> Resources:
    """Return what a replica takes.

    Raises:
        ConfigError: GPUs that cannot be had so.
    """
    num_gpus = job.run.gpus_per_replica
    if num_gpus is None:
        has_gpus = job.model.is_vllm and not is_cpu_build()
        num_gpus = float(engine_gpus(job)) if has_gpus else 0.0
    if (problem := _misfit(num_gpus, job)) is not None:
        raise ConfigError(_WHERE, [f"gpus_per_replica = {num_gpus:g}, {problem}"])
    return Resources(job.run.cpus_per_replica, num_gpus)


def _misfit(num_gpus: float, job: JobConfig) -> str | None:
    """What is wrong with so many GPUs for a replica."""
    size, memory = engine_gpus(job), job.model.gpu_memory_utilization
    if num_gpus > 1 and num_gpus != int(num_gpus):
        return "expected a whole number, or less than 1"
    if 0 < num_gpus < size and size > 1:
        return f"expected {size}, tensor_parallel_size x pipeline_parallel_size"
    if memory is not None and 0 < num_gpus < memory and job.run.replicas != 1:
        told = f"so that each takes {memory:g} of a GPU's memory"
        return f"but model.gpu_memory_utilization is set, {told}; leave it out"
    return None


def share_gpu(job: JobConfig, takes: Resources) -> JobConfig:
    """The job as a worker gets it: who shares a GPU takes no more than its share of the memory."""
    if not 0 < takes.num_gpus < 1 or job.model.gpu_memory_utilization is not None:
        return job
    return job.changed(model={"gpu_memory_utilization": round(_OF_ONE * takes.num_gpus, 3)})


def fit(takes: Resources, node: Mapping[str, float]) -> int:
    """Count the workers that a node has room for.

    Args:
        takes: What each takes.
        node: What the node has: `CPU` and `GPU` among others.
    """
    num_gpus = node.get("GPU", 0.0)
    rooms = []
    if takes.num_cpus:
        rooms.append(_whole(node.get("CPU", 0.0) / takes.num_cpus))
    if takes.num_gpus >= 1:
        rooms.append(_whole(num_gpus / takes.num_gpus))
    elif takes.num_gpus:
        # A share is a share of one GPU: two of 0.7 do not make 1.4.
        rooms.append(_whole(num_gpus) * _whole(1 / takes.num_gpus))
    return min(rooms, default=0)


def _whole(num: float) -> int:
    """Round down. Ray counts in ten thousandths: ray/_raylet.pyx, RESOURCE_UNIT_SCALING."""
    return int(num + 1e-4)


def prepare_environment(*, is_alone: bool) -> None:
    """Set what Ray reads when it is imported or started; what the user has set stays."""
    defaults = {
        # Else a call after the connection is lost starts a cluster of its own.
        "RAY_ENABLE_AUTO_CONNECT": "0",
        # Else `uv run batchgen` has every worker build an environment from this folder.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # Else errors of calls that nobody waits for any more are printed.
        "RAY_IGNORE_UNHANDLED_ERRORS": "1",
        # Else Ray 2.52 warns that it will no longer hide the GPUs from who asks for none.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    if is_alone:
        defaults |= {
            "RAY_USAGE_STATS_ENABLED": "0",
            # Else Ray writes a token into the home folder (2.60; 2.52 asks for none).
            "RAY_AUTH_TOKEN": _TOKEN,
            # Else Ray's agents overwrite what their guard knows them by.
            "SPT_NOENV": "1",
        }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def make_folder() -> Path:
    """Make a folder for Ray's sockets and logs; remove those of drivers that were killed."""
    root = Path(tempfile.gettempdir())
    if len(str(root)) > _MAX_FOLDER_CHARS:
        root = Path("/tmp")  # noqa: S108 - made with a random name, for us alone
    for path in root.glob(f"{_PREFIX}*"):
        owner = re.fullmatch(rf"{_PREFIX}(\d+)-\w+", path.name)
        if owner and not Path("/proc", owner[1]).exists():
            shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))


def options_alone(folder: Path, num_cpus: int) -> dict[str, Any]:
    """Keywords of `ray.init` for a cluster of this machine alone.

    Args:
        folder: For its sockets and logs.
        num_cpus: To count with, if that is more than there are.
    """
    num_cores = len(os.sched_getaffinity(0))
    return {
        # Not None: that would join a cluster that happens to run here.
        "address": "local",
        "num_cpus": num_cpus if num_cpus > num_cores else None,
        "include_dashboard": False,
        "object_store_memory": STORE_BYTES,
        "_temp_dir": str(folder),
        "_system_config": {
            # One machine has no more memory with it than without; who dies is the kernel's choice.
            "memory_monitor_refresh_ms": 0,
            # Else engines run at nice 15, behind everything else on the machine.
            "worker_niceness": 0,
        },
    }


def guard_raylet() -> subprocess.Popen[bytes] | None:
    """Start a shell that kills what a raylet of ours has started, if we are killed.

    The raylet itself dies with us then, its workers within 2 s; but its two agents (200 MB) would
    wait for it for a minute. Without a shell (a bare container) they do.
    """
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            is_raylet = path.read_text().strip() == "raylet"
            state, parent = (stat_of(path.parent.name) or ["X", "0"])[:2]
            if is_raylet and state not in "ZX" and int(parent) == os.getpid():
                return start_guard(_GUARD, "batchgen-ray-guard", path.parent.name)
    return None


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Put our signal handlers back after Ray has been at work.

    `ray.init` sets abseil's crash handler for SIGTERM below Python's, which kills the process
    after 3 s, whatever Python's does; `ray.shutdown` resets the signal to its default.
    """
    signals = (signal.SIGTERM, signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in signals} if is_main else {}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


def worker_environment(driver: Mapping[str, str], *, has_gpu: bool) -> dict[str, str | None]:
    """What a worker's environment gets; None takes a variable away.

    They travel with the actor's arguments, not in its runtime environment: Ray shows that one in
    its logs, and a token of the hub may be among them.

    Args:
        driver: The driver's.
        has_gpu: Whether the engine computes on a GPU.
    """
    found: dict[str, str | None] = {
        name: value
        for name, value in driver.items()
        if name.startswith(CARRIED) and name not in NOT_CARRIED
    }
    # Ray sets it to the number of the actor's CPUs, at least 1 (ray/_private/utils.py,
    # set_omp_num_threads_if_unset). That is right where the engine computes on them.
    if has_gpu or "OMP_NUM_THREADS" in driver:
        found["OMP_NUM_THREADS"] = driver.get("OMP_NUM_THREADS")
    return found


def head_refuses(address: str) -> str | None:
    """Say what is wrong with an address, before Ray tries it for two minutes."""
    if "://" in address:
        return (
            "Ray Client is not supported, its proxy stands between the driver and the workers; "
            "expected auto or HOST:PORT of the cluster's head, on a machine of the cluster"
        )
    host, _, port = _of_auto(address).rpartition(":")
    if not host:
        return None if address == "auto" else "expected auto or HOST:PORT of the cluster's head"
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, ValueError) as exc:
        where = f"{host}:{port}, where auto leads" if address == "auto" else "it"
        return f"nobody answers at {where}: {exc}; is the cluster up?"
    return None


def _of_auto(address: str) -> str:
    """Resolve `auto` as Ray does, as far as that needs no search.

    Source:
        ray/_private/services.py, canonicalize_bootstrap_address; ray/_common/utils.py,
        get_ray_address_file.
    """
    if address != "auto":
        return address
    if named := os.environ.get("RAY_ADDRESS"):
        return named
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108
    try:
        return Path(folder, "ray", "ray_current_cluster").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def one_line(text: str) -> str:
    """A text without line ends, and not longer than a warning may be."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_CHARS else line[: _MAX_CHARS - 4] + " ..."


def end_of_traceback(text: str) -> str:
    """What was raised: all that follows the last line of code."""
    lines = text.rstrip().splitlines()
    last_code = max((n for n, line in enumerate(lines) if _IS_INDENTED.match(line)), default=-1)
    return one_line("\n".join(lines[last_code + 1 :]) or text)


def death_told(text: str) -> str:
    """Why an actor is dead, in one line.

    Args:
        text: An `ActorDiedError`'s: some `key: value` lines, then the reason.

    Source:
        ray/exceptions.py, ActorDiedError; src/ray/gcs/actor and node_manager.cc for the reasons
        themselves, 2.52 to 2.60.
    """
    if "raised in its creation task" in text:
        told = f"it does not start: {end_of_traceback(text)}"
        more = "; the same batchgen has to be installed on every node"
        return told + more * ("failed to import" in text)
    found = _NODE.search(text)
    reason = text.partition(found[0])[2] if found else text
    reason = reason.rpartition("Worker exit detail: ")[2].partition(" Some common causes")[0]
    who = f"its process{f' on {found[1]}' if found else ''}"
    if any(sign in reason for sign in _SIGNS):
        return f"{who} was killed or crashed, often the kernel out of memory"
    return f"{who} ended: {one_line(reason)}"


def refusal(address: str | None, error: Exception) -> str:
    """Why Ray did not start, or did not let us in."""
    told = one_line(str(error))
    if address is None:
        return f"Ray does not start on this machine: {told}"
    return (
        f"[run] ray_address = {address!r}: {told}; expected a running cluster that this machine "
        "is a node of: `ray start --head` on one, `ray start --address=HOST:6379` on the others, "
        "the same versions of Ray and Python on all"
    )


def counted(num: float, noun: str) -> str:
    """A number of things, for people: `2 nodes`."""
    return f"{num:g} {noun}{'' if num == 1 else 's'}"
