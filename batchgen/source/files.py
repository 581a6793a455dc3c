"""Finding, opening and telling apart input files: local paths and any fsspec URL.

Which files a path of `input.path` names:

- What exists as it is written is meant as it is written, part by part: `in[1].jsonl` is that file
  if there is one, and the folder `data[1]` that folder. Only what does not exist is a pattern,
  if it has `*`, `?` or `[...]`; `**` stands for folders at any depth.
- A folder stands for `folder/*`, so that both name the same files.
- A pattern does not match names that begin with `.` or `_`, unless its own part does: `_x*`.
- A link to a file is a file, under the link's name. A link that leads nowhere is an error.
- Folders, and links to folders, are not entered by the last part of a pattern, but for folders
  named `key=value`, see `columns`; links to folders not by `**` either, since they may lead in
  circles. A path or a part that names one enters it.
- A file with several names (a link and what it leads to) is read once, under its own name if
  that is in the input. Hard links and copies are files of their own.

Whatever a pattern would match and these rules leave out is said, see `Found.left_out`.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from batchgen.core.data import Lazy
from batchgen.core.errors import SourceError
from batchgen.core.runtime import open_file
from batchgen.job.model import is_url
from batchgen.source.columns import is_partition_folder, partition_keys

fsspec: Any = Lazy("fsspec")


@dataclass(frozen=True, slots=True)
class InputStat:
    """What tells cheaply that a file is still the same."""

    size_bytes: int
    version: str
    """mtime in ns for a local file, with where it really lies if links lead there; ETag or the like
    for a remote one; empty: it tells nothing."""

    def is_still(self, other: InputStat) -> bool:
        """Whether a file that was `other` has not changed, as told without reading it."""
        return self == other and bool(self.version)


def open_input(path: str) -> IO[bytes]:
    """Open for reading, unbuffered sizes left to the caller.

    Raises:
        SourceError: Absent or unreadable.
    """
    try:
        if not is_url(path):
            return open_file(Path(path))
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
            version = str(info.st_mtime_ns)
            # A link on the way may be turned to another file of equal size and time.
            if (real := os.path.realpath(path)) != os.path.abspath(path):  # noqa: PTH100
                version += f" {hashlib.sha256(os.fsencode(real)).hexdigest()[:16]}"
            return InputStat(info.st_size, version)
        fs, inner = fsspec.core.url_to_fs(path)
        facts = fs.info(inner)
    except (OSError, ImportError, ValueError) as error:
        raise SourceError(path, _reason(error)) from error
    version = next((facts[k] for k in ("ETag", "etag", "mtime", "LastModified") if k in facts), "")
    return InputStat(int(facts["size"]), str(version))


@dataclass(slots=True)
class Found:
    """The files that paths name, and what they might have named and do not."""

    files: list[str] = field(default_factory=list)
    """In the order of the paths, sorted within each, without repeats."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Why -> paths."""
    partitions: dict[str, list[str]] = field(default_factory=dict)
    """Path -> columns that its folders tell, see `columns`."""

    def leave_out(self, path: str, why: str) -> None:
        """Note that a path is not read."""
        self.left_out.setdefault(why, []).append(path)

    @property
    def notes(self) -> list[str]:
        """A line for each reason to leave something out, worth a warning."""
        return [
            f"input: {paths[0]}{f' and {len(paths) - 1} more' if paths[1:] else ''} left out: {why}"
            for why, paths in self.left_out.items()
        ]


_HIDDEN = "the name begins with . or _ (name it to read it)"
_FOLDER = "it is a folder (name it to read the files in it)"
_LINKED = "it is a link to a folder (name it to read the files in it)"
_OTHER = "it is neither a file nor a folder"


def find_inputs(paths: Sequence[str]) -> Found:
    """Find the files that paths, patterns and folders name, by the rules at the module's top.

    Raises:
        SourceError: One of them names no file or a link that leads nowhere, or its file system
            cannot be read.
    """
    found = Found()
    for path in paths:
        before = len(found.files)
        folders = len(found.left_out.get(_FOLDER, ())) + len(found.left_out.get(_LINKED, ()))
        try:
            here = sorted(_remote(path, found) if is_url(path) else _local(path, found))
            root = _root(path, here)
        except (OSError, ImportError, ValueError) as error:
            raise SourceError(path, _reason(error)) from error
        found.files += here
        for file in here:
            found.partitions.setdefault(file, partition_keys(root, file))
        if len(found.files) == before:
            seen = [*found.left_out.get(_FOLDER, ()), *found.left_out.get(_LINKED, ())]
            raise SourceError(path, _no_file(path, is_only_folders=len(seen) > folders))
    found.files = list(dict.fromkeys(found.files))
    _leave_out_second_names(found)
    return found


def _root(path: str, files: Sequence[str]) -> str:
    """The folder that a path names, up to what is a pattern; of the files' spelling."""
    if is_url(path):
        fs, path = fsspec.core.url_to_fs(path)
        root, _ = literal_part(path, fs.exists)
        root = fs.unstrip_protocol(root)
    else:
        root, _ = literal_part(path, os.path.lexists)
    root = root.rstrip("/")
    return root.rpartition("/")[0] if root in files else root


def _no_file(path: str, *, is_only_folders: bool) -> str:
    text = "names no file, expected at least one; "
    if is_only_folders:
        return f"{text}it names folders, add /* for the files in them"
    if glob.has_magic(path):
        return f"{text}check the path (there is no such name, so * ? [ ] in it are a pattern)"
    return f"{text}check the path"


def _leave_out_second_names(found: Found) -> None:
    """Keep one name of each local file: its own, or the first link to it."""
    names: dict[str, str] = {}
    for path in found.files:
        if not is_url(path):
            real = os.path.realpath(path)
            names[real] = max(names.get(real, path), path, key=lambda it: _rank(it, real))
    for path in list(found.files):
        name = path if is_url(path) else names[os.path.realpath(path)]
        if name != path:
            found.files.remove(path)
            found.leave_out(path, f"it is another name of {name}, which is read once")


def _rank(path: str, real: str) -> tuple[bool, bool]:
    return path == real, not Path(path).is_symlink()


def literal_part(path: str, exists: Callable[[str], bool]) -> tuple[str, str]:
    """Split a path into what is meant as it is written, and the pattern after it, if any."""
    parts = path.split("/")
    for at, part in enumerate(parts):
        if glob.has_magic(part) and not exists("/".join(parts[: at + 1])):
            return "/".join(parts[:at]), "/".join(parts[at:])
    return path, ""


def _local(path: str, found: Found) -> Iterator[str]:
    root, pattern = literal_part(path, os.path.lexists)
    if pattern:
        if pattern.rpartition("/")[2] == "**":
            pattern += "/*"
        yield from dict.fromkeys(_matches(root, pattern.split("/"), found))
    elif Path(path).is_dir():
        yield from _matches(path, ["*"], found)
    elif os.path.lexists(path):
        if (kind := _kind(path)) is not None:
            raise SourceError(path, f"cannot be read: {kind}")
        yield path


def _matches(
    folder: str, parts: Sequence[str], found: Found, *, is_deep: bool = False
) -> Iterator[str]:
    """Yield the files under a folder that a pattern matches; `is_deep`: after `**`."""
    part, *rest = parts
    paths = _named(folder, part, found, only_folders=bool(rest))
    if part == "**":
        yield from _matches(folder, rest, found, is_deep=True)
        for path in paths:
            if Path(path).is_symlink():
                found.leave_out(path, _LINKED)
            else:
                yield from _matches(path, parts, found)
    elif rest:
        for path in paths:
            yield from _matches(path, rest, found)
    else:
        for path in paths:
            if not is_deep and _is_partition(path):
                yield from _matches(path, ["*"], found)
            else:
                yield from _file(path, found, is_deep=is_deep)


def _is_partition(path: str) -> bool:
    name = path.rpartition("/")[2]
    return is_partition_folder(name) and Path(path).is_dir() and not Path(path).is_symlink()


def _named(folder: str, part: str, found: Found, *, only_folders: bool) -> list[str]:
    """Return the paths directly in a folder that one part of a pattern matches, sorted."""
    if glob.has_magic(part):
        names = [entry.name for entry in Path(folder or "/").iterdir()]
        names = sorted(name for name in names if fnmatchcase(name, part))
    else:
        names = [part]
    paths = [f"{folder}/{name}" for name in names if os.path.lexists(f"{folder}/{name}")]
    if only_folders:
        paths = [path for path in paths if Path(path).is_dir()]
    hidden = [path for path in paths if _is_hidden(path.rpartition("/")[2], part)]
    for path in hidden:
        if not path.endswith("/_batchgen"):  # An earlier job's output: what else would it be?
            found.leave_out(path, _HIDDEN)
    return [path for path in paths if path not in set(hidden)]


def _file(path: str, found: Found, *, is_deep: bool) -> Iterable[str]:
    kind = _kind(path)
    if kind is None:
        return [path]
    if not (is_deep and kind in (_FOLDER, _LINKED)):  # `**` has entered it, or has said so.
        found.leave_out(path, kind)
    return []


def _kind(path: str) -> str | None:
    """What a name is that is no file; None of a file, and of a link to one.

    Raises:
        SourceError: It is a link that leads nowhere.
    """
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        if not Path(path).is_symlink():
            raise
        target = str(Path(path).readlink())
        text = f"is a link to {target!r}, which leads nowhere ({error.strerror}); mend or remove it"
        raise SourceError(path, text) from error
    if stat.S_ISDIR(mode):
        return _LINKED if Path(path).is_symlink() else _FOLDER
    return None if stat.S_ISREG(mode) else _OTHER


def _remote(url: str, found: Found) -> Iterator[str]:
    fs, inner = fsspec.core.url_to_fs(url)
    if isinstance(fs, fsspec.implementations.local.LocalFileSystem):
        yield from map(fs.unstrip_protocol, _local(inner, found))
        return
    root, pattern = literal_part(inner, fs.exists)
    entries: Iterable[dict[str, Any]] = []
    if pattern:
        entries = fs.glob(f"{glob.escape(root)}/{pattern}", detail=True).values()
    elif fs.isdir(inner):
        pattern, entries = "*", fs.ls(inner, detail=True)
    elif fs.exists(inner):
        yield fs.unstrip_protocol(inner)
    waiting = list(entries)
    for entry in waiting:  # Grows by what is in `key=value` folders.
        name = str(entry["name"]).rstrip("/")
        if any(_is_hidden(part, *pattern.split("/")) for part in name[len(root) :].split("/")):
            found.leave_out(fs.unstrip_protocol(name), _HIDDEN)
        elif entry["type"] != "directory":
            yield fs.unstrip_protocol(name)
        elif "**" not in pattern:
            if is_partition_folder(name.rpartition("/")[2]):
                waiting += fs.ls(name, detail=True)
            else:
                found.leave_out(fs.unstrip_protocol(name), _FOLDER)


def _is_hidden(name: str, *parts: str) -> bool:
    """Whether a name is hidden from these parts of a pattern."""
    return name.startswith((".", "_")) and not any(part.startswith(name[0]) for part in parts)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist, expected an input file"
    return str(getattr(error, "strerror", None) or error)
