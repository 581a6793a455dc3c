"""Figures of token counts: lengths, shared prefixes, duplicates seen in a sample. Pure."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable, Mapping, Sequence

BLOCK_TOKENS = 16
"""What vLLM's prefix cache shares, whole blocks of so many tokens: vllm/config/cache.py,
CacheConfig.DEFAULT_BLOCK_SIZE, 0.26 to 0.33. Some attention backends choose larger ones."""
MAX_BLOCKS = 1 << 20
"""Blocks kept to find shared prefixes: about 100 MB."""
_MANY = 10
"""Equal rows in a sample, from which on their number in the whole is known well."""
_BAR_CHARS = 30


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long some prompts are, in tokens."""

    num: int
    total: int
    p50: int
    p95: int
    longest: int
    buckets: Sequence[tuple[int, int, int]]
    """From, to (both included, `2**k` and `2**(k+1) - 1`), prompts; empty ones between others are
    there too."""

    @property
    def mean(self) -> float:
        """Tokens a prompt."""
        return self.total / self.num

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        buckets = [{"from": low, "to": high, "num": num} for low, high, num in self.buckets]
        figures = {"p50": self.p50, "p95": self.p95, "longest": self.longest}
        return {"mean": self.mean, **figures, "histogram": buckets}


def lengths_of(counts: Mapping[int, int]) -> Lengths | None:
    """Sum up.

    Args:
        counts: Length in tokens, at least 1 -> how many prompts have it.

    Returns:
        None if there are no prompts.
    """
    num = sum(counts.values())
    if not num:
        return None
    by_length = sorted(counts.items())
    bits: Counter[int] = Counter()
    for length, times in by_length:
        bits[length.bit_length() - 1] += times
    return Lengths(
        num=num,
        total=sum(length * times for length, times in by_length),
        p50=_quantile(by_length, math.ceil(0.5 * num)),
        p95=_quantile(by_length, math.ceil(0.95 * num)),
        longest=by_length[-1][0],
        buckets=[(1 << k, (2 << k) - 1, bits[k]) for k in range(min(bits), max(bits) + 1)],
    )


def _quantile(by_length: Iterable[tuple[int, int]], rank: int) -> int:
    """The length at a rank, counted from 1: always one that is there."""
    for length, times in by_length:
        rank -= times
        if rank <= 0:
            return length
    msg = f"rank {rank} is beyond the counts"
    raise ValueError(msg)


def bars(buckets: Sequence[tuple[int, int, int]]) -> list[str]:
    """A histogram as lines: `64-127   #####  1,203   60.2%`. One `#` stands for any few."""
    most = max((num for _, _, num in buckets), default=1)
    total = sum(num for _, _, num in buckets) or 1
    labels = [f"{low:,}-{high:,}" if low < high else f"{low:,}" for low, high, _ in buckets]
    width = max(map(len, labels), default=0)
    return [
        f"{label:>{width}}  {'#' * math.ceil(num / most * _BAR_CHARS):{_BAR_CHARS}}"
        f"  {num:>9,}  {num / total:6.1%}"
        for label, (_, _, num) in zip(labels, buckets, strict=True)
    ]


class PrefixCache:
    """What a prefix cache that never forgets would save, prompt by prompt.

    As vLLM's: a block is shared if it and everything before it was seen, and the last token of
    a prompt is always computed (vllm/v1/core/kv_cache_manager.py, get_computed_blocks, 0.26 to
    0.33). In a sample fewer prompts meet others that begin alike, so its share is a lower bound.
    """

    def __init__(self, block_tokens: int = BLOCK_TOKENS, max_blocks: int = MAX_BLOCKS) -> None:
        """Begin with an empty cache.

        Args:
            block_tokens: Tokens of a block.
            max_blocks: With so many blocks it is full: later prompts are not looked at.
        """
        self._block_tokens = block_tokens
        self._max_blocks = max_blocks
        self._blocks: dict[tuple[int, bytes], int] = {}
        self.num_prompts = 0
        self.num_tokens = 0
        self.num_shared = 0
        """Of the tokens, those that the cache would have served."""

    @property
    def share(self) -> float | None:
        """Of all tokens, 0 to 1; None before the first."""
        return self.num_shared / self.num_tokens if self.num_tokens else None

    def feed(self, token_ids: array[int]) -> None:
        """Serve a prompt, then remember it."""
        if len(self._blocks) >= self._max_blocks:
            return
        self.num_prompts += 1
        self.num_tokens += len(token_ids)
        size, last_start = self._block_tokens, len(token_ids) - self._block_tokens
        parent = -1
        for start in range(0, last_start + 1, size):
            key = (parent, token_ids[start : start + size].tobytes())
            # Blocks are told apart by what is before them: a known one follows known ones.
            if key in self._blocks and start < last_start:
                self.num_shared += size
            parent = self._blocks.setdefault(key, len(self._blocks))


def estimate_duplicates(times: Iterable[int], num_sampled: int, num_rows: int) -> float:
    """Estimate how many of all rows are equal to an earlier one, from a random sample.

    Keys that a sample holds often stand for groups that are as much larger as the whole is.
    The rest are taken for groups of one size g, found from how many pairs and triples of equal
    rows there are: both grow with the chance to be drawn, `g = 2 + 3 * triples / pairs`, and
    `pairs` of them make `2 * pairs / g` duplicates. Without any pair the estimate is 0.

    Args:
        times: How often each different key is in the sample.
        num_sampled: Rows in the sample, the sum of `times`.
        num_rows: Rows of which it was drawn.

    Returns:
        0 to `num_rows`; exact if everything was drawn.
    """
    times = list(times)
    if num_sampled < 2:
        return 0.0
    if num_sampled >= num_rows:
        return float(num_sampled - len(times))
    scale = num_rows / num_sampled
    many = sum(found * scale - 1 for found in times if found >= _MANY)
    few = [found for found in times if found < _MANY]
    pairs = sum(math.comb(found, 2) for found in few) * scale**2
    triples = sum(math.comb(found, 3) for found in few) * scale**3
    if pairs:
        many += 2 * pairs / (2 + 3 * triples / pairs)
    return min(many, float(num_rows - len(times)))
