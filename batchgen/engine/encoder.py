"""`Encoder`: prompts to token ids, in one background thread, ahead of the scheduler.

Why a thread and why batches: one `encode_batch_fast` over hundreds of prompts costs half of what
vLLM's own rendering does and runs outside the GIL, while a loop of single calls fights the engine
thread for it (0.65 s became 4.2 s on two cores, vLLM 0.32). It starts before the engine
is up, so that the first thousand prompts are ready when the weights are.

It must not share vLLM's tokenizer: truncation and padding are state of the Rust object.
It knows neither vLLM nor transformers; `load_tokenizer` brings what it needs.
"""

from __future__ import annotations

import queue
import threading
from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

from batchgen.core.errors import EngineError
from batchgen.core.records import RowError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from batchgen.core.records import Messages, Prompt
    from batchgen.engine.base import EngineRequest

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


class ChatStyle(NamedTuple):
    """How a chat becomes a text; as in `EngineSpec`."""

    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]] = ()


class Encoder:
    """Takes requests from one thread, gives `Encoded` to another, in order."""

    def __init__(self, load_tokenizer: Callable[[], Any], style: ChatStyle) -> None:
        self._load_tokenizer = load_tokenizer
        self._style = style
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
            problem = f"the tokenizer cannot be loaded: {one_line(ready)}"
            raise EngineError(problem) from ready
        return ready

    def close(self) -> None:
        """Stop after the batch under way."""
        self._inbox.put(_CLOSE)
        self._thread.join()

    def _run(self) -> None:
        try:
            tokenizer = self._load_tokenizer()
        except Exception as exc:  # noqa: BLE001 - carried to the engine's thread, raised there
            self._ready.put(exc)
            return
        while (requests := self._inbox.get()) is not _CLOSE:
            for start in range(0, len(requests), MAX_BATCH):
                batch = requests[start : start + MAX_BATCH]
                self._ready.put(encode(tokenizer, batch, self._style))


def encode(tokenizer: Any, requests: Sequence[EngineRequest], style: ChatStyle) -> list[Encoded]:  # noqa: ANN401
    """Render and tokenize; a request that fails is its own error and no one else's.

    Args:
        tokenizer: A transformers tokenizer, with or without a Rust one (`_tokenizer`) inside.
        requests: Up to `MAX_BATCH` of them.
        style: The chat template to use.

    Returns:
        One entry a request, in order.
    """
    texts: dict[int, str] = {}
    results: dict[int, array[int] | RowError] = {}
    is_chat = [not isinstance(request.prompt, str) for request in requests]
    for index, request in enumerate(requests):
        if is_chat[index] and has_images(request.prompt):
            continue
        try:
            texts[index] = render(tokenizer, request.prompt, style)
        except Exception as exc:  # noqa: BLE001 - row border: templates raise what they like
            results[index] = RowError("chat_template_error", one_line(exc))
    for chat in (False, True):
        indices = [index for index in texts if is_chat[index] == chat]
        # A chat template writes the special tokens itself; a raw text gets the tokenizer's own.
        ids = _encode_texts(tokenizer, [texts[i] for i in indices], add_special_tokens=not chat)
        results.update(zip(indices, ids, strict=True))
    return [_encoded(request, results.get(index)) for index, request in enumerate(requests)]


def render(tokenizer: Any, prompt: Prompt, style: ChatStyle) -> str:  # noqa: ANN401
    """Turn a prompt into the text that is tokenized."""
    if isinstance(prompt, str):
        return prompt
    text = tokenizer.apply_chat_template(
        flatten_parts(prompt),
        tools=list(style.tools) or None,
        chat_template=style.chat_template,
        tokenize=False,
        add_generation_prompt=True,
        **style.chat_template_kwargs,
    )
    return str(text)


def has_images(prompt: Prompt) -> bool:
    """Whether any message of a chat has a content part of type `image_url`."""
    return not isinstance(prompt, str) and any(
        isinstance(part, dict) and part.get("type") == "image_url"
        for message in prompt
        if isinstance(content := message.get("content"), list)
        for part in content
    )


def flatten_parts(messages: Messages) -> list[dict[str, Any]]:
    """Write content given as OpenAI text parts as one text, parts joined by newlines.

    Many templates drop a list without a word (Qwen3's does), so the model would never see it.

    Raises:
        TypeError: A part is not a text.

    Source:
        vllm/entrypoints/chat_utils.py, content format "string", 0.32: joins by newlines.
    """
    flat = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) for part in content):
                problem = "a content part is no object, expected {type, text}"
                raise TypeError(problem)
            kinds = {part.get("type") for part in content}
            if kinds - {"text"}:
                kind = sorted(map(str, kinds - {"text"}))[0]
                problem = f"a content part of type {kind!r}, only 'text' is supported"
                raise TypeError(problem)
            content = "\n".join([part["text"] for part in content])
            flat.append({**message, "content": content})
        else:
            flat.append(dict(message))
    return flat


def one_line(exc: BaseException, max_chars: int = 500) -> str:
    """Put an exception of someone else's on one line: its type and the text, cut if long."""
    text = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {text}"[:max_chars] if text else type(exc).__name__


def _encode_texts(
    tokenizer: Any,  # noqa: ANN401
    texts: Sequence[str],
    *,
    add_special_tokens: bool,
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


def _encode_one(tokenizer: Any, text: str, add_special_tokens: bool) -> array[int] | RowError:  # noqa: ANN401, FBT001
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
        None if result is not None or isinstance(request.prompt, str) else request.prompt,
    )
