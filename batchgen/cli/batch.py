"""`run-batch`: a batch file of OpenAI's API in, its answers out, as `vllm run-batch` has it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchgen.cli.common import flag, out
from batchgen.core.errors import ConfigError, ExitCode
from batchgen.core.runtime import Caller, called, stop_on_signals

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

STATE = ".batchgen"
"""Behind the name of the answers' file: the folder of the job that makes them."""


@click.command("run-batch", context_settings={"ignore_unknown_options": True})
@click.option("-i", "--input-file", required=True, metavar="FILE", help="Requests, a line each.")
@click.option(
    "-o",
    "--output-file",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Answers and errors, a line each, in the order of the requests.",
)
@click.option("--model", required=True, help="Folder of the model, or hub id.")
@click.option("--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="As for `run`.")
@flag("--fresh", help="Answer everything anew.")
@flag("--clean", help="Remove what is kept beside the answers once they are written.")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM'S FLAGS]...")
def run_batch(  # noqa: PLR0913 - the command's own options
    input_file: str,
    output_file: Path,
    model: str,
    overrides: tuple[str, ...],
    flags: tuple[str, ...],
    *,
    fresh: bool,
    clean: bool,
) -> None:
    """Answer a batch file of OpenAI's API, as `vllm run-batch` does; a second start goes on.

    What is done so far, and the answers as Parquet, lie beside the answers, in FILE.batchgen.

    Example: batchgen run-batch -i requests.jsonl -o answers.jsonl --model Qwen/Qwen3-8B
    """
    from batchgen.api import job_run
    from batchgen.core.data import spare_pandas
    from batchgen.job.load import parse_job
    from batchgen.pipeline.context import RunOptions, StopSwitch, ask_to_stop
    from batchgen.source.openai import OpenAIReader
    from batchgen.views.batch_files import write
    from batchgen.views.rows import output_of

    spare_pandas()
    state = output_file.with_name(output_file.name + STATE)
    with called(Caller(str(state), is_folder=True)):
        tables: dict[str, Any] = {
            "task": OpenAIReader().task(input_file),
            "input": {"path": input_file, "format": "openai"},
            "model": _model(model, flags),
            "output": {"path": str(state)},
        }
        job = parse_job(tables, base=Path.cwd(), where="run-batch", overrides=overrides)
        stop = StopSwitch()
        stop_on_signals(ask_to_stop(stop, job.run.grace_s))
        summary = job_run(job, stop, RunOptions(fresh=fresh)).run()
        if summary.exit_code:
            out(summary.as_text(), err=True)
            sys.exit(summary.exit_code)
        found = output_of(state)
        assert found is not None  # noqa: S101 - the run has published
        counts = write(found, output_file, output_file)
    if clean:
        shutil.rmtree(state)
    kept = "" if clean else f"; what a second start needs is in {state}"
    out(f"{output_file}: {counts.num_ok:,} answers, {counts.num_errors:,} errors{kept}")
    sys.exit(ExitCode.COMPLETE)


def _model(name: str, flags: Sequence[str]) -> dict[str, Any]:
    """Turn vLLM's flags into `[model]`."""
    from batchgen.job.model import ModelConfig

    given = dict(_flags(flags))
    given.pop("enable_auto_tool_choice", None)  # The parser says it.
    model: dict[str, Any] = {"name": name, "engine": {}}
    if (modules := given.pop("lora_modules", None)) is not None:
        model["lora"] = dict(
            (one["name"], one["path"]) if isinstance(one, dict) else str(one).partition("=")[::2]
            for one in (modules if isinstance(modules, list) else [modules])
        )
    for key, value in given.items():
        (model if key in ModelConfig.model_fields else model["engine"])[key] = value
    return model


def _flags(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield each of vLLM's flags as its `LLM(...)` has it: `--max-model-len 4096`, `--no-x`."""
    rest = list(words)
    while rest:
        word, *rest = rest
        if not word.startswith("--"):
            raise ConfigError("run-batch", [f"{word!r} is no flag, expected such as --dtype auto"])
        key, equals, value = word[2:].partition("=")
        name = key.replace("-", "_")
        values = [_value(value)] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(_value(rest.pop(0)))
        if values:
            yield name, values if len(values) > 1 else values[0]
        else:
            yield name.removeprefix("no_"), not name.startswith("no_")


def _value(text: str) -> Any:  # noqa: ANN401 - whatever the flag takes
    try:
        return json.loads(text)
    except ValueError:
        return text
