"""Words for messages."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def suggestion(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or else what there is."""
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(map(repr, known)) or 'none'}"
