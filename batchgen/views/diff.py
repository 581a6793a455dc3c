"""What changed between two snapshots: which rows, and how the labels moved.

Rows are paired first: by the columns of `--on`, or by where they stand in the input. Beside the
equal rows that `matching` finds, rows between the same neighbours are paired if they are as many
as before: they were edited in place. Of files without digests of rows (CSV, Parquet) that
changed, the first row is paired with the first. What is left came or went.

Pairs are compared by hashes of their columns: of each row its key, two hashes and its labels are
kept, however long its texts are. They are spread over temporary files by their keys, so that both
rows of a pair are in one, and memory holds one such file of each snapshot at a time. A hash has 64
bits and is compared within a pair only: one change in 2^64 goes unseen.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from batchgen.core.errors import OutputError
from batchgen.core.places import Root
from batchgen.core.runtime import command
from batchgen.pipeline.publish import total_variation
from batchgen.storage.remote import storage_at
from batchgen.store.ledger import Ledger
from batchgen.store.snapshot import find_snapshot
from batchgen.views.sides import (
    ADDED,
    ANSWER_CHANGED,
    AT,
    CLASS,
    INPUT_CHANGED,
    KINDS,
    OLD,
    PLACE,
    POSITION,
    REMOVED,
    SAME,
    Both,
    LabelMoves,
    Side,
    added_moves,
    label_name,
    moves_in,
    short,
)


@dataclass(frozen=True, slots=True)
class Diff:
    """Two snapshots, compared."""

    output: str
    old: int
    new: int
    """Numbers of the snapshots."""
    matched_by: str
    """The columns of `--on`, or `position`: see the module."""
    num_old: int
    num_new: int
    num_same: int
    num_added: int
    num_removed: int
    num_input_changed: int
    """Rows with another value in a carried column, whatever became of the answer."""
    num_answer_changed: int
    """Rows with the same input and another answer, status, verdict or error type."""
    num_without_key: tuple[int, int]
    """Old and new rows with a null in a column of `--on`: not compared."""
    columns_came: Sequence[str] = ()
    columns_went: Sequence[str] = ()
    columns_retyped: Sequence[str] = ()
    """In both, of another type: not compared."""
    labels: Sequence[LabelMoves] = ()
    examples: Sequence[Mapping[str, Any]] = field(default_factory=list)
    """Changed rows: `where`, `changed` (input or answer), `columns` name -> [old, new]."""

    @property
    def num_changed(self) -> int:
        """Rows that are in both and differ."""
        return self.num_input_changed + self.num_answer_changed

    @property
    def paired_by(self) -> str:
        """What tells which row is which, for people."""
        is_by_place = self.matched_by == POSITION
        return "equal content and place in the input" if is_by_place else self.matched_by

    def example_lines(self) -> list[str]:
        """Write the examples for a person."""
        lines = []
        for example in self.examples:
            lines.append(f"--- {example['where']}: {example['changed']} changed")
            lines += [
                f"{name:24} {short(old)} -> {short(new)}"
                for name, (old, new) in example["columns"].items()
            ]
        return lines

    @property
    def may_hide_edits(self) -> bool:
        """Whether some of the rows that came and went may be edited ones, which no key tells."""
        return self.matched_by == POSITION and self.num_added > 0 and self.num_removed > 0


def diff(
    root: Root,
    numbers: tuple[int, int] | None = None,
    *,
    on: Sequence[str] = (),
    num_examples: int = 5,
) -> Diff:
    """Compare two snapshots under an output folder.

    Args:
        root: The output folder.
        numbers: Old and new; None: the two newest.
        on: Columns whose values name a row; none: equal rows are paired, and rows between them
            that are as many as before; of CSV and Parquet files that changed, by row number.
        num_examples: At most so many changed rows are shown in full.

    Raises:
        OutputError: There are no such snapshots, or they cannot be read.
        ConfigError: A column of `on` does not name rows.
    """
    ledger = Ledger(storage_at(root))
    old, new = numbers or _two_newest(ledger)
    try:
        both = Both(Side(ledger, old), Side(ledger, new), on)
        return compared(root, both, num_examples)
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError) as error:
        why = str(error).splitlines()[0]
        msg = f"{root}: a snapshot cannot be read ({why}); `{command('verify')}` tells more"
        raise OutputError(msg) from error


def _two_newest(ledger: Ledger) -> tuple[int, int]:
    numbers = [manifest.number for manifest in ledger.manifests()]
    if len(numbers) < 2:
        newest = find_snapshot(ledger, None).number
        msg = f"{ledger.storage.where}: snapshot {newest} is the only one, expected two to compare"
        raise OutputError(msg)
    return numbers[-2], numbers[-1]


class _Found:
    """What pairs come to, added up."""

    def __init__(self, both: Both, num_examples: int) -> None:
        self._both = both
        self._num_examples = num_examples
        self._moves: list[list[pl.DataFrame]] = [[] for _ in both.labels]
        self._changed: list[pl.DataFrame] = []
        self.num: Counter[int] = Counter()
        """Class -> rows."""
        self.num_named = [0, 0]
        """Old and new rows that could be compared."""

    def add(self, pairs: pl.DataFrame) -> None:
        """Add some."""
        self.num.update(dict(pairs[CLASS].value_counts().iter_rows()))
        for side, name in enumerate((AT + OLD, AT)):
            self.num_named[side] += pairs[name].count()
        in_both = pairs.lazy().filter(pl.col(CLASS) <= INPUT_CHANGED)
        for number, moves in enumerate(self._moves):
            moves.append(moves_in(in_both, label_name(number)))
        changed = pairs.filter(pl.col(CLASS).is_in(list(KINDS)))
        self._changed = [pl.concat([*self._changed, changed]).bottom_k(self._num_examples, by=AT)]

    def moves(self, number: int) -> LabelMoves:
        """How a column of labels moved."""
        both, label = self._both, self._both.labels[number]
        last, now = (
            dict(side.manifest.tally[side.plan.prefix + label]) for side in (both.old, both.new)
        )
        column = both.new.plan.prefix + label
        return LabelMoves(
            column, last, now, total_variation(now, last), added_moves(self._moves[number])
        )

    def examples(self) -> list[dict[str, Any]]:
        """Read the first changed rows, and what differs in them."""
        both = self._both
        names = [(both.old.columns[key], both.new.columns[key]) for key in both.shared]
        found = []
        for row in (row for rows in self._changed for row in rows.sort(AT).iter_rows(named=True)):
            new, old = both.new.row(row[AT]), both.old.row(row[AT + OLD])
            where = ", ".join(f"{name} = {new[name]!r}" for name in both.on)
            columns = {name: [old[was], new[name]] for was, name in names if old[was] != new[name]}
            found.append(
                {
                    "where": where or both.new.where(row[PLACE]),
                    "changed": KINDS[row[CLASS]],
                    "columns": columns,
                }
            )
        return found


def compared(
    root: Root, both: Both, num_examples: int, on_pairs: Callable[[pl.DataFrame], object] = len
) -> Diff:
    """Pair the rows of two snapshots and sum up.

    Args:
        root: Output folder that the result names.
        both: The snapshots.
        num_examples: At most so many changed rows are shown in full.
        on_pairs: Gets the pairs, piece by piece, see `Both.pairs`.
    """
    found = _Found(both, num_examples)
    with tempfile.TemporaryDirectory(prefix="batchgen-diff-") as folder:
        for pairs in both.pairs(Path(folder)):
            found.add(pairs)
            on_pairs(pairs)
    return _summed(root, both, found)


def _summed(root: Root, both: Both, found: _Found) -> Diff:
    num = found.num
    was, now = both.old.columns, both.new.columns
    manifests, num_rows = zip(
        *((side.manifest, side.num_rows) for side in (both.old, both.new)), strict=True
    )
    return Diff(
        output=str(root),
        old=manifests[0].number,
        new=manifests[1].number,
        matched_by=", ".join(both.on) or POSITION,
        num_old=num_rows[0],
        num_new=num_rows[1],
        num_same=num[SAME],
        num_added=num[ADDED],
        num_removed=num[REMOVED],
        num_input_changed=num[INPUT_CHANGED],
        num_answer_changed=num[ANSWER_CHANGED],
        num_without_key=(num_rows[0] - found.num_named[0], num_rows[1] - found.num_named[1]),
        columns_came=[name for key, name in now.items() if key not in was],
        columns_went=[name for key, name in was.items() if key not in now],
        columns_retyped=[
            name for key, name in now.items() if key in was and key not in both.shared
        ],
        labels=[found.moves(number) for number in range(len(both.labels))],
        examples=found.examples(),
    )
