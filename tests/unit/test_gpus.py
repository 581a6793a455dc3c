"""What the doctor says of GPUs that are not here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from batchgen.api import load
from batchgen.core.errors import ConfigError
from batchgen.engine.devices import Gpu
from batchgen.engine.vllm.shares import shape_of
from batchgen.preview.doctor import examine
from batchgen.preview.machine import find_gpu, known_gpus, planned_machine
from batchgen.preview.memory import estimate, settings_of
from tests.unit.test_doctor import FakeHub, job, machine, write_weights  # noqa: F401 - a fixture

if TYPE_CHECKING:
    from pathlib import Path

    from batchgen.preview.model_check import Report

GIB = 2**30
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
"""Of Llama-3.1-8B-Instruct: meta-llama's config.json."""
LLAMA_BYTES = 8_030_261_248 * 2


@pytest.mark.parametrize("name", sorted(known_gpus()))
def test_a_gpu_is_found_by_its_own_name_however_it_is_written(name: str) -> None:
    found = known_gpus()[name]
    for written in (name, name.lower(), f"NVIDIA {name}", f"GeForce {name.replace(' ', '-')}"):
        assert find_gpu(written) == found


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX 3090 Ti"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("H100", "H100 80GB"),
        ("H100 NVL", "H100 NVL 94GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell"),
        ("a10g", "A10G"),
    ],
)
def test_a_gpu_is_found_by_what_people_call_it(written: str, name: str) -> None:
    assert find_gpu(written) == known_gpus()[name]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("A100", "'A100' may be A100 40GB or A100 80GB"),
        ("RTX 4060 Ti", "may be RTX 4060 Ti 16GB or RTX 4060 Ti 8GB"),
        ("RTX 3099", "is not known here, closest: RTX 30"),
        ("MI300X", "or tell what it has: --memory 24GiB --capability 8.6"),
        ("", "'' is not known here"),
        ("\x1b[2J", "is not known here"),
    ],
)
def test_a_name_that_is_none_or_several_is_told(written: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_gpu(written)
    assert text in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("memory", ["24", "24GB", "24 GiB", "24g", "24576MiB"])
def test_memory_is_what_a_card_is_sold_with(memory: str) -> None:
    gpu = planned_machine(None, memory, "8.6", 2).devices.gpus[1]
    assert (gpu.index, gpu.capability) == (1, (8, 6))
    assert 23.4 <= gpu.total_bytes / GIB <= known_gpus()["RTX 3090"].total_bytes / GIB


@pytest.mark.parametrize(
    "given",
    [
        ("RTX 3090", "24GiB", None),
        (None, "24GiB", None),
        (None, None, "8.6"),
        (None, "lots", "8.6"),
        (None, "0", "8.6"),
        (None, "24GiB", "86"),
    ],
)
def test_what_says_too_little_or_too_much_is_refused(given: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        planned_machine(*given, None)


def test_a_3090_holds_what_vllm_reported_of_it() -> None:
    """Of github.com/vllm-project/vllm/issues/10517: 14.99 GiB weights, 17.06 peak, 3.81 left."""
    gpu = Gpu(0, "", "NVIDIA GeForce RTX 3090", round(23.58 * GIB), round(23.58 * GIB), (8, 6))
    kwargs = {"gpu_memory_utilization": 0.9, "max_num_batched_tokens": 20_000}
    shape = shape_of(LLAMA)
    settings = settings_of(kwargs, shape, gpu, 20_000)
    memory = estimate(shape, LLAMA_BYTES, settings, gpu.total_bytes, (0, 26))
    assert memory.weights / GIB == pytest.approx(14.99, abs=0.05)
    assert memory.activations / GIB == pytest.approx(17.06 - 14.99, abs=0.05)
    assert memory.kv_cache / GIB == pytest.approx(3.81, abs=0.2)
    assert memory.kv_cache_tokens == pytest.approx(1952 * 16, rel=0.05)


@pytest.fixture
def llama(job: dict[str, Any], tmp_path: Path) -> dict[str, Any]:  # noqa: F811
    """The job for Llama 3.1 8B: on the hub, as on a laptop before anything is bought."""
    folder = tmp_path / "8b"
    (folder / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    (folder / "model.safetensors").unlink()
    job["model"]["name"] = "org/model"
    return job


class Llama(FakeHub):
    def look(self, name: str, revision: str | None) -> tuple[Path, int]:
        return self.folder, LLAMA_BYTES


def asked(tables: dict[str, Any], folder: Path, *gpu: Any) -> Report:
    there = planned_machine(*gpu)
    return examine(lambda: load(tables), lambda: there, hub=Llama(folder))


def test_llama_on_24_gb(llama: dict[str, Any], tmp_path: Path) -> None:
    report = asked(llama, tmp_path / "8b", "RTX 3090", None, None, None)
    assert report.exit_code == 0, report.as_text()
    own, *others = report.ways
    assert own.weights / 1e9 == pytest.approx(16, abs=0.1)
    assert 4 <= own.kv_cache / GIB <= 6.5
    assert own.rows_at_once[2048] >= 16
    assert own.rows_at_once[4096] >= 8
    assert next(iter(own.rows_at_once)) == 126  # The job's own: 26 in, up to 100 out.
    names = [way.name for way in others]
    assert names == ["FP8 weights, 16-bit math", "4-bit weights", "2 such GPUs"]
    assert all(way.kv_cache > own.kv_cache for way in others)
    assert report.can_run["FP8 (W8A8)"] == "weights only"
    assert report.can_run["AWQ"] == report.can_run["GPTQ"] == "yes"
    assert {finding.topic for finding in report.findings}.isdisjoint(
        {"vllm", "driver", "output", "disk", "limits"}
    )
    lines = report.as_text().splitlines()
    assert lines[-1] == "such a machine can run the job"
    assert any("yours (126)" in line for line in lines)
    json.dumps(report.as_dict())


def test_llama_on_16_gb_needs_another_way(llama: dict[str, Any], tmp_path: Path) -> None:
    report = asked(llama, tmp_path / "8b", None, "16GiB", "8.9", 1)
    assert (report.exit_code, report.ways[0].kv_cache < 0) == (2, True)
    fitting = {way.name: way.change for way in report.ways if way.rows_at_once[4096] >= 4}
    assert fitting == {
        "FP8 weights": "model.quantization = 'fp8'",
        "FP8 weights, cache": "model.quantization = 'fp8', model.engine.kv_cache_dtype = 'fp8'",
        "4-bit weights": "an AWQ or GPTQ checkpoint of the model as model.name",
        "2 such GPUs": "model.tensor_parallel_size = 2",
    }
    text = report.as_text()
    assert "as the job is       14.96 GiB  does not fit" in text
    assert "such a machine cannot run the job" in text


def test_fp8_begins_with_capability_8_9(llama: dict[str, Any], tmp_path: Path) -> None:
    for capability, found in [("8.6", "weights only"), ("8.9", "yes"), ("9.0", "yes")]:
        report = asked(llama, tmp_path / "8b", None, "24GiB", capability, None)
        assert report.can_run["FP8 (W8A8)"] == found
    assert asked(llama, tmp_path / "8b", "V100 16GB", None, None, None).exit_code == 2


def test_a_table_of_ways_is_true_to_the_formulas(
    job: dict[str, Any],  # noqa: F811
) -> None:
    """A way's figures are those of a job that is changed so."""
    there = planned_machine("RTX 4090", None, None, 2)
    changes = {
        "FP8 KV cache": {"engine": {"kv_cache_dtype": "fp8"}},
        "FP8 weights": {"quantization": "fp8"},
        "FP8 weights, cache": {"quantization": "fp8", "engine": {"kv_cache_dtype": "fp8"}},
        "2 such GPUs": {"tensor_parallel_size": 2},
    }
    ways = {way.name: way for way in examine(lambda: load(job), lambda: there).ways}
    assert set(ways) == {"as the job is", "4-bit weights", *changes}
    for name, change in changes.items():
        tables = {**job, "model": {**job["model"], **change}}
        memory = examine(lambda given=tables: load(given), lambda: there).memory
        assert memory is not None
        assert ways[name].weights == pytest.approx(memory.weights, rel=0.01)
        assert ways[name].kv_cache == pytest.approx(memory.kv_cache, rel=0.02)


@pytest.mark.parametrize("num", [2, 3])
def test_engines_that_share_a_gpu_are_all_counted(
    job: dict[str, Any],  # noqa: F811
    num: int,
) -> None:
    h200 = known_gpus()["H200"]
    here = machine(h200)
    job["model"]["max_num_seqs"] = 64
    alone = examine(lambda: load(job), lambda: here)
    job["run"] = {"engines_per_gpu": num}
    shared = examine(lambda: load(job), lambda: here)
    assert shared.memory is not None
    assert shared.fit is not None
    assert alone.fit is not None
    taken = shared.memory.weights + shared.memory.activations + shared.memory.kv_cache
    assert num * taken < 0.92 * h200.total_bytes
    assert shared.fit.max_num_seqs == num * 64
    assert shared.fit.expected_rows == num * alone.fit.expected_rows
    one = shared.memory.kv_cache_tokens
    assert shared.fit.kv_cache_tokens == num * one < alone.fit.kv_cache_tokens
    # Each row is in one engine, which has to hold it whole.
    job["model"]["max_model_len"] = one + 16
    too_long = examine(lambda: load(job), lambda: here)
    assert f"set model.max_model_len to {one:,} or less" in too_long.as_text()
