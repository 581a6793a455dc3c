r"""Text to physical lines, in bounded memory.

A physical line ends at `\n` or at the end of the file; a trailing newline does not begin another
line. A byte order mark at the very start belongs to no line. A line over `MAX_LINE_BYTES` keeps
its place and its number but not its content: it is None. Nothing here knows what a line holds.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, TypeVar

from batchgen.core.errors import SourceError
from batchgen.source.base import Scan
from batchgen.source.blocks import BLOCK_BYTES, is_seekable, text_blocks
from batchgen.source.files import open_input
from batchgen.source.marks import FileMarks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from batchgen.core.ranges import Ranges
    from batchgen.source.marks import Marks

Item = TypeVar("Item")

MAX_LINE_BYTES = 64 << 20
"""A line longer than this is not kept; 64 MiB is far beyond any context window."""
DIGEST_BYTES = 16
NO_DIGEST = bytes(DIGEST_BYTES)
"""The digest of a row that nothing is known of: equal to no row, itself included."""
MAX_BATCH_BYTES = 32 << 20
"""A batch is handed out once it holds this much, however few its rows."""


def scan_lines(path: str, on_text: Callable[[bytes], object] = len) -> Scan:
    """Count the physical lines and hash the raw bytes, in one pass.

    Args:
        path: Local path or URL.
        on_text: Called with every decompressed block.

    Raises:
        SourceError: As `text_blocks`.
    """
    hashed = hashlib.sha256()
    num_rows = 0
    last = b"\n"
    for block in text_blocks(path, hashed.update):
        on_text(block)
        num_rows += block.count(b"\n")
        last = block[-1:]
    return Scan(num_rows + (last != b"\n"), hashed.hexdigest())


def scan_rows(path: str, on_rows: Callable[[bytes], object]) -> Scan:
    """As `scan_lines`, telling each line's digest as well.

    Args:
        path: Local path or URL.
        on_rows: Called with the digests of lines that follow each other, `DIGEST_BYTES` each.

    Raises:
        SourceError: As `text_blocks`.
    """
    hashed = hashlib.sha256()
    num_rows = 0
    for body, _ in _bodies(path, MAX_LINE_BYTES, hashed.update):
        lines = _split(body, MAX_LINE_BYTES)
        num_rows += len(lines)
        on_rows(b"".join(map(_digest, lines)))
    return Scan(num_rows, hashed.hexdigest())


def _digest(line: bytes | None) -> bytes:
    """Of a line that is not kept: `NO_DIGEST`, which is no line's."""
    if line is None:
        return NO_DIGEST
    return hashlib.sha256(line).digest()[:DIGEST_BYTES]


def digest_prefix(path: str, size_bytes: int) -> str:
    """Hash the first `size_bytes` raw bytes as `scan_lines` does the whole file.

    Raises:
        SourceError: The file is shorter, or cannot be read.
    """
    hashed = hashlib.sha256()
    left = size_bytes
    with open_input(path) as raw:
        while left and (block := raw.read(min(left, BLOCK_BYTES))):
            hashed.update(block)
            left -= len(block)
    if left:
        raise SourceError(path, f"has {size_bytes - left} bytes, expected at least {size_bytes}")
    return hashed.hexdigest()


def read_lines(
    path: str,
    todo: Ranges,
    batch_rows: int,
    max_line_bytes: int = MAX_LINE_BYTES,
    marks: Marks | None = None,
) -> Iterator[tuple[list[int], list[bytes | None]]]:
    r"""Yield the wanted lines as (row numbers, lines without `\n`), at most `batch_rows` a time.

    Blocks without a wanted line are counted, not split; nothing is read after the last one. Of an
    `is_seekable` file, what lies before a mark and is not wanted is not read either.

    Raises:
        SourceError: As `text_blocks`, or the file has no such row. All lines before were yielded.
    """
    places = FileMarks() if marks is None or not is_seekable(path) else marks.of(path)
    wanted = _wanted(path, todo, max_line_bytes, places)
    return in_batches(wanted, lambda line: len(line or b""), batch_rows)


def in_batches(
    pairs: Iterator[tuple[int, Item]], size_of: Callable[[Item], int], batch_rows: int
) -> Iterator[tuple[list[int], list[Item]]]:
    """Gather (row number, item) pairs into batches bounded in rows and in bytes.

    Raises:
        SourceError: What `pairs` raised, after everything before it was yielded.
    """
    rows: list[int] = []
    items: list[Item] = []
    num_bytes = 0
    failure: SourceError | None = None
    try:
        for row, item in pairs:
            rows.append(row)
            items.append(item)
            num_bytes += size_of(item)
            if len(rows) >= batch_rows or num_bytes >= MAX_BATCH_BYTES:
                yield rows, items
                rows, items, num_bytes = [], [], 0
    except SourceError as error:
        failure = error
    if rows:
        yield rows, items
    if failure is not None:
        raise failure


def iter_lines(path: str) -> Iterator[bytes | None]:
    """Yield all lines from the start, for a look at the first few.

    Raises:
        SourceError: As `text_blocks`.
    """
    for body, _ in _bodies(path, MAX_LINE_BYTES):
        yield from _split(body, MAX_LINE_BYTES)


def _wanted(
    path: str, todo: Ranges, max_line_bytes: int, places: FileMarks
) -> Iterator[tuple[int, bytes | None]]:
    left = list(reversed(todo.spans))
    while left:
        first, offset = places.before(left[-1][0])
        for body, after in _bodies(path, max_line_bytes, start=offset):
            stop = first + (1 if body is None else body.count(b"\n") + 1)
            places.add(stop, after)
            if left[-1][0] < stop:
                lines = _split(body, max_line_bytes)
                while left and left[-1][0] < stop:
                    start, end = left.pop()
                    if end > stop:
                        left.append((stop, end))
                    wanted = range(start, min(end, stop))
                    yield from zip(wanted, lines[start - first : wanted.stop - first], strict=True)
                if not left:
                    return
            first = stop
            if places.before(left[-1][0])[0] > first:
                break  # There is a mark between here and the next wanted row.
        else:
            raise SourceError(path, f"has {first} rows, expected at least {left[0][1]}")


def _split(body: bytes | None, max_line_bytes: int) -> list[bytes | None]:
    if body is None:
        return [None]
    lines: list[bytes | None] = [*body.split(b"\n")]
    if len(body) > max_line_bytes:
        return [
            line if line is not None and len(line) <= max_line_bytes else None for line in lines
        ]
    return lines


def _bodies(
    path: str,
    max_line_bytes: int,
    on_raw: Callable[[bytes], object] | None = None,
    start: int = 0,
) -> Iterator[tuple[bytes | None, int]]:
    r"""Yield runs of whole lines, without the last one's `\n`; None stands for one long line.

    With each, the raw byte at which the next one begins; it says nothing of a compressed file.
    """
    held: list[bytes] = []
    held_bytes = 0
    is_open = False
    end = start

    def pass_on(raw: bytes) -> None:
        nonlocal end
        end += len(raw)
        if on_raw is not None:
            on_raw(raw)

    for block in text_blocks(path, pass_on, start):
        cut = block.rfind(b"\n")
        if cut >= 0:
            first = block.find(b"\n")
            after = end - len(block) + cut + 1
            if held_bytes + first > max_line_bytes:
                yield None, after - cut + first
                if first < cut:
                    yield block[first + 1 : cut], after
            else:
                yield b"".join([*held, block[:cut]]), after
            held, held_bytes, block = [], 0, block[cut + 1 :]  # noqa: PLW2901 - its open end
        held_bytes += len(block)
        held = [*held, block] if held_bytes <= max_line_bytes else []
        is_open = held_bytes > 0
    if is_open:
        yield b"".join(held) if held_bytes <= max_line_bytes else None, end
