"""`Chores`: the driver's own work on the output, patient with a disk in trouble."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen.core.errors import BatchgenError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable


class Chores:
    """What is to be done, in order; what the disk refuses is tried again later."""

    def __init__(
        self, grace_s: float, tell: Callable[[StorageError], None], clock: Callable[[], float]
    ) -> None:
        """Begin with none.

        Args:
            grace_s: How long the disk may refuse.
            tell: Told of each refusal.
            clock: Monotonic seconds.
        """
        self._grace_s = grace_s
        self._tell = tell
        self._clock = clock
        self._left: list[Callable[[], None]] = []
        self._give_up_s: float | None = None

    def __bool__(self) -> bool:
        return bool(self._left)

    def add(self, chore: Callable[[], None]) -> None:
        """To be done by `do`, and again if it raises `StorageError`."""
        self._left.append(chore)

    def do(self) -> BatchgenError | None:
        """Try all of them; return what is trouble for the job, if anything."""
        chores, self._left = self._left, []
        trouble: BatchgenError | None = None
        for chore in chores:
            try:
                chore()
            except StorageError as error:
                self._left.append(chore)
                self._tell(error)
                self._give_up_s = self._give_up_s or self._clock() + self._grace_s
                if self._clock() >= self._give_up_s:
                    trouble = trouble or error
            except BatchgenError as error:
                trouble = trouble or error
        if not self._left:
            self._give_up_s = None
        return trouble
