"""How long an answer will be, as far as can be told before it is generated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from batchgen.core.records import Prompt

MIN_SEEN = 8
"""Fewer answers to prompts of one size say nothing about the next."""
BYTES_A_TOKEN = 4
"""Of English text, roughly; a wrong guess shifts all sizes alike."""


class Lengths(NamedTuple):
    """What is known of the lengths of a job's answers."""

    max_tokens: int | None = None
    """The job's; None: as far as the model goes."""
    is_exact: bool = False
    """Every answer is as long as it may be (`ignore_eos`)."""
    means: Mapping[int, float] = {}
    """Octave of a prompt's size in tokens -> mean output tokens of earlier answers."""

    def expect(self, prompt: Prompt, params: Mapping[str, Any] | None) -> int | None:
        """Output tokens to expect of one request; None where nothing is known."""
        asked = params or {}
        bound: int | None = asked.get("max_tokens", self.max_tokens)
        if asked.get("ignore_eos", self.is_exact):
            return bound
        mean = self.means.get(octave(size_of(prompt) // BYTES_A_TOKEN))
        if mean is None:
            return bound
        return int(mean) if bound is None else min(int(mean), bound)


def octave(number: int) -> int:
    """0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, and so on."""
    return number.bit_length()


def size_of(prompt: Prompt) -> int:
    """Characters of a prompt's texts; its images are none."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(_text_size(message.get("content")) for message in prompt)


def _text_size(content: object) -> int:
    """Of a message: text, or a list of parts (OpenAI's `content`)."""
    if isinstance(content, str):
        return len(content)
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return sum(len(text) for text in texts if isinstance(text, str))


def held_size(prompt: object) -> int:
    """Characters of all that a prompt holds: images in it and calls of tools, too."""
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt, dict):
        return sum(map(held_size, prompt.values()))
    return sum(map(held_size, prompt)) if isinstance(prompt, list) else 0


def mean_lengths(seen: Iterable[tuple[int | None, int | None]]) -> dict[int, float]:
    """Summarize earlier answers for `Lengths.means`.

    Args:
        seen: Prompt tokens and output tokens of each answer; None where there is none.
    """
    sums: dict[int, list[int]] = {}
    for num_prompt, num_output in seen:
        if num_prompt is not None and num_output is not None:
            entry = sums.setdefault(octave(num_prompt), [0, 0])
            entry[0] += 1
            entry[1] += num_output
    return {key: total / num for key, (num, total) in sums.items() if num >= MIN_SEEN}
