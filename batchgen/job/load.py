"""TOML text to `JobConfig`: overrides, paths, the files that it names, every mistake in one error.

Relative paths become absolute here, so that nothing later depends on the working directory.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from batchgen.core.errors import ConfigError, nearest
from batchgen.job.credentials import find_credentials, redacted
from batchgen.job.model import Example, JobConfig
from batchgen.job.paths import absolute, bad_path, is_url, today, with_dates

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import date

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

    from batchgen.job.model import RunConfig


_COMMIT = re.compile("[0-9a-f]{40}")
# Union members show up in pydantic's paths, where they are no keys of the file; each member tells
# of the same mistake. A number's and a literal's have names that no key of the models has.
_MEMBERS = frozenset({"str", "list[str]", "dict[str,any]"})
_MEMBER = re.compile(r"constrained-\w+|literal\[.*\]")
_UNIONS = {
    "replicas": "at least 1, or 'auto'",
    "path": "a path or a list of paths",
    "schema": "a path or a table",
    "stop": "a text or a list of texts",
    "assistant": "a text or a table",
}
_TABLE_LISTS = frozenset({"retry", "prompt.examples", "prompt.tools"})
_NOT_EMPTY = {
    "choice": "at least one label",
    "on": "at least one verdict",
    "path": "at least one path",
}


def load_job(path: Path, overrides: Sequence[str] = (), run_date: date | None = None) -> JobConfig:
    """Read a job file.

    Args:
        path: The TOML file; relative paths in it are relative to its folder.
        overrides: `table.key=value` each; the value is TOML, or else a plain string.
        run_date: What `{date}` in paths means; None: today in this machine's zone.

    Raises:
        ConfigError: With every problem found.
    """
    where = str(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(where, ["does not exist, expected a job file"]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(where, [f"cannot be read as UTF-8 text: {error}"]) from error
    except (ValueError, RecursionError) as error:  # A number of 5,000 digits, 1,000 brackets.
        raise ConfigError(where, [f"is not TOML: {error}"]) from error
    base = path.parent.resolve()
    return parse_job(tables, base=base, where=where, overrides=overrides, run_date=run_date)


def parse_job(
    tables: Mapping[str, Any],
    *,
    base: Path,
    where: str,
    overrides: Sequence[str] = (),
    run_date: date | None = None,
) -> JobConfig:
    """Make a `JobConfig` of parsed TOML, or of the same shape built in Python.

    Args:
        tables: Not changed.
        base: Where relative paths start.
        where: Begins the error's text.
        overrides: See `load_job`.
        run_date: See `load_job`.

    Raises:
        ConfigError: With every problem found.
    """
    try:
        merged: dict[str, Any] = json.loads(json.dumps(dict(tables), default=str))
        problems = [problem for text in overrides if (problem := _apply(merged, text))]
        # First and alone: what else is wrong would be told with the values.
        refused = find_credentials(merged) or list(unusable(merged, ""))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(where, [f"holds what TOML cannot: {error}"]) from error
    if refused:
        raise ConfigError(where, refused)
    try:
        job = JobConfig.model_validate(merged)
    except ValidationError as error:
        found = [_problem(detail) for detail in error.errors(include_url=False)]
        problems += dict.fromkeys(found)  # A union's members tell the same mistake each.
        raise ConfigError(where, problems) from None
    if problems:
        raise ConfigError(where, problems)
    return _with_files(job.dated(run_date or today()), base, where)


def _apply(tables: dict[str, Any], override: str) -> str | None:
    """Set one `table.key=value` in place; return what is wrong with it, if anything."""
    key, equals, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not parents or not last:
        return f"--set {redacted(override)}: expected table.key=value, for example run.flush_s=10"
    at = tables
    for parent in parents:
        at = at.setdefault(parent, {})
        if not isinstance(at, dict):
            return f"--set {redacted(override)}: {parent!r} is a value, expected a table"
    at[last] = _toml_value(text.strip())
    return None


def _toml_value(text: str) -> Any:  # noqa: ANN401 - any TOML value, checked by the models
    try:
        value = tomllib.loads(f"value = {text}")["value"]
        return json.loads(json.dumps(value, default=str))
    except (ValueError, RecursionError):
        return text


def _problem(detail: ErrorDetails) -> str:
    """One pydantic finding as `key: what is wrong, what was expected`."""
    parts = [str(part) for part in detail["loc"]]
    location = [part for part in parts if not _is_member(part)]
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key{_did_you_mean(location)}"
    if detail["type"] == "missing":
        return f"{key}: missing{_meaning(location)}"
    if detail["type"] == "value_error":
        return f"{key}: {detail['ctx']['error']}"
    given = f"{detail['input']!r:.60}"
    if detail["type"] == "model_type":
        return f"{key}: {given} is wrong, expected: the table [{key}]"
    expected = _expected(detail["msg"])
    is_kind = detail["type"] in {"string_type", "list_type", "dict_type"}
    if _MEMBER.fullmatch(parts[-1]) or (parts[-1] in _MEMBERS and is_kind):
        expected = _UNIONS.get(location[-1], expected)
    elif key in _TABLE_LISTS and isinstance(detail["input"], dict):
        expected = f"[[{key}]], a list of tables"
    elif key == "run.on_finish" and detail["type"] == "list_type":
        expected = "a list: [program, arguments...]"
    elif detail["type"] == "too_short":
        expected = _NOT_EMPTY.get(location[-1], expected)
    return f"{key}: {given} is wrong, expected: {expected}"


def _is_member(part: str) -> bool:
    return part in _MEMBERS or _MEMBER.fullmatch(part) is not None


def _expected(message: str) -> str:
    for start in ("Input should be ", "Value should be ", "String should have "):
        message = message.removeprefix(start)
    return message


def _table_at(location: Sequence[str]) -> type[BaseModel] | None:
    table: type[BaseModel] = JobConfig
    for name in location:
        if name.isdigit():  # Where in a list of tables.
            continue
        field = _fields(table).get(name)
        kinds = [field.annotation, *get_args(field.annotation)] if field else []
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return None
        table = inner[0]
    return table


def _did_you_mean(location: Sequence[str]) -> str:
    *parents, last = location
    table = _table_at(parents)
    if table is None:
        return ""
    homes = [name for name in JobConfig.model_fields if _has_key(_table_at([name]), last)]
    if homes:
        return f", did you mean '{homes[0]}.{last}'?"
    if near := nearest(last, _fields(table)):
        return f", did you mean {near!r}?"
    if list(parents) == ["model"]:
        return "; vLLM's other options go in [model.engine]"
    return f", expected one of: {', '.join(_fields(table))}"


def _has_key(table: type[BaseModel] | None, key: str) -> bool:
    return table is not None and key in _fields(table)


def _fields(table: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields by the names that they have in a job file."""
    return {field.alias or name: field for name, field in table.model_fields.items()}


def _meaning(location: Sequence[str]) -> str:
    """What a missing key is, to go behind `missing`."""
    table = _table_at(location)
    if table is not None:
        return f", expected the table [{'.'.join(location)}]"
    parent = _table_at(location[:-1])
    field = _fields(parent).get(location[-1]) if parent else None
    if field is None or not field.description:
        return ", expected a value"
    return f"; it is: {field.description.splitlines()[0]}"


def _with_files(job: JobConfig, base: Path, where: str) -> JobConfig:
    """Make paths absolute and read the files that the job names."""
    problems: list[str] = []
    prompt = job.prompt.model_dump()
    for name in ("user", "system", "chat_template"):
        key = f"{name}_file"
        file = getattr(job.prompt, key)
        if file is None:
            continue
        path = base / file
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"prompt.{key}: {str(path)!r:.300} cannot be read: {_reason(error)}")
            continue
        problems += unusable(text, f"prompt.{key}")
        if name != "chat_template":
            prompt[name], prompt[key] = text, None
        else:
            prompt[key] = str(path)
    output = _read_into(job, prompt, base, problems)
    if job.prompt.images is not None:
        prompt["images_folder"] = absolute(base, job.prompt.images_folder or ".")
    places = _places_of(job, problems)
    for key, paths in places.items():
        problems += [f"{key}: {why}" for path in paths if (why := bad_path(base, path))]
    if problems:
        raise ConfigError(where, problems)
    name = _model_name(base, job.model.name)
    if job.model.is_vllm and (why := _unpinned_code(job, name)):
        raise ConfigError(where, [why])
    return job.model_copy(
        update={
            "prompt": job.prompt.model_copy(update=prompt),
            "input": job.input.model_copy(
                update={"path": [absolute(base, path) for path in places["input.path"]]}
            ),
            "output": job.output.model_copy(
                update={**output, "path": absolute(base, places["output.path"][0])}
            ),
            "run": job.run.model_copy(update=_run_paths(job.run, base)),
            "model": job.model.model_copy(
                update={
                    "name": name,
                    "lora": {key: absolute(base, path) for key, path in job.model.lora.items()},
                }
            ),
        }
    )


def _unpinned_code(job: JobConfig, name: str) -> str | None:
    """A branch or tag can move to code that nobody has read."""
    is_folder = Path(name).is_absolute()
    if not job.model.trust_remote_code or is_folder:
        return None
    if _COMMIT.fullmatch(job.model.revision or ""):
        return None
    return (
        "model.trust_remote_code: runs code from the hub, so model.revision has to be the commit "
        f"that you have read (40 hex digits), found {job.model.revision!r}"
    )


def _model_name(base: Path, name: str) -> str:
    """A folder beside the job file wins over a hub id of the same spelling."""
    looks_local = name.startswith((".", "/", "~"))
    local = Path(absolute(base, name))
    return str(local.resolve()) if name and (looks_local or local.is_dir()) else name


def json_schema() -> dict[str, Any]:
    """JSON Schema of job files, for editors."""
    schema = JobConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


_SURROGATE = re.compile("[\ud800-\udfff]")


def _places_of(job: JobConfig, problems: list[str]) -> dict[str, list[str]]:
    """The paths that `bad_path` is to see, by key; those of input and output with their dates.

    Args:
        job: Before its paths are made absolute.
        problems: Gets what is wrong with dates and with URLs where a file is expected.
    """
    inputs = [job.input.path] if isinstance(job.input.path, str) else job.input.path
    places = {
        "output.path": _with_dates("output.path", [job.output.path], job.run_date, problems),
        "input.path": _with_dates("input.path", inputs, job.run_date, problems),
    }
    problems += [
        f"output.path: {_no_folder(path)}" for path in places["output.path"] if is_url(path)
    ]
    if job.model.name:
        places["model.name"] = [job.model.name]
    if job.run.on_finish:
        places["run.on_finish"] = job.run.on_finish[:1]
    if job.run.metrics_file is not None:
        places["run.metrics_file"] = [job.run.metrics_file]
        if is_url(job.run.metrics_file):
            found = f"{job.run.metrics_file!r} is a URL, expected a file on this machine"
            problems.append(f"run.metrics_file: {found}")
    return places


def _no_folder(url: str) -> str:
    """What is wrong with an output at a URL: nothing there could be published yet."""
    scheme, _, path = url.partition("://")
    instead = f" such as {path!r}" if scheme == "file" and path else ", local or mounted"
    return f"{url!r:.300} is a URL, expected a folder{instead}; object stores are not supported yet"


def _with_dates(key: str, paths: Sequence[str], run_date: date, problems: list[str]) -> list[str]:
    dated = []
    for path in paths:
        try:
            dated.append(with_dates(path, run_date))
        except ValueError as error:
            problems.append(f"{key}: {error}")
    return dated


def _run_paths(run: RunConfig, base: Path) -> dict[str, Any]:
    """What changes in `[run]`. A command without a slash is looked for in PATH, as a shell does."""
    changes: dict[str, Any] = {}
    if run.on_finish and "/" in run.on_finish[0]:
        changes["on_finish"] = [absolute(base, run.on_finish[0]), *run.on_finish[1:]]
    if run.metrics_file is not None:
        changes["metrics_file"] = absolute(base, run.metrics_file)
    return changes


def _read_into(
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
        problems.append(f"{key}: {str(path)!r:.300} cannot be read as JSON: {_reason(error)}")
        return None
    problems += refused
    return None if refused else found


def _read_examples(path: Path, problems: list[str]) -> list[Example]:
    key = "prompt.examples_file"
    try:
        # Not splitlines: JSON texts may hold other line ends than this one.
        lines = path.read_bytes().decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{key}: {str(path)!r:.300} cannot be read: {_reason(error)}")
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


def _reason(error: Exception) -> str:
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
