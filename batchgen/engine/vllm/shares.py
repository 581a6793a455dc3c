"""What a model takes of a GPU; engines that share one: when two are faster, what each takes of it.

Between two steps vLLM's Python takes a few microseconds for each sequence that runs, in its core
and in its front end, and the GPU waits. With a small model that is most of the time; a second
engine uses it. Measured on an H200 with vLLM 0.26, a model of 0.6B, 256 tokens an answer: one
engine 46,000 tokens/s, two 67,000, three 69,000, four 62,000. With 8B the GPU has its fill.

Where texts are pooled (vectors, classes, scores) it is a few hundred microseconds for each text: of
short ones the GPU waits most of the time. 60,000 texts of 32 tokens took one engine 25.3 s, two
17.8 s, three 12.8 s, four 12.6 s.

Who shares is told how large its KV cache is (`kv_cache_memory_bytes`), so that it does not measure
what others take of the memory meanwhile, and all may start at once. Pure, but for the files of the
model, the GPU's figures and the machine's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from batchgen.core.records import EngineSpec, WorkLeft
from batchgen.core.runtime import read_json
from batchgen.engine.devices import Devices, Gpu, proc_fields, read_devices, vllm_build
from batchgen.engine.vllm.settings import GPU_MEMORY_UTILIZATION, TYPICAL_ANSWER, gpus_of

MOST_ENGINES = 2
"""Three bring nothing over two, four less."""
MOST_POOLING = 3
"""The same for texts that are pooled: four bring nothing over three."""
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
LEAST_CORES, CORES_OF_MORE = 8, 4
"""For two: two processes for each engine, both busy, and what reads, renders and writes; and what
each further engine needs."""
HOST_BYTES = 12 << 30
"""Of the machine's memory for each engine, beside the weights that it loads."""
RESERVE_BYTES = 6 << 30
"""For CUDA's context and libraries, the graphs of all sizes, and what the formulas do not know."""
LEAST_KV_BYTES = 1 << 30
DEFAULT_SEQS, DEFAULT_TOKENS = 1024, 16_384
"""vLLM's own on large GPUs: vllm/engine/arg_utils.py, get_batch_defaults, 0.26 to 0.33."""

DTYPE_BYTES = {
    **dict.fromkeys(("float32", "float"), 4),
    **dict.fromkeys(("float16", "half", "bfloat16"), 2),
}
KV_BYTES = {**DTYPE_BYTES, **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc"), 1)}
_MLA_TYPES = frozenset({"deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite"})
"""Models with multi-head latent attention whose cache holds nothing else: of those in
vllm/transformers_utils/model_arch_config_convertor.py, is_deepseek_mla, 0.26."""
_NOT_PLAIN = (
    *("attention_chunk_size", "num_kv_shared_layers", "index_topk", "compress_ratios"),
    *("full_attention_interval", "attn_layer_period", "attn_layer_indices", "block_configs"),
    *("hybrid_override_pattern", "layers_block_type", "linear_attn_config", "ssm_cfg"),
    *("state_size", "new_decoder_architecture", "multi_query", "cross_attention_layers"),
    "is_encoder_decoder",
)
"""Keys of a config.json whose layers have no KV cache, share one, or count heads otherwise."""
_MAX_NUMBER = 2**40
"""Far above what any model has: a larger number is damage, and counts as absent."""
ODD_WAYS = frozenset(
    {
        *("quantization", "kv_cache_dtype", "hf_overrides", "hf_config_path", "device_ids"),
        *("num_gpu_blocks_override", "cpu_offload_gb", "kv_offloading_size", "kv_transfer_config"),
    }
)
"""Keywords by which the model, its GPU, or what it takes of the memory is another."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model's language part. Counts are 0 where config.json does not say."""

    model_type: str = ""
    layers: int = 0
    hidden: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    intermediate: int = 0
    vocab: int = 0
    is_tied: bool = False
    """Output and input embedding are one."""
    dtype: str = ""
    """Format of the checkpoint's weights."""
    experts: int = 0
    experts_per_token: int = 0
    moe_intermediate: int = 0
    mla: tuple[int, int] | None = None
    """Rank of the compressed cache and of its positions, for multi-head latent attention."""
    not_plain: str | None = None
    """Why the KV cache of a token is not known."""
    is_multimodal: bool = False
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """`quantization_config`; empty if the checkpoint is not quantized."""

    def kv_bytes(self, dtype: str, tensor_parallel: int, pipeline_parallel: int) -> int | None:
        """Bytes of KV cache for a token on one GPU; None where that is not known.

        Keys and values of each layer, or their compressed form with MLA; a GPU holds at least
        one head. For Qwen3-8B in bfloat16: 36 x 8 x 128 x 2 x 2 = 147,456.

        Args:
            dtype: Format of the cache.
            tensor_parallel: GPUs that share each layer.
            pipeline_parallel: GPUs that share the layers; the largest share counts.

        Source:
            vllm/v1/kv_cache_interface.py, FullAttentionSpec and MLAAttentionSpec,
            real_page_size_bytes, 0.26 to 0.33.
        """
        size = KV_BYTES.get(dtype)
        if self.not_plain or size is None:
            return None
        layers = math.ceil(self.layers / pipeline_parallel)
        if self.mla:
            return layers * sum(self.mla) * size
        heads = max(1, math.ceil(self.kv_heads / tensor_parallel))
        return layers * heads * self.head_dim * 2 * size

    def quantized_bytes(self, num_bytes: int, bits: float) -> int:
        """Bytes of 16-bit weights once the linear layers have so many bits a weight.

        The embeddings stay as they are, as with FP8 in vLLM and in most AWQ and GPTQ checkpoints.
        """
        kept = min(num_bytes, self.vocab * self.hidden * (1 if self.is_tied else 2) * 2)
        return round(kept + (num_bytes - kept) * bits / 16)


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Sizes from the content of a config.json; the language part of a multimodal model counts."""
    inner = config.get("text_config") or config.get("llm_config")
    text = {**config, **inner} if isinstance(inner, dict) else config
    layers = _size_in(text, "num_hidden_layers", "n_layer", "num_layers")
    heads = _size_in(text, "num_attention_heads", "n_head", "num_heads")
    hidden = _size_in(text, "hidden_size", "n_embd", "d_model")
    head_dim = _size_in(text, "head_dim") or (hidden // heads if heads else 0)
    intermediate = _size_in(text, "intermediate_size", "n_inner", "ffn_dim")
    experts = _size_in(text, "num_experts", "n_routed_experts", "num_local_experts")
    odd = _odd_key(text)
    not_plain = f"its layers are not plain attention ({odd} in its config.json)" if odd else None
    if not (layers and heads and head_dim):
        not_plain = "its config.json does not say how many layers and heads it has, in numbers"
    rank = _size_in(text, "kv_lora_rank")
    quantization = text.get("quantization_config")
    return Shape(
        model_type=str(text.get("model_type", "")),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=_size_in(text, "num_key_value_heads") or heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocab=_size_in(text, "vocab_size"),
        is_tied=bool(text.get("tie_word_embeddings", False)),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or "float32").removeprefix("torch."),
        experts=experts,
        experts_per_token=_size_in(text, "num_experts_per_tok", "moe_topk", "top_k_experts"),
        moe_intermediate=(_size_in(text, "moe_intermediate_size") or intermediate)
        if experts
        else 0,
        mla=(rank, _size_in(text, "qk_rope_head_dim")) if rank and not_plain is None else None,
        not_plain=not_plain,
        is_multimodal="vision_config" in config or "audio_config" in config,
        quantization=quantization if isinstance(quantization, dict) else {},
    )


def _size_in(config: Mapping[str, Any], *names: str) -> int:
    """The first that is there; 0 without one, or where it is something else."""
    found = (value for name in names if type(value := config.get(name)) is int)
    return next((value for value in found if 0 < value <= _MAX_NUMBER), 0)


def _odd_key(text: Mapping[str, Any]) -> str | None:
    """The key that says why a token's KV cache is not counted as in a plain model."""
    kinds = text.get("layer_types")
    is_windowed = text.get("sliding_window") and text.get("use_sliding_window") is not False
    odd = [key for key in _NOT_PLAIN if text.get(key)]
    if isinstance(kinds, list) and set(map(str, kinds)) - {"full_attention"}:
        odd.append("layer_types")
    if kinds is None and is_windowed:
        odd.append("sliding_window")
    if text.get("kv_lora_rank") and str(text.get("model_type")) not in _MLA_TYPES:
        odd.append("kv_lora_rank")
    if text.get("num_key_value_heads") and not _size_in(text, "num_key_value_heads"):
        odd.append("num_key_value_heads")  # Such as a list, of one number a layer.
    return odd[0] if odd else None


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
    config = read_json(folder / "config.json", dict)
    shape = shape_of(config)
    hidden, inner, vocab = shape.hidden, shape.intermediate, shape.vocab
    odd = {"quantization_config", "vision_config", "text_config", "kv_lora_rank"} & config.keys()
    kinds = config.get("layer_types")
    is_alike = not isinstance(kinds, list) or not set(map(str, kinds)) - {"full_attention"}
    sizes = (shape.layers, hidden, inner, vocab, shape.head_dim, is_alike)
    is_odd = odd or not all(sizes) or any("expert" in name for name in config)
    if is_odd or any(kwargs.get(name) for name in ODD_WAYS):
        return None
    is_float32 = str(kwargs.get("dtype") or "auto").endswith(("float32", "float"))
    embeddings = vocab * hidden * (1 if shape.is_tied else 2)
    attention = hidden * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    weights = shape.layers * (attention + 3 * hidden * inner) + embeddings
    seqs = _number(kwargs, "max_num_seqs", DEFAULT_SEQS)
    tokens = _number(kwargs, "max_num_batched_tokens", DEFAULT_TOKENS)
    forward = tokens * (3 * hidden + 3 * inner) * 2
    size = 4 if is_float32 else 2
    step = max(forward, seqs * vocab * 6 + tokens * hidden * 2) * size // 2
    kv_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * size
    return Cost(size * weights, kv_bytes, int(step))


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
    is_free = gpu.free_bytes >= 0.95 * gpu.total_bytes
    for num in range(MOST_POOLING if spec.is_pooling else MOST_ENGINES, 1, -1):
        fits = host.free_bytes >= num * (HOST_BYTES + cost.weights_bytes)
        if fits and is_free and host.num_cores >= LEAST_CORES + (num - 2) * CORES_OF_MORE:
            return num
    return 1


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
