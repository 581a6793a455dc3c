"""A published Parquet file: hashed while it is written, as a whole and by row group.

The whole file's hash proves it; a row group's says what can still be believed of a file that has
been damaged since. Page checksums alone do not: they leave page headers and the footer out.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from batchgen.store.result_files import Chunk

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pyarrow as pa

    from batchgen.storage import LocalStorage, PendingFile


class HashedParquet:
    """Writes one file under its name; a context manager, and nothing is there until it is left."""

    def __init__(
        self,
        storage: LocalStorage,
        name: str,
        schema: pa.Schema,
        options: Mapping[str, Any],
    ) -> None:
        """Begin.

        Args:
            storage: Where the file goes.
            name: Its name; must not exist.
            schema: With the metadata for the footer.
            options: For `pq.ParquetWriter`.

        Raises:
            StorageError: The temp file cannot be created.
        """
        self._name = name
        self._schema = schema
        self._pending = storage.begin(name)
        self._out = _HashedFile(self._pending)
        self._writer = pq.ParquetWriter(self._out, schema, write_page_checksum=True, **options)
        self.num_rows = 0
        self.chunks: list[Chunk] = []
        """One a row group and, once the file is complete, one for the footer."""

    def __enter__(self) -> HashedParquet:
        return self

    def write(self, rows: pa.Table) -> None:
        """Append a row group."""
        self._writer.write_table(rows.select(self._schema.names).cast(self._schema))
        self.num_rows += rows.num_rows
        self.chunks.append(self._out.cut())

    def note(self, metadata: Mapping[str, str]) -> None:
        """Add to the footer what was not known at the beginning."""
        self._writer.add_key_value_metadata(dict(metadata))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Closing writes a valid footer, also after an error: only `commit` makes a file of it.
        try:
            self._writer.close()
            self.chunks.append(self._out.cut())
        except BaseException:
            self._pending.discard()
            raise
        if kind is None:
            self._pending.commit()
        else:
            self._pending.discard()

    def entry(self) -> dict[str, Any]:
        """The file's line in the manifest."""
        return {
            "name": self._name,
            "num_rows": self.num_rows,
            "size_bytes": self._out.size_bytes,
            "sha256": self._out.digest.hexdigest(),
        }


class _HashedFile:
    """The few file methods that pyarrow's writer calls, hashing what passes."""

    def __init__(self, pending: PendingFile) -> None:
        self._pending = pending
        self._since_cut = hashlib.sha256()
        self.digest = hashlib.sha256()
        self.size_bytes = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        """Append."""
        self._pending.write(data)
        self.digest.update(data)
        self._since_cut.update(data)
        self.size_bytes += len(data)
        return len(data)

    def cut(self) -> Chunk:
        """End a chunk."""
        digest, self._since_cut = self._since_cut, hashlib.sha256()
        return Chunk(self.size_bytes, digest.hexdigest())

    def flush(self) -> None:
        """Nothing waits here; durability comes with the commit."""

    def close(self) -> None:
        """The pending file is closed by its commit."""
        self.closed = True

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size_bytes

    def seekable(self) -> bool:
        """Written front to back only."""
        return False

    def readable(self) -> bool:
        """Written only."""
        return False

    def writable(self) -> bool:
        """Written only."""
        return True
