"""What earlier runs of an output measured: how fast rows came, how long answers were."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import OutputError
from batchgen.store.books import STATE
from batchgen.store.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from batchgen.pipeline.prepare import Prepared
    from batchgen.storage import LocalStorage
    from batchgen.store.books import Plan


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

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def last_run(storage: LocalStorage, prepared: Prepared) -> PastRun | None:
    """The newest run of an output with this recipe; failing that, with this model.

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
        claim = _read(storage, name)
        number = claim.get("plan")
        if not isinstance(number, int):
            continue
        if number not in plans:
            plans[number] = None
            with suppress(OutputError):
                plans[number] = ledger.plan(number)
        plan = plans[number]
        recipe = plan.job.get("recipe", {}) if plan is not None else {}
        if recipe.get("model") != prepared.recipe["model"]:
            continue
        is_same = plan is not None and plan.recipe_fingerprint == prepared.recipe_fingerprint
        summary = _read(storage, f"{STATE}/runs/{claim.get('run_id')}/summary.json")
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
    )


def _read(storage: LocalStorage, name: str) -> dict[str, Any]:
    with suppress(OutputError, ValueError, TypeError):
        return dict(json.loads(storage.read(name) or b"{}"))
    return {}
