"""Rows spread over temporary files, so that rows that belong together are in one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from pathlib import Path

    import polars as pl


class Buckets:
    """Rows on the disk, by number."""

    def __init__(self, folder: Path, schema: pl.Schema) -> None:
        """Begin, in a folder that is made."""
        folder.mkdir()
        self.numbers: set[int] = set()
        """Of buckets that have rows."""
        self._folder = folder
        self._schema = schema

    def add(self, rows: pl.DataFrame, number: pl.Expr) -> None:
        """Append rows to the buckets that `number` tells."""
        parts = rows.with_columns(number.cast(int).alias("bucket")).partition_by(
            "bucket", as_dict=True, include_key=False
        )
        for (bucket,), some in parts.items():
            self.numbers.add(bucket)
            with (self._folder / str(bucket)).open("ab") as file:
                some.select(*self._schema).write_ipc_stream(file, compression="lz4")

    def rows(self, number: int) -> pl.DataFrame:
        """Read a bucket."""
        import polars as pl

        found = [pl.DataFrame(schema=self._schema)]
        if number in self.numbers:
            with (self._folder / str(number)).open("rb") as file:
                while file.peek(1):
                    found.append(pl.DataFrame(pa.ipc.open_stream(file).read_all()))
        return pl.concat(found)
