"""One snapshot as a table to be compared: where each row stands, hashes of it, and its labels."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import OutputError
from batchgen.store import snapshots
from batchgen.store.parts import ATTEMPTS, RESULT_FIELDS, ROW, SEGMENT, VERDICT
from batchgen.store.result_files import scan

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

    from batchgen.store.ledger import Ledger

AT, KEY, INPUT, ANSWER = "at", "key", "input", "answer"
"""Columns of `Side.rows`: number of the row among the published ones, where it stands among the
planned ones, and hashes of what is compared."""
_TOLD = {"status", "verdict", "error_type"}
"""Compared of what batchgen tells of a row; the rest differs from run to run."""
_MEASURED = {"probabilities", "logprobs"}
"""Not compared either: the last digits differ where the same answer is computed again."""


def label_name(number: int) -> str:
    """Of a column of labels in `Side.rows`."""
    return f"label_{number}"


def key_name(number: int) -> str:
    """Of a column in `Side.rows` that names rows."""
    return f"on_{number}"


class Side:
    """A snapshot, as it lies on the disk; nothing is held open."""

    def __init__(self, ledger: Ledger, number: int) -> None:
        """Look at its columns; no row is read.

        Raises:
            OutputError: There is no such snapshot.
        """
        self.manifest = snapshots.snapshot(ledger, number)
        self.plan = ledger.plan(number)
        storage = ledger.storage
        self.frame = scan(storage, [file.name for file in self.manifest.files])
        """The published rows."""
        index = self.manifest.index
        self._index = None if index is None else scan(storage, [index.name])
        self.schema = self.frame.collect_schema()
        self.prefix = self.plan.prefix
        self.carried = set(self.plan.carried)
        self.starts = [0, *accumulate(segment.num_rows for segment in self.plan.segments)]
        """Key of the first row of each file."""
        self.labels = {
            name.removeprefix(self.prefix): self._label(name)
            for name in self.manifest.tally
            if name not in {VERDICT, ATTEMPTS}
        }
        """Columns of labels, without the prefix, and how to read them."""

    @property
    def ours(self) -> dict[str, str]:
        """Compared columns that are not the input's: name without the prefix -> name."""
        skipped = {field.name for field in RESULT_FIELDS} - _TOLD
        names = [name for name in self.schema if name not in self.carried]
        found = {name.removeprefix(self.prefix): name for name in names}
        return {
            base: name
            for base, name in found.items()
            if base not in skipped and not (base in _MEASURED and self.schema[name].is_nested())
        }

    @property
    def compared(self) -> dict[tuple[str, str], str]:
        """All columns that are compared, by what they are, whatever the prefix."""
        inputs = {("input", name): name for name in self.plan.carried}
        return inputs | {("ours", base): name for base, name in self.ours.items()}

    def _label(self, name: str) -> pl.Expr:
        """A label as text, null unless the row is ok; several of a row as one text.

        Raises:
            OutputError: The snapshot has no such column.
        """
        import polars as pl

        column, *fields = self._path(name)
        value = pl.col(column)
        for at in fields:
            value = value.struct.field(at)
        kind = self.frame.select(value).collect_schema().dtypes()[0]
        if isinstance(kind, pl.List):
            value = value.cast(pl.List(pl.String)).list.join(", ", ignore_nulls=True)
        is_ok = pl.col(f"{self.prefix}status") == "ok"
        return pl.when(is_ok).then(value.cast(pl.String))

    def _path(self, name: str) -> Sequence[str]:
        """A column and fields of structs in it; names may hold dots."""
        import polars as pl

        head, dots = name, ""
        while head not in self.schema and "." in head:
            head, _, last = head.rpartition(".")
            dots = f"{last}.{dots}" if dots else last
        kind = self.schema.get(head)
        if not dots and kind is not None:
            return [head]
        if isinstance(kind, pl.Struct) and dots in {entry.name for entry in kind.fields}:
            return [head, dots]
        msg = f"snapshot {self.manifest.number} lacks the column {name!r} that its manifest names"
        raise OutputError(msg)

    def rows(
        self, columns: tuple[Sequence[str], Sequence[str]], labels: Sequence[str], on: Sequence[str]
    ) -> pl.LazyFrame:
        """What is compared of each row: `AT`, `KEY` or the columns of `on`, hashes, labels.

        Args:
            columns: Of the input, and ours, by their names in this snapshot.
            labels: Names without the prefix.
            on: Columns that name a row, as `on_0`, `on_1`; none: `KEY`.
        """
        import polars as pl

        found = {INPUT: columns[0], ANSWER: columns[1]}
        hashes = [
            (pl.struct(names).hash() if names else pl.lit(0, pl.UInt64)).alias(name)
            for name, names in found.items()
        ]
        texts = [
            self.labels[label].cast(pl.Categorical).alias(label_name(number))
            for number, label in enumerate(labels)
        ]
        keys = [pl.col(name).alias(key_name(number)) for number, name in enumerate(on)]
        rows = self.frame.select(*keys, *hashes, *texts)
        if not on:
            rows = pl.concat([self.ordinals(), rows], how="horizontal")
        return rows.with_row_index(AT)

    def ordinals(self) -> pl.LazyFrame:
        """The planned row that each published row is, ascending: `KEY`.

        Raises:
            OutputError: The snapshot has no index.
        """
        import polars as pl

        if self._index is None:
            msg = f"snapshot {self.manifest.number} has no index of rows; name them with --on"
            raise OutputError(msg)
        numbers = list(range(len(self.plan.segments)))
        start = pl.col(SEGMENT).replace_strict(
            numbers, self.starts[:-1], default=0, return_dtype=pl.Int64
        )
        return self._index.select((start + pl.col(ROW)).alias(KEY))

    def where(self, at: int) -> str:
        """The file and the row of the input that a published row is."""
        assert self._index is not None  # noqa: S101 - asked only where rows were paired by it
        segment, row = self._index.slice(at, 1).collect().row(0)
        return f"{self.plan.segments[segment].path} row {row}"

    def row(self, at: int) -> dict[str, Any]:
        """A published row in full."""
        return self.frame.slice(at, 1).collect().row(0, named=True)
