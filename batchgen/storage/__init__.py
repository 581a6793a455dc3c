"""The output's files: three primitives, and what makes them durable.

The commit protocol needs put-if-absent, read and list, plus removal of what no manifest names, so
that an object store fits: `batchgen.storage.remote` is that. What a folder has beyond (hard links
that show a snapshot, rights, syncs) does nothing there; nothing above knows which it is.

No file is ever written in place, so each is made without anybody's right to write: what a reader
copies over a published file does not change the snapshot, whose file it shares.

`LocalStorage` makes a put durable and atomic: temp file in the same folder, write, fsync,
`link()` to the final name, unlink the temp, fsync the folder. `link` and not `rename`, because
rename silently replaces what another run has just committed. A name is therefore either absent
or complete, on a crash and on power loss.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
import time
from contextlib import contextmanager, suppress
from functools import partial
from typing import IO, TYPE_CHECKING, Any

from batchgen.core.errors import NoRightError, OutputError, StorageError
from batchgen.core.runtime import read_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


_PRIVATE = {"parts", "footers", "rows", "keys", "runs", "try"}
"""Folders of the working state that readers need nothing of, and whose files hold prompts, logs
and hashes of rows."""


class Disk:
    """The system calls that change a disk, one method each.

    The seam for fault tests, which fail or forget each of them in turn. Nothing above it knows
    what a crash leaves behind: that is decided by the order of these calls.
    """

    def create(self, path: Path) -> IO[bytes]:
        """Open a new file for writing, read-only for whoever opens it later; it must not exist."""
        return open(path, "xb", opener=_read_only)

    def write(self, file: IO[bytes], data: bytes) -> None:
        """Append."""
        file.write(data)

    def sync(self, file: IO[bytes]) -> None:
        """Make what was written durable. On the descriptor that wrote it, which hears errors."""
        file.flush()
        os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name; FileExistsError if the name is taken."""
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """Move a name over another, atomically."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove a name; absent is fine."""
        path.unlink(missing_ok=True)

    def make_folder(self, path: Path) -> None:
        """Make one folder; existing is fine. What is private is for those who may write there."""
        mode = 0o777
        if path.name in _PRIVATE and path.parent.name.startswith("_"):
            mode = 0o770 if path.parent.stat().st_mode & stat.S_IWGRP else 0o700
        path.mkdir(mode=mode, exist_ok=True)

    def chmod(self, path: Path, mode: int) -> None:
        """Change the rights of a file."""
        path.chmod(mode)


def _read_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o444)


class PendingFile:
    """A file on its way: written under a temp name, durable and visible with `commit`."""

    def __init__(self, disk: Disk, temp: Path, final: Path) -> None:
        """Create the temp file.

        Raises:
            StorageError: It cannot be created.
        """
        self._disk = disk
        self._temp = temp
        self._final = final
        with saying_where(temp):
            self._file = disk.create(temp)

    def write(self, data: bytes) -> None:
        """Append; raises OSError, which `commit` and `discard` survive."""
        self._disk.write(self._file, data)

    def commit(self, name: str | None = None) -> bool:
        """Make the content durable, then the name; False if the name was taken.

        `name` replaces the one that was begun with, in its folder: one that tells the content.

        Raises:
            StorageError: The name was not given, or its state is unknown.
        """
        if name is not None:
            self._final = self._final.with_name(name)
        with saying_where(self._final, self.discard):
            with self._file:
                self._disk.sync(self._file)
            try:
                self._disk.link(self._temp, self._final)
                won = True
            except FileExistsError:
                won = False
            self._disk.unlink(self._temp)
            self._disk.sync_folder(self._final.parent)
        return won

    def discard(self) -> None:
        """Drop what was written."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._disk.unlink(self._temp)


class LocalStorage:
    """A folder on a local file system that has hard links and fsync; names are relative to it."""

    def __init__(self, root: Path, *, temp_tag: str = "", disk: Disk | None = None) -> None:
        """Bind to a folder; nothing is created until the first put.

        Args:
            root: The output folder.
            temp_tag: Goes into the names of temp files, so that no two runs share one.
            disk: The system calls; only fault tests bring their own.
        """
        self.root = root
        self._temp_tag = temp_tag or f"p{os.getpid()}"
        self._disk = disk or Disk()
        self._serial = itertools.count(1)
        self._durable_folders: set[Path] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStorage, (self.root,)  # With temp names of that process.

    shows = True
    """Whether a snapshot is shown under further names, `part-*.parquet`."""

    @property
    def is_plain(self) -> bool:
        """Whether another process can use it: its disk is the disk, and it drops nothing."""
        return type(self) is LocalStorage and type(self._disk) is Disk

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.root)

    def check(self, state: str, *, is_dry: bool = False) -> None:
        """Refuse a place that is not this job's, or that no output can be in.

        Args:
            state: The folder in it that only an output of batchgen's has.
            is_dry: Touch nothing: what only a try shows stays open.

        Raises:
            OutputError: A folder is ours, empty or absent; its state is not somewhere else.
        """
        root = self.root
        for link in (root / state, *(root / state).glob("*")):
            if link.is_symlink():
                advice = "remove it or choose another output.path"
                raise OutputError(f"{link}: is a link, expected a folder; {advice}")
        above = (root.absolute(), *root.absolute().parents)
        nearest = next(path for path in above if path.exists())
        if not nearest.is_dir():
            advice = "expected a folder; choose another output.path"
            raise OutputError(f"{nearest}: is a file, {advice}")
        # In this order: a run that starts beside this one makes the state before anything else.
        if root.is_dir() and any(root.iterdir()) and not (root / state).is_dir():
            lost = f"part files and no {state}/, a job's state: bring that back, too, or"
            held = lost if any(root.glob("part-*.parquet")) else "files that are not batchgen's;"
            raise OutputError(f"{root}: holds {held} choose another output.path")
        if is_dry and not os.access(nearest, os.W_OK | os.X_OK):
            msg = f"{nearest}: cannot be written to; mend its rights, or choose another output.path"
            raise OutputError(msg)

    @contextmanager
    def patient(
        self, grace_s: float, is_stopped: Callable[[], bool], tell: Callable[[StorageError], None]
    ) -> Iterator[None]:
        """Wait in this block for a store that is away, `grace_s` at most; a folder never is."""
        yield

    def path(self, name: str) -> Path:
        """The local path behind a name, for readers that want a file and not bytes."""
        return self.root / name

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Make `name` exist with exactly `data`, durably; False if it exists with other bytes.

        True also when it already holds the same bytes: then an earlier, doubted put had landed.

        Raises:
            StorageError: The put failed and `name` was not created by it, or its state is
                unknown; a later call with the same bytes settles it.
        """
        pending = self.begin(name)
        with saying_where(self.path(name), pending.discard):
            pending.write(data)
        # A name that is taken may be our own earlier try, whose reply was an error: read it back.
        return pending.commit() or self.read(name) == data

    def begin(self, name: str) -> PendingFile:
        """Begin a file that is written piece by piece.

        Raises:
            StorageError: The temp file cannot be created.
            OutputError: The folder cannot be created.
        """
        return PendingFile(self._disk, self.temp_for(name), self.root / name)

    def temp_for(self, name: str) -> Path:
        """A fresh temp path in the final name's folder, which is made if need be."""
        final = self.root / name
        self.make_folder(final.parent)
        return final.parent / f".{final.name}.{self._temp_tag}-{next(self._serial)}.tmp"

    def replace(self, name: str, data: bytes) -> None:
        """Overwrite atomically, without durability. For live views, never for commit records.

        Raises:
            StorageError: The write failed; the old content, if any, is still there.
        """
        pending = self.temp_for(name)
        with saying_where(self.path(name), partial(self._drop, pending)):
            with self._disk.create(pending) as file:
                self._disk.write(file, data)
            self._disk.rename(pending, self.path(name))

    def expose(
        self, name: str, alias: str, is_wanted: Callable[[Path], bool] = lambda _: True
    ) -> bool:
        """Make `alias` a further name of `name`, replacing atomically what it was before.

        A hard link, or a copy where the kernel refuses one, as of another user's file. Durable once
        its folder is settled.

        Args:
            name: The file.
            alias: Its further name.
            is_wanted: Looks at the file, which no other run can change for another meanwhile;
                False leaves `alias` as it is.

        Returns:
            Whether it was wanted.

        Raises:
            StorageError: The link failed; `alias` is as it was.
        """
        temp = self.temp_for(alias)
        with saying_where(self.path(alias), partial(self._drop, temp)):
            self._link(self.path(name), temp)
            is_taken = is_wanted(temp)
            if is_taken:
                self._disk.rename(temp, self.path(alias))
            # Renaming onto another link of the same file does nothing and leaves the temp.
            self._disk.unlink(temp)
        return is_taken

    def _link(self, source: Path, target: Path) -> None:
        try:
            self._disk.link(source, target)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            with source.open("rb") as whole, self._disk.create(target) as copy:
                while data := whole.read(_COPY_BYTES):
                    self._disk.write(copy, data)
                self._disk.sync(copy)

    def protect(self, name: str) -> None:
        """Take the right to write from a file of an earlier version, where that is ours to do."""
        path = self.path(name)
        with suppress(OSError):
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o222:
                self._disk.chmod(path, mode & ~0o222)

    def _drop(self, temp: Path) -> None:
        with suppress(OSError):
            self._disk.unlink(temp)

    def read(self, name: str) -> bytes | None:
        """The whole content, None if absent.

        Raises:
            StorageError: It cannot be read right now.
        """
        with saying_where(self.path(name)), suppress(FileNotFoundError):
            return read_file(self.path(name))
        return None

    def mark(self, name: str) -> Sequence[int] | None:
        """What changes with a file: its size, time in ns and identity; None if it is absent.

        The size is -1 where a link or a folder is in its place: whoever has made it can change what
        it is.

        Raises:
            OSError: It cannot be looked at.
        """
        try:
            facts = os.lstat(f"{self.root}/{name}")
        except FileNotFoundError:
            return None
        size = facts.st_size if stat.S_ISREG(facts.st_mode) else -1
        return [size, facts.st_mtime_ns, facts.st_ino]

    def num_bytes(self, name: str) -> int:
        """Bytes of a file, or of all in a folder.

        Raises:
            OSError: It has gone meanwhile, or this user may not look.
        """
        path = self.path(name)
        if not os.access(path, os.R_OK):
            raise PermissionError(path)
        files = path.rglob("*") if path.is_dir() else [path]
        return sum(file.lstat().st_size for file in files if not file.is_dir())

    def upload(self, name: str) -> None:
        """Bring what another process has written to `path(name)` to where readers find it."""

    def lock(self, name: str, who: bytes, *, steal: bool = False) -> Callable[[], None] | None:
        """Hold a name, which the kernel lets go of however the process ends.

        Args:
            name: Of the lock.
            who: For people, what `read` gives from now on; JSON.
            steal: Take it from a process that holds it, where that can be done.

        Returns:
            What lets go of it; None: another process holds it.

        Raises:
            OutputError: The folder cannot be written to.
        """
        path = self.path(name)
        self.make_folder(path.parent)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with suppress(PermissionError):  # Another's of the same group.
                os.fchmod(descriptor, path.parent.stat().st_mode & 0o666)
        except OSError as error:
            msg = f"{path.parent}: cannot be written ({error.strerror}); mend its rights"
            raise OutputError(msg) from error
        if not _try_lock(descriptor):
            os.close(descriptor)
            return None
        with suppress(OSError):  # A full disk must not matter here.
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, who, 0)
        return partial(os.close, descriptor)

    def is_locked(self, name: str) -> bool:
        """Whether some process holds the name right now."""
        try:
            # Not to wait where a pipe is in its place.
            descriptor = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def settle(self, folder: str) -> None:
        """Make durable the names that are to be seen directly under `folder`; absent is fine.

        A name that can be seen may be one that a run gave and died before it synced the folder.

        Raises:
            StorageError: The sync failed.
        """
        path = self.path(folder)
        if not path.is_dir():
            return
        self.make_folder(path)
        with saying_where(path):
            self._disk.sync_folder(path)

    def list(self, folder: str) -> list[str]:
        """Full names directly under `folder`, sorted, temp files left out; none if it is absent.

        Raises:
            StorageError: It cannot be listed.
        """
        prefix = f"{folder}/" if folder else ""
        found: Sequence[str] = ()
        with saying_where(self.path(folder)), suppress(FileNotFoundError):
            found = [entry.name for entry in os.scandir(self.path(folder))]
        return sorted(f"{prefix}{name}" for name in found if not name.endswith(".tmp"))

    def temps(self, folder: str) -> Sequence[str]:
        """Full names of temp files directly under `folder`, whoever left them."""
        prefix = f"{folder}/" if folder else ""
        return sorted(f"{prefix}{path.name}" for path in self.path(folder).glob(".*.tmp"))

    def remove(self, name: str) -> None:
        """Remove a file; absent is fine. Only for what no claim and no manifest needs.

        Raises:
            StorageError: It cannot be removed.
        """
        with saying_where(self.path(name)):
            self._disk.unlink(self.path(name))

    def remove_folder(self, name: str) -> None:
        """Remove a folder and what is in it; absent is fine, and so is one still written to."""
        folder = self.path(name)
        try:
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    self.remove_folder(f"{name}/{path.name}")
                else:
                    self._disk.unlink(path)
            folder.rmdir()
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST}:
                raise storage_error(folder, error) from error

    def make_folder(self, folder: Path) -> None:
        """Create missing folders, and make their names durable before anything goes in.

        Raises:
            OutputError: They cannot be created.
        """
        if folder in self._durable_folders:
            return
        chain = [path for path in (folder, *folder.parents) if path.is_relative_to(self.root)]
        above = [path for path in self.root.parents if not path.is_dir()]
        try:
            # Also those that exist: a run that made one may have died before it was durable.
            for path in (*reversed(above), *reversed(chain)):
                if not path.is_dir():
                    self._disk.make_folder(path)
                self._disk.sync_folder(path.parent)
        except OSError as error:
            if error.errno in _DISK_TROUBLE:
                raise storage_error(folder, error) from error
            msg = f"{folder}: cannot be created ({error.strerror}); choose another output.path"
            raise OutputError(msg) from error
        self._durable_folders.update(chain)


_TRIES, _TRY_S = 4, 0.02


def _try_lock(descriptor: int) -> bool:
    """Lock, trying for a moment: somebody may just be asking. Without locks it counts as locked."""
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


_NO_LINK = {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP}
_COPY_BYTES = 2**20
_DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}


def raise_if_not_damage(path: Path, error: Exception) -> None:
    """Tell a file that is not what was written from one that cannot be read right now.

    A part must not be condemned because descriptors or memory ran out for a moment.

    Raises:
        StorageError: The error says nothing about the file's content.
    """
    if isinstance(error, OSError) and error.errno not in {None, errno.ENOENT}:
        raise storage_error(path, error) from error
    if isinstance(error, MemoryError):  # pyarrow's out-of-memory is one, too.
        raise StorageError(str(path), str(error)) from error


@contextmanager
def saying_where(path: Path, clean_up: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turn an OSError into a StorageError about `path`, after cleaning up.

    Raises:
        StorageError: Something in the block failed.
    """
    try:
        yield
    except OSError as error:
        clean_up()
        raise storage_error(path, error) from error


def storage_error(path: Path, error: OSError) -> StorageError:
    """Translate what the operating system says of an output file."""
    if error.errno == errno.EACCES:
        return NoRightError(str(path))
    hints = {errno.ENOSPC: "; free space", errno.EDQUOT: "; free space or raise the quota"}
    hint = hints.get(error.errno or 0, "")
    return StorageError(str(path), f"{error.strerror or error}{hint}")
