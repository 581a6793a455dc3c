"""Who killed the engine: a search over the requests that were in flight at its deaths.

Pure bookkeeping; it starts no engine and knows no completion. The rules:

- After a first death all that was in flight goes in again at once: deaths come from outside, too.
- A group that the engine dies with once more is split, and its pieces go in one after the other,
  depth first, so that a culprit is found after a number of deaths that grows with the logarithm
  of the group (7 for 3,000 requests), and every further one costs at most as many.
- Whatever comes back is cleared: the engine lived through it.
- Only a request that was put in alone and died alone, twice in a row, is to blame. One that is
  merely the last of its group is not: what the others left behind may have killed the engine.
- After a conviction a witness is called: the request farthest from it goes in alone. An engine
  that dies with whatever it is given would otherwise convict one row after the other.

Invariant: every request given to `note_death` or `put_back` comes out of `next_group` again or is
blamed; none twice.
"""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchgen.engine.base import EngineRequest

MAX_PIECES = 8
"""More pieces find a lone culprit in fewer deaths; fewer keep the engine fuller on the way."""
SOLO_DEATHS = 2
"""One could be chance: a node that fails, an operator's kill."""


class _Group(NamedTuple):
    requests: Sequence[EngineRequest]
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

    def next_group(self) -> Sequence[EngineRequest]:
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

    def note_death(self, unfinished: Sequence[EngineRequest]) -> EngineRequest | None:
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


def split(requests: Sequence[EngineRequest]) -> list[Sequence[EngineRequest]]:
    """Cut into up to `MAX_PIECES` runs whose lengths differ by at most one; none is empty."""
    num_pieces = min(MAX_PIECES, len(requests))
    cuts = [len(requests) * number // num_pieces for number in range(num_pieces + 1)]
    return [requests[start:end] for start, end in pairwise(cuts)]
