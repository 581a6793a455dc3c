"""`GpuLoad`: how busy an engine's GPUs are. NVIDIA's only, and what else works on them counts.

vLLM tells how full the engine is, not whether the GPU waits for it between steps, as it does with
small models.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

from batchgen.engine.devices import load_nvml, read_devices, vllm_build

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from batchgen.engine.devices import Nvml

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
