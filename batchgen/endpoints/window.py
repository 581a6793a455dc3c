"""How many requests a server gets at once, and how many a minute: found out, within bounds. Pure.

A server's throughput grows with what it has at once until it is busy; from there on only the
latency does. So the window grows while a round of answers comes faster than the round before did,
and goes back where it does not. A server that says "too many" has it halved. Where a server says
that nothing waits there, as vLLM's does, that is room, and no round of long answers is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LEAST_GAIN = 1.05
"""A round that is not so much faster than with the smaller window was not worth the larger one."""
LEAST_ROUND_S = 0.3
DOUBLE, CAREFULLY = 2.0, 1.25
HOLD_S = 20.0
"""Before more is tried again where more brought nothing."""
SEEN = 0.9
"""Of what was sent, so much runs: others may just be answered. More than before it last grew."""
CALM_S = 2.0
"""Refusals in so short a time are one: they were all sent before the first came back."""


@dataclass(slots=True)
class Window:
    """Of one server."""

    size: int
    most: int
    _factor: float = DOUBLE
    _rate: float = 0.0
    """Of the last window that was kept: tokens a second."""
    _before: int = 0
    """The window to go back to; 0: this one is kept."""
    _since_s: float = 0.0
    _num: int = 0
    _tokens: int = 0
    _hold_s: float = 0.0
    _goal: int = 0
    """Half of what it had before it was busy: so far it grows back fast."""
    _shrunk_s: float = field(default=-CALM_S)

    def note(self, now_s: float, num_tokens: int, *, is_full: bool) -> None:
        """Count an answer; at the end of a round, decide.

        Args:
            now_s: Monotonic.
            num_tokens: Of prompt and answer.
            is_full: Whether there was as much at the server as the window allows.
        """
        if not is_full or not self._since_s:
            self._begin(now_s)
            return
        self._num += 1
        self._tokens += num_tokens + 1
        took_s = now_s - self._since_s
        if self._num < self.size or took_s < LEAST_ROUND_S:
            return
        self._decide(now_s, self._tokens / took_s)
        self._begin(now_s)

    def _decide(self, now_s: float, rate: float) -> None:
        if self._before and rate < LEAST_GAIN * self._rate:
            self.size, self._before = self._before, 0
            self._factor, self._hold_s = CAREFULLY, now_s + HOLD_S
            return
        self._rate = rate
        self._before = 0
        if self.size < self._goal:
            self.size = min(self._goal, int(self.size * DOUBLE))
        elif now_s >= self._hold_s and self.size < self.most:
            self._before = self.size
            self.size = min(self.most, max(self.size + 1, int(self.size * self._factor)))

    def _begin(self, now_s: float) -> None:
        self._since_s, self._num, self._tokens = now_s, 0, 0

    def widen(self, now_s: float, num_mine: int, num_running: int, num_waiting: int) -> None:
        """Take some more where a server runs all that was sent, and nobody's request waits there.

        By a quarter, which is thus the longest queue before the requests of others.
        """
        is_room = num_waiting == 0 and num_running >= SEEN * num_mine
        if is_room and num_mine >= self.size < self.most and now_s >= self._hold_s:
            self.size = min(self.most, max(self.size + 1, int(self.size * CAREFULLY)))
            self._before, self._rate = 0, 0.0
            self._begin(now_s)

    def shrink(self, now_s: float) -> None:
        """Take less: the server has refused, or not answered in time."""
        if now_s - self._shrunk_s < CALM_S:
            return
        self._shrunk_s = now_s
        if self.size > self._goal:
            self._goal = self.size // 2
        self.size, self._before, self._rate = max(1, self.size // 2), 0, 0.0
        self._factor, self._hold_s = CAREFULLY, now_s + HOLD_S / 4
        self._begin(now_s)


class Meter:
    """At most so much a minute; what is saved up is at most what comes in a second."""

    def __init__(self, per_minute: float | None, now_s: float) -> None:
        """Begin with one second's; None: no limit."""
        self._per_s = per_minute / 60 if per_minute else None
        self._left = max(1.0, self._per_s or 0)
        self._at_s = now_s

    def wait_s(self, now_s: float) -> float:
        """How long until the next may go; 0 if it may now."""
        if self._per_s is None:
            return 0.0
        most = max(1.0, self._per_s)
        self._left = min(most, self._left + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        # A hair more than is needed, so that who has waited need not wait again.
        return 0.0 if self._left >= min(1.0, most) else (1.001 - self._left) / self._per_s

    def take(self, amount: float) -> None:
        """Spend, also what is not there yet: it is waited for afterwards."""
        self._left -= amount
