"""Finds in an engine's log what a person wants to read first: why it went down."""

from __future__ import annotations

import re
from pathlib import Path

TAIL_BYTES = 256 << 10
_PREFIX = re.compile(r"^(\([^)]*pid=\d+\) )?((DEBUG|INFO|WARNING|ERROR|CRITICAL) [^\]]*\] )?")
_CAUSE = re.compile(r"^(?!batchgen\.)[A-Za-z_][\w.]*(Error|Exception|Interrupt): .+")
VAGUE = ("Engine core initialization failed", "EngineCore encountered an issue")
"""vLLM's own summaries, which only say to look further up: v1/engine/utils.py, 0.26 to 0.33."""


def is_vague(text: str) -> bool:
    """Whether a text is one of vLLM's that name no cause."""
    return any(phrase in text for phrase in VAGUE)


def log_size(path: str | None) -> int:
    """How long a log is now; 0 if there is none."""
    return Path(path).stat().st_size if path is not None and Path(path).exists() else 0


def log_tail(path: str | None, start: int) -> list[str]:
    """Read the last lines that an engine wrote, without vLLM's line prefixes.

    Args:
        path: The log file, if there is one.
        start: Its size when the engine started; what is before is another engine's.
    """
    if path is None or not Path(path).exists():
        return []
    with Path(path).open("rb") as file:
        end = file.seek(0, 2)
        file.seek(max(start, end - TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    return [_PREFIX.sub("", line).rstrip() for line in text.splitlines() if line.strip()]


def find_cause(lines: list[str]) -> str | None:
    """Pick the last exception that says something, as its one line of a traceback."""
    for line in reversed(lines):
        if _CAUSE.match(line) and not is_vague(line):
            return line[:500]
    return None
