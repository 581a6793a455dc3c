"""Paths of a job file: dates put in, made absolute, checked before a file system is asked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.job.dates import with_dates

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import date

    from batchgen.job.model import JobConfig, RunConfig

_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 4000


def is_url(path: str) -> bool:
    """Whether fsspec has to open it; an absolute path never is one, whatever folders are called."""
    return "://" in path and not path.startswith("/")


def places_of(job: JobConfig, problems: list[str]) -> dict[str, list[str]]:
    """The paths that `bad_path` is to see, by key; those of input and output with their dates.

    Args:
        job: Before its paths are made absolute.
        problems: Gets what is wrong with dates and with URLs where a file is expected.
    """
    inputs = [job.input.path] if isinstance(job.input.path, str) else job.input.path
    places = {
        "output.path": _with_dates("output.path", [job.output.path], job.run_date, problems),
        "input.path": _with_dates("input.path", inputs, job.run_date, problems),
    }
    problems += [
        f"output.path: {_no_folder(path)}" for path in places["output.path"] if is_url(path)
    ]
    if job.model.name:
        places["model.name"] = [job.model.name]
    if job.run.on_finish:
        places["run.on_finish"] = job.run.on_finish[:1]
    if job.run.metrics_file is not None:
        places["run.metrics_file"] = [job.run.metrics_file]
        if is_url(job.run.metrics_file):
            found = f"{job.run.metrics_file!r} is a URL, expected a file on this machine"
            problems.append(f"run.metrics_file: {found}")
    return places


def _no_folder(url: str) -> str:
    """What is wrong with an output at a URL: nothing there could be published yet."""
    scheme, _, path = url.partition("://")
    instead = f" such as {path!r}" if scheme == "file" and path else ", local or mounted"
    return f"{url!r:.300} is a URL, expected a folder{instead}; object stores are not supported yet"


def _with_dates(key: str, paths: Sequence[str], run_date: date, problems: list[str]) -> list[str]:
    dated = []
    for path in paths:
        try:
            dated.append(with_dates(path, run_date))
        except ValueError as error:
            problems.append(f"{key}: {error}")
    return dated


def run_paths(run: RunConfig, base: Path) -> dict[str, Any]:
    """What changes in `[run]`. A command without a slash is looked for in PATH, as a shell does."""
    changes: dict[str, Any] = {}
    if run.on_finish and "/" in run.on_finish[0]:
        changes["on_finish"] = [absolute(base, run.on_finish[0]), *run.on_finish[1:]]
    if run.metrics_file is not None:
        changes["metrics_file"] = absolute(base, run.metrics_file)
    return changes


def bad_path(base: Path, path: str) -> str | None:
    """What no file system takes, told before one is asked."""
    if is_url(path):
        return None
    encoded = path.encode()
    if len(encoded) > _MAX_PATH_BYTES or max(map(len, encoded.split(b"/"))) > _MAX_NAME_BYTES:
        return f"{path[:40]!r}... is too long for a path ({len(encoded)} bytes)"
    try:
        absolute(base, path)
    except RuntimeError:
        return f"{path!r}: there is no such user"
    return None


def absolute(base: Path, path: str) -> str:
    """From the folder of the job file; URLs stay.

    Raises:
        RuntimeError: It begins with `~user`, and there is no such user, and no such file.
    """
    if is_url(path):
        return path
    is_there = path.startswith("~") and (base / path).exists()
    # normpath, not resolve: a symlinked input keeps the name that the user gave it.
    return os.path.normpath(base / (path if is_there else Path(path).expanduser()))
