"""What the doctor says of machines that are fakes, and jobs that are not."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchgen.api import load
from batchgen.engine.devices import Devices, Gpu
from batchgen.engine.vllm import settings
from batchgen.preview.checkpoint import weight_bytes
from batchgen.preview.doctor import check_keywords, examine
from batchgen.preview.machine import (
    Level,
    Machine,
    check_output,
    check_replicas,
    filesystem,
    probe_links,
    read_machine,
)
from batchgen.preview.model_check import Report, can_run, check_kv_dtype, judge_method, method_of
from batchgen.preview.sample import counter
from tests import fakes
from tests.bench.random_model import make_model

MIB, GIB = 2**20, 2**30
SAMPLE_MODEL = Path(__file__).parents[2] / "sample_data" / "model"
PACKAGES = {"torch": "2.11.0+cu130", "transformers": "5.6.0", "tokenizers": "0.22.1"}


def gpu(name: str = "NVIDIA H100 80GB HBM3", gib: float = 79.18, **changes: Any) -> Gpu:
    size = int(gib * GIB)
    return replace(Gpu(0, "GPU-0", name, size, size - 5 * MIB, (9, 0)), **changes)


H100 = gpu()
A100 = gpu("NVIDIA A100-SXM4-80GB", capability=(8, 0))
T4 = gpu("Tesla T4", 14.56, capability=(7, 5))
V100 = gpu("Tesla V100-SXM2-16GB", 15.77, capability=(7, 0))


def machine(*gpus: Gpu, **changes: Any) -> Machine:
    devices = Devices(gpus, 0, "580.159.04", (13, 0))
    fields = {"devices": devices, "packages": PACKAGES, "cuda_built": (13, 0), **changes}
    return Machine((3, 12), fields.pop("vllm", "0.26.0"), fields.pop("build", "cuda"), **fields)


class FakeHub:
    """One model, `org/model`, in the cache or not."""

    def __init__(self, folder: Path, *, is_cached: bool = False, free: int = 100 * GIB) -> None:
        self.folder = folder
        self.is_cached = is_cached
        self.free = free

    def cached(self, name: str, revision: str | None) -> Path | None:
        return self.folder if self.is_cached else None

    def look(self, name: str, revision: str | None) -> tuple[Path, int]:
        if name != "org/model":
            msg = "404 Client Error\nRequest id: 7"
            raise OSError(msg)
        return self.folder, 16 * GIB

    def free_bytes(self) -> int | None:
        return self.free


def write_weights(folder: Path) -> None:
    """A file as large as Qwen3-8B's weights that takes no disk: its header, and a hole."""
    layer = {"q": [4096, 4096], "k": [1024, 4096], "v": [1024, 4096], "o": [4096, 4096]}
    layer |= {"gate_proj": [12288, 4096], "up": [12288, 4096], "down": [4096, 12288]}
    shapes = {"embed_tokens": [151936, 4096], "lm_head": [151936, 4096]}
    shapes |= {f"layers.{at}.{name}": size for at in range(36) for name, size in layer.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape[0] * shape[1]
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """Tables of a job for a model with the shape of Qwen3-8B."""
    rows = "".join(json.dumps({"text": "hello " * 20}) + "\n" for _ in range(300))
    (tmp_path / "in.jsonl").write_text(rows, encoding="utf-8")
    model = make_model(tmp_path / "8b", "8b", SAMPLE_MODEL)
    write_weights(model)
    return {
        "input": {"path": str(tmp_path / "in.jsonl")},
        "prompt": {"user": "{{ text }}"},
        "model": {
            "name": str(model),
            "max_model_len": 8192,
            "engine": {},
        },
        "sampling": {"max_tokens": 100},
        "output": {"path": str(tmp_path / "out")},
    }


def seen(tables: dict[str, Any], here: Machine, **keywords: Any) -> Report:
    return examine(lambda: load(tables), probe=lambda: here, **keywords)


def topics(report: Report, level: Level) -> list[str]:
    return [finding.topic for finding in report.findings if finding.level == level]


def test_an_h100_runs_it(job: dict[str, Any], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    report = seen(job, machine(H100))
    assert (report.level, report.exit_code, report.reason) == (Level.OK, 0, None), report.as_text()
    assert report.fit is not None
    assert report.rows is not None
    assert report.rows.prompt == 5 + 21  # A message, 20 times hello, a blank.
    assert report.fit.expected_rows == 1024
    assert report.fit.concurrency == pytest.approx(report.fit.kv_cache_tokens / 128)
    assert sorted(tmp_path.rglob("*")) == before
    found = json.loads(json.dumps(report.as_dict()))
    assert found["kv_cache_tokens"] == report.fit.kv_cache_tokens > 390_000
    assert found["machine"]["devices"]["gpus"][0]["name"] == H100.name
    assert report.as_text().endswith("this machine can run the job")


def test_a_small_gpu_is_told_why_not(job: dict[str, Any]) -> None:
    report = seen(job, machine(T4))
    assert (report.exit_code, topics(report, Level.PROBLEM)) == (2, ["memory"])
    assert "the model does not fit" in (report.reason or "")
    assert report.as_text().splitlines()[-1].startswith("this machine cannot run the job: estimate")
    assert topics(report, Level.WARNING) == ["dtype"]
    assert report.settings is not None
    assert report.settings.dtype == "float16"


def test_one_row_of_full_length_must_fit(job: dict[str, Any]) -> None:
    job["model"] |= {"max_model_len": 40_000, "gpu_memory_utilization": 0.26}
    report = seen(job, machine(H100))
    assert topics(report, Level.PROBLEM) == ["kv cache"]
    advice = next(f.advice for f in report.findings if f.level == Level.PROBLEM)
    assert f"{report.fit.kv_cache_tokens:,} or less" in advice
    job["model"] |= {"max_model_len": report.fit.kv_cache_tokens}
    assert seen(job, machine(H100)).exit_code == 0


def test_two_gpus_share_it(job: dict[str, Any]) -> None:
    job["model"]["tensor_parallel_size"] = 2
    report = seen(job, machine(T4, replace(T4, index=1)))
    assert report.exit_code == 0, report.as_text()
    assert "7.63 GiB a GPU" in report.as_text()
    report = seen(job, machine(H100))
    assert "asks for 2 GPUs, 1 can be seen" in (report.reason or "")
    job["model"]["tensor_parallel_size"] = 3
    report = seen(job, machine(*[H100] * 3))
    assert "32 attention heads" in (report.reason or "")


def test_replicas_on_one_gpu_are_held_against_their_share_of_its_memory(
    job: dict[str, Any],
) -> None:
    job["run"] = {**job.get("run", {}), "replicas": 2, "gpus_per_replica": 0.5}
    shared = seen(job, machine(H100)).as_dict()["kv_cache_tokens"]
    del job["run"]
    job["model"]["gpu_memory_utilization"] = 0.45
    assert shared == seen(job, machine(H100)).as_dict()["kv_cache_tokens"] < 200_000


def test_memory_that_others_hold_is_missed(job: dict[str, Any]) -> None:
    taken = replace(H100, free_bytes=H100.free_bytes - 40 * GIB)
    report = seen(job, machine(taken))
    assert topics(report, Level.PROBLEM) == ["memory"]
    assert "others hold 40.00 GiB of it" in report.as_text()
    advice = next(f.advice for f in report.findings if f.level == Level.PROBLEM)
    assert advice.endswith("model.gpu_memory_utilization = 0.48")
    job["model"]["gpu_memory_utilization"] = 0.48
    assert seen(job, machine(taken)).exit_code == 0


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        (machine(), "there is no NVIDIA GPU"),
        (machine(devices=Devices(num_hidden=2)), "CUDA_VISIBLE_DEVICES hides all of 2"),
        (machine(devices=Devices(problem="the driver says: no")), "the driver says: no"),
        (machine(H100, vllm=None, build=""), "vLLM is not installed"),
        (machine(H100, vllm="0.25.1"), "too old"),
        (machine(H100, packages={"torch": "2.11"}), "transformers and tokenizers not installed"),
        (machine(V100), "needs 7.5 or newer"),
        (machine(devices=Devices([H100], 0, "550.54", (12, 4))), "built with 13.0"),
    ],
)
def test_what_is_missing_is_named(job: dict[str, Any], here: Machine, reason: str) -> None:
    report = seen(job, here)
    assert report.exit_code == 2
    assert reason in (report.reason or "")
    # The rest is told all the same.
    assert "B parameters" in report.as_text()
    assert "free" in report.as_text()


def test_what_is_only_odd_is_a_warning(job: dict[str, Any]) -> None:
    job["model"]["tensor_parallel_size"] = 2
    other = gpu("NVIDIA H200", 139.8, index=1)
    assert topics(seen(job, machine(H100, other)), Level.WARNING) == ["gpu"]
    report = seen(job, machine(*[H100] * 2, vllm="0.34.0", shm_free_bytes=64 * MIB, open_files=256))
    assert topics(report, Level.WARNING) == ["vllm", "limits", "shm"]
    assert report.exit_code == 0


def test_a_mig_slice_is_one_gpu(job: dict[str, Any]) -> None:
    part = gpu("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 39.4, is_mig=True)
    report = seen(job, machine(part))
    assert report.exit_code == 0
    assert "a MIG slice" in report.as_text()


CPU = {"build": "cpu", "vllm": "0.32.0+cpu", "cpu": "AMD EPYC"}


def test_a_cpu_has_its_own_sum(job: dict[str, Any], monkeypatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    job["model"]["engine"]["kv_cache_memory_bytes"] = 2 * GIB
    here = machine(**CPU, memory_bytes=32 * GIB, free_memory_bytes=30 * GIB)
    report = seen(job, here)
    assert report.exit_code == 0, report.as_text()
    assert report.as_dict()["kv_cache_tokens"] == 2 * GIB // (147_456 * 16) * 16
    report = seen(job, replace(here, free_memory_bytes=12 * GIB))
    assert topics(report, Level.PROBLEM) == ["memory"]
    report = seen(job, replace(here, free_memory_bytes=16 * GIB))
    assert topics(report, Level.WARNING) == ["memory"]
    # The wrong build for a machine with a GPU.
    here = replace(here, devices=Devices([H100], 0, "580", (13, 0)))
    assert "not used (NVIDIA H100" in seen(job, here).as_text()


def test_a_quantized_checkpoint_is_held_against_the_gpu(job: dict[str, Any]) -> None:
    config = Path(job["model"]["name"]) / "config.json"
    fields = json.loads(config.read_bytes())
    fields["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    config.write_text(json.dumps(fields), encoding="utf-8")
    report = seen(job, machine(A100))
    assert topics(report, Level.PROBLEM) == ["quantization"]
    report = seen(job, machine(A100, vllm="0.32.0"))
    assert topics(report, Level.WARNING) == ["quantization"]
    report = seen(job, machine(H100))
    assert report.level == Level.OK


def test_what_the_job_asks_for_is_held_against_the_gpu(job: dict[str, Any]) -> None:
    job["model"]["quantization"] = "fp8"
    job["model"]["engine"]["kv_cache_dtype"] = "fp8"
    report = seen(job, machine(H100))
    assert report.level == Level.OK, report.as_text()
    assert report.memory is not None
    assert report.memory.kv_bytes_per_token == 147_456 // 2
    assert report.weights is not None
    assert report.weights.num_bytes == pytest.approx(9.44e9, rel=0.01)
    assert topics(seen(job, machine(A100)), Level.WARNING) == ["quantization", "kv cache"]
    job["model"] |= {"dtype": "bfloat16", "quantization": "bitsandbytes"}
    assert topics(seen(job, machine(T4, vllm="0.32.0")), Level.PROBLEM)[:2] == [
        *("dtype", "quantization")
    ]


def test_a_model_that_is_not_plain_has_no_figure(job: dict[str, Any]) -> None:
    config = Path(job["model"]["name"]) / "config.json"
    fields = json.loads(config.read_bytes()) | {"layer_types": ["full_attention", "mamba"] * 18}
    config.write_text(json.dumps(fields), encoding="utf-8")
    report = seen(job, machine(H100))
    assert report.exit_code == 0
    assert report.as_dict()["kv_cache_tokens"] is None
    assert "not known, its layers are not plain attention (layer_types in" in report.as_text()


def test_a_hub_model_is_told_without_its_weights(job: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(job["model"]["name"])
    job["model"] |= {"name": "org/model", "engine": {}}
    report = seen(job, machine(H100), hub=FakeHub(folder))
    assert report.exit_code == 0, report.as_text()
    assert "a run fetches 16.00 GiB first" in report.as_text()
    assert report.as_dict()["kv_cache_tokens"] > 300_000
    report = seen(job, machine(H100), hub=FakeHub(folder, free=GIB))
    assert topics(report, Level.PROBLEM) == ["model"]
    job["model"]["name"] = "org/other"
    report = seen(job, machine(H100), hub=FakeHub(folder))
    assert "404 Client Error" in (report.reason or "")
    job["model"]["name"] = str(tmp_path / "nowhere")
    assert "does not exist" in (seen(job, machine(H100), hub=FakeHub(folder)).reason or "")


def test_of_a_repository_only_what_is_loaded_counts() -> None:
    files = {"a-1.safetensors": 3, "a-2.safetensors": 4, "consolidated.safetensors": 7, "a.bin": 9}
    assert weight_bytes({**files, "original/b.safetensors": 50, "config.json": 1}) == 7
    assert weight_bytes({"consolidated.safetensors": 7, "a.bin": 9}) == 7
    assert weight_bytes({"a.bin": 9}) == 9
    assert weight_bytes({}) == 0


def test_a_wrong_job_hides_no_more_than_it_must(job: dict[str, Any], tmp_path: Path) -> None:
    job["input"]["path"] = str(tmp_path / "nothing.jsonl")
    report = seen(job, machine(T4))
    assert {"job", "memory"} == set(topics(report, Level.PROBLEM))
    del job["sampling"]
    assert topics(seen(job, machine(T4)), Level.PROBLEM) == ["job"]


def test_long_prompts_are_told(job: dict[str, Any], tmp_path: Path) -> None:
    job["model"]["max_model_len"] = 20
    assert topics(seen(job, machine(H100)), Level.WARNING) == ["rows"]


def test_echo_needs_only_a_place(job: dict[str, Any], tmp_path: Path) -> None:
    job["model"] = {"backend": "echo"}
    report = seen(job, machine(vllm=None, build=""))
    assert report.exit_code == 0, report.as_text()
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    assert "is a file" in (seen(job, machine()).reason or "")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "a.txt").write_text("mine", encoding="utf-8")
    job["output"]["path"] = str(tmp_path / "foreign")
    assert "not batchgen's" in (seen(job, machine()).reason or "")


def test_an_output_without_hard_links_is_refused(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    assert probe_links(tmp_path) is None
    assert probe_links(tmp_path / "absent") is not None
    monkeypatch.setattr(os, "link", refuse)
    (found,) = check_output(tmp_path / "out", None)
    assert (found.level, "hard links" in found.text) == (Level.PROBLEM, True)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    levels = [finding.level for finding in check_output(tmp_path / "out", 1 << 60)]
    assert levels == [Level.OK, Level.WARNING]
    assert filesystem(Path("/proc/self")) == "proc"


@pytest.mark.parametrize(
    ("name", "config", "least", "native"),
    [
        ("fp8", {}, (7, 5), (8, 9)),
        ("awq", {}, (7, 5), (0, 0)),
        ("modelopt", {"quantization": {"quant_algo": "NVFP4"}}, (7, 5), (10, 0)),
        ("modelopt", {"quant_algo": "FP8"}, (8, 0), (8, 9)),
    ],
)
def test_methods_and_their_capabilities(name: str, config: Any, least: Any, native: Any) -> None:
    _, method = method_of(name, config, (0, 32))
    assert method is not None
    assert (method.least, method.native) == (least, native)


@pytest.mark.parametrize(
    ("name", "config"), [("modelopt", {"quant_algo": "MIXED_PRECISION"}), ("banana", {})]
)
def test_a_method_that_is_not_known_is_a_warning(
    job: dict[str, Any], name: str, config: Any
) -> None:
    path = Path(job["model"]["name"]) / "config.json"
    fields = json.loads(path.read_bytes())
    fields["quantization_config"] = {"quant_method": name, **config}
    path.write_text(json.dumps(fields), encoding="utf-8")
    assert method_of(name, config, (0, 32))[1] is None
    report = seen(job, machine(H100))
    assert topics(report, Level.WARNING) == ["quantization"]
    assert f"whether {name}" in report.as_text()


@pytest.mark.parametrize(
    ("weights", "inputs", "told_as", "least"),
    [
        ((8, "float"), (8, "float"), "W8A8 FP8", (7, 5)),
        ((8, "float"), None, "W8A16 FP8", (7, 5)),
        ((8, "int"), (8, "int"), "W8A8 INT8", (7, 5)),
        ((4, "int"), None, "W4A16", (7, 5)),
        ((4, "int"), (8, "float"), "W4A8 FP8", (9, 0)),
        ((4, "float"), (4, "float"), "W4A4 FP4", (7, 5)),
        ((3, "int"), None, "W3A16", (7, 5)),
    ],
)
def test_compressed_tensors_by_scheme(weights: Any, inputs: Any, told_as: str, least: Any) -> None:
    group = {"weights": dict(zip(("num_bits", "type"), weights, strict=True))}
    if inputs:
        group["input_activations"] = dict(zip(("num_bits", "type"), inputs, strict=True))
    config = {"config_groups": {"group_0": group}}
    found, method = method_of("compressed-tensors", config, (0, 26))
    assert method is not None
    assert (found, method.least) == (f"compressed-tensors {told_as}", least)


def test_what_gpus_can_run() -> None:
    assert can_run((9, 0)) == {
        "bfloat16": "yes",
        "FP8 (W8A8)": "yes",
        "GPTQ": "yes",
        "AWQ": "yes",
        "NVFP4": "weights only",
        "MXFP4": "weights only",
        "FP8 KV cache": "yes",
    }
    assert can_run((8, 0))["FP8 (W8A8)"] == "weights only"
    assert (can_run((7, 5))["bfloat16"], can_run((7, 5))["MXFP4"]) == ("no", "no")
    assert can_run((10, 0))["NVFP4"] == "yes"
    fp8 = method_of("fp8", {}, (0, 33))[1]
    assert fp8 is not None
    levels = [judge_method("fp8", fp8, point).level for point in ((7, 0), (8, 6), (8, 9))]
    assert levels == [Level.PROBLEM, Level.WARNING, Level.OK]
    kinds = [next(check_kv_dtype("fp8", point)) for point in ((7, 5), (8, 0), (8, 9))]
    assert [kind.level for kind in kinds] == [Level.PROBLEM, Level.WARNING, Level.OK]
    assert list(check_kv_dtype("auto", (7, 5))) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": 10**400},
        {"num_key_value_heads": 10**400},
        {"quantization_config": {"quant_method": "\ud800\n\x1b[31m" + "x" * 9000}},
    ],
)
def test_a_hostile_config_ends_in_lines_for_every_terminal(
    job: dict[str, Any], changes: dict[str, Any]
) -> None:
    del job["model"]["max_model_len"]
    config = Path(job["model"]["name"]) / "config.json"
    fields = json.loads(config.read_bytes()) | changes
    config.write_text(json.dumps(fields), encoding="utf-8")
    report = seen(job, machine(H100))
    assert report.exit_code == 0, report.as_text()
    lines = report.as_text().split("\n")
    assert all(line.isprintable() and len(line) < 500 for line in lines)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"r": [1]}', '{"r": Infinity}', '{"r": "x"}'])
def test_a_damaged_adapter_is_told(job: dict[str, Any], tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    job["model"]["lora"] = {"a": str(tmp_path)}
    assert seen(job, machine(H100)).exit_code == 2


def test_a_tokenizer_without_words_for_a_prompt_is_not_needed(job: dict[str, Any]) -> None:
    path = Path(job["model"]["name"]) / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}
    path.write_text(json.dumps({"version": "1.0", "model": model}), encoding="utf-8")
    report = seen(job, machine(H100))
    assert report.rows is not None
    assert report.rows.prompt == 5 + 30  # Four characters a token.


def test_a_damaged_index_in_the_cache_is_told(job: dict[str, Any]) -> None:
    folder = Path(job["model"]["name"])
    (folder / "model.safetensors.index.json").write_text("[]", encoding="utf-8")
    shutil.copy(SAMPLE_MODEL / "model.safetensors", folder)
    job["model"] |= {"name": "org/model", "engine": {}}
    report = seen(job, machine(H100), hub=FakeHub(folder, is_cached=True))
    assert any("index.json cannot be read" in finding.text for finding in report.findings)


@pytest.mark.parametrize("space", ["\u00b2", "x", "0"])
def test_a_cache_size_that_is_no_number_is_none(job: dict[str, Any], monkeypatch, space) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
    report = seen(job, machine(**CPU, free_memory_bytes=64 * GIB))
    assert report.as_dict()["kv_cache_tokens"] is None


def test_this_machine_can_be_read() -> None:
    here = read_machine()
    assert here.cores >= 1
    assert here.memory_bytes
    assert here.free_memory_bytes
    assert here.free_memory_bytes <= here.memory_bytes
    assert here.packages.keys() <= {"torch", "transformers", "tokenizers"} | {
        *("huggingface-hub", "nvidia-ml-py")
    }


@pytest.mark.parametrize(
    ("run", "num_gpus", "level", "told"),
    [
        ({"replicas": 2}, 2, "ok", "room for 2 of 1 GPUs each, 2 asked for"),
        ({"replicas": 3}, 2, "problem", "room for 2 of 1 GPUs each, 3 asked for"),
        ({"replicas": 3, "gpus_per_replica": 0.4}, 2, "ok", "room for 4 of 0.4 GPUs each"),
        ({"replicas": "auto"}, 0, "problem", "room for 0"),
        ({"replicas": 64, "ray_address": "auto"}, 1, "ok", "on the cluster at auto"),
        ({"replicas": 2, "gpus_per_replica": 0}, 0, "ok", "2 on this machine, without GPUs"),
    ],
)
def test_replicas_are_held_against_the_gpus(
    run: dict[str, Any], num_gpus: int, level: str, told: str
) -> None:
    made = fakes.job(run={"gpus_per_replica": 1.0, **run})
    (finding,) = check_replicas(made, machine(*[gpu()] * num_gpus))
    assert (str(finding.level), told in finding.text) == (level, True), finding


def test_one_engine_is_no_matter_of_replicas() -> None:
    assert list(check_replicas(fakes.job(), machine())) == []


def problems(report: Report) -> list[str]:
    return [finding.text for finding in report.findings if finding.level == Level.PROBLEM]


def test_a_keyword_that_vllm_lacks_is_told_with_what_was_meant(job: dict[str, Any]) -> None:
    job["model"]["engine"] |= {"enforce_eagre": True, "max_num_seq": 3, "zzqqy": 1}
    start = "the installed vLLM has no such keyword"
    assert problems(seen(job, machine(H100))) == [
        f"model.engine.enforce_eagre: {start}, did you mean 'model.engine.enforce_eager'?",
        f"model.engine.max_num_seq: {start}, did you mean 'model.max_num_seqs'?",
        f"model.engine.zzqqy: {start}",
    ]
    assert topics(seen(job, machine(H100)), Level.PROBLEM) == ["job"] * 3


def test_keywords_that_cannot_be_looked_up_are_a_warning(monkeypatch) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    (finding,) = check_keywords({"a": 1, "b": 2})
    text = "whether vLLM knows model.engine's a, b could not be looked up"
    assert (finding.level, finding.text) == (Level.WARNING, text)
    assert list(check_keywords({})) == []


@pytest.mark.parametrize(
    ("dtype", "is_known"),
    [("fp16", False), ("banana", False), ("torch.float16", False), ("half", True), (None, True)],
)
def test_a_dtype_that_vllm_does_not_know_is_refused(
    job: dict[str, Any], dtype: str | None, is_known: bool
) -> None:
    job["model"] |= {"dtype": dtype} if dtype else {}
    text = f"dtype {dtype!r}, expected auto, bfloat16, float16 (half), float32 (float)"
    assert problems(seen(job, machine(H100))) == ([] if is_known else [text])


@pytest.mark.parametrize(
    ("model", "engine", "told"),
    [
        ({}, {"max_num_batched_tokens": 8191}, None),  # In chunks.
        ({}, {"max_num_batched_tokens": 8192, "enable_chunked_prefill": False}, None),
        (
            {},
            {"max_num_batched_tokens": 8191, "enable_chunked_prefill": False},
            "max_model_len = 8,192 where prefill is not chunked",
        ),
        (
            {"max_model_len": None},  # What follows from config.json is left to vLLM.
            {"max_num_batched_tokens": 40959, "enable_chunked_prefill": False},
            None,
        ),
        ({"max_num_seqs": 128}, {"max_num_batched_tokens": 128}, None),
        ({"max_num_seqs": 129}, {"max_num_batched_tokens": 128}, "max_num_seqs = 129"),
    ],
)
def test_too_few_tokens_a_step_are_refused(
    job: dict[str, Any], model: dict[str, Any], engine: dict[str, Any], told: str | None
) -> None:
    job["model"] |= model
    job["model"] = {name: value for name, value in job["model"].items() if value is not None}
    job["model"]["engine"] |= engine
    tokens = engine["max_num_batched_tokens"]
    text = f"max_num_batched_tokens = {tokens}, which vLLM refuses below {told}"
    assert problems(seen(job, machine(H100))) == ([text] if told else [])


def test_on_a_cpu_prefill_is_not_chunked(job: dict[str, Any]) -> None:
    job["model"] |= {"name": str(SAMPLE_MODEL), "max_model_len": 512}
    job["model"]["engine"]["max_num_batched_tokens"] = 128
    (text,) = problems(seen(job, machine(build="cpu", memory_bytes=GIB, free_memory_bytes=GIB)))
    assert text.endswith("below max_model_len = 512 where prefill is not chunked")


def test_answers_end_where_the_model_does(job: dict[str, Any]) -> None:
    job["model"]["max_model_len"] = 512
    job["sampling"]["max_tokens"] = 8000
    report = seen(job, machine(H100))
    assert report.rows is not None
    assert (report.rows.prompt, report.rows.answer) == (26, 486)  # 512 in all.
    assert report.fit is not None
    assert report.fit.concurrency == report.fit.full_length
    (finding,) = (finding for finding in report.findings if finding.level == Level.WARNING)
    assert finding.text == (
        "200 of the prompts looked at leave less room than max_tokens: answers are cut at "
        "max_model_len 512"
    )
    job["sampling"]["max_tokens"] = 486
    assert topics(seen(job, machine(H100)), Level.WARNING) == []


def test_padding_of_the_tokenizer_is_not_counted(tmp_path: Path) -> None:
    tokenizer = json.loads((SAMPLE_MODEL / "tokenizer.json").read_bytes())
    tokenizer["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    plain, padded = counter(SAMPLE_MODEL), counter(tmp_path)
    assert padded[1] == plain[1] == "by the model's tokenizer"
    assert padded[0]("hello hello") == plain[0]("hello hello") < 10
