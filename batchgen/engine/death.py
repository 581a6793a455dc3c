"""What is known of an engine's death, when it was one too many, and what to ask less of the next.

Pure, but for the clock time in a record.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchgen.core.records import EngineFacts, EngineSpec
    from batchgen.engine.base import EngineRequest

MAX_ROWS = 1000
MAX_LOG_LINES = 60
MAX_IN_A_ROW = 10
MAX_BLAMED_IN_A_ROW = 3
MAX_AT_FIRST = 10
COMPLETIONS_PER_DEATH = 100
DEATHS_PER_CULPRIT = 10
"""A search takes 7 or 8; see `suspects`."""
OUT_OF_MEMORY = ("out of memory", "bad_alloc", "MemoryError", "OutOfMemoryError", "SIGKILL")
"""CUDA's and the host's; the kernel's OOM killer leaves no other word than its signal."""


class RowInFlight(NamedTuple):
    """A request in flight at a death; the row is known where the request knows it."""

    request_id: int
    ordinal: tuple[int, int] | None
    request_key: str | None


@dataclass(frozen=True, slots=True)
class EngineDeath:
    """One death, for people; nothing is decided from it. Holds no prompt."""

    number: int
    """From 1, within the run."""
    reason: str
    died_at: str
    """UTC, ISO 8601."""
    num_in_flight: int
    in_flight: tuple[RowInFlight, ...]
    """The first 1,000 of them, in the order of admission."""
    is_search: bool
    """Whether they were a group of suspects of an earlier death."""
    blamed: RowInFlight | None
    """The row that this death convicted: it was alone, for the second time."""
    log_tail: tuple[str, ...]
    """The engine's own last lines."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = [row._asdict() for row in self.in_flight]
        blamed = self.blamed._asdict() if self.blamed else None
        return {**asdict(self), "in_flight": rows, "blamed": blamed}


def row_in_flight(request: EngineRequest) -> RowInFlight:
    """Name a request for a record."""
    ordinal = getattr(request, "ordinal", None)
    key = getattr(request, "request_key", None)
    return RowInFlight(request.request_id, tuple(ordinal) if ordinal else None, key)


def rows_in_flight(requests: Sequence[EngineRequest]) -> tuple[RowInFlight, ...]:
    """Name the first of them."""
    return tuple(row_in_flight(request) for request in requests[:MAX_ROWS])


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
