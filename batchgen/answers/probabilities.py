"""How likely each label of a constrained answer was, from the logprobs of the tokens generated.

A label can be written with other tokens than those taken, and a token can reach over its borders.
So what is followed is text: at each step, each token that was likely there goes to the label that
the text could still become with it. Where it could become several, nobody knows how it would
have gone on, and those labels have no figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from json import JSONDecoder
from json.decoder import scanstring  # type: ignore[attr-defined]
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any

from batchgen.core.records import TokenLogprobs

MAX_AMBIGUOUS = 0.005
"""Probability that may lie between a label and others."""
MAX_MISSING = 0.02
"""Probability without a token in the list that may lie with a label that no token led to."""

# Half a character, as tokenizers decode it; vLLM makes it "" (vllm/v1/engine/logprobs.py, 0.32).
_HALF = "\ufffd"
_MAX_TOKEN_CHARS = 128
_ROUNDING = 1e-6  # Logprobs are floats of 32 bits.


def label_probabilities(
    text: str,
    tokens: Sequence[TokenLogprobs],
    span: tuple[int, int],
    labels: Sequence[str],
    closing: str,
) -> list[float | None] | None:
    """Return P(label | all text before it, grammar) for each label.

    Summed over the ways to write a label in tokens, as far as `tokens` tell. What comes before
    the label is taken as text from the first step on at which a token could have reached into
    the label, and as the tokens that it is before that step.

    A figure is a lower bound: what is in no list, and up to `MAX_AMBIGUOUS` that several labels
    share, may belong to it. Nothing is scaled up to fill the gap, so the figures sum to 1 only if
    no probability is unlisted, shared or another text's. They are the model's, as the logprobs
    have them (temperature or not), and not calibrated. Where the grammar allows other texts than
    `labels`, they mean little.

    Args:
        text: The whole answer.
        tokens: Its tokens in order; a special one (None) may end it.
        span: Where the chosen label stands in `text`.
        labels: All that the grammar allows there, different, written as in `text`.
        closing: What follows a label, such as `"`; "" if the answer ends with it.

    Returns:
        One a label, 0 to 1. None for a label that shares over `MAX_AMBIGUOUS` with others, or
        that no token led to while over `MAX_MISSING` is in no list; None in place of all if the
        tokens are not those of the text, or no label stands in the span.
    """
    starts = _starts(text, tokens)
    start, end = span
    closed = text.startswith(closing, end) if closing else end == len(text)
    if starts is None or text[start:end] not in labels or not (closed or end == len(text)):
        return None
    walk = _Walk(text, start, labels, closing)
    for index in range(_first_step(text, tokens, starts, start), len(tokens)):
        if walk.is_decided:
            break
        walk.step(tokens[index], starts[index])
    return walk.probabilities()


class _Spanned(str):
    """A string of a JSON document that knows where it stands there."""

    __slots__ = ("span",)
    span: tuple[int, int]
    """Without its quotes."""


def _scan_string(text: str, start: int, strict: bool) -> tuple[_Spanned, int]:  # noqa: FBT001
    value, end = scanstring(text, start, strict)
    found = _Spanned(value)
    found.span = start, end - 1
    return found, end


# Digits stay text: Python refuses to read more than 4300 of them. The scanner in C knows no hook.
_DECODER: Any = JSONDecoder(parse_int=str, parse_float=str)
_DECODER.parse_string = _scan_string
_DECODER.scan_once = py_make_scanner(_DECODER)


def value_span(text: str, field: str) -> tuple[int, int] | None:
    """Find the string value of a top-level field in a JSON object, without its quotes.

    Returns:
        Offsets in `text`; of the last field if there are several of the name, as parsers have
        it. None if there is no such field, it is no string, or `text` is not a JSON object.
    """
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError):  # Not JSON.
        return None
    found = value.get(field) if isinstance(value, dict) else None
    return found.span if isinstance(found, _Spanned) else None


def _starts(text: str, tokens: Sequence[TokenLogprobs]) -> list[int] | None:
    """Where each token begins in the text; None if they are not its tokens."""
    starts, at = [], 0
    for number, token in enumerate(tokens):
        starts.append(at)
        if token.token is None:
            if number != len(tokens) - 1:
                return None
        elif not text.startswith(token.token, at):
            return None
        else:
            at += len(token.token)
    return starts if at == len(text) else None


def _others(token: TokenLogprobs) -> list[tuple[str | None, float]]:
    """The listed tokens but the one taken, with their probabilities."""
    same = [
        (abs(logprob - token.logprob), index)
        for index, (other, logprob) in enumerate(token.top)
        if other == token.token
    ]
    # Another token can have the same text; the one taken need not be among the likeliest.
    distance, taken = min(same, default=(math.inf, -1))
    if distance > 1e-4:
        taken = -1
    return [(t, math.exp(p)) for index, (t, p) in enumerate(token.top) if index != taken]


def _first_step(
    text: str, tokens: Sequence[TokenLogprobs], starts: Sequence[int], start: int
) -> int:
    """The first step that decides on the label: there a token could reach over its start."""
    first = len(tokens)
    while first > 0 and starts[first - 1] >= start:
        first -= 1
    if first > 0 and starts[first - 1] + len(tokens[first - 1].token or "") > start:
        first -= 1
    for index in range(first - 1, -1, -1):
        before = text[starts[index] : start]
        if len(before) >= _MAX_TOKEN_CHARS:
            break
        reach = sum(
            math.exp(logprob)
            for other, logprob in tokens[index].top
            if other is not None and len(other) > len(before) and other.startswith(before)
        )
        if reach > MAX_AMBIGUOUS * (reach + math.exp(tokens[index].logprob)):
            first = index
    return first


@dataclass(slots=True)
class _Share:
    """What one label got; parts of the probability at the first step."""

    own: float = 0.0
    ambiguous: float = 0.0
    missing: float = 0.0


class _Walk:
    """Follows the tokens taken, until one label is left."""

    def __init__(self, text: str, start: int, labels: Sequence[str], closing: str) -> None:
        self._text = text
        self._start = start
        self._closing = closing
        self._wholes = [label + closing for label in labels]
        self._shares = [_Share() for _ in labels]
        self._open = list(range(len(labels)))
        self._mass = 1.0
        self._whole = 0.0
        """All but what led to another text before the label."""

    @property
    def is_decided(self) -> bool:
        """Only one label can still come."""
        return len(self._open) == 1

    def step(self, token: TokenLogprobs, at: int) -> None:
        """Take one step; `at` is where its token begins in the text."""
        taken = math.exp(token.logprob)
        unlisted = 1.0 - taken
        for other, probability in _others(token):
            unlisted -= probability
            self._give(other, at, self._mass * probability)
        if unlisted > _ROUNDING:
            self._divide((), self._mass * unlisted)
        self._mass *= taken
        inside = self._inside(token.token, at)
        self._open = [] if inside is None else self._fitting(inside, is_end=token.token is None)

    def probabilities(self) -> list[float | None] | None:
        """Sum up; None if the tokens taken could not come at all."""
        self._divide(self._open, self._mass)
        if not self._whole > 0:
            return None
        return [_figure(share, self._whole) for share in self._shares]

    def _give(self, token: str | None, at: int, mass: float) -> None:
        inside = self._inside(token, at)
        if inside is None:
            return
        if token == "" or _HALF in inside:
            self._divide(self._fitting_half(inside), mass)
        else:
            self._divide(self._fitting(inside, is_end=token is None), mass)

    def _inside(self, token: str | None, at: int) -> str | None:
        """The text from the label's start on, had this token come; None if the text is another."""
        if at >= self._start:
            return self._text[self._start : at] + (token or "")
        before = self._text[at : self._start]
        if token is None or not (token.startswith(before) or before.startswith(token)):
            return None
        return token[len(before) :]

    def _fitting(self, inside: str, *, is_end: bool) -> list[int]:
        """Labels still open that have come, or that can still come unless this is the end."""
        whole = self._wholes
        if is_end:
            return [i for i in self._open if inside.startswith(whole[i])]
        # Without a closing sign, what has come whole can still become a longer label.
        came = [i for i in self._open if inside.startswith(whole[i])] if self._closing else []
        return came or [i for i in self._open if whole[i].startswith(inside)]

    def _fitting_half(self, inside: str) -> list[int]:
        """Labels that fit when part of a character comes, somewhere after what is readable."""
        known, is_cut, _ = inside.partition(_HALF)
        near = len(known) + 1 if is_cut else None
        fitting = self._fitting(known, is_end=False)
        half = [i for i in fitting if not self._wholes[i][len(known) : near].isascii()]
        return half if half or is_cut else fitting

    def _divide(self, fitting: Sequence[int], mass: float) -> None:
        """Give to the label that fits; to none if several do, or if nothing is known to."""
        self._whole += mass
        if len(fitting) == 1:
            self._shares[fitting[0]].own += mass
        for index in fitting if len(fitting) > 1 else ():
            self._shares[index].ambiguous += mass
        for index in () if fitting else self._open:
            self._shares[index].missing += mass


def _figure(share: _Share, whole: float) -> float | None:
    if share.ambiguous > MAX_AMBIGUOUS * whole:
        return None
    if share.own == 0.0 and share.missing > MAX_MISSING * whole:
        return None
    return min(share.own / whole, 1.0)
