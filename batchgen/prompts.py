"""Row values to prompt: templates, and the key that tells equal requests.

Pure: no file, no model. The chat template is the model's business and is applied where the
tokenizer is, in the engine. Templates run sandboxed and immutable; an undefined or null value in
one is that row's error, never the word "None" in a prompt.
"""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson
from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batchgen.errors import ConfigError
from batchgen.records import Ordinal, Prompt, Request, Result, RowBatch, RowError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from batchgen.config.model import PromptConfig

    Values = Mapping[str, Any]
    Render = Callable[[Values], str]

ROW_VARIABLE = "row"
"""In templates, the whole row as a mapping, for columns whose names are no identifiers."""

_TABLE = "[prompt]"
_GLOBALS = {
    name: value
    for name, value in ImmutableSandboxedEnvironment().globals.items()
    if name != "lipsum"  # Random text has no place in a prompt.
}
"""`range` and the like: known to every template, unless a column has the name."""
_SEED_BITS = 62  # vLLM takes an int64, and adds the sample's index for n > 1.


class _NullPrintedError(Exception):
    """A template prints a null."""


class PromptBuilder:
    """The `[prompt]` table, compiled. Reused for every row; holds no row."""

    def __init__(self, config: PromptConfig) -> None:
        """Compile the templates.

        Raises:
            ConfigError: A template has a syntax error.
        """
        self._config = config
        self._system: Render | None = None
        self._user: Render | None = None
        names: set[str] = {name for name in (config.messages, config.text) if name is not None}
        if config.user is not None:
            self._user, user_names = _compile("prompt.user", config.user)
            names |= user_names
        if config.system is not None:
            self._system, system_names = _compile("prompt.system", config.system)
            names |= system_names
        self._names = frozenset(names)
        self._globals = frozenset(_GLOBALS if self._user is not None else ())

    def columns(self, available: Sequence[str]) -> frozenset[str]:
        """Return the columns that prompts need, out of those available.

        Raises:
            ConfigError: A template or key names a column that the input lacks.
        """
        if ROW_VARIABLE in self._names and ROW_VARIABLE not in available:
            return frozenset(available)
        problems = [
            f"no column {name!r} in the input{_near(name, available)}"
            for name in sorted(self._names.difference(available) - self._globals)
        ]
        if problems:
            raise ConfigError(_TABLE, problems)
        return self._names.intersection(available)

    def build(self, values: Values) -> Prompt | RowError:
        """Return the row's prompt, or why it has none. Never raises for a row's fault."""
        try:
            if self._user is None:
                return self._from_column(values)
            # Templates see the row's columns, and all of them as `row`.
            scope: dict[str, Any] = {ROW_VARIABLE: values, **values}
            for name in self._names:
                if scope.get(name, "") is None:
                    scope[name] = _NULL
            user = self._user(scope)
            if not user.strip():
                return RowError("empty_prompt", "prompt.user renders to nothing")
            messages = [{"role": "user", "content": user}]
            if self._system is not None:
                messages.insert(0, {"role": "system", "content": self._system(scope)})
        except _NullPrintedError:
            nulls = sorted(name for name in self._names if values.get(name, "") is None)
            here = f"; null here: {', '.join(nulls)}" if nulls else ""
            return RowError("null_value", f"the prompt needs a value that is null{here}")
        except UndefinedError as error:
            return RowError("missing_value", f"the prompt needs a value that is absent: {error}")
        except Exception as error:  # noqa: BLE001 - the row border: templates run users' code
            return RowError("template_error", f"{type(error).__name__}: {error}")
        return messages

    def _from_column(self, values: Values) -> Prompt | RowError:
        name = self._config.text or self._config.messages or ""
        value = values.get(name)
        if value is None:
            return RowError("null_value", f"column {name!r} is null, expected a prompt")
        if self._config.messages is not None:
            return _checked_messages(name, value)
        if not isinstance(value, str):
            found = type(value).__name__
            return RowError("bad_prompt", f"column {name!r} is {found}, expected a string")
        if not value.strip():
            return RowError("empty_prompt", f"column {name!r} is empty")
        return value


class _Null:
    """A column's null inside a template: may be tested, not printed.

    `{% if x %}`, `x is none` and `x or "unknown"` do what they should; anything that would turn
    the null into text raises, so that the word "None" never gets into a prompt.
    """

    __slots__ = ()

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or other is self

    def __hash__(self) -> int:
        return hash(None)

    def __str__(self) -> str:
        raise _NullPrintedError

    __format__ = __iter__ = __len__ = __getitem__ = __add__ = __radd__ = __call__ = (
        lambda self, *_: str(self)
    )


_NULL = _Null()


def _compile(where: str, source: str) -> tuple[Render, frozenset[str]]:
    """Compile a template; return it with the names that it looks up. A constant renders once."""
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, finalize=_refuse_null, keep_trailing_newline=False
    )
    environment.globals = {}  # So that a column may have the name of a global.
    environment.tests["none"] = _is_none
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "default": _null_to_json}
    try:
        names = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        template = environment.from_string(source, globals=_GLOBALS)
    except TemplateSyntaxError as error:
        problem = f"{where}: template error in line {error.lineno}: {error.message}"
        raise ConfigError(_TABLE, [problem]) from error
    if names:
        return template.render, names
    try:
        constant = template.render()
    except _NullPrintedError as error:
        raise ConfigError(_TABLE, [f"{where}: prints a null"]) from error
    except TemplateError as error:
        raise ConfigError(_TABLE, [f"{where}: {error}"]) from error
    except Exception as error:  # A template can raise anything; this one does for every row.
        raise ConfigError(_TABLE, [f"{where}: {type(error).__name__}: {error}"]) from error
    return lambda _: constant, names


def _refuse_null(value: object) -> object:
    if value is None or value is _NULL:
        raise _NullPrintedError
    return value


def _is_none(value: object) -> bool:
    return value is None or value is _NULL


def _null_to_json(value: object) -> None:
    if value is not _NULL:
        msg = f"{type(value).__name__} is not JSON"
        raise TypeError(msg)


def _checked_messages(name: str, value: object) -> Prompt | RowError:
    if not isinstance(value, list) or not value:
        found = type(value).__name__ if value != [] else "an empty list"
        return RowError(
            "bad_messages", f"column {name!r} is {found}, expected a list of {{role, content}}"
        )
    messages = []
    for at, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            problem = f"column {name!r}[{at}] has no role, expected {{role, content}}"
            return RowError("bad_messages", problem)
        # Parquet structs carry every field of every message: null means absent.
        messages.append({key: item for key, item in message.items() if item is not None})
    return messages


def _near(name: str, available: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, available, n=1)
    if near:
        return f", did you mean {near[0]!r}?"
    return f", it has: {', '.join(available)}"


class RequestBuilder:
    """Rows to requests, with keys and seeds. Counts request ids; owned by one thread."""

    def __init__(self, prompts: PromptBuilder, recipe: str, seed: int | None) -> None:
        """Bind to a job.

        Args:
            prompts: The compiled templates.
            recipe: Fingerprint of the recipe, part of every key.
            seed: The job's seed; None when sampling is greedy and seeds change nothing.
        """
        self._prompts = prompts
        self._key = hashlib.blake2b(recipe.encode(), digest_size=16)
        self._seed = seed
        self._next_id = 0

    def of(self, batch: RowBatch) -> Iterator[Request | Result]:
        """Yield one entry a row of `batch`, in order: a request, or the result of a bad row."""
        # What waits for its answer keeps only the carried columns, not the parsed values.
        kept = replace(batch, values=())
        for index, (row, values) in enumerate(zip(batch.rows, batch.values, strict=True)):
            ordinal = Ordinal(batch.segment, row)
            outcome = batch.errors[index] if values is None else self._prompts.build(values)
            if isinstance(outcome, RowError):
                yield Result(ordinal, kept, index, None, None, outcome)
                continue
            try:
                key = self._request_key(outcome)
            except orjson.JSONEncodeError as error:
                problem = RowError("bad_prompt", f"the prompt is not text: {error}")
                yield Result(ordinal, kept, index, None, None, problem)
                continue
            seed = None if self._seed is None else row_seed(self._seed, ordinal)
            yield Request(self._next_id, ordinal, outcome, key, seed, kept, index)
            self._next_id += 1

    def _request_key(self, prompt: Prompt) -> str:
        key = self._key.copy()
        key.update(orjson.dumps(prompt, option=orjson.OPT_SORT_KEYS))
        return key.hexdigest()


def row_seed(job_seed: int, ordinal: Ordinal) -> int:
    """The row's own sampling seed: the same in every run, however rows are spread over runs."""
    text = f"{job_seed}:{ordinal.segment}:{ordinal.row}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _SEED_BITS)
