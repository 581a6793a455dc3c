"""Commands that help to decide: is this better than what is published, and how good is it?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchgen.cli.common import JSON, Number, as_line, flag, gpu_cost, job_command, num_rows, out

if TYPE_CHECKING:
    from batchgen.cli.common import Load
    from batchgen.preview.estimate import Price


@job_command
@num_rows(100, "Rows to try.")
@flag("--random", "is_random", help="Rows drawn at random, instead of the first ones.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="With --random: another seed, other rows.",
)
@click.option("--where", metavar="EXPR", help="Only rows for which this SQL expression is true.")
@flag("--errors", help="Only rows that ended as errors last.")
@click.option(
    "--show",
    "num_shown",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="Rows to print: first those that differ from the published ones, then errors.",
)
@JSON
def try_(
    _: Path,
    load: Load,
    *,
    num_shown: int,
    as_json: bool,
    **options: Any,  # noqa: ANN401 - each is a field of TryOptions
) -> None:
    """Try a job on some rows, and see the answers beside the published ones.

    Touches nothing of the job: another prompt or model may be tried any time. A run that follows
    takes the answers over if the recipe stays. Exits with 0, also where rows are errors.

    Example: batchgen try jobs/quickstart.toml -n 20 --random
    """
    from batchgen.core.runtime import stop_on_signals
    from batchgen.pipeline.context import StopSwitch, rows_in_flight
    from batchgen.quality.try_out import TryOptions, try_out

    stop = StopSwitch()
    job = load()

    def ask() -> str:
        if not stop.is_heard:
            raise KeyboardInterrupt
        stop.ask()
        return f"stopping: {rows_in_flight(job.run.grace_s)}"

    stop_on_signals(ask)
    found = try_out(job, TryOptions(**options), stop)
    out(as_line(found.as_dict()) if as_json else found.as_text(num_shown))
    sys.exit(found.exit_code)


try_.name = "try"


@job_command
@click.option("--gold", metavar="COLUMN", help="Column with the right label. Default: score.gold.")
@click.option(
    "--gold-path",
    metavar="FILE",
    help="CSV, JSONL or Parquet file that has that column. Default: score.gold_path.",
)
@click.option("--on", metavar="COLUMN", help="Names a row in that file and in the output.")
@click.option(
    "--answer", metavar="COLUMN", help="Labels to score. Default: score.answer, or the only."
)
@click.option(
    "--precision",
    type=Number(min=0, max=1),
    help="Tell from which probability on answers are so precise. Default: score.precision.",
)
@click.option("--snapshot", type=int, metavar="N", help="Of an old snapshot, by its number.")
@JSON
def score(
    job: Path,
    load: Load,
    *,
    snapshot: int | None,
    as_json: bool,
    **table: Any,  # noqa: ANN401 - fields of ScoreConfig
) -> None:
    """Score published labels against right ones: accuracy, F1 by label, confusion, calibration.

    JOB may be an output folder. Rows whose gold label is null or empty are left out; a row without
    an answer is wrong. Needs scikit-learn, the extra `score`.

    Example: batchgen score jobs/quickstart.toml --gold gold_label --answer gen_label
    """
    from batchgen.api.jobs import is_output, output_of, scored

    config = None if is_output(job) else load(tuned=False)
    root = output_of(job) if config is None else config.root
    found = scored(root, config.score if config else None, table, snapshot)
    out(as_line(found.as_dict()) if as_json else found.as_text())


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--on",
    metavar="COL[,COL]",
    help="Columns that name a row. Default: rows are paired by content and place in the input.",
)
@num_rows(5, "Rows that differ to show.")
@click.option(
    "--to",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="A new Parquet file for all rows that differ, with both answers.",
)
@gpu_cost("Price for an hour of the GPUs that a run had, for example 2.5EUR: tells costs.")
@JSON
def compare(  # noqa: PLR0913 - the options, by their names
    a: str,
    b: str,
    *,
    on: str | None,
    num_rows: int,
    to: Path | None,
    price: Price | None,
    as_json: bool,
) -> None:
    """Compare the answers of two outputs: two models, two prompts, two nights.

    A and B are jobs or output folders, each with @N for snapshot N instead of the newest. Says how
    many rows have the same answer, how far labels agree (kappa, confusion, shifts), how long and
    how many tokens the answers are.

    Example: batchgen compare jobs/quickstart.toml out/other-model --to differ.parquet
    """
    from batchgen.api.jobs import output_of, snapshot_of
    from batchgen.quality.compare import compare as compare_outputs

    columns = [name.strip() for name in on.split(",")] if on else []
    (first, one), (second, two) = snapshot_of(a), snapshot_of(b)
    roots = output_of(first), output_of(second)
    found = compare_outputs(*roots, (one, two), on=columns, num_examples=num_rows, to=to)
    found = found.priced(price)
    out(as_line(found.as_dict()) if as_json else found.as_text())
