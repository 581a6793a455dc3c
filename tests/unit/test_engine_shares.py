"""When two engines share a GPU by themselves, and what each takes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from batchgen.core.records import EngineSpec, WorkLeft
from batchgen.engine.devices import Gpu
from batchgen.engine.vllm.shares import (
    ODD_WAYS,
    Host,
    cost_of,
    engines_for,
    engines_that_pay,
    is_worth_it,
    share_of,
    this_host,
)
from tests.bench.random_model import make_model

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30
TOTAL = 140 * GIB
H200 = Gpu(0, "GPU-1", "NVIDIA H200", TOTAL, TOTAL - GIB, (9, 0))
HOST = Host(16, 200 * GIB)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    (empty := tmp_path_factory.mktemp("tokenizer")).joinpath("tokenizer.json").write_text("{}")
    root = tmp_path_factory.mktemp("models")
    return {shape: make_model(root / shape, shape, empty) for shape in ("0.6b", "8b")}


def spec_of(folder: Path, **kwargs: Any) -> EngineSpec:
    return EngineSpec("vllm", str(folder), kwargs, {}, defaults="batchgen")


def test_a_model_costs_what_its_config_says(folders: dict[str, Path]) -> None:
    small, large = cost_of(folders["0.6b"], {}), cost_of(folders["8b"], {})
    assert small is not None
    assert large is not None
    # Without norms: 596,049,920 and 8,190,735,360 parameters in Qwen3-0.6B and Qwen3-8B.
    assert small.weights_bytes == pytest.approx(2 * 596e6, rel=0.01)
    assert large.weights_bytes == pytest.approx(2 * 8.19e9, rel=0.01)
    assert (small.kv_bytes, large.kv_bytes) == (114_688, 147_456)


def test_small_models_get_two_and_large_ones_one(folders: dict[str, Path]) -> None:
    assert engines_that_pay(spec_of(folders["0.6b"]), H200, HOST) == 2
    assert engines_that_pay(spec_of(folders["8b"]), H200, HOST) == 1


@pytest.mark.parametrize(
    "gpu",
    [
        None,
        replace(H200, name="NVIDIA H100 80GB HBM3"),
        replace(H200, is_mig=True),
        replace(H200, free_bytes=TOTAL // 2),
    ],
    ids=["none", "not measured", "a slice", "another is on it"],
)
def test_other_gpus_get_one(folders: dict[str, Path], gpu: Gpu | None) -> None:
    assert engines_that_pay(spec_of(folders["0.6b"]), gpu, HOST) == 1


@pytest.mark.parametrize("host", [Host(4, 200 * GIB), Host(16, 16 * GIB)])
def test_small_machines_get_one(folders: dict[str, Path], host: Host) -> None:
    assert engines_that_pay(spec_of(folders["0.6b"]), H200, host) == 1


@pytest.mark.parametrize(
    "kwargs",
    [{"tensor_parallel_size": 2}, {"quantization": "fp8"}, {"data_parallel_size": 2}],
    ids=str,
)
def test_other_ways_to_run_get_one(folders: dict[str, Path], kwargs: dict[str, Any]) -> None:
    assert engines_that_pay(spec_of(folders["0.6b"], **kwargs), H200, HOST) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": 8},
        {"quantization_config": {"quant_method": "awq"}},
        {"vision_config": {}},
        {"hidden_size": None},
    ],
    ids=str,
)
def test_models_of_another_kind_get_one(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    config = json.loads((folders["0.6b"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    assert engines_that_pay(spec_of(tmp_path), H200, HOST) == 1


def test_each_gpu_has_its_share_of_the_machine() -> None:
    whole, share = this_host(1), this_host(10_000)
    assert whole.num_cores >= 1
    assert whole.free_bytes > 0
    assert share.num_cores == 0
    assert share.free_bytes <= whole.free_bytes // 1000


def test_none_is_asked_of_where_vllm_chooses(folders: dict[str, Path]) -> None:
    assert engines_for(replace(spec_of(folders["0.6b"]), defaults="vllm")) == 1


@pytest.mark.parametrize(
    ("work", "is_worth"),
    [
        (WorkLeft(70_000, 256), True),
        (WorkLeft(7_000, 256), True),
        (WorkLeft(2_000, 256), True),
        (WorkLeft(6_000, 512), True),
        (WorkLeft(6_000, 2048), True),
        (WorkLeft(1_000, 256), False),
        (WorkLeft(1_000_000, 8, 1024), False),
    ],
    ids=[
        "much",
        "some",
        "few seconds",
        "long answers",
        "longest answers",
        "little",
        "labels: the GPU is busy with prompts",
    ],
)
def test_a_second_start_is_for_much_to_write(
    folders: dict[str, Path], work: WorkLeft, is_worth: bool
) -> None:
    assert is_worth_it(spec_of(folders["0.6b"]), H200, work) == is_worth


def test_a_large_model_never_leaves_its_gpu_waiting(folders: dict[str, Path]) -> None:
    for answer in (8, 64, 256, 512, 2048):
        assert not is_worth_it(spec_of(folders["8b"]), H200, WorkLeft(1_000_000, answer))


@pytest.mark.parametrize("task", ["embed", "classify", "score"])
def test_many_short_texts_are_pooled_by_several(folders: dict[str, Path], task: str) -> None:
    small, large = (replace(spec_of(folders[size]), task=task) for size in ("0.6b", "8b"))
    found = [engines_that_pay(small, H200, HOST._replace(num_cores=n)) for n in (16, 12, 11, 7)]
    assert found == [3, 3, 2, 1]
    assert engines_that_pay(small, H200, HOST._replace(free_bytes=30 << 30)) == 2
    assert engines_that_pay(large, H200, HOST) == 1
    work = WorkLeft(60_000, 1, 32)
    assert is_worth_it(small, H200, work)
    assert not is_worth_it(small, H200, work._replace(num_rows=20_000))
    assert not is_worth_it(small, H200, work._replace(prompt_tokens=512))  # The GPU is busy.
    assert engines_for(replace(small, defaults="vllm")) == 1


def test_memory_is_divided_and_the_cache_given(folders: dict[str, Path]) -> None:
    cost = cost_of(folders["0.6b"], {})
    share = share_of({}, 2, cost, TOTAL)
    assert share["gpu_memory_utilization"] == 0.46
    # 55 GB each is known to fit on an H200 (vLLM 0.26).
    assert 50e9 < share["kv_cache_memory_bytes"] < 0.46 * TOTAL - 6 * GIB


def test_what_the_job_says_of_memory_is_for_all(folders: dict[str, Path]) -> None:
    given = {"gpu_memory_utilization": 0.9, "kv_cache_memory_bytes": 3 * GIB}
    share = share_of(given, 3, cost_of(folders["0.6b"], {}), TOTAL)
    assert share == {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": GIB}


def test_where_the_cache_cannot_be_told_vllm_measures(folders: dict[str, Path]) -> None:
    cost = cost_of(folders["8b"], {})
    assert share_of({}, 2, None, TOTAL) == {"gpu_memory_utilization": 0.46}
    assert share_of({}, 2, cost, None) == {"gpu_memory_utilization": 0.46}
    assert share_of({}, 2, cost, 40 * GIB) == {"gpu_memory_utilization": 0.46}


NOT_FINITE = [float("inf"), float("nan")]
ODD_VALUES = [0, -1, "256", "a lot", [], {}, None, True, 10**400, *NOT_FINITE]


@pytest.mark.parametrize("value", ODD_VALUES, ids=lambda value: repr(value)[:20])
def test_odd_values_are_for_vllm_to_refuse(
    folders: dict[str, Path], tmp_path: Path, value: Any
) -> None:
    config = json.loads((folders["0.6b"] / "config.json").read_text())
    names = ["max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization"]
    for name in [*names, "kv_cache_memory_bytes"]:
        spec = spec_of(folders["0.6b"], **{name: value})
        assert engines_that_pay(spec, H200, HOST) in (1, 2)
        is_worth_it(spec, H200, WorkLeft(70_000, 256))
        share_of(spec.model_kwargs, 2, cost_of(folders["0.6b"], spec.model_kwargs), TOTAL)
    for name in config:
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
        assert engines_that_pay(spec_of(tmp_path), H200, HOST) in (1, 2)


def test_layers_that_are_all_of_the_plain_kind_are_told_by_newer_configs(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((folders["0.6b"] / "config.json").read_text())
    for kinds, num in ((["full_attention"] * 2, 2), (["full_attention", "linear_attention"], 1)):
        (tmp_path / "config.json").write_text(json.dumps({**config, "layer_types": kinds}))
        assert engines_that_pay(spec_of(tmp_path), H200, HOST) == num


@pytest.mark.parametrize("name", sorted(ODD_WAYS))
def test_models_and_memory_of_another_kind_get_one(folders: dict[str, Path], name: str) -> None:
    assert engines_that_pay(spec_of(folders["0.6b"], **{name: "some"}), H200, HOST) == 1
