"""What tells the rows of a file that changed from those that did not: 16 bytes a row.

    _batchgen/rows/SHA256.bin        of the input file with that content, one digest a physical row

A digest is the first half of the sha256 of a row as it stands in the file. Equal digests are equal
rows, so that a later plan takes their answers over without parsing them. Only that: a digest file
that is gone, torn or damaged makes rows look new, never old.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen.source.text import DIGEST_BYTES
from batchgen.storage import storage_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from batchgen.storage import LocalStorage

FOLDER = "_batchgen/rows"


def name_of(digest: str) -> str:
    """The digest file of an input file with this content hash."""
    return f"{FOLDER}/{digest}.bin"


class DigestFile:
    """Collects the digests of one file while it is scanned; nothing is there until `commit`."""

    def __init__(self, storage: LocalStorage) -> None:
        """Begin.

        Raises:
            StorageError: The temp file cannot be created.
        """
        self._storage = storage
        self._pending = storage.begin(f"{FOLDER}/scan")
        self._error: OSError | None = None
        self._num_bytes = 0

    def add(self, digests: bytes) -> None:
        """Append; an error waits for `commit`, so that readers hear of none but their own."""
        self._num_bytes += len(digests)
        if self._error is None:
            try:
                self._pending.write(digests)
            except OSError as error:
                self._error = error

    def commit(self, digest: str) -> None:
        """Name the file after the content that was scanned; leave none where no row was told.

        Raises:
            StorageError: It cannot be written.
        """
        if self._error is not None:
            self.discard()
            raise storage_error(self._storage.path(FOLDER), self._error) from self._error
        if self._num_bytes:
            self._pending.commit(f"{digest}.bin")
        else:
            self.discard()

    def discard(self) -> None:
        """Drop what was collected."""
        self._pending.discard()


def digest_reader(
    storage: LocalStorage, digest: str, num_rows: int
) -> Callable[[int, int], bytes] | None:
    """What reads the digests of rows `start` to `stop` of a file; None if they are not known.

    Args:
        storage: The output.
        digest: Content hash of the input file.
        num_rows: At least so many rows it must have.
    """
    path = storage.path(name_of(digest))
    try:
        if path.stat().st_size < num_rows * DIGEST_BYTES:
            return None
    except OSError:
        return None

    def read(start: int, stop: int) -> bytes:
        try:
            with path.open("rb") as file:
                file.seek(start * DIGEST_BYTES)
                data = file.read((stop - start) * DIGEST_BYTES)
        except OSError:
            data = b""  # Unknown rows cost work, no more.
        return data.ljust((stop - start) * DIGEST_BYTES, b"\0")

    return read


def blocks(num_rows: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """Start and stop of block after block."""
    for start in range(0, num_rows, block_rows):
        yield start, min(start + block_rows, num_rows)
