"""Which requests are answered, or being answered: their rows need no engine, only a copy.

A key is known by its first 64 bits, 8 bytes of memory each. Two keys that share them are told
apart where the answer is copied, by all 128; until then the second row merely waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

    from batchgen.records import Request

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


def prefixes_of(keys: pl.Series) -> pl.Series:
    """The first 64 bits of request keys; null for what is none."""
    import polars as pl

    return keys.str.head(_HEX).str.to_integer(base=16, dtype=pl.UInt64, strict=False)


def prefix_of(key: str) -> int:
    """The first 64 bits of a request key."""
    return int(key[:_HEX], 16)


class Sieve:
    """Lets the first of equal requests pass and sets the others aside. Owned by one thread.

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
        self.num_set_aside = 0
        """Rows that wait for another row's answer."""

    def passing(self, requests: Sequence[Request]) -> list[Request]:
        """Those that have to be computed."""
        prefixes = [prefix_of(request.request_key) for request in requests]
        found = [
            request
            for request, prefix, in_base, in_own in zip(
                requests, prefixes, self._base.know(prefixes), self._own.know(prefixes), strict=True
            )
            if not self._has_answer(request, prefix, in_base=in_base, in_own=in_own)
        ]
        self.num_set_aside += len(requests) - len(found)
        return found

    def _has_answer(self, request: Request, prefix: int, *, in_base: bool, in_own: bool) -> bool:
        if shares(request, self._dedupe):
            return in_base or in_own or not self._own.add(prefix)
        if request.seed is None:
            return in_base  # It would be the same again.
        return in_base and not in_own and self._own.add(prefix)


def shares(request: Request, dedupe: Dedupe) -> bool:
    """Whether a request may have the answer of an equal one."""
    return request.seed is None if dedupe == "auto" else dedupe == "always"
