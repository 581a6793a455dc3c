"""A run's replicas as a table for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from batchgen.pipeline.progress import duration, num_inside

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_WIDTH = 100
_MOST_REPLICAS = 24
_MOST_NOT_RUNNING = 16
_SILENT_S = 30.0
_COLUMNS = (
    *("replica", "worker", "state", "rows/s", "tok/s in", "out", "in flight", "KV", "restarts"),
    "host",
)
_LEFT = {"state", "host"}


def replica_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of a live view's replicas; of many, those that do not run and the slowest."""
    if not rows:
        return []
    others = [row for row in rows if _state(row) != "running"]
    # Those that have no rows come last: they are well.
    others.sort(key=lambda row: _state(row) == "idle")
    running = [row for row in rows if _state(row) == "running"]
    running.sort(key=lambda row: row["requests_per_s"])
    shown = list(rows)
    if len(rows) > _MOST_REPLICAS:
        num_others = max(_MOST_NOT_RUNNING, _MOST_REPLICAS - len(running))
        shown = [*others[:num_others], *running][:_MOST_REPLICAS]
        shown.sort(key=lambda row: row["replica"])
    lines = _aligned([_COLUMNS, *map(_replica_cells, shown)])
    numbers = {row["replica"] for row in shown}
    if rest := [row for row in rows if row["replica"] not in numbers]:
        states = Counter(map(_state, rest))
        told = ", ".join(f"{num} {state}" for state, num in states.most_common())
        lines.append(f"and {len(rest)} more: {told}; --json has all")
    return lines


def _state(row: Mapping[str, Any]) -> str:
    """What the replica does; one that is not heard of may do anything."""
    is_silent = (row["look_age_s"] or 0.0) >= _SILENT_S
    return "silent" if is_silent else str(row["state"])


def _replica_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    state = _state(row)
    if state == "silent":
        state = f"silent for {duration(row['look_age_s'])}"
    usage = row["kv_cache_usage"]
    return (
        str(row["replica"]),
        str(row["worker"]),
        state,
        f"{row['requests_per_s']:,.0f}",
        f"{row['prompt_tokens_per_s']:,.0f}",
        f"{row['output_tokens_per_s']:,.0f}",
        f"{num_inside(row):,}",
        "" if usage is None else f"{usage:.0%}",
        str(row["restarts"]),
        row["host"] or "",
    )


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; the last column takes what is left of the width."""
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    lines = [
        "  ".join(
            f"{cell:{'<' if name in _LEFT else '>'}{width}}"
            for name, cell, width in zip(table[0], cells, widths, strict=True)
        )
        for cells in table
    ]
    return [line[:_WIDTH].rstrip() for line in lines]
