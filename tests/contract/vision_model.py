"""A vision-language model of random weights, a few hundred kilobytes: Idefics3.

    python -m tests.contract.vision_model FOLDER

Of vLLM's vision models it is one that needs no torchvision, which the CPU build does not bring
(checked with vLLM 0.32: llava, qwen2_vl, gemma3 and paligemma do).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

TOKENIZER = Path(__file__).parents[2] / "sample_data" / "model"
TEMPLATE = """{%- for message in messages -%}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{%- if part.type == "image" %}<image>{% else %}{{ part.text }}{% endif -%}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class Shape(NamedTuple):
    """What a model is made of; width, width inside, layers and heads of both its halves."""

    image_size: int = 56
    patch_size: int = 14
    scale: int = 2
    vision: tuple[int, int, int, int] = (64, 128, 2, 2)
    text: tuple[int, int, int, int] = (64, 128, 2, 2)
    max_position_embeddings: int = 1024
    splits: int = 1
    """Tiles along the longer edge of a picture. Without splitting, vLLM 0.26 counts no tile at all
    and its engine dies at the first picture (seen; 0.32 counts one)."""


def main(folder: str, shape: Shape = Shape()) -> None:  # noqa: B008 - it cannot be changed.
    """Write model, tokenizer and processor."""
    import torch
    from transformers import (
        AutoTokenizer,
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        LlamaConfig,
    )
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<global-img>"]})
    tokenizer.chat_template = TEMPLATE
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": shape.image_size * shape.splits},
        max_image_size={"longest_edge": shape.image_size},
        do_image_splitting=shape.splits > 1,
    )
    num_tokens = (shape.image_size // shape.patch_size // shape.scale) ** 2
    processor = Idefics3Processor(pictures, tokenizer, num_tokens, chat_template=TEMPLATE)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision = Idefics3VisionConfig(
        **dict(zip(names, shape.vision, strict=True)),
        image_size=shape.image_size,
        patch_size=shape.patch_size,
    )
    text = LlamaConfig(
        **dict(zip(names, shape.text, strict=True)),
        vocab_size=2624,
        num_key_value_heads=shape.text[3],
        max_position_embeddings=shape.max_position_embeddings,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = Idefics3Config(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=shape.scale,
        pad_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    Idefics3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
