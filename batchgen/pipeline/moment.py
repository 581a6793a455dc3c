"""Where a run is, for somebody who looks on from another thread."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchgen.core.records import EngineFacts, EngineStats
    from batchgen.pipeline.context import RunContext


@dataclass(frozen=True, slots=True)
class Moment:
    """One look. Each figure is right by itself; together they are of nearly one moment."""

    at_s: float
    """On the monotonic clock."""
    facts: EngineFacts | None
    """None until the engine is up."""
    engine: EngineStats
    num_in_flight: int
    """Requests that the engine holds, those that it prepares included."""
    num_ended: int
    """Rows that the engine has answered in this run, or failed to."""
    prompt_tokens: int
    """Of answers that are back."""
    cached_tokens: int
    output_tokens: int


def look_at_run(context: RunContext) -> Moment:
    """Look; waits for nobody."""
    stats = context.stats
    return Moment(
        at_s=time.monotonic(),
        facts=context.engine.facts,
        engine=context.engine.stats,
        num_in_flight=context.engine.num_in_flight,
        num_ended=stats.num_results,
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.cached_tokens,
        output_tokens=stats.output_tokens,
    )
