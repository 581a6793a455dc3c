"""Whether the model fits into the memory, how many rows at once, and what to change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchgen.preview.findings import Finding, gib, ok, problem, warning
from batchgen.preview.memory import BLOCK_TOKENS, CONTEXT_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchgen.engine.devices import Gpu
    from batchgen.preview.lengths import RowLengths
    from batchgen.preview.memory import Memory, Settings
    from batchgen.preview.shape import Shape

FEW_SHARE = 0.25
"""Of max_num_seqs: with fewer rows at once the GPU has much less to do than it could."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How many rows run at once."""

    max_num_seqs: int
    kv_cache_tokens: int | None
    concurrency: float | None
    """Rows of the job's mean length that the KV cache holds; None where that is not known."""
    full_length: float | None
    """Rows of max_model_len that it holds."""
    expected_rows: int | None
    """At once: what the KV cache holds, and no more than max_num_seqs."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def fit_of(
    kv_cache_tokens: int | None,
    max_num_seqs: int,
    max_model_len: int | None,
    rows: RowLengths | None,
) -> Fit:
    """Divide the KV cache by the rows; a row takes whole blocks, and all of its tokens."""
    concurrency = full = expected = None
    if kv_cache_tokens is not None and rows is not None:
        concurrency = kv_cache_tokens / _in_blocks(rows.total)
        expected = min(max_num_seqs, int(concurrency))
    if kv_cache_tokens is not None and max_model_len:
        full = kv_cache_tokens / _in_blocks(max_model_len)
    return Fit(max_num_seqs, kv_cache_tokens, concurrency, full, expected)


def _in_blocks(tokens: float) -> float:
    return max(1, math.ceil(tokens / BLOCK_TOKENS)) * BLOCK_TOKENS


def check_memory(memory: Memory, settings: Settings, shape: Shape, gpu: Gpu) -> Iterator[Finding]:
    """Whether vLLM would start: free memory, weights, and one row of full length."""
    free = gpu.free_bytes - CONTEXT_BYTES
    if free < memory.budget:
        share = math.floor(max(0, free) / memory.total * 100) / 100
        text = (
            f"vLLM wants {gib(memory.budget)} ({settings.utilization:g} of GPU {gpu.index}), about "
            f"{gib(free)} would be free"
        )
        advice = f"end what else uses it, or set model.gpu_memory_utilization = {share}"
        yield problem("memory", text, advice)
    parts = [
        (memory.weights, "weights"),
        (memory.activations, f"activations at {settings.max_num_batched_tokens:,} tokens a step"),
        (memory.graphs, "CUDA graphs"),
        (memory.other, "CUDA libraries"),
    ]
    told = " - ".join(f"{gib(size)} {name}" for size, name in parts if size)
    text = f"estimate for one GPU: {gib(memory.budget)} - {told} = {gib(memory.kv_cache)} KV cache"
    if settings.kv_cache_bytes:
        text = f"estimate for one GPU: {told}, and {gib(memory.kv_cache)} KV cache as the job says"
    if memory.kv_cache <= 0:
        yield problem("memory", f"{text}: the model does not fit", _smaller(settings))
        return
    if shape.is_multimodal:
        text += "; what images take is not counted"
    yield ok("memory", text)


def check_kv_cache(fit: Fit, shape: Shape, settings: Settings) -> Iterator[Finding]:
    """Whether the KV cache holds one row of full length, as vLLM asks for."""
    tokens, longest = fit.kv_cache_tokens, settings.max_model_len
    if tokens is None:
        why = shape.not_plain or f"a KV cache in {settings.kv_dtype} is not counted here"
        yield ok("kv cache", f"tokens that it holds: not known, {why}; vLLM logs it at its start")
        return
    text = f"about {tokens:,} tokens (estimate)"
    if longest is None:
        yield ok("kv cache", text)
    elif tokens < longest:
        advice = f"set model.max_model_len to {tokens:,} or less, or: {_smaller(settings)}"
        yield problem("kv cache", f"{text}, one row may have {longest:,} (max_model_len)", advice)
    else:
        yield ok("kv cache", f"{text}, {fit.full_length:,.1f} rows of max_model_len {longest:,}")


def told_rows(rows: RowLengths) -> str:
    """How long the job's rows are."""
    out = f"up to {rows.answer:,.0f}" if rows.is_bound else f"{rows.answer:,.0f}"
    return f"{rows.prompt:,.0f} tokens in, {out} out ({rows.source})"


def check_rows(fit: Fit, rows: RowLengths | None, settings: Settings) -> Iterator[Finding]:
    """How many rows run at once, and whether the longest fit."""
    if rows is None:
        return
    told, longest, limit = told_rows(rows), rows.longest_prompt, settings.max_model_len
    if longest is not None and limit is not None and longest >= limit:
        text = f"the longest prompt looked at has about {longest:,} tokens, max_model_len is"
        advice = "such rows end as errors; raise model.max_model_len if the model allows it"
        yield warning("rows", f"{text} {limit:,}", advice)
    if rows.num_tight and limit is not None:
        text = f"{rows.num_tight:,} of the prompts looked at leave less room than max_tokens"
        text = f"{text}: answers are cut at max_model_len {limit:,}"
        advice = "lower sampling.max_tokens, or raise model.max_model_len if the model allows it"
        yield warning("rows", text, advice)
    if fit.concurrency is None or fit.expected_rows is None:
        yield ok("rows", told)
        return
    text = f"{told}: about {fit.expected_rows:,} at once; the KV cache holds about"
    text = f"{text} {fit.concurrency:,.0f} such rows, max_num_seqs is {fit.max_num_seqs:,}"
    if rows.is_bound:
        yield ok("rows", f"{text}; more if answers are shorter than they may be")
    elif fit.concurrency < FEW_SHARE * fit.max_num_seqs:
        advice = "model.engine.kv_cache_dtype = 'fp8', a smaller or quantized model, or more GPUs"
        yield warning("rows", f"{text}: memory is the limit", advice)
    else:
        yield ok("rows", text)


def _smaller(settings: Settings) -> str:
    ways = ["take a smaller or a quantized model", "or model.quantization = 'fp8'"]
    if settings.max_num_batched_tokens > 8192:
        ways.append("or lower model.engine.max_num_batched_tokens")
    more = settings.tensor_parallel * 2
    return f"{', '.join(ways)}, or share it: model.tensor_parallel_size = {more}"
