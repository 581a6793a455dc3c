"""A job as Python gives it: a file or tables, overrides as texts or values, data as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from batchgen.core.errors import BusyError, ConfigError
from batchgen.core.places import Bucket, Root, bucket_url, folder_of
from batchgen.engine.devices import device_name
from batchgen.job.load import load_job, parse_job
from batchgen.job.model import JobConfig, ScoreConfig, is_url
from batchgen.job.tuned import use_tuned
from batchgen.source.tables import is_table, write_table
from batchgen.storage import LocalStorage
from batchgen.store.books import STATE
from batchgen.store.runs import RunLock

if TYPE_CHECKING:
    from batchgen.quality.score import Score

    AnyJob = str | Path | Mapping[str, Any]
    """A job file, or the same tables as a mapping."""
    Day = date | str | None
    """A date, or ISO text; None: today, here."""
    Overrides = Sequence[str] | Mapping[str, Any]
    """`table.key=value` each, or a mapping of `table.key` (or of tables) to values."""

BESIDE = ".input.parquet"
"""Behind the name of an output: the file of its input, where that was given as a table."""
TABLE = "table.parquet"
"""Stands for a table in a job until it is known where that is written."""


def load(
    job: AnyJob, overrides: Overrides = (), run_date: Day = None, *, tuned: bool = True
) -> JobConfig:
    """Load and check a job file, or the same tables as a mapping; write its table, if it has one.

    Args:
        job: As `run` takes it.
        overrides: As `run` takes them.
        run_date: What `{date}` in paths stands for, a date or ISO text; None: today, here.
        tuned: Add what `batchgen tune` found for this job file, if it fits.

    Raises:
        ConfigError: With every problem found.
        BusyError: A run is at work on the job with another table.
    """
    config = loaded(job, overrides, run_date, tuned=tuned)
    table = _table_of(overrides, _table_of(job, None))
    if table is None:
        return config
    output = folder_of(config.root)

    def may_change() -> None:
        if RunLock(LocalStorage(output)).is_held():
            msg = f"{output}: a run is at work on it with another table; wait for its end"
            raise BusyError(msg)

    path = output.with_name(f"{output.name}{BESIDE}")
    try:
        write_table(table, path, may_change)
    except OSError as error:
        refuse("input.path", path, f"a place that can be written ({error.strerror})")
    return config.changed(input={"path": [str(path)], "format": "parquet"})


def loaded(
    job: AnyJob, overrides: Overrides = (), run_date: Day = None, *, tuned: bool = True
) -> JobConfig:
    """Load and check a job; a table in it is not written, and its path is not the job's."""
    texts, day = texts_of(overrides), day_of(run_date)
    if isinstance(job, str | Path):
        config = load_job(Path(job), texts, day)
        return use_tuned(config, Path(job), device_name) if tuned else config
    if not isinstance(job, Mapping):
        refuse("job", job, "the path of a job file, or its tables as a mapping")
    if _table_of(job, None) is not None:
        job = {**job, "input": {**job["input"], "path": TABLE}}
    return parse_job(job, base=Path.cwd(), where="job", overrides=texts, run_date=day)


def _table_of(given: object, other: object) -> object:
    """The table that is given as `input.path`; the other one without it."""
    if not isinstance(given, Mapping):
        return other
    inner = given.get("input")
    value = inner.get("path") if isinstance(inner, Mapping) else None
    value = given.get("input.path", value)
    return value if is_table(value) else other


def texts_of(overrides: Overrides) -> Sequence[str]:
    """List the overrides as `--set` takes them; a single text is one of them, and not letters."""
    if isinstance(overrides, Mapping):
        return [text for name, value in overrides.items() for text in _set_texts(name, value)]
    texts = (overrides,) if isinstance(overrides, str) else tuple(overrides)
    for text in texts:
        if not isinstance(text, str):
            refuse("overrides", text, "texts such as 'run.flush_s=10', or a mapping")
    return texts


def _set_texts(name: object, value: object) -> list[str]:
    """Write `table.key`, or a table whose keys are meant each, with its value in TOML."""
    if isinstance(name, str) and "." not in name and isinstance(value, Mapping):
        return [text for key, one in value.items() for text in _set_texts(f"{name}.{key}", one)]
    if not isinstance(name, str) or "." not in name:
        refuse("overrides", name, "keys such as 'sampling.max_tokens', or whole tables")
    return [f"{name}={TABLE if is_table(value) else _as_toml(value)}"]


def _as_toml(value: object) -> str:
    """Write a value in TOML, as far as that has it; a path and a date are texts."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_as_toml(str(k))} = {_as_toml(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_toml, value))}]"
    if isinstance(value, bool | int | float):
        return str(value).lower()
    if value is None:
        refuse("overrides", value, "a value, which TOML has no null for; leave the key out")
    # TOML has JSON's escapes, and wants one sign more escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def day_of(run_date: Day) -> date | None:
    """Read a date as Python gives it.

    Raises:
        ConfigError: It is none.
    """
    if isinstance(run_date, datetime):  # A date too, by its class, but written with its hours.
        return run_date.date()
    if run_date is None or isinstance(run_date, date):
        return run_date
    try:
        return date.fromisoformat(run_date)
    except (TypeError, ValueError):
        refuse("run_date", run_date, "a date, or a text such as '2026-01-31'")


def refuse(name: str, given: object, expected: str) -> NoReturn:
    """Raise a ConfigError about an argument."""
    raise ConfigError(name, [f"{given!r:.60} is wrong, expected: {expected}"])


def output_of(source: AnyJob, overrides: Overrides = (), run_date: Day = None) -> Root:
    """Find the output that a job file, a mapping, a folder or a URL stands for.

    Raises:
        ConfigError: It is no output of batchgen's and no job either.
    """
    if isinstance(source, str) and is_url(source):
        try:
            return Bucket(bucket_url(source))
        except ValueError as error:
            raise ConfigError(source, [str(error)]) from error
    if isinstance(source, str | Path):
        path = Path(source)
        if (path / STATE).is_dir():
            return path
        if path.is_dir() or not path.exists():
            wrong = (
                f"holds no batchgen job (no {STATE}/ in it)" if path.is_dir() else "does not exist"
            )
            raise ConfigError(str(path), [f"{wrong}, expected a job file or an output folder"])
    return loaded(source, overrides, run_date, tuned=False).root


def is_output(source: AnyJob) -> bool:
    """Whether what is given names an output, and no job."""
    return isinstance(source, str | Path) and (is_url(str(source)) or Path(source).is_dir())


def snapshot_of(source: AnyJob) -> tuple[AnyJob, int | None]:
    """Split `JOB@N`; what exists as it is written has no number."""
    if not isinstance(source, str) or Path(source).exists():
        return source, None
    name, _, number = source.rpartition("@")
    return (name, int(number)) if name and number.isdecimal() else (source, None)


def scored(
    root: Root, table: ScoreConfig | None, given: Mapping[str, Any], snapshot: int | None
) -> Score:
    """Score an output by a job's `[score]`, None without a job, and what is given beside it."""
    from batchgen.job.model import ScoreConfig
    from batchgen.quality.score import score as score_output

    share = given["precision"]
    if share is not None and not (isinstance(share, int | float) and 0 <= share <= 1):
        refuse("precision", share, "a share, 0 to 1")
    told = {name: value for name, value in given.items() if value is not None}
    return score_output(root, (table or ScoreConfig()).model_copy(update=told), snapshot)


def check_end(until: datetime | None, max_runtime_s: float | None) -> None:
    """Refuse an end that could not be held to; what the shell takes is read there."""
    if until is not None and not isinstance(until, datetime):
        expected = "a datetime with a time zone, such as datetime.now(UTC) + timedelta(hours=5)"
        refuse("until", until, expected)
    if until is not None and until.utcoffset() is None:
        refuse("until", until, "a time with a zone, such as until.astimezone()")
    if max_runtime_s is None:
        return
    is_number = isinstance(max_runtime_s, Real) and not isinstance(max_runtime_s, bool)
    if not is_number or not math.isfinite(max_runtime_s) or max_runtime_s <= 0:
        refuse("max_runtime_s", max_runtime_s, "seconds, more than 0, such as 5 * 3600")
