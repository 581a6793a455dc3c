r"""Bytes to physical lines of text, plain or compressed, in bounded memory.

A physical line ends at `\n` or at the end of the file; a trailing newline does not begin another
line. A byte order mark at the very start belongs to no line. A line over `MAX_LINE_BYTES` keeps
its place and its number but not its content: it is None. Nothing here knows what a line holds,
but for the first bytes of a file, by which it is told that it is something else.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, TypeVar

from batchgen.core.errors import SourceError
from batchgen.job.model import is_url
from batchgen.source.files import open_input, stat_input

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from batchgen.core.records import Ranges
    from batchgen.source.files import InputStat


BLOCK_BYTES = 4 << 20

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


def is_seekable(path: str) -> bool:
    """Whether a read can begin at any byte: of a local file that is not compressed.

    A URL's could too, by most protocols; but its state is not always told, and each process
    that reads it would first have to fetch all that comes before its rows.
    """
    return compression_of(path) is None and not is_url(path)


def text_blocks(
    path: str, on_raw: Callable[[bytes], object] | None = None, start: int = 0
) -> Iterator[bytes]:
    """Yield the decompressed content, without the byte order mark, in non-empty blocks.

    Args:
        path: Local path or URL; its suffix tells the compression.
        on_raw: Called with every raw block as it is read; of plain files, that is just before
            the block is yielded.
        start: Raw byte to begin at, of an `is_seekable` file.

    Raises:
        SourceError: The content is not what the suffix says, is damaged or ends early. Blocks
            decoded before the damage were yielded.
    """
    unpack = {"gzip": _gunzip, "zstd": _unzstd, None: _plain}[compression_of(path)]
    is_start = start == 0
    with open_input(path) as raw:
        if start:
            raw.seek(start)
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


PARQUET_MAGIC = b"PAR1"
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # RFC 8878, 3.1.2

_BINARY = {
    PARQUET_MAGIC: "Parquet; name it .parquet",
    b"PARE": "encrypted Parquet, which cannot be read",
    GZIP_MAGIC: "gzip; add .gz to its name",
    ZSTD_MAGIC: "zstd; add .zst to its name",
    b"PK\x03\x04": "a ZIP archive or a spreadsheet; unpack or export it",
    b"BZh": "bzip2; unpack it",
    b"\xfd7zXZ\0": "xz; unpack it",
    b"ARROW1": "an Arrow file; convert it to Parquet",
    b"SQLite format 3\0": "an SQLite database; export it",
    b"\xff\xfe": "UTF-16 text; convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8",
}


def refuse_other_content(path: str) -> None:
    """Refuse a text file, plain or compressed, whose first bytes are of something else.

    Raises:
        SourceError: With what it looks like, and what to do.
    """
    with open_input(path) as raw:
        head = raw.read(16)
    compression = compression_of(path)
    if not head:
        return
    if compression == "gzip" and not head.startswith(GZIP_MAGIC):
        raise SourceError(path, "is not gzip, though its name says so; rename or compress it")
    is_zstd = head.startswith(ZSTD_MAGIC) or _ZSTD_SKIPPABLE.match(head)
    if compression == "zstd" and not is_zstd:
        raise SourceError(path, "is not zstd, though its name says so; rename or compress it")
    if compression is None:
        looks = binary_looks_like(head)
        if looks:
            raise SourceError(path, f"is not text: it looks like {looks}")


def binary_looks_like(head: bytes) -> str | None:
    """Name a binary format by its first bytes, with what to do."""
    return next((looks for magic, looks in _BINARY.items() if head.startswith(magic)), None)


def text_looks_like(line: bytes) -> str | None:
    """Name the text format that a first line, which is no JSON object, is typical of."""
    start = line.strip()
    if start.startswith(b"["):
        return "a JSON array"
    if start == b"{":
        return "pretty-printed JSON"
    if start.startswith(b"<"):
        return "XML or HTML"
    is_header = not start.startswith(b"{") and (b"," in start or b"\t" in start)
    return "CSV or TSV" if is_header else None


Item = TypeVar("Item")

MAX_LINE_BYTES = 64 << 20
"""A line longer than this is not kept; 64 MiB is far beyond any context window."""
DIGEST_BYTES = 16
NO_DIGEST = bytes(DIGEST_BYTES)
"""The digest of a row that nothing is known of: equal to no row, itself included."""
MAX_BATCH_BYTES = 32 << 20
"""A batch is handed out once it holds this much, however few its rows."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What one pass over a file finds; the plan freezes it."""

    num_rows: int
    """Physical rows: lines of JSONL with blank and bad ones, records of CSV, rows of Parquet."""
    digest: str
    """sha256 of all raw bytes, compressed ones as they are."""


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
    indexes: LineIndexes | None = None,
) -> Iterator[tuple[list[int], list[bytes | None]]]:
    r"""Yield the wanted lines as (row numbers, lines without `\n`), at most `batch_rows` a time.

    Blocks without a wanted line are counted, not split; nothing is read after the last one. Of an
    `is_seekable` file, what lies before an entry of its index and is not wanted is not read either.

    Raises:
        SourceError: As `text_blocks`, or the file has no such row. All lines before were yielded.
    """
    places = LineIndex() if indexes is None or not is_seekable(path) else indexes.of(path)
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
    path: str, todo: Ranges, max_line_bytes: int, places: LineIndex
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
                break  # There is an entry between here and the next wanted row.
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


EVERY_BYTES = 4 << 20
"""Entries are no closer than this; a read begins at most about this far before its first row."""
MAX_ENTRIES = 1 << 16
"""Of one file, 16 bytes each."""
MAX_FILES = 4096


class LineIndex:
    """Where some lines of a plain file begin, learnt by a read so that later ones start late.

    Entries are ascending, none is beyond what was read so far. Not for several threads at once.
    """

    def __init__(self, every_bytes: int = EVERY_BYTES, max_entries: int = MAX_ENTRIES) -> None:
        self._every = every_bytes
        self._max = max_entries
        self._rows = array("q", [0])
        self._offsets = array("q", [0])

    def __len__(self) -> int:
        return len(self._rows)

    def before(self, row: int) -> tuple[int, int]:
        """Return the last entry at or before this row: its row, and the byte where that begins."""
        at = bisect_right(self._rows, row) - 1
        return self._rows[at], self._offsets[at]

    def add(self, row: int, offset: int) -> None:
        """Note that `row` begins at byte `offset`, unless there is an entry near it or beyond."""
        if offset < self._offsets[-1] + self._every:
            return
        self._rows.append(row)
        self._offsets.append(offset)
        if len(self._rows) > self._max:
            self._rows, self._offsets = self._rows[::2], self._offsets[::2]
            self._every *= 2


class LineIndexes:
    """The line indexes of all files that one process reads; lives as long as its run.

    A file that is not the one that was read before, by size and mtime, starts anew.
    """

    def __init__(
        self,
        every_bytes: int = EVERY_BYTES,
        max_entries: int = MAX_ENTRIES,
        max_files: int = MAX_FILES,
    ) -> None:
        self._bounds = (every_bytes, max_entries)
        self._max_files = max_files
        self._files: dict[str, tuple[InputStat, LineIndex]] = {}

    def of(self, path: str) -> LineIndex:
        """Return the index of this file as it is now, to be read and added to.

        Raises:
            SourceError: Absent or unreadable.
        """
        now = stat_input(path)
        known = self._files.pop(path, None)
        is_known = known is not None and now.is_still(known[0])
        index = known[1] if known is not None and is_known else LineIndex(*self._bounds)
        self._files[path] = (now, index)
        if len(self._files) > self._max_files:
            del self._files[next(iter(self._files))]  # The one unused longest.
        return index
