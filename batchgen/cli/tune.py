"""`batchgen tune`: the fastest engine settings for a job on this machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from batchgen.cli.common import (
    DATE,
    JOB,
    JSON,
    SET,
    Number,
    print_json,
    rows_in_flight,
    say_stopping,
    stop_on_signals,
)
from batchgen.core.errors import BatchgenError, ExitCode

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from batchgen.tuning.trial import Stops


@click.command()
@JOB
@SET
@DATE
@click.option(
    "--minutes",
    default=20.0,
    show_default=True,
    type=Number(min=0, min_open=True),
    help="Begin no trial that would end later.",
)
@click.option(
    "--trial-s",
    "most_s",
    default=60.0,
    show_default=True,
    type=Number(min=1),
    metavar="SECONDS",
    help="Measure each setting for so long at most, once the engine is full.",
)
@click.option(
    "--scratch",
    is_flag=True,
    help="Measure in a temporary output and keep no row: for a job that has none left.",
)
@click.option(
    "--try-fp8-kv-cache",
    "tries_fp8",
    is_flag=True,
    help="Look at a KV cache in FP8, too. It changes answers: measured in a temporary output, "
    "and never used unless the job file says so.",
)
@JSON
def tune(
    job: Path,
    overrides: tuple[str, ...],
    *,
    run_date: datetime | None,
    as_json: bool,
    **asked: Any,  # noqa: ANN401 - see TuneOptions
) -> None:
    """Find the fastest engine settings for a job, with its own rows; their answers are kept.

    Writes JOB.tuned.toml beside the job file, which `batchgen run` uses from then on. Publishes
    nothing. Exits with 75 if it is stopped, or if a run is at work on the job.

    Example: batchgen tune jobs/quickstart.toml --minutes 10
    """
    try:
        from batchgen.api import load
        from batchgen.tuning.gauge import Times
        from batchgen.tuning.trial import Stops
        from batchgen.tuning.tune import TuneOptions, Tuning

        stops = Stops()
        _stop_on_signals(stops)
        date = run_date.date() if run_date else None
        options = TuneOptions(
            budget_s=60 * asked["minutes"],
            times=Times(least_s=min(Times().least_s, asked["most_s"]), most_s=asked["most_s"]),
            keeps_rows=not asked["scratch"],
            tries_fp8=asked["tries_fp8"],
        )
        config = load(job, overrides, date, tuned=False)
        _stop_on_signals(stops, config.run.grace_s)
        report = Tuning(config, job, options, stops=stops, tell=_tell).run()
    except BaseException as error:
        if as_json:
            print_json(_ended(error))
        raise
    if as_json:
        print_json(report.as_dict())
    else:
        click.echo(report.as_text())
    sys.exit(report.exit_code)


def _tell(line: str) -> None:
    click.echo(f"batchgen: {line}", err=True)


def _ended(error: BaseException) -> dict[str, Any]:
    """What a program reads of a search that ended with an error."""
    code = ExitCode.STOPPED if isinstance(error, KeyboardInterrupt) else ExitCode.FAULT
    if isinstance(error, BatchgenError):
        code = error.exit_code
    state = {ExitCode.STOPPED: "stopped", ExitCode.REFUSED: "refused"}.get(code, "fault")
    return {"state": state, "exit_code": int(code), "reason": str(error) or repr(error)}


def _stop_on_signals(stops: Stops, grace_s: float = 0.0) -> None:
    """Signals end the search once the trial at work has drained; a second one at once.

    Args:
        stops: The search's.
        grace_s: How long the rows in flight have.
    """

    def ask(signum: int, _: object) -> None:
        is_first = not stops.is_asked
        if not stops.ask():
            raise KeyboardInterrupt
        if is_first:
            say_stopping(f"stopping with this trial: {rows_in_flight(grace_s)}", signum)

    stop_on_signals(ask)


COMMANDS = (tune,)
