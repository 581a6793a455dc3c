"""Where lines begin in plain files: learnt while a file is read, so that a later read starts late.

Nothing here reads a file. Not for several threads at once.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING

from batchgen.source.files import stat_input

if TYPE_CHECKING:
    from batchgen.source.files import InputStat

EVERY_BYTES = 4 << 20
"""Marks are no closer than this; a read begins at most about this far before its first row."""
MAX_MARKS = 1 << 16
"""Of one file, 16 bytes each."""
MAX_FILES = 4096


class FileMarks:
    """The marks of one file in one state, ascending, none beyond what was read so far."""

    def __init__(self, every_bytes: int = EVERY_BYTES, max_marks: int = MAX_MARKS) -> None:
        self._every = every_bytes
        self._max = max_marks
        self._rows = array("q", [0])
        self._offsets = array("q", [0])

    def __len__(self) -> int:
        return len(self._rows)

    def before(self, row: int) -> tuple[int, int]:
        """The last mark at or before this row: its row, and the byte at which that begins."""
        at = bisect_right(self._rows, row) - 1
        return self._rows[at], self._offsets[at]

    def add(self, row: int, offset: int) -> None:
        """Note that `row` begins at byte `offset`, unless there is a mark near it or beyond."""
        if offset < self._offsets[-1] + self._every:
            return
        self._rows.append(row)
        self._offsets.append(offset)
        if len(self._rows) > self._max:
            self._rows, self._offsets = self._rows[::2], self._offsets[::2]
            self._every *= 2


class Marks:
    """The marks of all files that one process reads; lives as long as its run.

    A file that is not the one that was read before, by size and mtime, starts without marks.
    """

    def __init__(
        self,
        every_bytes: int = EVERY_BYTES,
        max_marks: int = MAX_MARKS,
        max_files: int = MAX_FILES,
    ) -> None:
        self._bounds = (every_bytes, max_marks)
        self._max_files = max_files
        self._files: dict[str, tuple[InputStat, FileMarks]] = {}

    def of(self, path: str) -> FileMarks:
        """The marks of this file as it is now, to be read and added to.

        Raises:
            SourceError: Absent or unreadable.
        """
        now = stat_input(path)
        known = self._files.pop(path, None)
        is_known = known is not None and now.is_still(known[0])
        marks = known[1] if known is not None and is_known else FileMarks(*self._bounds)
        self._files[path] = (now, marks)
        if len(self._files) > self._max_files:
            del self._files[next(iter(self._files))]  # The one unused longest.
        return marks
