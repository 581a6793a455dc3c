"""What a replica takes, and how many a machine has room for. Imports nothing of Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from batchgen.core.errors import ConfigError
from batchgen.engine.vllm.settings import engine_gpus, is_cpu_build

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchgen.job.model import JobConfig

_OF_ONE = 0.9
"""Of a GPU's memory, what all engines on it get together: a little less than vLLM gives one
(`GPU_MEMORY_UTILIZATION`), since each takes some beyond its share, as its CUDA context."""
_WHERE = "[run]"


class Resources(NamedTuple):
    """What each replica takes of its machine."""

    num_cpus: float
    num_gpus: float
    """Below 1: a share of one; else a whole number, all on one node."""


def resources_of(job: JobConfig) -> Resources:
    """Return what a replica takes.

    Raises:
        ConfigError: GPUs that cannot be had so.
    """
    num_gpus = job.run.gpus_per_replica
    if num_gpus is None:
        has_gpus = job.model.is_vllm and not is_cpu_build()
        num_gpus = float(engine_gpus(job)) if has_gpus else 0.0
    if (problem := _misfit(num_gpus, job)) is not None:
        raise ConfigError(_WHERE, [f"gpus_per_replica = {num_gpus:g}, {problem}"])
    return Resources(job.run.cpus_per_replica, num_gpus)


def _misfit(num_gpus: float, job: JobConfig) -> str | None:
    """What is wrong with so many GPUs for a replica."""
    size, memory = engine_gpus(job), job.model.gpu_memory_utilization
    if num_gpus > 1 and num_gpus != int(num_gpus):
        return "expected a whole number, or less than 1"
    if 0 < num_gpus < size and size > 1:
        return f"expected {size}, tensor_parallel_size x pipeline_parallel_size"
    if memory is not None and 0 < num_gpus < memory and job.run.replicas != 1:
        told = f"so that each takes {memory:g} of a GPU's memory"
        return f"but model.gpu_memory_utilization is set, {told}; leave it out"
    return None


def share_gpu(job: JobConfig, takes: Resources) -> JobConfig:
    """The job as a worker gets it: who shares a GPU takes no more than its share of the memory."""
    if not 0 < takes.num_gpus < 1 or job.model.gpu_memory_utilization is not None:
        return job
    share = round(_OF_ONE * takes.num_gpus, 3)
    model = job.model.model_copy(update={"gpu_memory_utilization": share})
    return job.model_copy(update={"model": model})


def fit(takes: Resources, node: Mapping[str, float]) -> int:
    """Count the workers that a node has room for.

    Args:
        takes: What each takes.
        node: What the node has: `CPU` and `GPU` among others.
    """
    num_gpus = node.get("GPU", 0.0)
    rooms = []
    if takes.num_cpus:
        rooms.append(_whole(node.get("CPU", 0.0) / takes.num_cpus))
    if takes.num_gpus >= 1:
        rooms.append(_whole(num_gpus / takes.num_gpus))
    elif takes.num_gpus:
        # A share is a share of one GPU: two of 0.7 do not make 1.4.
        rooms.append(_whole(num_gpus) * _whole(1 / takes.num_gpus))
    return min(rooms, default=0)


def _whole(num: float) -> int:
    """Round down. Ray counts in ten thousandths: ray/_raylet.pyx, RESOURCE_UNIT_SCALING."""
    return int(num + 1e-4)
