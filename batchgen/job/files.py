"""The files that a job names, read into it: schema, examples, tools; and what no text may hold."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from batchgen.job.model import Example

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from batchgen.job.model import JobConfig

_SURROGATE = re.compile("[\ud800-\udfff]")


def read_into(
    job: JobConfig, prompt: dict[str, Any], base: Path, problems: list[str]
) -> dict[str, Any]:
    """Read schema, examples and tools from their files.

    Args:
        job: As the job file has it.
        prompt: The `[prompt]` table, changed in place.
        base: Where relative paths start.
        problems: Gets what is wrong with the files.

    Returns:
        What changes in `[output]`.
    """
    output: dict[str, Any] = {}
    if isinstance(job.output.json_schema, str):
        found = _read_json(base / job.output.json_schema, "output.schema", problems)
        if found is not None and not isinstance(found, dict):
            problems.append("output.schema: expected a JSON object that is a JSON Schema")
        output["json_schema"] = found
    if job.prompt.tools_file is not None:
        found = _read_json(base / job.prompt.tools_file, "prompt.tools_file", problems)
        if found is not None and not (
            isinstance(found, list) and all(isinstance(tool, dict) for tool in found)
        ):
            problems.append("prompt.tools_file: expected a JSON list of tools")
        prompt["tools"], prompt["tools_file"] = found, None
    # Nested tables stay what they are; `model_dump` took them apart.
    prompt["examples"] = job.prompt.examples
    if job.prompt.examples_file is not None:
        examples = _read_examples(base / job.prompt.examples_file, problems)
        prompt["examples"], prompt["examples_file"] = examples, None
    return output


def _read_json(path: Path, key: str, problems: list[str]) -> Any:  # noqa: ANN401 - any JSON
    try:
        found = json.loads(path.read_bytes())
        refused = list(unusable(found, key))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{key}: {str(path)!r:.300} cannot be read as JSON: {reason(error)}")
        return None
    problems += refused
    return None if refused else found


def _read_examples(path: Path, problems: list[str]) -> list[Example]:
    key = "prompt.examples_file"
    try:
        # Not splitlines: JSON texts may hold other line ends than this one.
        lines = path.read_bytes().decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{key}: {str(path)!r:.300} cannot be read: {reason(error)}")
        return []
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            example = Example.model_validate_json(line)
        except ValidationError as error:
            why = error.errors(include_url=False)[0]["msg"]
            expected = 'expected {"user": ..., "assistant": ...}'
            problems.append(f"{key}: {path}:{number}: {why}; {expected}")
            continue
        refused = unusable(example.model_dump(), "")
        problems += [f"{key}: {path}:{number}: {problem}" for problem in refused]
        examples.append(example)
    return examples


def reason(error: Exception) -> str:
    """Why a file cannot be read, without its name."""
    return str(getattr(error, "strerror", None) or error)


def unusable(value: object, key: str) -> Iterator[str]:
    """Tell texts that no file system, database or model takes, and numbers that JSON has not.

    Args:
        value: Parsed TOML or JSON.
        key: Where it stands, for the message.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            yield from unusable(name, f"{key}.{name!r}" if key else repr(name))
            yield from unusable(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from unusable(item, f"{key}[{at}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{_escaped(key)}: holds {value}, expected a finite number"
    elif isinstance(value, str):
        if "\0" in value:
            yield f"{_escaped(key)}: holds a NUL character, expected text"
        if _SURROGATE.search(value):
            yield f"{_escaped(key)}: holds a lone surrogate, expected text"


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
