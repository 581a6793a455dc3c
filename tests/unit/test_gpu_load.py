"""How busy GPUs are, by a fake NVML."""

# ruff: noqa: N802 - NVML's functions

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest

from batchgen.core.records import EngineStats
from batchgen.engine.devices import EVERY_S, GpuLoad
from batchgen.engine.process import Host
from tests.fakes import FakeEngine
from tests.unit.test_devices import Card, FakeNvml, NvmlError


@dataclass
class BusyNvml(FakeNvml):
    """GPUs at work."""

    rates: dict[str, int] = field(default_factory=dict)
    """uuid -> percent; a GPU that is not in it does not tell."""

    def nvmlDeviceGetUtilizationRates(self, handle: Card) -> SimpleNamespace:
        if handle.uuid not in self.rates:
            raise NvmlError("Not Supported")
        return SimpleNamespace(gpu=self.rates[handle.uuid], memory=3)


def nvml_of(*percents: int | None) -> BusyNvml:
    cards = [Card(uuid=f"GPU-{at}") for at in range(len(percents))]
    known = {f"GPU-{at}": num for at, num in enumerate(percents) if num is not None}
    return BusyNvml(cards, rates=known)


def test_an_engines_gpus_are_the_first_that_are_visible() -> None:
    nvml = nvml_of(10, 20, 60, 100)
    assert GpuLoad(1, nvml=nvml, environ={}).busy == pytest.approx(0.1)
    assert GpuLoad(2, nvml=nvml, environ={}).busy == pytest.approx(0.15)
    seen = {"CUDA_VISIBLE_DEVICES": "3,2"}
    assert GpuLoad(1, nvml=nvml, environ=seen).busy == pytest.approx(1.0)
    assert GpuLoad(2, nvml=nvml, environ=seen).busy == pytest.approx(0.8)


def test_a_reading_is_kept_for_a_while() -> None:
    now_s = 100.0
    nvml = nvml_of(50)
    load = GpuLoad(1, nvml=nvml, environ={}, clock=lambda: now_s)
    assert load.busy == pytest.approx(0.5)
    nvml.rates["GPU-0"] = 70
    now_s += EVERY_S - 0.1
    assert load.busy == pytest.approx(0.5)
    now_s += 0.2
    assert load.busy == pytest.approx(0.7)


def test_who_does_not_tell_is_asked_once() -> None:
    now_s = 0.0
    nvml = nvml_of(None)
    load = GpuLoad(1, nvml=nvml, environ={}, clock=lambda: now_s)
    assert load.busy is None
    nvml.rates["GPU-0"] = 70
    now_s += 2 * EVERY_S
    assert load.busy is None


def test_where_there_is_nothing_to_ask_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    assert GpuLoad(0).busy is None
    assert GpuLoad(1).busy is None
    broken = nvml_of(50)
    broken.broken = NvmlError("Driver/library version mismatch")
    assert GpuLoad(1, nvml=broken, environ={}).busy is None


def test_an_engines_process_tells_it_with_its_statistics() -> None:
    ours, theirs = Pipe()
    host = Host(theirs)
    host._is_ready = True
    host._load = GpuLoad(1, nvml=nvml_of(50), environ={})
    engine = FakeEngine(4)
    engine.stats = EngineStats(num_running=3)
    host._report(engine)
    kind, stats = pickle.loads(ours.recv_bytes())
    assert (kind, stats.num_running, stats.gpu_busy) == ("stats", 3, 0.5)
