"""The least time that a GPU needs for a work, if it did nothing but move bytes or multiply.

A model in Qwen3's shape, in 16 bits, on an H200: 4.8 TB/s (NVIDIA's data sheet) and 790 TFLOP/s of
dense bf16 (what matrix products were seen to reach on one; the data sheet says 989).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.bench.random_model import COMMON, SHAPES

if TYPE_CHECKING:
    from tests.bench.works import Work

BYTES_PER_S = 4.8e12
FLOP_PER_S = 790e12
_BYTES = 2
_MOST_AT_ONCE = 1024
"""Sequences that share one reading of the weights: vLLM's own `max_num_seqs` on such a GPU."""


def least_s(shape: str, num_prompt_tokens: int, work: Work) -> float:
    """Seconds: the larger of what the bytes and what the products of a work need.

    Bytes: the weights once for each step, with `_MOST_AT_ONCE` sequences in each, and for each
    generated token the keys and values of all tokens before it. Products: two FLOP for each weight
    and token; those of attention are left out (a few percent at these lengths).
    """
    num_rows, num_out = len(work.users), sum(work.max_tokens)
    weights, kv_bytes = num_weights(shape), kv_bytes_per_token(shape)
    num_steps = max(num_out / _MOST_AT_ONCE, *work.max_tokens)
    mean_prompt = num_prompt_tokens / num_rows
    context = sum(num * (mean_prompt + num / 2) for num in work.max_tokens)
    bytes_s = (num_steps * weights * _BYTES + context * kv_bytes) / BYTES_PER_S
    flop_s = 2 * weights * (num_prompt_tokens + num_out) / FLOP_PER_S
    return max(bytes_s, flop_s)


def num_weights(shape: str) -> int:
    """Weights that a token is multiplied with: all layers and the head."""
    own = SHAPES[shape]
    hidden, heads = own["hidden_size"], own["num_attention_heads"]
    head_dim, kv_heads = COMMON["head_dim"], COMMON["num_key_value_heads"]
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    mlp = 3 * hidden * own["intermediate_size"]
    return int(own["num_hidden_layers"] * (attention + mlp) + hidden * COMMON["vocab_size"])


def kv_bytes_per_token(shape: str) -> int:
    """Bytes of one token's keys and values in all layers."""
    layers = SHAPES[shape]["num_hidden_layers"]
    return int(2 * layers * COMMON["num_key_value_heads"] * COMMON["head_dim"] * _BYTES)
