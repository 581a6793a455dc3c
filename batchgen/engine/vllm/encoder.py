"""Prompts to token ids, in one background thread, ahead of the scheduler; and chats with images.

Why a thread and why batches: one `encode_batch_fast` over hundreds of prompts costs half of what
vLLM's own rendering does and runs outside the GIL, while a loop of single calls fights the engine
thread for it (0.65 s became 4.2 s on two cores, vLLM 0.32). It starts before the engine
is up, so that the first thousand prompts are ready when the weights are.

It must not share vLLM's tokenizer: truncation and padding are state of the Rust object.

Chats with images vLLM itself has to render, see `images`: it knows how many tokens an image takes.

`refuse_model` tells by a model's files, before anything is loaded, what would make every row an
error: no chat template, one that refuses the job's messages, a model that generates no text.

Imports neither vLLM nor transformers: `load_tokenizer` and the `LLM` object bring what is needed.
"""

from __future__ import annotations

import json
import queue
import re
import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batchgen.core.errors import ConfigError, EngineError, one_line
from batchgen.core.records import EngineSpec, Messages, Prompt, RowError
from batchgen.core.runtime import read_json
from batchgen.engine.base import EngineRequest, end_of, flatten_parts
from batchgen.engine.vllm.pooling import CONTINUED, Pieces, continued, encode_pair, pairs_of

MAX_BATCH = 256
_CLOSE = None


class Encoded(NamedTuple):
    """A request ready for admission, or why it never will be."""

    request_id: int
    seed: int | None
    token_ids: array[int] | None
    """4 bytes a token instead of the 36 of a list; None if `error` or `chat`."""
    error: RowError | None
    params: Mapping[str, Any] | None = None
    lora: str | None = None
    chat: Messages | None = None
    """One with images, which only the engine can render."""
    second: array[int] | None = None
    """Tokens of a pair's second text, where it is read by itself."""
    boundary: int = 0
    """Where in `token_ids` a pair's second text begins, or what is scored; 0: nowhere."""
    others: Sequence[Pieces] = ()
    """Further pairs of the request."""


def pieces_of(encoded: Encoded) -> list[Pieces]:
    """What numbers are wanted of."""
    first = Pieces(encoded.token_ids or array("i"), encoded.second, encoded.boundary)
    return [first, *encoded.others]


class ChatStyle(NamedTuple):
    """How a prompt becomes a text; as in `EngineSpec`."""

    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]] = ()
    pairs: str = ""
    """How a pair of texts becomes tokens, see `pooling.encode_pair`."""

    def of(self, params: Mapping[str, Any] | None) -> ChatStyle:
        """Return that of a request, which may bring its own tools."""
        return self if params is None else self._replace(tools=params.get("tools", self.tools))


def style_of(spec: EngineSpec) -> ChatStyle:
    """How prompts of a job become texts."""
    pairs = pairs_of(spec) if spec.task in ("score", "loglikelihood") else ""
    return ChatStyle(spec.chat_template, spec.chat_template_kwargs, spec.tools, pairs)


@dataclass(eq=False)
class Encoder:
    """Takes requests from one thread, gives `Encoded` to another, in order."""

    load_tokenizer: Callable[[], Any]
    """Called in the thread."""
    style: ChatStyle
    """The chat template to use."""
    on_images: Callable[[], object] = int
    """Called for each batch in which a chat has images."""

    def __post_init__(self) -> None:
        self._inbox: queue.SimpleQueue[Sequence[EngineRequest] | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[list[Encoded] | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="batchgen-encoder", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        """Hand requests over; never waits."""
        self._inbox.put(requests)

    def take(self, timeout_s: float) -> list[Encoded]:
        """Return the next batch that is ready; wait up to `timeout_s` for one, 0 for not at all.

        Raises:
            EngineError: The tokenizer could not be loaded; no request can be encoded.
        """
        try:
            ready = self._ready.get(block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Empty:
            return []
        if isinstance(ready, Exception):
            raise EngineError(f"the tokenizer cannot be loaded: {one_line(ready)}") from ready
        return ready

    def close(self) -> None:
        """Stop after the batch under way."""
        self._inbox.put(_CLOSE)
        self._thread.join()

    def _run(self) -> None:
        try:
            tokenizer = self.load_tokenizer()
        except Exception as exc:  # noqa: BLE001 - carried to the engine's thread, raised there
            self._ready.put(exc)
            return
        while (requests := self._inbox.get()) is not _CLOSE:
            for start in range(0, len(requests), MAX_BATCH):
                encoded = encode(tokenizer, requests[start : start + MAX_BATCH], self.style)
                if any(one.chat is not None for one in encoded):
                    self.on_images()
                self._ready.put(encoded)


def encode(tokenizer: Any, requests: Sequence[EngineRequest], style: ChatStyle) -> list[Encoded]:
    """Render and tokenize; a request that fails is its own error and no one else's.

    Args:
        tokenizer: A transformers tokenizer, with or without a Rust one (`_tokenizer`) inside.
        requests: Up to `MAX_BATCH` of them.
        style: The chat template to use.

    Returns:
        One entry a request, in order.
    """
    if style.pairs == CONTINUED:
        return _encode_continued(tokenizer, requests)
    if style.pairs:
        return [_encode_pair(tokenizer, request, style.pairs) for request in requests]
    texts: dict[int, str] = {}
    results: dict[int, array[int] | RowError] = {}
    is_chat = [not isinstance(request.prompt, str) for request in requests]
    for index, request in enumerate(requests):
        if is_chat[index] and has_images(request.prompt):
            continue
        try:
            texts[index] = render(tokenizer, request.prompt, style.of(request.params))
        except Exception as exc:  # noqa: BLE001 - row border: templates raise what they like
            results[index] = RowError("chat_template_error", one_line(exc))
    for chat in (False, True):
        indices = [index for index in texts if is_chat[index] == chat]
        # A chat template writes the special tokens itself; a raw text gets the tokenizer's own.
        ids = _encode_texts(tokenizer, [texts[i] for i in indices], add_special_tokens=not chat)
        results.update(zip(indices, ids, strict=True))
    return [_encoded(request, results.get(index)) for index, request in enumerate(requests)]


def _encode_pair(tokenizer: Any, request: EngineRequest, how: str) -> Encoded:
    given = Encoded(request.request_id, None, None, None, request.params, request.lora)
    texts: Any = request.prompt
    query, *passages = texts
    try:
        found, *others = [encode_pair(tokenizer, how, (query, text)) for text in passages]
    except Exception as exc:  # noqa: BLE001 - row border
        return given._replace(error=RowError("tokenizer_error", one_line(exc)))
    first, second, boundary = found
    return given._replace(token_ids=first, second=second, boundary=boundary, others=others)


def _encode_continued(tokenizer: Any, requests: Sequence[EngineRequest]) -> list[Encoded]:
    """Make tokens of prompts with their continuations, or of texts alone; see `continued`."""
    pairs: list[Any] = [
        one.prompt if isinstance(one.prompt, tuple) else ("", one.prompt) for one in requests
    ]
    wholes = _encode_texts(tokenizer, ["".join(pair) for pair in pairs], add_special_tokens=True)
    prompts = _encode_texts(tokenizer, [pair[0] for pair in pairs], add_special_tokens=True)
    found = []
    for request, pair, whole, prompt in zip(requests, pairs, wholes, prompts, strict=True):
        one = _encoded(request, whole)
        if one.token_ids is not None:
            num = 0 if isinstance(prompt, RowError) else len(prompt)
            first, _, boundary = continued(tokenizer, one.token_ids, num, is_alone=not pair[0])
            one = one._replace(token_ids=first, boundary=boundary)
        found.append(one)
    return found


def render(tokenizer: Any, prompt: Prompt, style: ChatStyle) -> str:
    """Turn a prompt that is no pair into the text that is tokenized."""
    if isinstance(prompt, str):
        return prompt
    assert not isinstance(prompt, tuple)  # noqa: S101 - see `encode`
    text = tokenizer.apply_chat_template(
        [_with_arguments(message) for message in flatten_parts(prompt)],
        tools=list(style.tools) or None,
        chat_template=style.chat_template,
        tokenize=False,
        **{**end_of(prompt), **style.chat_template_kwargs},
    )
    return str(text)


def _with_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose calls have their arguments as objects, which chat templates take.

    Source:
        vllm/renderers/chat_utils.py, _postprocess_messages, 0.33.
    """
    if not isinstance(calls := message.get("tool_calls"), list):
        return message
    read = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        given = function.get("arguments") if isinstance(function, dict) else None
        if function is not None and isinstance(given, str):
            with suppress(ValueError):
                call = {**call, "function": {**function, "arguments": json.loads(given or "{}")}}  # noqa: PLW2901
        read.append(call)
    return {**message, "tool_calls": read}


def has_images(prompt: Prompt) -> bool:
    """Whether any message of a chat has a content part of type `image_url`."""
    return not isinstance(prompt, str | tuple) and any(
        isinstance(part, dict) and part.get("type") == "image_url"
        for message in prompt
        if isinstance(content := message.get("content"), list)
        for part in content
    )


def _encode_texts(
    tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool
) -> list[array[int] | RowError]:
    if not texts:
        return []
    fast = getattr(tokenizer, "_tokenizer", None)
    encode_batch = getattr(fast, "encode_batch_fast", None)
    if encode_batch is None:
        return [_encode_one(tokenizer, text, add_special_tokens) for text in texts]
    try:
        encodings = encode_batch(texts, add_special_tokens=add_special_tokens)
    except Exception:  # noqa: BLE001 - one text of the batch; find out which
        return [_encode_one(tokenizer, text, add_special_tokens) for text in texts]
    return [array("i", encoding.ids) for encoding in encodings]


def _encode_one(tokenizer: Any, text: str, add_special_tokens: bool) -> array[int] | RowError:  # noqa: FBT001
    try:
        return array("i", tokenizer.encode(text, add_special_tokens=add_special_tokens))
    except Exception as exc:  # noqa: BLE001 - row border
        return RowError("tokenizer_error", one_line(exc))


def _encoded(request: EngineRequest, result: array[int] | RowError | None) -> Encoded:
    token_ids, error = (None, result) if isinstance(result, RowError) else (result, None)
    return Encoded(
        request.request_id,
        request.seed,
        token_ids,
        error,
        request.params,
        request.lora,
        None if result is not None or isinstance(request.prompt, str | tuple) else request.prompt,
    )


_POOLING = (
    *("ForTextEncoding", "EmbeddingModel", "ForSequenceClassification", "ForTokenClassification"),
    *("ForAudioClassification", "ForImageClassification", "ForVideoClassification"),
    *("ClassificationModel", "ForRewardModeling", "RewardModel", "ForMaskedLM", "BertModel"),
    *("RobertaModel", "GteModel", "BidirectionalModel", "LlamaModel", "MistralModel", "Qwen2Model"),
)
"""Ends of the names of architectures that vLLM does not generate with: vllm/config/model.py,
_SUFFIX_TO_DEFAULTS, 0.32, and those of its last one, `Model`, that are in use."""
_SPECIAL_TOKEN = re.compile(r"(bos|eos|unk|sep|pad|cls|mask)_token")
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""Marks of training data, a tag of transformers' own; without them the text is the same."""
_OTHER_TOKENIZERS = ("tekken.json", "tokenizer.model.v*", "*.gguf")
"""Files of models whose chats are not rendered by transformers."""


MAX_REFUSAL_CHARS = 300


def refuse_model(spec: EngineSpec, chat: Messages | None) -> None:
    """Refuse a model that every row of a job would fail with, as far as its files tell.

    Args:
        spec: Of vLLM, its model in a local folder.
        chat: Messages with the roles that every row's have; empty where each row brings its own,
            None where prompts are plain texts.

    Raises:
        ConfigError: It generates no text, or has no chat template, or one that refuses the chat.
    """
    if spec.model_kwargs.get("runner") == "pooling":
        where = "model.engine.runner"
        raise ConfigError(where, ["'pooling' generates no text, expected 'generate' or 'auto'"])
    if spec.model_kwargs.keys().isdisjoint({"runner", "convert", "hf_overrides"}):
        _refuse_pooling(Path(spec.model))
    template = find_template(spec) if chat is not None else None
    if template is None or not chat or (why := template.refusal(chat)) is None:
        return
    turns = [message for message in chat if message["role"] != "system"]
    advice = "set prompt.chat_template_file"
    if turns != chat and template.refusal(turns) is None:
        advice = f"write what prompt.system says into prompt.user, or {advice}"
    elif len(turns) > 1 and template.refusal(turns[-1:]) is None:
        advice = f"write prompt.examples and prompt.system into prompt.user, or {advice}"
    raise ConfigError("[prompt]", [f"the model's chat template refuses every row: {why}; {advice}"])


def _refuse_pooling(folder: Path) -> None:
    """Refuse a model that makes embeddings or scores.

    Source:
        vllm/config/model.py, _get_default_runner_type, 0.32.
    """
    has_pooling = any(".Pooling" in str(item) for item in read_json(folder / "modules.json", list))
    names = read_json(folder / "config.json", dict).get("architectures") or []
    if has_pooling or (names and all(str(name).endswith(_POOLING) for name in names)):
        what = "modules.json has a pooling layer" if has_pooling else ", ".join(map(str, names))
        problem = f"{str(folder)!r} makes embeddings or scores and generates no text ({what})"
        advice = "name a model that generates, or set model.engine.runner if this one does"
        raise ConfigError("model.name", [f"{problem}; {advice}"])


class ChatTemplate:
    """A chat template in the environment that transformers runs it in.

    Source:
        transformers/utils/chat_template_utils.py, _cached_compile_jinja_template, 5.19. Importing
        it takes three seconds.
    """

    def __init__(self, text: str, variables: Mapping[str, Any]) -> None:
        """Compile it.

        Raises:
            TemplateSyntaxError: It is no template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)  # noqa: DTZ005 - as there
        self._template = environment.from_string(_GENERATION.sub("", text))
        self._variables = variables

    def refusal(self, chat: Messages) -> str | None:
        """What the template itself says against a chat; None if it says nothing."""
        try:
            how = {**end_of(chat), **self._variables}
            self._template.render(messages=flatten_parts(chat), **how)
        except _RefusedError as error:
            return " ".join(str(error).split())[:MAX_REFUSAL_CHARS]
        except Exception:  # noqa: BLE001 - row border: whether it is an error there the engine says
            return None
        return None


class _RefusedError(Exception):
    """A template has called `raise_exception`."""


def _refuse(message: str) -> None:
    raise _RefusedError(message)


def find_template(spec: EngineSpec) -> ChatTemplate | None:
    """Find the chat template that rows are rendered with: the job's, or the model's own.

    Returns:
        None if it cannot be told by files, as for Mistral's own tokenizers.

    Raises:
        ConfigError: There is none, or the job's is no template.
    """
    folder = Path(spec.model_kwargs.get("tokenizer") or spec.model)
    config = read_json(folder / "tokenizer_config.json", dict)
    is_plain = spec.model_kwargs.get("tokenizer_mode", "auto") in {"auto", "hf", "slow"}
    if not is_plain or "auto_map" in config or any(any(folder.glob(p)) for p in _OTHER_TOKENIZERS):
        return None
    text = spec.chat_template or _own_template(folder, config, has_tools=bool(spec.tools))
    sees_images = "vision_config" in read_json(folder / "config.json", dict)
    if text is None and config and not sees_images:  # For some of these vLLM has one of its own.
        problem = f"{str(folder)!r} has no chat template (a base model?), which chats need"
        advice = "set prompt.chat_template_file, or give whole prompts with prompt.text"
        raise ConfigError("[prompt]", [f"{problem}; {advice}"])
    variables = {
        **{k: _token(v) for k, v in config.items() if _SPECIAL_TOKEN.fullmatch(k) and v},
        "tools": list(spec.tools) or None,
        "documents": None,
        **spec.chat_template_kwargs,
    }
    try:
        return None if text is None else ChatTemplate(text, variables)
    except TemplateSyntaxError as error:
        if spec.chat_template is None:
            return None
        where = "prompt.chat_template_file"
        raise ConfigError(where, [f"line {error.lineno}: {error.message}"]) from error


def _own_template(folder: Path, config: Mapping[str, Any], *, has_tools: bool) -> str | None:
    """The text of a model's own template.

    Source:
        transformers/tokenization_utils_base.py, 5.19: a file of its own, else a key of the
        tokenizer's configuration, which may hold several by name. Of a processor: vLLM's renderer.
    """
    with suppress(OSError, UnicodeDecodeError):
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    processor = read_json(folder / "chat_template.json", dict)
    found = config.get("chat_template") or processor.get("chat_template")
    if isinstance(found, list | dict):
        named = found if isinstance(found, dict) else {}
        named |= {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = (named.get("tool_use") if has_tools else None) or named.get("default")
    return found if isinstance(found, str) else None


def _token(value: object) -> str:
    """A special token, given as a text or with its properties."""
    return str(value.get("content")) if isinstance(value, dict) else str(value)
