"""The seam that every input format fits, and what a read needs to know.

A format is a handful of functions over paths, gathered in a `Reader`. Readers keep no state
between calls; what the plan froze comes in, rows go out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import pyarrow as pa

    from batchgen.core.ranges import Ranges
    from batchgen.core.records import RowBatch
    from batchgen.source.marks import Marks


@dataclass(frozen=True, slots=True)
class Scan:
    """What one pass over a file finds; the plan freezes it."""

    num_rows: int
    """Physical rows: lines of JSONL with blank and bad ones, records of CSV, rows of Parquet."""
    digest: str
    """sha256 of all raw bytes, compressed ones as they are."""


@dataclass(frozen=True, slots=True)
class ReadSpec:
    """How rows are to be read; fixed at plan time."""

    columns: pa.Schema
    """Every column of the input with its planned type."""
    carried: Sequence[str]
    """Names of the columns that go to the output, in that order."""
    needed: frozenset[str]
    """Names of the columns that templates read."""
    where: str | None = None
    """SQL expression over the columns; rows for which it is not true are skipped."""
    batch_rows: int = 1024
    marks: Marks | None = None
    """What earlier reads learnt, for a process that reads a file in many pieces; the rows that
    come are the same with it and without."""


class Reader(Protocol):
    """One input format."""

    def sniff(self, path: str) -> None:
        """Refuse a file that is clearly not this format, having read its beginning.

        Raises:
            SourceError: With what it looks like, and what to do.
        """

    def columns(self, paths: Sequence[str], types: Mapping[str, str]) -> pa.Schema:
        """Decide every column's name and type; `types` overrides by name.

        Args:
            paths: At least one.
            types: Column name -> type word, see `columns.parse_field`.

        Raises:
            ConfigError: A type word is unknown.
            SourceError: Files disagree, names repeat, or `types` names an unknown column.
        """

    def scan(self, path: str, on_rows: Callable[[bytes], object] | None = None) -> Scan:
        """Count physical rows and hash the content in one pass.

        Args:
            path: Of the file.
            on_rows: Called with the digests of rows that follow each other, see `row_digests`;
                never by a format whose rows are not to be told apart without parsing them.

        Raises:
            SourceError: The file ends early or cannot be decoded as what its name says.
        """

    def digest_prefix(self, path: str, size_bytes: int) -> str:
        """Hash as `scan` does, of only the first `size_bytes` raw bytes."""

    def read(self, path: str, segment: int, todo: Ranges, spec: ReadSpec) -> Iterator[RowBatch]:
        """Yield the rows of `todo`, ascending, each either in `rows` or in `skipped`, once.

        Batches hold at most `spec.batch_rows` rows; their `carried` has the columns
        `spec.carried`. A bad row is an entry in `errors`; `carried` has what of it could be
        read (its id, say, beside a column that does not fit) and nulls for the rest.

        Raises:
            SourceError: The file ends before the last row of `todo`, or cannot be decoded.
        """

    def is_seekable(self, path: str) -> bool:
        """Whether reading a few rows late in this file costs about what it yields.

        For files of lines that is so with `ReadSpec.marks`, once the rows before were passed.

        Raises:
            SourceError: The file cannot be read, where that has to be known.
        """
