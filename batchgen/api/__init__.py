"""The same verbs as the shell's, for Python and notebooks.

Results are shown as the shell prints them. Errors that batchgen raises on purpose come without the
frames of its inside: their text says all. Ctrl-C, or a notebook's Stop, drains a run as in the
shell, and is a KeyboardInterrupt then.
"""

from __future__ import annotations

import functools
import signal
import threading
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from batchgen.api.endings import deliver, look_back, report_options
from batchgen.api.jobs import (
    BESIDE,
    TABLE,
    check_end,
    day_of,
    is_output,
    load,
    loaded,
    output_of,
    scored,
    snapshot_of,
    texts_of,
)
from batchgen.core.errors import AccountingError, BatchgenError, ExitCode, StoppedError
from batchgen.core.runtime import Caller, called, stop_on_signals
from batchgen.job.load import as_told
from batchgen.storage.remote import storage_at
from batchgen.store.ledger import Ledger
from batchgen.store.snapshot import find_snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime

    import polars as pl

    from batchgen.api.jobs import AnyJob, Day, Overrides
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.context import RunOptions, StopSwitch, Summary
    from batchgen.pipeline.job_run import JobRun
    from batchgen.pipeline.rollback import RolledBack
    from batchgen.preview.check import Checked
    from batchgen.preview.model_check import Report
    from batchgen.preview.plan import Forecast
    from batchgen.quality.compare import Comparison
    from batchgen.quality.score import Score
    from batchgen.quality.try_out import Tried
    from batchgen.views.rows import Rows, Status

P = ParamSpec("P")
R = TypeVar("R")


def _plainly(function: Callable[P, R]) -> Callable[P, R]:
    """Raise what is raised on purpose without its frames and causes; a bug comes whole."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True  # For IPython.
        try:
            return function(*args, **kwargs)
        except AccountingError:
            raise
        except (BatchgenError, KeyboardInterrupt) as error:
            told: BaseException = error
        told.__cause__ = told.__context__ = None
        raise told.with_traceback(None)

    return call


@_plainly
def run(  # noqa: PLR0913 - the options of `batchgen run`, by their names
    job: AnyJob,
    *,
    overrides: Overrides = (),
    run_date: Day = None,
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
            to the working directory). Its `input.path` may be a table of polars, pandas or Arrow:
            that is written beside the output, as `OUTPUT.input.parquet`, if it has changed.
        overrides: A mapping such as `{"sampling.max_tokens": 8}`, or texts as `--set` takes them;
            a value, which may be a table as well, replaces that of the job.
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
        KeyboardInterrupt: It was interrupted; what was in flight has had `run.grace_s` to end.
    """
    given = locals()  # The options of a run, by the names that they have in RunOptions.
    from batchgen.pipeline.context import RunOptions, StopSwitch

    check_end(until, max_runtime_s)
    options = RunOptions(**{field.name: given[field.name] for field in fields(RunOptions)})
    with _called(job, overrides, run_date):
        config = load(job, overrides, run_date, tuned=tuned)
    with _called(job, overrides, run_date, config.output.path):
        stop = StopSwitch()
        summary = _to_end(job_run(config, stop, options).run, stop, config.run.grace_s)
        deliver(config)
        return summary


def _to_end(work: Callable[[], R], stop: StopSwitch, grace_s: float) -> R:
    """Run something that drains when it is interrupted, and raise the interrupt then.

    Only in the main thread, and where nobody else handles interrupts: else they are left alone.
    """
    from batchgen.pipeline.context import ask_to_stop

    ask, asked = ask_to_stop(stop, grace_s), list[bool]()

    def interrupted() -> str:
        asked.append(True)
        return ask()

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        return work()
    stop_on_signals(interrupted, is_shell=False)
    try:
        found = work()
    except StoppedError as error:
        if not asked:
            raise
        raise KeyboardInterrupt(str(error)) from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked and getattr(found, "exit_code", 0) == ExitCode.STOPPED:
        msg = f"\n{found}"
        raise KeyboardInterrupt(msg)
    return found


@_plainly
def try_out(  # noqa: PLR0913 - the options of `batchgen try`, by their names
    job: AnyJob,
    num_rows: int = 100,
    *,
    random: bool = False,
    seed: int = 0,
    where: str | None = None,
    errors: bool = False,
    overrides: Overrides = (),
    run_date: Day = None,
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
    from batchgen.pipeline.context import StopSwitch
    from batchgen.quality.try_out import TryOptions
    from batchgen.quality.try_out import try_out as run_sample

    options = TryOptions(num_rows, random, seed, where, errors)
    with _called(job, overrides, run_date):
        config = load(job, overrides, run_date, tuned=tuned)
    with _called(job, overrides, run_date, config.output.path):
        stop = StopSwitch()
        sample = functools.partial(run_sample, config, options, stop)
        return _to_end(sample, stop, config.run.grace_s)


@_plainly
def compare(
    a: AnyJob,
    b: AnyJob,
    *,
    on: Sequence[str] = (),
    num_examples: int = 5,
    to: str | Path | None = None,
    gpu_cost: str | None = None,
) -> Comparison:
    """Compare the answers of two outputs: two models, two prompts, two nights.

    Args:
        a: A job or an output folder; a text may end with @N, for snapshot N instead of the newest.
        b: Another one.
        on: Columns whose values name a row; none: rows are paired by content and place.
        num_examples: At most so many rows that differ are shown in full.
        to: A new Parquet file for all rows that differ, with both answers.
        gpu_cost: Price for an hour of the GPUs that a run had, such as `2.5EUR`: tells costs.

    Raises:
        OutputError: There are no such snapshots, or they cannot be read.
        ConfigError: No output, no price, columns that do not name rows, or there is such a file.
    """
    from batchgen.preview.estimate import read_price
    from batchgen.quality.compare import compare as compare_outputs

    (first, one), (second, two) = snapshot_of(a), snapshot_of(b)
    columns, path = ([on] if isinstance(on, str) else on), (Path(to) if to is not None else None)
    with _called(first):
        roots = output_of(first), output_of(second)
        price = read_price(str(gpu_cost)) if gpu_cost is not None else None
        asked = functools.partial(compare_outputs, on=columns, num_examples=num_examples, to=path)
        return asked(*roots, (one, two)).priced(price)


@_plainly
def score(  # noqa: PLR0913 - the options of `batchgen score`, by their names
    job: AnyJob,
    *,
    gold: str | None = None,
    gold_path: str | Path | None = None,
    on: str | None = None,
    answer: str | None = None,
    precision: float | None = None,
    snapshot: int | None = None,
    overrides: Overrides = (),
    run_date: Day = None,
) -> Score:
    """Score published labels against right ones; needs scikit-learn, the extra `score`.

    Args:
        job: A job, or an output folder.
        gold: Column with the right label; None: `score.gold` of the job.
        gold_path: CSV, JSONL or Parquet file that has it; None: `score.gold_path`, or the output.
        on: Column that names a row in that file and in the output; None: `score.on`.
        answer: Labels to score, by their column; None: `score.answer`, or the only ones.
        precision: Tell from which probability on answers are so precise; None: `score.precision`.
        snapshot: Number of an old snapshot; None: the newest.
        overrides: As `run` takes them.
        run_date: As `run` takes it.

    Raises:
        ConfigError: scikit-learn is not installed, or a column is none that can be scored.
        OutputError: There is no such snapshot, or it cannot be read.
    """
    path = None if gold_path is None else str(gold_path)
    given = {"gold": gold, "gold_path": path, "on": on, "answer": answer, "precision": precision}
    with _called(job, overrides, run_date):
        config = None if is_output(job) else load(job, overrides, run_date, tuned=False)
        root = output_of(job) if config is None else config.root
        return scored(root, config.score if config else None, given, snapshot)


@_plainly
def check(
    job: AnyJob, num_rows: int = 3, *, overrides: Overrides = (), run_date: Day = None
) -> Checked:
    """Check a job and render its first prompts; loads no model.

    Args:
        job: As `run` takes it.
        num_rows: So many rows are rendered.
        overrides: As `run` takes them.
        run_date: As `run` takes it.

    Returns:
        What the job reads, asks and answers; `exit_code` is 2 where no row shown has a prompt.

    Raises:
        BatchgenError: A run would refuse to start.
    """
    from batchgen.preview.check import check_job

    with _called(job, overrides, run_date):
        return check_job(load(job, overrides, run_date), num_rows)


@_plainly
def plan(  # noqa: PLR0913 - the options of `batchgen plan`, by their names
    job: AnyJob,
    *,
    exact: bool = False,
    rate: str | None = None,
    gpu_cost: str | None = None,
    fresh: bool = False,
    retry_errors: bool = False,
    accept_recipe: bool = False,
    only_errors: bool = False,
    rerender: bool = False,
    overrides: Overrides = (),
    run_date: Day = None,
) -> Forecast:
    """Tell what a run would do: rows, tokens, time, cost. Touches nothing and needs no GPU.

    Args:
        job: As `run` takes it.
        exact: Look at every row that is to do, not at a sample.
        rate: How fast it will go: `250rows/s` or `12000tokens/s`; None: as the last run.
        gpu_cost: Price of a GPU for an hour, for example `2.5EUR`.
        fresh: Of a run with fresh=True; the other options of a run likewise.
        retry_errors: See `run`.
        accept_recipe: See `run`.
        only_errors: See `run`.
        rerender: See `run`.
        overrides: As `run` takes them.
        run_date: As `run` takes it.

    Returns:
        The forecast; `state` is `refused`, with a `reason`, where a run would refuse to start.

    Raises:
        ConfigError: The job, the rate or the price is none.
    """
    from batchgen.pipeline.context import RunOptions
    from batchgen.preview.estimate import read_price, read_rate
    from batchgen.preview.plan import PlanOptions, foresee
    from batchgen.preview.sample import SAMPLE_ROWS

    with _called(job, overrides, run_date):
        options = PlanOptions(
            RunOptions(
                fresh=fresh,
                retry_errors=retry_errors,
                accept_recipe=accept_recipe,
                only_errors=only_errors,
                rerender=rerender,
            ),
            sample_rows=None if exact else SAMPLE_ROWS,
            rate=read_rate(rate) if rate is not None else None,
            price=read_price(str(gpu_cost)) if gpu_cost is not None else None,
        )
        config = load(job, overrides, run_date)
        return foresee(lambda: config, options)


@_plainly
def doctor(  # noqa: PLR0913 - the options of `batchgen doctor`, by their names
    job: AnyJob,
    *,
    gpu: str | None = None,
    memory: str | None = None,
    capability: str | None = None,
    count: int | None = None,
    overrides: Overrides = (),
    run_date: Day = None,
) -> Report:
    """Tell whether this machine can run a job, and how well; or one with GPUs that are not here.

    Args:
        job: As `run` takes it.
        gpu: Name of a GPU that is not here, such as `RTX 3090`.
        memory: Memory of one that has no name here, such as `24GiB`; with capability.
        capability: Its compute capability, such as `8.6`.
        count: So many of it.
        overrides: As `run` takes them.
        run_date: As `run` takes it.
    """
    from batchgen.preview.doctor import examine_on

    with _called(job, overrides, run_date):
        config = load(job, overrides, run_date)
        return examine_on(lambda: config, gpu, memory, capability, count)


@_plainly
def status(source: AnyJob, *, overrides: Overrides = (), run_date: Day = None) -> Status:
    """Tell the state of a running, interrupted or finished job.

    Args:
        source: A job (file or mapping), or its output folder.
        overrides: As `run` takes them.
        run_date: As `run` takes it.
    """
    from batchgen.views.rows import Status
    from batchgen.views.status import status_of

    with _called(source, overrides, run_date):
        root = output_of(source, overrides, run_date)
        return Status(root, status_of(root))


@_plainly
def show(  # noqa: PLR0913 - the options of `batchgen show`, by their names
    source: AnyJob,
    num_rows: int = 5,
    *,
    errors: bool = False,
    error_type: str | None = None,
    columns: Sequence[str] = (),
    snapshot: int | None = None,
    lines: bool = False,
    overrides: Overrides = (),
    run_date: Day = None,
) -> Rows:
    """Look at some rows: published, or durable so far. For all of them see `read`.

    Args:
        source: A job (file or mapping), or its output folder.
        num_rows: At most so many.
        errors: Only rows that are errors.
        error_type: Only errors of this type.
        columns: Only these columns; empty: all.
        snapshot: Of an old snapshot, by its number.
        lines: With each row's line of the input, where that is JSONL.
        overrides: As `run` takes them.
        run_date: As `run` takes it.
    """
    from batchgen.views.rows import Rows, Shown, rows

    with _called(source, overrides, run_date):
        root = output_of(source, overrides, run_date)
        asked = Shown(num_rows, errors, error_type, columns, snapshot, lines)
        return Rows(root, rows(root, asked))


def _called(
    job: AnyJob, overrides: Overrides = (), run_date: Day = None, folder: str = "JOB"
) -> AbstractContextManager[None]:
    """Have hints speak of a job that Python gave, of a mapping by its output folder."""
    texts, day = as_told(texts_of(overrides)), day_of(run_date)
    texts = [text.replace(f"input.path={TABLE}", f"input.path={folder}{BESIDE}") for text in texts]
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
    this.at_end = functools.partial(look_back, job)
    return this


@_plainly
def report(
    job: AnyJob,
    *,
    output: str | Path | None = None,
    rows: bool = True,
    gpu_cost: str | None = None,
    overrides: Overrides = (),
    run_date: Day = None,
) -> str:
    """Write the report of a job's newest run, and return its path.

    Args:
        job: A job (file or mapping), or its output folder.
        output: The report's file; None: `report.html` in the run's folder.
        rows: Whether texts of rows may be in it.
        gpu_cost: Price of a GPU for an hour, for example `2.5EUR`; None: `run.gpu_cost`.
        overrides: As `run` takes them.
        run_date: As `run` takes it.

    Raises:
        BatchgenError: No run has been here, or the file cannot be written.
    """
    from batchgen.preview.estimate import read_price
    from batchgen.report_page.page import write_report

    with _called(job, overrides, run_date):
        root = output_of(job, overrides, run_date)
        config = None if is_output(job) else loaded(job, overrides, run_date, tuned=False)
        price = read_price(str(gpu_cost)) if gpu_cost is not None else None
        options = report_options(config, price, with_rows=rows)
        return write_report(root, options, Path(output) if output is not None else None)


@_plainly
def rollback(source: AnyJob, snapshot: int | None = None, *, for_now: bool = False) -> RolledBack:
    """Publish an older snapshot again, as a new one; nothing is computed, copied or removed.

    Args:
        source: A job (file or mapping), or its output folder.
        snapshot: Its number, as `batchgen snapshots` lists them; None: the one before the newest.
        for_now: The next run goes on from what was newest before, as if there had been no
            rollback. Else it compares its input with the snapshot that was rolled back to.

    Raises:
        BatchgenError: A run is at work on the job, or there is no such snapshot, or it is damaged.
    """
    from batchgen.pipeline.rollback import roll_back

    with _called(source):
        return roll_back(storage_at(output_of(source)), snapshot, for_now=for_now)


def read(source: AnyJob, snapshot: int | None = None, *, explode: bool = False) -> pl.LazyFrame:
    """Read a published snapshot, in input order.

    Reads exactly the files that its manifest names, so that a snapshot being published right now
    is never seen half.

    Args:
        source: A job (file or mapping), or its output folder.
        snapshot: Its number, as `batchgen snapshots` lists them; None: the newest.
        explode: A row for each sample of a job with `sampling.n` > 1, with its own verdict,
            finish reason, tokens and error, and its place in `gen_sample`.

    Raises:
        OutputError: Nothing is published there, or not that snapshot; or, to be exploded, it does
            not tell samples one by one.
    """
    from batchgen.store.result_files import scan
    from batchgen.views.rows import exploded

    with _called(source):
        ledger = Ledger(storage_at(output_of(source)))
        manifest = find_snapshot(ledger, snapshot)
        frame = scan(ledger.storage, [file.name for file in manifest.files])
        return exploded(frame, ledger.plan(manifest.number).prefix) if explode else frame
