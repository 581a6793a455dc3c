"""Paths of a job file, and the files that it names: made absolute, checked, read.

Relative paths become absolute here, so that nothing later depends on the working directory. Dates
are put in before:

    {date} {run_date}   the day of the run; both are the same
    {yesterday}         the day before
    -3d +1d             days off, after any of them
    :%Y/%m/%d           how it is written; ISO, 2026-11-23, if it is not said

Braces around anything else stay as they are, unless it looks like one of these mistyped.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from batchgen.core.errors import ConfigError
from batchgen.job.model import Example, JobConfig, is_url

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from batchgen.job.model import RunConfig

NAMES = {"date": 0, "run_date": 0, "yesterday": -1}
"""Name -> days after the day of the run."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_TOKEN = re.compile(r"(\w+?)([+-]\d+d)?(?::(.*))?", re.DOTALL)
_OFFSET = re.compile(r"\s*[+-]\s*\d+\s*\w*$")
# Of a day; %H and the like would be 00 without a word. Names of days and months are English.
_DIRECTIVES = frozenset("aAbBdFGgjmuUVwWyY%")
_OTHER_WORDS = {"today": "date", "now": "date", "tomorrow": "run_date+1d"}
_LIKENESS = 0.82  # `update` and `data` are no mistyped `date`, `yesterdy` is `yesterday`.
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 4000
_COMMIT = re.compile("[0-9a-f]{40}")
_SURROGATE = re.compile("[\ud800-\udfff]")


def with_files(job: JobConfig, base: Path, where: str) -> JobConfig:
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
    folders = job.prompt.images_folder or ("." if job.prompt.images is not None else [])
    folders = [folders] if isinstance(folders, str) else folders
    engine = job.model.engine
    folders = [*folders, *_texts(engine.get("allowed_local_media_path"))]
    prompt["images_folder"] = [absolute(base, folder) for folder in folders]
    prompt["image_domains"] += _texts(engine.get("allowed_media_domains"))
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


def _texts(value: object) -> list[str]:
    """An option of vLLM's that is a text or a list of texts; empty for any other."""
    found = value if isinstance(value, list) else [value]
    return [text for text in found if isinstance(text, str) and text]


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
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
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


def with_dates(path: str, run_date: date) -> str:
    """Put dates into a path.

    Args:
        path: As in the job file.
        run_date: What `{date}` means.

    Raises:
        ValueError: A token is mistyped; the text says which and what was expected.
    """
    return _BRACES.sub(lambda found: _resolved(path, found, run_date), path)


def _resolved(path: str, found: re.Match[str], run_date: date) -> str:
    body = found[1]
    token = _TOKEN.fullmatch(body)
    if token is None or token[1] not in NAMES:
        if meant := _meant(body):
            msg = f"{found[0]!r} is no date, did you mean {'{' + meant + '}'!r}?"
            raise ValueError(msg)
        return found[0]
    if path[: found.start()].endswith("{") and path[found.end() :].startswith("}"):
        msg = f"'{{{found[0]}}}' has two pairs of braces, expected one: {found[0]!r}"
        raise ValueError(msg)
    try:
        day = run_date + timedelta(days=NAMES[token[1]] + int((token[2] or "0d")[:-1]))
    except OverflowError:
        msg = f"{found[0]!r} is outside of the calendar, expected fewer days"
        raise ValueError(msg) from None
    return day.isoformat() if token[3] is None else _written(day, token[3], found[0])


def _written(day: date, layout: str, token: str) -> str:
    directives = re.findall("%(.?)", layout, re.DOTALL)
    # `%%` alone is no date either: every day would have the same path.
    if not set(directives) - {"%"} or not _DIRECTIVES.issuperset(directives):
        msg = f"{token!r} does not say how to write a day, expected for example '{{date:%Y/%m/%d}}'"
        raise ValueError(msg)
    # One directive at a time: the text between them is none of the C library's business.
    return re.sub("%.", lambda found: day.strftime(found[0]), layout)


def _meant(body: str) -> str | None:
    """The token that this looks like a slip of, None if it looks like something else."""
    name, colon, layout = body.partition(":")
    offset = _OFFSET.search(name)
    word = (name[: offset.start()] if offset else name).strip().lower()
    meant = _OTHER_WORDS.get(word)
    if meant is None:
        close = difflib.get_close_matches(word, NAMES, n=1, cutoff=_LIKENESS)
        if not close:
            return None
        number = re.sub(r"\s|\D+$", "", offset[0]) if offset else ""
        meant = close[0] + (f"{number}d" if number else "")
    return meant + (f":{layout.strip()}" if colon and layout.strip() else "")


def bad_path(base: Path, path: str) -> str | None:
    """What no file system takes, told before one is asked."""
    if is_url(path):
        return None
    encoded = os.fsencode(path)
    if len(encoded) > _MAX_PATH_BYTES or max(map(len, encoded.split(b"/"))) > _MAX_NAME_BYTES:
        return f"{path[:40]!r}... is too long for a path ({len(encoded)} bytes)"
    try:
        absolute(base, path)
    except RuntimeError:
        return f"{path!r}: there is no such user"
    return None


def absolute(base: Path, path: str) -> str:
    """From the folder of the job file; URLs stay.

    Raises:
        RuntimeError: It begins with `~user`, and there is no such user, and no such file.
    """
    if is_url(path):
        return path
    first = path.partition("/")[0]
    is_there = first.startswith("~") and (
        os.path.lexists(base / first) or any(char in first for char in "*?[")
    )
    # normpath, not resolve: a symlinked input keeps the name that the user gave it.
    return os.path.normpath(base / (path if is_there else Path(path).expanduser()))


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
