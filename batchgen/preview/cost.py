"""Time, GPU-hours and money of a run, from a measured or a given rate. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from batchgen.core.errors import ConfigError

if TYPE_CHECKING:
    from batchgen.preview.past import PastRun

RATE, PRICE = "--rate", "--gpu-cost"
SAME_LENGTH = 0.1
"""Prompts whose mean length differs by less than this share are as fast a row."""
_RATE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(rows?|tok|tokens?)?(?:/s)?")
_PRICE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]{3}|[$\u20ac\u00a3])?")


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast rows come, or tokens (of prompts and answers together)."""

    per_s: float
    unit: Literal["rows", "tokens"]
    source: str
    """Where it is from, for people."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a run would have to compute."""

    num_rows: int
    prompt_tokens: float | None
    """None where they are not counted."""
    max_output_tokens: float
    """If every answer were as long as it may be."""


@dataclass(frozen=True, slots=True)
class Price:
    """Of one GPU for an hour."""

    per_hour: float
    currency: str = ""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What it would take."""

    rate: Rate
    output_tokens: float | None
    """Expected, from the last run's mean; None if there was none."""
    is_upper_bound: bool
    """The time holds for the longest answers, since nothing is known of them."""
    start_s: float
    """Of the engine; 0 where unknown."""
    work_s: float
    num_gpus: int
    price: Price | None = None

    @property
    def total_s(self) -> float:
        """Engine start and work."""
        return self.start_s + self.work_s

    @property
    def gpu_hours(self) -> float:
        """GPUs are held from the engine's start on."""
        return self.num_gpus * self.total_s / 3600

    @property
    def cost(self) -> float | None:
        """In the price's currency."""
        return self.price.per_hour * self.gpu_hours if self.price is not None else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "rate": {name: getattr(self.rate, name) for name in self.rate.__slots__},
            "expected_output_tokens": self.output_tokens,
            "is_upper_bound": self.is_upper_bound,
            "start_s": self.start_s,
            "work_s": self.work_s,
            "total_s": self.total_s,
            "num_gpus": self.num_gpus,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "currency": self.price.currency if self.price is not None else None,
        }


def read_rate(text: str) -> Rate:
    """Read `--rate`: `250` and `250rows/s` are rows, `12000tokens/s` is tokens.

    Raises:
        ConfigError: It is none of these, or 0.
    """
    found = _RATE.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise ConfigError(RATE, [f"{text!r} is no rate, expected 250rows/s or 12000tokens/s"])
    unit: Literal["rows", "tokens"] = "tokens" if (found[2] or "").startswith("tok") else "rows"
    return Rate(float(found[1]), unit, RATE)


def read_price(text: str) -> Price:
    """Read `--gpu-cost`: `2.5`, `2.5EUR`, `2.5 USD`.

    Raises:
        ConfigError: It is none of these.
    """
    found = _PRICE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(PRICE, [f"{text!r} is no price of a GPU-hour, expected 2.5EUR"])
    return Price(float(found[1]), (found[2] or "").upper())


def measured_rate(past: PastRun, work: Work) -> Rate:
    """The last run's rate: rows where prompts are as long as its were, else tokens."""
    before = past.prompt_tokens / past.num_rows
    mean = work.prompt_tokens / work.num_rows if work.prompt_tokens and work.num_rows else before
    which = "" if past.is_same_recipe else ", of another recipe"
    source = f"run {past.run_id} on {past.device}{which}"
    if abs(mean - before) <= SAME_LENGTH * before:
        return Rate(past.num_rows / past.working_s, "rows", source)
    tokens = past.prompt_tokens + past.output_tokens
    source += f"; by tokens, its prompts had {before:,.0f} in the mean"
    return Rate(tokens / past.working_s, "tokens", source)


def estimate(
    work: Work, rate: Rate | None, past: PastRun | None, num_gpus: int, price: Price | None
) -> Estimate | None:
    """Work out time and cost.

    Args:
        work: What there is to compute.
        rate: As given; None: the last run's.
        past: The last run, if any.
        num_gpus: That the engine holds.
        price: Of a GPU-hour, if it is known.

    Returns:
        None if there is no rate to go by.
    """
    if rate is None:
        if past is None:
            return None
        rate = measured_rate(past, work)
    output_tokens = None
    if past is not None:
        output_tokens = min(
            work.num_rows * past.output_tokens / past.num_rows, work.max_output_tokens
        )
    amount: float = work.num_rows
    if rate.unit == "tokens":
        answers = work.max_output_tokens if output_tokens is None else output_tokens
        if work.prompt_tokens is None:
            return None
        amount = work.prompt_tokens + answers
    return Estimate(
        rate=rate,
        output_tokens=output_tokens,
        is_upper_bound=rate.unit == "tokens" and output_tokens is None,
        start_s=past.startup_s if past is not None and work.num_rows else 0.0,
        work_s=amount / rate.per_s,
        num_gpus=num_gpus,
        price=price,
    )
