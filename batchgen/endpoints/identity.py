"""Which model answers at a server: what it says of itself, and its answer to a question. Pure.

A server's name for its model says little: weights, quantization or chat template may be others the
next day. So each server is asked one short question before its first row, greedily; the tokens and
their probabilities are kept beside the plan, and what answers otherwise later is another model.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any

from batchgen.core.records import EngineSpec
from batchgen.engine.base import EngineRequest, HostedRequest

if TYPE_CHECKING:
    from batchgen.endpoints.messages import Reply

QUESTION = "Name the colours of the rainbow, then count from one to ten in French."
TOKENS, LISTED = 16, 4
TOLERANCE = 0.3
"""Of a logarithm of a probability. SmolLM2 135M: bfloat16 for float32 moves it by 0.04, weights of
8 bits by 0.15, and with 6 bits the first token is another."""
NUMBERS, TOLERANCE_OF_NUMBERS = 256, 0.02
"""Of a vector or of probabilities so many are kept, and may differ by so much."""


def request(text: str, like: EngineRequest) -> EngineRequest:
    """A text to ask a server with, in the form that rows have."""
    if isinstance(like.prompt, tuple):
        return HostedRequest(0, (text, "Red, orange, yellow, green; un, deux, trois."), None)
    prompt = text if isinstance(like.prompt, str) else [{"role": "user", "content": text}]
    return HostedRequest(0, prompt, None)


def asking(spec: EngineSpec, *, with_logprobs: bool) -> EngineSpec:
    """How it is asked: greedily, without form and tools."""
    more = {"logprobs": LISTED} if with_logprobs else {}
    params = {"max_tokens": TOKENS, "temperature": 0.0, **more}
    return replace(spec, sampling_params=params, tools=())


def answer(reply: Reply) -> dict[str, Any]:
    """What is kept of an answer, as JSON has it."""
    sample = reply.samples[0]
    if sample.numbers is not None:
        return {"numbers": array("f", sample.numbers)[:NUMBERS].tolist()}
    if sample.logprobs is None:
        return {"text": (sample.reasoning or "") + sample.text}
    return {
        "tokens": [
            [one.token, one.logprob, [[*other] for other in one.top]] for one in sample.logprobs
        ]
    }


def difference(known: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Say why a server's model is surely another one; None where it may well be the same.

    Args:
        known: What was kept of the server that has answered rows.
        found: What a server says now.
    """
    text = None
    if "tokens" in known and "tokens" in found:
        text = _other_tokens(known["tokens"], found["tokens"])
    elif "numbers" in known and "numbers" in found:
        pairs = zip(known["numbers"], found["numbers"], strict=False)
        far = max((abs(one - other) for one, other in pairs), default=0.0)
        is_long = len(known["numbers"]) != len(found["numbers"])
        text = (
            f"numbers that differ by {far:.3f}" if is_long or far > TOLERANCE_OF_NUMBERS else None
        )
    elif known["root"] != found["root"]:
        return f"its model is {found['root']!r}, and was {known['root']!r}"
    return text and f"it answers a fixed question with {text}"


def _other_tokens(known: list[list[Any]], found: list[list[Any]]) -> str | None:
    for at, (was, now) in enumerate(zip(known, found, strict=False), 1):
        if was[0] != now[0]:
            # Where two were as likely, either may come; what follows then is another text.
            if was[1] - dict(was[2]).get(now[0], -inf) <= TOLERANCE:
                return None
            return f"{now[0]!r} as token {at}, where it was {was[0]!r}"
        if abs(was[1] - now[1]) > TOLERANCE:
            return f"{now[0]!r} at a log probability of {now[1]:.2f}, where it was {was[1]:.2f}"
    return None
