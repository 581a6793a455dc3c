"""One run at a time for an output. Saves GPU time only: correctness rests on epochs."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import BusyError, OutputError
from batchgen.store.runlog import utc_now

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchgen.storage import LocalStorage

_TRIES, _TRY_S = 4, 0.02
_WAIT_S = 0.5


class RunLock:
    """A held `flock`; the kernel lets go of it however the process ends."""

    def __init__(self, storage: LocalStorage, name: str, run_id: str) -> None:
        """Bind; nothing is locked until `acquire`."""
        self._storage = storage
        self._path = storage.path(name)
        self._run_id = run_id
        self._descriptor: int | None = None

    def acquire(self, *, steal: bool = False) -> None:
        """Take the lock.

        Args:
            steal: Go on without it if another run holds it. Safe, since the claim fences that
                run; it only wastes what both compute.

        Raises:
            BusyError: Another run holds it; the text says who, where and since when.
            OutputError: The folder cannot be written to.
        """
        self._storage.make_folder(self._path.parent)
        if self._descriptor is not None:
            return
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            msg = f"{self._path.parent}: cannot be written ({error.strerror}); mend its rights"
            raise OutputError(msg) from error
        if _try_lock(descriptor):
            self._descriptor = descriptor
            self._sign(descriptor)
            return
        os.close(descriptor)
        if not steal:
            holder = self.holder() or {}
            msg = (
                f"{self._path.parent.parent}: run {holder.get('run_id')} (process "
                f"{holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}) is at "
                "work on this job; wait for it, or take the job from a frozen one with --steal"
            )
            raise BusyError(msg)

    def wait(self, is_stopped: Callable[[], bool]) -> None:
        """Take the lock as soon as it is free.

        Raises:
            BusyError: Another run still held it when this one was asked to stop.
            OutputError: The folder cannot be written to.
        """
        while True:
            try:
                self.acquire()
            except BusyError:
                if is_stopped():
                    raise
                time.sleep(_WAIT_S)
            else:
                return

    def _sign(self, descriptor: int) -> None:
        who = {
            "run_id": self._run_id,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": utc_now().isoformat(timespec="seconds"),
        }
        with suppress(OSError):  # For people only; a full disk must not matter here.
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(who).encode(), 0)

    def release(self) -> None:
        """Let go."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def holder(self) -> dict[str, Any] | None:
        """Who took the lock last, as far as the file tells."""
        with suppress(OSError, ValueError):
            return dict(json.loads(self._path.read_text(encoding="utf-8")))
        return None

    def is_held(self) -> bool:
        """Whether some process holds it right now."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False


def _try_lock(descriptor: int) -> bool:
    """Lock, trying for a moment: somebody may just be asking whether it is held.

    A file system without locks counts as locked by us: the lock only saves work.
    """
    for _ in range(_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_TRY_S)
        except OSError:
            return True
        else:
            return True
    return False
