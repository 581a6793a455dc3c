"""Says what Transformers makes of likelihoods, drawn as lm-eval draws them; in float32.

    python -m tests.contract.likelihood_values MODEL ROWS VALUES

reads from ROWS a JSON list of pairs (prompt, continuation) and writes to VALUES one of
[log probabilities of the continuation's tokens, whether each was the likeliest].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LIMIT = 127
"""Tokens of a text at once: one less than `max_model_len`, as vLLM generates one."""


def tokens_of(tokenizer: Any, prompt: str, continuation: str) -> tuple[list[int], int]:
    """Tokens of both, and where the continuation begins: lm_eval/api/model.py, 0.4.13."""
    blanks = len(prompt) - len(prompt.rstrip())
    if blanks:
        prompt, continuation = prompt[:-blanks], prompt[-blanks:] + continuation
    whole = tokenizer.encode(prompt + continuation)
    if prompt:
        return whole, len(tokenizer.encode(prompt))
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [*([] if whole[0] == start else [start]), *whole], 1


def value(model: Any, ids: list[int], begin: int) -> tuple[list[float], bool]:
    """Log probabilities of `ids[begin:]`, and whether each is the likeliest."""
    import torch

    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)[begin - 1 : -1]
    wanted = torch.tensor(ids[begin:])
    found = logprobs.gather(1, wanted[:, None])[:, 0]
    return found.tolist(), bool((logprobs.argmax(-1) == wanted).all())


def values(model: Any, ids: list[int], begin: int) -> tuple[list[float], bool]:
    """The same of a text of any length, in windows: lm_eval/utils.py, get_rolling_token_windows."""
    found, is_greedy = value(model, ids[:LIMIT], begin)
    done = min(LIMIT, len(ids))
    while done < len(ids):
        stop = min(done + LIMIT - 1, len(ids))
        more, is_likeliest = value(model, ids[stop - LIMIT : stop], done - (stop - LIMIT))
        found, is_greedy, done = found + more, is_greedy and is_likeliest, stop
    return found, is_greedy


def main(place: str, rows: Path, target: Path) -> None:
    """Write the values."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place, dtype="float32").eval()
    pairs = json.loads(rows.read_text(encoding="utf-8"))
    found = [values(model, *tokens_of(tokenizer, *pair)) for pair in pairs]
    target.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
