"""A model on a machine: its quantization, its weights, and the memory that they leave."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import ConfigError
from batchgen.engine.devices import Gpu
from batchgen.preview import fit
from batchgen.preview.findings import Finding, count, gib, ok, problem, warning
from batchgen.preview.memory import BLOCK_TOKENS, NO_FLOAT16, estimate, settings_of
from batchgen.preview.quantization import can_run, judge_kv_cache, judge_method, method_of
from batchgen.preview.shape import Shape, read_shape
from batchgen.preview.software import release_of
from batchgen.preview.weights import Weights, read_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from batchgen.preview.hub import Found
    from batchgen.preview.machine import Machine
    from batchgen.preview.memory import Memory, Settings
    from batchgen.preview.quantization import Method

    Capability = tuple[int, int] | None

NO_SHAPE = Shape("", 0, 0, 0, 0, 0, 0, 0, is_tied=False, dtype="")
GONE_FROM = {"bitsandbytes": (0, 32)}
"""Removed from vLLM: method -> the first version that is known to lack it."""
_CPU_METHODS = ("awq", "gptq", "compressed-tensors", "auto_awq", "auto_gptq", "inc")
_BESIDES = {
    "speculative_config": "a draft model",
    "enable_lora": "LoRA adapters",
    "cpu_offload_gb": "weights that are offloaded to the host",
}


@dataclass(frozen=True, slots=True)
class Model:
    """What was found. None where it could not be."""

    findings: Sequence[Finding]
    shape: Shape = NO_SHAPE
    can_run: Mapping[str, str] = field(default_factory=dict)
    weights: Weights | None = None
    settings: Settings | None = None
    memory: Memory | None = None
    kv_cache_tokens: int | None = None


def read_model(
    found: Found,
    kwargs: Mapping[str, Any],
    machine: Machine,
    max_model_len: int | None,
    num_gpus: int,
) -> Model:
    """Judge a model.

    Args:
        found: Where it is.
        kwargs: Of `LLM(...)`.
        machine: As it was read.
        max_model_len: Tokens of a row, prompt and answer.
        num_gpus: That the job holds.
    """
    assert found.folder is not None  # noqa: S101 - else there is nothing to read
    gpu, release = _smallest(machine, num_gpus), release_of(machine.vllm)
    try:
        shape = read_shape(found.folder)
        name = str(kwargs.get("quantization") or shape.quantization.get("quant_method") or "")[:80]
        told, method = method_of(name, shape.quantization, release)
        settings = settings_of(kwargs, shape, gpu, max_model_len, release)
        weights = _weights(found, found.folder, shape, settings, (kwargs, method))
    except ConfigError as error:
        return Model([problem("model", str(error))])
    capability = gpu.capability
    findings = [*_check_shape(shape, settings, kwargs)]
    if capability is not None:
        formats = ", ".join(f"{kind}: {can}" for kind, can in can_run(capability).items())
        findings.insert(0, ok("formats", f"{gpu.name} can run {formats}"))
        findings += _check_dtype(kwargs, shape, settings, capability)
    if name:
        findings += _check_method(name, told, method, gpu.capability, machine)
    findings += _check_weights(weights, settings)
    if capability is not None and (judged := judge_kv_cache(settings.kv_dtype, capability)):
        findings.append(judged)
    model = Model(findings, shape, can_run(capability) if capability else {}, weights, settings)
    if machine.build == "cpu":
        return _on_cpu(model, machine, kwargs)
    return _on_gpu(model, machine, gpu) if gpu.total_bytes else model


def _smallest(machine: Machine, num_gpus: int) -> Gpu:
    """Of the GPUs that share the model: it sets the pace. An empty one where there is none."""
    gpus = machine.devices.gpus[: max(1, num_gpus)] if machine.build != "cpu" else ()
    return min(gpus, key=lambda gpu: gpu.total_bytes, default=Gpu(0, "", "", 0, 0, None))


def _weights(
    found: Found,
    folder: Path,
    shape: Shape,
    settings: Settings,
    asked: tuple[Mapping[str, Any], Method | None],
) -> Weights | None:
    kwargs, method = asked
    if found.missing_bytes:
        return Weights(
            found.missing_bytes,
            "by the size of its files on the hub",
            file_bytes=found.missing_bytes,
        )
    is_dummy = kwargs.get("load_format") == "dummy"
    is_quantized_here = is_dummy or not shape.quantization
    bits = method.weight_bits if method is not None and is_quantized_here else None
    return read_weights(folder, shape, settings.dtype, bits, is_dummy=is_dummy)


def _check_shape(shape: Shape, settings: Settings, kwargs: Mapping[str, Any]) -> Iterator[Finding]:
    tp = settings.tensor_parallel
    if shape.heads and shape.heads % tp:
        text = f"the model has {shape.heads} attention heads, which {tp} GPUs cannot share evenly"
        yield problem("model", text, "choose a model.tensor_parallel_size that divides them")
    if isinstance(size := kwargs.get("data_parallel_size"), int) and size > 1:
        advice = "one job for each GPU, with CUDA_VISIBLE_DEVICES and parts of the input"
        yield problem("gpu", "vLLM's LLM(...) takes no data_parallel_size", advice)
    if besides := [told for name, told in _BESIDES.items() if kwargs.get(name)]:
        yield ok("memory", f"not counted in the estimate: {', '.join(besides)}")


def _check_dtype(
    kwargs: Mapping[str, Any], shape: Shape, settings: Settings, capability: tuple[int, int]
) -> Iterator[Finding]:
    is_auto = str(kwargs.get("dtype") or "auto") == "auto"
    here = f"this GPU has {capability[0]}.{capability[1]}"
    text = f"bfloat16 needs compute capability 8.0 or newer, {here}"
    if settings.dtype == "bfloat16" and capability < (8, 0):
        yield problem("dtype", text, "set model.dtype = 'float16'")
    elif is_auto and shape.dtype == "bfloat16" != settings.dtype:
        yield warning("dtype", f"{text}: the model runs in {settings.dtype}")
    elif settings.dtype == "float16" and shape.model_type in NO_FLOAT16:
        text = f"{shape.model_type} models do not run in float16"
        yield problem("dtype", text, "leave model.dtype out, or set it to 'float32'")


def _check_method(
    name: str, told: str, method: Method | None, capability: Capability, machine: Machine
) -> Iterator[Finding]:
    release = release_of(machine.vllm)
    if name in GONE_FROM and release >= GONE_FROM[name]:
        text = f"{name} is gone from vLLM {machine.vllm}"
        yield problem("quantization", text, "take an AWQ, GPTQ or FP8 checkpoint")
    elif machine.build == "cpu":
        if not name.startswith(_CPU_METHODS):
            text = f"whether vLLM's build for CPUs can run {told} is not known here"
            yield warning("quantization", text, "AWQ, GPTQ and INT8 checkpoints are known to run")
    elif method is None:
        yield warning("quantization", f"{told} is not known here; vLLM may know it")
    elif capability is not None:
        yield judge_method(told, method, capability)


def _check_weights(weights: Weights | None, settings: Settings) -> Iterator[Finding]:
    if weights is None:
        yield warning("weights", "their size is not known: the model is not of a plain kind")
        return
    number = f"{count(weights.num_parameters)} parameters, " if weights.num_parameters else ""
    each = f", {gib(weights.num_bytes / settings.num_gpus)} a GPU" if settings.num_gpus > 1 else ""
    text = f"{number}{gib(weights.num_bytes)} in {settings.dtype}{each}, {weights.source}"
    yield ok("weights", text)


def _on_gpu(model: Model, machine: Machine, gpu: Gpu) -> Model:
    settings, weights = model.settings, model.weights
    if settings is None or weights is None:
        return model
    release = release_of(machine.vllm)
    memory = estimate(model.shape, weights.num_bytes, settings, gpu.total_bytes, release)
    findings = fit.check_memory(memory, settings, model.shape, gpu)
    return replace(
        model,
        findings=[*model.findings, *findings],
        memory=memory,
        kv_cache_tokens=memory.kv_cache_tokens,
    )


def _on_cpu(model: Model, machine: Machine, kwargs: Mapping[str, Any]) -> Model:
    """Weights and KV cache come out of the host's memory."""
    settings, free = model.settings, machine.free_memory_bytes
    if settings is None or model.weights is None:
        return model
    cache = _cpu_cache(kwargs, machine)
    weights = model.weights.num_bytes
    text = f"{gib(weights)} weights + {gib(cache)} KV cache" if cache else f"{gib(weights)} weights"
    if free is None:
        finding = ok("memory", text)
    elif weights > free:
        finding = problem("memory", f"{text}, {gib(free)} are free", "take a smaller model")
    elif cache and weights + cache > free:
        advice = "lower model.engine.kv_cache_memory_bytes or VLLM_CPU_KVCACHE_SPACE"
        finding = warning("memory", f"{text}, {gib(free)} are free", advice)
    else:
        finding = ok("memory", f"{text} of {gib(free)} free")
    each = model.shape.kv_bytes(settings.kv_dtype, 1, 1)
    tokens = cache // (each * BLOCK_TOKENS) * BLOCK_TOKENS if cache and each else None
    return replace(model, findings=[*model.findings, finding], kv_cache_tokens=tokens)


def _cpu_cache(kwargs: Mapping[str, Any], machine: Machine) -> int | None:
    """Bytes, as vLLM decides: vllm/platforms/cpu.py and vllm/v1/worker/cpu_worker.py, 0.32."""
    if re.fullmatch("0*[1-9][0-9]{0,8}", space := os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")):
        return int(space) << 30
    given = kwargs.get("kv_cache_memory_bytes")
    if isinstance(given, int) and given > 0:
        return given
    share = kwargs.get("gpu_memory_utilization")
    if isinstance(share, float) and machine.memory_bytes:
        return round(share * machine.memory_bytes)
    return None
