r"""Bytes to physical lines, plain or compressed, in bounded memory.

A physical line ends at `\n` or at the end of the file; a trailing newline does not begin another
line. A byte order mark at the very start belongs to no line. A line over `MAX_LINE_BYTES` keeps
its place and its number but not its content: it is None. Nothing here knows what a line holds.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import IO, TYPE_CHECKING, TypeVar

from batchgen.errors import SourceError
from batchgen.inputs import open_input
from batchgen.row_digests import DIGEST_BYTES, NO_DIGEST
from batchgen.source.base import Scan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from batchgen.ranges import Ranges

Item = TypeVar("Item")

BLOCK_BYTES = 4 << 20
MAX_LINE_BYTES = 64 << 20
"""A line longer than this is not kept; 64 MiB is far beyond any context window."""
MAX_BATCH_BYTES = 32 << 20
"""A batch is handed out once it holds this much, however few its rows."""

BOM = b"\xef\xbb\xbf"
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

# zstandard's decompressobj has no output limit. A compressed block of 4 bytes may stand for
# 128 KiB (RFC 8878, 3.1.1.2), so that this much input never becomes more than 64 MiB.
_ZSTD_INPUT_BYTES = 2 << 10


def compression_of(path: str) -> str | None:
    """`gzip`, `zstd` or None, by the name's suffix alone."""
    if path.endswith(".gz"):
        return "gzip"
    return "zstd" if path.endswith((".zst", ".zstd")) else None


def text_blocks(path: str, on_raw: Callable[[bytes], object] | None = None) -> Iterator[bytes]:
    """Yield the decompressed content, without the byte order mark, in non-empty blocks.

    Args:
        path: Local path or URL; its suffix tells the compression.
        on_raw: Called with every raw block as it is read.

    Raises:
        SourceError: The content is not what the suffix says, is damaged or ends early. Blocks
            decoded before the damage were yielded.
    """
    unpack = {"gzip": _gunzip, "zstd": _unzstd, None: _plain}[compression_of(path)]
    is_start = True
    with open_input(path) as raw:
        for block in unpack(path, _raw_blocks(path, raw, on_raw)):
            if is_start:
                is_start = False
                block = block.removeprefix(BOM)  # noqa: PLW2901 - the same block, shorter
            if block:
                yield block


def _raw_blocks(
    path: str, raw: IO[bytes], on_raw: Callable[[bytes], object] | None
) -> Iterator[bytes]:
    try:
        while block := raw.read(BLOCK_BYTES):
            if on_raw is not None:
                on_raw(block)
            yield block
    except OSError as error:
        raise SourceError(path, f"cannot be read: {error.strerror or error}") from error


def _plain(path: str, raw: Iterator[bytes]) -> Iterator[bytes]:
    return raw


def _gunzip(path: str, raw: Iterator[bytes]) -> Iterator[bytes]:
    member = zlib.decompressobj(wbits=31)
    num_members = 0
    try:
        for block in raw:
            rest = block
            while rest:
                if member.eof:
                    # Zeros may pad a member, as `gzip` and tape drives write and read them.
                    rest = rest.lstrip(b"\0")
                    if not rest:
                        break
                    member, num_members = zlib.decompressobj(wbits=31), num_members + 1
                text = member.decompress(rest, BLOCK_BYTES)
                if text:
                    yield text
                rest = member.unused_data if member.eof else member.unconsumed_tail
    except zlib.error as error:
        raise _damaged(path, "gzip", str(error), num_members) from error
    if not member.eof:
        raise _truncated(path, "gzip")


def _unzstd(path: str, raw: Iterator[bytes]) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    num_frames = 0
    texts: list[bytes] = []
    try:
        for block in raw:
            for at in range(0, len(block), _ZSTD_INPUT_BYTES):
                rest = block[at : at + _ZSTD_INPUT_BYTES]
                while rest:
                    if frame.eof:
                        frame, num_frames = decompressor.decompressobj(), num_frames + 1
                    texts.append(frame.decompress(rest))
                    rest = frame.unused_data if frame.eof else b""
                if sum(map(len, texts)) >= BLOCK_BYTES:
                    yield b"".join(texts)
                    texts.clear()
    except zstandard.ZstdError as error:
        if texts:
            yield b"".join(texts)
        raise _damaged(path, "zstd", str(error), num_frames) from error
    if texts:
        yield b"".join(texts)
    if not frame.eof:
        raise _truncated(path, "zstd")


def _truncated(path: str, name: str) -> SourceError:
    return SourceError(path, f"input ends early: the {name} stream is cut off; copy it again")


def _damaged(path: str, name: str, reason: str, num_before: int) -> SourceError:
    if num_before:
        return SourceError(path, f"bytes after the {name} stream are not {name} ({reason})")
    return SourceError(path, f"is not {name}, or is damaged ({reason}); copy it again")


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
    for body in _bodies(path, MAX_LINE_BYTES, hashed.update):
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
    path: str, todo: Ranges, batch_rows: int, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[list[int], list[bytes | None]]]:
    r"""Yield the wanted lines as (row numbers, lines without `\n`), at most `batch_rows` a time.

    Blocks without a wanted line are counted, not split; nothing is read after the last one.

    Raises:
        SourceError: As `text_blocks`, or the file has no such row. All lines before were yielded.
    """
    wanted = _wanted(path, todo, max_line_bytes)
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
    for body in _bodies(path, MAX_LINE_BYTES):
        yield from _split(body, MAX_LINE_BYTES)


def _wanted(path: str, todo: Ranges, max_line_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    first = 0
    left = list(reversed(todo.spans))
    for body in _bodies(path, max_line_bytes) if left else ():
        stop = first + (1 if body is None else body.count(b"\n") + 1)
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
    if left:
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
    path: str, max_line_bytes: int, on_raw: Callable[[bytes], object] | None = None
) -> Iterator[bytes | None]:
    r"""Yield runs of whole lines, without the last one's `\n`; None stands for one long line."""
    held: list[bytes] = []
    held_bytes = 0
    is_open = False
    for block in text_blocks(path, on_raw):
        cut = block.rfind(b"\n")
        if cut >= 0:
            first = block.find(b"\n")
            if held_bytes + first > max_line_bytes:
                yield None
                if first < cut:
                    yield block[first + 1 : cut]
            else:
                yield b"".join([*held, block[:cut]])
            held, held_bytes, block = [], 0, block[cut + 1 :]  # noqa: PLW2901 - its open end
        held_bytes += len(block)
        held = [*held, block] if held_bytes <= max_line_bytes else []
        is_open = held_bytes > 0
    if is_open:
        yield b"".join(held) if held_bytes <= max_line_bytes else None
