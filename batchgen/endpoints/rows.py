"""A row on its way through attempts, and whose faults those are that failed. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchgen.endpoints.server import Endpoint
    from batchgen.engine.base import EngineRequest

LEAST_FAILURES, MOST_FAILURES = 3, 10
CHANCE = 1e-5
"""That a row fails by chance so often, as often as attempts fail now, is to be less likely."""


@dataclass(slots=True)
class Row:
    """A request that is not answered yet."""

    request: EngineRequest
    failures: dict[str, int] = field(default_factory=dict)
    """Server -> attempts that failed there while it answered others."""
    num_lost: int = 0
    """Attempts that ended with all others of the server."""
    doubts: list[tuple[Endpoint, float]] = field(default_factory=list)
    """Where and when an attempt broke: one of the two, which shows later."""
    said: str = ""
    num_tried: int = 0
    num_busy: int = 0
    busy_s: float = 0.0
    """When its server was busy for the first time."""

    @property
    def num_failures(self) -> int:
        """Attempts that count against it."""
        return sum(self.failures.values())

    def settle_doubts(self) -> None:
        """Find out whose faults the broken attempts were."""
        for endpoint, at_s in self.doubts:
            self.note_failure(endpoint, is_lost=not endpoint.lived_through(at_s))
        self.doubts.clear()

    def note_failure(self, endpoint: Endpoint, *, is_lost: bool) -> None:
        """Count an attempt: against the row, or as lost with others."""
        if is_lost:
            self.num_lost += 1
        else:
            self.failures[endpoint.url] = self.failures.get(endpoint.url, 0) + 1


def best_for(row: Row, usable: Sequence[Endpoint], now_s: float) -> Endpoint:
    """Where a row has failed least; of these, where there is most room."""
    return min(usable, key=lambda one: (row.failures.get(one.url, 0), -one.room(now_s)))


def enough_failures(row: Row, num_failed: int, num_tried: int) -> int:
    """After how many failures a row is to blame: the more, the more often those of others fail.

    Args:
        row: The row.
        num_failed: Attempts of all rows that failed.
        num_tried: Attempts of all rows.
    """
    others = max(0, num_failed - row.num_failures - row.num_lost)
    share = min(0.5, others / (num_tried + 20))
    num = math.ceil(math.log(CHANCE) / math.log(share)) if share > 0 else 0
    return min(MOST_FAILURES, max(LEAST_FAILURES, num))
