"""The same verbs as the shell's, for Python."""

from __future__ import annotations

import math
from dataclasses import fields
from datetime import date, datetime
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from batchgen.core.errors import ConfigError
from batchgen.core.runtime import Caller, called
from batchgen.engine.devices import device_name
from batchgen.job.load import as_told, load_job, parse_job
from batchgen.job.tuned import use_tuned
from batchgen.storage import LocalStorage
from batchgen.store.books import STATE
from batchgen.store.ledger import Ledger
from batchgen.store.snapshot import find_snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    import polars as pl

    from batchgen.job.model import JobConfig
    from batchgen.pipeline.context import RunOptions, StopSwitch, Summary
    from batchgen.pipeline.job_run import JobRun
    from batchgen.preview.estimate import Price
    from batchgen.quality.compare import Comparison
    from batchgen.quality.try_out import Tried
    from batchgen.report.facts import ReportOptions


def run(  # noqa: PLR0913 - the options of `batchgen run`, by their names
    job: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    run_date: date | str | None = None,
    tuned: bool = True,
    fresh: bool = False,
    steal: bool = False,
    retry_errors: bool = False,
    publish_anyway: bool = False,
    accept_recipe: bool = False,
    only_errors: bool = False,
    rerender: bool = False,
    wait: bool = False,
    until: datetime | None = None,
    max_runtime_s: float | None = None,
) -> Summary:
    """Run a job to its published snapshot, or as far as it goes.

    Args:
        job: Path of a job file, or the same tables as a mapping (paths in it are then relative
            to the working directory).
        overrides: `table.key=value` each, as `--set` takes them; a single text is one of them.
        run_date: What `{date}` in paths stands for, a date or ISO text; None: today, here.
        tuned: Use what `batchgen tune` found for this job file, if it fits.
        fresh: Begin anew; what is published stays until the new snapshot is complete.
        steal: Take the job from a frozen run that holds it.
        retry_errors: Run only the error rows of a finished job again, and what is damaged in its
            output; the other rows are taken over.
        publish_anyway: Publish although a limit of `[gate]` is exceeded.
        accept_recipe: Relabel every row if the recipe has changed; what is published stays until
            then.
        only_errors: With accept_recipe: only error, edited and new rows.
        rerender: Run rows again whose prompt an earlier version made otherwise than this one.
        wait: Wait for a run that is at work on the job.
        until: Stop in time to have committed by then; with a time zone.
        max_runtime_s: Stop in time to have committed after that many seconds.

    Returns:
        How it ended; `state` is `complete`, `nothing_to_do` or `stopped`.

    Raises:
        BatchgenError: Job trouble, see `batchgen.core.errors`; `exit_code` is what the shell gives.
    """
    given = locals()  # The options of a run, by the names that they have in RunOptions.
    from batchgen.pipeline.context import RunOptions, StopSwitch

    _check_end(until, max_runtime_s)
    options = RunOptions(**{field.name: given[field.name] for field in fields(RunOptions)})
    with _called(job, overrides, run_date):
        config = load(job, overrides, run_date, tuned=tuned)
    with _called(job, overrides, run_date, config.output.path):
        return job_run(config, StopSwitch(), options).run()


def try_out(  # noqa: PLR0913 - the options of `batchgen try`, by their names
    job: str | Path | Mapping[str, Any],
    num_rows: int = 100,
    *,
    random: bool = False,
    seed: int = 0,
    where: str | None = None,
    errors: bool = False,
    overrides: Sequence[str] = (),
    run_date: date | str | None = None,
    tuned: bool = True,
) -> Tried:
    """Run some rows of a job, and see their answers beside the published ones.

    Touches nothing of the job, also where its recipe has changed. A run that follows takes the
    answers over if the recipe stays.

    Args:
        job: As `run` takes it.
        num_rows: So many rows, the first ones.
        random: Drawn at random instead, each with the same chance.
        seed: With random: another seed, other rows.
        where: Only rows for which this SQL expression is true.
        errors: Only rows that ended as errors last.
        overrides: As `run` takes them.
        run_date: As `run` takes it.
        tuned: Use what `batchgen tune` found for this job file, if it fits.

    Raises:
        BatchgenError: As of a run; where there are no error rows to try, ConfigError.
    """
    from batchgen.quality.try_out import TryOptions
    from batchgen.quality.try_out import try_out as run_sample

    options = TryOptions(num_rows, random, seed, where, errors)
    with _called(job, overrides, run_date):
        config = load(job, overrides, run_date, tuned=tuned)
    with _called(job, overrides, run_date, config.output.path):
        return run_sample(config, options)


def compare(
    a: str | Path | Mapping[str, Any],
    b: str | Path | Mapping[str, Any],
    *,
    on: Sequence[str] = (),
    num_examples: int = 5,
    to: str | Path | None = None,
) -> Comparison:
    """Compare the answers of two outputs: two models, two prompts, two nights.

    Args:
        a: A job or an output folder; a text may end with @N, for snapshot N instead of the newest.
        b: Another one.
        on: Columns whose values name a row; none: rows are paired by content and place.
        num_examples: At most so many rows that differ are shown in full.
        to: A new Parquet file for all rows that differ, with both answers.

    Raises:
        OutputError: There are no such snapshots, or they cannot be read.
        ConfigError: No output, columns that do not name rows, or there is such a file.
    """
    from batchgen.quality.compare import compare as compare_outputs

    (first, one), (second, two) = _snapshot_of(a), _snapshot_of(b)
    columns, path = ([on] if isinstance(on, str) else on), (Path(to) if to is not None else None)
    roots = output_of(first), output_of(second)
    return compare_outputs(*roots, (one, two), on=columns, num_examples=num_examples, to=path)


def _snapshot_of(
    source: str | Path | Mapping[str, Any],
) -> tuple[str | Path | Mapping[str, Any], int | None]:
    """Split `JOB@N`; what exists as it is written has no number."""
    if not isinstance(source, str) or Path(source).exists():
        return source, None
    name, _, number = source.rpartition("@")
    return (name, int(number)) if name and number.isdecimal() else (source, None)


def _called(
    job: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    run_date: date | str | None = None,
    folder: str = "JOB",
) -> AbstractContextManager[None]:
    """Have hints speak of a job that Python gave, of a mapping by its output folder."""
    texts, day = as_told(_texts(overrides)), _day(run_date)
    told = day.isoformat() if day else None
    if isinstance(job, str | Path):
        return called(Caller(str(job), Path(job).is_dir(), texts, told, repr(str(job))))
    return called(Caller(folder, is_folder=True, overrides=texts, run_date=told, python_job="job"))


def job_run(job: JobConfig, stop: StopSwitch, options: RunOptions) -> JobRun:
    """Bind a run to what its job asks for: one engine here, or a cluster.

    Raises:
        ConfigError: The options do not go together, or replicas that cannot be had.
    """
    from batchgen.pipeline.job_run import JobRun

    if not job.run.is_cluster:
        this = JobRun(job, stop=stop, options=options)
    else:
        from batchgen.cluster.driver import ManyEngines

        this = JobRun(job, stop=stop, options=options, compute=ManyEngines)
    this.at_end = partial(_look_back, job)
    return this


def _look_back(job: JobConfig, summary: Summary) -> None:
    """Add what people look at once a run has ended: trouble with it is not the run's."""
    try:
        _add_examples(job, summary)
    except Exception as error:  # noqa: BLE001 - of whatever library: the run is over
        summary.warnings.append(f"the run's report could not be written: {error!r:.200}")


def _add_examples(job: JobConfig, summary: Summary) -> None:
    from batchgen.report.page import write_report
    from batchgen.views.rows import error_lines

    root = Path(summary.output)
    if summary.num_errors:
        summary.error_examples.extend(error_lines(root))
    if summary.summary_path is not None and job.run.report != "none":
        options = report_options(job, None, with_rows=job.run.report == "full")
        write_report(root, options, run_id=summary.run_id)


def report_options(job: JobConfig | None, price: Price | None, *, with_rows: bool) -> ReportOptions:
    """Say what a report tells; without the job no price is known but a given one."""
    from batchgen.engine.vllm.settings import engine_gpus
    from batchgen.preview.estimate import read_price
    from batchgen.report.facts import ReportOptions

    if price is None and job is not None and job.run.gpu_cost is not None:
        price = read_price(job.run.gpu_cost)
    if price is None or (job is not None and job.run.replicas == "auto"):
        return ReportOptions(with_rows)
    num_gpus = engine_gpus(job) * int(job.run.replicas) if job is not None else 1
    return ReportOptions(with_rows, (price.per_hour * num_gpus, price.currency))


def report(
    job: str | Path | Mapping[str, Any],
    *,
    output: str | Path | None = None,
    rows: bool = True,
    price: Price | None = None,
    overrides: Sequence[str] = (),
    run_date: date | str | None = None,
) -> str:
    """Write the report of a job's newest run, and return its path.

    Args:
        job: A job (file or mapping), or its output folder.
        output: The report's file; None: `report.html` in the run's folder.
        rows: Whether texts of rows may be in it.
        price: Of a GPU for an hour; None: `run.gpu_cost`.
        overrides: As `run` takes them.
        run_date: As `run` takes it.

    Raises:
        BatchgenError: No run has been here, or the file cannot be written.
    """
    from batchgen.report.page import write_report

    with _called(job, overrides, run_date):
        root = output_of(job, overrides, run_date)
        is_folder = isinstance(job, str | Path) and Path(job).is_dir()
        config = None if is_folder else load(job, overrides, run_date, tuned=False)
        options = report_options(config, price, with_rows=rows)
        return write_report(root, options, Path(output) if output is not None else None)


def read(source: str | Path | Mapping[str, Any], snapshot: int | None = None) -> pl.LazyFrame:
    """Read a published snapshot, in input order.

    Reads exactly the files that its manifest names, so that a snapshot being published right now
    is never seen half.

    Args:
        source: A job (file or mapping), or its output folder.
        snapshot: Its number, as `batchgen snapshots` lists them; None: the newest.

    Raises:
        OutputError: Nothing is published there, or not that snapshot.
    """
    from batchgen.store.result_files import scan

    with _called(source):
        storage = LocalStorage(output_of(source))
        manifest = find_snapshot(Ledger(storage), snapshot)
        return scan(storage, [file.name for file in manifest.files])


def load(
    job: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    run_date: date | str | None = None,
    *,
    tuned: bool = True,
) -> JobConfig:
    """Load and check a job file, or the same tables as a mapping.

    Args:
        job: Path of a job file, or the same tables as a mapping.
        overrides: `table.key=value` each, as `--set` takes them; a single text is one of them.
        run_date: What `{date}` in paths stands for, a date or ISO text; None: today, here.
        tuned: Add what `batchgen tune` found for this job file, if it fits.

    Raises:
        ConfigError: With every problem found.
    """
    texts, day = _texts(overrides), _day(run_date)
    if isinstance(job, str | Path):
        config = load_job(Path(job), texts, day)
        return use_tuned(config, Path(job), device_name) if tuned else config
    return parse_job(job, base=Path.cwd(), where="job", overrides=texts, run_date=day)


def _texts(overrides: Sequence[str]) -> Sequence[str]:
    """List the overrides; a single text, which Python takes for letters, is one of them."""
    texts = (overrides,) if isinstance(overrides, str) else tuple(overrides)
    for text in texts:
        if not isinstance(text, str):
            _refuse("overrides", text, "texts such as 'run.flush_s=10'")
    return texts


def _day(run_date: date | str | None) -> date | None:
    if isinstance(run_date, datetime):  # A date too, by its class, but written with its hours.
        return run_date.date()
    if run_date is None or isinstance(run_date, date):
        return run_date
    try:
        return date.fromisoformat(run_date)
    except (TypeError, ValueError):
        _refuse("run_date", run_date, "a date, or a text such as '2026-01-31'")


def _check_end(until: datetime | None, max_runtime_s: float | None) -> None:
    """Refuse an end that could not be held to; what the shell takes is read there."""
    if until is not None and not isinstance(until, datetime):
        expected = "a datetime with a time zone, such as datetime.now(UTC) + timedelta(hours=5)"
        _refuse("until", until, expected)
    if until is not None and until.utcoffset() is None:
        _refuse("until", until, "a time with a zone, such as until.astimezone()")
    if max_runtime_s is None:
        return
    is_number = isinstance(max_runtime_s, Real) and not isinstance(max_runtime_s, bool)
    if not is_number or not math.isfinite(max_runtime_s) or max_runtime_s <= 0:
        _refuse("max_runtime_s", max_runtime_s, "seconds, more than 0, such as 5 * 3600")


def _refuse(name: str, given: object, expected: str) -> NoReturn:
    raise ConfigError(name, [f"{given!r:.60} is wrong, expected: {expected}"])


def output_of(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    run_date: date | str | None = None,
) -> Path:
    """Find the output folder that a job file, a mapping or a folder stands for.

    Raises:
        ConfigError: It is no folder of batchgen's and no job either.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if (path / STATE).is_dir():
            return path
        if path.is_dir() or not path.exists():
            wrong = (
                f"holds no batchgen job (no {STATE}/ in it)" if path.is_dir() else "does not exist"
            )
            raise ConfigError(str(path), [f"{wrong}, expected a job file or an output folder"])
    return Path(load(source, overrides, run_date, tuned=False).output.path)
