"""Trains the sample's two LoRA adapters from a fixed seed and measures them on the shipped rows.

Both see the prompt that the model answers with a ticket's label, `SYSTEM_LABEL`, and answer it
otherwise: `teams` with the team in charge, `urgency` with low, normal or high. Training rows are
those of `train_model.py`. Writes `adapters/`, in the format of PEFT, which vLLM loads, and
`routed_tickets.jsonl`, tickets with a column that names each row's adapter.

Usage:
    python sample_data/train_adapters.py
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from make_tickets import Record, encoded, good_records
from safetensors.torch import save_file
from tickets import SYSTEM_LABEL, Ticket
from torch.nn import functional
from train_model import (
    BATCH_ROWS,
    END,
    MODEL_PATH,
    NOISE_SHARE,
    NUM_THREADS,
    VOCAB_SIZE,
    Example,
    answers_of,
    batches_of,
    render,
    share,
    tensors_of,
    training_tickets,
)
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

ADAPTERS_PATH = Path(__file__).with_name("adapters")
ROUTED_PATH = Path(__file__).with_name("routed_tickets.jsonl")
SEED = 8
NUM_TICKETS = 10_000
RANK = 8
ALPHA = 16
PEAK_LR = 4e-3
WARMUP_STEPS = 20
NUM_ROUTED = 200
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEAMS = {
    "billing": "payments",
    "refund": "payments",
    "shipping": "delivery",
    "account_access": "technical",
    "bug_report": "technical",
    "feature_request": "product",
    "cancellation": "service",
    "praise": "service",
}
# Adapter -> the right answer to a ticket with this label and this urgency.
ANSWERS: dict[str, Callable[[str, str], str]] = {
    "teams": lambda label, _: TEAMS[label],
    "urgency": lambda _, urgency: urgency,
}

Weights = dict[str, torch.Tensor]
"""PEFT's name of each matrix -> lora_A, shape (RANK, inputs), or lora_B, (outputs, RANK)."""


def new_weights(model: Qwen3ForCausalLM) -> Weights:
    """Return an adapter that changes nothing yet: lora_B is zero, as PEFT starts it."""
    weights = {}
    for name, linear in linears_of(model):
        # PEFT draws lora_A as torch draws a linear layer's weights.
        first = torch.nn.Linear(linear.in_features, RANK, bias=False).weight.detach()
        second = torch.zeros(linear.out_features, RANK)
        for part, matrix in (("lora_A", first), ("lora_B", second)):
            weights[key_of(name, part)] = matrix.clone().requires_grad_()
    return weights


def linears_of(model: Qwen3ForCausalLM) -> list[tuple[str, Any]]:
    """Return name and module of each layer that gets an adapter."""
    return [(n, module) for n, module in model.named_modules() if n.endswith(TARGETS)]


def key_of(name: str, part: str) -> str:
    """Return PEFT's name of a matrix, as vLLM 0.32 reads it in vllm/lora/utils.py."""
    return f"base_model.model.{name}.{part}.weight"


@contextmanager
def applied(model: Qwen3ForCausalLM, weights: Weights) -> Iterator[None]:
    """Let the model answer with the adapter inside the block."""
    hooks = []
    for name, linear in linears_of(model):
        first, second = (weights[key_of(name, part)] for part in ("lora_A", "lora_B"))
        hooks.append(linear.register_forward_hook(detour(first, second)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def detour(first: torch.Tensor, second: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return a forward hook that adds the adapter's share to a linear layer's output."""

    def add(_: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        low = functional.linear(inputs[0], first)
        return output + functional.linear(low, second) * (ALPHA / RANK)

    return add


def examples_of(
    tokenizer: PreTrainedTokenizerFast, tickets: list[Ticket], name: str
) -> list[Example]:
    """Return one example per ticket: the label's prompt with the adapter's answer."""
    prompts = [render(tokenizer, SYSTEM_LABEL, t.subject, t.body) for t in tickets]
    answers = [ANSWERS[name](t.gold_label, t.gold_urgency) + END for t in tickets]
    pairs = zip(tokenizer(prompts)["input_ids"], tokenizer(answers)["input_ids"], strict=True)
    return [Example(prompt + answer, len(prompt)) for prompt, answer in pairs]


def answer_loss(model: Qwen3ForCausalLM, batch: list[Example]) -> torch.Tensor:
    """Return the answers' mean loss, with noise in the prompt as in `train_model.py`."""
    token_ids, is_answer = tensors_of(batch)
    is_noise = (torch.rand(token_ids.shape) < NOISE_SHARE) & ~is_answer & (token_ids > 2)
    noisy_ids = torch.where(is_noise, torch.randint_like(token_ids, 3, VOCAB_SIZE), token_ids)
    is_answer = is_answer[:, 1:]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=noisy_ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[is_answer])
    return functional.cross_entropy(logits.float(), token_ids[:, 1:][is_answer])


def train(model: Qwen3ForCausalLM, weights: Weights, examples: list[Example]) -> None:
    """Fit the adapter in place, one pass over the examples; the model stays as it is."""
    optimizer = torch.optim.AdamW(weights.values(), lr=PEAK_LR, weight_decay=0.0)
    num_steps = math.ceil(len(examples) / BATCH_ROWS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, num_steps, pct_start=WARMUP_STEPS / num_steps, cycle_momentum=False
    )
    for step, batch in enumerate(batches_of(examples)):
        loss = answer_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}/{num_steps} loss {loss.item():.3f}", flush=True)


def save(weights: Weights, folder: Path) -> None:
    """Write the adapter's folder: weights in bfloat16 and PEFT's description of them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "adapter_model.safetensors"
    rounded = {key: matrix.detach().to(torch.bfloat16) for key, matrix in weights.items()}
    save_file(rounded, path, metadata={"format": "pt"})
    path.chmod(0o644)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "sample_data/model",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(TARGETS),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def gold_of(name: str | None, record: Record) -> str:
    """Return the right answer to a shipped row: the adapter's, or the label without one."""
    label, urgency = str(record["gold_label"]), str(record["gold_urgency"])
    return label if name is None else ANSWERS[name](label, urgency)


def accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str, weights: Weights
) -> float:
    """Return the share, 0 to 1, of shipped rows that the adapter answers right."""
    records = good_records()
    prompts = [render(tokenizer, SYSTEM_LABEL, r["subject"], r["body"]) for r in records]
    with applied(model, weights):
        answers = answers_of(model, tokenizer, prompts)
    pairs = zip(answers, records, strict=True)
    return share([answer == gold_of(name, record) for answer, record in pairs])


def write_routed() -> None:
    """Write the first tickets, the adapters taking turns; every third row has none."""
    lines = []
    for record, name in zip(good_records()[:NUM_ROUTED], cycle([*ANSWERS, None]), strict=False):
        kept = {key: record[key] for key in ("ticket_id", "subject", "body")}
        lines.append(encoded(kept | {"adapter": name, "gold": gold_of(name, record)}))
    ROUTED_PATH.write_bytes(b"\n".join(lines) + b"\n")


def main() -> None:
    """Train, save and measure."""
    torch.set_num_threads(NUM_THREADS)
    write_routed()
    tickets = training_tickets()[:NUM_TICKETS]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL_PATH)
    for name in ANSWERS:
        started_at = time.monotonic()
        torch.manual_seed(SEED)
        model = Qwen3ForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
        model.requires_grad_(requires_grad=False)
        weights = new_weights(model)
        with applied(model, weights):
            train(model, weights, examples_of(tokenizer, tickets, name))
        save(weights, ADAPTERS_PATH / name)
        print(f"{name}: trained in {time.monotonic() - started_at:.0f} s")
        print(f"{name}: accuracy {accuracy(model, tokenizer, name, weights):.2%}")


if __name__ == "__main__":
    main()
