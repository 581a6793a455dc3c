"""Trains the sample's model from a fixed seed and measures it on the shipped rows.

The model has Qwen3's architecture and about a million weights, small enough for the repository and
for a laptop without a GPU. It answers the two prompts of `tickets.py` and nothing else. Training
rows are written while the script runs, from the phrases that the shipped rows share and from those
they do not have; no shipped body is among them.

Usage:
    python sample_data/train_model.py
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from make_tickets import Record, good_records
from tickets import (
    LABELS,
    SYSTEM_JSON,
    SYSTEM_LABEL,
    URGENCIES,
    Ticket,
    TicketWriter,
    chat_messages,
    json_answer,
    user_prompt,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

MODEL_PATH = Path(__file__).with_name("model")
SEED = 7
NUM_THREADS = 2
NUM_TICKETS = 40_000
HARD_SHARE = 0.2
NUM_TOKENIZER_TICKETS = 6_000
VOCAB_SIZE = 2560
BATCH_ROWS = 32
BUCKET_BATCHES = 40
PEAK_LR = 3e-3
WARMUP_STEPS = 80
WEIGHT_DECAY = 0.1
TEXT_LOSS_WEIGHT = 0.2
TEXT_LOSS_SHARE = 0.25
NOISE_SHARE = 0.07
EVAL_BATCH_ROWS = 64
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenized chat with its answer."""

    token_ids: list[int]
    """Prompt, answer and the end token."""
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Score:
    """Greedy answers to one prompt, counted. Shares are 0 to 1."""

    accuracy: float
    easy_accuracy: float
    hard_accuracy: float
    valid_share: float


def training_tickets() -> list[Ticket]:
    """Return the training rows, without the few whose body is a shipped one by chance."""
    writer = TicketWriter("training", SEED, HARD_SHARE)
    tickets = [writer.write(number) for number in range(NUM_TICKETS)]
    shipped = {folded(record["body"]) for record in good_records()}
    kept = [ticket for ticket in tickets if folded(ticket.body) not in shipped]
    print(f"{len(kept)} training rows, {NUM_TICKETS - len(kept)} dropped: shipped body")
    return kept


def folded(body: str) -> str:
    """Return the body without the differences of case and white space."""
    return " ".join(body.casefold().split())


def train_tokenizer(tickets: list[Ticket]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that knows the tickets' words."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [user_prompt(ticket.subject, ticket.body) for ticket in tickets]
    answers = [json_answer(label, urgency) for label in LABELS for urgency in URGENCIES]
    prompts = ["system\nuser\nassistant\n", SYSTEM_LABEL, SYSTEM_JSON, *answers] * 50
    bpe.train_from_iterator(texts + prompts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        model_max_length=1024,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def render(tokenizer: PreTrainedTokenizerFast, system: str, subject: str, body: str) -> str:
    """Return the prompt as the model sees it, up to the answer."""
    text = tokenizer.apply_chat_template(
        chat_messages(system, subject, body), tokenize=False, add_generation_prompt=True
    )
    return str(text)


def examples_of(tokenizer: PreTrainedTokenizerFast, tickets: list[Ticket]) -> list[Example]:
    """Return one example per ticket; half of them ask for the label, half for JSON."""
    random = Random(SEED)
    systems = [random.choice((SYSTEM_LABEL, SYSTEM_JSON)) for _ in tickets]
    prompts = [
        render(tokenizer, system, ticket.subject, ticket.body)
        for system, ticket in zip(systems, tickets, strict=True)
    ]
    answers = [
        json_answer(ticket.gold_label, ticket.gold_urgency)
        if system == SYSTEM_JSON
        else ticket.gold_label
        for system, ticket in zip(systems, tickets, strict=True)
    ]
    prompt_ids = tokenizer(prompts)["input_ids"]
    answer_ids = tokenizer([answer + END for answer in answers])["input_ids"]
    return [
        Example(prompt + answer, len(prompt))
        for prompt, answer in zip(prompt_ids, answer_ids, strict=True)
    ]


def batches_of(examples: list[Example]) -> Iterator[list[Example]]:
    """Yield every example once, in batches of near equal length and random order."""
    random = Random(SEED)
    order = random.sample(examples, len(examples))
    for start in range(0, len(order), BATCH_ROWS * BUCKET_BATCHES):
        bucket = order[start : start + BATCH_ROWS * BUCKET_BATCHES]
        bucket.sort(key=lambda example: len(example.token_ids))
        batches = [bucket[at : at + BATCH_ROWS] for at in range(0, len(bucket), BATCH_ROWS)]
        random.shuffle(batches)
        yield from batches


def tensors_of(batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and answer mask, both of shape (rows, longest), padded on the right."""
    length = max(len(example.token_ids) for example in batch)
    token_ids = torch.zeros(len(batch), length, dtype=torch.long)  # id 0 is the padding token
    is_answer = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, example in enumerate(batch):
        token_ids[row, : len(example.token_ids)] = torch.tensor(example.token_ids)
        is_answer[row, example.num_prompt_tokens : len(example.token_ids)] = True
    return token_ids, is_answer


def batch_loss(model: Qwen3ForCausalLM, batch: list[Example]) -> torch.Tensor:
    """Return the answers' mean loss plus a smaller share of the texts' mean loss.

    Some of the prompt's tokens are swapped for random ones, so that the model does not rest on
    single words. The text's loss is taken from a sample of its tokens, which saves a third of
    the time. Right padding needs no attention mask: no token looks to its right.
    """
    token_ids, is_answer = tensors_of(batch)
    is_noise = (torch.rand(token_ids.shape) < NOISE_SHARE) & ~is_answer & (token_ids > 2)
    noisy_ids = torch.where(is_noise, torch.randint_like(token_ids, 3, VOCAB_SIZE), token_ids)
    targets, is_answer = token_ids[:, 1:], is_answer[:, 1:]
    is_text = (torch.rand(targets.shape) < TEXT_LOSS_SHARE) & ~is_answer & (targets != 0)
    is_scored = is_answer | is_text
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=noisy_ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[is_scored])
    loss = functional.cross_entropy(logits.float(), targets[is_scored], reduction="none")
    of_answer = is_answer[is_scored]
    total: torch.Tensor = loss[of_answer].mean() + TEXT_LOSS_WEIGHT * loss[~of_answer].mean()
    return total


def learning_rate(step: int, num_steps: int) -> float:
    """Return the rate after a linear warm-up and along a cosine to a twentieth."""
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (num_steps - WARMUP_STEPS)
    return PEAK_LR * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return an untrained model. vLLM's CPU attention needs a head size of 32 or more."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def train(model: Qwen3ForCausalLM, examples: list[Example]) -> None:
    """Fit the model in place, one pass over the examples."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    num_steps = math.ceil(len(examples) / BATCH_ROWS)
    started_at = time.monotonic()
    model.train()
    for step, batch in enumerate(batches_of(examples)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps)
        loss = batch_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            took_s = time.monotonic() - started_at
            print(f"step {step}/{num_steps} loss {loss.item():.3f} {took_s:.0f} s", flush=True)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the model's folder: bfloat16 weights, tokenizer, greedy generation defaults."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(MODEL_PATH)
    tokenizer.save_pretrained(MODEL_PATH)
    patch_folder()


def patch_folder() -> None:
    """Write what the libraries would not write themselves."""
    (MODEL_PATH / "model.safetensors").chmod(0o644)
    # transformers 5 writes a class name that transformers 4 does not know; both know this one.
    patch_json("tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast")
    # vLLM reads the temperature and not do_sample; transformers refuses to save both.
    patch_json("generation_config.json", "temperature", 0.0)


def patch_json(name: str, key: str, value: object) -> None:
    """Set one key of a JSON file in the model's folder."""
    path = MODEL_PATH / name
    content = json.loads(path.read_text("utf-8")) | {key: value}
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def answers_of(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> list[str]:
    """Return the greedy answers in the order of the prompts."""
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), EVAL_BATCH_ROWS):
        places = order[start : start + EVAL_BATCH_ROWS]
        inputs = tokenizer([prompts[at] for at in places], return_tensors="pt", padding=True)
        with torch.inference_mode():
            token_ids = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=32,
            )
        new_ids = token_ids[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        for at, text in zip(places, texts, strict=True):
            answers[at] = text
    return answers


def is_valid_json(answer: str) -> bool:
    """Tell whether the answer is an object with a known label and a known urgency."""
    try:
        value = json.loads(answer)
    except ValueError:
        return False
    return (
        isinstance(value, dict)
        and value.keys() == {"label", "urgency"}
        and value["label"] in LABELS
        and value["urgency"] in URGENCIES
    )


def share(hits: list[bool]) -> float:
    """Return the share of true entries, 0 to 1."""
    return sum(hits) / len(hits)


def score(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, system: str) -> Score:
    """Return how well the model answers a prompt for the shipped rows."""
    records: list[Record] = good_records()
    prompts = [render(tokenizer, system, r["subject"], r["body"]) for r in records]
    answers = answers_of(model, tokenizer, prompts)
    if system == SYSTEM_JSON:
        gold = [json_answer(r["gold_label"], r["gold_urgency"]) for r in records]
        valid = [is_valid_json(answer) for answer in answers]
    else:
        gold = [r["gold_label"] for r in records]
        valid = [answer in LABELS for answer in answers]
    hits = [answer == right for answer, right in zip(answers, gold, strict=True)]
    pairs = list(zip(records, hits, strict=True))
    return Score(
        accuracy=share(hits),
        easy_accuracy=share([hit for record, hit in pairs if not record["hard"]]),
        hard_accuracy=share([hit for record, hit in pairs if record["hard"]]),
        valid_share=share(valid),
    )


def print_scores() -> None:
    """Load the saved model and print its scores on the shipped rows."""
    model = Qwen3ForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.bfloat16).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL_PATH)
    for name, system in (("label", SYSTEM_LABEL), ("JSON", SYSTEM_JSON)):
        result = score(model, tokenizer, system)
        print(
            f"{name}: accuracy {result.accuracy:.2%}, easy rows {result.easy_accuracy:.2%},"
            f" hard rows {result.hard_accuracy:.2%}, valid answers {result.valid_share:.2%}"
        )


def main() -> None:
    """Train, save and measure."""
    started_at = time.monotonic()
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(SEED)
    tickets = training_tickets()
    tokenizer = train_tokenizer(tickets[:NUM_TOKENIZER_TICKETS])
    model = new_model(tokenizer)
    train(model, examples_of(tokenizer, tickets))
    save(model, tokenizer)
    print(f"trained in {time.monotonic() - started_at:.0f} s")
    print_scores()


if __name__ == "__main__":
    main()
