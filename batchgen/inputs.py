"""Finding, opening and telling apart input files: local paths and any fsspec URL."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO

from batchgen.core.errors import SourceError


@dataclass(frozen=True, slots=True)
class InputStat:
    """What tells cheaply that a file is still the same."""

    size_bytes: int
    version: str
    """mtime in ns for a local file, ETag or the like for a remote one; empty: it tells nothing."""

    def is_still(self, other: InputStat) -> bool:
        """Whether a file that was `other` has not changed, as told without reading it."""
        return self == other and bool(self.version)


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
