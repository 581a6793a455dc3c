"""What is generated from the code: the editor schema and the pages in docs/reference."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_origin

import click

from batchgen.cli import cli
from batchgen.job.load import json_schema
from batchgen.job.model import JobConfig
from batchgen.job.run_table import Table
from batchgen.store.result_files import RESULT_FIELDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "jobs" / "job.schema.json"
README = ROOT / "README.md"
REFERENCE = ROOT / "docs" / "reference"
WIDTH = 80

COLUMNS = {
    "status": "`ok` or `error`: every row ends as exactly one of them",
    "verdict": "`ok`, `truncated`, `invalid_json`, `schema_violation`, `refused` (by a rule), or "
    "`error` (no answer came)",
    "finish_reason": "vLLM's: `stop`, `length`, ...",
    "error_type": "what kind of error it is, such as `null_value` or `prompt_too_long`",
    "error": "why the row is an error, with file and line for a bad input row",
    "attempts": "how often the engine was asked",
    "seed": "of the last attempt; only with `output.with_seed`",
    "num_prompt_tokens": "tokens of the prompt",
    "num_cached_tokens": "those of them that the engine found in its prefix cache",
    "num_output_tokens": "tokens of the answer",
    "latency_s": "seconds from admission into the engine to the last token",
    "request_key": "hash of prompt and recipe: equal keys, equal requests",
    "run_id": "the run that computed the row",
    "model": "the model, with its commit",
    "recipe": "fingerprint of everything that changes answers",
    "engine": "the engine and its version",
}
"""Result column -> what it means; `output_columns` fails if one is missing here."""


def schema_text() -> str:
    """The editor schema as `batchgen schema` prints it."""
    return json.dumps(json_schema(), indent=1) + "\n"


def options() -> str:
    """Every key of a job file with its default and meaning."""
    lines = [
        "# Options",
        "",
        "Every key of a job file. `batchgen schema` prints their JSON Schema; a first line "
        "`#:schema job.schema.json` makes editors complete. `--set table.key=value` overrides "
        "any key from the shell.",
    ]
    for table, field in JobConfig.model_fields.items():
        model = field.annotation
        is_list = get_origin(model) is list
        model = get_args(model)[0] if is_list else model
        if not isinstance(model, type) or not issubclass(model, Table):  # A key at the top.
            row = f"| `{table}` | {_shown(field.default)} | {_one_line(field.description)} |"
            lines += ["", "| key | default | meaning |", "|---|---|---|", row]
            continue
        heading = f"[[{table}]]" if is_list else f"[{table}]"
        lines += ["", f"## `{heading}`", "", "| key | default | meaning |", "|---|---|---|"]
        for name, key in model.model_fields.items():
            default = "required" if key.is_required() else _shown(key.default)
            lines.append(f"| `{key.alias or name}` | {default} | {_one_line(key.description)} |")
    return "\n".join(lines) + "\n"


def _shown(default: object) -> str:
    return "" if default in (None, "", {}, []) else f"`{json.dumps(default)}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def commands() -> str:
    """The help of every command."""
    lines = ["# Commands", "", "What `--help` says of each."]
    for name, help_text in _helps(cli, "batchgen"):
        lines += ["", f"## `{name}`", "", "```text", *help_text.splitlines(), "```"]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _helps(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
    how = {"terminal_width": WIDTH, "max_content_width": WIDTH, **cli.context_settings}
    context = click.Context(command, info_name=name, **how)
    yield name, command.get_help(context)
    for inner, child in sorted(getattr(command, "commands", {}).items()):
        yield from _helps(child, f"{name} {inner}")


def output_columns() -> str:
    """The columns that every output has beside the carried ones and the answer's."""
    lines = [
        "# Output columns",
        "",
        "`part-*.parquet` in `output.path` hold the carried input columns, in input order, then "
        "these, each with the prefix `gen_` (`output.prefix`). First the answer:",
        "",
        "| column | when | type |",
        "|---|---|---|",
        "| `output` | `output.schema` | the schema's: struct, list, string, int64, double, bool; "
        "JSON text where Arrow has no type for it, said by `batchgen check` |",
        "| the schema's fields | with `flatten` | as above, a column each |",
        "| `label` | `output.choice` | string; with `sampling.n` the majority's |",
        "| `agreement` | `choice` and `sampling.n` | float: the majority's share |",
        '| `embedding`, `num_chunks` | task `embed`; `too_long = "chunk"` | float32 or float16, a '
        "list of fixed size; int32 |",
        "| `label`, `probability`, `probabilities` | task `classify` | string, float, struct: a "
        "float for each label |",
        "| `labels` | task `classify`, several labels | list of string |",
        "| `score` | task `score` | float |",
        "| `probabilities` | `sampling.logprobs` with a choice or enums | struct: a float for each "
        "label, null where the answer's path does not tell |",
        "| `text` | task `generate` | string: the answer as it came |",
        "| `reasoning` | `model.reasoning_parser` | string |",
        "| `tool_calls` | `model.tool_call_parser` | list of {name, arguments} |",
        "| `logprobs` | `sampling.logprobs` without labels | list of {token, logprob, top} |",
        "",
        "With `sampling.n` greater than 1 answer columns are lists, with a value for each sample. "
        "In an error row they are null; `text` is kept if an answer came. Then what is known of "
        "the row:",
        "",
        "| column | type | meaning |",
        "|---|---|---|",
        *(f"| `{f.name}` | {f.type} | {COLUMNS[f.name]} |" for f in RESULT_FIELDS),
    ]
    return "\n".join(lines) + "\n"


def generated() -> Mapping[Path, str]:
    """Every generated file and what it should hold."""
    return {
        SCHEMA: schema_text(),
        REFERENCE / "options.md": options(),
        REFERENCE / "commands.md": commands(),
        REFERENCE / "output-columns.md": output_columns(),
    }


def main() -> None:
    """Rewrite them all."""
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
    sys.stdout.write("docs are up to date\n")


if __name__ == "__main__":
    main()
