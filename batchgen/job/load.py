"""TOML text to `JobConfig`: overrides, refused credentials, every mistake in one error.

A job's tables go into plans, manifests and error texts, and its file into version control: what
looks like a credential is named by its key, never repeated, and refused before anything is kept.
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from batchgen.core.errors import ConfigError, nearest
from batchgen.core.runtime import option, read_text, toml_value
from batchgen.job.files import unusable, with_files
from batchgen.job.model import JobConfig, today
from batchgen.job.task import is_batch_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import date
    from pathlib import Path

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails


# Union members show up in pydantic's paths, where they are no keys of the file; each member tells
# of the same mistake. A number's and a literal's have names that no key of the models has.
_MEMBERS = frozenset({"str", "list[str]", "dict[str,any]"})
_MEMBER = re.compile(r"constrained-\w+|literal\[.*\]")
_UNIONS = {
    "replicas": "at least 1, or 'auto'",
    "path": "a path or a list of paths",
    "images_folder": "a path or a list of paths",
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

_MEANT = {
    **dict.fromkeys(("output.dir", "output.folder"), "path"),
    "model.model": "name",
    "prompt.prompt": "user",
    "sampling.prompt_logprobs": 'task = "loglikelihood"',
    "sampling.temp": "temperature",
}
"""Keys that others call so -> what they are here."""

_SECRET_KEY = re.compile(
    r"(?:.*[_-])?(?:api_?key|secret|password|passwd|credentials?|private_key|authorization"
    r"|access_key|access_key_id|secret_key|account_key|connection_string)"
    r"|(?:hf|use_auth|auth|access|api|bearer|session|security|refresh|sas)?_?token",
    re.IGNORECASE,
)
_USER_INFO = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s:@?#]*:[^/\s@?#]+@", re.IGNORECASE)
_SIGNED = re.compile(
    r"://\S*[?&](?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|sig|signature|token"
    r"|(?:access|auth|api|sas|session)[_-]?token|access_?key(?:_?id)?|AWSAccessKeyId|api_?key|key"
    r"|secret\w*|password|auth)=[^&\s]",
    re.IGNORECASE,
)
_KNOWN_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AIza[\w-]{35}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}\b|xox[abpr]-[\w-]{20,})|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_INSTEAD = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "hf": "the environment variable HF_TOKEN, or `hf auth login`",
}
_ELSEWHERE = "an environment variable of the service, or fsspec's own files in ~/.config/fsspec"
_SCHEMES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az"}
_COLUMN_NAMES = "input.types"
"""Its keys are names of columns, and `password` is a fine one."""


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
    text = ""
    try:
        text = read_text(path, "utf-8-sig")
        tables = tomllib.loads(text)
    except FileNotFoundError as error:
        raise ConfigError(where, ["does not exist, expected a job file"]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(where, [f"cannot be read as UTF-8 text: {error}"]) from error
    except (ValueError, RecursionError) as error:  # A number of 5,000 digits, 1,000 brackets.
        raise ConfigError(where, [f"is not TOML: {error}{_bad_line(str(error), text)}"]) from error
    base = path.parent.resolve()
    return parse_job(tables, base=base, where=where, overrides=overrides, run_date=run_date)


def _bad_line(problem: str, text: str) -> str:
    """Show the line of a TOML text that a problem is about, and what it most often lacks."""
    found = re.search(r"at line (\d+)", problem)
    lines = text.splitlines()
    if found is None or not 0 < int(found[1]) <= len(lines):
        return ""
    line = lines[int(found[1]) - 1].strip()
    bare = re.fullmatch(r"([\w.-]+)\s*=\s*([^\s\"'\[{#][^\"'#]*?)\s*(?:#.*)?", line)
    shown = redacted(line[:200])
    if bare is None or shown != repr(line):
        return f": {shown}"
    return f': {shown}; a text needs quotes: {bare[1]} = "{bare[2]}"'


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
    if is_batch_file(merged, base):
        merged["input"]["format"] = "openai"
    try:
        job = JobConfig.model_validate(merged)
    except ValidationError as error:
        found = [_problem(detail) for detail in error.errors(include_url=False)]
        problems += dict.fromkeys(found)  # A union's members tell the same mistake each.
        raise ConfigError(where, problems) from None
    if problems:
        raise ConfigError(where, problems)
    return with_files(job.dated(run_date or today()), base, where)


def _apply(tables: dict[str, Any], override: str) -> str | None:
    """Set one `table.key=value` in place; return what is wrong with it, if anything."""
    key, equals, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not parents or not last:
        expected = "expected table.key=value, for example run.flush_s=10"
        return f"{option('--set')} {redacted(override)}: {expected}"
    at = tables
    for parent in parents:
        at = at.setdefault(parent, {})
        if not isinstance(at, dict):
            return (
                f"{option('--set')} {redacted(override)}: {parent!r} is a value, expected a table"
            )
    at[last] = toml_value(text)
    return None


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
    if near := _MEANT.get(".".join(location)) or nearest(last, _fields(table)):
        return f", did you mean {near!r}?"
    if list(parents) == ["model"]:
        return "; vLLM's other options go in [model.engine]"
    if list(parents) == ["sampling"]:
        return "; vLLM's other sampling parameters go in [sampling.extra]"
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


def json_schema() -> dict[str, Any]:
    """JSON Schema of job files, for editors."""
    schema = JobConfig.model_json_schema()
    schema["required"].remove("sampling")  # With a task that generates it is: `parse_job` says so.
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def find_credentials(tables: dict[str, Any]) -> list[str]:
    """Return a line for every credential in the tables of a job, without the credential."""
    return [
        f"{key}: {what}, which job files must not hold; take it out (and revoke it if the file "
        f"was shared) and use {instead}"
        for key, what, instead in _found(tables, "")
    ]


def redacted(override: str) -> str:
    """A `--set` for an error, or a stand-in if it may hold a credential."""
    name = override.partition("=")[0].rpartition(".")[2].strip()
    is_secret = any(_in_text(override)) or _SECRET_KEY.fullmatch(name)
    return "(not shown)" if is_secret else repr(override)


def as_told(overrides: Sequence[str]) -> list[str]:
    """Overrides as they may be repeated: what could hold a credential has another value."""
    return [
        text if redacted(text) == repr(text) else f"{text.partition('=')[0]}=..."
        for text in overrides
    ]


def _found(value: object, key: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            inner = f"{key}.{name}" if key else str(name)
            is_named = key != _COLUMN_NAMES and _SECRET_KEY.fullmatch(str(name))
            if is_named and item and isinstance(item, str | list | dict):
                yield inner, "is a credential by its name", _instead_of_key(inner)
            else:
                yield from _found(item, inner)
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from _found(item, f"{key}[{at}]")
    elif isinstance(value, str):
        for what, instead in _in_text(value):
            yield key, what, instead


def _in_text(text: str) -> Iterator[tuple[str, str]]:
    scheme = text.partition("://")[0].rpartition(" ")[2].lower()
    instead = _INSTEAD.get(_SCHEMES.get(scheme, scheme), _ELSEWHERE)
    if _USER_INFO.search(text):
        yield "has a password in a URL", instead
    if _SIGNED.search(text):
        yield "has a signature or a token in a URL", instead
    if shape := _KNOWN_SHAPES.search(text):
        is_hub = shape[0].startswith("hf_")
        yield "looks like a secret key", _INSTEAD["hf"] if is_hub else instead


def _instead_of_key(key: str) -> str:
    is_hub = key.startswith("model.") and "token" in key
    return _INSTEAD["hf"] if is_hub else _ELSEWHERE
