"""`batchgen doctor`: whether this machine can run a job, and how well."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from batchgen.cli.common import DATE, JOB, JSON, SET, print_json

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path


@click.command()
@JOB
@SET
@DATE
@JSON
def doctor(
    job: Path, overrides: tuple[str, ...], *, run_date: datetime | None, as_json: bool
) -> None:
    """Tell whether this machine can run a job, and how well, before anything loads.

    GPU, driver, versions, quantization, weights and KV cache against memory, rows at once, output
    folder and disk. Estimates are called so. Exits with 0 if it can run, with 2 if it cannot.

    Example: batchgen doctor jobs/quickstart.toml
    """
    from batchgen.api import load
    from batchgen.preview.doctor import examine

    date = run_date.date() if run_date else None
    report = examine(lambda: load(job, overrides, date), job)
    if as_json:
        print_json(report.as_dict())
    else:
        click.echo(report.as_text())
    sys.exit(report.exit_code)


COMMANDS = (doctor,)
