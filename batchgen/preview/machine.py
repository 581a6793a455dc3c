"""What this machine and this Python environment are; read once, judged elsewhere."""

from __future__ import annotations

import os
import platform
import re
import resource
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from batchgen import __version__
from batchgen.engine.devices import Devices, read_devices, vllm_build, vllm_version

if TYPE_CHECKING:
    from collections.abc import Mapping

PACKAGES = ("torch", "transformers", "tokenizers", "huggingface-hub", "nvidia-ml-py")
"""Of which the versions are told, beside vLLM's."""
CUDA_RUNTIMES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve")
"""Those that vLLM's CPU build has code for: cmake/cpu_extension.cmake, 0.26 to 0.33."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Plain facts. None where something cannot be told."""

    python: tuple[int, int]
    vllm: str | None
    """Its version; None if it is not installed."""
    build: str
    """Of vLLM: cuda, cpu, rocm, xpu; empty without it."""
    devices: Devices = field(default_factory=Devices)
    batchgen: str = __version__
    packages: Mapping[str, str] = field(default_factory=dict)
    """Name -> version, of `PACKAGES` that are installed."""
    cuda_built: tuple[int, int] | None = None
    """The CUDA version that torch is built with."""
    cores: int = 1
    """That this process may use."""
    memory_bytes: int | None = None
    """Of the machine, or of the container."""
    free_memory_bytes: int | None = None
    cpu: str = ""
    cpu_flags: tuple[str, ...] = ()
    """Of `CPU_FLAGS`."""
    shm_free_bytes: int | None = None
    open_files: int | None = None
    """How many this process may have open."""
    now: float = 0.0
    """Unix time."""


class Probe(Protocol):
    """Reads a machine; tests bring their own."""

    def __call__(self) -> Machine:
        """Read it now."""


def read_machine() -> Machine:
    """Read this machine. Imports neither torch nor vLLM, and starts nothing on a GPU."""
    cpu, flags = _cpu()
    memory, free = _memory()
    packages = {name: found for name in PACKAGES if (found := _version(name))}
    hard_or_soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return Machine(
        python=(int(platform.python_version_tuple()[0]), int(platform.python_version_tuple()[1])),
        vllm=vllm_version(),
        build=vllm_build(),
        devices=read_devices(),
        packages=packages,
        cuda_built=_cuda_built(packages.get("torch", "")),
        cores=_cores(),
        memory_bytes=memory,
        free_memory_bytes=free,
        cpu=cpu,
        cpu_flags=flags,
        shm_free_bytes=_shm(),
        open_files=None if hard_or_soft == resource.RLIM_INFINITY else hard_or_soft,
        now=datetime.now(UTC).timestamp(),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cuda_built(torch: str) -> tuple[int, int] | None:
    """Of torch's wheel: `+cu130` in its version, else that of NVIDIA's runtime beside it."""
    if found := re.search(r"\+cu(\d+)(\d)$", torch):
        return int(found[1]), int(found[2])
    for package in CUDA_RUNTIMES:
        if found := re.match(r"(\d+)\.(\d+)", _version(package)):
            return int(found[1]), int(found[2])
    return None


def _cpu() -> tuple[str, tuple[str, ...]]:
    name, flags = platform.processor() or platform.machine(), set()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n"):
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in {"flags", "Features"}:
                flags = set(value.split())
                break
    return name, tuple(flag for flag in CPU_FLAGS if flag in flags)


def _cores() -> int:
    """That the scheduler gives to this process, or to its container."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = max(1, min(cores, round(int(quota) / int(period))))
    return cores


def _memory() -> tuple[int | None, int | None]:
    """In all and available, in bytes; of the container where it has a limit."""
    found: dict[str, int] = {}
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(":")
            if key in {"MemTotal", "MemAvailable"}:
                found[key] = int(value.split()[0]) * 1024
    total, free = found.get("MemTotal"), found.get("MemAvailable")
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        if total is not None and free is not None and limit < total:
            total, free = limit, min(free, limit - used)
    return total, free


def _shm() -> int | None:
    try:
        stat = os.statvfs("/dev/shm")  # noqa: S108 - where NCCL and vLLM put what they share
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize
