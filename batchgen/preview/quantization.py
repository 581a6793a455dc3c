"""What quantizations a GPU can run, by its compute capability.

Source: `get_min_capability` of each config and scheme in vllm/model_executor/layers/quantization,
0.26, 0.32 and 0.33; where native kernels begin: vllm/model_executor/kernels/linear. Capabilities
are written as there: 89 is 8.9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchgen.preview.findings import Finding, ok, problem, warning

if TYPE_CHECKING:
    from collections.abc import Mapping

    Config = Mapping[str, Any]
    """`quantization_config` of a config.json."""

MARLIN = "with 16-bit activations (Marlin kernels), which saves memory but not arithmetic"
ONLINE_FP8 = ("fp8_per_tensor", "fp8_per_block", "fp8_per_channel")
LEAST_BF16 = 80
LEAST_CUDA_13 = 75
"""CUDA 13, which vLLM's wheels are built with, has no code for older GPUs."""


@dataclass(frozen=True, slots=True)
class Method:
    """A way to quantize weights."""

    least: int
    """vLLM refuses GPUs below this capability."""
    native: int = 0
    """From here on the arithmetic is done in that format too; below by `fallback`."""
    fallback: str = MARLIN
    weight_bits: float = 8.0
    """Of a weight, scales and zero points counted in."""
    activations: str = "16-bit activations"


FP8 = Method(75, 89, activations="FP8 activations")
NVFP4 = Method(75, 100, weight_bits=4.5, activations="FP4 activations")
MXFP4 = Method(80, 100, weight_bits=4.25, activations="FP4 activations")
MXFP8 = Method(80, 100, weight_bits=8.25, activations="FP8 activations")
AWQ = Method(75, weight_bits=4.25)
GPTQ = Method(60, 75, "by exllama's kernels, which are slower than Marlin", 4.25)

METHODS: Mapping[str, Method] = {
    "fp8": FP8,
    **dict.fromkeys(ONLINE_FP8, FP8),
    "deepseek_v4_fp8": FP8,
    "fbgemm_fp8": Method(80, 89),
    "modelopt": Method(80, 89),
    "modelopt_fp4": NVFP4,
    "modelopt_mixed": Method(75, 89),
    "modelopt_mxfp8": MXFP8,
    "mxfp8": MXFP8,
    "mxfp4": MXFP4,
    "gpt_oss_mxfp4": MXFP4,
    "fp_quant": Method(100, weight_bits=4.5),
    **dict.fromkeys(("awq", "awq_marlin", "auto_awq"), AWQ),
    **dict.fromkeys(("gptq", "gptq_marlin", "auto_gptq"), GPTQ),
    "compressed-tensors": Method(70),
    "quark": Method(70),
    "moe_wna16": Method(70, weight_bits=4.25),
    "torchao": Method(75),
    "inc": Method(60, weight_bits=4.25),
    "humming": Method(75),
    "experts_int8": Method(80),
    "int8_per_channel_weight_only": Method(75),
    "bitsandbytes": Method(70, weight_bits=4.5),
}
ALIASES = {"auto-round": "inc", "auto_round": "inc", "intel": "inc", "nvfp4": "modelopt_fp4"}

SCHEMES: Mapping[str, Method] = {
    "W8A8 FP8": FP8,
    "W8A16 FP8": Method(75),
    "W8A8 INT8": Method(75, activations="INT8 activations"),
    "W4A16": Method(75, weight_bits=4.25),
    "W8A16": Method(75),
    "W4A8 FP8": Method(90, weight_bits=4.25, activations="FP8 activations"),
    "W4A4 FP4": NVFP4,
    "W4A16 FP4": Method(75, weight_bits=4.5),
}
"""Of compressed-tensors: compressed_tensors/schemes/*.py."""

TOLD = {
    "fp8": "FP8 (W8A8)",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "modelopt_fp4": "NVFP4",
    "mxfp4": "MXFP4",
}
"""Of which it is told for every GPU whether it can."""


def method_of(name: str, config: Config, release: tuple[int, int]) -> tuple[str, Method | None]:
    """The method that a checkpoint or a job names.

    Args:
        name: `quant_method` of the checkpoint, or `model.quantization`.
        config: The checkpoint's `quantization_config`; empty for one that is not quantized.
        release: vLLM's, such as (0, 26).

    Returns:
        Its name for people, and None for one that is not known here.
    """
    name = ALIASES.get(name, name)
    if name == "modelopt":
        name = _modelopt(config)
    if name == "modelopt" and release < (0, 32):
        return name, Method(89, 89)  # 80 in 0.32; between them nobody looked.
    if name == "compressed-tensors":
        scheme = _scheme(config)
        return f"{name} {scheme}".strip(), SCHEMES.get(scheme, METHODS[name])
    return name, METHODS.get(name)


def _modelopt(config: Config) -> str:
    inner = config.get("quantization")
    config = inner if isinstance(inner, dict) else config
    algorithm = str(config.get("quant_algo", "FP8")).upper()
    for word, name in (("MIXED", "modelopt_mixed"), ("MXFP8", "modelopt_mxfp8")):
        if word in algorithm:
            return name
    return "modelopt_fp4" if "FP4" in algorithm else "modelopt"


def _scheme(config: Config) -> str:
    """Of the first group: most checkpoints have one."""
    groups = config.get("config_groups")
    group: Any = next(iter(groups.values()), {}) if isinstance(groups, dict) else {}
    if not isinstance(group, dict) or not isinstance(weights := group.get("weights"), dict):
        return ""
    inputs = group.get("input_activations")
    inputs = inputs if isinstance(inputs, dict) else {}
    bits, is_float = weights.get("num_bits"), weights.get("type") == "float"
    to = inputs.get("num_bits") or 16
    if is_float:
        return f"W{bits}A{to} FP{bits}"
    if to == 8:
        return f"W{bits}A8 {'FP8' if inputs.get('type') == 'float' else 'INT8'}"
    return f"W{bits}A{to}"


def capability_number(capability: tuple[int, int]) -> int:
    """(8, 9) -> 89."""
    return capability[0] * 10 + capability[1]


def judge_method(name: str, method: Method, capability: tuple[int, int]) -> Finding:
    """Whether a GPU can run a method, and how."""
    number = capability_number(capability)
    here = f"this GPU has {capability[0]}.{capability[1]}"
    if number < method.least:
        return problem(
            "quantization",
            f"{name} needs compute capability {_point(method.least)} or newer, {here}",
            "take a checkpoint in another format (AWQ and GPTQ run from 7.5 on), or a newer GPU",
        )
    if number < method.native:
        text = f"{name} runs here {method.fallback}: native from {_point(method.native)} on, {here}"
        return warning("quantization", text)
    return ok("quantization", f"{name} runs here, {method.activations}")


def can_run(capability: tuple[int, int]) -> dict[str, str]:
    """What a GPU can do of the formats that are seen most: name -> yes, fallback or no."""
    number = capability_number(capability)
    found = {"bfloat16": "yes" if number >= LEAST_BF16 else "no"}
    for name, told in TOLD.items():
        method = METHODS[name]
        native = "yes" if number >= method.native else "weights only"
        found[told] = native if number >= method.least else "no"
    fallback = "through FlashInfer" if number >= LEAST_FLASHINFER else "no"
    found["FP8 KV cache"] = "yes" if number >= LEAST_FP8_KV else fallback
    return found


def judge_kv_cache(dtype: str, capability: tuple[int, int]) -> Finding | None:
    """Whether a GPU can hold the KV cache in a quantized format; None if that is not asked for.

    Source:
        vllm/v1/attention/backends/triton_attn.py, TritonAttentionImpl, and flashinfer.py,
        supports_compute_capability, 0.26 to 0.33.
    """
    if dtype in {"auto", "float16", "bfloat16"}:
        return None
    number = capability_number(capability)
    text = f"kv_cache_dtype = {dtype!r}"
    if dtype.startswith("fp8") and number < LEAST_FP8_KV:
        here = f"this GPU has {capability[0]}.{capability[1]}"
        if number < LEAST_FLASHINFER:
            advice = "leave model.engine.kv_cache_dtype out"
            return problem("kv cache", f"{text} needs {_point(LEAST_FLASHINFER)}, {here}", advice)
        text = f"{text} is run here by FlashInfer alone, where it is installed ({here})"
        return warning("kv cache", text)
    if dtype == "nvfp4" and number // 10 != 10:
        text = f"{text} needs compute capability 10.x, this GPU has {_point(number)}"
        return problem("kv cache", text, "take kv_cache_dtype = 'fp8'")
    return ok("kv cache", f"{text} runs here; answers may differ a little from 16 bits")


LEAST_FP8_KV = 89
"""From here on every attention backend of vLLM's can; see `judge_kv_cache`."""
LEAST_FLASHINFER = 80


def _point(number: int) -> str:
    return f"{number // 10}.{number % 10}"
