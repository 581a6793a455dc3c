"""One run at a time for an output. Saves GPU time only: correctness rests on epochs."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from batchgen.errors import BusyError, OutputError
from batchgen.runlog import utc_now

if TYPE_CHECKING:
    from batchgen.storage import LocalStorage


class RunLock:
    """A held `flock`; the kernel lets go of it however the process ends."""

    def __init__(self, storage: LocalStorage, name: str, run_id: str) -> None:
        """Bind; nothing is locked until `with`."""
        self._path = storage.path(name)
        self._run_id = run_id
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            BusyError: Another run holds it; the text says who, where and since when.
            OutputError: The folder cannot be written to.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            msg = f"{self._path.parent}: cannot be written ({error.strerror}); mend its rights"
            raise OutputError(msg) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            holder = self.holder() or {}
            msg = (
                f"{self._path.parent.parent}: run {holder.get('run_id')} (process "
                f"{holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}) is at "
                "work on this job"
            )
            raise BusyError(msg) from error
        since = utc_now().isoformat(timespec="seconds")
        who = {
            "run_id": self._run_id,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": since,
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(who).encode(), 0)
        self._descriptor = descriptor
        return self

    def __exit__(self, *_: object) -> None:
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
