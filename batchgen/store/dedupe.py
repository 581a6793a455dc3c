"""Which requests are answered, or being answered: their rows need no engine, only a copy.

A key is known by its first 64 bits, 8 bytes of memory each. Two keys that share them are told
apart where the answer is copied, by all 128; until then the second row merely waits.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import polars as pl

    from batchgen.core.records import Request

Dedupe = Literal["auto", "always", "never"]

_MERGE_KEYS, _RUN_KEYS = 2**18, 2**20
_HEX = 16


class KnownKeys:
    """A growing set of request keys."""

    def __init__(self) -> None:
        self._runs: list[pl.Series] = []
        """Sorted, each of `_RUN_KEYS` or a little more: so that no sort needs much memory."""
        self._loaded: list[pl.Series] = []
        """Not sorted yet."""
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return sum(map(len, [*self._runs, *self._loaded])) + len(self._recent)

    def load(self, prefixes: pl.Series) -> None:
        """Add many, see `prefixes_of`; repeats are fine."""
        self._loaded.append(prefixes)
        if sum(map(len, self._loaded)) >= _RUN_KEYS:
            self._sort()

    def _sort(self) -> None:
        import polars as pl

        # The last run may have room: many small loads must not become as many runs.
        if self._runs and len(self._runs[-1]) < _RUN_KEYS:
            self._loaded.append(self._runs.pop())
        if self._loaded:
            self._runs.append(pl.concat(self._loaded).sort())
            self._loaded.clear()

    def know(self, prefixes: Sequence[int]) -> list[bool]:
        """Whether each is in the set."""
        if not self:
            return [False] * len(prefixes)
        import polars as pl

        if len(self._recent) >= _MERGE_KEYS:
            self.load(pl.Series(list(self._recent), dtype=pl.UInt64))
            self._recent.clear()
        if self._loaded:
            self._sort()
        wanted = pl.Series(prefixes, dtype=pl.UInt64)
        found = pl.Series([prefix in self._recent for prefix in prefixes], dtype=pl.Boolean)
        for run in self._runs:
            if len(run):
                at = run.search_sorted(wanted).clip(0, len(run) - 1)
                found |= run.gather(at) == wanted
        return found.to_list()

    def add(self, prefix: int) -> bool:
        """Add one that `know` does not know; False if it was added since `know` was asked."""
        if prefix in self._recent:
            return False
        self._recent.add(prefix)
        return True

    def forget(self, prefix: int) -> None:
        """Remove one that was added lately."""
        self._recent.discard(prefix)


def prefixes_of(keys: pl.Series) -> pl.Series:
    """The first 64 bits of request keys; null for what is none."""
    import polars as pl

    return keys.str.head(_HEX).str.to_integer(base=16, dtype=pl.UInt64, strict=False)


def prefix_of(key: str) -> int:
    """The first 64 bits of a request key."""
    return int(key[:_HEX], 16)


class Sieve:
    """Lets the first of equal requests pass and sets the others aside. For any thread.

    Where sampling is greedy, or the job says so, equal requests share one answer. Otherwise each
    row has its own draw: of equal rows that could not be taken over one by one, the first keeps
    the base's answer, unless the plan has used one of that key; the others are drawn anew.
    """

    def __init__(self, base: KnownKeys, own: KnownKeys, dedupe: Dedupe) -> None:
        """Begin.

        Args:
            base: Answered in the plans that this one is based on.
            own: Answered in this plan; grows.
            dedupe: Whether rows of one job may share an answer; auto: where sampling is greedy.
        """
        self._base = base
        self._own = own
        self._dedupe = dedupe
        self._lock = threading.Lock()
        self.num_set_aside = 0
        """Rows that wait for another row's answer."""
        self.num_taken_back = 0
        """Requests that were let pass and have not been computed."""

    def passing(self, requests: Sequence[Request]) -> list[Request]:
        """The requests that have to be computed."""
        prefixes = [prefix_of(request.request_key) for request in requests]
        passes = self.let_pass(prefixes, [request.seed is not None for request in requests])
        return [request for request, passed in zip(requests, passes, strict=True) if passed]

    def let_pass(self, prefixes: Sequence[int], has_seed: Sequence[bool]) -> list[bool]:
        """Whether each request, by the first 64 bits of its key, has to be computed."""
        with self._lock:
            in_base, in_own = self._base.know(prefixes), self._own.know(prefixes)
            passes = [
                not self._has_answer(*one)
                for one in zip(prefixes, has_seed, in_base, in_own, strict=True)
            ]
            self.num_set_aside += len(passes) - sum(passes)
        return passes

    def take_back(self, those: Iterable[tuple[int, bool]]) -> None:
        """Requests (prefix, has_seed) that were let pass were not computed: others like them may.

        As far as they are remembered one by one; what is not waits for an answer that does not
        come, and is computed in the end.
        """
        with self._lock:
            for prefix, has_seed in those:
                self.num_taken_back += 1
                # One with a draw of its own has not been remembered; another like it may be.
                if shares(self._dedupe, has_seed=has_seed):
                    self._own.forget(prefix)

    def _has_answer(self, prefix: int, has_seed: bool, in_base: bool, in_own: bool) -> bool:  # noqa: FBT001
        if shares(self._dedupe, has_seed=has_seed):
            return in_base or in_own or not self._own.add(prefix)
        if not has_seed:
            return in_base  # It would be the same again.
        return in_base and not in_own and self._own.add(prefix)


def shares(dedupe: Dedupe, *, has_seed: bool) -> bool:
    """Whether a request may have the answer of an equal one."""
    return not has_seed if dedupe == "auto" else dedupe == "always"
