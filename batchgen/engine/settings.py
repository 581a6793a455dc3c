"""What we tell vLLM: environment variables and defaults of its keywords. Imports nothing of it."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
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


CPU_ENVIRONMENT = {
    # A front end beside the core would be two more interpreters (1.2 GB, 15 s) for processor
    # cores that are busy anyway. On a GPU the default stays: it works beside the core.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def is_cpu_build() -> bool:
    """Whether the installed vLLM is one for CPUs, found without importing it.

    Source:
        vllm/platforms/__init__.py, cpu_platform_plugin, 0.26 to 0.33.
    """
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return True
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return True


def prepare_environment(*, is_cpu: bool) -> None:
    """Set what vLLM and torch read from the environment; what the user has set stays.

    Must run before torch is imported: OpenMP reads its variables once, when it is loaded.
    """
    defaults = dict(ENVIRONMENT)
    if is_cpu:
        defaults |= CPU_ENVIRONMENT
    if is_cpu and os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0") == "0":
        # One core less than there are, for everything else, as vLLM reserves one for its front
        # end. With none left each of the model's many small operators waits for a thread that
        # is not running: 40 to 100 rows/s became 740 on two busy cores (vLLM 0.32, tiny model).
        defaults["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) - 1))
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


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
