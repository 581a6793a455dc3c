"""Engines that share a GPU: when two are faster than one, and what of its memory each takes.

Between two steps vLLM's Python takes a few microseconds for each sequence that runs, in its core
and in its front end, and the GPU waits. With a small model that is most of the time; a second
engine uses it. Measured on an H200 with vLLM 0.26, a model of 0.6B, 256 tokens an answer: one
engine 46,000 tokens/s, two 67,000, three 69,000, four 62,000. With 8B the GPU has its fill.

Where texts are pooled (vectors, classes, scores) it is a few hundred microseconds for each text: of
short ones the GPU waits most of the time. That two engines are faster there follows from the same
figures, and has not been measured.

Who shares is told how large its KV cache is (`kv_cache_memory_bytes`), so that it does not measure
what others take of the memory meanwhile, and all may start at once. Pure, but for the files of the
model, the GPU's figures and the machine's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from batchgen.core.records import EngineSpec, WorkLeft
from batchgen.engine.devices import Devices, Gpu, proc_fields, read_devices, vllm_build
from batchgen.engine.vllm.settings import GPU_MEMORY_UTILIZATION, TYPICAL_ANSWER, gpus_of

MOST_ENGINES = 2
"""Three bring nothing over two, four less."""
PYTHON_S = 20e-6
"""What vLLM's Python takes for a sequence in a step: 22 ms a step of 1,024, of which the GPU works
some 5 (H200, vLLM 0.26)."""
POOLED_S = 380e-6
"""The same for a text that is pooled: 60,000 texts of 32 tokens took 23 s, of which the GPU worked
some 3 (H200, 0.6B, vLLM 0.26)."""
BUSY_SHARE = 0.8
"""A GPU that has less to do than this part of what Python has is better shared: two engines take
the longer of its time and half of both, 1.46 times as fast where it has 0.4 (H200, 0.6B)."""
LEAST_TOKENS = 500_000
"""Fewer are worked off in a few seconds; two that start together are up 1.5 s later than one."""
LEAST_POOLED = 25_000
"""The same for texts."""
LEAST_CORES = 8
"""Two processes for each engine, both busy, and what reads, renders and writes."""
HOST_BYTES = 12 << 30
"""Of the machine's memory for each engine, beside the weights that it loads."""
RESERVE_BYTES = 6 << 30
"""For CUDA's context and libraries, the graphs of all sizes, and what the formulas do not know."""
LEAST_KV_BYTES = 1 << 30
DEFAULT_SEQS, DEFAULT_TOKENS = 1024, 16_384
"""vLLM's own on large GPUs: vllm/engine/arg_utils.py, get_batch_defaults, 0.26 to 0.33."""

ODD_WAYS = frozenset(
    {
        *("quantization", "kv_cache_dtype", "hf_overrides", "hf_config_path", "device_ids"),
        *("num_gpu_blocks_override", "cpu_offload_gb", "kv_offloading_size", "kv_transfer_config"),
    }
)
"""Keywords by which the model, its GPU, or what it takes of the memory is another."""
UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError),
    RecursionError,
)


class Peak(NamedTuple):
    """What a GPU can do in a second."""

    bytes_per_s: float
    flop_per_s: float


PEAKS = {"H200": Peak(4.8e12, 7.9e14)}
"""Word in a GPU's name -> its peaks, for those that were measured. Memory: NVIDIA's data sheet;
FLOP: of dense 16-bit products, as they are reached (H200, 0.8 of the data sheet's)."""


class Cost(NamedTuple):
    """What a model takes."""

    weights_bytes: int
    """Read in each step."""
    kv_bytes: int
    """Of a token in the KV cache."""
    step_bytes: int
    """Peak of a step with as many tokens and rows as the engine takes."""

    @property
    def flop(self) -> float:
        """Of one token: two for each weight, which has two bytes."""
        return float(self.weights_bytes)


class Host(NamedTuple):
    """What of a machine counts: a GPU's share, since others may be at work on the others."""

    num_cores: int
    free_bytes: int


def cost_of(folder: Path, kwargs: Mapping[str, Any]) -> Cost | None:
    """Work out what a model takes; None for all but the plain kind, dense and of 16 bits.

    Args:
        folder: Of the model.
        kwargs: Keywords of vLLM's `LLM(...)`.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        layers, hidden, vocab, inner, heads = (
            int(config[name])
            for name in (
                *("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size"),
                "num_attention_heads",
            )
        )
        head = int(config.get("head_dim") or hidden // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        kinds = {"full_attention", *(config.get("layer_types") or ())}
    except UNREADABLE:
        return None
    odd = {"quantization_config", "vision_config", "text_config", "kv_lora_rank"}
    is_odd = any("expert" in name for name in config) or odd & config.keys() or len(kinds) > 1
    sizes = (layers, hidden, vocab, inner, heads, head, kv_heads)
    is_odd = is_odd or not all(0 < size < 1 << 32 for size in sizes)
    if is_odd or any(kwargs.get(name) for name in ODD_WAYS):
        return None
    is_float32 = str(kwargs.get("dtype") or "auto").endswith(("float32", "float"))
    embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    attention = hidden * head * (2 * heads + 2 * kv_heads)
    weights = layers * (attention + 3 * hidden * inner) + embeddings
    seqs = _number(kwargs, "max_num_seqs", DEFAULT_SEQS)
    tokens = _number(kwargs, "max_num_batched_tokens", DEFAULT_TOKENS)
    forward = tokens * (3 * hidden + 3 * inner) * 2
    size = 4 if is_float32 else 2
    step = max(forward, seqs * vocab * 6 + tokens * hidden * 2) * size // 2
    return Cost(size * weights, 2 * layers * kv_heads * head * size, int(step))


def _number(kwargs: Mapping[str, Any], name: str, usual: float) -> float:
    """A keyword's number; the usual one where it is none, which is for vLLM to refuse."""
    value = kwargs.get(name)
    return value if isinstance(value, int | float) and 0 < value < 1 << 50 else usual


def engines_for(spec: EngineSpec) -> int:
    """How many engines this machine's GPU should have for such a job, if there is enough to do."""
    if spec.defaults != "batchgen":
        return 1
    devices = _devices()
    gpu = devices.gpus[0] if devices.gpus else None
    return engines_that_pay(spec, gpu, this_host(len(devices.gpus) + devices.num_hidden))


def is_enough(spec: EngineSpec, work: WorkLeft) -> bool:
    """Whether there is so much to do on this machine that a second engine is worth its start."""
    gpu = first_gpu()
    return gpu is not None and is_worth_it(spec, gpu, work)


def engines_that_pay(spec: EngineSpec, gpu: Gpu | None, host: Host) -> int:
    """How many engines a GPU should have for such a job, if there is enough to do.

    Args:
        spec: Of an engine.
        gpu: The only one, or the first; None: there is none, or nobody knows.
        host: The machine.

    Returns:
        1 wherever two have not been measured to be faster, or do not fit.
    """
    kwargs = spec.model_kwargs
    if (
        spec.loras
        or gpus_of(kwargs, is_cpu=False) != 1
        or gpu is None
        or gpu.is_mig
        or peak_of(gpu) is None
    ):
        return 1
    cost = cost_of(Path(spec.model), kwargs)
    if cost is None or not is_busy_little(spec, cost, gpu, prompt=100, answer=256):
        return 1
    fits_host = host.free_bytes >= MOST_ENGINES * (HOST_BYTES + cost.weights_bytes)
    is_free = gpu.free_bytes >= 0.95 * gpu.total_bytes
    return MOST_ENGINES if fits_host and is_free and host.num_cores >= LEAST_CORES else 1


def peak_of(gpu: Gpu) -> Peak | None:
    """The peaks of a GPU that was measured."""
    return next((peak for word, peak in PEAKS.items() if word in gpu.name.split()), None)


def is_busy_little(spec: EngineSpec, cost: Cost, gpu: Gpu, *, prompt: int, answer: int) -> bool:
    """Whether rows of so many tokens leave the GPU waiting for Python most of the time."""
    peak = peak_of(gpu)
    if peak is None:
        return False
    token_s = cost.flop / peak.flop_per_s
    if spec.is_pooling:
        return prompt * token_s < BUSY_SHARE * POOLED_S
    seqs = _number(spec.model_kwargs, "max_num_seqs", DEFAULT_SEQS)
    read_bytes = cost.weights_bytes / seqs + cost.kv_bytes * (prompt + answer / 2)
    gpu_s = (prompt + answer) * token_s + answer * read_bytes / peak.bytes_per_s
    return gpu_s < BUSY_SHARE * answer * PYTHON_S


def is_worth_it(spec: EngineSpec, gpu: Gpu, work: WorkLeft) -> bool:
    """Whether there is so much to do that a second engine is worth its start."""
    cost = cost_of(Path(spec.model), spec.model_kwargs)
    answer = min(work.output_tokens, TYPICAL_ANSWER)
    num = work.num_rows * spec.sampling_params.get("n", 1)
    is_little = num < LEAST_POOLED if spec.is_pooling else num * answer < LEAST_TOKENS
    if cost is None or is_little:
        return False
    prompt = work.prompt_tokens or 100
    return is_busy_little(spec, cost, gpu, prompt=prompt, answer=answer)


def first_gpu() -> Gpu | None:
    """The GPU that vLLM takes; None without one, or with a vLLM that is not for it."""
    return next(iter(_devices().gpus), None)


def _devices() -> Devices:
    return read_devices() if vllm_build() == "cuda" else Devices()


def this_host(num_gpus: int) -> Host:
    """The share of one of `num_gpus` GPUs of the machine as it is now."""
    num, free_bytes = max(1, num_gpus), 0
    with suppress(LookupError, ValueError):
        free_bytes = int(proc_fields("/proc/meminfo")["MemAvailable"].split()[0]) << 10
    return Host(len(os.sched_getaffinity(0)) // num, free_bytes // num)


def shared_memory(spec: EngineSpec, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`share_of` for an engine on this machine's GPU."""
    gpu = first_gpu()
    cost = cost_of(Path(spec.model), kwargs)
    return share_of(kwargs, spec.num_sharing, cost, gpu.total_bytes if gpu is not None else None)


def share_of(
    kwargs: Mapping[str, Any], num: int, cost: Cost | None, total_bytes: int | None
) -> dict[str, Any]:
    """Keywords for one of several engines on a GPU.

    What the job says of memory is for all of them, and divided.

    Args:
        kwargs: Keywords of `LLM(...)`, without these.
        num: Engines on the GPU.
        cost: Of the model; None: not known.
        total_bytes: Memory of the GPU; None: not known.

    Returns:
        `gpu_memory_utilization`, which vLLM holds against what is free when it starts, and
        `kv_cache_memory_bytes` where it can be told; else the engines measure, and start in turn.
    """
    whole = _number(kwargs, "gpu_memory_utilization", GPU_MEMORY_UTILIZATION)
    found: dict[str, Any] = {"gpu_memory_utilization": int(1000 * whole / num) / 1000}
    given = _number(kwargs, "kv_cache_memory_bytes", 0)
    if given:
        found["kv_cache_memory_bytes"] = int(given // num)
    elif cost is not None and total_bytes is not None:
        budget = total_bytes * found["gpu_memory_utilization"]
        left = int(budget - cost.weights_bytes - 1.5 * cost.step_bytes - RESERVE_BYTES)
        if left >= LEAST_KV_BYTES:
            found["kv_cache_memory_bytes"] = left
    return found
