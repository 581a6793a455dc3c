"""Weights and KV cache by arithmetic, held against what is known of real models."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchgen.core.errors import ConfigError
from batchgen.engine.devices import Gpu
from batchgen.engine.vllm.shares import shape_of
from batchgen.preview.checkpoint import Weights, read_config, read_weights, weight_files
from batchgen.preview.memory import estimate, settings_of
from tests.bench.random_model import COMMON, SHAPES

MIB, GIB = 2**20, 2**30
H100 = Gpu(0, "GPU-0", "NVIDIA H100 80GB HBM3", 81080 * MIB, 81075 * MIB, (9, 0))
T4 = Gpu(0, "GPU-0", "Tesla T4", 14912 * MIB, 14900 * MIB, (7, 5))
A100 = Gpu(0, "GPU-0", "NVIDIA A100-SXM4-80GB", 81037 * MIB, 81000 * MIB, (8, 0))
QWEN_8B = shape_of({**COMMON, **SHAPES["8b"]})
QWEN_06B = shape_of({**COMMON, **SHAPES["0.6b"]})
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "vocab_size": 129280,
}
SAMPLE_MODEL = Path(__file__).parents[2] / "sample_data" / "model"


def test_the_kv_cache_of_qwen3_is_what_is_known() -> None:
    assert QWEN_8B.kv_bytes("bfloat16", 1, 1) == 36 * 8 * 128 * 2 * 2 == 147_456


def test_an_h100_holds_as_many_tokens_as_vllm_reported() -> None:
    kwargs = {"gpu_memory_utilization": 0.9, "max_model_len": 8192, "load_format": "dummy"}
    settings = settings_of(kwargs, QWEN_8B, H100, 8192)
    size = 8_190_735_360 * 2  # Parameters of Qwen3-8B, as its model card counts them.
    memory = estimate(QWEN_8B, size, settings, H100.total_bytes, (0, 26))
    assert (settings.max_num_seqs, settings.max_num_batched_tokens) == (1024, 16384)
    # vLLM 0.26: 71.26 GiB, 15.27 weights, 1.53 peak, 0.22 other, 54.24 left, 394,928 tokens.
    assert memory.budget / GIB == pytest.approx(71.26, abs=0.01)
    assert memory.activations / GIB == pytest.approx(1.53, abs=0.05)
    assert memory.kv_cache / GIB == pytest.approx(54.24, abs=0.1)
    assert memory.kv_cache_tokens == pytest.approx(394_928, rel=0.005)
    # Later ones leave room for CUDA graphs.
    later = estimate(QWEN_8B, size, settings, H100.total_bytes, (0, 32))
    assert later.kv_cache == memory.kv_cache - later.graphs < memory.kv_cache


def test_gpus_share_heads_and_layers() -> None:
    assert QWEN_8B.kv_bytes("bfloat16", 4, 1) == 147_456 // 4
    assert QWEN_8B.kv_bytes("bfloat16", 16, 1) == 147_456 // 8  # No fewer than one head each.
    assert QWEN_8B.kv_bytes("bfloat16", 1, 5) == 147_456 // 36 * 8
    assert QWEN_8B.kv_bytes("fp8", 1, 1) == 147_456 // 2
    assert QWEN_8B.kv_bytes("nvfp4", 1, 1) is None


def test_latent_attention_is_counted_and_not_shared() -> None:
    shape = shape_of(DEEPSEEK_V3)
    assert shape.kv_bytes("bfloat16", 8, 1) == 61 * 576 * 2


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "(layer_types in its config"),
        ({"layer_types": [[1]]}, "(layer_types in its config"),
        ({"sliding_window": 4096}, "(sliding_window in its config"),
        ({"attn_layer_period": 8}, "(attn_layer_period in its config"),
        ({"kv_lora_rank": 512, "model_type": "unheard_of"}, "(kv_lora_rank in its config"),
        ({"num_key_value_heads": [1, 2]}, "(num_key_value_heads in its config"),
        ({"multi_query": True}, "(multi_query in its config"),
        ({"is_encoder_decoder": True}, "(is_encoder_decoder in its config"),
        ({"num_hidden_layers": None}, "how many layers"),
        ({"num_hidden_layers": True}, "how many layers"),
        ({"head_dim": None, "hidden_size": "x"}, "how many layers and heads"),
        ({"num_attention_heads": [32]}, "how many layers and heads"),
    ],
)
def test_what_is_not_plain_is_not_known(config: dict[str, Any], why: str) -> None:
    shape = shape_of({**COMMON, **SHAPES["8b"], "use_sliding_window": None, **config})
    assert why in (shape.not_plain or "")
    assert shape.kv_bytes("bfloat16", 1, 1) is None


def test_a_window_that_is_off_is_plain() -> None:
    config = {**COMMON, **SHAPES["8b"], "sliding_window": 4096, "use_sliding_window": False}
    assert shape_of(config).not_plain is None


def test_the_language_part_of_a_multimodal_model_counts() -> None:
    text = {**COMMON, **SHAPES["8b"]}
    shape = shape_of({"model_type": "some_vl", "vision_config": {}, "text_config": text})
    assert (shape.is_multimodal, shape.kv_bytes("bfloat16", 1, 1)) == (True, 147_456)


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> None:
    """A file with a header and zeros: name -> dtype, shape, bytes."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))


def test_weights_are_read_from_headers(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": ("F32", [10, 4], 160),
        "model.layers.0.mlp.up_proj.weight": ("F32", [6, 4], 96),
        "model.norm.weight": ("F32", [4], 16),
        "lm_head.weight": ("F32", [10, 4], 160),
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    tied = shape_of({"tie_word_embeddings": True})
    found = read_weights(tmp_path, tied, "bfloat16", None)
    assert found is not None
    assert (found.num_bytes, found.num_parameters) == (2 * 68, 68)
    untied = read_weights(tmp_path, shape_of({}), "bfloat16", None)
    assert untied is not None
    assert untied.num_parameters == 108
    halved = read_weights(tmp_path, tied, "bfloat16", 8.0)
    assert halved is not None
    assert halved.num_bytes == 2 * 44 + 24


def test_quantized_weights_stay_as_they_are(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.qweight": ("I32", [8, 4], 128),
        "model.layers.0.mlp.up_proj.scales": ("F16", [2, 4], 16),
        "model.layers.0.mlp.down_proj.weight": ("F8_E4M3", [4, 4], 16),
        "model.layers.0.mlp.down_proj.weight_scale": ("F32", [4, 1], 16),
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    shape = shape_of({"quantization_config": {"quant_method": "gptq"}})
    found = read_weights(tmp_path, shape, "float16", None)
    assert found is not None
    assert (found.num_bytes, found.num_parameters) == (128 + 16 + 16 + 16, None)


def test_the_sample_model_is_as_large_as_its_file() -> None:
    found = read_weights(SAMPLE_MODEL, shape_of(read_config(SAMPLE_MODEL)), "bfloat16", None)
    assert found is not None
    assert 0 < found.file_bytes - found.num_bytes < 10_000


def test_files_beside_those_of_the_index_do_not_count(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "consolidated.safetensors"):
        write_safetensors(tmp_path / name, {"a": ("F16", [4], 8)})
    shape = shape_of({})
    assert read_weights(tmp_path, shape, "float16", None).num_bytes == 8
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"lacks model-2\.safetensors"):
        read_weights(tmp_path, shape, "float16", None)
    write_safetensors(tmp_path / "model-2.safetensors", {"b": ("F16", [4], 8)})
    assert read_weights(tmp_path, shape, "float16", None).num_bytes == 16


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:20], lambda _: b""])
def test_a_damaged_file_is_named(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": ("F16", [4], 8)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        read_weights(tmp_path, shape_of({}), "float16", None)


def test_other_formats_count_by_their_size(tmp_path: Path) -> None:
    assert read_weights(tmp_path, shape_of({}), "float16", None) is None
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(100))
    found = read_weights(tmp_path, shape_of({}), "float16", None)
    assert found == Weights(100, "by the size of its files", file_bytes=100)
    assert weight_files(tmp_path) == []


@pytest.mark.parametrize(
    ("gpu", "kwargs", "seqs", "tokens"),
    [
        (H100, {}, 1024, 16384),
        (A100, {}, 256, 8192),  # Large, but vLLM takes it for a slow one.
        (T4, {}, 256, 8192),
        (T4, {"performance_mode": "throughput"}, 512, 16384),
        (H100, {"max_num_seqs": 8}, 8, 8 * 512),
        (H100, {"max_num_batched_tokens": 300}, 300, 300),
    ],
)
def test_defaults_are_those_of_vllm(
    gpu: Gpu, kwargs: dict[str, Any], seqs: int, tokens: int
) -> None:
    found = settings_of(kwargs, QWEN_8B, gpu, 512)
    assert (found.max_num_seqs, found.max_num_batched_tokens) == (seqs, tokens)


@pytest.mark.parametrize(
    ("kwargs", "config", "capability", "expected"),
    [
        ({}, {"dtype": "bfloat16"}, (8, 0), "bfloat16"),
        ({}, {"torch_dtype": "float32"}, (9, 0), "bfloat16"),
        ({}, {"torch_dtype": "float16"}, (9, 0), "float16"),
        ({}, {"dtype": "bfloat16"}, (7, 5), "float16"),
        ({}, {"dtype": "bfloat16", "model_type": "gemma3"}, (7, 5), "float32"),
        ({"dtype": "half"}, {"dtype": "bfloat16"}, (9, 0), "float16"),
        ({}, {"dtype": "bfloat16"}, None, "bfloat16"),
    ],
)
def test_auto_is_resolved_as_vllm_does(
    kwargs: dict[str, Any], config: dict[str, Any], capability: Any, expected: str
) -> None:
    gpu = replace(H100, capability=capability)
    assert settings_of(kwargs, shape_of(config), gpu, None).dtype == expected


def test_an_fp8_checkpoint_may_ask_for_an_fp8_cache() -> None:
    config = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    shape = shape_of({**COMMON, **SHAPES["8b"], "quantization_config": config})
    assert settings_of({}, shape, H100, None).kv_dtype == "fp8"
    assert settings_of({"kv_cache_dtype": "bfloat16"}, shape, H100, None).kv_dtype == "bfloat16"


def test_a_given_cache_is_not_estimated() -> None:
    settings = settings_of({"kv_cache_memory_bytes": 10 * GIB}, QWEN_8B, H100, None)
    assert estimate(QWEN_8B, 16 * GIB, settings, H100.total_bytes, (0, 33)).kv_cache == 10 * GIB


def test_a_job_without_config_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="no JSON object"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "why"), [("[" * 100_000, "cannot be read"), ("5", "no JSON object but 5")]
)
def test_a_damaged_config_is_told(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"config\.json.*{why}.*fetch the model again"):
        read_config(tmp_path)


def write_header(folder: Path, header: str) -> None:
    data = header.encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + bytes(8))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", None),
        ("shape", ["x"]),
        ("shape", [float("inf")]),
        ("data_offsets", "x"),
        ("data_offsets", [1, "a"]),
        ("data_offsets", [0, 10**400]),
    ],
)
def test_a_damaged_header_is_told(tmp_path: Path, field: str, value: Any) -> None:
    line = {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8], field: value}
    write_header(tmp_path, json.dumps({"a": line}))
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        read_weights(tmp_path, shape_of({}), "float16", None)


@pytest.mark.parametrize("header", ["[" * 100_000, "[]", '{"a": 5}', '"a"', ""])
def test_a_header_that_is_none_is_told(tmp_path: Path, header: str) -> None:
    write_header(tmp_path, header)
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        read_weights(tmp_path, shape_of({}), "float16", None)


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ("[" * 100_000, "index.json cannot be read"),
        ("[]", "index.json cannot be read"),
        ("{}", "weight_map = None, expected tensors"),
        ('{"weight_map": {"a": 5}}', "weight_map = {'a': 5}, expected tensors and their files"),
        ('{"weight_map": {"a": "absent"}}', "lacks absent, which its index names"),
    ],
)
def test_a_damaged_index_is_told(tmp_path: Path, index: str, why: str) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": ("F16", [4], 8)})
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(ConfigError, match=why):
        read_weights(tmp_path, shape_of({}), "float16", None)


def test_a_link_to_nothing_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").symlink_to("gone")
    assert read_weights(tmp_path, shape_of({}), "float16", None) is None
