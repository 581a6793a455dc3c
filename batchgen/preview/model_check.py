"""A model on a machine: formats that the GPU runs, weights, the rows that memory holds; the report.

Capabilities of GPUs are from `get_min_capability` of each config and scheme in
vllm/model_executor/layers/quantization, 0.26, 0.32 and 0.33; where native kernels begin from
vllm/model_executor/kernels/linear. Only methods that are common are known here: of others vLLM
says at its start whether they run.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import ConfigError, ExitCode
from batchgen.core.runtime import Told
from batchgen.engine.devices import Gpu
from batchgen.engine.vllm.settings import gpus_of
from batchgen.engine.vllm.shares import DTYPE_BYTES, shape_of
from batchgen.preview.checkpoint import Weights, read_config, read_weights
from batchgen.preview.machine import (
    LEAST_CUDA_13,
    Finding,
    Level,
    gib,
    of_error,
    ok,
    point,
    problem,
    release_of,
    warning,
)
from batchgen.preview.memory import (
    CONTEXT_BYTES,
    NO_FLOAT16,
    estimate,
    fit_of,
    settings_of,
    tokens_in,
    way_of,
    ways_as_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from batchgen.engine.vllm.shares import Shape
    from batchgen.preview.checkpoint import Found
    from batchgen.preview.machine import Machine
    from batchgen.preview.memory import Fit, Memory, Settings, Way
    from batchgen.preview.sample import RowLengths

    Capability = tuple[int, int]
    """Compute capability of a GPU: (8, 9) is 8.9."""

_FALLBACK = "with 16-bit activations (Marlin kernels), which saves memory but not arithmetic"
_LEAST_BF16, _LEAST_FP8_KV, _LEAST_FLASHINFER = (8, 0), (8, 9), (8, 0)
_BNB, _BNB_GONE = "bitsandbytes", (0, 32)
"""Removed from vLLM; the first release that is known to lack it."""
_CPU_METHODS = ("awq", "gptq", "compressed-tensors", "auto_awq", "auto_gptq", "inc")
_BESIDES = {
    "speculative_config": "a draft model",
    "enable_lora": "LoRA adapters",
    "cpu_offload_gb": "weights that are offloaded to the host",
}
_FEW_SHARE = 0.25
"""Share of max_num_seqs: with fewer rows at once the GPU has much less to do than it could."""


@dataclass(frozen=True, slots=True, repr=False)
class Report(Told):
    """All findings, and the figures behind them; None where a problem hides a figure."""

    findings: Sequence[Finding]
    machine: Machine
    can_run: Mapping[str, str] = field(default_factory=dict)
    """Formats -> yes, weights only, no; of the first GPU."""
    weights: Weights | None = None
    settings: Settings | None = None
    memory: Memory | None = None
    fit: Fit | None = None
    rows: RowLengths | None = None
    ways: Sequence[Way] = ()
    """How else the model may run on this kind of GPU, the job as it is first."""

    @property
    def level(self) -> Level:
        """The worst level of all findings."""
        levels = {finding.level for finding in self.findings}
        return next((one for one in (Level.PROBLEM, Level.WARNING) if one in levels), Level.OK)

    @property
    def reason(self) -> str | None:
        """Text of the first problem."""
        return next((f.text for f in self.findings if f.level == Level.PROBLEM), None)

    @property
    def exit_code(self) -> ExitCode:
        """0 if the job can run here, else 2."""
        return ExitCode.REFUSED if self.level == Level.PROBLEM else ExitCode.COMPLETE

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "state": str(self.level),
            "exit_code": int(self.exit_code),
            "reason": self.reason,
            "kv_cache_tokens": self.fit.kv_cache_tokens if self.fit else None,
            "concurrency": self.fit.concurrency if self.fit else None,
            **dataclasses.asdict(self),
        }

    def as_text(self) -> str:
        """The lines that a person reads: findings, and the verdict."""
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.level:8} {finding.topic:13} {finding.text}")
            if finding.advice:
                lines.append(f"{'':22} -> {finding.advice}")
        here = "such a machine" if self.machine.is_planned else "this machine"
        verdict = {
            Level.OK: f"{here} can run the job",
            Level.WARNING: f"{here} can run the job; see the warnings",
            Level.PROBLEM: f"{here} cannot run the job: {self.reason}",
        }
        is_asked = self.machine.is_planned or self.level == Level.PROBLEM
        table = ways_as_text(self.ways, self.rows) if self.ways and is_asked else []
        return "\n".join([*lines, *table, verdict[self.level]])


@dataclass(frozen=True, slots=True)
class Method:
    """A way to quantize weights."""

    weight_bits: float = 8.0
    """Bits of a weight, scales and zero points counted in."""
    native: Capability = (0, 0)
    """From here on the arithmetic is done in that format too; below by a fallback."""
    least: Capability = LEAST_CUDA_13
    """vLLM refuses GPUs below this capability."""
    activations: str = "16-bit activations"


_FP8 = Method(8.0, (8, 9), activations="FP8 activations")
_NVFP4 = Method(4.5, (10, 0), activations="FP4 activations")
_INT4 = Method(4.25)
METHODS: Mapping[str, Method] = {
    **dict.fromkeys(("fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel"), _FP8),
    "modelopt": Method(8.0, (8, 9), (8, 0)),
    **dict.fromkeys(("modelopt_fp4", "nvfp4"), _NVFP4),
    **dict.fromkeys(("mxfp4", "gpt_oss_mxfp4"), Method(4.25, (10, 0), (8, 0), "FP4 activations")),
    **dict.fromkeys(("awq", "awq_marlin", "auto_awq", "gptq", "gptq_marlin", "auto_gptq"), _INT4),
    _BNB: Method(4.5),
}
_FORMATS = {
    "FP8 (W8A8)": "fp8",
    "GPTQ": "gptq",
    "AWQ": "awq",
    "NVFP4": "modelopt_fp4",
    "MXFP4": "mxfp4",
}
"""Formats of which every report says whether the GPU can run them -> their method."""


def check_model(
    found: Found,
    kwargs: Mapping[str, Any],
    machine: Machine,
    max_model_len: int | None,
    rows: RowLengths | None,
    num_engines: int = 1,
) -> Report:
    """Judge a model and the job's rows on a machine.

    Args:
        found: Where it is; with a folder.
        kwargs: Keywords of `LLM(...)`.
        machine: As it was read.
        max_model_len: Tokens of a row, prompt and answer.
        rows: Lengths of the job's rows; None where they are not known.
        num_engines: Engines with these keywords that share the GPU.
    """
    gpu = _smallest(machine, kwargs)
    try:
        shape = shape_of(read_config(found.folder or Path()))
        settings = settings_of(kwargs, shape, gpu, max_model_len)
        settings = dataclasses.replace(settings, num_engines=num_engines)
        method, findings = _check_formats(kwargs, shape, settings, machine, gpu)
        weights = _weights(found, shape, settings, kwargs, method)
    except ConfigError as error:
        return Report([of_error("model", error)], machine, rows=rows)
    findings = [
        *_check_heads(shape, settings, kwargs),
        *findings,
        _weights_finding(weights, settings),
    ]
    findings += check_kv_dtype(settings.kv_dtype, gpu.capability)
    memory = tokens = fit = None
    ways: list[Way] = []
    if machine.build == "cpu" and weights is not None:
        cache = _cpu_cache(kwargs, machine)
        size = weights.num_bytes * num_engines
        all_caches = cache * num_engines if cache else None
        findings.append(_check_host_memory(size, all_caches, machine.free_memory_bytes))
        tokens = tokens_in(cache, shape.kv_bytes(settings.kv_dtype, 1, 1))
    elif gpu.total_bytes and weights is not None:
        release = release_of(machine.vllm)
        memory = estimate(shape, weights.num_bytes, settings, gpu.total_bytes, release)
        findings += _check_memory(memory, settings, shape, gpu)
        tokens = memory.kv_cache_tokens
        ways = _ways(shape, weights, settings, gpu, machine, rows)
    if memory is not None or tokens is not None:
        fit = fit_of(tokens, settings, rows)
        findings += _check_kv_cache(fit, shape, settings) if tokens != 0 else ()
    findings += _check_rows(fit, rows, settings) if tokens != 0 else ()
    formats = can_run(gpu.capability) if gpu.capability else {}
    known = settings if fit else None
    return Report(findings, machine, formats, weights, known, memory, fit, rows, ways)


def _ways(
    shape: Shape,
    weights: Weights,
    settings: Settings,
    gpu: Gpu,
    machine: Machine,
    rows: RowLengths | None,
) -> list[Way]:
    """The job as it is, then what takes less of a GPU's memory, as far as the GPU can run it."""
    release, capability = release_of(machine.vllm), gpu.capability or (0, 0)

    def way(name: str, change: str = "", bits: float | None = None, **changes: Any) -> Way:  # noqa: ANN401 - fields of Settings
        changed = dataclasses.replace(settings, **changes)
        size = shape.quantized_bytes(weights.num_bytes, bits) if bits else weights.num_bytes
        memory = estimate(shape, size, changed, gpu.total_bytes, release)
        return way_of(name, change, memory, changed, rows)

    found = [way("as the job is")]
    if settings.num_engines > 1 or settings.kv_cache_bytes:
        return found  # What the GPU is divided by is given.
    cache, fp8 = "model.engine.kv_cache_dtype = 'fp8'", "model.quantization = 'fp8'"
    has_fp8_cache = settings.kv_dtype in DTYPE_BYTES and capability >= _LEAST_FP8_KV
    if has_fp8_cache:
        found.append(way("FP8 KV cache", cache, kv_dtype="fp8"))
    if not shape.quantization and weights.is_plain:
        least, native = METHODS["fp8"].least, METHODS["fp8"].native
        name = "FP8 weights" if capability >= native else "FP8 weights, 16-bit math"
        found += [way(name, fp8, 8.0)] if capability >= least else []
        if has_fp8_cache:
            found.append(way("FP8 weights, cache", f"{fp8}, {cache}", 8.0, kv_dtype="fp8"))
        if capability >= _INT4.least:
            text = "an AWQ or GPTQ checkpoint of the model as model.name"
            found.append(way("4-bit weights", text, _INT4.weight_bits))
    more = max(len(machine.devices.gpus) // settings.num_gpus, 2) * settings.tensor_parallel
    if not shape.heads % more:
        text = f"model.tensor_parallel_size = {more}"
        name = f"{more * settings.pipeline_parallel} such GPUs"
        found.append(way(name, text, tensor_parallel=more))
    return found


def _smallest(machine: Machine, kwargs: Mapping[str, Any]) -> Gpu:
    """The smallest GPU that shares the model, which sets the pace; an empty one without any."""
    num_gpus = gpus_of(kwargs, is_cpu=machine.build == "cpu")
    gpus = machine.devices.gpus[:num_gpus]
    return min(gpus, key=lambda gpu: gpu.total_bytes, default=Gpu(0, "", "", 0, 0, None))


def _weights(
    found: Found, shape: Shape, settings: Settings, kwargs: Mapping[str, Any], method: Method | None
) -> Weights | None:
    if found.missing_bytes:
        size, source = found.missing_bytes, "by the size of its files on the hub"
        return Weights(size, source, file_bytes=size, is_plain=method is None)
    if found.folder is None or kwargs.get("load_format") == "dummy":
        return None
    bits = method.weight_bits if method is not None and not shape.quantization else None
    read = read_weights(found.folder, shape, settings.dtype, bits)
    return dataclasses.replace(read, is_plain=method is None) if read else None


def _check_formats(
    kwargs: Mapping[str, Any], shape: Shape, settings: Settings, machine: Machine, gpu: Gpu
) -> tuple[Method | None, list[Finding]]:
    """The method that quantizes the weights, and whether the device runs the job's formats."""
    findings: list[Finding] = []
    if (capability := gpu.capability) is not None:
        formats = ", ".join(f"{kind}: {can}" for kind, can in can_run(capability).items())
        findings.append(ok("formats", f"{gpu.name} can run {formats}"))
        findings += _check_dtype(kwargs, shape, settings, capability)
    name = str(kwargs.get("quantization") or shape.quantization.get("quant_method") or "")[:80]
    if not name:
        return None, findings
    full_name, method = method_of(name, shape.quantization, release_of(machine.vllm))
    if name == _BNB and release_of(machine.vllm) >= _BNB_GONE:
        text = f"{name} is gone from vLLM {machine.vllm}"
        findings.append(problem("quantization", text, "take an AWQ, GPTQ or FP8 checkpoint"))
    elif method is None or (machine.build == "cpu" and not name.startswith(_CPU_METHODS)):
        text = f"whether {full_name} runs here is not known; vLLM says it at its start"
        findings.append(warning("quantization", text))
    elif capability is not None:
        findings.append(judge_method(full_name, method, capability))
    return method, findings


def method_of(
    name: str, config: Mapping[str, Any], release: tuple[int, int]
) -> tuple[str, Method | None]:
    """The method that a checkpoint or a job names.

    Args:
        name: `quant_method` of the checkpoint, or `model.quantization`.
        config: The checkpoint's `quantization_config`; empty for one that is not quantized.
        release: vLLM's, such as (0, 26).

    Returns:
        Its name for people, and None for one that is not known here.
    """
    if name == "compressed-tensors":
        return _compressed(config)
    if name == "modelopt":
        inner = config.get("quantization")
        algorithm = (inner if isinstance(inner, dict) else config).get("quant_algo", "FP8")
        if algorithm == "NVFP4":
            name = "modelopt_fp4"
        elif algorithm != "FP8":
            return f"{name} {algorithm}", None
        elif release < (0, 32):
            return name, Method(8.0, (8, 9), (8, 9))  # 8.0 in 0.32; between them nobody looked.
    return name, METHODS.get(name)


def _compressed(config: Mapping[str, Any]) -> tuple[str, Method | None]:
    """The scheme of the first group: most checkpoints have one. See compressed_tensors/schemes."""
    try:
        group = next(iter(config["config_groups"].values()))
        weights, inputs = group["weights"], group.get("input_activations") or {}
        bits, to = weights["num_bits"], inputs.get("num_bits") or 16
        is_float, is_float_in = weights["type"] == "float", inputs.get("type") == "float"
    except (LookupError, TypeError, AttributeError, StopIteration):
        return "compressed-tensors", Method()
    kind = f" FP{bits}" if is_float else " FP8" if is_float_in else " INT8" if to == 8 else ""
    name = f"compressed-tensors W{bits}A{to}{kind}"
    if is_float:
        return name, {(8, 8): _FP8, (4, 4): _NVFP4}.get((bits, to), Method(bits))
    if is_float_in:
        return name, Method(4.25, least=(9, 0), activations="FP8 activations")
    return name, Method(bits, activations=f"{'INT8' if to == 8 else '16-bit'} activations")


def judge_method(name: str, method: Method, capability: Capability) -> Finding:
    """Say whether a GPU can run a method, and how."""
    here = f"this GPU has {point(capability)}"
    if capability < method.least:
        text = f"{name} needs compute capability {point(method.least)} or newer, {here}"
        advice = "take a checkpoint in another format (AWQ and GPTQ run from 7.5 on)"
        return problem("quantization", text, f"{advice}, or a newer GPU")
    if capability < method.native:
        text = f"{name} runs here {_FALLBACK}: native from {point(method.native)} on, {here}"
        return warning("quantization", text)
    return ok("quantization", f"{name} runs here, {method.activations}")


def can_run(capability: Capability) -> dict[str, str]:
    """What a GPU can do of the formats that are seen most: name -> yes, fallback or no."""
    found = {"bfloat16": "yes" if capability >= _LEAST_BF16 else "no"}
    for format_name, name in _FORMATS.items():
        method = METHODS[name]
        native = "yes" if capability >= method.native else "weights only"
        found[format_name] = native if capability >= method.least else "no"
    fallback = "through FlashInfer" if capability >= _LEAST_FLASHINFER else "no"
    found["FP8 KV cache"] = "yes" if capability >= _LEAST_FP8_KV else fallback
    return found


def check_kv_dtype(dtype: str, capability: Capability | None) -> Iterator[Finding]:
    """Say whether a GPU can hold the KV cache in a quantized format; nothing for a plain one.

    Source:
        vllm/v1/attention/backends/triton_attn.py, TritonAttentionImpl, and flashinfer.py,
        supports_compute_capability, 0.26 to 0.33.
    """
    if capability is None or dtype in {"auto", "float16", "bfloat16"}:
        return
    text, here = f"kv_cache_dtype = {dtype!r}", f"this GPU has {point(capability)}"
    if dtype.startswith("fp8") and capability < _LEAST_FLASHINFER:
        text = f"{text} needs {point(_LEAST_FLASHINFER)}, {here}"
        yield problem("kv cache", text, "leave model.engine.kv_cache_dtype out")
    elif dtype.startswith("fp8") and capability < _LEAST_FP8_KV:
        text = f"{text} is run here by FlashInfer alone, where it is installed ({here})"
        yield warning("kv cache", text)
    else:
        yield ok("kv cache", f"{text} runs here; answers may differ a little from 16 bits")


def _check_heads(shape: Shape, settings: Settings, kwargs: Mapping[str, Any]) -> Iterator[Finding]:
    tp = settings.tensor_parallel
    if shape.heads and shape.heads % tp:
        text = f"the model has {shape.heads} attention heads, which {tp} GPUs cannot share evenly"
        yield problem("model", text, "choose a model.tensor_parallel_size that divides them")
    if besides := [text for name, text in _BESIDES.items() if kwargs.get(name)]:
        yield ok("memory", f"not counted in the estimate: {', '.join(besides)}")


def _check_dtype(
    kwargs: Mapping[str, Any], shape: Shape, settings: Settings, capability: Capability
) -> Iterator[Finding]:
    is_auto = str(kwargs.get("dtype") or "auto") == "auto"
    text = f"bfloat16 needs compute capability 8.0 or newer, this GPU has {point(capability)}"
    if settings.dtype == "bfloat16" and capability < _LEAST_BF16:
        yield problem("dtype", text, "set model.dtype = 'float16'")
    elif is_auto and shape.dtype == "bfloat16" != settings.dtype:
        yield warning("dtype", f"{text}: the model runs in {settings.dtype}")
    elif settings.dtype == "float16" and shape.model_type in NO_FLOAT16:
        text = f"{shape.model_type} models do not run in float16"
        yield problem("dtype", text, "leave model.dtype out, or set it to 'float32'")


def _weights_finding(weights: Weights | None, settings: Settings) -> Finding:
    if weights is None:
        return warning("weights", "their size is not known: the model is not of a plain kind")
    num, gpus = weights.num_parameters, settings.num_gpus
    number = f"{num / 1e9:,.2f} B" if num and num >= 1e8 else f"{(num or 0) / 1e6:,.2f} M"
    each = f", {gib(weights.num_bytes / gpus)} a GPU" if gpus > 1 else ""
    text = f"{gib(weights.num_bytes)} in {settings.dtype}{each}, {weights.source}"
    return ok("weights", f"{number} parameters, {text}" if num else text)


def _check_memory(memory: Memory, settings: Settings, shape: Shape, gpu: Gpu) -> Iterator[Finding]:
    """Say whether vLLM would start: free memory, weights, and something left for the KV cache."""
    free, num = gpu.free_bytes - CONTEXT_BYTES, settings.num_engines
    if free < memory.budget * num:
        share = math.floor(max(0, free) / memory.total * 100) / 100
        wanted = f"{gib(memory.budget * num)} ({settings.utilization * num:g} of GPU {gpu.index})"
        advice = f"end what else uses it, or set model.gpu_memory_utilization = {share}"
        yield problem("memory", f"vLLM wants {wanted}, about {gib(free)} would be free", advice)
    parts = [
        (memory.weights, "weights"),
        (memory.activations, f"activations at {settings.max_num_batched_tokens:,} tokens a step"),
        (memory.graphs, "CUDA graphs"),
        (memory.other, "CUDA libraries"),
    ]
    taken = " - ".join(f"{gib(size)} {name}" for size, name in parts if size)
    of = f"each of {num} engines on a GPU" if num > 1 else "one GPU"
    text = f"estimate for {of}: {gib(memory.budget)} - {taken} = {gib(memory.kv_cache)} KV cache"
    if settings.kv_cache_bytes:
        who = "as they divide the GPU" if num > 1 else "as the job says"
        text = f"estimate for {of}: {taken}, and {gib(memory.kv_cache)} KV cache {who}"
    if memory.kv_cache <= 0:
        yield problem("memory", f"{text}: the model does not fit", _smaller(settings))
        return
    yield ok("memory", f"{text}{'; images are not counted' if shape.is_multimodal else ''}")


def _check_host_memory(weights: int, cache: int | None, free: int | None) -> Finding:
    """On a CPU, weights and KV cache come out of the host's memory."""
    text = f"{gib(weights)} weights + {gib(cache)} KV cache" if cache else f"{gib(weights)} weights"
    if free is None:
        return ok("memory", text)
    if weights > free:
        return problem("memory", f"{text}, {gib(free)} are free", "take a smaller model")
    if cache and weights + cache > free:
        advice = "lower model.engine.kv_cache_memory_bytes or VLLM_CPU_KVCACHE_SPACE"
        return warning("memory", f"{text}, {gib(free)} are free", advice)
    return ok("memory", f"{text} of {gib(free)} free")


def _cpu_cache(kwargs: Mapping[str, Any], machine: Machine) -> int | None:
    """Bytes, as vLLM decides: vllm/platforms/cpu.py and vllm/v1/worker/cpu_worker.py, 0.32."""
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    if space.isdecimal() and int(space):
        return int(space) << 30
    given, share = kwargs.get("kv_cache_memory_bytes"), kwargs.get("gpu_memory_utilization")
    if isinstance(given, int) and given > 0:
        return given
    return round(share * machine.memory_bytes) if share and machine.memory_bytes else None


def _check_kv_cache(fit: Fit, shape: Shape, settings: Settings) -> Iterator[Finding]:
    """Say whether the KV cache holds one row of full length, as vLLM asks for."""
    tokens, longest = fit.kv_cache_tokens, settings.max_model_len
    if tokens is None:
        why = shape.not_plain or f"a KV cache in {settings.kv_dtype} is not counted here"
        yield ok("kv cache", f"tokens that it holds: not known, {why}; vLLM logs it at its start")
        return
    text = f"about {tokens:,} tokens (estimate)"
    if longest is None:
        yield ok("kv cache", text)
    elif (tokens := tokens // settings.num_engines) < longest:
        advice = f"set model.max_model_len to {tokens:,} or less, or: {_smaller(settings)}"
        yield problem("kv cache", f"{text}, one row may have {longest:,} (max_model_len)", advice)
    else:
        yield ok("kv cache", f"{text}, {fit.full_length:,.1f} rows of max_model_len {longest:,}")


def _check_rows(fit: Fit | None, rows: RowLengths | None, settings: Settings) -> Iterator[Finding]:
    """Say how many rows run at once, and whether the longest fit."""
    if rows is None:
        return
    longest, limit = rows.longest_prompt, settings.max_model_len
    if longest is not None and limit is not None and longest >= limit:
        text = f"the longest prompt looked at has about {longest:,} tokens, max_model_len is"
        advice = "such rows end as errors; raise model.max_model_len if the model allows it"
        yield warning("rows", f"{text} {limit:,}", advice)
    if rows.num_tight and limit is not None:
        text = f"{rows.num_tight:,} of the prompts looked at leave less room than max_tokens"
        text = f"{text}: answers are cut at max_model_len {limit:,}"
        advice = "lower sampling.max_tokens, or raise model.max_model_len if the model allows it"
        yield warning("rows", text, advice)
    out = f"up to {rows.answer:,.0f}" if rows.is_bound else f"{rows.answer:,.0f}"
    text = f"{rows.prompt:,.0f} tokens in, {out} out ({rows.source})"
    if fit is None or fit.concurrency is None or fit.expected_rows is None:
        yield ok("rows", text)
        return
    text = f"{text}: about {fit.expected_rows:,} at once; the KV cache holds about"
    text = f"{text} {fit.concurrency:,.0f} such rows, max_num_seqs is {fit.max_num_seqs:,}"
    if rows.is_bound:
        yield ok("rows", f"{text}; more if answers are shorter than they may be")
    elif fit.concurrency < _FEW_SHARE * fit.max_num_seqs:
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
