"""Whether the replicas that a job asks for can be had."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from batchgen.cluster.crews import is_fleet, needs_of
from batchgen.cluster.ray_places import fit
from batchgen.core.errors import ConfigError
from batchgen.preview.findings import Finding, ok, problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchgen.job.model import JobConfig
    from batchgen.preview.machine import Machine

INSTALL = "pip install 'batchgen[ray]'"


def check_replicas(job: JobConfig, machine: Machine) -> Iterator[Finding]:
    """Look for Ray and, without a cluster, for GPUs enough; nothing for a job of one engine."""
    if not is_fleet(job):
        return
    if find_spec("ray") is None:
        yield problem("replicas", "Ray is not installed", INSTALL)
    try:
        needs = needs_of(job)
    except ConfigError as error:
        yield problem("replicas", str(error))
        return
    replicas, address = job.run.replicas, job.run.ray_address
    if address is not None:
        yield ok("replicas", f"{replicas} on the cluster at {address}; only this node is looked at")
    elif not needs.num_gpus:
        yield ok("replicas", f"{replicas} on this machine, without GPUs")
    else:
        room = fit(needs._replace(num_cpus=0), {"GPU": len(machine.devices.gpus)})
        wanted = 1 if replicas == "auto" else replicas
        text = f"room for {room} of {needs.num_gpus:g} GPUs each, {replicas} asked for"
        if room < wanted:
            yield problem("replicas", text, "fewer run.replicas, or run.ray_address")
        else:
            yield ok("replicas", text)
