"""A bound on the work of one validation.

A small schema can double it at each step, by two references to the next one or by alternatives
inside alternatives, so that thirty steps take hours. Nesting alone does not tell: recursion also
doubles with the answer's depth. So each keyword that is applied counts.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from jsonschema.validators import extend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_KEYWORDS = 100_000
"""About a second. An answer of a thousand values under a rich schema takes some ten thousand."""


class TooMuchWorkError(Exception):
    """A validation has applied `MAX_KEYWORDS` keywords."""


class _Effort(threading.local):
    num_left = MAX_KEYWORDS


_effort = _Effort()


def begin_validation() -> None:
    """Count from here."""
    _effort.num_left = MAX_KEYWORDS


def bounded(kind: Any) -> Any:  # noqa: ANN401 - jsonschema's validator class
    """Make of a validator class one that raises `TooMuchWorkError` in place of running for ever."""
    keywords = {name: _counted(apply) for name, apply in kind.VALIDATORS.items()}
    return extend(kind, keywords)  # type: ignore[no-untyped-call]


def _counted(apply: Callable[..., Iterator[Any] | None]) -> Callable[..., Iterator[Any]]:
    def counted(*args: Any) -> Iterator[Any]:  # noqa: ANN401
        _effort.num_left -= 1
        if _effort.num_left < 0:
            msg = f"more than {MAX_KEYWORDS} keywords to apply"
            raise TooMuchWorkError(msg)
        yield from apply(*args) or ()

    return counted
