"""The same verbs as the shell's, for Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.config.load import load_job, parse_job
from batchgen.errors import OutputError
from batchgen.ledger import STATE, Ledger
from batchgen.storage import LocalStorage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import polars as pl

    from batchgen.config.model import JobConfig
    from batchgen.executor.summary import Summary


def run(
    job: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    steal: bool = False,
    retry_errors: bool = False,
    publish_anyway: bool = False,
) -> Summary:
    """Run a job to its published snapshot, or as far as it goes.

    Args:
        job: Path of a job file, or the same tables as a mapping (paths in it are then relative
            to the working directory).
        overrides: `table.key=value` each, as `--set` takes them.
        fresh: Begin anew; what is published stays until the new snapshot is complete.
        steal: Take the job from a frozen run that holds it.
        retry_errors: Run only the error rows of a finished job again, and what is damaged in its
            output; the other rows are taken over.
        publish_anyway: Publish although a limit of `[gate]` is exceeded.

    Returns:
        How it ended; `state` is `complete`, `nothing_to_do` or `stopped`.

    Raises:
        BatchgenError: Job trouble, see `batchgen.errors`; `exit_code` is what the shell gives.
    """
    from batchgen.executor.local import LocalRun
    from batchgen.executor.options import RunOptions
    from batchgen.runner import StopSwitch

    options = RunOptions(fresh, steal, retry_errors, publish_anyway)
    return LocalRun(load(job, overrides), stop=StopSwitch(), options=options).run()


def read(source: str | Path | Mapping[str, Any]) -> pl.LazyFrame:
    """The published snapshot, in input order.

    Reads exactly the files that the newest manifest names, so that a snapshot being published
    right now is never seen half.

    Args:
        source: A job (file or mapping), or its output folder.

    Raises:
        OutputError: Nothing is published there.
    """
    import polars as pl

    root = output_of(source)
    storage = LocalStorage(root)
    manifest = Ledger(storage).latest_manifest()
    if manifest is None:
        msg = f"{root}: nothing is published here; `batchgen status` tells how far the job is"
        raise OutputError(msg)
    return pl.scan_parquet([storage.path(file["name"]) for file in manifest.files], glob=False)


def load(job: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> JobConfig:
    """A job file, or the same tables as a mapping, checked.

    Raises:
        ConfigError: With every problem found.
    """
    if isinstance(job, str | Path):
        return load_job(Path(job), overrides)
    return parse_job(job, base=Path.cwd(), where="job", overrides=overrides)


def output_of(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Path:
    """The output folder that a job file, a mapping or a folder stands for.

    Raises:
        ConfigError: It is no folder of batchgen's and no job either.
    """
    if isinstance(source, str | Path) and (Path(source) / STATE).is_dir():
        return Path(source)
    return Path(load(source, overrides).output.path)
