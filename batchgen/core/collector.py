"""Python's collector of reference cycles, told that rows make none."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_YOUNG_OBJECTS = 50_000


@contextmanager
def rare_collection() -> Iterator[None]:
    """Let the collector begin 70 times more rarely than Python's default, until the block ends.

    It begins when so many more objects were made than freed, and a run holds hundreds of
    thousands, those of rows in flight and of the open part: to walk through them in vain took a
    third of the time of a run with the echo engine. Cycles are collected all the same.
    """
    before = gc.get_threshold()
    collect_rarely()
    try:
        yield
    finally:
        gc.set_threshold(*before)


def collect_rarely(*, freeze: bool = False) -> None:
    """Do as `rare_collection` does, until the process ends.

    Args:
        freeze: Never look again at what there is now: modules, and a model's classes.
    """
    young, middle, old = gc.get_threshold()
    gc.set_threshold(max(young, _YOUNG_OBJECTS) if young else 0, middle, old)  # 0: it is off.
    if freeze:
        gc.collect()
        gc.freeze()
