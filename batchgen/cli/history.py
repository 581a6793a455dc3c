"""Commands about what has been published: snapshots, prune, diff."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from batchgen.cli.common import JSON, as_line, flag, num_rows, out, output_command, reads_by
from batchgen.core.runtime import command, option, size_text

if TYPE_CHECKING:
    from batchgen.core.places import Root
    from batchgen.views.diff import Diff
    from batchgen.views.status import Listed


@output_command
@JSON
def snapshots(root: Root, *, as_json: bool) -> None:
    """List the published snapshots of a job, the newest last. JOB may be an output folder.

    Example: batchgen snapshots jobs/quickstart.toml
    """
    from batchgen.views.status import listed, not_begun

    found = listed(root)
    if as_json:
        out(as_line({"output": str(root), "snapshots": [asdict(line) for line in found]}))
        return
    if not found:
        why = not_begun(root)
        out(f"{root}: {why}" if why else "nothing is published yet", err=True)
    for line in found:
        out(_snapshot_line(line))


@output_command
@click.option("--keep", type=click.IntRange(min=1), metavar="N", help="So many newest stay.")
@click.option(
    "--older-than",
    "older_than_s",
    callback=reads_by("batchgen.pipeline.deadline", "parse_duration"),
    metavar="DURATION",
    help="Only what is older goes, for example 30d; with --keep, N newest stay even so.",
)
@flag("--dry-run", help="Only tell what would go.")
@JSON
def prune(
    root: Root, *, keep: int | None, older_than_s: float | None, dry_run: bool, as_json: bool
) -> None:
    """Remove old snapshots, runs' logs and books of a job. JOB may be an output folder.

    The N newest snapshots, runs and claims stay, and with each snapshot its run, its books and
    its files, also those that others share. So does what an unfinished run takes rows over from.
    Exits 75 while a run is at work on the job.

    Example: batchgen prune jobs/quickstart.toml --keep 7
    """
    from batchgen.views.status import listed
    from batchgen.views.status import prune as prune_output

    if keep is None and older_than_s is None:
        msg = f"Missing option '{option('--keep')}' or '{option('--older-than')}': say what stays."
        raise click.UsageError(msg)
    num_snapshots = len(listed(root))
    found = prune_output(root, keep or 1, older_than_s=older_than_s, dry_run=dry_run)
    if as_json:
        out(as_line({"output": str(root), "dry_run": dry_run, **asdict(found)}))
        return
    if found.removed:
        out("would remove:" if dry_run else "removed:")
    for line in found.removed:
        out(_snapshot_line(line))
    verb, num_runs = "would go" if dry_run else "removed", len(found.runs)
    runs = f" and {num_runs} run folder{'s' if num_runs > 1 else ''}" if num_runs else ""
    size = size_text(found.freed_bytes)
    out(f"{len(found.removed)} of {num_snapshots} snapshots{runs} {verb}, {size}")


@output_command
@click.argument("number", type=int, required=False, metavar="[N]")
@flag("--for-now", help="The next run goes on from the newest, as if there had been no rollback.")
@JSON
def rollback(root: Root, *, number: int | None, for_now: bool, as_json: bool) -> None:
    """Publish an older snapshot again: N, or the one before the newest.

    JOB may be an output folder, N is a number as `batchgen snapshots` lists them. It becomes the
    newest under a number of its own; nothing is computed, copied or removed. The next run compares
    its input with it, and computes what has changed since, unless --for-now is given. Exits 75
    while a run is at work on the job.

    Example: batchgen rollback jobs/quickstart.toml 3
    """
    from batchgen.pipeline.rollback import roll_back
    from batchgen.storage.remote import storage_at

    done = roll_back(storage_at(root), number, for_now=for_now)
    out(as_line(done.as_dict()) if as_json else done.as_text())


@output_command
@click.argument("numbers", nargs=-1, metavar="[OLD NEW]")
@click.option(
    "--on",
    metavar="COL[,COL]",
    help="Columns that name a row. Default: equal lines of JSONL are paired, moved ones too, and "
    "lines between them if they are as many as before; rows of CSV and Parquet by their number.",
)
@num_rows(5, "Changed rows to show.")
@JSON
def diff(
    root: Root,
    *,
    numbers: tuple[str, ...],
    on: str | None,
    num_rows: int,
    as_json: bool,
) -> None:
    """Compare two snapshots, by default the newest two: rows and how the labels moved.

    JOB may be an output folder. OLD and NEW are numbers as `batchgen snapshots` lists them.

    Example: batchgen diff jobs/quickstart.toml 3 5 --on id
    """
    from batchgen.views.diff import diff as diff_output

    if others := [number for number in numbers if not number.isdecimal()]:
        msg = "diff compares snapshots of one output, by their numbers; for two outputs: "
        raise click.UsageError(msg + command("compare", others[0]))
    if len(numbers) not in {0, 2}:
        msg = f"{len(numbers)} snapshot given, expected none or two: OLD NEW"
        raise click.UsageError(msg)
    both = (int(numbers[0]), int(numbers[1])) if numbers else None
    columns = [name.strip() for name in on.split(",")] if on else []
    found = diff_output(root, both, on=columns, num_examples=num_rows)
    out(as_line(asdict(found)) if as_json else "\n".join(_diff_lines(found)))


def _snapshot_line(line: Listed) -> str:
    """Write a snapshot as one line."""
    marks = ["shown"] if line.is_shown else []
    marks += [f"over gate.{name}" for name in line.overridden]
    return (
        f"{line.number:>6}  {line.published_at}  run {line.run_id}  recipe {line.recipe[:12]}  "
        f"{line.num_ok:,} ok, {line.num_errors:,} errors, {size_text(line.size_bytes)}"
        f"{'  ' if marks else ''}{', '.join(marks)}"
    )


def _diff_lines(found: Diff) -> list[str]:
    lines = [
        f"snapshot {found.old} -> {found.new}, rows paired by {found.paired_by}",
        f"  rows     {found.num_old:,} -> {found.num_new:,}: {found.num_added:,} added, "
        f"{found.num_removed:,} removed, {found.num_changed:,} changed, {found.num_same:,} same",
    ]
    if found.num_changed:
        lines.append(
            f"  changed  {found.num_input_changed:,} in their input, "
            f"{found.num_answer_changed:,} in their answer only"
        )
    if found.may_hide_edits:
        lines.append(
            "  edited   some of those added and removed may be one row that was edited, which only "
            f"a key can tell: {option('--on')} COL"
        )
    if any(found.num_without_key):
        old, new = found.num_without_key
        lines.append(f"  no key   {old:,} old and {new:,} new rows are not compared")
    columns = {
        "came": found.columns_came,
        "went": found.columns_went,
        "of another type": found.columns_retyped,
    }
    lines += [f"  columns  {what}: {', '.join(names)}" for what, names in columns.items() if names]
    for moves in found.labels:
        lines += moves.lines()
    return lines + found.example_lines()
