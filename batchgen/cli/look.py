"""Commands that look at a job or at outputs, and change nothing: is it right, how good is it?"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchgen.cli.common import (
    JSON,
    Number,
    as_line,
    flag,
    gpu_cost,
    job_command,
    num_rows,
    out,
    output_command,
    reading,
    reads_by,
)
from batchgen.core.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from batchgen.cli.common import Load
    from batchgen.core.places import Root
    from batchgen.preview.estimate import Price


_WATCH_S = 2.0


@job_command
@num_rows(3, "Rows to render.")
def check(_: Path, load: Load, *, num_rows: int) -> None:
    """Check a job file and show its first prompts; loads no model.

    Exits with 0, or with 2 where a run would refuse to start, or where each row shown is an error.

    Example: batchgen check jobs/quickstart.toml -n 1
    """
    from batchgen.preview.check import check_job

    found = check_job(load(), num_rows)
    _out_rows(found.as_text())
    if found.reason:
        raise ConfigError("[prompt]", [found.reason])


def _out_rows(text: str) -> None:
    """Print lines; those that only name a row stand back."""
    for line in text.split("\n"):
        out(line, dim=line.startswith("--- "))


@job_command
@click.option("--gpu", metavar="NAME", help='A GPU that is not here, such as "RTX 3090" or L4.')
@click.option("--memory", metavar="SIZE", help="One of any name: its memory, such as 24GiB,")
@click.option("--capability", metavar="X.Y", help="and its compute capability, such as 8.6.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="So many of it. Default: 1.")
@JSON
def doctor(_: Path, load: Load, *, as_json: bool, **planned: Any) -> None:  # noqa: ANN401
    """Tell whether this machine can run a job, and how well, before anything loads.

    GPU, driver, versions, quantization, weights and KV cache against memory, rows at once, output
    folder and disk. Estimates are called so. Exits with 0 if it can run, with 2 if it cannot.

    With --gpu, or --memory and --capability: whether a machine with such GPUs could, before one is
    bought or rented, and how many rows of which length run at once in which format.

    Example: batchgen doctor jobs/quickstart.toml --gpu "RTX 3090"
    """
    from batchgen.preview.doctor import examine_on

    report = examine_on(load, **planned)
    out(as_line(report.as_dict()) if as_json else report.as_text())
    sys.exit(report.exit_code)


@job_command
@flag("--exact", "is_exact", help="Look at every row that is to do, not at a sample.")
@click.option(
    "--rate",
    callback=reads_by("batchgen.preview.estimate", "read_rate"),
    metavar="RATE",
    help="How fast it will go: 250rows/s, or 12000tokens/s of prompts and answers together. "
    "Default: as fast as the last run of this output.",
)
@gpu_cost("Price of a GPU for an hour, for example 2.5EUR.")
@flag("--fresh", help="Of a run with --fresh.")
@flag("--retry-errors", help="Of a run with --retry-errors.")
@flag("--accept-recipe", help="Of a run with --accept-recipe.")
@flag("--only-errors", help="Of a run with --accept-recipe --only-errors.")
@flag("--rerender", help="Of a run with --rerender.")
@JSON
def plan(
    _: Path,
    load: Load,
    *,
    as_json: bool,
    **options: Any,  # noqa: ANN401 - fields of PlanOptions, the rest of RunOptions
) -> None:
    """Tell what a run would do: rows, tokens, time, cost. Touches nothing and needs no GPU.

    Exits with 0, or with 2 where a run would refuse to start.

    Example: batchgen plan jobs/quickstart.toml --rate 250rows/s --gpu-cost 2.5EUR
    """
    from batchgen.pipeline.context import RunOptions
    from batchgen.preview.plan import PlanOptions, foresee

    asked = {name: options.pop(name) for name in ("rate", "price")}
    if options.pop("is_exact"):
        asked["sample_rows"] = None
    forecast = foresee(load, PlanOptions(RunOptions(**options), **asked))
    out(as_line(forecast.as_dict()) if as_json else forecast.as_text())
    sys.exit(forecast.exit_code)


@output_command
@flag("--watch", help="Show it again every 2 s, until no run is at work.")
@JSON
def status(root: Root, *, watch: bool, as_json: bool) -> None:
    """Tell the state of a running, interrupted or finished job. JOB may be an output folder.

    Exits with 0 where all is well: complete, at work or never run. Else with what the last run
    ended with: 1 a fault, or it was killed, or published files are damaged; 2 refused; 3 held
    back by the gate; 75 stopped with work left.

    Example: batchgen status jobs/quickstart.toml --watch
    """
    from batchgen.views.status import as_text, exit_code_of, status_of

    facts = status_of(root)
    with suppress(KeyboardInterrupt):
        while True:
            if watch and not as_json:
                click.clear()  # Nothing where stdout is no terminal.
            out(as_line(facts) if as_json else as_text(root, facts))
            if not watch or facts["state"] != "running":
                break
            time.sleep(_WATCH_S)
            facts = status_of(root)
    sys.exit(exit_code_of(facts))


@output_command
@num_rows(5, "Rows to show.")
@flag("--errors", help="Only rows that are errors.")
@click.option("--error-type", metavar="TYPE", help="Only errors of this type.")
@click.option(
    "--columns",
    callback=reading(lambda text: [name.strip() for name in text.split(",")]),
    metavar="COL[,COL]",
    help="Only these columns.",
)
@click.option("--snapshot", type=int, metavar="N", help="Of an old snapshot, by its number.")
@flag("--lines", help="With each row's line of the input, where that is JSONL.")
@flag("--json", "as_json", help="Print a JSON object a row on stdout.")
def show(
    root: Root,
    *,
    as_json: bool,
    columns: list[str] | None,
    **asked: Any,  # noqa: ANN401 - fields of Shown
) -> None:
    """Print rows readably: of the newest plan, published or durable so far.

    JOB may be an output folder. Rows are named by where they stand in the input, counted from 0.

    Example: batchgen show jobs/quickstart.toml --errors --columns text,gen_error
    """
    from batchgen.views import rows as view
    from batchgen.views.rows import Rows

    found = Rows(root, view.rows(root, view.Shown(columns=columns or (), **asked)))
    if found.reason:
        out(found.reason, err=True)
    elif as_json:
        for row in found:
            out(as_line(view.as_json(row)))
    else:
        _out_rows(found.as_text())


@job_command
@click.option(
    "--output",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Its file. Default: report.html in the run's folder.",
)
@flag("--no-rows", help="Without any text of a row, for private data.")
@gpu_cost("Price of a GPU for an hour. Default: run.gpu_cost.")
def report(
    job: Path, load: Load, *, output: str | None, no_rows: bool, price: Price | None
) -> None:
    """Write what came of a job's last run, and how it went, as one HTML page; print its path.

    JOB may be an output folder. The page loads nothing from elsewhere and can be sent as it is. A
    run writes it by itself, see run.report.

    Example: batchgen report jobs/quickstart.toml --output report.html --no-rows
    """
    from batchgen.api.endings import report_options
    from batchgen.api.jobs import is_output, output_of
    from batchgen.report_page.page import write_report

    config = None if is_output(job) else load(tuned=False)
    root = output_of(job) if config is None else config.root
    options = report_options(config, price, with_rows=not no_rows)
    out(write_report(root, options, Path(output) if output is not None else None))


@output_command
@JSON
def verify(root: Root, *, as_json: bool) -> None:
    """Read every byte of a job's output and prove the books. JOB may be an output folder.

    Exits 0 if all is well, 1 if something is damaged or the folder shows other files than the
    newest snapshot's; the next run redoes what can be redone. Damage that only older snapshots have
    is told, and no reason to fail.

    Example: batchgen verify jobs/quickstart.toml
    """
    from batchgen.store.verify import verify as verify_output

    verdict = verify_output(root)
    if as_json:
        out(as_line(verdict.as_dict()))
    else:
        for problem in [*verdict.problems, *verdict.older_problems]:
            out(problem, fg="red")
        out(
            f"{verdict.num_planned:,} planned = {verdict.num_ok:,} ok + {verdict.num_errors:,} "
            f"errors + {verdict.num_skipped:,} skipped + {verdict.num_left:,} left; "
            f"{verdict.num_files} files, {verdict.num_bytes:,} bytes, "
            f"{len(verdict.problems)} problems"
            + (f", {len(verdict.older_problems)} of older snapshots" * bool(verdict.older_problems))
        )
    sys.exit(ExitCode.FAULT if verdict.problems else ExitCode.COMPLETE)


@click.command()
def schema() -> None:
    """Print the JSON Schema of job files, for editors.

    Example: batchgen schema > job.schema.json
    """
    from batchgen.job.load import json_schema

    out(json.dumps(json_schema(), indent=1))


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
    from batchgen.pipeline.context import StopSwitch, ask_to_stop
    from batchgen.quality.try_out import TryOptions, try_out

    stop = StopSwitch()
    job = load()
    stop_on_signals(ask_to_stop(stop, job.run.grace_s))
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
