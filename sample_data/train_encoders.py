"""Trains two tiny encoders on the tickets: a classifier and a cross-encoder. A minute.

    python sample_data/train_encoders.py [FOLDER]

writes FOLDER/classifier, which tells a ticket's label, and FOLDER/reranker, which tells how well a
ticket fits a topic such as "account access"; FOLDER is sample_data/encoders. Both learn from three
rows of four of tickets.parquet and are measured on the rest.
"""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification, BertTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).parent
MAX_LEN = 64
NUM_WORDS = 400
EPOCHS = 8
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:?!'()-/#"


def tickets() -> list[dict[str, Any]]:
    """Rows with a body; whatever stands in every fourth is for measuring."""
    rows = pl.read_parquet(HERE / "tickets.parquet").drop_nulls(["subject", "body"])
    return rows.select("subject", "body", "gold_label").to_dicts()


def text_of(row: dict[str, Any]) -> str:
    """A ticket as the jobs write it."""
    return f"{row['subject']}\n{row['body']}"


def make_tokenizer(texts: list[str], folder: Path) -> BertTokenizer:
    """Frequent words, and letters for all others."""
    words = Counter(word for text in texts for word in re.findall(r"[a-z]{2,}", text.lower()))
    common = [word for word, _ in words.most_common(NUM_WORDS)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]
    vocabulary += [*(f"##{letter}" for letter in LETTERS), *common]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "vocab.txt"
    file.write_text("\n".join(vocabulary), encoding="utf-8")
    return BertTokenizer(str(file), model_max_length=MAX_LEN)


def train(
    tokenizer: BertTokenizer,
    rows: list[Any],
    targets: Sequence[float],
    start: BertForSequenceClassification | None = None,
    **more: object,
) -> BertForSequenceClassification:
    """Train a model of two layers on texts or on pairs of them; `start` knows words already."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": MAX_LEN}
    config = BertConfig(vocab_size=len(tokenizer), hidden_dropout_prob=0.0, **sizes, **more)
    model = BertForSequenceClassification(config)
    if start is not None:
        model.bert.load_state_dict(start.bert.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    is_class = config.num_labels > 1
    order = list(range(len(rows)))
    for _ in range(EPOCHS):
        random.shuffle(order)
        for at in range(0, len(order), 32):
            batch = order[at : at + 32]
            logits = model(**encoded(tokenizer, [rows[i] for i in batch])).logits
            wanted = torch.tensor([targets[i] for i in batch])
            if is_class:
                loss = torch.nn.functional.cross_entropy(logits, wanted.long())
            else:
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def encoded(tokenizer: BertTokenizer, rows: list[Any]) -> BatchEncoding:
    """Tokens of a batch of texts, or of pairs."""
    texts = [list(row) for row in zip(*rows, strict=True)] if isinstance(rows[0], tuple) else [rows]
    cut = {"truncation": True, "max_length": MAX_LEN, "padding": True, "return_tensors": "pt"}
    return tokenizer(*texts, **cut)


def predict(
    model: BertForSequenceClassification, tokenizer: BertTokenizer, rows: list[Any]
) -> torch.Tensor:
    """The model's logits."""
    with torch.no_grad():
        return model(**encoded(tokenizer, rows)).logits


def topic(label: str) -> str:
    """A label as a query."""
    return label.replace("_", " ")


def main(target: Path) -> None:
    """Train, measure and write both."""
    random.seed(7)
    torch.manual_seed(7)
    torch.set_num_threads(1)
    rows = tickets()
    labels = sorted({row["gold_label"] for row in rows})
    held_out, seen = rows[::4], [row for at, row in enumerate(rows) if at % 4]
    place = target / "classifier"
    tokenizer = make_tokenizer([text_of(row) for row in seen] + list(map(topic, labels)), place)
    texts, gold = [text_of(row) for row in seen], [labels.index(row["gold_label"]) for row in seen]
    model = train(tokenizer, texts, gold, id2label=dict(enumerate(labels)))
    found = predict(model, tokenizer, [text_of(row) for row in held_out]).argmax(1).tolist()
    right = [labels[at] == row["gold_label"] for at, row in zip(found, held_out, strict=True)]
    print(f"classifier: {sum(right) / len(right):.1%} of {len(right)} labels are right")
    pairs, fits = [], []
    for row in seen:
        others = random.sample([label for label in labels if label != row["gold_label"]], 2)
        for label in (row["gold_label"], *others):
            pairs.append((topic(label), text_of(row)))
            fits.append(float(label == row["gold_label"]))
    reranker = train(tokenizer, pairs, fits, model, num_labels=1)
    scores = [
        predict(reranker, tokenizer, [(topic(label), text_of(row)) for row in held_out])[:, 0]
        for label in labels
    ]
    best = torch.stack(scores).argmax(0).tolist()
    right = [labels[at] == row["gold_label"] for at, row in zip(best, held_out, strict=True)]
    print(f"reranker: {sum(right) / len(right):.1%} of {len(right)} tickets fit their label best")
    write(model, tokenizer, place)
    write(reranker, tokenizer, target / "reranker")


def write(model: BertForSequenceClassification, tokenizer: BertTokenizer, place: Path) -> None:
    """Write a model for vLLM and Transformers, in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(place)
    tokenizer.save_pretrained(place)
    (place / "vocab.txt").unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "encoders")
