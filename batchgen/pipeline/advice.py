"""What a run's samples say of its settings: what held the engine back, and what to change. Pure.

Told at the end of a run, and only what is beyond doubt: a hint that is wrong once is not read
again. `batchgen tune` measures; this only looks.
"""

from __future__ import annotations

import statistics
from itertools import dropwhile
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.core.records import EngineFacts

LEAST_S = 60.0
"""Of steady work: a shorter run has too few samples, and little to gain."""
LEAST_SAMPLES = 6
STORM = 0.1
"""Preemptions a finished row. Each does a prompt and half an answer again, on average: from here
on a twentieth of the work or more is done twice."""
FULL_CACHE = 0.95
IDLE = 0.6
"""Running rows, as a share of what may run: below, the GPU's time per token is well above its
best. Not nearer to 1, since rows that a step has finished are not in the count."""
SPARE_CACHE = 0.4
"""KV cache in use at most: below, more than twice as many rows would fit."""
BUSY = 0.7
"""Of its time that a GPU works, at least. With a model of 0.6 B parameters an H100 worked for 50 to
65 % of it, with two engines and with a model of 8 B always: README, "Speed"."""
MOST_SEQS = 512
"""From so many rows at once steps take longer with each row: more of them gain little."""
_SHARED = (
    *("num_ok", "num_errors", "num_in_flight"),
    *("num_running", "num_waiting", "num_preemptions"),
)
"""Figures of a sample that are sums over the engines."""


class Way(NamedTuple):
    """What of a job decides the way that its rows take."""

    max_in_flight: int | None = None
    n: int = 1
    """Answers a row: a request takes so many of the sequences that run at once."""
    capacity: int = 0
    """Requests that an engine wants to hold, those that it prepares included."""
    num_gpus: int = 1
    """Of an engine."""
    num_engines: int = 1
    """Alike, and at work on the samples' rows together; with several, all of the time."""


def advise(samples: Sequence[Mapping[str, Any]], facts: EngineFacts | None, way: Way) -> list[str]:
    """What to change, a line each; most runs get none.

    Args:
        samples: Of `RunStats.sample`, in order, from one engine; of `Board.whole`, from several.
        facts: An engine's.
        way: Of the job.
    """
    if facts is None or facts.device == "none":
        return []
    steady = steady_samples(samples)
    if way.num_engines > 1:
        steady = [_of_one(sample, way.num_engines) for sample in steady]
    if len(steady) < LEAST_SAMPLES or _span(steady, "elapsed_s") < LEAST_S:
        return []
    for look in (_storm, _idle, _waits, _spare):
        if found := look(steady, facts, way):
            return [found]
    return []


def steady_samples(samples: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Those between the engine's filling and the moment when all that was left was inside it.

    Before, while it loads, nothing runs for a minute or two. From then on it runs empty, which
    says nothing of its settings, and may take most of a run whose last rows are long.
    """
    if not samples:
        return []
    end = _num_ended(samples[-1])
    working = dropwhile(lambda sample: not sample["num_running"], samples)
    steady = [
        sample
        for sample in working
        if sample["num_running"] is not None and end - _num_ended(sample) > sample["num_in_flight"]
    ]
    return steady[2:]


def _num_ended(sample: Mapping[str, Any]) -> int:
    return int(sample["num_ok"] + sample["num_errors"])


def _of_one(sample: Mapping[str, Any], num_engines: int) -> Mapping[str, Any]:
    """What a sample of several engines tells of one of them, on average."""
    shares = {name: sample[name] and sample[name] / num_engines for name in _SHARED}
    return {**sample, **shares}


def _who(way: Way) -> str:
    return "the engine" if way.num_engines == 1 else "each engine"


def _storm(steady: Sequence[Mapping[str, Any]], facts: EngineFacts, way: Way) -> str | None:
    """The KV cache is too small for what runs at once."""
    if any(sample["num_preemptions"] is None for sample in steady):
        return None
    num = _span(steady, "num_preemptions")
    all_of_them = num * way.num_engines
    num_rows = _span(steady, "num_ok") + _span(steady, "num_errors")
    usages = _known(steady, "kv_cache_usage")
    if num < STORM * max(1.0, num_rows) or not usages or max(usages) < FULL_CACHE:
        return None
    fits = 0.9 * statistics.median(_known(steady, "num_running"))
    fewer = max(1, round(min(fits, 0.8 * facts.max_num_seqs)))
    fewer = fewer if fewer < 20 else round(fewer, -1)
    return (
        f"the KV cache was full and {all_of_them:,.0f} requests were preempted, "
        f"{num / max(1, num_rows):.1f} a row: work that is done twice. Lower "
        f"model.max_num_seqs from {facts.max_num_seqs} to about {fewer}, or give the "
        "cache more memory (model.gpu_memory_utilization), or run `batchgen tune`"
    )


def _idle(steady: Sequence[Mapping[str, Any]], facts: EngineFacts, way: Way) -> str | None:
    """The engine could have run more rows than it was given."""
    running = statistics.median(_known(steady, "num_running"))
    waiting = statistics.median(_known(steady, "num_waiting") or [0])
    usage = max(_known(steady, "kv_cache_usage") or [0.0])
    if running >= IDLE * facts.max_num_seqs or waiting > 0.05 * running or usage >= 0.9:
        return None  # It is full, or rows wait in it for something else: memory, tokens a step.
    given = f"{_who(way)} ran {running:,.0f} rows at once, it may run {facts.max_num_seqs:,}"
    window = way.max_in_flight
    if window is not None and window * way.n < facts.max_num_seqs:
        return (
            f"{given}: run.max_in_flight = {window} lets no more in. Raise it to "
            f"{2 * facts.max_num_seqs // way.n} or leave it out"
        )
    in_flight = statistics.median(_known(steady, "num_in_flight"))
    if in_flight < 0.5 * way.capacity:
        return (
            f"{given}: rows came too slowly. Reading and rendering were the limit: Parquet "
            "instead of CSV or .gz, fewer columns, a simpler template"
        )
    return (
        f"{given}: rows were ready, but the engine's front end (tokenizing, adding, reading "
        "answers) did not keep up. It needs faster CPU cores, shorter prompts or fewer logprobs"
    )


def _waits(steady: Sequence[Mapping[str, Any]], facts: EngineFacts, way: Way) -> str | None:
    """The engine had its fill, and the GPU waited for it between steps."""
    found = _known(steady, "gpu_busy")
    is_one = way.num_engines == way.num_gpus == 1
    if facts.device == "cpu" or not is_one or len(found) < LEAST_SAMPLES:
        return None
    busy = statistics.median(found)
    if busy >= BUSY:
        return None
    return (
        f"the GPU worked {busy:.0%} of the time though the engine had its fill: between steps it "
        "waited for vLLM's own Python, as with small models. Two engines on it may be faster: "
        "run.replicas = 2 with run.gpus_per_replica = 0.5, and no model.gpu_memory_utilization; "
        "so are faster CPU cores"
    )


def _spare(steady: Sequence[Mapping[str, Any]], facts: EngineFacts, way: Way) -> str | None:
    """Rows waited at `max_num_seqs`, with room for more in the KV cache."""
    usages = _known(steady, "kv_cache_usage")
    if facts.device == "cpu" or facts.max_num_seqs >= MOST_SEQS or not usages:
        return None  # On a CPU a step takes longer with each row: nothing is gained.
    running = statistics.median(_known(steady, "num_running"))
    is_full = running >= 0.95 * facts.max_num_seqs and min(_known(steady, "num_waiting")) > 0
    if not is_full or max(usages) >= SPARE_CACHE:
        return None
    return (
        f"{_who(way)} ran {facts.max_num_seqs} rows at once with at most {max(usages):.0%} of its "
        f"KV cache in use: model.max_num_seqs = {2 * facts.max_num_seqs} may be faster; "
        "`batchgen tune` measures it"
    )


def _known(samples: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(sample[name]) for sample in samples if sample[name] is not None]


def _span(samples: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(samples[-1][name]) - float(samples[0][name])
