"""Bytes to blocks of text, plain or compressed, in bounded memory."""

from __future__ import annotations

import zlib
from typing import IO, TYPE_CHECKING

from batchgen.core.errors import SourceError
from batchgen.job.paths import is_url
from batchgen.source.files import open_input

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
