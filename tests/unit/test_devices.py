"""GPUs as NVML tells of them; a fake here."""

# ruff: noqa: N802 - NVML's functions

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from batchgen.engine import devices
from batchgen.engine.devices import Devices, build_of, device_name, read_devices

MIB = 2**20


class NvmlError(Exception):
    """As pynvml.NVMLError."""


class NotFoundError(NvmlError):
    """There is no library."""


@dataclass
class Card:
    """A GPU of `FakeNvml`; memory in MiB."""

    name: str = "NVIDIA H100 80GB HBM3"
    total: int = 81559
    reserved: int = 551
    used: int = 8
    capability: tuple[int, int] = (9, 0)
    processes: list[tuple[int, int | None]] = field(default_factory=list)
    slices: list[Card | None] | None = None
    uuid: str = "GPU-0"


@dataclass
class FakeNvml:
    """As the module pynvml, of a driver of 2026."""

    cards: list[Card]
    broken: Exception | None = None
    NVMLError: type[Exception] = NvmlError
    num_open: int = 0

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.broken
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.159.04"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13010

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return self.cards[index]

    def nvmlDeviceGetName(self, handle: Card) -> str:
        return handle.name

    def nvmlDeviceGetUUID(self, handle: Card) -> str:
        return handle.uuid

    def nvmlDeviceGetMemoryInfo(self, handle: Card, version: int | None = None) -> Any:
        free = handle.total - handle.reserved - handle.used
        both = {"total": handle.total * MIB, "free": free * MIB}
        return SimpleNamespace(**both, reserved=handle.reserved * MIB if version else None)

    def nvmlDeviceGetCudaComputeCapability(self, handle: Card) -> tuple[int, int]:
        return handle.capability

    def nvmlDeviceGetMigMode(self, handle: Card) -> list[int]:
        if handle.slices is None:
            raise NvmlError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Card) -> int:
        return len(handle.slices or ())

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Card, index: int) -> Card:
        found = (handle.slices or ())[index]
        if found is None:
            raise NvmlError("Not Found")
        return found


def test_an_h100_is_read_as_cuda_sees_it() -> None:
    nvml = FakeNvml([Card()])
    found = read_devices(nvml, environ={})
    (gpu,) = found.gpus
    assert (found.driver, found.cuda) == ("580.159.04", (13, 1))
    assert (gpu.name, gpu.capability) == ("NVIDIA H100 80GB HBM3", (9, 0))
    assert gpu.total_bytes == 81008 * MIB  # 79.11 GiB, what CUDA says of this card.
    assert gpu.free_bytes == 81000 * MIB
    assert nvml.num_open == 0


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (None, ["GPU-a1", "GPU-a2", "GPU-b1"]),
        ("", []),
        ("-1", []),
        ("2, 0", ["GPU-b1", "GPU-a1"]),
        ("1,7,0", ["GPU-a2"]),
        ("GPU-b", ["GPU-b1"]),
        ("0,\u00b2", ["GPU-a1"]),
        ("1," + "9" * 5000, ["GPU-a2"]),
    ],
)
def test_cuda_visible_devices_is_obeyed(chosen: str | None, expected: list[str]) -> None:
    cards = [Card(uuid=uuid) for uuid in ("GPU-a1", "GPU-a2", "GPU-b1")]
    environ = {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}
    found = read_devices(FakeNvml(cards), environ=environ)
    assert [gpu.uuid for gpu in found.gpus] == expected
    assert found.num_hidden == 3 - len(expected)


def test_of_mig_slices_a_process_has_one() -> None:
    parts = [None, *(Card("H100 MIG 3g.40gb", 40320, 0, 0, uuid=f"MIG-{n}") for n in (1, 2))]
    nvml = FakeNvml([Card(slices=parts)])
    found = read_devices(nvml, environ={})
    assert [(gpu.uuid, gpu.is_mig, gpu.capability) for gpu in found.gpus] == [
        ("MIG-1", True, (9, 0))
    ]
    assert (found.gpus[0].total_bytes, found.num_hidden) == (40320 * MIB, 1)
    found = read_devices(nvml, environ={"CUDA_VISIBLE_DEVICES": "MIG-2,MIG-1"})
    assert [gpu.uuid for gpu in found.gpus] == ["MIG-2"]


def test_no_driver_is_no_gpu_and_a_broken_one_a_problem() -> None:
    assert read_devices(FakeNvml([], NotFoundError("NVML Shared Library Not Found"))) == Devices()
    broken = NvmlError("Driver/library version mismatch")
    found = read_devices(FakeNvml([], broken))
    assert found == Devices(problem="the NVIDIA driver says: Driver/library version mismatch")


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.26.0", "NVIDIA H100 80GB HBM3"), ("0.32.0+cpu", "cpu"), (None, "cpu")],
)
def test_the_device_is_named_for_the_build_of_vllm(monkeypatch, version, expected) -> None:
    (gpu,) = read_devices(FakeNvml([Card()]), environ={}).gpus
    monkeypatch.setattr(devices, "vllm_version", lambda: version)
    monkeypatch.setattr(devices, "read_devices", lambda: Devices([gpu]))
    device_name.cache_clear()
    try:
        assert device_name() == expected
    finally:
        device_name.cache_clear()


def test_here_reading_raises_nothing() -> None:
    assert device_name() == (read_devices().gpus[0].name if device_name() != "cpu" else "cpu")


@pytest.mark.parametrize(
    ("version", "build"),
    [
        ("0.32.0", "cuda"),
        ("0.32.0+cu129", "cuda"),
        ("0.33.1.dev7+g0123abc.precompiled", "cuda"),
        ("0.32.0+cpu", "cpu"),
        ("0.26.0+rocm700", "rocm"),
        ("0.26.0+xpu", "xpu"),
        ("0.26.0+tpu", "tpu"),
        ("0.26.1.dev3+gabc.empty", "empty"),
    ],
)
def test_a_vllm_for_other_devices_is_not_taken_for_one_for_cuda(version, build):
    assert build_of(version) == build
