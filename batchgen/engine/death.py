"""What is learnt from the deaths of engines: who did it, when it was one too many, why.

Pure, but for the clock time in a record and the engine's log, of which the last lines are read.

`SuspectSearch` looks for the request that kills engines, among those in flight at their deaths:

- After a first death all that was in flight goes in again at once: deaths come from outside, too.
- A group that the engine dies with once more is split, and its pieces go in one after the other,
  depth first, so that a culprit is found after a number of deaths that grows with the logarithm
  of the group (7 for 3,000 requests), and every further one costs at most as many.
- Whatever comes back is cleared: the engine lived through it.
- Only a request that was put in alone and died alone, twice in a row, is to blame. One that is
  merely the last of its group is not: what the others left behind may have killed the engine.
- After a conviction a witness is called: the request farthest from it goes in alone. An engine
  that dies with whatever it is given would otherwise convict one row after the other.

Every request given to `note_death` or `put_back` comes out of `next_group` again or is blamed;
none twice.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from batchgen.core.records import EngineFacts, EngineSpec, Request

MAX_PIECES = 8
"""More pieces find a lone culprit in fewer deaths; fewer keep the engine fuller on the way."""
SOLO_DEATHS = 2
"""One could be chance: a node that fails, an operator's kill."""

MAX_ROWS = 1000
MAX_LOG_LINES = 60
MAX_IN_A_ROW = 10
MAX_BLAMED_IN_A_ROW = 3
MAX_AT_FIRST = 10
COMPLETIONS_PER_DEATH = 100
DEATHS_PER_CULPRIT = 10
"""A search takes 7 or 8; see `SuspectSearch`."""
OUT_OF_MEMORY = ("out of memory", "bad_alloc", "MemoryError", "OutOfMemoryError", "SIGKILL")
"""CUDA's and the host's; the kernel's OOM killer leaves no other word than its signal."""
BY_CHOSEN_SETTINGS = (
    *("out of memory", "outofmemoryerror", "cuda graph", "cudagraph", "captur"),
    "compilation_config",
    *("no available memory for the cache blocks", "available kv cache memory"),
)
"""CUDA's words, those of its graphs and their capture, and vLLM's of a KV cache without room:
v1/core/kv_cache_utils.py, 0.26 to 0.33."""
TAIL_BYTES = 256 << 10
_PREFIX = re.compile(r"^(\([^)]*pid=\d+\) )?((DEBUG|INFO|WARNING|ERROR|CRITICAL) [^\]]*\] )?")
_CAUSE = re.compile(r"^(?!batchgen\.)[A-Za-z_][\w.]*(Error|Exception|Interrupt): .+")
VAGUE = ("Engine core initialization failed", "EngineCore encountered an issue")
"""vLLM's own summaries, which only say to look further up: v1/engine/utils.py, 0.26 to 0.33."""


class _Group(NamedTuple):
    requests: Sequence[Request]
    num_solo_deaths: int = 0


class SuspectSearch:
    """Hands out one group at a time; the caller puts nothing else into the engine meanwhile."""

    def __init__(self) -> None:
        self._groups: deque[_Group] = deque()
        self._inside: _Group | None = None
        self._wants_witness = False

    @property
    def is_on(self) -> bool:
        """Whether suspects wait, or one group of them is in the engine."""
        return bool(self._groups) or self._inside is not None

    @property
    def num_waiting(self) -> int:
        """Suspects that are not in the engine."""
        return sum(len(group.requests) for group in self._groups)

    def suspects(self) -> list[Request]:
        """Return those that are not in the engine."""
        return [request for group in self._groups for request in group.requests]

    def next_group(self) -> Sequence[Request]:
        """Clear the group inside, which must have come back, and give the next; empty if none."""
        if self._inside is not None:
            self._wants_witness = False
        if self._wants_witness and self._groups and not self._groups[0].num_solo_deaths:
            self._call_witness()
        self._inside = self._groups.popleft() if self._groups else None
        return self._inside.requests if self._inside else ()

    def put_back(self) -> None:
        """Take the group inside out again: the engine was dead before it got in."""
        if self._inside is not None:
            self._groups.appendleft(self._inside)
            self._inside = None

    def note_death(self, unfinished: Sequence[Request]) -> Request | None:
        """Learn from a death.

        Args:
            unfinished: What was in the engine, in the order of admission.

        Returns:
            The request to blame, if this death convicts one.
        """
        group, self._inside = self._inside, None
        if not unfinished:
            return None
        if group is None:
            self._groups.append(_Group(unfinished))
        elif len(group.requests) > 1:
            self._groups.extendleft(_Group(piece) for piece in reversed(split(unfinished)))
        elif group.num_solo_deaths + 1 >= SOLO_DEATHS:
            self._wants_witness = True
            return unfinished[0]
        else:
            self._groups.appendleft(_Group(unfinished, group.num_solo_deaths + 1))
        return None

    def _call_witness(self) -> None:
        *others, witness = self._groups.pop().requests
        if others:
            self._groups.append(_Group(others))
        self._groups.appendleft(_Group([witness]))


def split(requests: Sequence[Request]) -> list[Sequence[Request]]:
    """Cut into up to `MAX_PIECES` runs whose lengths differ by at most one; none is empty."""
    num_pieces = min(MAX_PIECES, len(requests))
    cuts = [len(requests) * number // num_pieces for number in range(num_pieces + 1)]
    return [requests[start:end] for start, end in pairwise(cuts)]


@dataclass(frozen=True, slots=True)
class EngineDeath:
    """One death, for people; nothing is decided from it. Holds no prompt."""

    number: int
    """From 1, within the run."""
    reason: str
    died_at: str
    """UTC, ISO 8601."""
    num_in_flight: int
    in_flight: Sequence[Mapping[str, Any]]
    """The first 1,000 of them, in the order of admission, see `row_in_flight`."""
    is_search: bool
    """Whether they were a group of suspects of an earlier death."""
    blamed: Mapping[str, Any] | None
    """The row that this death convicted: it was alone, for the second time."""
    log_tail: Sequence[str]
    """The engine's own last lines."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def row_in_flight(request: Request) -> dict[str, Any]:
    """Name a request for a record."""
    names = ("request_id", "ordinal", "request_key")
    return {name: getattr(request, name) for name in names}


def utc_now() -> str:
    """For records only."""
    return datetime.now(tz=UTC).isoformat(timespec="milliseconds")


class Tally:
    """Deaths against progress: a job may survive many deaths, but must get on between them."""

    def __init__(self) -> None:
        self.num_deaths = 0
        self._num_in_a_row = 0
        self._num_completed = 0
        self._num_blamed = 0
        self._num_blamed_in_a_row = 0

    def note_death(self) -> int:
        """Count a death; return its number."""
        self.num_deaths += 1
        self._num_in_a_row += 1
        return self.num_deaths

    def note_completed(self, num: int) -> None:
        """Count requests that came back."""
        self._num_completed += num
        self._num_in_a_row = 0
        self._num_blamed_in_a_row = 0

    def note_blamed(self) -> None:
        """Count a culprit found: progress, too."""
        self._num_blamed += 1
        self._num_blamed_in_a_row += 1
        self._num_in_a_row = 0

    def problem(self) -> str | None:
        """Why there should be no further engine; None while there should."""
        if self._num_in_a_row > MAX_IN_A_ROW:
            return f"the last {self._num_in_a_row} times without finishing a single row"
        if self._num_blamed_in_a_row > MAX_BLAMED_IN_A_ROW:
            return f"with any of {self._num_blamed_in_a_row} rows alone, and finished no other row"
        allowed = MAX_AT_FIRST + self._num_completed // COMPLETIONS_PER_DEATH
        if self.num_deaths > allowed + DEATHS_PER_CULPRIT * self._num_blamed:
            return f"too often for the {self._num_completed} rows that it finished"
        return None


def is_out_of_memory(reason: str) -> bool:
    """Whether the text of a death says that memory ran out, or may have."""
    return any(word in reason for word in OUT_OF_MEMORY)


def may_be_by_settings(reason: str) -> bool:
    """Whether a failed start may be due to settings that batchgen chose: memory, or graphs.

    Not the machine's memory: a kill is none of their doing.
    """
    return "SIGKILL" not in reason and any(word in reason.lower() for word in BY_CHOSEN_SETTINGS)


def ask_less(spec: EngineSpec, facts: EngineFacts | None) -> EngineSpec:
    """Halve what the next engine runs and holds at once; never below 1.

    Args:
        spec: Of the engine that died.
        facts: What it said of itself; says what `max_num_seqs` was where the spec does not.
    """
    before = facts.max_num_seqs if facts else spec.model_kwargs.get("max_num_seqs")
    kwargs = dict(spec.model_kwargs)
    if before is not None:
        kwargs["max_num_seqs"] = max(1, int(before) // 2)
    held = spec.max_in_flight
    return replace(spec, model_kwargs=kwargs, max_in_flight=max(1, held // 2) if held else None)


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
