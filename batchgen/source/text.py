r"""Bytes to physical lines of text, plain or compressed, in bounded memory.

A physical line ends at `\n` or at the end of the file; a trailing newline does not begin another
line. A byte order mark at the very start belongs to no line. A line over `MAX_LINE_BYTES` keeps
its place and its number but not its content: it is None. Nothing here knows what a line holds.

Lines are UTF-8. Text in another encoding is translated as it comes in; what cannot be translated
makes its line no UTF-8 either, so that it is that line's error and no other's.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import zlib
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from functools import partial
from typing import IO, TYPE_CHECKING, NamedTuple

import pyarrow as pa

from batchgen.core.errors import SourceError
from batchgen.core.records import Ranges
from batchgen.job.model import is_url
from batchgen.source.files import InputStat, open_input, stat_input

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from batchgen.source.columns import Kinds

    OnRows = Callable[[bytes], object] | None
    """Called with the digests of rows that follow each other, `DIGEST_BYTES` each."""
    OnBlock = Callable[[], object]
    """Called now and then while a file is read; what it raises ends the work."""

BLOCK_BYTES = 4 << 20

BOM = b"\xef\xbb\xbf"


def compression_of(path: str) -> str | None:
    """`gzip`, `zstd` or None, by the name's suffix alone."""
    if path.endswith(".gz"):
        return "gzip"
    return "zstd" if path.endswith((".zst", ".zstd")) else None


def is_seekable(path: str, encoding: str | None = None) -> bool:
    """Whether a read can begin at any byte: of a local file of UTF-8 that is not compressed.

    A URL's could too, by most protocols; but its state is not always told, and each process
    that reads it would first have to fetch all that comes before its rows.
    """
    return encoding is None and compression_of(path) is None and not is_url(path)


def text_blocks(
    path: str,
    on_raw: Callable[[bytes], object] | None = None,
    start: int = 0,
    encoding: str | None = None,
) -> Iterator[bytes]:
    """Yield the content as UTF-8, without the byte order mark, in non-empty blocks.

    Args:
        path: Local path or URL; its suffix tells the compression.
        on_raw: Called with every raw block as it is read; of plain files, that is just before
            the block is yielded.
        start: Raw byte to begin at, of an `is_seekable` file.
        encoding: Python's name of the text's encoding; None: UTF-8.

    Raises:
        SourceError: The content is not what the suffix says, is damaged or ends early.
    """
    compression = compression_of(path)
    is_start = start == 0
    with open_input(path) as file:
        if start:
            file.seek(start)
        raw = _Raw(path, file, on_raw)
        blocks = (
            iter(partial(raw.read, BLOCK_BYTES), b"")
            if compression is None
            else _unpack(raw, compression)
        )
        for block in blocks if encoding is None else _to_utf8(blocks, encoding):
            if is_start:
                is_start = False
                block = block.removeprefix(BOM)  # noqa: PLW2901 - the same block, shorter
            if block:
                yield block


class _Raw:
    """A file as gzip and pyarrow read it, telling each block that passes."""

    closed = False

    def __init__(
        self, path: str, file: IO[bytes], on_raw: Callable[[bytes], object] | None
    ) -> None:
        self.path = path
        self.num_bytes = 0
        self._file = file
        self._on_raw = on_raw

    def close(self) -> None:
        """Leave the file open: it is closed by who opened it."""

    def read(self, num_bytes: int = -1) -> bytes:
        """Read at most so many bytes; none at the end."""
        try:
            block = self._file.read(num_bytes)
        except OSError as error:
            raise SourceError(self.path, f"cannot be read: {error.strerror or error}") from error
        if block and self._on_raw is not None:
            self._on_raw(block)
        self.num_bytes += len(block)
        return block


def _unpack(raw: _Raw, compression: str) -> Iterator[bytes]:
    """Decompress, through members, frames and padding; both readers bound what they hold."""
    unpacked: IO[bytes]
    try:
        if compression == "gzip":
            unpacked = gzip.GzipFile(fileobj=raw)  # type: ignore[call-overload]
        else:
            unpacked = pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression)
        while block := unpacked.read(BLOCK_BYTES):
            yield block
    except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
        if not isinstance(error, EOFError) and "Truncated" not in str(error):
            text = f"is not {compression}, or is damaged, or more follows it ({error})"
            raise SourceError(raw.path, f"{text}; copy it again") from error
        is_cut = True
    else:
        is_cut = not raw.num_bytes
    if is_cut:
        text = f"input ends early: the {compression} stream is cut off; copy it again"
        raise SourceError(raw.path, text)


_WRONG = "\udcff"
"""Stands for what cannot be decoded: a character that is none, in no encoding."""


def _to_utf8(blocks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("batchgen.wrong")
    for block in blocks:
        yield decoder.decode(block).encode("utf-8", "surrogatepass")
    yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")


def _wrong(error: UnicodeError) -> tuple[str, int]:
    if isinstance(error, UnicodeDecodeError):
        return _WRONG, error.end
    raise error


codecs.register_error("batchgen.wrong", _wrong)


def why_not_utf8(line: bytes, encoding: str | None) -> str | None:
    """Say what is wrong with a line that is not text; None if it is."""
    try:
        line.decode()
    except UnicodeDecodeError as bad:
        if encoding:
            return f"not {encoding}"
        return f"not UTF-8, byte {bad.start + 1} of the line; see input.encoding"
    return None


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
    columns: Mapping[str, Kinds] | None = None
    """Of JSONL: what each key holds."""


def scan_blocks(
    path: str, on_text: Callable[[bytes], object] = len, encoding: str | None = None
) -> Scan:
    """Count the physical lines and hash the raw bytes, in one pass.

    Args:
        path: Local path or URL.
        on_text: Called with every decompressed block.
        encoding: See `text_blocks`.

    Raises:
        SourceError: As `text_blocks`.
    """
    hashed = hashlib.sha256()
    num_rows = 0
    last = b"\n"
    for block in text_blocks(path, hashed.update, encoding=encoding):
        on_text(block)
        num_rows += block.count(b"\n")
        last = block[-1:]
    return Scan(num_rows + (last != b"\n"), hashed.hexdigest())


def scan_lines(
    path: str,
    on_rows: OnRows = None,
    on_lines: Callable[[int, list[bytes | None]], object] = lambda row, lines: None,
    encoding: str | None = None,
) -> Scan:
    """As `scan_blocks`, telling of each line as well.

    Args:
        path: Local path or URL.
        on_rows: Called with the digests of lines that follow each other, `DIGEST_BYTES` each.
        on_lines: Called with the number of a row and the lines from it on, none for a long stretch
            of blank ones.
        encoding: See `text_blocks`.

    Raises:
        SourceError: As `text_blocks`.
    """
    hashed = hashlib.sha256()
    num_rows = 0
    for body, _ in _bodies(path, MAX_LINE_BYTES, hashed.update, encoding=encoding):
        if num_blank := blank_lines(body):
            on_lines(num_rows, [])
            if on_rows is not None:
                for at in range(0, num_blank, _BLANK_DIGESTS):
                    on_rows(_BLANK_DIGEST * min(num_blank - at, _BLANK_DIGESTS))
            num_rows += num_blank
            continue
        lines = lines_of(body)
        for at in range(0, len(lines), _SCAN_LINES):
            some = lines[at : at + _SCAN_LINES]
            on_lines(num_rows + at, some)
            if on_rows is not None:
                on_rows(b"".join(map(_digest, some)))
        num_rows += len(lines)
    return Scan(num_rows, hashed.hexdigest())


_BLANK_DIGESTS = 1 << 16
_BLANK_DIGEST = hashlib.sha256().digest()[:DIGEST_BYTES]
_SCAN_LINES = 256
"""Lines looked at together: so few that the processor's cache holds them."""


def num_lines_of(body: bytes | None) -> int:
    """Count the lines of a run."""
    return 1 if body is None else body.count(b"\n") + 1


def blank_lines(body: bytes | None) -> int:
    """Count the lines of a run that holds nothing; 0 for one that does."""
    return num_lines_of(body) if body is not None and (not body or body.isspace()) else 0


def _digest(line: bytes | None) -> bytes:
    """Of a line that is not kept: `NO_DIGEST`, which is no line's."""
    if not line:
        return NO_DIGEST if line is None else _BLANK_DIGEST
    return hashlib.sha256(line).digest()[:DIGEST_BYTES]


def digest_prefix(path: str, size_bytes: int, on_block: OnBlock = int) -> str:
    """Hash the first `size_bytes` raw bytes as a scan does the whole file.

    Raises:
        SourceError: The file is shorter, or cannot be read.
    """
    hashed = hashlib.sha256()
    left = size_bytes
    with open_input(path) as raw:
        while left and (block := raw.read(min(left, BLOCK_BYTES))):
            on_block()
            hashed.update(block)
            left -= len(block)
    if left:
        raise SourceError(path, f"has {size_bytes - left} bytes, expected at least {size_bytes}")
    return hashed.hexdigest()


class Lines(NamedTuple):
    """Some lines of a file, without their line ends."""

    rows: list[int]
    """Their numbers, ascending."""
    lines: list[bytes | None]
    blank: Ranges
    """Further lines of the same file, behind these, that hold nothing."""


def read_lines(
    path: str,
    todo: Ranges,
    batch_rows: int,
    max_line_bytes: int = MAX_LINE_BYTES,
    indexes: LineIndexes | None = None,
    encoding: str | None = None,
) -> Iterator[Lines]:
    """Yield the wanted lines, at most `batch_rows` a time and about `MAX_BATCH_BYTES`.

    Blocks without a wanted line are counted, not split; nothing is read after the last one. Of an
    `is_seekable` file, what lies before an entry of its index and is not wanted is not read either.
    Long stretches of blank lines are told as one.

    Raises:
        SourceError: As `text_blocks`, or the file has no such row. All lines before were yielded.
    """
    is_known = indexes is not None and is_seekable(path, encoding)
    places = indexes.of(path) if indexes is not None and is_known else LineIndex()
    held = Lines([], [], Ranges())
    failure: SourceError | None = None
    try:
        for wanted, lines in _wanted(path, todo, max_line_bytes, places, encoding):
            if lines is None:
                yield held._replace(blank=Ranges([(wanted.start, wanted.stop)]))
                held = Lines([], [], Ranges())
                continue
            at = 0
            while at < len(wanted):
                stop = at + _fitting(lines, at, batch_rows - len(held.rows))
                held.rows.extend(wanted[at:stop])
                held.lines.extend(lines[at:stop])
                at = stop
                if len(held.rows) >= batch_rows or _size(held.lines) >= MAX_BATCH_BYTES:
                    yield held
                    held = Lines([], [], Ranges())
    except SourceError as error:
        failure = error
    if held.rows:
        yield held
    if failure is not None:
        raise failure


def _size(lines: list[bytes | None]) -> int:
    return sum(len(line) for line in lines if line is not None)


def _fitting(lines: list[bytes | None], start: int, num: int) -> int:
    """How many lines from `start` on go into a batch, at most `num`; at least one."""
    num = min(num, len(lines) - start)
    while num > 1 and _size(lines[start : start + num]) > MAX_BATCH_BYTES:
        num //= 2
    return num


def iter_bodies(path: str, encoding: str | None = None) -> Iterator[bytes | None]:
    """Yield runs of whole lines, see `lines_of`; None stands for one long line.

    Raises:
        SourceError: As `text_blocks`.
    """
    return (body for body, _ in _bodies(path, MAX_LINE_BYTES, encoding=encoding))


def _wanted(
    path: str, todo: Ranges, max_line_bytes: int, places: LineIndex, encoding: str | None
) -> Iterator[tuple[range, list[bytes | None] | None]]:
    """Yield wanted rows and their lines, None for blank ones."""
    left = list(reversed(todo.spans))
    while left:
        first, offset = places.before(left[-1][0])
        for body, after in _bodies(path, max_line_bytes, start=offset, encoding=encoding):
            stop = first + num_lines_of(body)
            places.add(stop, after)
            if left[-1][0] < stop:
                lines = None if blank_lines(body) else lines_of(body, max_line_bytes)
                while left and left[-1][0] < stop:
                    start, end = left.pop()
                    if end > stop:
                        left.append((stop, end))
                    rows = range(start, min(end, stop))
                    yield rows, lines and lines[start - first : rows.stop - first]
                if not left:
                    return
            first = stop
            if places.before(left[-1][0])[0] > first:
                break  # There is an entry between here and the next wanted row.
        else:
            raise SourceError(path, f"has {first} rows, expected at least {todo.spans[-1][1]}")


def lines_of(body: bytes | None, max_line_bytes: int = MAX_LINE_BYTES) -> list[bytes | None]:
    """Split a run of lines."""
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
    encoding: str | None = None,
) -> Iterator[tuple[bytes | None, int]]:
    r"""Yield runs of whole lines, without the last one's `\n`; None stands for one long line.

    With each, the raw byte at which the next one begins; it says nothing of a file that is
    not `is_seekable`.
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

    for block in text_blocks(path, pass_on, start, encoding):
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
