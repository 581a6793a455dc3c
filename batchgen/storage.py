"""The only place that touches files: three primitives for the output, and opening the input.

Output (`Storage`): put-if-absent, read, list, plus removal of what no manifest names. Nothing
else is needed for the commit protocol, and nothing else is offered, so that an object store fits.

`LocalStorage` makes a put durable and atomic: temp file in the same folder, write, fsync,
`link()` to the final name, unlink the temp, fsync the folder. `link` and not `rename`, because
rename silently replaces what another run has just committed. A name is therefore either absent
or complete, on a crash and on power loss.

Input: `open_input`, `stat_input`, `find_inputs` take local paths and any fsspec URL.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from batchgen.errors import OutputError, SourceError, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Storage(Protocol):
    """A folder or prefix. Names are relative, `/`-separated."""

    @property
    def where(self) -> str:
        """For messages: the folder or URL."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Make `name` exist with exactly `data`, durably; False if it exists with other bytes.

        True also when it already holds the same bytes: then an earlier, doubted put had landed.

        Raises:
            StorageError: The put failed and `name` was not created by it, or its state is
                unknown; a later call with the same bytes settles it.
        """

    def read(self, name: str) -> bytes | None:
        """Return the whole content, None if absent."""

    def list(self, folder: str) -> list[str]:
        """Return full names directly under `folder`, sorted, temp files left out."""

    def remove(self, name: str) -> None:
        """Remove; absent is fine. Only for what no claim and no manifest needs."""


class LocalStorage:
    """`Storage` on a local file system that has hard links and fsync."""

    def __init__(self, root: Path, *, temp_tag: str = "") -> None:
        """Bind to a folder; nothing is created until the first put.

        Args:
            root: The output folder.
            temp_tag: Goes into the names of temp files, so that a later run can tell its own
                and its predecessors' from a live peer's.
        """
        self.root = root
        self._temp_tag = temp_tag or f"p{os.getpid()}"
        self._serial = 0

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.root)

    def path(self, name: str) -> Path:
        """The local path behind a name, for readers that want a file and not bytes."""
        return self.root / name

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """See `Storage`."""
        temp = self.temp_for(name)
        try:
            with temp.open("xb") as out:
                out.write(data)
        except OSError as error:
            with suppress(OSError):
                temp.unlink(missing_ok=True)
            raise storage_error(temp, error) from error
        return self.commit_temp(temp, name) or self.read(name) == data

    def temp_for(self, name: str) -> Path:
        """A fresh temp path in the final name's folder, which is made if need be."""
        final = self.path(name)
        self._make_folder(final.parent)
        self._serial += 1
        return final.parent / f".{final.name}.{self._temp_tag}-{self._serial}.tmp"

    def commit_temp(self, temp: Path, name: str) -> bool:
        """Give a fully written temp file its final name, durably; False if the name is taken.

        Raises:
            StorageError: As `put_if_absent`.
        """
        final = self.path(name)
        try:
            _fsync(temp)
            try:
                os.link(temp, final)
                won = True
            except FileExistsError:
                won = False
            temp.unlink()
            _fsync(final.parent)
        except OSError as error:
            with suppress(OSError):
                temp.unlink(missing_ok=True)
            raise storage_error(final, error) from error
        return won

    def replace(self, name: str, data: bytes) -> None:
        """Overwrite atomically, without durability. For live views, never for commit records.

        Raises:
            StorageError: The write failed; the old content, if any, is still there.
        """
        temp = self.temp_for(name)
        try:
            temp.write_bytes(data)
            temp.replace(self.path(name))
        except OSError as error:
            with suppress(OSError):
                temp.unlink(missing_ok=True)
            raise storage_error(self.path(name), error) from error

    def expose(self, name: str, alias: str) -> None:
        """Make `alias` a hard link to `name`, replacing atomically what it was before.

        Raises:
            StorageError: The link failed; `alias` is as it was.
        """
        temp = self.temp_for(alias)
        try:
            os.link(self.path(name), temp)
            temp.replace(self.path(alias))
            # Renaming onto another link of the same file does nothing and leaves the temp.
            temp.unlink(missing_ok=True)
            _fsync(self.path(alias).parent)
        except OSError as error:
            raise storage_error(self.path(alias), error) from error

    def read(self, name: str) -> bytes | None:
        """See `Storage`."""
        try:
            return self.path(name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error(self.path(name), error) from error

    def list(self, folder: str) -> list[str]:
        """See `Storage`."""
        prefix = f"{folder}/" if folder else ""
        try:
            found = [entry.name for entry in os.scandir(self.path(folder))]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error(self.path(folder), error) from error
        return sorted(f"{prefix}{name}" for name in found if not name.endswith(".tmp"))

    def temps(self, folder: str) -> Sequence[Path]:
        """Temp files directly under `folder`, whoever left them."""
        return sorted(self.path(folder).glob(".*.tmp"))

    def remove(self, name: str) -> None:
        """See `Storage`."""
        path = self.path(name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(path, error) from error

    def _make_folder(self, folder: Path) -> None:
        """Create missing folders and make their names durable."""
        if folder.is_dir():
            return
        missing = [folder, *(parent for parent in folder.parents if not parent.exists())]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for made in missing:
                _fsync(made.parent)
        except OSError as error:
            if error.errno in _DISK_TROUBLE:
                raise storage_error(folder, error) from error
            msg = f"{folder}: cannot be created ({error.strerror}); choose another output.path"
            raise OutputError(msg) from error


_DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(path: Path, error: OSError) -> StorageError:
    """Translate what the operating system says of an output file."""
    hints = {errno.ENOSPC: "; free space", errno.EDQUOT: "; free space or raise the quota"}
    hint = hints.get(error.errno or 0, "")
    return StorageError(str(path), f"{error.strerror or error}{hint}")


@dataclass(frozen=True, slots=True)
class InputStat:
    """What tells cheaply that a file is still the same."""

    size_bytes: int
    version: str
    """mtime in ns for a local file, ETag or the like for a remote one."""


def is_url(path: str) -> bool:
    """Whether fsspec has to open it."""
    return "://" in path


def open_input(path: str) -> IO[bytes]:
    """Open for reading, unbuffered sizes left to the caller.

    Raises:
        SourceError: Absent or unreadable.
    """
    try:
        if not is_url(path):
            return Path(path).open("rb")
        import fsspec

        opened: IO[bytes] = fsspec.open(path, "rb").open()
    except (OSError, ImportError, ValueError) as error:
        raise SourceError(path, _reason(error)) from error
    return opened


def stat_input(path: str) -> InputStat:
    """Size and version of an input file, without reading it.

    Raises:
        SourceError: Absent or unreadable.
    """
    try:
        if not is_url(path):
            info = Path(path).stat()
            return InputStat(info.st_size, str(info.st_mtime_ns))
        import fsspec

        fs, inner = fsspec.core.url_to_fs(path)
        facts = fs.info(inner)
    except (OSError, ImportError, ValueError) as error:
        raise SourceError(path, _reason(error)) from error
    version = next((facts[k] for k in ("ETag", "etag", "mtime", "LastModified") if k in facts), "")
    return InputStat(int(facts["size"]), str(version))


def find_inputs(pattern: str) -> list[str]:
    """Return the files that a path, glob or folder names, sorted; empty if none.

    A folder stands for the files directly in it whose names do not begin with `.` or `_`.

    Raises:
        SourceError: The file system of a URL cannot be used.
    """
    import fsspec

    try:
        fs, inner = fsspec.core.url_to_fs(pattern)
        if fs.isdir(inner):
            names = [
                entry["name"] for entry in fs.ls(inner, detail=True) if entry["type"] == "file"
            ]
            names = [name for name in names if not name.rpartition("/")[2].startswith((".", "_"))]
        elif any(mark in inner for mark in "*?["):
            names = [name for name in fs.glob(inner) if not fs.isdir(name)]
        else:
            names = [inner] if fs.exists(inner) else []
    except (OSError, ImportError, ValueError) as error:
        raise SourceError(pattern, _reason(error)) from error
    if not is_url(pattern):
        return sorted(names)
    return sorted(fs.unstrip_protocol(name) for name in names)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist, expected an input file"
    return str(getattr(error, "strerror", None) or error)
