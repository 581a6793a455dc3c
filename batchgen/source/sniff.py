"""A file told by its first bytes: a format, compression or encoding that it should not have."""

from __future__ import annotations

import re

from batchgen.core.errors import SourceError
from batchgen.source.files import open_input
from batchgen.source.text import compression_of, text_blocks

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
PARQUET_MAGIC = b"PAR1"
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # RFC 8878, 3.1.2

_BINARY = {
    PARQUET_MAGIC: "Parquet; name it .parquet",
    b"PARE": "encrypted Parquet, which cannot be read",
    GZIP_MAGIC: "gzip; add .gz to its name",
    ZSTD_MAGIC: "zstd; add .zst to its name",
    b"PK\x03\x04": "a ZIP archive or a spreadsheet; unpack it, or save it as CSV",
    b"BZh": "bzip2; unpack it",
    b"\xfd7zXZ\0": "xz; unpack it",
    b"ARROW1": "an Arrow file; convert it to Parquet",
    b"SQLite format 3\0": "an SQLite database; export it",
}
_UTF_16_OR_32 = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_HEAD_BYTES = 4096
_SIGNS = frozenset(b'"\n\r\t ,;:{}[]0123456789')
"""What any JSONL or CSV has much of, whatever its language."""


def refuse_other_content(path: str, encoding: str | None = None) -> None:
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
    if encoding is not None:
        return
    if compression is None and (looks := binary_looks_like(head)):
        raise SourceError(path, f"is not text: it looks like {looks}")
    found = _other_encoding(next(text_blocks(path), b"")[:_HEAD_BYTES])
    if found is not None:
        text = f'is not UTF-8: it looks like {found.upper()}; set input.encoding = "{found}"'
        raise SourceError(path, text)


def _other_encoding(head: bytes) -> str | None:
    """Name the encoding of text whose characters take two or four bytes, by its first bytes."""
    marked = (name for mark, name in _UTF_16_OR_32.items() if head.startswith(mark))
    if found := next(marked, None):
        return found
    # Without a mark: whatever the language, line ends, quotes and digits have zeros in them, and
    # always on the same side.
    high, low = head[::2].count(0), head[1::2].count(0)
    if high + low < 2 or min(high, low) * 20 > max(high, low):
        is_four = head.count(0) * 2 > len(head) > 0
        return ("utf-32-be" if head[0] == 0 else "utf-32-le") if is_four else None
    # Zeros within UTF-8 are odd characters: there most signs have other neighbors.
    signs, others = (head[1::2], head[::2]) if high > low else (head[::2], head[1::2])
    beside = [other for sign, other in zip(signs, others, strict=False) if sign in _SIGNS]
    if beside.count(0) * 2 <= len(beside):
        return None
    return "utf-16-be" if high > low else "utf-16-le"


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
