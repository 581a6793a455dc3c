"""Where Ray's workers go and what they find there. Imports nothing of Ray."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchgen.cluster.crew import Needs

CARRIED = ("BATCHGEN_", "VLLM_", "HF_", "HUGGING_FACE_", "TRANSFORMERS_", "NCCL_")
"""Variables of the driver's environment, by how they begin, that every worker gets."""
NOT_CARRIED = {"VLLM_HOST_IP"}
"""Each machine has its own."""
_CONNECT_S = 5.0


def fit(needs: Needs, node: Mapping[str, float]) -> int:
    """How many workers a node has room for.

    Args:
        needs: What each takes.
        node: What the node has: `CPU` and `GPU` among others.
    """
    num_gpus = node.get("GPU", 0.0)
    rooms = []
    if needs.num_cpus:
        rooms.append(_whole(node.get("CPU", 0.0) / needs.num_cpus))
    if needs.num_gpus >= 1:
        rooms.append(_whole(num_gpus / needs.num_gpus))
    elif needs.num_gpus:
        # A share is a share of one GPU: two of 0.7 do not make 1.4.
        rooms.append(_whole(num_gpus) * _whole(1 / needs.num_gpus))
    return min(rooms, default=0)


def _whole(num: float) -> int:
    """Round down. Ray counts in ten thousandths: ray/_raylet.pyx, RESOURCE_UNIT_SCALING."""
    return int(num + 1e-4)


def worker_environment(driver: Mapping[str, str], *, has_gpu: bool) -> dict[str, str | None]:
    """What a worker's environment gets; None takes a variable away.

    They travel with the actor's arguments, not in its runtime environment: Ray shows that one in
    its logs, and a token of the hub may be among them.

    Args:
        driver: The driver's.
        has_gpu: Whether the engine computes on a GPU.
    """
    found: dict[str, str | None] = {
        name: value
        for name, value in driver.items()
        if name.startswith(CARRIED) and name not in NOT_CARRIED
    }
    # Ray sets it to the number of the actor's CPUs, at least 1 (ray/_private/utils.py,
    # set_omp_num_threads_if_unset). That is right where the engine computes on them.
    if has_gpu or "OMP_NUM_THREADS" in driver:
        found["OMP_NUM_THREADS"] = driver.get("OMP_NUM_THREADS")
    return found


def head_refuses(address: str) -> str | None:
    """Say what is wrong with an address, before Ray tries it for two minutes."""
    if "://" in address:
        return (
            "Ray Client is not supported, its proxy stands between the driver and the workers; "
            "expected auto or HOST:PORT of the cluster's head, on a machine of the cluster"
        )
    host, _, port = _of_auto(address).rpartition(":")
    if not host:
        return None if address == "auto" else "expected auto or HOST:PORT of the cluster's head"
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, ValueError) as exc:
        where = f"{host}:{port}, where auto leads" if address == "auto" else "it"
        return f"nobody answers at {where}: {exc}; is the cluster up?"
    return None


def _of_auto(address: str) -> str:
    """Resolve `auto` as Ray does, as far as that needs no search.

    Source:
        ray/_private/services.py, canonicalize_bootstrap_address; ray/_common/utils.py,
        get_ray_address_file.
    """
    if address != "auto":
        return address
    if named := os.environ.get("RAY_ADDRESS"):
        return named
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108
    try:
        return Path(folder, "ray", "ray_current_cluster").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
