"""Sampling seeds: each attempt's own, the same in every run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchgen.core.records import Ordinal
    from batchgen.job.answers import SamplingConfig

_SEED_BITS = 62  # vLLM takes an int64, and adds the sample's index for n > 1.


@dataclass(frozen=True, slots=True)
class Seeds:
    """The seeds of one plan."""

    sampling: SamplingConfig
    generation: int = 0
    """How many plans have tried the row's predecessors in vain, see `--retry-errors`."""

    def of(self, ordinal: Ordinal, params: Mapping[str, Any], attempt: int) -> int | None:
        """An attempt's own; None where sampling is greedy, since a seed then changes nothing."""
        if params.get("temperature", self.sampling.temperature) == 0:
            return None
        return row_seed(self.sampling.seed, ordinal, attempt, self.generation)


def row_seed(job_seed: int, ordinal: Ordinal, attempt: int = 1, generation: int = 0) -> int:
    """The seed of one attempt: the same however rows are spread over runs.

    vLLM draws the samples of a request with this seed plus the sample's index
    (vllm/v1/engine/parallel_sampling.py, 0.26 to 0.33).
    """
    text = f"{job_seed}:{ordinal.segment}:{ordinal.row}"
    if attempt > 1 or generation:
        text += f":{attempt}"
    if generation:
        text += f":{generation}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _SEED_BITS)
