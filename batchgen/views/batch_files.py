"""OpenAI's output and error files, made of what a job over a batch file has published.

Each row is a line of exactly one of them, in the input's order. They are made anew from the
snapshot and put in place at once, so that whoever reads them sees all lines of a night or those of
the one before.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from batchgen.core.errors import OutputError
from batchgen.source.openai import CARRIED
from batchgen.views.rows import output_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from batchgen.views.rows import Output

OUTPUT, ERRORS, MARK = "openai-output.jsonl", "openai-errors.jsonl", "_batchgen/openai.json"
_CODES = {
    "prompt_too_long": "context_length_exceeded",
    "bad_json": "invalid_json_line",
    "not_an_object": "invalid_json_line",
    "invalid_utf8": "invalid_json_line",
    "line_too_long": "invalid_json_line",
    "bad_messages": "invalid_messages",
    "bad_schema": "invalid_schema",
    "bad_sampling": "invalid_value",
}
"""Errors of rows by OpenAI's words, where it has one."""
_OURS = frozenset({"engine_crash", "engine_error", "endpoint_failed", "bad_request"})
"""Errors that are no fault of the request."""
_ENDED = frozenset({"batch_cancelled", "batch_expired"})
"""Errors of lines that nobody has asked."""
_COLUMNS = (
    *("status", "text", "embedding", "scores", "finish_reason", "error_type", "error"),
    *("num_prompt_tokens", "num_cached_tokens", "num_output_tokens", "reasoning", "choices"),
    "tool_calls",
)


class Counts(NamedTuple):
    """Lines that were written."""

    num_ok: int
    num_errors: int


def refresh(root: Path) -> None:
    """Write both files of an output, unless they are the newest snapshot's, or there is none.

    Raises:
        OutputError: It cannot be read, or they cannot be written.
    """
    output = output_of(root)
    if output is None or output.manifest is None:
        return
    files = (root / OUTPUT, root / ERRORS)
    mark = root / MARK
    number = str(output.manifest.number).encode()
    with suppress(OSError):
        if mark.read_bytes() == number and all(file.exists() for file in files):
            return
    with suppress(OSError):
        mark.unlink()  # Before either file is another's.
    write(output, *files)
    with suppress(OSError):
        mark.write_bytes(number)


def write(output: Output, answers: Path, errors: Path) -> Counts:
    """Write the lines of answers and those of errors; both paths may be the same file.

    Raises:
        OutputError: The rows cannot be read, or the files cannot be written.
    """
    counts = [0, 0]
    try:
        with ExitStack() as stack:
            files = {
                path: stack.enter_context(_Replaced(path))
                for path in dict.fromkeys([answers, errors])
            }
            for is_error, line in lines(output):
                files[errors if is_error else answers].write(line + b"\n")
                counts[is_error] += 1
    except OSError as error:
        msg = f"{error.filename or answers}: cannot be written ({error.strerror}); run again"
        raise OutputError(msg) from error
    return Counts(*counts)


class _Replaced:
    """A file that takes its name once it is whole and durable; else the old one stays."""

    def __init__(self, path: Path) -> None:
        self._path, self._temp = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._temp.open("wb")

    def __enter__(self) -> _Replaced:
        return self

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            self._temp.replace(self._path)
        self._temp.unlink(missing_ok=True)


def lines(output: Output) -> Iterator[tuple[bool, bytes]]:
    """Yield each row, whether it is an error, and its line."""
    assert output.manifest is not None  # noqa: S101 - only what is published is written
    created = int(datetime.fromisoformat(output.manifest.created_at).timestamp())
    known = output.column_names()
    names = {name: column for name in _COLUMNS if (column := output.column(name)) in known}
    wanted = [*CARRIED, *names.values()]
    if missing := [name for name in CARRIED if name not in known]:
        msg = (
            f"{output.storage.where}: no column {missing[0]!r}: its input was no OpenAI batch file"
        )
        raise OutputError(msg)
    seen: set[str] = set()
    number = 0
    for _, _, table in output.groups(wanted):
        for row in table.to_pylist():
            told = {name: row[column] for name, column in names.items()}
            own_id = row["custom_id"]
            if own_id in seen and told["status"] != "error":
                told |= {"status": "error", "error_type": "duplicate_custom_id"}
                told["error"] = f"custom_id {own_id!r:.60} stands in an earlier line, too"
            if own_id is not None:
                seen.add(own_id)
            yield _line(row, told, f"{created:x}-{number:x}", created)
            number += 1


def _line(
    row: Mapping[str, Any], told: Mapping[str, Any], name: str, created: int
) -> tuple[bool, bytes]:
    if told["error_type"] == "null_value":  # The column of another task.
        why = f"url: {row['url']!r} is not what the model was loaded for"
        told = {**told, "error_type": "invalid_url", "error": why}
    line: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": row["custom_id"]}
    response: dict[str, Any] = {"status_code": 200, "request_id": f"req_{name}"}
    is_error = told["status"] == "error"
    if not is_error:
        response["body"] = _body(row, told, name, created)
        return False, orjson.dumps({**line, "response": response, "error": None})
    # Not which file here it was: only who asked reads this.
    kind, why = told["error_type"], re.sub(r"^.*?:(\d+): ", r"line \1: ", told["error"], count=1)
    if kind in _ENDED:
        return True, orjson.dumps(
            {**line, "response": None, "error": {"code": kind, "message": why}}
        )
    if kind in _OURS:
        error = {"code": "server_error", "message": f"{kind}: {why}"}
        return True, orjson.dumps({**line, "response": None, "error": error})
    status = 404 if kind == "model_not_found" else 400
    found = {"message": why, "type": "invalid_request_error", "param": None}
    body = {"error": {**found, "code": _CODES.get(kind, kind)}}
    response |= {"status_code": status, "body": body}
    return True, orjson.dumps({**line, "response": response, "error": None})


def _body(
    row: Mapping[str, Any], told: Mapping[str, Any], name: str, created: int
) -> dict[str, Any]:
    """Write an answer as the API gives it."""
    num_in, num_out = told["num_prompt_tokens"] or 0, told.get("num_output_tokens") or 0
    usage: dict[str, Any] = {"prompt_tokens": num_in, "total_tokens": num_in + num_out}
    scores = told.get("scores")
    if scores is not None and row["url"].endswith("/rerank"):
        ranked = sorted(enumerate(scores), key=lambda one: -one[1])
        results = [{"index": at, "relevance_score": score} for at, score in ranked]
        return {"id": f"rerank-{name}", "model": row["model"], "usage": usage, "results": results}
    for kind, found in (("embedding", [told.get("embedding")]), ("score", scores)):
        if found and found[0] is not None:
            data = [{"object": kind, "index": at, kind: one} for at, one in enumerate(found)]
            return {"object": "list", "data": data, "model": row["model"], "usage": usage}
    is_chat = row["url"].endswith("/chat/completions")
    choices = [
        {"index": at, "finish_reason": one["finish_reason"]}
        | (_chat_choice(one, row["tool_choice"], f"{name}-{at}") if is_chat else _text_choice(one))
        for at, one in enumerate(told.get("choices") or [told])
    ]
    usage["completion_tokens"] = num_out
    usage["prompt_tokens_details"] = {"cached_tokens": told["num_cached_tokens"] or 0}
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{name}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": row["model"],
        "choices": choices,
        "usage": usage,
    }


def _chat_choice(one: Mapping[str, Any], forced: str | None, name: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": one["text"], "refusal": None}
    choice: dict[str, Any] = {"message": message, "logprobs": None}
    if one.get("reasoning") is not None:
        message["reasoning"] = one["reasoning"]
    calls = _forced_calls(one["text"], forced) if forced else one.get("tool_calls")
    if calls:
        message["content"] = None if forced else one["text"] or None
        message["tool_calls"] = [
            {"id": f"call_{name}-{at}", "type": "function", "function": call}
            for at, call in enumerate(calls)
        ]
        if one["finish_reason"] == "stop" and forced in (None, "required"):
            choice["finish_reason"] = "tool_calls"
    if (tokens := one.get("logprobs")) is None:
        return choice
    content = [
        {**_token(token), "top_logprobs": [_token(other) for other in token["top"]]}
        for token in tokens
    ]
    return {**choice, "logprobs": {"content": content, "refusal": None}}


def _forced_calls(text: str, forced: str) -> list[dict[str, str]]:
    """Read an answer that is a call by its form; none of one that was cut off."""
    if forced != "required":
        return [{"name": forced.removesuffix("()"), "arguments": text}]
    with suppress(orjson.JSONDecodeError, TypeError, KeyError):
        return [
            {"name": call["name"], "arguments": orjson.dumps(call["parameters"]).decode()}
            for call in orjson.loads(text)
        ]
    return []


def _token(one: Mapping[str, Any]) -> dict[str, Any]:
    token = one["token"] or ""
    return {"token": token, "logprob": one["logprob"], "bytes": list(token.encode())}


def _text_choice(one: Mapping[str, Any]) -> dict[str, Any]:
    if (tokens := one.get("logprobs")) is None:
        return {"text": one["text"], "logprobs": None}
    texts = [token["token"] or "" for token in tokens]
    told = {
        "tokens": texts,
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [
            {other["token"] or "": other["logprob"] for other in token["top"]} for token in tokens
        ],
        "text_offset": [len("".join(texts[:at])) for at in range(len(texts))],
    }
    return {"text": one["text"], "logprobs": told}
