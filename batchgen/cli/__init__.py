"""The shell's side: parse, call, print, exit code. Nothing is computed here.

Results go to stdout, progress and errors to stderr. Heavy imports stay inside the commands, so
that `--help` answers at once.
"""

from __future__ import annotations

import sys

import click

from batchgen import __version__
from batchgen.cli import doctor, history, look, plan, tune
from batchgen.cli.run import refused_usage, run
from batchgen.core.errors import BatchgenError, ExitCode


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="batchgen")
def cli() -> None:
    """Run prompts from JSONL, CSV or Parquet through vLLM and publish Parquet, exactly once.

    Exit codes: 0 complete, 1 stopped by a fault (rerun resumes), 2 refused, 3 over a limit of
    the gate (nothing published), 75 stopped on purpose with work left, or another run is at work.
    """


for _command in (
    run,
    *tune.COMMANDS,
    *look.COMMANDS,
    *plan.COMMANDS,
    *doctor.COMMANDS,
    *history.COMMANDS,
):
    cli.add_command(_command)


def main() -> None:
    """Entry point: errors that batchgen raises on purpose become one line and an exit code."""
    try:
        cli.main(standalone_mode=False)
    except BatchgenError as error:
        click.secho(f"batchgen: {error}", fg="red", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        refused_usage(error, sys.argv[1:])
        error.show()
        sys.exit(ExitCode.REFUSED)
    except (click.Abort, KeyboardInterrupt):
        click.secho("batchgen: interrupted; run again to go on", fg="red", err=True)
        sys.exit(ExitCode.STOPPED)
