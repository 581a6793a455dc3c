"""Whether a job is for one engine or for many, and what places these."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from batchgen.engine.settings import is_cpu_build
from batchgen.errors import ConfigError
from batchgen.fleet.crew import Needs

if TYPE_CHECKING:
    from batchgen.config.model import JobConfig
    from batchgen.fleet.crew import Crew

_OF_ONE = 0.9
"""vLLM's own default of `gpu_memory_utilization`: vllm/config/cache.py, 0.26 to 0.33."""
_WHERE = "[run]"


def is_fleet(job: JobConfig) -> bool:
    """Whether replicas are to be placed, even if it is one, on a cluster."""
    return job.run.replicas != 1 or job.run.ray_address is not None


def engine_gpus(job: JobConfig) -> int:
    """How many GPUs one engine is spread over, if it is for GPUs."""
    pipeline = int(job.model.engine.get("pipeline_parallel_size", 1))
    return (job.model.tensor_parallel_size or 1) * pipeline


def needs_of(job: JobConfig) -> Needs:
    """What a replica takes.

    Raises:
        ConfigError: GPUs that cannot be had so.
    """
    run, model = job.run, job.model
    num_gpus = run.gpus_per_replica
    size = engine_gpus(job)
    if num_gpus is None:
        has_gpus = model.backend == "vllm" and not is_cpu_build()
        num_gpus = float(size) if has_gpus else 0.0
    problem = None
    if num_gpus > 1 and num_gpus != int(num_gpus):
        problem = "expected a whole number, or less than 1"
    elif 0 < num_gpus < size:
        problem = f"expected {size}, tensor_parallel_size x pipeline_parallel_size"
        problem = None if size == 1 else problem
    memory = model.gpu_memory_utilization
    if memory is not None and 0 < num_gpus < 1 and run.replicas != 1 and memory > num_gpus:
        told = f"so that each takes {memory:g} of a GPU's memory"
        problem = f"but model.gpu_memory_utilization is set, {told}; leave it out"
    if problem is not None:
        raise ConfigError(_WHERE, [f"gpus_per_replica = {num_gpus:g}, {problem}"])
    return Needs(run.cpus_per_replica, num_gpus)


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
        raise ConfigError(_WHERE, [f"{told} needs Ray: pip install 'batchgen[ray]'"])
    from batchgen.executor.ray import RayCrew

    room_for = 0 if job.run.replicas == "auto" else job.run.replicas
    return RayCrew(job.run.ray_address, needs_of(job), room_for=room_for)
