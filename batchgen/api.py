"""The same verbs as the shell's, for Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.config.load import load_job, parse_job
from batchgen.config.tuned import use_tuned
from batchgen.ledger.ledger import Ledger
from batchgen.ledger.names import STATE
from batchgen.snapshots import history
from batchgen.storage import LocalStorage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import date, datetime

    import polars as pl

    from batchgen.config.model import JobConfig
    from batchgen.executor.summary import Summary


def run(  # noqa: PLR0913 - the options of `batchgen run`, by their names
    job: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    run_date: date | None = None,
    tuned: bool = True,
    fresh: bool = False,
    steal: bool = False,
    retry_errors: bool = False,
    publish_anyway: bool = False,
    accept_recipe: bool = False,
    only_errors: bool = False,
    wait: bool = False,
    until: datetime | None = None,
    max_runtime_s: float | None = None,
) -> Summary:
    """Run a job to its published snapshot, or as far as it goes.

    Args:
        job: Path of a job file, or the same tables as a mapping (paths in it are then relative
            to the working directory).
        overrides: `table.key=value` each, as `--set` takes them.
        run_date: What `{date}` in paths stands for; None: today, where this machine is.
        tuned: Use what `batchgen tune` found for this job file, if it fits.
        fresh: Begin anew; what is published stays until the new snapshot is complete.
        steal: Take the job from a frozen run that holds it.
        retry_errors: Run only the error rows of a finished job again, and what is damaged in its
            output; the other rows are taken over.
        publish_anyway: Publish although a limit of `[gate]` is exceeded.
        accept_recipe: Relabel every row if the recipe has changed; what is published stays until
            then.
        only_errors: With accept_recipe: only error, edited and new rows.
        wait: Wait for a run that is at work on the job.
        until: Stop in time to have committed by then; aware.
        max_runtime_s: Stop in time to have committed after that long.

    Returns:
        How it ended; `state` is `complete`, `nothing_to_do` or `stopped`.

    Raises:
        BatchgenError: Job trouble, see `batchgen.errors`; `exit_code` is what the shell gives.
    """
    from batchgen.executor.job_run import JobRun
    from batchgen.executor.options import RunOptions
    from batchgen.runner import StopSwitch

    options = RunOptions(
        fresh=fresh,
        steal=steal,
        retry_errors=retry_errors,
        publish_anyway=publish_anyway,
        accept_recipe=accept_recipe,
        only_errors=only_errors,
        wait=wait,
        until=until,
        max_runtime_s=max_runtime_s,
    )
    config = load(job, overrides, run_date, tuned=tuned)
    return JobRun(config, stop=StopSwitch(), options=options).run()


def read(source: str | Path | Mapping[str, Any], snapshot: int | None = None) -> pl.LazyFrame:
    """A published snapshot, in input order.

    Reads exactly the files that its manifest names, so that a snapshot being published right now
    is never seen half.

    Args:
        source: A job (file or mapping), or its output folder.
        snapshot: Its number, as `batchgen snapshots` lists them; None: the newest.

    Raises:
        OutputError: Nothing is published there, or not that snapshot.
    """
    import polars as pl

    storage = LocalStorage(output_of(source))
    manifest = history.snapshot(Ledger(storage), snapshot)
    return pl.scan_parquet([storage.path(file["name"]) for file in manifest.files], glob=False)


def load(
    job: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    run_date: date | None = None,
    *,
    tuned: bool = True,
) -> JobConfig:
    """A job file, or the same tables as a mapping, checked.

    Args:
        job: Path of a job file, or the same tables as a mapping.
        overrides: `table.key=value` each, as `--set` takes them.
        run_date: What `{date}` in paths stands for; None: today, where this machine is.
        tuned: Add what `batchgen tune` found for this job file, if it fits.

    Raises:
        ConfigError: With every problem found.
    """
    if isinstance(job, str | Path):
        config = load_job(Path(job), overrides, run_date)
        return use_tuned(config, Path(job)) if tuned else config
    return parse_job(job, base=Path.cwd(), where="job", overrides=overrides, run_date=run_date)


def output_of(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Path:
    """The output folder that a job file, a mapping or a folder stands for.

    Raises:
        ConfigError: It is no folder of batchgen's and no job either.
    """
    if isinstance(source, str | Path) and (Path(source) / STATE).is_dir():
        return Path(source)
    return Path(load(source, overrides, tuned=False).output.path)
