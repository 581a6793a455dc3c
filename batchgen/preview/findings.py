"""What the doctor says: one line a fact, with what to do where something is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

GIB = 2**30
MAX_CHARS = 2000
"""Of a text: what a model's file says can be of any length."""


class Level(StrEnum):
    """How a fact bears on the job."""

    OK = "ok"
    WARNING = "warning"
    """It runs, but slower or otherwise than one may expect."""
    PROBLEM = "problem"
    """It does not run."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A fact."""

    level: Level
    topic: str
    """One word: gpu, vllm, memory, ..."""
    text: str
    advice: str = ""
    """What to do; empty where nothing is to be done."""

    def as_dict(self) -> dict[str, str]:
        """Plain values, for JSON."""
        return {name: str(getattr(self, name)) for name in self.__slots__}


def ok(topic: str, text: str) -> Finding:
    """Nothing is to be done."""
    return Finding(Level.OK, topic, _line(text))


def warning(topic: str, text: str, advice: str = "") -> Finding:
    """It runs all the same."""
    return Finding(Level.WARNING, topic, _line(text), advice)


def problem(topic: str, text: str, advice: str = "") -> Finding:
    """It does not run."""
    return Finding(Level.PROBLEM, topic, _line(text), advice)


def _line(text: str) -> str:
    """One line that every terminal takes: no control characters, no halves of characters."""
    text = text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def gib(num_bytes: float) -> str:
    """Bytes for people: `15.26 GiB`, or MiB below one."""
    size = abs(num_bytes)
    if size < GIB:
        return f"{num_bytes / 2**20:,.0f} MiB"
    return f"{num_bytes / GIB:,.2f} GiB" if size < 100 * GIB else f"{num_bytes / GIB:,.0f} GiB"


def count(num: int) -> str:
    """A number of parameters for people: 8.19 B, 1.12 M."""
    return f"{num / 1e9:,.2f} B" if num >= 1e8 else f"{num / 1e6:,.2f} M"
