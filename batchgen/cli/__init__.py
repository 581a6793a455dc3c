"""The shell's side: parse, call, print, exit code. Nothing is computed here.

Results go to stdout, progress and errors to stderr. Heavy imports stay inside the commands, so
that `--help` answers at once.
"""

from __future__ import annotations

import io
import resource
import sys

import click

from batchgen import __version__
from batchgen.cli.batch import run_batch
from batchgen.cli.common import out
from batchgen.cli.history import diff, prune, rollback, snapshots
from batchgen.cli.look import (
    check,
    compare,
    doctor,
    plan,
    report,
    schema,
    score,
    show,
    status,
    try_,
    verify,
)
from batchgen.cli.run import engine, refused_usage, run, tune
from batchgen.cli.serve import serve
from batchgen.core.errors import BatchgenError, ConfigError, ExitCode
from batchgen.core.runtime import lost_output, own_streams


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="batchgen")
def cli() -> None:
    """Run prompts from JSONL, CSV or Parquet through vLLM and publish Parquet, exactly once.

    Exit codes: 0 complete, 1 stopped by a fault (rerun resumes), 2 refused, 3 over a limit of
    the gate (nothing published), 75 stopped on purpose with work left, or another run is at work.
    """
    _check_limits()


for _command in (
    *(run, tune, check, doctor, plan, status, show, report, verify, schema),
    *(snapshots, rollback, prune, diff, try_, compare, score, engine, run_batch, serve),
):
    cli.add_command(_command)


_LIMITS = (
    ("address space", "-v", resource.RLIMIT_AS, 2 << 30, 1 << 10),
    ("open files", "-n", resource.RLIMIT_NOFILE, 24, 1),
)
"""What is limited, its option of `ulimit`, where it is asked, the least, and the option's unit.

Arrow and polars reserve far more memory than they use; with less they abort, or never start.
"""


def _check_limits() -> None:
    """Refuse limits of this process under which libraries break instead of telling.

    Raises:
        ConfigError: One is too low.
    """
    for what, option, kind, least, unit in _LIMITS:
        limit, _ = resource.getrlimit(kind)
        if 0 <= limit < least:
            told = f"{what} limited to {limit // unit}, expected at least {least // unit}"
            raise ConfigError(f"ulimit {option}", [f"{told}, or unlimited; raise it in the shell"])


def main() -> None:
    """Run the command line, and end with its exit code."""
    own_streams()
    code = _run()
    # What these did is done, and their code tells of it; the others only had to print.
    acts = {"run", "run-batch", "tune", "prune", "rollback"}.intersection(sys.argv[1:2])
    if not code and not acts and (why := lost_output()):
        _fail(f"stdout cannot be written: {why}")
        code = ExitCode.FAULT
    sys.exit(code)


def _run() -> int:
    """Errors that batchgen raises on purpose become one line and an exit code."""
    try:
        cli.main(standalone_mode=False)
    except SystemExit as end:
        return int(end.code or 0)
    except BatchgenError as error:
        _fail(str(error))
        return error.exit_code
    except click.ClickException as error:
        refused_usage(error, sys.argv[1:])
        told = io.StringIO()
        error.show(told)
        out(told.getvalue().rstrip(), err=True)
        return ExitCode.REFUSED
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; run again to go on")
        return ExitCode.STOPPED
    return ExitCode.COMPLETE


def _fail(text: str) -> None:
    out(f"batchgen: {text}", fg="red", err=True)
