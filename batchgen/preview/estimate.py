"""What a plan reckons with: earlier runs, lengths, duplicates, time and cost.

All of it is arithmetic, but for `last_run`, which reads what earlier runs of the output measured.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from batchgen.core.errors import ConfigError, OutputError, StorageError
from batchgen.core.runtime import option
from batchgen.job.run_table import PRICE_FORM
from batchgen.store.books import STATE, Plan
from batchgen.store.ledger import Ledger
from batchgen.store.runs import figures_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from batchgen.pipeline.prepare import Prepared
    from batchgen.storage import LocalStorage


@dataclass(frozen=True, slots=True)
class PastRun:
    """A run that asked an engine for answers."""

    run_id: str
    started_at: str
    is_same_recipe: bool
    """False: the same model, asked something else."""
    device: str
    host: str
    max_model_len: int | None
    num_rows: int
    """That reached the engine; at least 1."""
    prompt_tokens: int
    output_tokens: int
    """Of all attempts."""
    working_s: float
    """Above 0; without the engine's start."""
    startup_s: float
    max_num_seqs: int | None = None


def last_run(storage: LocalStorage, prepared: Prepared) -> PastRun | None:
    """Find the newest run of an output with this recipe; failing that, with this model.

    Trials of `batchgen tune` count where no other run is: most are of slower settings, and short.
    Figures are for people: a file that is gone or torn counts as no run.
    """
    best: dict[tuple[bool, bool], PastRun] = {}
    for past, is_trial in _runs(storage, prepared):
        if past.is_same_recipe and not is_trial:
            return past
        best.setdefault((past.is_same_recipe, not is_trial), past)
    return best[max(best)] if best else None


def _runs(storage: LocalStorage, prepared: Prepared) -> Iterator[tuple[PastRun, bool]]:
    """Runs of this model, newest first, and whether each was a trial."""
    ledger = Ledger(storage)
    plans: dict[int, Plan | None] = {}
    for name in reversed(storage.list(f"{STATE}/epochs")):
        claim = figures_in(storage, name)
        number = claim.get("plan")
        if not isinstance(number, int):
            continue
        if number not in plans:
            plans[number] = None
            with suppress(OutputError, StorageError):
                plans[number] = ledger.plan(number)
        plan = plans[number]
        recipe = plan.job.get("recipe", {}) if plan is not None else {}
        if recipe.get("model") != prepared.recipe["model"]:
            continue
        is_same = plan is not None and plan.recipe_fingerprint == prepared.recipe_fingerprint
        summary = figures_in(storage, f"{STATE}/runs/{claim.get('run_id')}/summary.json")
        with suppress(KeyError, TypeError, ValueError):
            if (past := _past_run(summary, claim, is_same_recipe=is_same)) is not None:
                yield past, claim.get("is_trial") is True


def _past_run(
    summary: Mapping[str, Any], claim: Mapping[str, Any], *, is_same_recipe: bool
) -> PastRun | None:
    run, engine = summary["run"], summary["engine"]
    # Rows that ended before the engine cost it nothing; each other row has one first attempt.
    num_rows = sum(run["verdicts"].get("1", {}).values())
    # Where each was refused by the engine, as too long, nothing was measured.
    num_tokens = run["num_prompt_tokens"] + run["num_output_tokens"]
    if not num_rows or not num_tokens or not engine or run["working_s"] <= 0:
        return None
    return PastRun(
        run_id=str(summary["run_id"]),
        started_at=str(summary["started_at"]),
        is_same_recipe=is_same_recipe,
        device=str(engine["device"]),
        host=str(claim.get("host", "?")),
        max_model_len=engine["max_model_len"],
        num_rows=int(num_rows),
        prompt_tokens=int(run["num_prompt_tokens"]),
        output_tokens=int(run["num_output_tokens"]),
        working_s=float(run["working_s"]),
        startup_s=float(engine["startup_s"]),
        max_num_seqs=engine.get("max_num_seqs"),
    )


_MANY = 10
"""Equal rows in a sample, from which on their number in the whole is known well."""
_BAR_CHARS = 30


@dataclass(frozen=True, slots=True)
class Lengths:
    """Figures of how long some prompts are, in tokens."""

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


def lengths_of(lengths: Iterable[int]) -> Lengths | None:
    """Sum up lengths in tokens, each at least 1; None without any."""
    ordered = sorted(lengths)
    if not ordered:
        return None
    num, bits = len(ordered), Counter(length.bit_length() - 1 for length in ordered)
    return Lengths(
        num=num,
        total=sum(ordered),
        p50=ordered[math.ceil(0.5 * num) - 1],
        p95=ordered[math.ceil(0.95 * num) - 1],
        longest=ordered[-1],
        buckets=[(1 << k, (2 << k) - 1, bits[k]) for k in range(min(bits), max(bits) + 1)],
    )


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


RATE, PRICE = "--rate", "--gpu-cost"
SAME_LENGTH = 0.1
"""Prompts whose mean length differs by less than this share are as fast a row."""
_RATE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(rows?|tok|tokens?)?(?:/s)?")
_PRICE = re.compile(PRICE_FORM)


@dataclass(frozen=True, slots=True)
class Rate:
    """A speed, in rows or in tokens (of prompts and answers together)."""

    per_s: float
    unit: Literal["rows", "tokens"]
    source: str
    """Where it is from, for people."""


@dataclass(frozen=True, slots=True)
class Work:
    """The amount that a run would have to compute."""

    num_rows: int
    prompt_tokens: float | None
    """None where they are not counted."""
    max_output_tokens: float
    """If every answer were as long as it may be."""


@dataclass(frozen=True, slots=True)
class Price:
    """The price of one GPU for an hour."""

    per_hour: float
    currency: str = ""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Time, GPU-hours and money that a run would take."""

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
        names = ("is_upper_bound", "start_s", "work_s", "total_s", "num_gpus", "gpu_hours", "cost")
        return {
            "rate": asdict(self.rate),
            "expected_output_tokens": self.output_tokens,
            **{name: getattr(self, name) for name in names},
            "currency": self.price.currency if self.price is not None else None,
        }


def read_rate(text: str) -> Rate:
    """Read `--rate`: `250` and `250rows/s` are rows, `12000tokens/s` is tokens.

    Raises:
        ConfigError: It is none of these, or 0.
    """
    found = _RATE.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise ConfigError(
            option(RATE), [f"{text!r} is no rate, expected 250rows/s or 12000tokens/s"]
        )
    unit: Literal["rows", "tokens"] = "tokens" if (found[2] or "").startswith("tok") else "rows"
    return Rate(float(found[1]), unit, option(RATE))


def read_price(text: str) -> Price:
    """Read `--gpu-cost`: `2.5`, `2.5EUR`, `2.5 USD`.

    Raises:
        ConfigError: It is none of these.
    """
    found = _PRICE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(option(PRICE), [f"{text!r} is no price of a GPU-hour, expected 2.5EUR"])
    return Price(float(found[1]), (found[2] or "").upper())


def measured_rate(past: PastRun, work: Work) -> Rate:
    """Return the last run's rate: rows where prompts are as long as its were, else tokens."""
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
