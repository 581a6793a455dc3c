"""Disks that fail: each call of `batchgen.storage.Disk` counted, and one of them spoiled."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections import Counter
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.storage import Disk
from batchgen.store.books import PartFooter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CALLS = (
    "create",
    "write",
    "sync",
    "sync_folder",
    "link",
    "rename",
    "unlink",
    "make_folder",
    "chmod",
)
MODES = ("kill before", "kill after", "ENOSPC", "EIO", "ENOSPC torn", "EIO after", "freeze")
"""Ways to spoil a call. Torn: half of a write lands. After: it lands, and reports an error."""


class SpoiltDisk(Disk):
    """The real disk; call number `at` (from 0, over all kinds and threads) goes wrong.

    `log` gets a line for each call, and one `durable NAME ROWS` for each part that was linked
    and whose folder was synced: rows that must never be computed again.
    """

    def __init__(self, at: int, mode: str, log: Path) -> None:
        self._at = at
        self._mode = mode
        self._num_calls = 0
        self._lock = threading.Lock()
        self._log_path = log
        self._linked: list[Path] = []

    def _tell(self, text: str) -> None:
        with self._log_path.open("ab", buffering=0) as file:
            file.write(f"{text}\n".encode())

    def _call(self, kind: str, path: Path | str, really: Callable[[], Any], data: bytes = b"",
              file: IO[bytes] | None = None) -> Any:  # fmt: skip
        with self._lock:
            number = self._num_calls
            self._num_calls += 1
        if number != self._at:
            result = really()
            self._tell(f"{kind} {path}")
            return result
        self._tell(f"spoil {kind} {path}")
        return self._spoil(really, data, file)

    def _spoil(self, really: Callable[[], Any], data: bytes, file: IO[bytes] | None) -> Any:
        mode = self._mode
        if mode == "kill before":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
            return really()
        if mode.endswith("torn") and file is not None:
            file.write(data[: len(data) // 2])
            file.flush()
        if mode in ("kill after", "EIO after"):
            really()
        if mode == "kill after":
            if file is not None:
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        number = errno.ENOSPC if mode.startswith("ENOSPC") else errno.EIO
        raise OSError(number, os.strerror(number))

    def create(self, path: Path) -> IO[bytes]:
        opened: list[IO[bytes]] = []

        def really() -> IO[bytes]:
            opened.append(Disk.create(self, path))
            return opened[0]

        try:
            return self._call("create", path, really)
        except OSError:
            for file in opened:
                file.close()
            raise

    def write(self, file: IO[bytes], data: bytes) -> None:
        self._call("write", file.name, lambda: Disk.write(self, file, data), data, file)

    def sync(self, file: IO[bytes]) -> None:
        self._call("sync", file.name, lambda: Disk.sync(self, file))

    def sync_folder(self, path: Path) -> None:
        self._call("sync_folder", path, lambda: Disk.sync_folder(self, path))
        for part in [part for part in self._linked if part.parent == path]:
            self._linked.remove(part)
            self._tell(f"durable {part.name} {_num_rows(part)}")

    def link(self, source: Path, target: Path) -> None:
        self._call("link", target, lambda: Disk.link(self, source, target))
        if target.parent.name == "parts":
            self._linked.append(target)

    def rename(self, source: Path, target: Path) -> None:
        self._call("rename", target, lambda: Disk.rename(self, source, target))

    def unlink(self, path: Path) -> None:
        self._call("unlink", path, lambda: Disk.unlink(self, path))

    def make_folder(self, path: Path) -> None:
        self._call("make_folder", path, lambda: Disk.make_folder(self, path))

    def chmod(self, path: Path, mode: int) -> None:
        self._call("chmod", path, lambda: Disk.chmod(self, path, mode))


def _num_rows(part: Path) -> int:
    try:
        footer = PartFooter.from_metadata(pq.read_metadata(part).metadata)
    except (OSError, ValueError, pa.ArrowException):
        return 0  # A broken promise that the comparison of the snapshots tells.
    return sum(len(rows) for rows in footer.done.values())


class CrashError(BaseException):
    """The process is gone: nothing may catch it and go on."""


class CrashingDisk(Disk):
    """Works until its n-th call; from then on every call fails: a crash without a new process."""

    def __init__(self, crash_at: int | None) -> None:
        self.left = crash_at
        self.files: list[Any] = []

    def bury(self) -> None:
        """Close what the dead process held open, as the kernel does."""
        for file in self.files:
            file.close()

    def count(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise CrashError

    def create(self, path: Path) -> Any:
        self.count()
        self.files.append(super().create(path))
        return self.files[-1]

    def write(self, file: Any, data: bytes) -> None:
        self.count()
        super().write(file, data)

    def sync(self, file: Any) -> None:
        self.count()
        super().sync(file)

    def sync_folder(self, path: Path) -> None:
        self.count()
        super().sync_folder(path)

    def link(self, source: Path, target: Path) -> None:
        self.count()
        super().link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        self.count()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self.count()
        super().unlink(path)

    def chmod(self, path: Path, mode: int) -> None:
        self.count()
        super().chmod(path, mode)


class Log:
    """What a `SpoiltDisk` wrote."""

    def __init__(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        durable = dict(line.split()[1:] for line in lines if line.startswith("durable "))
        self.num_durable = sum(map(int, durable.values()))
        self.spoilt = next((line.split()[1:] for line in lines if line.startswith("spoil")), None)
        words = [line.split() for line in lines]
        self.calls = [(word[0], word[1]) for word in words if word[0] in CALLS]
        self.kinds = Counter(line.split()[0] for line in lines)
        self.num_calls = sum(self.kinds[kind] for kind in CALLS)
