"""Weights, activations and KV cache against a GPU's memory. Pure; every figure is an estimate.

vLLM takes `gpu_memory_utilization` of the GPU, loads the weights, measures the peak of a step with
`max_num_batched_tokens` tokens and `max_num_seqs` rows, and gives what is left to the KV cache
(vllm/v1/worker/gpu_worker.py, determine_available_memory, 0.26 to 0.33). The same sum is done
here, with the peak from a formula instead of a measurement.

Held against vLLM 0.26 on an H100 80 GB: Qwen3-8B, bfloat16, 0.9 of 79.18 GiB, weights 15.27 GiB,
peak 1.53 GiB, other 0.22 GiB, left for the KV cache 54.24 GiB = 394,928 tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchgen.engine.vllm.settings import GPU_MEMORY_UTILIZATION
from batchgen.engine.vllm.shares import DTYPE_BYTES, Shape
from batchgen.preview.machine import GIB, gib

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.engine.devices import Gpu
    from batchgen.preview.sample import RowLengths

NO_FLOAT16 = frozenset({"gemma2", "gemma3", "gemma3_text", "plamo2", "glm4"})
"""Models whose numbers are too large for it: vllm/config/model.py, 0.26 to 0.33."""
BLOCK_TOKENS = 16
CONTEXT_BYTES = 540 << 20
"""A CUDA context: gone from the free memory before vLLM looks at it. 0.52 GiB on an H100."""
_OTHER_BYTES = 256 << 20
"""What CUDA libraries hold beside torch's own memory: 0.22 GiB on an H100."""
_GRAPH_BYTES_A_LAYER = 29 << 20
"""CUDA graphs of all batch sizes: 1.01 GiB for 36 layers on an H100, vLLM 0.26."""
_BIG_GPU_BYTES = 70 * GIB


@dataclass(frozen=True, slots=True)
class Settings:
    """The keywords of `LLM(...)` that matter for memory, or vLLM's defaults for them."""

    tensor_parallel: int
    pipeline_parallel: int
    utilization: float
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int | None
    dtype: str
    kv_dtype: str
    """`auto` resolved."""
    is_eager: bool
    kv_cache_bytes: int | None
    """`kv_cache_memory_bytes`: vLLM then measures nothing."""
    num_engines: int = 1
    """Engines that share the GPU; all else is of one of them."""

    @property
    def num_gpus(self) -> int:
        """GPUs that hold one copy of the model."""
        return self.tensor_parallel * self.pipeline_parallel


@dataclass(frozen=True, slots=True)
class Memory:
    """What fills one GPU, in bytes."""

    total: int
    budget: int
    """What vLLM takes."""
    weights: int
    activations: int
    graphs: int
    """CUDA graphs, where vLLM counts them in."""
    other: int
    kv_cache: int
    """What is left; below 0 if nothing is."""
    kv_bytes_per_token: int | None
    kv_cache_tokens: int | None
    """None where a token's bytes are not known."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How many rows run at once, in all engines that share the GPU."""

    max_num_seqs: int
    kv_cache_tokens: int | None
    concurrency: float | None
    """Rows of the job's mean length that the KV cache holds; None where that is not known."""
    full_length: float | None
    """Rows of max_model_len that it holds."""
    expected_rows: int | None
    """Rows at once: what the KV cache holds, and no more than max_num_seqs."""


def settings_of(
    kwargs: Mapping[str, Any], shape: Shape, gpu: Gpu, max_model_len: int | None
) -> Settings:
    """Fill in vLLM's defaults.

    Source:
        vllm/engine/arg_utils.py, get_batch_defaults and
        _set_default_max_num_seqs_and_batched_tokens_args, for LLM(...), 0.26 to 0.33.
    """
    is_big = gpu.total_bytes >= _BIG_GPU_BYTES and "a100" not in gpu.name.lower()
    times = 2 if kwargs.get("performance_mode") == "throughput" else 1
    seqs = _whole(kwargs, "max_num_seqs")
    tokens = _whole(kwargs, "max_num_batched_tokens")
    default_seqs, default_tokens = (1024, 16384) if is_big else (256, 8192)
    max_seqs = seqs or default_seqs * times
    max_tokens = tokens or default_tokens * times
    if not tokens and max_model_len:
        max_tokens = min(max_tokens, max_seqs * max_model_len)
    dtype = _dtype(kwargs, shape, gpu.capability)
    return Settings(
        tensor_parallel=_whole(kwargs, "tensor_parallel_size") or 1,
        pipeline_parallel=_whole(kwargs, "pipeline_parallel_size") or 1,
        utilization=float(kwargs.get("gpu_memory_utilization") or GPU_MEMORY_UTILIZATION),
        max_num_seqs=seqs or min(max_seqs, max_tokens),
        max_num_batched_tokens=max_tokens,
        max_model_len=max_model_len,
        dtype=dtype,
        kv_dtype=_kv_dtype(kwargs, shape, dtype),
        is_eager=bool(kwargs.get("enforce_eager")),
        kv_cache_bytes=_whole(kwargs, "kv_cache_memory_bytes"),
    )


def _whole(kwargs: Mapping[str, Any], name: str) -> int | None:
    found = kwargs.get(name)
    return found if isinstance(found, int) and found > 0 else None


def _dtype(kwargs: Mapping[str, Any], shape: Shape, capability: tuple[int, int] | None) -> str:
    """What the model runs in: `auto` is the checkpoint's, but 16 bits for float32.

    Source:
        vllm/config/model.py, _resolve_auto_dtype, 0.26 to 0.33.
    """
    names = {"half": "float16", "float": "float32"}
    given = str(kwargs.get("dtype") or "auto").removeprefix("torch.")
    if given != "auto":
        return names.get(given, given)
    is_old = capability is not None and capability < (8, 0)
    if shape.model_type in NO_FLOAT16:
        return "float32" if is_old else "bfloat16"
    found = names.get(shape.dtype, shape.dtype)
    return "float16" if is_old or found == "float16" else "bfloat16"


def _kv_dtype(kwargs: Mapping[str, Any], shape: Shape, dtype: str) -> str:
    """Format of the KV cache: the model's, unless the job or an fp8 checkpoint says otherwise.

    Source:
        vllm/utils/torch_utils.py, get_kv_cache_quant_algo_string, 0.26 to 0.33.
    """
    given = str(kwargs.get("kv_cache_dtype") or "auto")
    if given != "auto":
        return given
    inner = shape.quantization.get("quantization")
    config = inner if isinstance(inner, dict) else shape.quantization
    is_modelopt = str(shape.quantization.get("quant_method", "")).startswith("modelopt")
    algorithm = str(config.get("kv_cache_quant_algo") or "").lower()
    return algorithm if is_modelopt and algorithm else dtype


def _activation_bytes(shape: Shape, settings: Settings) -> int:
    """Peak of a step beyond the weights, on one GPU.

    The larger of two moments: inside the MLP, three copies of the hidden states, and gate, up and
    their product (in a mixture of experts for each expert of a token); or at the sampler, the
    logits of `max_num_seqs` rows in the model's format and in float32. 1.50 GiB by the formula
    for Qwen3-8B and 16,384 tokens, where vLLM 0.26 measured 1.53 GiB.
    """
    size, tp = DTYPE_BYTES.get(settings.dtype, 2), settings.tensor_parallel
    inner = 3 * shape.intermediate / tp
    if shape.experts:
        inner = shape.experts_per_token * (3 * shape.moe_intermediate / tp + shape.hidden)
    tokens = settings.max_num_batched_tokens
    forward = tokens * (3 * shape.hidden + inner) * size
    logits = settings.max_num_seqs * shape.vocab * (size + 4) + tokens * shape.hidden * size
    return round(max(forward, logits))


def _graph_bytes(shape: Shape, settings: Settings, release: tuple[int, int]) -> int:
    """CUDA graphs, as far as vLLM leaves room for them beside the KV cache.

    vLLM 0.26 does not for dense models (vllm/v1/worker/gpu/model_runner.py,
    profile_cudagraph_memory): there they come out of what `gpu_memory_utilization` leaves.
    """
    if settings.is_eager or (release <= (0, 26) and not shape.experts):
        return 0
    return _GRAPH_BYTES_A_LAYER * -(-shape.layers // settings.pipeline_parallel)


def estimate(
    shape: Shape, weights_bytes: int, settings: Settings, total: int, release: tuple[int, int]
) -> Memory:
    """Work out what is left for the KV cache on one GPU.

    Args:
        shape: Sizes of the model.
        weights_bytes: Weights of the whole model; GPUs share them evenly, nearly.
        settings: The engine's.
        total: Memory of the GPU, as CUDA sees it.
        release: vLLM's.
    """
    budget = round(total * settings.utilization)
    weights = weights_bytes // settings.num_gpus
    activations = _activation_bytes(shape, settings)
    graphs = _graph_bytes(shape, settings, release)
    left = settings.kv_cache_bytes or budget - weights - activations - graphs - _OTHER_BYTES
    per_token = shape.kv_bytes(
        settings.kv_dtype, settings.tensor_parallel, settings.pipeline_parallel
    )
    return Memory(
        total=total,
        budget=budget,
        weights=weights,
        activations=activations,
        graphs=graphs,
        other=_OTHER_BYTES,
        kv_cache=left,
        kv_bytes_per_token=per_token,
        kv_cache_tokens=tokens_in(left, per_token),
    )


def tokens_in(num_bytes: int | None, per_token: int | None) -> int | None:
    """Tokens that a KV cache holds, in whole blocks; None where either size is not known."""
    if num_bytes is None or not per_token:
        return None
    return max(0, num_bytes // (per_token * BLOCK_TOKENS)) * BLOCK_TOKENS


def fit_of(tokens: int | None, settings: Settings, rows: RowLengths | None) -> Fit:
    """Divide the KV cache by the rows; a row takes whole blocks, and all of its tokens.

    Args:
        tokens: That the KV cache of one engine holds; None where it is not known.
        settings: Of one engine.
        rows: Lengths of the job's rows; None where they are not known.
    """
    concurrency = full = expected = None
    max_seqs = settings.max_num_seqs * settings.num_engines
    if tokens is not None:
        tokens *= settings.num_engines
    if tokens is not None and rows is not None:
        concurrency = tokens / _in_blocks(rows.prompt + rows.answer)
        expected = min(max_seqs, int(concurrency))
    if tokens is not None and settings.max_model_len:
        full = tokens / _in_blocks(settings.max_model_len)
    return Fit(max_seqs, tokens, concurrency, full, expected)


LENGTHS = (1024, 2048, 4096, 8192, 32768)
"""Tokens of a row, prompt and answer, for which it is said how many run at once."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to run the model on this kind of GPU: as the job says, or with less memory."""

    name: str
    change: str
    """What to write in the job; empty for the job as it is."""
    num_gpus: int
    weights: int
    """On one GPU."""
    kv_cache: int
    """On one GPU; below 0 where the model does not fit."""
    kv_cache_tokens: int | None
    """In all, and in one row at most; None where a token's bytes are not known."""
    rows_at_once: Mapping[int, int]
    """Tokens of a row -> rows; the first length is the job's own, if it is known."""


def way_of(
    name: str, change: str, memory: Memory, settings: Settings, rows: RowLengths | None
) -> Way:
    """Sum a way up: how many rows of which length run at once."""
    own = [math.ceil(rows.total)] if rows is not None else []
    tokens = max(0, memory.kv_cache_tokens or 0)
    at_once = {
        length: min(settings.max_num_seqs, int(tokens / _in_blocks(length)))
        for length in (*own, *LENGTHS)
    }
    known = at_once if memory.kv_cache_tokens is not None else {}
    num_gpus, found = settings.num_gpus, memory.kv_cache_tokens
    return Way(name, change, num_gpus, memory.weights, memory.kv_cache, found, known)


def ways_as_text(ways: Sequence[Way], rows: RowLengths | None) -> list[str]:
    """Write a table of ways, a line each."""
    lengths = list(ways[0].rows_at_once)
    heads = [f"{length:,}" for length in lengths]
    if rows is not None and heads:
        heads[0] = f"yours ({heads[0]})"
    table = [("", "weights", "KV cache", "in tokens", *heads)]
    for way in ways:
        fits = way.kv_cache > 0
        at_once = [way.rows_at_once.get(length, 0) for length in lengths]
        cells = [f"{num:,}" if num else "-" for num in at_once]
        tokens = f"{way.kv_cache_tokens:,}" if way.kv_cache_tokens is not None else "not known"
        found = (gib(way.kv_cache), tokens, *cells) if fits else ("does not fit",)
        table.append((way.name, gib(way.weights), *found))
    widths = [max(len(row[at]) for row in table if at < len(row)) for at in range(len(table[0]))]
    lines = ["rows at once, by the tokens of a row, prompt and answer (estimates):"]
    for row in table:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=False)]
        lines.append("  ".join([f"  {row[0]:{widths[0]}}", *cells]).rstrip())
    lines += [f"  {way.name}: {way.change}" for way in ways if way.change and way.kv_cache > 0]
    return lines


def _in_blocks(tokens: float) -> float:
    return max(1, math.ceil(tokens / BLOCK_TOKENS)) * BLOCK_TOKENS
