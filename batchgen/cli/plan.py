"""`batchgen plan`: what a run would do."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from batchgen.cli.common import DATE, JOB, JSON, SET, print_json
from batchgen.core.errors import ConfigError

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from batchgen.preview.estimate import Price, Rate


def _rate(_: click.Context, __: click.Parameter, value: str | None) -> Rate | None:
    from batchgen.preview.estimate import read_rate

    try:
        return read_rate(value) if value is not None else None
    except ConfigError as error:
        raise click.BadParameter(error.problems[0]) from error


def _price(_: click.Context, __: click.Parameter, value: str | None) -> Price | None:
    from batchgen.preview.estimate import read_price

    try:
        return read_price(value) if value is not None else None
    except ConfigError as error:
        raise click.BadParameter(error.problems[0]) from error


@click.command()
@JOB
@SET
@DATE
@click.option(
    "--exact", "is_exact", is_flag=True, help="Look at every row that is to do, not at a sample."
)
@click.option(
    "--rate",
    callback=_rate,
    metavar="RATE",
    help="How fast it will go: 250rows/s, or 12000tokens/s of prompts and answers together. "
    "Default: as fast as the last run of this output.",
)
@click.option(
    "--gpu-cost",
    "price",
    callback=_price,
    metavar="PRICE",
    help="Price of a GPU for an hour, for example 2.5EUR.",
)
@click.option("--fresh", is_flag=True, help="Of a run with --fresh.")
@click.option("--retry-errors", is_flag=True, help="Of a run with --retry-errors.")
@click.option("--accept-recipe", is_flag=True, help="Of a run with --accept-recipe.")
@click.option("--only-errors", is_flag=True, help="Of a run with --accept-recipe --only-errors.")
@JSON
def plan(
    job: Path,
    overrides: tuple[str, ...],
    *,
    run_date: datetime | None,
    as_json: bool,
    **options: Any,  # noqa: ANN401 - fields of PlanOptions, the rest of RunOptions
) -> None:
    """Tell what a run would do: rows, tokens, time, cost. Touches nothing and needs no GPU.

    Exits with 0, or with 2 where a run would refuse to start.

    Example: batchgen plan jobs/quickstart.toml --rate 250rows/s --gpu-cost 2.5EUR
    """
    from batchgen.api import load
    from batchgen.pipeline.interface import RunOptions
    from batchgen.preview.plan import PlanOptions, foresee
    from batchgen.preview.report import told

    asked = {name: options.pop(name) for name in ("is_exact", "rate", "price")}
    date = run_date.date() if run_date else None
    forecast = foresee(
        lambda: load(job, overrides, date), PlanOptions(RunOptions(**options), **asked)
    )
    if as_json:
        print_json(forecast.as_dict())
    else:
        click.echo(told(forecast))
    sys.exit(forecast.exit_code)


COMMANDS = (plan,)
