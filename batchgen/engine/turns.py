"""Engines that share a GPU come up one after the other.

vLLM takes what all of a GPU's memory lost between its own start and its profiling run for its
own: an engine that loads beside it makes its KV cache smaller by that one's weights, and one that
frees memory meanwhile makes it give up (vllm/v1/worker/gpu_worker.py, determine_available_memory;
vllm/utils/mem_utils.py, memory_profiling; 0.26 to 0.33). Engines that close take no turn.

The turn is a `flock` on a file of this machine, so that it holds between replicas and between
jobs, and ends with its holder however that ends. It only helps: where it cannot be had, the
engine comes up without.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

WAIT_S = 1800.0
"""For all that are before us, minutes each; then we start all the same, lest one that hangs stops
everybody."""
_TRY_S = 0.1


def turn_file(environment: Mapping[str, str], folder: Path | None = None) -> Path:
    """Name the file whose lock is the turn on the GPUs that this process sees.

    Args:
        environment: Ours; `CUDA_VISIBLE_DEVICES` says which GPUs. Engines that see other sets of
            them, though one is in both, do not wait for each other.
        folder: Of the machine's temporary files.
    """
    devices = environment.get("CUDA_VISIBLE_DEVICES") or "all"
    name = re.sub(r"[^0-9A-Za-z-]+", "_", devices)
    return (folder or Path(tempfile.gettempdir())) / f"batchgen-start-{name}.lock"


@contextlib.contextmanager
def turn_to_start(path: Path | None, wait_s: float = WAIT_S) -> Iterator[bool]:
    """Hold the turn while an engine comes up.

    Args:
        path: Of the turn; None if there is nothing to share.
        wait_s: How long to wait for it.

    Yields:
        Whether we have it.
    """
    descriptor = _open(path) if path is not None else None
    if descriptor is None:
        yield False
        return
    try:
        yield _lock(descriptor, wait_s)
    finally:
        # Not by closing alone: a process that was forked meanwhile may hold the file open, too.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _open(path: Path) -> int | None:
    """Open the file, whoever made it; a lock needs no right to write."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # It may be a pipe.
    with contextlib.suppress(OSError):
        return os.open(path, flags)
    with contextlib.suppress(OSError):
        descriptor = os.open(path, flags | os.O_CREAT, 0o644)
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, 0o644)  # For all users, whatever our umask.
        return descriptor
    return None


def _lock(descriptor: int, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    is_told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        except OSError:
            return False  # A file system without locks.
        else:
            return True
        if not is_told:
            is_told = True
            sys.stderr.write("batchgen: waits until another engine on this GPU is up\n")
            sys.stderr.flush()
        time.sleep(_TRY_S)
