"""The gate: figures of a complete job against the limits of `[gate]`. Pure.

Everything comes from the parts' footers; no row is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import fsum
from typing import TYPE_CHECKING, Any

from batchgen.store.tally import ATTEMPTS, VERDICT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.job.answers import GateConfig

_NUM_MOVED = 3
_SHRINK_TO_NOTHING = 0.999
"""Holds without `max_shrink` where no row is left: a filter that matches nothing, an empty file."""
_MEND_LIMIT = (
    f"where no row at all is left, gate.max_shrink is {_SHRINK_TO_NOTHING} unless it is set: look "
    "at input.path and input.where"
)
_MEND_INPUT = (
    "no error row has reached the engine: mend the input (`batchgen show JOB --errors` shows them) "
    "and run again"
)


@dataclass(frozen=True, slots=True)
class Limit:
    """One figure, and whether it is over its limit."""

    name: str
    """The key in `[gate]`."""
    figure: float | None
    """0 to 1; None: there is nothing to compare with."""
    limit: float | None
    """None: none is set."""
    text: str
    """The figure in words."""
    column: str | None = None
    """Whose labels, for drift."""
    hint: str | None = None
    """What to do where it is exceeded, if that is not what helps with most."""

    @property
    def is_exceeded(self) -> bool:
        """Whether it holds the job back."""
        return self.limit is not None and self.figure is not None and self.figure > self.limit

    def as_dict(self, *, is_overridden: bool = False) -> dict[str, Any]:
        """Plain values, for JSON; `overridden` if it was exceeded and let through."""
        told = {"column": self.column, "hint": self.hint if self.is_exceeded else None}
        return {
            "name": self.name,
            "figure": self.figure,
            "limit": self.limit,
            "text": self.text,
            **{name: value for name, value in told.items() if value is not None},
            "exceeded": self.is_exceeded,
            **({"overridden": True} if is_overridden and self.is_exceeded else {}),
        }


def judge_gate(
    gate: GateConfig,
    counts: tuple[int, int],
    tally: Mapping[str, Mapping[str, int]],
    last: Mapping[str, Mapping[str, int]] | None,
    num_last: int | None = None,
) -> list[Limit]:
    """Return every figure of the gate, whether a limit is set for it or not.

    Args:
        gate: The limits.
        counts: Results that are ok, and that are errors.
        tally: Of all results, see `sink.tally`.
        last: The same of the last published snapshot of an earlier plan, None if there is none.
        num_last: How many results that snapshot has, ok and errors.
    """
    num_ok, num_errors = counts
    num_results = num_ok + num_errors
    attempts = tally.get(ATTEMPTS, {})
    num_truncated = tally.get(VERDICT, {}).get("truncated", 0)
    num_retried = sum(n for times, n in attempts.items() if int(times) > 1)
    errors = _rate("max_error_rate", gate.max_error_rate, num_errors, num_results, "are errors")
    limits = [
        # Rows without any attempt are errors: unreadable, or without a prompt.
        replace(errors, hint=_MEND_INPUT) if 0 < num_errors == attempts.get("0") else errors,
        _rate(
            "max_truncated_rate",
            gate.max_truncated_rate,
            num_truncated,
            num_results,
            "are cut off at max_tokens",
        ),
        _rate(
            "max_retry_rate",
            gate.max_retry_rate,
            num_retried,
            num_results,
            "needed more than one attempt",
        ),
    ]
    columns = [name for name in tally if name not in (VERDICT, ATTEMPTS)]
    for column in columns if gate.drift_column is None else [gate.drift_column]:
        before = None if last is None else last.get(column)
        limits.append(_drift(column, gate.max_drift, tally.get(column, {}), before))
    if num_last is not None or gate.max_shrink is not None:
        limits.append(_shrink(gate.max_shrink, num_results, num_last))
    return limits


def _rate(name: str, limit: float | None, count: int, num_results: int, what: str) -> Limit:
    figure = count / num_results if num_results else 0.0
    return Limit(name, figure, limit, f"{count:,} of {num_results:,} rows {what}")


def _shrink(limit: float | None, num_now: int, num_last: int | None) -> Limit:
    """By how much fewer the rows are; files that went missing show here and nowhere else."""
    if num_last is None:
        return Limit("max_shrink", None, limit, "there is no last snapshot to compare with")
    hint = None
    if limit is None and not num_now:
        limit, hint = _SHRINK_TO_NOTHING, _MEND_LIMIT
    num_gone = max(num_last - num_now, 0)
    text = f"{num_now:,} rows are {num_gone:,} fewer than the {num_last:,} of the last snapshot"
    return Limit("max_shrink", num_gone / num_last if num_last else 0.0, limit, text, hint=hint)


def _drift(
    column: str, limit: float | None, now: Mapping[str, int], last: Mapping[str, int] | None
) -> Limit:
    figure = None if last is None else total_variation(now, last)
    if figure is None or last is None:
        text = f"{column} has no labels, or had none in the last snapshot, to compare"
        return Limit("max_drift", None, limit, text, column)
    moved = ", ".join(_most_moved(now, last))
    text = f"{column} has drifted by {figure:.3g} from the last snapshot" + (
        f" ({moved})" if moved else ""
    )
    return Limit("max_drift", figure, limit, text, column)


def total_variation(now: Mapping[str, int], last: Mapping[str, int]) -> float | None:
    """Half the sum of the differences between two sets of shares: 0 alike, 1 nothing in common.

    None if one of them counts nothing.
    """
    p, q = _shares(now), _shares(last)
    if not p or not q:
        return None
    return 0.5 * fsum(abs(p.get(name, 0.0) - q.get(name, 0.0)) for name in p.keys() | q.keys())


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()} if total else {}


def _most_moved(now: Mapping[str, int], last: Mapping[str, int]) -> Sequence[str]:
    """The labels whose shares differ most, as `refund 12.0 % -> 31.5 %`."""
    p, q = _shares(now), _shares(last)
    moves = {name: abs(p.get(name, 0.0) - q.get(name, 0.0)) for name in p.keys() | q.keys()}
    ordered = sorted(
        (name for name in moves if moves[name]), key=lambda n: (-round(moves[n], 9), n)
    )
    return [
        f"{name} {q.get(name, 0.0):.1%} -> {p.get(name, 0.0):.1%}".replace("%", " %")
        for name in ordered[:_NUM_MOVED]
    ]


def told(limits: Sequence[Limit]) -> str:
    """The exceeded ones in one sentence; empty if there are none."""
    return "; ".join(
        f"{limit.text}, over gate.{limit.name} = {limit.limit:g}"
        for limit in limits
        if limit.is_exceeded
    )
