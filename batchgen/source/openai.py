"""OpenAI's batch files: JSONL whose lines are requests, `{custom_id, method, url, body}`.

A body is a stranger's. What of it is taken stands here and nowhere else: the rest is that row's
error, by one of OpenAI's codes, and never ignored. A body chooses no chat template, no processor's
options and nothing else that runs or loads; its images are held to the job's rules like any row's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from batchgen.core.errors import ConfigError, suggestion
from batchgen.core.records import Passages, RowError
from batchgen.source.columns import kind_word, parse_field
from batchgen.source.jsonl import SNIFF_LINES, JsonlReader, parse_line
from batchgen.source.reading import to_arrays
from batchgen.source.text import scan_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.source.reading import Rows, Shape
    from batchgen.source.text import Lines, OnBlock, OnRows, Scan

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
EMBEDDING, SCORE, RERANK = "/v1/embeddings", "/v1/score", "/v1/rerank"
TASKS = {EMBEDDING: "embed"} | dict.fromkeys(
    (SCORE, "/score", RERANK, "/v2/rerank", "/rerank"), "score"
)
"""Tasks of URLs, but for `generate`."""
CARRIED = ("custom_id", "url", "model", "tool_choice")
"""Columns that go to the output. The last: a tool that has to be called, `NAME()`, or required."""
MESSAGES, SAMPLING, SCHEMA, MODEL = "messages", "sampling", "schema", "model"
TOOLS, FORCED = "tools", "tool_choice"
TEXT, QUERY, PASSAGE = "text", "query", "passage"
"""Columns of what is to be embedded, and scored."""
_COLUMNS = pa.schema(
    [parse_field(name, "string") for name in (*CARRIED, TEXT, QUERY, PASSAGE)]
    + [parse_field(name, "json") for name in (MESSAGES, SAMPLING, SCHEMA, TOOLS)]
)
_LINE = ("body", "custom_id", "method", "url")
_SAMPLING = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "stop", "seed"}
    | {"presence_penalty", "frequency_penalty", "repetition_penalty", "stop_token_ids"}
    | {"n", "logprobs", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output"}
)
"""Fields of a body that are vLLM's SamplingParams, by the same names."""
_WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
)
"""Fields that say nothing of the answer."""
_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "stream": (False,),
    "best_of": (1,),
    "echo": (False,),
    "logit_bias": ({},),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "encoding_format": ("float",),
    "top_n": (0,),
}
"""Fields that are not taken, and what they may say all the same: what holds without them."""


class _RefusedError(Exception):
    """A request that is not taken: OpenAI's code, and why."""

    def __init__(self, code: str, why: str) -> None:
        super().__init__(why)
        self.error = RowError(code, why)


class OpenAIReader(JsonlReader):
    """See `Reader`."""

    def task(self, path: str) -> str:
        """Tell the task that the first requests of a file are of."""
        lines = [parse_line(line, self._encoding) for _, line in self._sample(path, SNIFF_LINES)]
        urls = (line.get("url") for line in lines if isinstance(line, dict))
        return next((TASKS[url] for url in urls if url in TASKS), "generate")

    def columns(self, paths: Sequence[str], types: Mapping[str, str]) -> pa.Schema:
        """See `Reader`. They are the same for every file."""
        if types:
            problem = f"of {paths[0]}: an OpenAI batch file has columns of its own; leave it out"
            raise ConfigError("input.types", [problem])
        return _COLUMNS

    def is_all_seen(self, _: Sequence[str]) -> bool:
        """See `Reader`."""
        return True

    def scan(self, path: str, on_rows: OnRows = None, on_block: OnBlock = int) -> Scan:
        """See `Reader`."""
        return scan_lines(path, on_rows, lambda *_: on_block(), self._encoding)

    def _parse(self, path: str, found: Lines, shape: Shape, schema: pa.Schema) -> Rows:
        read = super()._parse(path, found, replace(shape, table_columns=(), needed=_LINE), schema)
        requests: list[Mapping[str, Any]] = []
        for at, line in enumerate(read.values):
            values, error = _request(line or {})
            requests.append(values)
            if error is not None and at not in read.errors:
                where = f"{path}:{read.rows[at] + 1}"
                read.errors[at] = RowError(error.error_type, f"{where}: {error.error}")
        wanted = {name: [one.get(name) for one in requests] for name in shape.table_columns}
        read.arrays, misfits = to_arrays(wanted, schema, lambda at: f"{path}:{read.rows[at] + 1}")
        read.errors = misfits | read.errors
        read.values = [{name: one.get(name) for name in shape.needed} for one in requests]
        return read


def _request(line: Mapping[str, Any]) -> tuple[Mapping[str, Any], RowError | None]:
    """Turn a line into the values of `_COLUMNS`, as far as it can be; and say what is wrong."""
    values: dict[str, Any] = {}
    try:
        _take(line, values)
    except _RefusedError as refused:
        return values, refused.error
    return values, None


def _take(line: Mapping[str, Any], values: dict[str, Any]) -> None:
    values["custom_id"] = _text(line, "custom_id")
    values["url"] = url = _text(line, "url")
    body = line.get("body")
    if not isinstance(body, dict):
        raise _missing("body", "an object", body)
    values[MODEL] = _text(body, "model")
    if (method := line.get("method")) != "POST":
        raise _RefusedError("invalid_method", f"method: {method!r:.60}, expected 'POST'")
    take = {CHAT: _chat, COMPLETION: _completion, EMBEDDING: _embedding}.get(url)
    take = _score if TASKS.get(url) == "score" else take
    if take is None:
        expected = f"expected {CHAT}, {COMPLETION}, {EMBEDDING}, {SCORE} or {RERANK}"
        raise _RefusedError("invalid_url", f"url: {url!r:.60}, {expected}")
    values |= take(body)
    if url in TASKS and (sampling := values.pop(SAMPLING)):
        name = min(sampling)
        raise _RefusedError("unknown_parameter", f"{name!r} is no parameter of {url}")


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not value:
        raise _missing(name, "a text", value)
    return value


def _missing(name: str, expected: str, found: object) -> _RefusedError:
    if found is None:
        return _RefusedError(
            "missing_required_parameter", f"{name} is missing, expected {expected}"
        )
    return _RefusedError("invalid_type", f"{name} is {kind_word(found)}, expected {expected}")


def _chat(body: Mapping[str, Any]) -> Mapping[str, Any]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _missing("messages", "a list of {role, content}", messages)
    rest = {key: value for key, value in body.items() if key != "messages"}
    schema = _schema(rest.pop("response_format", None))
    most = rest.pop("max_completion_tokens", None)
    if most is not None:
        rest["max_tokens"] = most
    num, is_asked = rest.pop("top_logprobs", None), rest.pop("logprobs", None)
    if is_asked not in (None, False, True):
        raise _missing("logprobs", "true or false", is_asked)
    if is_asked:
        rest["logprobs"] = num or 0
    elif num:
        raise _RefusedError("invalid_value", "top_logprobs is given without logprobs")
    tools, choice = rest.pop("tools", None), rest.pop("tool_choice", None)
    if not tools:
        if choice not in (None, "none", "auto"):
            raise _RefusedError("invalid_value", "tool_choice is given without tools")
        return {MESSAGES: messages, SAMPLING: _sampling(rest), SCHEMA: schema}
    forced, form = _forced(_functions(tools), choice)
    if form is not None and schema is not None:
        text = "response_format is given with a tool_choice that forces a call, expected one"
        raise _RefusedError("unsupported_parameter", text)
    told = {"tools": tools, "tool_choice": "none" if forced or choice == "none" else "auto"}
    own = {TOOLS: told, FORCED: forced, SCHEMA: schema if form is None else form}
    return {MESSAGES: messages, SAMPLING: _sampling(rest), **own}


def _functions(tools: object) -> dict[str, Any]:
    """Return the functions that are tools: name -> schema of what they take."""
    found = {}
    for tool in tools if isinstance(tools, list) else [tools]:
        function = tool.get("function") if isinstance(tool, dict) else None
        given = function if isinstance(function, dict) else {}
        name, schema = given.get("name"), given.get("parameters") or {"type": "object"}
        if not isinstance(name, str) or not name or not isinstance(schema, dict):
            expected = "expected {type: function, function: {name, description, parameters}}"
            raise _RefusedError("invalid_value", f"tools: {tool!r:.60}, {expected}")
        found[name] = schema
    return found


def _forced(functions: Mapping[str, Any], choice: object) -> tuple[str | None, Any]:
    """Return what a tool_choice forces, and the JSON Schema of such an answer, as vLLM has it.

    Source:
        vllm/tool_parsers/utils.py, get_json_schema_from_tools, 0.26 to 0.33.
    """
    if choice in (None, "auto", "none"):
        return None, None
    if choice == "required":
        calls: list[Any] = []
        shared: dict[str, Any] = {}
        for own_name, schema in functions.items():
            bare = {key: value for key, value in schema.items() if key != "$defs"}
            fields = {"name": {"type": "string", "enum": [own_name]}, "parameters": bare}
            calls.append({"properties": fields, "required": ["name", "parameters"]})
            shared |= schema.get("$defs") or {}
        items = {"type": "object", "anyOf": calls}
        whole = {"type": "array", "minItems": 1, "items": items}
        return "required", {**whole, "$defs": shared} if shared else whole
    named = choice.get("function") if isinstance(choice, dict) else None
    name = named.get("name") if isinstance(named, dict) else None
    if not isinstance(name, str) or name not in functions:
        expected = f"expected auto, none, required or one of {', '.join(functions)}"
        raise _RefusedError("invalid_value", f"tool_choice: {choice!r:.80}, {expected:.200}")
    return f"{name}()", functions[name]


def _completion(body: Mapping[str, Any]) -> Mapping[str, Any]:
    prompt, rest = _one_text(body, "prompt")
    return {MESSAGES: {"prompt": prompt}, SAMPLING: _sampling(rest), SCHEMA: None}


def _embedding(body: Mapping[str, Any]) -> Mapping[str, Any]:
    text, rest = _one_text(body, "input")
    return {TEXT: text, SAMPLING: _sampling(rest)}


_PAIRS = (
    *(("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")),
    ("query", "documents"),
)
"""What vLLM calls a query and a passage."""


def _score(body: Mapping[str, Any]) -> Mapping[str, Any]:
    names = next((pair for pair in _PAIRS if pair[0] in body), _PAIRS[0])
    query, rest = _one_text(body, names[0])
    found = rest.pop(names[1], None)
    passages = found if isinstance(found, list) else [found]
    if not passages or not all(isinstance(text, str) for text in passages):
        raise _missing(names[1], "a text or a list of texts", found)
    return {QUERY: query, PASSAGE: Passages(passages), SAMPLING: _sampling(rest)}


def _one_text(body: Mapping[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """Return a body's only text, and what else it has."""
    text = body.get(name)
    if isinstance(text, list) and len(text) == 1:
        text = text[0]
    if not isinstance(text, str):
        raise _missing(name, "a text (several, or tokens, are not taken)", text)
    return text, {key: value for key, value in body.items() if key != name}


def _schema(form: object) -> Mapping[str, Any] | None:
    """Return the JSON Schema that a `response_format` asks for."""
    if form is None or form == {"type": "text"}:
        return None
    if isinstance(form, dict) and form.get("type") == "json_object":
        return {"type": "object"}
    inner = form.get("json_schema") if isinstance(form, dict) else None
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict) or not schema:
        expected = "{type: text}, {type: json_object} or {type: json_schema, json_schema: {schema}}"
        raise _RefusedError("invalid_response_format", f"response_format: expected {expected}")
    return schema


def _sampling(rest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what of a body's other fields are sampling parameters.

    Raises:
        _RefusedError: A field that is not taken, and that says what does not hold without it.
    """
    taken = {}
    for name, value in rest.items():
        if value is None or name == MODEL or name in _WITHOUT_EFFECT:
            continue
        if name in _SAMPLING:
            taken[name] = value
        elif name not in _NEUTRAL:
            text = f"{name!r:.60} is no parameter that is taken{suggestion(name, _SAMPLING)}"
            raise _RefusedError("unknown_parameter", text)
        elif not any(value == one and type(value) is type(one) for one in _NEUTRAL[name]):
            known = " or ".join(map(repr, _NEUTRAL[name]))
            text = f"{name} = {value!r:.60} is not taken, expected {known}, or none"
            raise _RefusedError("unsupported_parameter", text)
    return taken
