"""Paths of a job file: dates put in, made absolute, checked before a file system is asked.

    {date} {run_date}   the day of the run; both are the same
    {yesterday}         the day before
    -3d +1d             days off, after any of them
    :%Y/%m/%d           how it is written; ISO, 2026-11-23, if it is not said

Braces around anything else stay as they are, unless it looks like one of these mistyped.
"""

from __future__ import annotations

import difflib
import os
import re
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

NAMES = {"date": 0, "run_date": 0, "yesterday": -1}
"""Name -> days after the day of the run."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_TOKEN = re.compile(r"(\w+?)([+-]\d+d)?(?::(.*))?", re.DOTALL)
_OFFSET = re.compile(r"\s*[+-]\s*\d+\s*\w*$")
# Of a day; %H and the like would be 00 without a word. Names of days and months are English.
_DIRECTIVES = frozenset("aAbBdFGgjmuUVwWyY%")
_OTHER_WORDS = {"today": "date", "now": "date", "tomorrow": "run_date+1d"}
_LIKENESS = 0.82  # `update` and `data` are no mistyped `date`, `yesterdy` is `yesterday`.


def today() -> date:
    """The day in this machine's zone."""
    return datetime.now(tz=UTC).astimezone().date()


def with_dates(path: str, run_date: date) -> str:
    """Put dates into a path.

    Args:
        path: As in the job file.
        run_date: What `{date}` means.

    Raises:
        ValueError: A token is mistyped; the text says which and what was expected.
    """
    return _BRACES.sub(lambda found: _resolved(path, found, run_date), path)


def _resolved(path: str, found: re.Match[str], run_date: date) -> str:
    body = found[1]
    token = _TOKEN.fullmatch(body)
    if token is None or token[1] not in NAMES:
        if meant := _meant(body):
            msg = f"{found[0]!r} is no date, did you mean {'{' + meant + '}'!r}?"
            raise ValueError(msg)
        return found[0]
    if path[: found.start()].endswith("{") and path[found.end() :].startswith("}"):
        msg = f"'{{{found[0]}}}' has two pairs of braces, expected one: {found[0]!r}"
        raise ValueError(msg)
    try:
        day = run_date + timedelta(days=NAMES[token[1]] + int((token[2] or "0d")[:-1]))
    except OverflowError:
        msg = f"{found[0]!r} is outside of the calendar, expected fewer days"
        raise ValueError(msg) from None
    return day.isoformat() if token[3] is None else _written(day, token[3], found[0])


def _written(day: date, layout: str, token: str) -> str:
    directives = re.findall("%(.?)", layout, re.DOTALL)
    # `%%` alone is no date either: every day would have the same path.
    if not set(directives) - {"%"} or not _DIRECTIVES.issuperset(directives):
        msg = f"{token!r} does not say how to write a day, expected for example '{{date:%Y/%m/%d}}'"
        raise ValueError(msg)
    # One directive at a time: the text between them is none of the C library's business.
    return re.sub("%.", lambda found: day.strftime(found[0]), layout)


def _meant(body: str) -> str | None:
    """The token that this looks like a slip of, None if it looks like something else."""
    name, colon, layout = body.partition(":")
    offset = _OFFSET.search(name)
    word = (name[: offset.start()] if offset else name).strip().lower()
    meant = _OTHER_WORDS.get(word)
    if meant is None:
        close = difflib.get_close_matches(word, NAMES, n=1, cutoff=_LIKENESS)
        if not close:
            return None
        number = re.sub(r"\s|\D+$", "", offset[0]) if offset else ""
        meant = close[0] + (f"{number}d" if number else "")
    return meant + (f":{layout.strip()}" if colon and layout.strip() else "")


_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 4000


def is_url(path: str) -> bool:
    """Whether fsspec has to open it; an absolute path never is one, whatever folders are called."""
    return "://" in path and not path.startswith("/")


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
    first = path.partition("/")[0]
    is_there = first.startswith("~") and (
        os.path.lexists(base / first) or any(char in first for char in "*?[")
    )
    # normpath, not resolve: a symlinked input keeps the name that the user gave it.
    return os.path.normpath(base / (path if is_there else Path(path).expanduser()))
