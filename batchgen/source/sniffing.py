"""What a file is, going by its first bytes, whatever its name says."""

from __future__ import annotations

import re

from batchgen.core.errors import SourceError
from batchgen.source.blocks import GZIP_MAGIC, ZSTD_MAGIC, compression_of
from batchgen.source.files import open_input

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
