"""What is asked of a server, and what it answers: a request to JSON, JSON to samples. Pure.

Nothing that a server says is trusted: an answer that is not exactly what was asked for, as many
samples, with their probabilities, under the id that was sent along, is a `BadReplyError`, and
never a row's answer. What it writes about an error may repeat the prompt, and is cut out then.

Source:
    vllm/entrypoints/openai/chat_completion and completion, protocol.py and serving.py, 0.32; for
    others https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import re
from array import array
from base64 import b64decode
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from batchgen.core.records import (
    TOOLS,
    EngineSpec,
    RowError,
    Sample,
    TokenLogprobs,
    is_continued,
)
from batchgen.engine.base import EngineRequest, end_of, flatten_parts
from batchgen.engine.vllm.answers import MIN_LOGPROB
from batchgen.engine.vllm.images import with_local_images
from batchgen.engine.vllm.settings import MAX_LOGPROBS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


OF_ALL = frozenset(
    {
        *("max_tokens", "temperature", "top_p", "n", "stop", "seed", "logprobs"),
        *("presence_penalty", "frequency_penalty", *TOOLS),
    }
)
"""Sampling that any server has; of the rest only vLLM's is known to obey."""
NUMBERS = {"embed": "embeddings", "classify": "../classify", "score": "score"}
"""Task -> path of vLLM's server."""
WRAPPED = "answer"
"""Key of the object that holds a choice where a server has JSON schemas only."""
NOT_ANSWERS = frozenset({None, "abort", "error"})
NO_TEXT = re.compile(r"<\|.*\|>|</?s>|<(bos|eos|pad|unk|end_of_turn|start_of_turn)>")
"""Tokens that are no text, as most tokenizers write them."""
TOO_LONG = re.compile(r"maximum context length|context (length|size|window)|max_model_len|too long")
QUOTED = 24
"""So many characters of a prompt in an error's text are taken for a quotation."""
LEAST_QUOTED = 6
MAX_TEXT = 400


class BadReplyError(Exception):
    """What came is no answer to what was asked; the text repeats nothing of it."""


class LackingError(BadReplyError):
    """The server has left out something that was asked for."""


class Unsuitable(Exception):  # noqa: N818 - of a request, no fault
    """A request asks for what the server does not have; the text says what."""


class Server(NamedTuple):
    """What is known of the server that a request goes to."""

    models: Mapping[str | None, str]
    """Adapter, or None for the model itself -> the server's name for it."""
    is_vllm: bool
    max_tokens_key: str = "max_tokens"
    has_schemas: bool = True
    """By `json_schema`, as OpenAI; llama-cpp-python has them beside `json_object`."""
    limit: int | None = None
    """Tokens that it takes, if it says so."""


class Asked(NamedTuple):
    """What an answer has to fit."""

    path: str
    body: Mapping[str, Any]
    n: int = 1
    num_logprobs: int | None = None
    is_wrapped: bool = False
    has_tools: bool = False
    has_reasoning: bool = False
    cut_at: int | None = None
    """Where numbers are asked for: a text of so many tokens was cut to fit."""

    @property
    def is_chat(self) -> bool:
        """Whether it is one of the chats."""
        return "messages" in self.body


class Reply(NamedTuple):
    """An answer, read."""

    reply_id: str
    samples: Sequence[Sample]
    num_prompt_tokens: int | None
    num_cached_tokens: int | None
    num_output_tokens: int | None


def ask(request: EngineRequest, spec: EngineSpec, server: Server) -> Asked:
    """Write a request as the server takes it.

    Raises:
        Unsuitable: The server has not what it takes.
        OSError, ValueError, TypeError, KeyError: A message, or an image of it, is none.
    """
    if spec.task != "generate":
        return _ask_numbers(request, spec, server)
    fields = {**spec.sampling_params, **(request.params or {})}
    fields = {name: value for name, value in fields.items() if value is not None}
    form = fields.pop("structured_outputs", None)
    num_logprobs = fields.pop("logprobs", None)
    if not server.is_vllm and (unknown := sorted(fields.keys() - OF_ALL)):
        raise Unsuitable(f"sampling.{unknown[0]} is vLLM's, and the server is another")
    fields[server.max_tokens_key] = fields.pop("max_tokens")
    body = {"model": server.models[request.lora], **fields}
    if request.seed is not None:
        body["seed"] = request.seed
    if isinstance(request.prompt, str):
        path = "completions"
        body["prompt"] = request.prompt
        if num_logprobs is not None:
            body["logprobs"] = _asked_logprobs(num_logprobs)
    else:
        path = "chat/completions"
        body |= _chat(request, spec, server)
        if num_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": _asked_logprobs(num_logprobs)}
    if form is not None:
        body |= _form(form, server, has_logprobs=num_logprobs is not None)
    return Asked(
        path,
        body,
        fields.get("n", 1),
        num_logprobs,
        is_wrapped=form is not None and "choice" in form and not server.is_vllm,
        has_tools=spec.tool_call_parser is not None,
        has_reasoning=spec.reasoning_parser is not None,
    )


def _ask_numbers(request: EngineRequest, spec: EngineSpec, server: Server) -> Asked:
    """Ask for a vector, for probabilities of labels, or for a score.

    Source:
        vllm/entrypoints/pooling, protocol.py and api_router.py of each, 0.32.
    """
    if not server.is_vllm:
        raise Unsuitable(f"task = {spec.task!r} needs vLLM's server, and this is another")
    named = {
        key: spec.pooling[key] for key in spec.pooling.keys() & {"dimensions", "use_activation"}
    }
    body: dict[str, Any] = {"model": server.models[request.lora], **named}
    if isinstance(request.prompt, tuple):
        body["text_1"], *texts = request.prompt
        body["text_2"] = texts if len(texts) > 1 else texts[0]
    else:
        body["input"] = request.prompt
    if spec.task == "embed":
        body["encoding_format"] = "base64"
    cuts = spec.pooling.get("too_long") == "truncate"
    if cuts:
        body["truncate_prompt_tokens"] = -1
    cut_at = server.limit if cuts else None
    return Asked(NUMBERS[spec.task], body, cut_at=cut_at)


def _asked_logprobs(num: int) -> int:
    """One more: vLLM's server lists the token taken first, also where it is not so likely."""
    return min(num + 1, MAX_LOGPROBS) if num else 0


def _chat(request: EngineRequest, spec: EngineSpec, server: Server) -> dict[str, Any]:
    assert not isinstance(request.prompt, str | tuple)  # noqa: S101 - by the caller
    try:  # As one text, which every chat template takes.
        messages = flatten_parts(request.prompt)
    except TypeError:
        messages = with_local_images(request.prompt)
    body: dict[str, Any] = {"messages": messages}
    if is_continued(request.prompt):
        if not server.is_vllm:
            raise Unsuitable("only vLLM's server goes on with the assistant's turn")
        body |= end_of(request.prompt)
    if spec.tools and "tools" not in (request.params or {}):
        choice = "auto" if spec.tool_call_parser else "none"
        body |= {"tools": list(spec.tools), "tool_choice": choice}
    own = {
        "chat_template": spec.chat_template,
        "chat_template_kwargs": dict(spec.chat_template_kwargs) or None,
    }
    given = {name: value for name, value in own.items() if value is not None}
    if given and not server.is_vllm:
        raise Unsuitable(f"prompt.{next(iter(given))} is vLLM's, and the server is another")
    return {**body, **given}


def _form(form: Mapping[str, Any], server: Server, *, has_logprobs: bool) -> dict[str, Any]:
    """A form that answers are held to, in the words that the server has for it."""
    if server.is_vllm:
        return {"structured_outputs": dict(form)}
    if "json_object" in form:
        return {"response_format": {"type": "json_object"}}
    if "json" in form:
        return _json_schema(form["json"], server)
    if "choice" in form and not has_logprobs:
        label = {"type": "string", "enum": list(form["choice"])}
        whole = {"type": "object", "properties": {WRAPPED: label}, "required": [WRAPPED]}
        return _json_schema({**whole, "additionalProperties": False}, server)
    what = next(iter(form)) + (" with sampling.logprobs" if has_logprobs else "")
    raise Unsuitable(
        f"output.{what} needs vLLM's server (`structured_outputs`), and this is another"
    )


def _json_schema(schema: object, server: Server) -> dict[str, Any]:
    if not server.has_schemas:
        return {"response_format": {"type": "json_object", "schema": schema}}
    named = {"name": "answer", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def read(data: bytes, asked: Asked) -> Reply:
    """Read an answer.

    Raises:
        BadReplyError: It is none, or not to this request.
    """
    try:
        reply = orjson.loads(data)
        usage = reply.get("usage") or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if asked.path in NUMBERS.values():
            num = _count(usage["prompt_tokens"])
            why = "length" if num == asked.cut_at else "stop"
            sample = Sample("", why, numbers=_numbers(reply["data"]))
            return Reply(str(reply["id"]), [sample], num, _count(cached) or 0, 0)
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(asked.n)):
            raise LackingError(f"{len(choices)} of {asked.n} answers (sampling.n)")
        samples = [_sample(choice, asked) for choice in choices]
        counts = (usage.get("prompt_tokens"), cached, usage.get("completion_tokens"))
        return Reply(str(reply["id"]), samples, *map(_count, counts))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise BadReplyError(
            f"no answer as OpenAI's API has it ({type(error).__name__}, {len(data):,} bytes)"
        ) from None


def _numbers(data: Any) -> bytes:  # noqa: ANN401 - as it came
    """Take a row's numbers, as `Sample.numbers` has them."""
    if len(data) > 1 and all("score" in one for one in data):
        scores = sorted((one["index"], one["score"]) for one in data)
        return array("f", [score for _, score in scores]).tobytes()
    (one,) = data
    if "embedding" in one:
        found = b64decode(one["embedding"], validate=True)
        return array("f", found).tobytes()  # Whole ones only.
    return array("f", one["probs"] if "probs" in one else [one["score"]]).tobytes()


def _count(value: object) -> int | None:
    if value is None or (type(value) is int and 0 <= value < 1 << 40):
        return value
    raise ValueError("usage")


def _sample(choice: Mapping[str, Any], asked: Asked) -> Sample:
    why = choice["finish_reason"]
    if why in NOT_ANSWERS or not isinstance(why, str):
        raise BadReplyError("an answer that the server has broken off")
    message = choice["message"] if asked.is_chat else {"content": choice["text"]}
    text = message["content"] or ""
    reasoning = message.get("reasoning") or message.get("reasoning_content") or None
    calls = [
        (str(call["function"]["name"]), str(call["function"]["arguments"]))
        for call in message.get("tool_calls") or ()
    ]
    if not isinstance(text, str) or not isinstance(reasoning, str | None):
        raise TypeError
    logprobs = None
    if asked.num_logprobs is not None:
        listed = choice.get("logprobs")
        if not listed:
            raise LackingError("no log probabilities (sampling.logprobs)")
        tokens = _chat_tokens(listed) if asked.is_chat else _text_tokens(listed)
        logprobs = _token_logprobs(tokens, text, asked.num_logprobs, is_ended=why == "stop")
    return Sample(
        _unwrapped(text) if asked.is_wrapped else text,
        "stop" if why == "tool_calls" else why,
        logprobs,
        reasoning,
        calls if asked.has_tools else None,
        num_tokens=None if logprobs is None else len(logprobs),
    )


def _unwrapped(text: str) -> str:
    """The label in its object; the text as it is where there is none, for the form to refuse."""
    try:
        label = orjson.loads(text)[WRAPPED]
    except (ValueError, TypeError, LookupError):
        return text
    return label if isinstance(label, str) else text


_Token = tuple[str, float, "list[tuple[str, float]]"]


def _chat_tokens(listed: Mapping[str, Any]) -> Iterator[_Token]:
    for entry in listed["content"] or ():
        top = [(other["token"], float(other["logprob"])) for other in entry["top_logprobs"] or ()]
        yield entry["token"], float(entry["logprob"]), top


def _text_tokens(listed: Mapping[str, Any]) -> Iterator[_Token]:
    tops = listed["top_logprobs"] or [{}] * len(listed["tokens"])
    parts = zip(listed["tokens"], listed["token_logprobs"], tops, strict=True)
    for token, logprob, top in parts:
        yield token, float(logprob), [(other, float(value)) for other, value in (top or {}).items()]


def _token_logprobs(
    tokens: Iterator[_Token], text: str, num: int, *, is_ended: bool
) -> list[TokenLogprobs]:
    """Bring a server's list into the form that the engine here has, see `AnswerReader`.

    A server writes special tokens as text, so that they have to be told by their shape, and the
    last one by that it is not in the answer.
    """
    found, at = list(tokens), 0
    ends: set[str] = set()
    if is_ended and found and "".join(token for token, _, _ in found[:-1]) == text:
        ends.add(found[-1][0])
    listed = []
    for token, logprob, top in found:
        is_text = text.startswith(token, at) and token not in ends
        at += len(token) if is_text else 0
        likely = [(_text_of(other, ends), value) for other, value in top if value >= MIN_LOGPROB]
        likely.sort(key=lambda item: -item[1])
        taken = token if is_text else _text_of(token, ends)
        listed.append(TokenLogprobs(taken, logprob, likely[:num]))
    return listed


def _text_of(token: str, ends: set[str]) -> str | None:
    return None if token in ends or NO_TEXT.fullmatch(token) else token


def unsplit(samples: Sequence[Sample], asked: Asked) -> str | None:
    """Say that the server and the job do not agree on who splits reasoning from answers."""
    for sample in samples:
        if sample.reasoning is not None and not asked.has_reasoning:
            return "the server splits reasoning from answers: say model.reasoning_parser, too"
        if asked.has_reasoning and sample.reasoning is None and "</think>" in sample.text:
            return "the server does not split reasoning from answers: it has no --reasoning-parser"
    return None


def cut(request: EngineRequest, num_tokens: int | None, cut_at: int | None) -> RowError | None:
    """Notice that a server has read only a part of a prompt, and has not said so.

    Args:
        request: What was asked.
        num_tokens: Of the prompt, as the server counts them; 0 or None: it does not say.
        cut_at: What it counts of a prompt that it has surely cut. Ollama cuts to a length that
            depends on its context alone, so that this is told of all that it cuts.

    Source:
        ollama, llm/llama_server.go, completionPromptForRequest and contextShiftPromptLimit, and
        server/prompt.go, chatPrompt, of 2026-08: the oldest messages go first, then what is still
        too long loses its middle, down to half of the context; before that (runner/, up to 0.12)
        down to all of it. https://github.com/ollama/ollama/issues/17427
    """
    given = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    # What a model has said before may be shortened by its chat template.
    texts = _texts([one for one in given if isinstance(one, str) or one.get("role") != "assistant"])
    num_words = sum(len(text.split()) for text in texts)  # No token is of several words.
    if num_tokens and (num_tokens == cut_at or num_tokens < num_words):
        text = f"the server has cut the prompt to {num_tokens} tokens; give it a larger context"
        return RowError("prompt_too_long", f"{text} (Ollama: OLLAMA_CONTEXT_LENGTH, num_ctx)")
    return None


def refusal(data: bytes, status: int, request: EngineRequest) -> RowError:
    """Make a row's error of a server's words, without the row's own in them."""
    said = told(data, request)
    kind = "prompt_too_long" if TOO_LONG.search(said) else "bad_request"
    return RowError(kind, f"the server refuses it with HTTP {status}: {said}")


def told(data: bytes, request: EngineRequest) -> str:
    """What a server says of an error, on one line; nothing of a prompt, and no key."""
    try:
        reply = orjson.loads(data)
        error = reply.get("error") if isinstance(reply.get("error"), dict) else reply
        text = str(error.get("message") or error.get("detail") or "no reason given")
    except (ValueError, AttributeError):
        text = "no reason given"
    text = " ".join(text.split())
    return text[:MAX_TEXT] if not _quotes(text, request) else "its reason repeats the prompt"


def _quotes(text: str, request: EngineRequest) -> bool:
    """Whether a text repeats more than a few characters of a prompt."""
    if isinstance(request.prompt, str):
        prompt = request.prompt
    else:
        prompt = "\n".join(_texts(request.prompt))
    prompt = " ".join(prompt.split())
    runs = (text[at : at + QUOTED] for at in range(max(1, len(text) - QUOTED + 1)))
    return any(run in prompt for run in runs if len(run) == QUOTED) or (
        LEAST_QUOTED <= len(prompt) < QUOTED and prompt in text
    )


def _texts(value: object) -> Iterator[str]:
    """All texts in a chat but its roles' names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in ("role", "type"):
                yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
