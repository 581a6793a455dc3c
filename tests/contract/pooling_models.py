"""Makes tiny encoders of random weights, and says what Transformers makes of some texts by them.

    python -m tests.contract.pooling_models FOLDER
    python -m tests.contract.pooling_models FOLDER MODEL
    python -m tests.contract.pooling_models FOLDER MODEL TEXTS

writes FOLDER/embed, FOLDER/classify and FOLDER/score, models in float32; or, of a model of Sentence
Transformers that takes the mean of all tokens, only what it makes of the texts; or, of a classifier
or a cross-encoder, of a JSON list of texts or pairs. The values of Transformers stand in
FOLDER/NAME.npy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:?"
LONG = "all work and no play " * 40
TEXTS = ["", "hello world", LONG, "a", "\U0001f600 \U0001f389", "\u05e9\u05dc\u05d5\u05dd"]
TEXTS += ["\u0645\u0631\u062d\u0628\u0627", " blanks  around ", "two\nlines"]
TEXTS += [f"sentence {number} on topic {number * 7 % 13}" for number in range(30)]
PAIRS = [(f"what is {number}?", f"{number * 3 % 7} is a number") for number in range(12)]
LABELS = ["calm", "angry", "sad"]
MAX_LEN = 64


def make(folder: Path) -> None:
    """Write the three models and their values."""
    import torch
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertModel,
        BertTokenizer,
    )

    torch.manual_seed(7)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": MAX_LEN}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
    kinds: dict[str, tuple[type[Any], dict[str, Any]]] = {
        "embed": (BertModel, {}),
        "classify": (BertForSequenceClassification, {"id2label": dict(enumerate(LABELS))}),
        "score": (BertForSequenceClassification, {"num_labels": 1}),
    }
    for name, (kind, more) in kinds.items():
        place = folder / name
        place.mkdir(parents=True)
        (place / "vocab.txt").write_text("\n".join(words))
        tokenizer = BertTokenizer(str(place / "vocab.txt"), model_max_length=MAX_LEN)
        tokenizer.save_pretrained(place)
        config = BertConfig(vocab_size=len(words), initializer_range=0.3, **sizes, **more)
        model = kind(config).eval()
        model.save_pretrained(place)
        np.save(folder / f"{name}.npy", values(name, model, tokenizer))
    mean_of_tokens(folder / "embed")


def mean_of_tokens(place: Path) -> None:
    """Make a model one of Sentence Transformers: the mean of all tokens, as a unit vector."""
    kinds = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    (place / "modules.json").write_text(json.dumps(modules))
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    prompts = {"prompts": {"query": "query: "}}
    (place / "config_sentence_transformers.json").write_text(json.dumps(prompts))


def values(
    name: str, model: Any, tokenizer: Any, max_length: int = MAX_LEN, texts: Sequence[Any] = ()
) -> Any:
    """What Transformers says."""
    import torch

    rows = []
    cut: dict[str, Any] = {"max_length": max_length, "return_tensors": "pt"}
    cut["truncation"] = "only_second" if name == "score" else True
    for text in texts or (PAIRS if name == "score" else TEXTS):
        given = tokenizer(*text, **cut) if name == "score" else tokenizer(text, **cut)
        with torch.no_grad():
            found = model(**given)
        if name == "embed":
            mean = found.last_hidden_state[0].mean(0)
            rows.append(mean / mean.norm())
        else:
            logits = found.logits[0]
            rows.append(logits.softmax(0) if name == "classify" else logits.sigmoid())
    return torch.stack(rows).numpy()


def refer(folder: Path, place: Path) -> None:
    """Say what Transformers makes of the texts by a model that is there."""
    from transformers import AutoModel, AutoTokenizer

    length = json.loads((place / "sentence_bert_config.json").read_bytes())["max_seq_length"]
    model, tokenizer = AutoModel.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    np.save(folder / "embed.npy", values("embed", model.eval(), tokenizer, length))


def refer_classes(folder: Path, place: Path, texts: Path) -> None:
    """Say what Transformers makes of other texts by a classifier or a cross-encoder."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(place, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    name = "score" if model.config.num_labels == 1 else "classify"
    length = model.config.max_position_embeddings
    found = values(name, model, tokenizer, length, json.loads(texts.read_bytes()))
    np.save(folder / f"{name}.npy", found)


if __name__ == "__main__":
    if len(sys.argv) > 3:
        refer_classes(*map(Path, sys.argv[1:4]))
    elif len(sys.argv) > 2:
        refer(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        make(Path(sys.argv[1]))
