"""What a model's config.json says of its size: parameters, and bytes of KV cache for a token.

Arithmetic, without loading anything. Where a model is not of the plain kind the answer is "not
known", with the reason, and never a figure that is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from batchgen.preview.jsonfile import damaged, read_object

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DTYPE_BYTES = {
    **dict.fromkeys(("float32", "float"), 4),
    **dict.fromkeys(("float16", "half", "bfloat16"), 2),
}
KV_BYTES = {**DTYPE_BYTES, **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc"), 1)}
_MLA_TYPES = frozenset({"deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite"})
"""Of those in vllm/transformers_utils/model_arch_config_convertor.py, is_deepseek_mla, 0.26, the
ones whose cache holds nothing else."""
_NOT_PLAIN = {
    "attention_chunk_size": "attends in chunks",
    "num_kv_shared_layers": "shares KV cache between layers",
    "index_topk": "has an indexer's cache beside",
    "compress_ratios": "compresses its cache",
    "full_attention_interval": "has layers without a KV cache",
    "attn_layer_period": "has layers without a KV cache",
    "attn_layer_indices": "has layers without a KV cache",
    "hybrid_override_pattern": "has layers without a KV cache",
    "layers_block_type": "has layers without a KV cache",
    "linear_attn_config": "has layers without a KV cache",
    "ssm_cfg": "has layers without a KV cache",
    "state_size": "has layers without a KV cache",
    "block_configs": "has layers of unlike size",
    "new_decoder_architecture": "counts its heads in a way of its own",
    "multi_query": "counts its heads in a way of its own",
    "cross_attention_layers": "attends to images through a cache of their own",
}
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim")
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "top_k_experts")
_OF_CACHE = (*_LAYERS, *_HEADS, *_HIDDEN, "num_key_value_heads", "head_dim")
"""By which a token's KV cache is counted."""
_NUMBERS = (
    *(*_OF_CACHE, *_INTERMEDIATE, *_EXPERTS, *_EXPERTS_PER_TOKEN, "moe_intermediate_size"),
    *("vocab_size", "kv_lora_rank", "qk_rope_head_dim", "max_position_embeddings"),
)
MAX_NUMBER = 2**40
"""Far above what any model has: sums of such numbers stay what a float can hold."""
_UNGATED = frozenset({"gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mpt", "phi"})
_UNGATED_LATER = frozenset({"starcoder2", "gpt_bigcode", "stablelm_epoch", "nemotron", "bert"})


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model's language part. Counts are 0 where config.json does not say."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    is_tied: bool
    """Output and input embedding are one."""
    dtype: str
    """Of the checkpoint."""
    experts: int = 0
    experts_per_token: int = 0
    moe_intermediate: int = 0
    mla: tuple[int, int] | None = None
    """Rank of the compressed cache and of its positions, for multi-head latent attention."""
    not_plain: str | None = None
    """Why the KV cache of a token cannot be told."""
    is_multimodal: bool = False
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """`quantization_config`; empty if the checkpoint is not quantized."""

    def kv_bytes(self, dtype: str, tensor_parallel: int, pipeline_parallel: int) -> int | None:
        """Bytes of KV cache for a token on one GPU; None where that cannot be told.

        Keys and values of each layer, or their compressed form with MLA; a GPU holds at least
        one head. For Qwen3-8B in bfloat16: 36 x 8 x 128 x 2 x 2 = 147,456.

        Args:
            dtype: Of the cache.
            tensor_parallel: GPUs that share each layer.
            pipeline_parallel: GPUs that share the layers; the largest share counts.

        Source:
            vllm/v1/kv_cache_interface.py, FullAttentionSpec and MLAAttentionSpec,
            real_page_size_bytes, 0.26 to 0.33.
        """
        size = KV_BYTES.get(dtype)
        if self.not_plain or size is None:
            return None
        layers = math.ceil(self.layers / pipeline_parallel)
        if self.mla:
            return layers * sum(self.mla) * size
        heads = max(1, math.ceil(self.kv_heads / tensor_parallel))
        return layers * heads * self.head_dim * 2 * size

    def parameters(self) -> tuple[int, int] | None:
        """Those of linear layers, which quantization shrinks, and of embeddings; None if not told.

        Norms and biases, about a thousandth, are left out.
        """
        sizes = (self.layers, self.hidden, self.heads, self.head_dim, self.vocab)
        if self.mla or not all(sizes) or not self.kv_heads:
            return None
        mlp = self.moe_intermediate * self.experts or self.intermediate
        if not mlp or self.not_plain:
            return None
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        matrices = 2 if self.model_type in _UNGATED | _UNGATED_LATER else 3
        linear = self.layers * (attention + matrices * self.hidden * mlp)
        return linear, self.vocab * self.hidden * (1 if self.is_tied else 2)


def read_shape(folder: Path) -> Shape:
    """Read a model's config.json.

    Raises:
        ConfigError: It is absent, no JSON object, or has numbers that no model has.
    """
    path = folder / "config.json"
    config = read_object(path)
    text = _language(config)
    for key in _NUMBERS:
        value = text.get(key)
        if isinstance(value, (int, float)) and not abs(value) <= MAX_NUMBER:
            raise damaged(path, f"has {key} = {short(value)}, expected 0 to {MAX_NUMBER:,}")
    return shape_of(config)


def _language(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of the language part, over those of the whole."""
    inner = next(
        (
            found
            for key in ("text_config", "llm_config")
            if isinstance(found := config.get(key), dict)
        ),
        {},
    )
    return {**config, **inner}


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Of the content of a config.json; the language part of a multimodal one counts."""
    text = _language(config)
    heads, hidden = _number(text, *_HEADS), _number(text, *_HIDDEN)
    quantization = text.get("quantization_config") or config.get("quantization_config")
    experts = _number(text, *_EXPERTS)
    mla, not_plain = _cache_kind(config, text)
    intermediate = _number(text, *_INTERMEDIATE)
    return Shape(
        model_type=str(text.get("model_type", "")),
        layers=_number(text, *_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=_number(text, "num_key_value_heads") or heads,
        head_dim=_number(text, "head_dim") or (hidden // heads if heads else 0),
        intermediate=intermediate,
        vocab=_number(text, "vocab_size"),
        is_tied=bool(text.get("tie_word_embeddings", False)),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or "float32").removeprefix("torch."),
        experts=experts,
        experts_per_token=_number(text, *_EXPERTS_PER_TOKEN),
        moe_intermediate=(_number(text, "moe_intermediate_size") or intermediate) if experts else 0,
        mla=mla,
        not_plain=not_plain,
        is_multimodal="vision_config" in config or "audio_config" in config,
        quantization=quantization if isinstance(quantization, dict) else {},
    )


def _number(config: Mapping[str, Any], *names: str) -> int:
    """The first that is there; 0 without one, or where it is something else."""
    return next((v for name in names if type(v := config.get(name)) is int and v > 0), 0)


def _cache_kind(
    config: Mapping[str, Any], text: Mapping[str, Any]
) -> tuple[tuple[int, int] | None, str | None]:
    """The ranks of MLA, if it is that; why it is not a plain cache, if it is neither."""
    rank = _number(text, "kv_lora_rank")
    why = _not_plain(config, text)
    if why is None and rank and str(text.get("model_type")) in _MLA_TYPES:
        return (rank, _number(text, "qk_rope_head_dim")), None
    if why is None and rank:
        why = "the model has an attention of its own (kv_lora_rank in its config.json)"
    return None, why


def _not_plain(config: Mapping[str, Any], text: Mapping[str, Any]) -> str | None:
    kinds, window = text.get("layer_types"), text.get("sliding_window")
    reasons = [
        f"its config.json has {key} = {short(value)}, expected a whole number"
        for key in _NUMBERS
        if isinstance(value := text.get(key), (str, dict, float)) or value is True
    ]
    reasons += [
        f"the model {why} ({key} in its config.json)"
        for key, why in _NOT_PLAIN.items()
        if text.get(key)
    ]
    if config.get("is_encoder_decoder"):
        reasons.append("the model is an encoder and a decoder")
    if isinstance(kinds, list) and (named := set(map(str, kinds))) - {"full_attention"}:
        told = ", ".join(sorted(named))
        reasons.append(f"the model's layers are of several kinds ({told:.200})")
    if kinds is None and window and text.get("use_sliding_window") is not False:
        reasons.append(f"the model attends to a window of {short(window)} tokens")
    if not _number(text, *_LAYERS):
        reasons.append("its config.json does not say how many layers it has")
    if any(isinstance(text.get(key), list) for key in _OF_CACHE):
        reasons.append("the model's layers are of unlike size")
    return reasons[0] if reasons else None
