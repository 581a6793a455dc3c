"""What Ray finds in this process, and how the process is kept as it was. Imports nothing of Ray."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def start_guard() -> subprocess.Popen[bytes] | None:
    """Start a shell that kills what a raylet of ours has started, if we are killed.

    The raylet itself dies with us then, its workers within 2 s; but its two agents (200 MB) would
    wait for it for a minute. Without a shell (a bare container) they do.
    """
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # proc_pid_stat(5): pid (name) state ppid ...
            pid, name, rest = re.split(r" \(|\) ", path.read_text(), maxsplit=2)
            state, parent = rest.split()[:2]
            if name == "raylet" and state not in "ZX" and int(parent) == os.getpid():
                return subprocess.Popen(  # noqa: S603 - fixed text, one integer
                    ["/bin/sh", "-c", _GUARD, "batchgen-ray-guard", pid],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
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
