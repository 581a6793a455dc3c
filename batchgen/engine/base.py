"""The seam that every engine fits: add requests, step, take what finished.

The engine takes prompts, not token ids: tokenizing belongs to the model, runs inside the engine's
own process ahead of its scheduler, and an engine behind HTTP would do it on the far side.
The runner keeps `capacity` requests inside, tops up as completions come, and never waits for a
slow row: there is no batch and no barrier at this seam.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from batchgen.core.errors import ConfigError, one_line
from batchgen.core.records import (
    Completion,
    EngineFacts,
    EngineSpec,
    EngineStats,
    Messages,
    Prompt,
    Request,
    RowError,
    TaskFacts,
    WorkLeft,
    is_continued,
)

BACKENDS = {
    "vllm": "batchgen.engine.vllm.engine:VllmEngine",
    "echo": "batchgen.engine.echo:EchoEngine",
    "openai": "batchgen.endpoints.engine:OpenAIEngine",
    "auto": "batchgen.endpoints.warm:engine_for",
}
WHERE = "[model]"
TASK = "task"


class HostedRequest(NamedTuple):
    """What of a `Request` crosses a process border: nothing of its row's columns."""

    request_id: int
    """Unique within one run."""
    prompt: Prompt
    """Raw text, a chat, or a pair of texts."""
    seed: int | None
    """For sampling, 0 <= seed < 2**62."""
    params: Mapping[str, Any] | None = None
    """SamplingParams fields that differ from the spec's."""
    lora: str | None = None
    """Name of an adapter of the spec's, or None."""


EngineRequest = Request | HostedRequest
"""What an engine gets: it may see the fields of the latter, no more."""


class Engine(Protocol):
    """Turns requests into completions. One instance a worker; one thread steps, one may `add`.

    `model.backend = "package.module:Class"` names a class of one's own (experimental: this seam
    may change). It lives in a process of its own, where it may crash and hang as it likes, unless
    its `spec.model_kwargs`, which are `[model.engine]` as written, hold `in_process = true`.

    It generates text. For other tasks it has a class method `task_facts(spec: EngineSpec) ->
    TaskFacts`, which is asked before any engine is made, may look at the model's files alone, and
    raises ConfigError for a task that it or the model cannot do. Answers then are `Sample.numbers`.

    One with a method `expect(work: WorkLeft)` is told what is left to do once that is known, which
    may be while it starts, and from another thread than steps it.
    """

    def __init__(self, spec: EngineSpec) -> None:
        """Make the engine; cheap and at once, the first step does the work.

        Raises:
            ConfigError: `spec` asks for what it cannot do.
        """

    @property
    def facts(self) -> EngineFacts | None:
        """What the engine is; None until it is up."""

    @property
    def capacity(self) -> int:
        """How many requests it wants to hold: those in its scheduler and those it prepares."""

    @property
    def num_in_flight(self) -> int:
        """Requests added and not yet returned by `step`."""

    @property
    def stats(self) -> EngineStats:
        """The latest look at its scheduler; never blocks."""

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """Hand requests over, before or after the engine is up. Does not wait for them.

        A request that the engine refuses (too long, a bad parameter) comes back from `step` as
        a completion with `error`; it never raises here.

        Raises:
            EngineDeadError: The engine is dead.
        """

    def step(self, timeout_s: float) -> list[Completion]:
        """Return what finished since the last call, in finish order; wait up to `timeout_s`.

        Each request added comes back exactly once. An empty list means that nothing finished
        in time, which is normal while the engine starts.

        Raises:
            ConfigError: It did not start: the job asks for what it cannot do.
            EngineError: It did not start.
            EngineDeadError: The engine died. Completions returned before stay valid; requests
                still in flight are lost to it and may be added to another engine.
        """

    def close(self) -> None:
        """Stop at once, drop what is in flight, leave no process behind. Idempotent."""


def engine_class(backend: str) -> type[Engine]:
    """Import the class that a job's `model.backend` names.

    Raises:
        ConfigError: There is none.
    """
    module, _, name = BACKENDS.get(backend, backend).partition(":")
    try:
        found: type[Engine] = getattr(import_module(module), name)
    except Exception as error:  # Whatever a module of the user's own raises.
        problem = f"model.backend = {backend!r} cannot be imported: {one_line(error)}"
        expected = "expected package.module:Class, installed here or in a folder of PYTHONPATH"
        if backend in BACKENDS:
            expected = f"expected what `pip install 'batchgen-vllm[{backend}]'` installs"
        raise ConfigError(WHERE, [f"{problem}; {expected}"]) from error
    return found


def task_facts(spec: EngineSpec) -> TaskFacts:
    """Ask an engine what it makes of a row, for a task other than to generate.

    Raises:
        ConfigError: It or the model cannot do that.
    """
    backend = "vllm" if spec.is_vllm else spec.backend
    ask = getattr(engine_class(backend), "task_facts", None)
    if ask is None:
        problem = f"{spec.task!r}: the engine {spec.backend!r} can do generate only"
        raise ConfigError(TASK, [problem])
    found: TaskFacts = ask(spec)
    return found


def expect(engine: object, work: WorkLeft) -> None:
    """Tell an engine what is left to do, if it cares."""
    if (hear := getattr(engine, "expect", None)) is not None:
        hear(work)


def failed(request_id: int, error: RowError) -> Completion:
    """The completion of a request that has no answer."""
    return Completion(request_id, (), None, None, None, None, error)


def unknown_adapter(name: str, known: Iterable[str]) -> RowError:
    """Say which LoRA adapters there are."""
    names = ", ".join(known) or "none"
    return RowError("unknown_adapter", f"no LoRA adapter {name!r}; the job has {names}")


def end_of(chat: Messages) -> dict[str, bool]:
    """Say how a chat template is to end a chat: where the assistant's next text begins.

    vLLM's words: without `add_generation_prompt` and with `continue_final_message` a last turn of
    the assistant is left open, else its end is written and a new turn begins.
    """
    if is_continued(chat):
        return {"add_generation_prompt": False, "continue_final_message": True}
    return {"add_generation_prompt": True}


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
                raise TypeError("a content part is no object, expected {type, text}")
            kinds = {part.get("type") for part in content}
            if kinds - {"text"}:
                kind = sorted(map(str, kinds - {"text"}))[0]
                raise TypeError(f"a content part of type {kind!r}, only 'text' is supported")
            content = "\n".join([part["text"] for part in content])
            flat.append({**message, "content": content})
        else:
            flat.append(dict(message))
    return flat
