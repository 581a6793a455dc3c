"""Commands that help to decide: is this better than what is published, and how good is it?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from batchgen.cli.common import (
    JSON,
    as_line,
    flag,
    job_command,
    num_rows,
    out,
    rows_in_flight,
    stop_on_signals,
)

if TYPE_CHECKING:
    from pathlib import Path

    from batchgen.cli.common import Load


@job_command
@num_rows(100, "Rows to try.")
@flag("--random", "is_random", help="Rows drawn at random, instead of the first ones.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="With --random: another seed, other rows.",
)
@click.option("--where", metavar="EXPR", help="Only rows for which this SQL expression is true.")
@flag("--errors", help="Only rows that ended as errors last.")
@click.option(
    "--show",
    "num_shown",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="Rows to print: first those that differ from the published ones, then errors.",
)
@JSON
def try_(
    _: Path,
    load: Load,
    *,
    num_shown: int,
    as_json: bool,
    **options: Any,  # noqa: ANN401 - each is a field of TryOptions
) -> None:
    """Try a job on some rows, and see the answers beside the published ones.

    Touches nothing of the job: another prompt or model may be tried any time. A run that follows
    takes the answers over if the recipe stays. Exits with 0, also where rows are errors.

    Example: batchgen try jobs/quickstart.toml -n 20 --random
    """
    from batchgen.pipeline.context import StopSwitch
    from batchgen.quality.try_out import TryOptions, try_out

    stop = StopSwitch()
    job = load()

    def ask() -> str:
        if not stop.is_heard:
            raise KeyboardInterrupt
        stop.ask()
        return f"stopping: {rows_in_flight(job.run.grace_s)}"

    stop_on_signals(ask)
    found = try_out(job, TryOptions(**options), stop)
    out(as_line(found.as_dict()) if as_json else found.as_text(num_shown))
    sys.exit(found.exit_code)


try_.name = "try"
