"""`EchoEngine`: answers with the beginning of the prompt. No model, no GPU, no process of its own.

For dry runs (does the job file do what it should, before a GPU is rented) and for measuring the
pipeline around the engine. It behaves like vLLM where
that matters to its callers: it holds at most `max_num_seqs` requests at once, finishes them out
of order, honours `max_tokens`, and refuses bad requests one by one. Its "tokens" are UTF-8 bytes.

The answer depends on the prompt and `max_tokens` alone, so a rerun must give the same dataset; `n`
answers are `n` times the same. It has no grammar, no log probabilities and no weights to adapt.
For other tasks than to generate the numbers are noise, made of a hash of the prompt.
One thread may `add` while another `step`s: their counters are apart, and deques are atomic.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from array import array
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from batchgen.core.errors import ConfigError, nearest
from batchgen.core.records import (
    Completion,
    EngineFacts,
    EngineStats,
    RowError,
    Sample,
    TaskFacts,
    TokenLogprobs,
)
from batchgen.engine.base import EngineRequest, failed, flatten_parts, unknown_adapter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.core.records import EngineSpec, Messages, Prompt

VERSION = "1"
WHERE = "model.engine (backend echo)"
SAMPLING = "sampling"
DEFAULT_MAX_TOKENS = 16
"""As vLLM's: vllm/sampling_params.py, SamplingParams.max_tokens, 0.26 to 0.33."""
INSTANT_CAPACITY = 4096
"""With no time a step, a small window would only measure the caller's loop."""


class EchoOptions(BaseModel):
    """`[model.engine]` of the echo backend."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    max_num_seqs: int = Field(default=256, ge=1)
    """Requests that run at once."""
    step_s: float = Field(default=0.0, ge=0)
    """Time that one engine step takes."""
    max_steps: int = Field(default=1, ge=1)
    """A request runs for 1 to this many steps, by a hash of its prompt; 1 keeps the order."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Prompt bytes must be fewer; prompt and answer together are at most this many."""
    in_process: bool = True
    """False: in a process of its own, as vLLM is."""
    embedding_size: int = Field(default=384, ge=1)
    """Numbers of a vector, for `task = "embed"`."""
    labels: list[str] = Field(default=["no", "yes"], min_length=1)
    """For `task = "classify"`."""


def read_options(model_kwargs: Mapping[str, Any]) -> EchoOptions:
    """Check `[model.engine]` for the echo backend.

    Raises:
        ConfigError: With every unknown or impossible option.
    """
    try:
        return EchoOptions(**model_kwargs)
    except ValidationError as exc:
        problems = [_problem(error) for error in exc.errors(include_url=False)]
        raise ConfigError(WHERE, problems) from exc


def _problem(error: Mapping[str, Any]) -> str:
    name = str(error["loc"][0])
    if error["type"] != "extra_forbidden":
        return f"{name} = {error['input']!r}: {error['msg']}"
    known = list(EchoOptions.model_fields)
    near = nearest(name, known)
    hint = f"did you mean {near!r}?" if near else f"expected one of {', '.join(known)}"
    return f"unknown option {name!r}; {hint}"


class _Limits(NamedTuple):
    """What sampling parameters mean here."""

    max_tokens: int
    n: int


def read_limits(params: Mapping[str, Any]) -> _Limits:
    """Read what the echo engine honours of SamplingParams.

    Raises:
        ValueError: A value is none that vLLM would take either.
    """
    max_tokens, n = params.get("max_tokens", DEFAULT_MAX_TOKENS), params.get("n", 1)
    for name, value in (("max_tokens", 1 if max_tokens is None else max_tokens), ("n", n)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} = {value!r} is not a whole number of 1 or more")
    return _Limits(2**62 if max_tokens is None else max_tokens, n)


def noise(data: bytes, size: int) -> bytes:
    """Numbers made of a hash, each float32 between 0.03 and 0.12, or the same below zero."""
    digest = hashlib.shake_128(data).digest(2 * size)
    numbers = bytearray(4 * size)
    numbers[2::4] = digest[:size]
    numbers[3::4] = digest[size:].translate(_EXPONENTS)
    return bytes(numbers)


_EXPONENTS = bytes([0x3D, 0xBD] * 128)
"""Last byte of a float32, and so its sign, by any byte (as processors of today store numbers)."""


class _Running(NamedTuple):
    request_id: int
    data: bytes
    admitted_at: float
    limits: _Limits
    scored: bytes
    """Its last tokens, whose likelihoods are wanted; for other tasks none."""
    num_numbers: int


class EchoEngine:
    """Implements `Engine` in the caller's process; up from the first moment."""

    def __init__(self, spec: EngineSpec) -> None:
        started = time.perf_counter()
        options = read_options(spec.model_kwargs)
        self._max_num_seqs, self._max_steps = options.max_num_seqs, options.max_steps
        self._step_s = options.step_s
        self._max_model_len = options.max_model_len
        self._loras = spec.loras
        self._sampling_params = spec.sampling_params
        self._limits = _job_limits(spec.sampling_params)
        self._task = spec.task
        self._size = self.task_facts(spec).size if spec.task != "generate" else 0
        self._too_long = spec.pooling.get("too_long", "refuse")
        self._tells_tokens = spec.pooling.get("token_logprobs", False)
        window = spec.max_in_flight or 2 * self._max_num_seqs
        self._capacity = window if self._step_s else max(window, INSTANT_CAPACITY)
        self._waiting: deque[EngineRequest] = deque()
        self._buckets: dict[int, list[_Running]] = {}
        self._num_running = 0
        self._num_added = 0
        self._num_returned = 0
        self._tokens = {"num_prompt_tokens": 0, "num_generated_tokens": 0}
        self._step = 0
        self._step_done_at = 0.0
        self._facts = EngineFacts(
            name="echo",
            version=VERSION,
            device="none",
            max_model_len=self._max_model_len,
            max_num_seqs=self._max_num_seqs,
            startup_s=time.perf_counter() - started,
        )

    @classmethod
    def task_facts(cls, spec: EngineSpec) -> TaskFacts:
        """Say what a row gets; it can do every task."""
        options = read_options(spec.model_kwargs)
        if spec.task == "classify":
            return TaskFacts(len(options.labels), options.labels)
        size = spec.pooling.get("dimensions", options.embedding_size)
        size = {"score": 1, "loglikelihood": 2}.get(spec.task, size)
        return TaskFacts(size, prefix=spec.pooling.get("prefix", ""))

    @property
    def facts(self) -> EngineFacts | None:
        """What it is; never None."""
        return self._facts

    @property
    def capacity(self) -> int:
        """`max_in_flight`, or twice `max_num_seqs`; at least 4096 when steps take no time."""
        return self._capacity

    @property
    def num_in_flight(self) -> int:
        """Requests added and not yet returned."""
        return self._num_added - self._num_returned

    @property
    def stats(self) -> EngineStats:
        """Rows and tokens; there is no KV cache. All tokens of an answer come in its last step."""
        num_waiting = len(self._waiting)
        return EngineStats(self._num_running, num_waiting, num_steps=self._step, **self._tokens)

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """Queue requests; they are looked at when a step admits them."""
        self._num_added += len(requests)
        self._waiting.extend(requests)

    def step(self, timeout_s: float) -> list[Completion]:
        """Run one engine step, or wait for the one under way.

        With nothing in flight it returns at once: no one else could bring anything.
        """
        if not self.num_in_flight:
            return []
        if self._step_s and not self._wait_for_step(timeout_s):
            return []
        completions = self._admit()
        for running in self._buckets.pop(self._step, ()):
            completions.append(self._answer(running))
            self._num_running -= 1
        self._step += 1
        self._num_returned += len(completions)
        return completions

    def close(self) -> None:
        """Drop everything."""
        self._waiting.clear()
        self._buckets.clear()
        self._num_running = 0
        self._num_returned = self._num_added

    def _wait_for_step(self, timeout_s: float) -> bool:
        """Let the current step's time pass; False if it is not over after `timeout_s`."""
        now = time.perf_counter()
        if not self._step_done_at:
            self._step_done_at = now + self._step_s
        remaining = self._step_done_at - now
        time.sleep(max(0.0, min(remaining, timeout_s)))
        if remaining > timeout_s:
            return False
        self._step_done_at = 0.0
        return True

    def _admit(self) -> list[Completion]:
        """Fill free places from the queue; return the refusals."""
        refusals = []
        now = time.perf_counter()
        waiting = self._waiting
        while waiting and self._num_running < self._max_num_seqs:
            request = waiting.popleft()
            data, limits = self._prepare(request), self._limits_of(request)
            if isinstance(data, RowError):
                refusals.append(failed(request.request_id, data))
                continue
            if isinstance(limits, RowError):
                refusals.append(failed(request.request_id, limits))
                continue
            last = self._step
            if self._max_steps > 1:
                # Not hash(): that differs between processes, and finish order should not.
                last += zlib.crc32(data) % self._max_steps
            num = self._size * (len(request.prompt) - 1 if self._task == "score" else 1)
            scored = self._scored(request)
            running = _Running(request.request_id, data, now, limits, scored, num)
            self._buckets.setdefault(last, []).append(running)
            self._num_running += 1
            self._tokens["num_prompt_tokens"] += len(data)
        return refusals

    def _limits_of(self, request: EngineRequest) -> _Limits | RowError:
        if request.params is None and request.lora is None:
            return self._limits
        if request.lora is not None and request.lora not in self._loras:
            return unknown_adapter(request.lora, self._loras)
        try:
            return read_limits({**self._sampling_params, **(request.params or {})})
        except ValueError as exc:
            return RowError("bad_request", str(exc))

    def _scored(self, request: EngineRequest) -> bytes:
        text: Any = request.prompt[-1] if isinstance(request.prompt, tuple) else request.prompt
        return text.encode() if self._task == "loglikelihood" else b""

    def _prepare(self, request: EngineRequest) -> bytes | RowError:
        is_likelihood = self._task == "loglikelihood"
        has_end = self._size and not is_likelihood
        data = encode_prompt(request.prompt, end=b"\n" if has_end else b"")
        if is_likelihood and not isinstance(data, RowError) and not self._scored(request):
            return RowError("empty_prompt", "the continuation has no tokens")
        if isinstance(data, RowError) or self._max_model_len is None or self._too_long != "refuse":
            return data
        is_fit = len(data) < self._max_model_len + bool(self._size)
        return data if is_fit else prompt_too_long(len(data), self._max_model_len)

    def _answer(self, running: _Running) -> Completion:
        if self._size:
            return self._number(running)
        num_prompt_tokens = len(running.data)
        limit, n = running.limits
        if self._max_model_len is not None:
            limit = min(limit, self._max_model_len - num_prompt_tokens)
        # "ignore" drops at most the one character that the limit cuts in two.
        text = running.data[:limit].decode("utf-8", "ignore")
        is_cut = num_prompt_tokens > limit
        num_output_tokens = len(text.encode()) if is_cut else num_prompt_tokens
        finish_reason = "length" if is_cut else "stop"
        self._tokens["num_generated_tokens"] += num_output_tokens * n
        latency_s = time.perf_counter() - running.admitted_at
        return Completion(
            running.request_id,
            (Sample(text, finish_reason, num_tokens=num_output_tokens),) * n,
            num_prompt_tokens,
            0,
            num_output_tokens * n,
            latency_s,
        )

    def _number(self, running: _Running) -> Completion:
        """Answer with numbers; chunks are cut, as in truncation, and only counted."""
        data, most = running.data, self._max_model_len or len(running.data)
        scored = running.scored if self._too_long == "chunk" else running.scored[:most]
        numbers, logprobs = noise(data[:most], len(scored) or running.num_numbers), None
        if self._task == "loglikelihood":
            found = memoryview(numbers).cast("f")
            sizes = [-abs(number) for number in found]
            numbers = array("f", sizes + [1.0 + (number < 0) for number in found]).tobytes()
            if self._tells_tokens:
                texts = [bytes([byte]).decode("utf-8", "replace") for byte in scored]
                logprobs = [TokenLogprobs(*item, ()) for item in zip(texts, sizes, strict=True)]
        elif self._task != "embed":
            sizes = [abs(number) for number in memoryview(numbers).cast("f")]
            total = 0.125 if self._task == "score" else sum(sizes)
            numbers = array("f", [size / total for size in sizes]).tobytes()
        is_whole, num_chunks = len(data) <= most, 1
        if self._too_long == "chunk":
            is_whole, num_chunks = True, -(-len(data) // most)
        reason = "stop" if is_whole else "length"
        sample = Sample("", reason, logprobs, numbers=numbers, num_chunks=num_chunks)
        latency_s = time.perf_counter() - running.admitted_at
        return Completion(running.request_id, (sample,), len(data), 0, 0, latency_s)


def _job_limits(params: Mapping[str, Any]) -> _Limits:
    try:
        return read_limits(params)
    except ValueError as exc:
        raise ConfigError(SAMPLING, [str(exc)]) from exc


def encode_prompt(prompt: Prompt, end: bytes = b"") -> bytes | RowError:
    """The tokens of a prompt: its UTF-8 bytes; or why there are none.

    Args:
        prompt: Any; a pair's texts make two lines.
        end: A token behind them, as models that make vectors have it.
    """
    try:
        if isinstance(prompt, tuple):
            prompt = "\n".join(prompt)
        data = (prompt if isinstance(prompt, str) else chat_text(prompt)).encode() + end
    except (TypeError, KeyError) as exc:
        return RowError("chat_template_error", f"a message has no text content: {exc}")
    except UnicodeEncodeError as exc:
        return RowError("tokenizer_error", f"the prompt is not valid Unicode: {exc}")
    return data or RowError("empty_prompt", "the prompt has no tokens")


def chat_text(messages: Messages) -> str:
    """Contents joined by newlines: the echo engine's chat template.

    Raises:
        TypeError, KeyError: A message's content is missing or not a text.
    """
    try:
        return "\n".join([message["content"] for message in messages])
    except TypeError:  # Content parts, or none.
        return "\n".join([message["content"] for message in flatten_parts(messages)])


def prompt_too_long(num_prompt_tokens: int, max_model_len: int) -> RowError:
    """Say both numbers; at least one token must be left for the answer."""
    return RowError(
        "prompt_too_long",
        f"the prompt has {num_prompt_tokens} tokens, the model takes fewer than {max_model_len} "
        "(max_model_len)",
    )
