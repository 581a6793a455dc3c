"""Commands that look at a job and change nothing: check, status, show, verify, schema."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from batchgen.cli.common import DATE, JOB, JSON, SET, flat, print_json
from batchgen.core.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from pathlib import Path

_SILENT_S = 15.0
"""A live view that is older is worth telling: mostly it is rewritten every 2 s."""


@click.command()
@JOB
@SET
@DATE
@click.option("-n", "num_rows", default=3, show_default=True, help="Rows to render.")
def check(
    job: Path, overrides: tuple[str, ...], *, run_date: datetime | None, num_rows: int
) -> None:
    """Check a job file and show its first prompts; loads no model.

    Example: batchgen check jobs/quickstart.toml -n 1
    """
    from batchgen.api import load
    from batchgen.pipeline.prepare import first_prompts, prepare

    prepared = prepare(load(job, overrides, run_date.date() if run_date else None))
    click.echo(
        f"input    {len(prepared.files)} {prepared.format} file(s), first {prepared.files[:1]}"
    )
    click.echo(f"columns  {', '.join(f'{field.name}: {field.type}' for field in prepared.columns)}")
    click.echo(f"carried  {', '.join(prepared.carried)}")
    click.echo(f"model    {prepared.model.path or prepared.job.model.backend}")
    click.echo(f"answer   {', '.join(f'{f.name}: {f.type}' for f in prepared.answer.fields)}")
    for why in prepared.form.fallbacks:
        click.echo(f"as JSON  {why}")
    for note in prepared.notes:
        click.echo(f"note     {note}")
    click.echo(f"recipe   {prepared.recipe_fingerprint}")
    for where, text in first_prompts(prepared, num_rows):
        click.secho(f"--- {where}", dim=True)
        click.echo(text)


@click.command()
@JOB
@SET
@JSON
def status(job: Path, overrides: tuple[str, ...], *, as_json: bool) -> None:
    """Tell the state of a running, interrupted or finished job. JOB may be an output folder.

    Example: batchgen status jobs/quickstart.toml
    """
    from batchgen.api import output_of
    from batchgen.cli.replicas import replica_lines
    from batchgen.views.status import not_begun
    from batchgen.views.status import status as status_of

    root = output_of(job, overrides)
    facts = status_of(root)
    if as_json:
        print_json(facts)
        return
    replicas = facts.get("run", {}).pop("replicas", [])
    if facts["state"] == "new" and (why := not_begun(root)):
        facts["state"] = f"new: {why}"
    for name, value in flat(_readable(facts)):
        click.echo(f"{name:24} {value}")
    for line in replica_lines(replicas):
        click.echo(line)


def _readable(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a person sees of `views.status`: sentences where values would have to be explained."""
    told = dict(facts)
    if "published" in told:
        told["published"] = _told_published(told["published"])
    if "damaged" in told:
        told["damaged"] = "; ".join(told["damaged"])
    if "run" in told:
        run = dict(told["run"])
        age_s = run.pop("sign_of_life_age_s", None)
        if age_s is not None and age_s >= _SILENT_S:
            run["last_sign_of_life"] = _told_silence(run, age_s)
        told["run"] = run
    return told


def _told_published(seen: Mapping[str, Any] | None) -> str:
    if seen is None:
        return "nothing yet"
    return (
        f"snapshot {seen['snapshot']} of {seen['published_at']}: {seen['num_ok']:,} ok, "
        f"{seen['num_errors']:,} errors"
    )


def _told_silence(run: Mapping[str, Any], age_s: float) -> str:
    """How long a run has not been heard of, and what to make of it."""
    from batchgen.pipeline.progress import duration

    if "elapsed_s" not in run:
        means = f"{run.get('state')}, it gives none until that is done"
    elif run.get("num_left") == 0:
        means = "every row has ended, publishing gives none"
    else:
        means = "if it is frozen, take the job from it: batchgen run --steal"
    return f"{duration(age_s)} ago ({means})"


@click.command()
@JOB
@SET
@click.option("-n", "num_rows", default=5, show_default=True, help="Rows to show.")
@click.option("--errors", is_flag=True, help="Only rows that are errors.")
@click.option("--snapshot", type=int, metavar="N", help="Of an old snapshot, by its number.")
def show(
    job: Path, overrides: tuple[str, ...], num_rows: int, *, errors: bool, snapshot: int | None
) -> None:
    """Print rows readably: of the newest plan, published or durable so far.

    JOB may be an output folder.

    Example: batchgen show jobs/quickstart.toml --errors
    """
    from batchgen.api import output_of
    from batchgen.views.status import not_begun, rows

    root = output_of(job, overrides)
    frame = rows(root, num_rows, errors=errors, snapshot=snapshot)
    if frame.is_empty():
        why = not_begun(root)
        click.echo(f"{root}: {why}" if why else "no such rows", err=True)
    for number, row in enumerate(frame.iter_rows(named=True)):
        click.secho(f"--- row {number}", dim=True)
        for name, value in row.items():
            if value is not None and not name.startswith("_batchgen_"):
                click.echo(f"{name:24} {value}")


@click.command()
@JOB
@SET
@JSON
def verify(job: Path, overrides: tuple[str, ...], *, as_json: bool) -> None:
    """Read every byte of a job's output and prove the books. JOB may be an output folder.

    Exits 0 if all is well, 1 if something is damaged or the folder shows other files than the
    newest snapshot's; the next run redoes what can be redone.

    Example: batchgen verify jobs/quickstart.toml
    """
    from batchgen.api import output_of
    from batchgen.store.verify import verify as verify_output

    verdict = verify_output(output_of(job, overrides))
    if as_json:
        print_json(verdict.as_dict())
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


@click.command()
def schema() -> None:
    """Print the JSON Schema of job files, for editors.

    Example: batchgen schema > job.schema.json
    """
    from batchgen.job.load import json_schema

    click.echo(json.dumps(json_schema(), indent=1))


COMMANDS = (check, status, show, verify, schema)
