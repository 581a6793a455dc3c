"""GPUs that are not here: found by name in `gpus.csv`, or told by memory and compute capability.

The doctor judges a job by them as if they were in this machine, before anybody buys or rents one.
"""

from __future__ import annotations

import csv
import difflib
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

from batchgen.core.errors import ConfigError
from batchgen.core.runtime import option
from batchgen.engine.devices import Devices, Gpu, vllm_version
from batchgen.preview.machine import GIB, NEWEST, Machine, point

_SHOWN = 0.98
"""Part of the memory that a card is sold with that CUDA shows: the least of cards without ECC."""
_NOISE = re.compile(
    r"nvidia|geforce|tesla|generation|edition|workstation|server|graphics|gpu|sxm\d?|pcie"
    r"|hbm\d?e?|gddr\d\w?"
)
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(g|gb|gib)|(m|mb|mib))?", re.IGNORECASE)
_CAPABILITY = re.compile(r"(\d{1,2})\.(\d)")


def planned_machine(
    gpu: str | None, memory: str | None, capability: str | None, count: int | None
) -> Machine:
    """Return a machine that is not here, with so many of a GPU, none of whose memory is taken.

    Args:
        gpu: Its name, such as `RTX 3090`; None: its memory and capability are given.
        memory: What it is sold with, such as `24GiB`.
        capability: Compute capability, such as `8.6`.
        count: How many; None: 1.

    Raises:
        ConfigError: There is no such GPU, or there are several.
    """
    if gpu is not None and memory is None and capability is None:
        found = find_gpu(gpu)
    elif gpu is None and memory is not None and capability is not None:
        found = told_gpu(memory, capability)
    else:
        told = f"expected a name, or else both {option('--memory')} and {option('--capability')}"
        raise ConfigError(option("--gpu"), [told])
    gpus = [replace(found, index=at) for at in range(count or 1)]
    version = (vllm_version() or point(NEWEST)).partition("+")[0]
    python = sys.version_info[:2]
    return Machine(python, version, "cuda", Devices(gpus, source="told"), is_planned=True)


def find_gpu(name: str) -> Gpu:
    """Find a GPU by its name, as NVIDIA or `nvidia-smi` writes it, or by a part of it.

    Raises:
        ConfigError: None is called so, or several are that differ.
    """
    asked = _words(name)
    fitting = {one: gpu for one, gpu in known_gpus().items() if asked and asked <= _words(one)}
    least = min((len(_words(one)) for one in fitting), default=0)
    near = {one: gpu for one, gpu in fitting.items() if len(_words(one)) == least}
    if len({(gpu.total_bytes, gpu.capability) for gpu in near.values()}) == 1:
        return next(iter(near.values()))
    if near:
        raise ConfigError(option("--gpu"), [f"{name!r:.80} may be {' or '.join(near)}"])
    like = {one.lower(): one for one in known_gpus()}
    closest = difflib.get_close_matches(name.lower(), like, n=4, cutoff=0.4)
    text = f"{name!r:.80} is not known here, closest: {', '.join(like[one] for one in closest)}"
    text = text if closest else f"{name!r:.80} is not known here"
    way = f"{option('--memory', '24GiB')} {option('--capability', '8.6')}"
    raise ConfigError(option("--gpu"), [f"{text}; or tell what it has: {way}"])


def _words(name: str) -> frozenset[str]:
    """Words and numbers of a name: `RTX3090`, `GeForce RTX 3090` and `rtx 3090` have the same."""
    return frozenset(re.findall(r"[a-z]+|\d+", _NOISE.sub(" ", name.lower())))


@cache
def known_gpus() -> dict[str, Gpu]:
    """The GPUs of `gpus.csv`: name -> what CUDA would say of it."""
    text = Path(__file__).with_name("gpus.csv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {
        row["name"]: _gpu(f"NVIDIA {row['name']}", float(row["gib"]), row["capability"])
        for row in csv.DictReader(lines)
    }


def told_gpu(memory: str, capability: str) -> Gpu:
    """Make a GPU of its memory as it is sold, and its compute capability.

    Raises:
        ConfigError: One of them cannot be read.
    """
    size, point_of = _MEMORY.fullmatch(memory.strip()), _CAPABILITY.fullmatch(capability.strip())
    wrong = []
    if size is None or not 1 <= (gib := float(size[1]) / (1024 if size[3] else 1)) <= 1 << 16:
        wrong.append(f"{option('--memory')} {memory!r:.40} is wrong, expected such as 24GiB")
    if point_of is None:
        expected = "expected such as 8.6; developer.nvidia.com/cuda-gpus lists them"
        wrong.append(f"{option('--capability')} {capability!r:.40} is wrong, {expected}")
    if wrong:
        raise ConfigError("GPU", wrong)
    return _gpu(f"a GPU with {memory.strip()}", gib * _SHOWN, capability.strip())


def _gpu(name: str, gib: float, capability: str) -> Gpu:
    size = round(gib * GIB)
    major, minor = capability.split(".")
    return Gpu(0, "", name, size, size, (int(major), int(minor)))
