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
import glob
import io
import json
import math
import os
import re
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from batchgen.core.errors import ConfigError
from batchgen.core.places import bucket_url
from batchgen.core.runtime import read_file
from batchgen.job.model import Example, JobConfig, is_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from batchgen.job.run_table import RunConfig

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
_MAX_LEVELS = 100
_COMMIT = re.compile("[0-9a-f]{40}")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")
_T = TypeVar("_T")
_SURROGATE = re.compile("[\ud800-\udfff]")


def with_files(job: JobConfig, base: Path, where: str) -> JobConfig:
    """Make paths absolute and read the files that the job names.

    Args:
        job: As the job file has it.
        base: Where relative paths start.
        where: Begins the error's text.

    Raises:
        ConfigError: With every problem found.
    """
    named = _Named(base, job.run_date)
    inputs = [job.input.path] if isinstance(job.input.path, str) else job.input.path
    changes: dict[str, dict[str, Any]] = {
        "output": _output(job, named),
        "prompt": _prompt(job, named),
        "input": {"path": [named.place("input.path", path, is_dated=True) for path in inputs]},
        "model": {
            "name": named.model("model.name", job.model.name),
            "lora": {
                name: named.place(f"model.lora.{name}", path)
                for name, path in job.model.lora.items()
            },
        },
        "run": _run(job.run, named),
        "score": {
            "gold_path": (gold := job.score.gold_path) and named.place("score.gold_path", gold)
        },
    }
    if not named.problems and job.model.is_vllm:
        named.problems += _unpinned_code(job, changes["model"]["name"])
    if named.problems:
        raise ConfigError(where, named.problems)
    return job.changed(**changes)


class _Named:
    """Finds and reads what a job names, and notes what is wrong with it."""

    def __init__(self, base: Path, run_date: date) -> None:
        self._base = base
        self._run_date = run_date
        self.problems: list[str] = []

    def place(self, key: str, path: str, *, is_dated: bool = False) -> str:
        """Return a path as `absolute` makes it; as it is where that is refused."""
        try:
            return absolute(self._base, with_dates(path, self._run_date) if is_dated else path)
        except ValueError as error:
            self.problems.append(f"{key}: {error}")
            return path

    def model(self, key: str, name: str) -> str:
        """Return a model's folder or hub id; a folder beside the job file wins."""
        looks_local = name.startswith((".", "/", "~", "$"))
        local = Path(self.place(key, name))
        return str(local.resolve()) if name and (looks_local or local.is_dir()) else name

    def read(
        self, key: str, file: str, parse: Callable[[bytes], _T], what: str = ""
    ) -> tuple[str, _T] | None:
        """Return a file's path and what it holds; None where that cannot be read."""
        num_problems, path = len(self.problems), self.place(key, file)
        if len(self.problems) > num_problems:
            return None
        try:
            return path, parse(read_file(Path(path)))
        except (OSError, ValueError, RecursionError) as error:
            why = getattr(error, "strerror", None) or error
            self.problems.append(f"{key}: {path!r:.300} cannot be read{what}: {why}")
            return None

    def json(self, key: str, file: str) -> Any:  # noqa: ANN401 - any JSON
        """Return what a JSON file holds; None where it cannot be used."""

        def parse(data: bytes) -> tuple[Any, list[str]]:
            found = json.loads(data)
            return found, list(unusable(found, key))

        if (read := self.read(key, file, parse, " as JSON")) is None:
            return None
        _, (found, refused) = read
        self.problems += refused
        return None if refused else found

    def examples(self, key: str, file: str) -> list[Example]:
        """Return the examples of a JSONL file, as far as they can be used."""
        # Not splitlines: JSON texts may hold other line ends than this one.
        read = self.read(key, file, lambda data: data.decode("utf-8-sig").split("\n"))
        path, lines = read or (file, [])
        examples = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                example = Example.model_validate_json(line)
            except ValidationError as error:
                why = error.errors(include_url=False)[0]["msg"]
                expected = 'expected {"user": ..., "assistant": ...}'
                self.problems.append(f"{key}: {path}:{number}: {why}; {expected}")
                continue
            refused = unusable(example.model_dump(), "")
            self.problems += [f"{key}: {path}:{number}: {problem}" for problem in refused]
            examples.append(example)
        return examples


def _output(job: JobConfig, named: _Named) -> dict[str, Any]:
    """What changes in `[output]`."""
    changes: dict[str, Any] = {"path": named.place("output.path", job.output.path, is_dated=True)}
    if is_url(changes["path"]):
        try:
            changes["path"] = bucket_url(changes["path"])
        except ValueError as error:
            named.problems.append(f"output.path: {error}")
        for name, asked in (
            ("run.replicas", job.run.is_cluster),
            ("output.openai", job.output.openai),
        ):
            if asked:
                text = "is in an object store, which is not supported with"
                named.problems.append(f"output.path: {text} {name} yet, expected a folder")
    if isinstance(job.output.json_schema, str) and job.output.json_schema.lstrip()[:1] == "{":
        text = "output.schema: looks like JSON text, expected the name of a file, or a TOML table"
        named.problems.append(text)
    elif isinstance(job.output.json_schema, str):
        found = named.json("output.schema", job.output.json_schema)
        if found is not None and not isinstance(found, dict):
            named.problems.append("output.schema: expected a JSON object that is a JSON Schema")
        changes["json_schema"] = found
    return changes


def _prompt(job: JobConfig, named: _Named) -> dict[str, Any]:
    """What changes in `[prompt]`: texts, examples and tools instead of their files."""
    prompt, changes = job.prompt, dict[str, Any]()
    for name in ("user", "system", "chat_template"):
        key = f"{name}_file"
        file = getattr(prompt, key)
        if file is None or (read := named.read(f"prompt.{key}", file, _as_text)) is None:
            continue
        path, text = read
        named.problems += unusable(text, f"prompt.{key}")
        changes |= {key: path} if name == "chat_template" else {name: text, key: None}
    folders = prompt.images_folder or ("." if prompt.images is not None else [])
    folders = [folders] if isinstance(folders, str) else folders
    folders = [*folders, *_texts(job.model.engine.get("allowed_local_media_path"))]
    changes["images_folder"] = [named.place("prompt.images_folder", one) for one in folders]
    domains = _texts(job.model.engine.get("allowed_media_domains"))
    changes["image_domains"] = [*prompt.image_domains, *domains]
    if prompt.tools_file is not None:
        found = named.json("prompt.tools_file", prompt.tools_file)
        is_list = isinstance(found, list) and all(isinstance(tool, dict) for tool in found)
        if found is not None and not is_list:
            named.problems.append("prompt.tools_file: expected a JSON list of tools")
        changes |= {"tools": found, "tools_file": None}
    if prompt.examples_file is not None:
        examples = named.examples("prompt.examples_file", prompt.examples_file)
        changes |= {"examples": examples, "examples_file": None}
    return changes


def _texts(value: object) -> list[str]:
    """An option of vLLM's that is a text or a list of texts; empty for any other."""
    found = value if isinstance(value, list) else [value]
    return [text for text in found if isinstance(text, str) and text]


def _as_text(data: bytes) -> str:
    """A text of UTF-8, its line ends as Python has them."""
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()


def _run(run: RunConfig, named: _Named) -> dict[str, Any]:
    """What changes in `[run]`. A command without a slash is looked for in PATH, as a shell does."""
    changes: dict[str, Any] = {}
    if run.on_finish and "/" in run.on_finish[0]:
        program = named.place("run.on_finish", run.on_finish[0])
        changes["on_finish"] = [program, *run.on_finish[1:]]
    if run.metrics_file is not None:
        changes["metrics_file"] = named.place("run.metrics_file", run.metrics_file)
        if is_url(run.metrics_file):
            found = f"{run.metrics_file!r} is a URL, expected a file on this machine"
            named.problems.append(f"run.metrics_file: {found}")
    return changes


def _unpinned_code(job: JobConfig, name: str) -> list[str]:
    """A branch or tag can move to code that nobody has read."""
    is_safe = not job.model.trust_remote_code or Path(name).is_absolute()
    if is_safe or _COMMIT.fullmatch(job.model.revision or ""):
        return []
    return [
        "model.trust_remote_code: runs code from the hub, so model.revision has to be the commit "
        f"that you have read (40 hex digits), found {job.model.revision!r}"
    ]


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
            raise ValueError(f"{found[0]!r} is no date, did you mean {'{' + meant + '}'!r}?")
        return found[0]
    if path[: found.start()].endswith("{") and path[found.end() :].startswith("}"):
        raise ValueError(f"'{{{found[0]}}}' has two pairs of braces, expected one: {found[0]!r}")
    try:
        day = run_date + timedelta(days=NAMES[token[1]] + int((token[2] or "0d")[:-1]))
    except OverflowError:
        raise ValueError(f"{found[0]!r} is outside of the calendar, expected fewer days") from None
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


def absolute(base: Path, path: str) -> str:
    """From the folder of the job file, `~` and variables expanded; URLs stay as they are.

    Args:
        base: The folder.
        path: As in the job file, dates put in. What exists as it is written is meant so.

    Raises:
        ValueError: There is no such user or variable, or no file system takes such a path.
    """
    if is_url(path):
        return path
    scheme, colon, rest = path.partition(":/")
    if colon and re.fullmatch(r"[a-z][a-z0-9+.-]+", scheme) and not (base / f"{scheme}:").exists():
        msg = f"{path!r} looks like a URL with one slash, expected such as {scheme}://{rest}"
        raise ValueError(msg)
    path = _with_variables(base, path)
    encoded = os.fsencode(path)
    if len(encoded) > _MAX_PATH_BYTES or max(map(len, encoded.split(b"/"))) > _MAX_NAME_BYTES:
        raise ValueError(f"{path[:40]!r}... is too long for a path ({len(encoded)} bytes)")
    first = path.partition("/")[0]
    is_there = first.startswith("~") and (
        os.path.lexists(base / first) or any(char in first for char in "*?[")
    )
    try:
        full = base / (path if is_there else Path(path).expanduser())
    except RuntimeError:
        raise ValueError(f"{path!r}: there is no such user") from None
    # normpath, not resolve: a symlinked input keeps the name that the user gave it.
    normal = os.path.normpath(full)
    if ".." in full.parts and os.path.realpath(full) != os.path.realpath(normal):
        # Behind a link to a folder, `..` is where the link leads to.
        at = len(full.parts) - full.parts[::-1].index("..")
        return str(Path(os.path.realpath(Path(*full.parts[:at])), *full.parts[at:]))
    return normal


def _with_variables(base: Path, path: str) -> str:
    """Put variables of the environment in for `$NAME` and `${NAME}`, name by name of the path."""
    done: list[str] = []
    for name in path.split("/"):
        as_written = "/".join([*done, name])
        if "$" in name and not (os.path.lexists(base / as_written) or _matches(base, as_written)):
            done.append(_VARIABLE.sub(lambda found: _variable(path, found), name))
        else:
            done.append(name)
    return "/".join(done)


def _matches(base: Path, pattern: str) -> bool:
    return bool(glob.glob(pattern, root_dir=base))  # noqa: PTH207 - may be absolute


def _variable(path: str, found: re.Match[str]) -> str:
    value = os.environ.get(found[1] or found[2])
    if not value:
        msg = f"{path!r}: the environment has no variable {found[0]}, and there is no such file"
        raise ValueError(msg)
    return value


def unusable(value: object, key: str, levels: int = _MAX_LEVELS) -> Iterator[str]:
    """Tell texts that no file system, database or model takes, and numbers that JSON has not.

    Args:
        value: Parsed TOML or JSON.
        key: Where it stands, for the message.
        levels: Tables and lists that may be inside each other: whatever walks them recurses.
    """
    if isinstance(value, dict | list) and not levels:
        yield f"{_escaped(key)[:80]}...: more than {_MAX_LEVELS} tables and lists inside each other"
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from unusable(name, f"{key}.{name!r}" if key else repr(name), levels)
            yield from unusable(item, f"{key}.{name}" if key else str(name), levels - 1)
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from unusable(item, f"{key}[{at}]", levels - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{_escaped(key)}: holds {value}, expected a finite number"
    elif isinstance(value, str):
        if "\0" in value:
            yield f"{_escaped(key)}: holds a NUL character, expected text"
        if _SURROGATE.search(value):
            yield f"{_escaped(key)}: holds a lone surrogate, expected text"


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
