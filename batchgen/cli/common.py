"""Arguments that many commands take, and how their results are printed."""

from __future__ import annotations

import functools
import json
import math
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchgen.core.errors import ConfigError
from batchgen.core.runtime import called, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from batchgen.core.runtime import Caller
    from batchgen.job.model import JobConfig

    Load = Callable[..., JobConfig]
    """Loads the command's job, with what `batchgen tune` found for it unless `tuned=False`."""


class _Output(click.Path):
    """A path, or a URL, which a path would lose a slash of."""

    def convert(
        self,
        value: Any,  # noqa: ANN401 - as click has it
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:  # noqa: ANN401 - the same
        """See click."""
        is_url = isinstance(value, str) and "://" in value
        return value if is_url else super().convert(value, param, ctx)


_JOB = click.argument("job", type=_Output(path_type=Path))
_SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Override a key of the job file; may be given often.",
)
_DATE = click.option(
    "--date",
    "run_date",
    type=click.DateTime(["%Y-%m-%d"]),
    metavar="YYYY-MM-DD",
    help="The date that {date} in paths stands for. Default: today, where this machine is.",
)


def job_command(function: Callable[..., None]) -> click.Command:
    """Make a command of a job file, with `--set` and `--date`.

    Args:
        function: Gets the job file's path, a `Load`, and what other options it has.
    """

    @functools.wraps(function)
    def command(
        job: Path, overrides: tuple[str, ...], run_date: datetime | None, **options: object
    ) -> None:
        def load(*, tuned: bool = True) -> JobConfig:
            from batchgen.api.jobs import load as load_job

            return load_job(job, overrides, run_date, tuned=tuned)

        with called(_caller(job, overrides, run_date)):
            function(job, load, **options)

    return click.command()(_JOB(_SET(_DATE(command))))


def output_command(function: Callable[..., None]) -> click.Command:
    """Make a command of an output, or of the one that a job file names.

    Args:
        function: Gets the output's folder or bucket, and what other options it has.
    """

    @functools.wraps(function)
    def command(
        job: Path | str, overrides: tuple[str, ...], run_date: datetime | None, **options: object
    ) -> None:
        from batchgen.api.jobs import output_of

        with called(_caller(job, overrides, run_date)):
            function(output_of(job, overrides, run_date), **options)

    return click.command()(_JOB(_SET(_DATE(command))))


def _caller(job: Path | str, overrides: tuple[str, ...], run_date: datetime | None) -> Caller:
    from batchgen.core.data import spare_pandas
    from batchgen.core.runtime import Caller
    from batchgen.job.load import as_told
    from batchgen.job.model import is_url

    spare_pandas()
    day = run_date.date().isoformat() if run_date else None
    return Caller(str(job), is_url(str(job)) or Path(job).is_dir(), as_told(overrides), day)


def out(text: str, *, err: bool = False, **style: Any) -> None:  # noqa: ANN401 - click's
    """Print, with what would steer a terminal escaped: every command prints through here."""
    click.secho(printable(text), err=err, **style)


def reads_by(module: str, name: str) -> Callable[..., Any]:
    """Make a callback of an option whose text a function reads that is imported only then."""

    def parse(text: str) -> Any:  # noqa: ANN401 - whatever the function reads
        return getattr(import_module(module), name)(text)

    return reading(parse)


def reading(parse: Callable[[str], Any]) -> Callable[..., Any]:
    """Make a callback of an option that reads its text, if it is given."""

    def callback(_: click.Context, __: click.Parameter, text: str | None) -> Any:  # noqa: ANN401
        try:
            return None if text is None else parse(text)
        except ConfigError as error:
            raise click.BadParameter(error.problems[0]) from error
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    return callback


def gpu_cost(help_text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make the option `--gpu-cost`, a price."""
    price = reads_by("batchgen.preview.estimate", "read_price")
    return click.option("--gpu-cost", "price", callback=price, metavar="PRICE", help=help_text)


_MOST_ROWS = 2**31


def num_rows(default: int, help_text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make the option `-n`, how many rows to show."""
    kind = click.IntRange(min=0)

    def cap(_: click.Context, __: click.Parameter, num: int) -> int:
        return min(num, _MOST_ROWS)

    return click.option(
        *("-n", "num_rows"),
        type=kind,
        default=default,
        show_default=True,
        callback=cap,
        help=help_text,
    )


flag = functools.partial(click.option, is_flag=True)
JSON = flag("--json", "as_json", help="Print one JSON object on stdout.")


class Number(click.FloatRange):
    """A finite number in a range: click's own lets NaN through, which is in no range."""

    def convert(
        self,
        value: Any,  # noqa: ANN401 - as click has it
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> float:
        """See click; refuses what is not finite, too."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def as_line(facts: Mapping[str, Any]) -> str:
    """Write one JSON object on one line, as `--json` prints it."""
    return json.dumps(facts, default=str)
