"""Whether a job is for one engine or for many, and what places these."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from batchgen.cluster.crew import Needs
from batchgen.core.errors import ConfigError
from batchgen.engine.vllm.settings import gpus_of, is_cpu_build

if TYPE_CHECKING:
    from batchgen.cluster.crew import Crew
    from batchgen.job.model import JobConfig

_OF_ONE = 0.9
"""Of a GPU's memory, what all engines on it get together: a little less than vLLM gives one
(`GPU_MEMORY_UTILIZATION`), since each takes some beyond its share, as its CUDA context."""
_WHERE = "[run]"


def engine_gpus(job: JobConfig) -> int:
    """How many GPUs one engine is spread over, if it is for GPUs."""
    model = job.model
    sizes = {**model.engine, "tensor_parallel_size": model.tensor_parallel_size}
    return gpus_of(sizes, is_cpu=False)


def needs_of(job: JobConfig) -> Needs:
    """What a replica takes.

    Raises:
        ConfigError: GPUs that cannot be had so.
    """
    num_gpus = job.run.gpus_per_replica
    if num_gpus is None:
        has_gpus = job.model.is_vllm and not is_cpu_build()
        num_gpus = float(engine_gpus(job)) if has_gpus else 0.0
    if (problem := _misfit(num_gpus, job)) is not None:
        raise ConfigError(_WHERE, [f"gpus_per_replica = {num_gpus:g}, {problem}"])
    return Needs(job.run.cpus_per_replica, num_gpus)


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


def share_gpu(job: JobConfig, needs: Needs) -> JobConfig:
    """The job as a worker gets it: who shares a GPU takes no more than its share of the memory."""
    if not 0 < needs.num_gpus < 1 or job.model.gpu_memory_utilization is not None:
        return job
    share = round(_OF_ONE * needs.num_gpus, 3)
    model = job.model.model_copy(update={"gpu_memory_utilization": share})
    return job.model_copy(update={"model": model})


def ray_crew(job: JobConfig) -> Crew:
    """Workers that Ray places.

    Raises:
        ConfigError: Ray is not installed.
        EngineError: There is no cluster at that address.
    """
    if find_spec("ray") is None:
        told = f"replicas = {job.run.replicas}"
        if job.run.ray_address is not None:
            told = f"ray_address = {job.run.ray_address!r}"
        raise ConfigError(_WHERE, [f"{told} needs Ray: pip install ray"])
    from batchgen.cluster.ray import RayCrew

    room_for = 0 if job.run.replicas == "auto" else job.run.replicas
    return RayCrew(job.run.ray_address, needs_of(job), room_for=room_for)
