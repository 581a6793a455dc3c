"""Words for messages."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection


def nearest(word: str, known: Collection[str]) -> str | None:
    """What was probably meant; None if nothing is near."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def suggestion(word: str, known: Collection[str]) -> str:
    """`; did you mean 'x'?`, or else what there is."""
    if near := nearest(word, known):
        return f"; did you mean {near!r}?"
    return f"; there are {', '.join(map(repr, known)) or 'none'}"
