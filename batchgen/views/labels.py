"""How one column of labels moved between two times that rows were answered."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from batchgen.core.runtime import option

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


OLD = "_old"
"""Behind a column's name: that of the old side."""
_SHOWN_MOVES = 20
_SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class LabelMoves:
    """How one column of labels moved."""

    column: str
    before: Mapping[str, int]
    """Label -> ok rows of the old snapshot, all of them."""
    after: Mapping[str, int]
    drift: float | None
    """Total variation distance of the shares, 0 to 1, as in the gate; None: no labels."""
    moves: Sequence[Mapping[str, Any]]
    """`old`, `new`, `num_rows` of rows that are in both, those that stayed included; a label is
    None where the row is an error. Most rows first."""

    @property
    def confusion(self) -> dict[tuple[str, str], int]:
        """Rows by old and new label, of those that have both."""
        return {
            (move["old"], move["new"]): move["num_rows"]
            for move in self.moves
            if move["old"] is not None and move["new"] is not None
        }

    @property
    def agreement(self) -> float | None:
        """Share of the rows with both labels where they are equal; None without such a row."""
        num, num_same = sum(self.confusion.values()), self._num_same
        return num_same / num if num else None

    @property
    def _num_same(self) -> int:
        return sum(num for (old, new), num in self.confusion.items() if old == new)

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa: how far they agree beyond chance, 1 at most; None where chance is all."""
        num = sum(self.confusion.values())
        olds, news = Counter[str](), Counter[str]()
        for (old, new), num_rows in self.confusion.items():
            olds[old] += num_rows
            news[new] += num_rows
        by_chance = sum(olds[label] * news[label] for label in olds)
        if num**2 == by_chance:
            return None
        return (num * self._num_same - by_chance) / (num**2 - by_chance)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, with how far old and new agree."""
        return {**asdict(self), "agreement": self.agreement, "kappa": self.kappa}

    def agreement_line(self) -> str:
        """Write how far they agree for a person."""
        share = "unknown" if self.agreement is None else f"{self.agreement:.1%}"
        kappa = "" if self.kappa is None else f", kappa {self.kappa:.3g}"
        return f"agree    {self.column}: {share} of {sum(self.confusion.values()):,} rows{kappa}"

    def lines(self) -> list[str]:
        """Write it for a person."""
        drift = "unknown" if self.drift is None else f"{self.drift:.3g}"
        before, after = self.before, self.after
        names = sorted(before.keys() | after.keys(), key=lambda name: (-after.get(name, 0), name))
        lines = [f"labels {self.column}, drift {drift}"]
        lines += [
            f"  {name:22} {before.get(name, 0):,} -> {after.get(name, 0):,}" for name in names
        ]
        moved = [move for move in self.moves if move["old"] != move["new"]]
        lines += [
            f"  {move['num_rows']:,} rows: {_label(move['old'])} -> {_label(move['new'])}"
            for move in moved[:_SHOWN_MOVES]
        ]
        if len(moved) > _SHOWN_MOVES:
            lines.append(f"  and {len(moved) - _SHOWN_MOVES} more moves, see {option('--json')}")
        return lines


def _label(name: str | None) -> str:
    return "(no label)" if name is None else name


def counted_moves(pairs: pl.LazyFrame, name: str) -> list[dict[str, Any]]:
    """Count pairs by their labels, see `LabelMoves.moves`.

    Args:
        pairs: Rows that are in both.
        name: The column with the new labels; that of the old ones has `OLD` behind it.
    """
    return added_moves([moves_in(pairs, name)])


def moves_in(pairs: pl.LazyFrame, name: str) -> pl.DataFrame:
    """Count some of the pairs, for `added_moves`."""
    labels = pl.col(name + OLD).alias("old"), pl.col(name).alias("new")
    counted = pairs.group_by(labels).agg(pl.len().cast(pl.Int64).alias("num_rows"))
    return counted.with_columns(pl.col("old", "new").cast(pl.String)).collect(engine="streaming")


def added_moves(found: Sequence[pl.DataFrame]) -> list[dict[str, Any]]:
    """Add up what `moves_in` counted."""
    if not found:
        return []
    added = pl.concat(found).group_by("old", "new").agg(pl.col("num_rows").sum())
    return added.sort("num_rows", "old", "new", descending=[True, False, False]).to_dicts()


def short(value: Any) -> str:  # noqa: ANN401 - a column's value has any type
    """A value of a row on one line, cut if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}..."
