"""Arguments that many commands take, and how their results are printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping

JOB = click.argument("job", type=click.Path(path_type=Path))
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Override a key of the job file; may be given often.",
)
TUNED = click.option(
    "--no-tuned",
    "tuned",
    flag_value=False,
    default=True,
    help="Do not use what `batchgen tune` found for this job.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
DATE = click.option(
    "--date",
    "run_date",
    type=click.DateTime(["%Y-%m-%d"]),
    metavar="YYYY-MM-DD",
    help="The date that {date} in paths stands for. Default: today, where this machine is.",
)


def print_json(fields: Mapping[str, Any]) -> None:
    """One object on one line of stdout."""
    click.echo(json.dumps(fields, default=str))


def flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested facts as lines, `run.pid` for a fact in another; what is unknown left out."""
    found: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            found += flat(value, f"{prefix}{name}.")
        elif value is not None:
            found.append((f"{prefix}{name}", f"{value:.1f}" if isinstance(value, float) else value))
    return found
