"""`run-batch`: a batch file of OpenAI's API in, its answers out, as `vllm run-batch` has it."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from batchgen.cli.common import flag, out
from batchgen.core.errors import ConfigError, ExitCode, OutputError, SourceError, one_line
from batchgen.core.runtime import Caller, called, stop_on_signals

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

STATE = ".batchgen"
"""Behind the name of the answers' file: the folder of the job that makes them."""
FETCHED = ".batchgen-input"
"""The same, where the input is a URL: what came from there. A signed URL goes into no plan."""
PUT_AGAIN_S, HTTP_TIMEOUT_S = (1, 5, 15), 1000


@click.command("run-batch", context_settings={"ignore_unknown_options": True})
@click.option("-i", "--input-file", required=True, metavar="FILE", help="Requests, a line each.")
@click.option(
    "-o",
    "--output-file",
    required=True,
    metavar="FILE",
    help="Answers and errors, a line each, in the order of the requests; or a URL to PUT them to.",
)
@click.option("--model", required=True, help="Folder of the model, or hub id.")
@click.option("--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="As for `run`.")
@flag("--fresh", help="Answer everything anew.")
@flag("--clean", help="Remove what is kept beside the answers once they are written.")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM'S FLAGS]...")
def run_batch(  # noqa: PLR0913 - the command's own options
    input_file: str,
    output_file: str,
    model: str,
    overrides: tuple[str, ...],
    flags: tuple[str, ...],
    *,
    fresh: bool,
    clean: bool,
) -> None:
    """Answer a batch file of OpenAI's API, as `vllm run-batch` does; a second start goes on.

    What is done so far, and the answers as Parquet, lie beside the answers, in FILE.batchgen; of a
    URL here, by the last part of its path.

    Example: batchgen run-batch -i requests.jsonl -o answers.jsonl --model Qwen/Qwen3-8B
    """
    from batchgen.api import job_run
    from batchgen.core.data import spare_pandas
    from batchgen.job.load import parse_job
    from batchgen.pipeline.context import RunOptions, StopSwitch, ask_to_stop
    from batchgen.source.openai import OpenAIReader
    from batchgen.views.batch_files import OUTPUT, write
    from batchgen.views.rows import output_of

    spare_pandas()
    url = urlsplit(output_file)
    is_url = url.scheme in ("http", "https")
    place = Path(Path(url.path).name or "batch") if is_url else Path(output_file)
    state = place.with_name(place.name + STATE)
    target = state / OUTPUT if is_url else place
    shown = f"{url.scheme}://{url.hostname}{url.path}" if is_url else output_file
    fetched = place.with_name(place.name + FETCHED)
    with called(Caller(str(state), is_folder=True)):
        if input_file.startswith(("http://", "https://")):
            input_file = _get(input_file, fetched)
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
        counts = write(found, target, target)
        if is_url:
            _put(target, output_file, shown)
    if clean:
        shutil.rmtree(state)
        fetched.unlink(missing_ok=True)
    kept = "" if clean else f"; what a second start needs is in {state}"
    out(f"{shown}: {counts.num_ok:,} answers, {counts.num_errors:,} errors{kept}")
    sys.exit(ExitCode.COMPLETE)


def _get(url: str, path: Path) -> str:
    """Fetch the input; return where it is now."""
    from http.client import HTTPException
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=HTTP_TIMEOUT_S) as found, path.open("wb") as file:  # noqa: S310 - http(s)
            shutil.copyfileobj(found, file)
    except (OSError, HTTPException) as error:
        raise SourceError(url.partition("?")[0], f"cannot be fetched: {one_line(error)}") from error
    return str(path)


def _put(path: Path, url: str, shown: str) -> None:
    """Upload a file; tried several times, as vLLM does."""
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    size = {"Content-Length": str(path.stat().st_size)}
    for wait_s in (*PUT_AGAIN_S, None):
        try:
            with path.open("rb") as file:
                asked = Request(url, data=file, headers=size, method="PUT")  # noqa: S310 - http(s)
                urlopen(asked, timeout=HTTP_TIMEOUT_S).close()  # noqa: S310
        except (OSError, HTTPException) as error:
            if wait_s is None or 400 <= getattr(error, "code", 0) < 500:
                problem = f"{shown}: cannot be written by PUT: {one_line(error)}"
                raise OutputError(f"{problem}; the answers are in {path}, run again") from error
            time.sleep(wait_s)
        else:
            return


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
