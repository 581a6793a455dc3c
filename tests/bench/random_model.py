"""Model folders in real shapes with random weights, for timing where no weights can be had.

    python -m tests.bench.random_model --shape 0.6b --tokenizer DIR --weights FOLDER

writes one with weight files, for peers that want them (`peers --model FOLDER`).

Shapes are those of the config.json that Qwen publishes with Qwen3-8B and Qwen3-0.6B.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
    "0.6b": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 3072,
        "tie_word_embeddings": True,
    },
}
COMMON: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "attention_bias": False,
    "use_sliding_window": False,
}


def make_model(folder: Path, shape: str, tokenizer: Path) -> Path:
    """Write a model folder that vLLM loads with `load_format="dummy"`."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    config = json.dumps({**COMMON, **SHAPES[shape]})
    (folder / "config.json").write_text(config, encoding="utf-8")
    return folder


def write_weights(folder: Path) -> None:
    """Write `model.safetensors` beside a config: random, as transformers initializes a model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def main() -> None:
    """Write a model's folder with its weights."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args()
    write_weights(make_model(args.weights, args.shape, args.tokenizer))


if __name__ == "__main__":
    main()
