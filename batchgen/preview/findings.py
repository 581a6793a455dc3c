"""What `batchgen doctor` says: findings, one line a fact, with what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

GIB = 2**30
MAX_CHARS = 2000
"""Longest text of a finding: what a model's file says can be of any length."""


class Level(StrEnum):
    """How a fact bears on the job."""

    OK = "ok"
    WARNING = "warning"
    """The job runs, but slower or otherwise than one may expect."""
    PROBLEM = "problem"
    """The job does not run."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about the job on this machine."""

    level: Level
    topic: str
    """One word: gpu, vllm, memory, ..."""
    text: str
    advice: str = ""
    """What to do; empty where nothing is to be done."""


def ok(topic: str, text: str) -> Finding:
    """A fact that needs nothing to be done."""
    return Finding(Level.OK, topic, _line(text))


def warning(topic: str, text: str, advice: str = "") -> Finding:
    """A fact with which the job runs all the same."""
    return Finding(Level.WARNING, topic, _line(text), advice)


def problem(topic: str, text: str, advice: str = "") -> Finding:
    """A fact with which the job does not run."""
    return Finding(Level.PROBLEM, topic, _line(text), advice)


def of_error(topic: str, error: Exception, advice: str = "") -> Finding:
    """A problem with an error's text, in one line."""
    lines = (line.strip() for line in str(error).splitlines())
    return problem(topic, "; ".join(lines) or type(error).__name__, advice)


def _line(text: str) -> str:
    """One line that every terminal takes: a model's file can hold escape sequences."""
    text = text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def gib(num_bytes: float) -> str:
    """Bytes for people: `15.26 GiB`, or MiB below one."""
    size = abs(num_bytes)
    if size < GIB:
        return f"{num_bytes / 2**20:,.0f} MiB"
    return f"{num_bytes / GIB:,.2f} GiB" if size < 100 * GIB else f"{num_bytes / GIB:,.0f} GiB"
