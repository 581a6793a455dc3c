"""`foresee`: a job file to its forecast. Everything here only reads; the output is not touched."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from batchgen.answers.json_schema import row_validator
from batchgen.core.errors import BatchgenError, OutputError
from batchgen.engine.vllm.settings import gpus_of
from batchgen.job.seeds import Seeds
from batchgen.pipeline.decide import refuse_foreign
from batchgen.pipeline.interface import RunOptions
from batchgen.pipeline.job_run import tuned_notes
from batchgen.preview import cost
from batchgen.preview.figures import BLOCK_TOKENS
from batchgen.preview.outlook import Outlook, look_ahead
from batchgen.preview.past import last_run
from batchgen.preview.report import Forecast
from batchgen.preview.survey import SAMPLE_ROWS, How, survey
from batchgen.preview.tokens import load_tokenize, max_model_len
from batchgen.prompt.requests import RequestBuilder
from batchgen.storage import LocalStorage
from batchgen.store.runs import RunLock

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from batchgen.core.records import EngineSpec
    from batchgen.job.model import JobConfig
    from batchgen.preview.past import PastRun
    from batchgen.preview.survey import Survey


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The options of `batchgen plan`."""

    run: RunOptions = field(default_factory=RunOptions)
    """Of the run that is foreseen."""
    is_exact: bool = False
    """Look at every row that is to do."""
    rate: cost.Rate | None = None
    """None: the last run's."""
    price: cost.Price | None = None
    sample_rows: int = SAMPLE_ROWS


def foresee(load: Callable[[], JobConfig], options: PlanOptions) -> Forecast:
    """Say what a run would do.

    Args:
        load: Loads the job; what it raises is a refusal like any other.
        options: What to look at.

    Returns:
        Also where a run would refuse to start: `state` is then `refused`, and `exit_code` its.
    """
    warnings: list[str] = []
    try:
        return _foresee(load(), options, warnings)
    except BatchgenError as error:
        code = int(error.exit_code)
        return Forecast("refused", code, str(error), warnings=warnings)


def _foresee(job: JobConfig, options: PlanOptions, warnings: list[str]) -> Forecast:
    options.run.check()
    warnings += tuned_notes(job)
    root = Path(job.output.path)
    refuse_foreign(root)
    refuse_unwritable(root)
    storage = LocalStorage(root)
    warnings += _who_holds(storage)
    ahead = look_ahead(job, storage, options.run)
    warnings += ahead.warnings
    spec = ahead.prepared.engine_spec(None)
    past = last_run(storage, ahead.prepared)
    max_len, source = max_model_len(spec, past)
    found = _survey(ahead, spec, options, max_len) if ahead.todo else None
    return Forecast(
        state="nothing_to_do" if ahead.nothing_to_do else "ready",
        reason=ahead.nothing_to_do,
        output=job.output.path,
        plan_number=ahead.plan.number,
        is_continued=ahead.is_continued,
        rows=ahead.rows,
        survey=found,
        block_tokens=_block_tokens(spec),
        max_model_len=max_len,
        max_model_len_source=source,
        past=past,
        estimate=_estimate(found, spec, past, options) if found is not None else None,
        warnings=warnings,
    )


def _survey(ahead: Outlook, spec: EngineSpec, options: PlanOptions, max_len: int | None) -> Survey:
    prepared, sampling = ahead.prepared, ahead.prepared.job.sampling
    builder = RequestBuilder(
        prepared.builder,
        prepared.job,
        ahead.plan.recipe_fingerprint,
        seeds=Seeds(sampling, ahead.plan.seed_generation),
        ids=itertools.count(),
        check_schema=row_validator,
    )
    how = How(
        max_tokens=sampling.max_tokens,
        n=sampling.n,
        max_model_len=max_len,
        known=ahead.known,
        dedupe=prepared.job.run.dedupe,
        is_exact=options.is_exact,
        sample_rows=options.sample_rows,
        block_tokens=_block_tokens(spec),
    )
    return survey(ahead.plan, ahead.todo, prepared, builder, load_tokenize(spec), how)


def _estimate(
    found: Survey, spec: EngineSpec, past: PastRun | None, options: PlanOptions
) -> cost.Estimate | None:
    work = cost.Work(found.num_to_compute, found.prompt_tokens, found.max_output_tokens)
    is_cpu = spec.backend == "echo" or (past is not None and past.device == "cpu")
    num_gpus = gpus_of(spec.model_kwargs, is_cpu=is_cpu)
    return cost.estimate(work, options.rate, past, num_gpus, options.price)


def _block_tokens(spec: EngineSpec) -> int:
    given: Any = spec.model_kwargs.get("block_size")
    return given if isinstance(given, int) and given > 0 else BLOCK_TOKENS


def _who_holds(storage: LocalStorage) -> list[str]:
    """Another run that is at work: a run would exit 75, a plan can be made all the same."""
    lock = RunLock(storage)
    if not lock.is_held():
        return []
    holder = lock.holder() or {}
    return [
        f"run {holder.get('run_id')} (process {holder.get('pid')} on {holder.get('host')}, since "
        f"{holder.get('since')}) is at work on this job: a run would exit 75 now, and what is "
        "told here changes while it works"
    ]


def refuse_unwritable(root: Path) -> None:
    """Refuse an output that could not be made or written to.

    Raises:
        OutputError: The folder, or the first one above it that exists, cannot be written to.
    """
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        msg = f"{there}: cannot be written to; mend its rights, or choose another output.path"
        raise OutputError(msg)
