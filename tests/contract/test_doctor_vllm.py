"""The doctor's formulas and tables against what the installed vLLM itself counts and says."""

from __future__ import annotations

import pytest

from batchgen.engine.vllm.shares import shape_of
from batchgen.preview.machine import LEAST_CUDA_13
from batchgen.preview.memory import BLOCK_TOKENS
from batchgen.preview.model_check import METHODS
from tests.bench.random_model import COMMON, SHAPES

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.mark.parametrize("size", sorted(SHAPES))
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_a_tokens_bytes_are_those_of_vllms_own_blocks(
    size: str, tensor_parallel: int, dtype: str
) -> None:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    shape = shape_of({**COMMON, **SHAPES[size]})
    spec = FullAttentionSpec(
        block_size=BLOCK_TOKENS,
        num_kv_heads=max(1, shape.kv_heads // tensor_parallel),
        head_size=shape.head_dim,
        dtype=torch.uint8 if dtype == "fp8" else torch.bfloat16,
    )
    found = shape.kv_bytes(dtype, tensor_parallel, 1)
    assert found is not None
    assert found * BLOCK_TOKENS == spec.page_size_bytes * shape.layers


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_least_capability_of_a_method_is_vllms(name: str) -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    try:
        least = get_quantization_config(name).get_min_capability()
    except ValueError:
        pytest.skip(f"this vLLM has no {name}")
    major, minor = max(METHODS[name].least, LEAST_CUDA_13)
    assert 10 * major + minor == max(least, 75)
