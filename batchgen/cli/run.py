"""Commands that put an engine to work: `run`, with the summary that it ends with, and `tune`."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from batchgen.cli.common import JSON, Number, as_line, flag, job_command, out, reading, reads_by
from batchgen.core.errors import BatchgenError, ExitCode, GateError
from batchgen.core.runtime import say, stop_on_signals

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from pathlib import Path

    from batchgen.cli.common import Load
    from batchgen.pipeline.context import Summary
    from batchgen.tuning.trial import Stops

_INTERRUPTED = "interrupted; run again to go on"


def _until(text: str) -> datetime:
    from batchgen.pipeline.deadline import parse_until
    from batchgen.store.runs import utc_now

    return parse_until(text, utc_now())


_SECONDS = reads_by("batchgen.pipeline.deadline", "parse_duration")


@job_command
@flag("--fresh", help="Begin anew; the published snapshot stays until the new one is complete.")
@flag(
    "--accept-recipe",
    help="Relabel every row if the recipe has changed; the published snapshot stays until then.",
)
@flag(
    "--only-errors",
    help="With --accept-recipe: run only error, edited and new rows by the new recipe.",
)
@flag(
    "--retry-errors",
    help="Run only the error rows of a finished job again, and what is damaged in its output.",
)
@flag(
    "--rerender",
    help="Run rows again whose prompt an earlier version made otherwise; `plan` says how many.",
)
@flag("--publish-anyway", help="Publish although a limit of [gate] is exceeded.")
@click.option(
    "--until",
    callback=reading(_until),
    metavar="TIME",
    help="Stop in time to have committed by then, for example 06:00; exit 75 if work is left.",
)
@click.option(
    "--max-runtime",
    "max_runtime_s",
    callback=_SECONDS,
    metavar="DURATION",
    help="Stop in time to have committed after that long, for example 5h; exit 75 likewise.",
)
@flag("--wait", help="Wait for a run that is at work on the job.")
@flag("--steal", help="Take the job from a frozen run that holds it.")
@click.option(
    "--no-tuned",
    "tuned",
    flag_value=False,
    default=True,
    help="Do not use what `batchgen tune` found for this job.",
)
@JSON
def run(job: Path, load: Load, *, tuned: bool, as_json: bool, **options: Any) -> None:
    """Run a job, or go on with it: what the last snapshot has is taken over, the rest computed.

    Example: batchgen run jobs/quickstart.toml --set input.limit=100
    """
    this = None
    try:
        from batchgen.api import job_run
        from batchgen.api.endings import deliver
        from batchgen.pipeline.context import RunOptions, StopSwitch, ask_to_stop

        stop = StopSwitch()
        stop_on_signals(ask_to_stop(stop))
        config = load(tuned=tuned)
        stop_on_signals(ask_to_stop(stop, config.run.grace_s))
        this = job_run(config, stop, RunOptions(**options))
        summary = this.run()
        deliver(config)
    except BaseException as error:
        failed = this.summary if this is not None else None
        if as_json:
            out(as_line(_ended(error, failed).as_dict()))
        elif isinstance(error, GateError) and failed is not None:
            for example in failed.error_examples:
                say(example)
        elif isinstance(error, BatchgenError) and failed is not None and failed.num_left:
            say(f"{failed.num_durable:,} of {failed.num_planned:,} rows are durable")
        raise
    out(as_line(summary.as_dict()) if as_json else summary.as_text())
    sys.exit(summary.exit_code)


def _ended(error: BaseException, known: Summary | None) -> Summary:
    """Sum up a run that ended with an error; `known` is what it says of itself, if anything."""
    from batchgen.pipeline.context import Summary, state_of

    if isinstance(error, BatchgenError):
        return known or Summary(state_of(error), int(error.exit_code), reason=str(error))
    if isinstance(error, KeyboardInterrupt):
        stopped, code = "stopped", int(ExitCode.STOPPED)
        known = known or Summary(stopped, code)
        return replace(known, state=stopped, exit_code=code, reason=_INTERRUPTED)
    return known or Summary("fault", int(ExitCode.FAULT), reason=repr(error))


def refused_usage(error: click.ClickException, args: Sequence[str]) -> None:
    """Print the JSON of a run whose command line is wrong: cron reads it all the same."""
    from batchgen.pipeline.context import Summary

    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is not None and context.command is run and "--json" in args:
        reason = error.format_message()
        ended = Summary("refused", int(ExitCode.REFUSED), reason=reason)
        out(as_line(ended.as_dict()))


@job_command
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
@flag(
    "--scratch", help="Measure in a temporary output and keep no row: for a job that has none left."
)
@JSON
def tune(job: Path, load: Load, *, as_json: bool, **asked: Any) -> None:
    """Find the fastest engine settings for a job, with its own rows; their answers are kept.

    Writes JOB.tuned.toml beside the job file, which `batchgen run` uses from then on. Publishes
    nothing. Exits with 75 if it is stopped, or if a run is at work on the job.

    Example: batchgen tune jobs/quickstart.toml --minutes 10
    """
    try:
        from batchgen.tuning.trial import Stops, Times
        from batchgen.tuning.tune import TuneOptions, Tuning

        stops = Stops()
        _stop_search_on_signals(stops)
        options = TuneOptions(
            budget_s=60 * asked["minutes"],
            times=Times(least_s=min(Times().least_s, asked["most_s"]), most_s=asked["most_s"]),
            keeps_rows=not asked["scratch"],
        )
        config = load(tuned=False)
        _stop_search_on_signals(stops, config.run.grace_s)
        report = Tuning(config, job, options, stops=stops, tell=say).run()
    except BaseException as error:
        if as_json:
            ended = _ended(error, None)
            names = ("state", "exit_code", "reason")
            out(as_line({name: getattr(ended, name) for name in names}))
        raise
    out(as_line(report.as_dict()) if as_json else report.as_text())
    sys.exit(report.exit_code)


def _stop_search_on_signals(stops: Stops, grace_s: float = 0.0) -> None:
    """Signals end the search once the trial at work has drained; a second one at once.

    Args:
        stops: The search's.
        grace_s: How long the rows in flight have.
    """
    from batchgen.pipeline.context import rows_in_flight

    def ask() -> str | None:
        is_first = not stops.is_asked
        if not stops.ask():
            raise KeyboardInterrupt
        return f"stopping with this trial: {rows_in_flight(grace_s)}" if is_first else None

    stop_on_signals(ask)


@click.group
def engine() -> None:
    """Keep an engine up, for many jobs and short nights.

    Example: batchgen engine up jobs/quickstart.toml
    """


@job_command
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="Default: a free one.")
@click.option(
    "--api-servers",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Processes that read requests and write answers. Default: by cores.",
)
def up(_: Path, load: Load, *, port: int | None, api_servers: int | None) -> None:
    """Become vLLM's server, with a job's model and settings, on 127.0.0.1.

    Jobs with model.base_url = "auto" use it if their model and its settings are the same. It works
    until it is ended, by Ctrl-C, SIGTERM or systemd. The key is that of VLLM_API_KEY, else a new
    one, in a file that nobody else can read. Exits with vLLM's code, with 2 where the job is
    refused, or with 75 if it is up already.

    Example: batchgen engine up jobs/quickstart.toml --port 8000
    """
    from batchgen.endpoints.warm import serve

    serve(load(), port, api_servers)


engine.add_command(up)
