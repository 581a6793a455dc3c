"""What we tell vLLM: environment variables and defaults of its keywords. Imports nothing of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchgen.records import EngineSpec

TINY_WEIGHTS_BYTES = 64 << 20
TINY_KV_CACHE_BYTES = 256 << 20

ENVIRONMENT = {
    # It phones home otherwise.
    "VLLM_NO_USAGE_STATS": "1",
    # Our encoder thread runs while the engine starts; forking beside threads is not safe.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # The model is a local folder: any lookup would be a surprise, or a hang without a network.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # Five seconds by default; workers that need longer are killed with the process group.
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",
    # Colour codes in a log file help no one.
    "NO_COLOR": "1",
}


def cpu_kv_cache_bytes(model: Path) -> int:
    """Choose a KV cache for a CPU: vLLM 0.32 would take 92 % of the machine's memory.

    256 MiB where the weights say that the model is a toy, else half of what is available now.
    """
    weights = sum(
        path.stat().st_size for kind in ("safetensors", "bin") for path in model.glob(f"*.{kind}")
    )
    if weights < TINY_WEIGHTS_BYTES:
        return TINY_KV_CACHE_BYTES
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def llm_kwargs(spec: EngineSpec, *, is_cpu: bool) -> dict[str, Any]:
    """Build the keywords of `LLM(...)`: the job's own, over our defaults."""
    # With statistics on, the core reports its scheduler's state; see `SchedulerWatch`.
    kwargs: dict[str, Any] = {"disable_log_stats": False, **spec.model_kwargs, "model": spec.model}
    sized = kwargs.keys() & {"kv_cache_memory_bytes", "gpu_memory_utilization"}
    if is_cpu and not sized and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        kwargs["kv_cache_memory_bytes"] = cpu_kv_cache_bytes(Path(spec.model))
    return kwargs
