"""`batchgen run`, and the summary that it ends with: for people, or as one JSON object."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchgen.cli.common import (
    DATE,
    JOB,
    JSON,
    SET,
    TUNED,
    print_json,
    rows_in_flight,
    say_stopping,
    stop_on_signals,
)
from batchgen.core.errors import BatchgenError, ExitCode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from batchgen.pipeline.context import StopSwitch
    from batchgen.pipeline.interface import Summary

_INTERRUPTED = "interrupted; run again to go on"


def _until(_: click.Context, __: click.Parameter, value: str | None) -> datetime | None:
    if value is None:
        return None
    from batchgen.pipeline.deadline import parse_until
    from batchgen.store.runs import utc_now

    try:
        return parse_until(value, utc_now())
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _seconds(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    from batchgen.pipeline.deadline import parse_duration

    try:
        return parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@JOB
@SET
@DATE
@click.option(
    "--fresh",
    is_flag=True,
    help="Begin anew; the published snapshot stays until the new one is complete.",
)
@click.option(
    "--accept-recipe",
    is_flag=True,
    help="Relabel every row if the recipe has changed; the published snapshot stays until then.",
)
@click.option(
    "--only-errors",
    is_flag=True,
    help="With --accept-recipe: run only error, edited and new rows by the new recipe.",
)
@click.option(
    "--retry-errors",
    is_flag=True,
    help="Run only the error rows of a finished job again, and what is damaged in its output.",
)
@click.option(
    "--publish-anyway", is_flag=True, help="Publish although a limit of [gate] is exceeded."
)
@click.option(
    "--until",
    callback=_until,
    metavar="TIME",
    help="Stop in time to have committed by then, for example 06:00; exit 75 if work is left.",
)
@click.option(
    "--max-runtime",
    "max_runtime_s",
    callback=_seconds,
    metavar="DURATION",
    help="Stop in time to have committed after that long, for example 5h; exit 75 likewise.",
)
@click.option("--wait", is_flag=True, help="Wait for a run that is at work on the job.")
@click.option("--steal", is_flag=True, help="Take the job from a frozen run that holds it.")
@TUNED
@JSON
def run(
    job: Path,
    overrides: tuple[str, ...],
    *,
    run_date: datetime | None,
    tuned: bool,
    as_json: bool,
    **options: Any,  # noqa: ANN401 - each is a field of RunOptions
) -> None:
    """Run a job, or go on with it: what the last snapshot has is taken over, the rest computed.

    Example: batchgen run jobs/quickstart.toml --set input.limit=100
    """
    this = None
    try:
        from batchgen.api import job_run, load
        from batchgen.pipeline.context import StopSwitch
        from batchgen.pipeline.interface import RunOptions

        stop = StopSwitch()
        _stop_on_signals(stop)
        date = run_date.date() if run_date else None
        config = load(job, overrides, date, tuned=tuned)
        _stop_on_signals(stop, config.run.grace_s)
        this = job_run(config, stop, RunOptions(**options))
        summary = this.run()
    except BaseException as error:
        failed = this.summary if this is not None else None
        if as_json:
            print_json(_ended(error, failed).as_dict())
        elif isinstance(error, BatchgenError) and failed is not None and failed.num_left:
            counts = f"{failed.num_durable:,} of {failed.num_planned:,}"
            click.echo(f"batchgen: {counts} rows are durable", err=True)
        raise
    if as_json:
        print_json(summary.as_dict())
    else:
        click.echo(_told(summary, job))
    sys.exit(summary.exit_code)


def _ended(error: BaseException, known: Summary | None) -> Summary:
    """The summary of a run that ended with an error; `known` is what it says of itself, if any."""
    from batchgen.pipeline.interface import Summary, state_of

    if isinstance(error, BatchgenError):
        return known or Summary(state_of(error), int(error.exit_code), reason=str(error))
    if isinstance(error, KeyboardInterrupt):
        stopped, code = "stopped", int(ExitCode.STOPPED)
        known = known or Summary(stopped, code)
        return replace(known, state=stopped, exit_code=code, reason=_INTERRUPTED)
    return known or Summary("fault", int(ExitCode.FAULT), reason=repr(error))


def refused_usage(error: click.ClickException, args: Sequence[str]) -> None:
    """The JSON of a run whose command line is wrong: cron reads it all the same."""
    from batchgen.pipeline.interface import Summary

    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is not None and context.command is run and "--json" in args:
        reason = error.format_message()
        print_json(Summary("refused", int(ExitCode.REFUSED), reason=reason).as_dict())


def _stop_on_signals(stop: StopSwitch, grace_s: float = 0.0) -> None:
    """Signals ask the run to drain, which is said at once; a second one to stop now.

    Args:
        stop: The run's.
        grace_s: How long the rows in flight have.
    """
    from batchgen.pipeline.context import Stop

    def ask(signum: int, _: object) -> None:
        is_first = stop.state is Stop.NO
        stop.ask()
        if not is_first and not stop.is_heard:
            raise KeyboardInterrupt  # Planning or publishing: nothing that could be drained.
        if not is_first:
            say_stopping("stopping now; rows in flight are left to the next run", signum)
        elif stop.is_heard:
            say_stopping(f"stopping: {rows_in_flight(grace_s)}", signum)
        else:
            say_stopping("stopping after this step; {again} to stop at once", signum)

    stop_on_signals(ask)


def _told(summary: Summary, job: Path) -> str:
    """The summary that a person reads."""
    from batchgen.pipeline.progress import duration

    lines = [f"warning: {text}" for text in summary.warnings]
    head = summary.state.replace("_", " ")
    lines.append(f"{head}: {summary.reason}" if summary.reason else head)
    skipped = f", {summary.num_skipped:,} skipped" if summary.num_skipped else ""
    left = f", {summary.num_left:,} left" if summary.num_left else ""
    lines.append(f"  rows     {summary.num_ok:,} ok, {summary.num_errors:,} errors{skipped}{left}")
    if origins := _told_origins(summary):
        lines.append(f"  of them  {origins}")
    if totals := summary.run.get("error_types"):
        lines.append("  errors   " + ", ".join(f"{kind} {n:,}" for kind, n in totals.items()))
    if summary.run.get("num_retries"):
        lines.append(f"  retries  {_told_retries(summary.run)}")
    if summary.engine:
        run = summary.run
        start = f"engine start {duration(summary.engine['startup_s'])}"
        lines += [
            f"  time     {duration(summary.elapsed_s)}: {start}, work {duration(run['working_s'])}",
            f"  speed    {run['requests_per_s']:,.0f} rows/s, "
            f"{run['num_prompt_tokens'] / run['working_s']:,.0f} tokens/s in, "
            f"{run['output_tokens_per_s']:,.0f} out",
        ]
    if summary.tuned:
        lines.append(f"  tuned    {_told_tuned(summary.tuned)}")
    if limited := [entry for entry in summary.gate if entry["limit"] is not None]:
        lines.append("  gate     " + ", ".join(map(_told_limit, limited)))
    if summary.files:
        lines.append(f"  output   {summary.output}/{summary.files[0]}{_more(summary.files, 1)}")
    if summary.num_engine_warnings and summary.summary_path:
        folder = Path(summary.summary_path).parent
        log = folder / "vllm.log"
        log = log if log.exists() else folder
        lines.append(f"  log      {log} ({summary.num_engine_warnings} different warnings)")
    if summary.num_errors:
        lines.append(f"  see      batchgen show {job} --errors")
    return "\n".join(lines)


def _told_origins(summary: Summary) -> str:
    """Where a run's rows come from; empty if it computed them all."""
    if not summary.num_carried and not summary.num_copied:
        return ""
    told = {
        "taken over": summary.num_carried,
        "copied from equal rows": summary.num_copied,
        "computed in this run": summary.run.get("num_ok", 0) + summary.run.get("num_errors", 0),
    }
    return ", ".join(f"{num_rows:,} {how}" for how, num_rows in told.items())


def _told_tuned(tuned: Mapping[str, Any]) -> str:
    used = ", ".join(f"{name} = {value}" for name, value in tuned["settings"].items())
    return f"{used or 'nothing'} by {tuned['path']}"


def _told_retries(run: Mapping[str, Any]) -> str:
    verdicts = run["verdicts"]
    num_asked = sum(verdicts.get("1", {}).values())
    num_at_first = verdicts.get("1", {}).get("ok", 0)
    num_ok = sum(found.get("ok", 0) for found in verdicts.values())
    return (
        f"{run['num_retries']:,} attempts more: {num_at_first / max(num_asked, 1):.1%} of the "
        f"answers ok at first, {num_ok / max(num_asked, 1):.1%} in the end"
    )


def _told_limit(entry: Mapping[str, Any]) -> str:
    name = entry["name"].removeprefix("max_").replace("_", " ")
    figure = "unknown" if entry["figure"] is None else f"{entry['figure']:.3g}"
    return f"{name} {figure} of at most {entry['limit']:g}"


def _more(files: Sequence[str], num_shown: int) -> str:
    return f" and {len(files) - num_shown} more" if len(files) > num_shown else ""
