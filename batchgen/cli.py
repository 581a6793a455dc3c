"""The shell's side: parse, call, print, exit code. Nothing is computed here.

Results go to stdout, progress and errors to stderr. Heavy imports stay inside the commands, so
that `--help` answers at once.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchgen import __version__
from batchgen.errors import BatchgenError, ExitCode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.executor.summary import Summary
    from batchgen.runner import StopSwitch

JOB = click.argument("job", type=click.Path(path_type=Path))
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Override a key of the job file; may be given often.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="batchgen")
def cli() -> None:
    """Run prompts from JSONL or Parquet through vLLM and publish Parquet, exactly once.

    Exit codes: 0 complete, 1 stopped by a fault (rerun resumes), 2 refused, 3 over a limit of
    the gate (nothing published), 75 stopped on purpose with work left, or another run is at work.
    """


@cli.command()
@JOB
@SET
@click.option(
    "--fresh",
    is_flag=True,
    help="Begin anew; the published snapshot stays until the new one is complete.",
)
@click.option("--steal", is_flag=True, help="Take the job from a frozen run that holds it.")
@click.option(
    "--retry-errors",
    is_flag=True,
    help="Run only the error rows of a finished job again, and what is damaged in its output.",
)
@click.option(
    "--publish-anyway", is_flag=True, help="Publish although a limit of [gate] is exceeded."
)
@JSON
def run(job: Path, overrides: tuple[str, ...], *, as_json: bool, **options: bool) -> None:
    """Run a job, or go on with it.

    Example: batchgen run jobs/quickstart.toml --set input.limit=100
    """
    from batchgen.api import load
    from batchgen.executor.local import LocalRun
    from batchgen.executor.options import RunOptions
    from batchgen.executor.summary import Summary, state_of
    from batchgen.runner import StopSwitch

    stop = StopSwitch()
    _stop_on_signals(stop)
    this = None
    try:
        this = LocalRun(load(job, overrides), stop=stop, options=RunOptions(**options))
        summary = this.run()
    except BatchgenError as error:
        failed = this.summary if this is not None else None
        if as_json:
            failed = failed or Summary(state_of(error), int(error.exit_code), reason=str(error))
            _print_json(failed.as_dict())
        elif failed is not None and failed.num_left:
            counts = f"{failed.num_durable:,} of {failed.num_planned:,}"
            click.echo(f"batchgen: {counts} rows are durable", err=True)
        raise
    if as_json:
        _print_json(summary.as_dict())
    else:
        click.echo(_told(summary, job))
    sys.exit(summary.exit_code)


@cli.command()
@JOB
@SET
@click.option("-n", "num_rows", default=3, show_default=True, help="Rows to render.")
def check(job: Path, overrides: tuple[str, ...], num_rows: int) -> None:
    """Check a job file and show its first prompts; loads no model.

    Example: batchgen check jobs/quickstart.toml -n 1
    """
    from batchgen.api import load
    from batchgen.planning import first_prompts, prepare

    prepared = prepare(load(job, overrides))
    click.echo(
        f"input    {len(prepared.files)} {prepared.format} file(s), first {prepared.files[:1]}"
    )
    click.echo(f"columns  {', '.join(f'{field.name}: {field.type}' for field in prepared.columns)}")
    click.echo(f"carried  {', '.join(prepared.carried)}")
    click.echo(f"model    {prepared.model.path or prepared.job.model.backend}")
    click.echo(f"answer   {', '.join(f'{f.name}: {f.type}' for f in prepared.answer.fields)}")
    for why in prepared.form.fallbacks:
        click.echo(f"as JSON  {why}")
    click.echo(f"recipe   {prepared.recipe_fingerprint}")
    for where, text in first_prompts(prepared, num_rows):
        click.secho(f"--- {where}", dim=True)
        click.echo(text)


@cli.command()
@JOB
@SET
@JSON
def status(job: Path, overrides: tuple[str, ...], *, as_json: bool) -> None:
    """Tell the state of a running, interrupted or finished job. JOB may be an output folder.

    Example: batchgen status jobs/quickstart.toml
    """
    from batchgen.api import output_of
    from batchgen.views import status as status_of

    facts = status_of(output_of(job, overrides))
    if as_json:
        _print_json(facts)
        return
    for name, value in _flat(facts):
        click.echo(f"{name:24} {value}")


@cli.command()
@JOB
@SET
@click.option("-n", "num_rows", default=5, show_default=True, help="Rows to show.")
@click.option("--errors", is_flag=True, help="Only rows that are errors.")
def show(job: Path, overrides: tuple[str, ...], num_rows: int, *, errors: bool) -> None:
    """Print rows readably: of the newest plan, published or durable so far.

    JOB may be an output folder.

    Example: batchgen show jobs/quickstart.toml --errors
    """
    from batchgen.api import output_of
    from batchgen.views import rows

    frame = rows(output_of(job, overrides), num_rows, errors=errors)
    if frame.is_empty():
        click.echo("no such rows", err=True)
    for number, row in enumerate(frame.iter_rows(named=True)):
        click.secho(f"--- row {number}", dim=True)
        for name, value in row.items():
            if value is not None and not name.startswith("_batchgen_"):
                click.echo(f"{name:24} {value}")


@cli.command()
@JOB
@SET
@JSON
def verify(job: Path, overrides: tuple[str, ...], *, as_json: bool) -> None:
    """Read every byte of a job's output and prove the books. JOB may be an output folder.

    Exits 0 if all is well, 1 if something is damaged; the next run redoes what can be redone.

    Example: batchgen verify jobs/quickstart.toml
    """
    from batchgen.api import output_of
    from batchgen.verify import verify as verify_output

    verdict = verify_output(output_of(job, overrides))
    if as_json:
        _print_json(verdict.as_dict())
    else:
        for problem in verdict.problems:
            click.secho(problem, fg="red")
        click.echo(
            f"{verdict.num_planned:,} planned = {verdict.num_ok:,} ok + {verdict.num_errors:,} "
            f"errors + {verdict.num_skipped:,} skipped + {verdict.num_left:,} left; "
            f"{verdict.num_files} files, {verdict.num_bytes:,} bytes, "
            f"{len(verdict.problems)} problems"
        )
    sys.exit(ExitCode.FAULT if verdict.problems else ExitCode.COMPLETE)


@cli.command()
def schema() -> None:
    """Print the JSON Schema of job files, for editors.

    Example: batchgen schema > job.schema.json
    """
    from batchgen.config.load import json_schema

    click.echo(json.dumps(json_schema(), indent=1))


def main() -> None:
    """Entry point: errors that batchgen raises on purpose become one line and an exit code."""
    try:
        cli.main(standalone_mode=False)
    except BatchgenError as error:
        click.secho(f"batchgen: {error}", fg="red", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(ExitCode.REFUSED)
    except (click.Abort, KeyboardInterrupt):
        click.secho("batchgen: interrupted; run again to go on", fg="red", err=True)
        sys.exit(ExitCode.STOPPED)


def _stop_on_signals(stop: StopSwitch) -> None:
    """SIGTERM and Ctrl-C ask the run to drain; a second one to stop now."""
    from batchgen.runner import Stop

    def ask(*_: object) -> None:
        stop.ask()
        if stop.state is not Stop.DRAIN and not stop.is_heard:
            raise KeyboardInterrupt  # Planning or publishing: nothing that could be drained.

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)


def _told(summary: Summary, job: Path) -> str:
    """The summary that a person reads."""
    from batchgen.progress import duration

    lines = [f"warning: {text}" for text in summary.warnings]
    head = summary.state.replace("_", " ")
    lines.append(f"{head}: {summary.reason}" if summary.reason else head)
    skipped = f", {summary.num_skipped:,} skipped" if summary.num_skipped else ""
    left = f", {summary.num_left:,} left" if summary.num_left else ""
    lines.append(f"  rows     {summary.num_ok:,} ok, {summary.num_errors:,} errors{skipped}{left}")
    if summary.num_carried:
        lines.append(f"  of them  {summary.num_carried:,} taken over from the earlier plan")
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
    if limited := [entry for entry in summary.gate if entry["limit"] is not None]:
        lines.append("  gate     " + ", ".join(map(_told_limit, limited)))
    if summary.files:
        lines.append(f"  output   {summary.output}/{summary.files[0]}{_more(summary.files, 1)}")
    if summary.num_engine_warnings and summary.summary_path:
        log = Path(summary.summary_path).with_name("vllm.log")
        lines.append(f"  log      {log} ({summary.num_engine_warnings} different warnings)")
    if summary.num_errors:
        lines.append(f"  see      batchgen show {job} --errors")
    return "\n".join(lines)


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


def _print_json(fields: Mapping[str, Any]) -> None:
    click.echo(json.dumps(fields, default=str))


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found.append((f"{prefix}{name}", f"{value:.1f}" if isinstance(value, float) else value))
    return found
