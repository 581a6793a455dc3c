"""What vLLM's scheduler refuses of settings that are right each by itself."""

from __future__ import annotations

from typing import Literal


def above_batched_tokens(
    tokens: int, seqs: int | None, length: int | None, *, is_chunked: bool
) -> Literal["max_model_len", "max_num_seqs"] | None:
    """Which setting is above `max_num_batched_tokens` and must not be; None if all is well.

    Args:
        tokens: max_num_batched_tokens, a step's.
        seqs: max_num_seqs; None: vLLM fits its own to the rest.
        length: max_model_len; None: unknown.
        is_chunked: Whether long prompts are spread over steps.

    Source:
        vllm/config/scheduler.py, verify_max_model_len, 0.26 to 0.33. What nobody says is fitted
        to the rest: vllm/engine/arg_utils.py, _set_default_max_num_seqs_and_batched_tokens_args.
    """
    if not is_chunked and length is not None and tokens < length:
        return "max_model_len"
    return "max_num_seqs" if seqs is not None and tokens < seqs else None
