"""What changed between two snapshots: which rows, and how the labels moved.

Rows are paired first, then compared by hashes of their columns, so that of each row only its key,
two hashes and its labels are held in memory, however long its texts are. A hash has 64 bits and is
compared within a pair only: one change in 2^64 goes unseen.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import ConfigError, OutputError
from batchgen.pipeline.publish import total_variation
from batchgen.storage import LocalStorage
from batchgen.store import snapshots
from batchgen.store.ledger import Ledger
from batchgen.views.pairing import paired
from batchgen.views.side import ANSWER, AT, INPUT, KEY, Side, key_name, label_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import polars as pl

    from batchgen.store.matching import Span

_SAME, _ANSWER_CHANGED, _INPUT_CHANGED, _ADDED, _REMOVED = range(5)
_KINDS = {_ANSWER_CHANGED: "answer", _INPUT_CHANGED: "input"}
_CLASS, _OLD = "class", "_old"
_POSITION = "position"


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


@dataclass(frozen=True, slots=True)
class Diff:
    """Two snapshots, compared."""

    output: str
    old: int
    new: int
    """Numbers of the snapshots."""
    matched_by: str
    """The columns of `--on`, or `position`: see `pairing`."""
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
        is_by_place = self.matched_by == _POSITION
        return "equal content and place in the input" if is_by_place else self.matched_by

    @property
    def may_hide_edits(self) -> bool:
        """Whether some of the rows that came and went may be edited ones, which no key tells."""
        return self.matched_by == _POSITION and self.num_added > 0 and self.num_removed > 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def diff(
    root: Path,
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
        num_examples: At most so many changed rows are told in full.

    Raises:
        OutputError: There are no such snapshots, or they cannot be read.
        ConfigError: A column of `on` does not name rows.
    """
    import polars as pl

    ledger = Ledger(LocalStorage(root))
    old, new = numbers or _two_newest(ledger)
    try:
        both = _Both(Side(ledger, old), Side(ledger, new), tuple(on))
        if on:
            both.check_keys()
            spans = None
        else:
            spans = paired(ledger.storage, both.old.plan, both.new.plan)
        pairs = _pairs(both, spans)
        return _told(root, both, pairs, _examples(both, pairs, num_examples))
    except (pl.exceptions.PolarsError, OSError) as error:
        why = str(error).splitlines()[0]
        msg = f"{root}: a snapshot cannot be read ({why}); `batchgen verify` tells more"
        raise OutputError(msg) from error


def _two_newest(ledger: Ledger) -> tuple[int, int]:
    numbers = [manifest.number for manifest in snapshots.snapshots(ledger)]
    if len(numbers) < 2:
        newest = snapshots.snapshot(ledger, None).number
        msg = f"{ledger.storage.where}: snapshot {newest} is the only one, expected two to compare"
        raise OutputError(msg)
    return numbers[-2], numbers[-1]


@dataclass(frozen=True, slots=True)
class _Both:
    """Two snapshots and what of them is compared."""

    old: Side
    new: Side
    on: Sequence[str]

    @property
    def inputs(self) -> list[str]:
        """Columns of the input that both have, of one type."""
        shared = self.new.carried & self.old.carried
        return [
            name
            for name in self.new.schema
            if name in shared and self.old.schema[name] == self.new.schema[name]
        ]

    @property
    def ours(self) -> list[tuple[str, str]]:
        """Columns of answers that both have, of one type: old and new name."""
        names = [
            (self.old.ours[base], name)
            for base, name in self.new.ours.items()
            if base in self.old.ours
        ]
        return [(was, name) for was, name in names if self.old.schema[was] == self.new.schema[name]]

    @property
    def labels(self) -> list[str]:
        """Columns of labels that both have, without the prefix."""
        return [name for name in self.new.labels if name in self.old.labels]

    def check_keys(self) -> None:
        """Refuse columns that cannot name rows.

        Raises:
            ConfigError: One is absent, of unlike types or no plain value; or two rows of a
                snapshot have one name.
        """
        for name in self.on:
            for side in (self.old, self.new):
                if name not in side.schema:
                    known = ", ".join(side.plan.carried)
                    number = side.manifest.number
                    msg = f"snapshot {number} has no column {name!r}, expected one of: {known}"
                    raise _bad_on(msg)
            kinds = [side.schema[name] for side in (self.old, self.new)]
            if kinds[0] != kinds[1] or kinds[0].is_nested():
                msg = (
                    f"{name} is {kinds[0]} and {kinds[1]}, expected one plain type in both "
                    "snapshots"
                )
                raise _bad_on(msg)
        for side in (self.old, self.new):
            _check_unique(side, self.on)


def _bad_on(problem: str) -> ConfigError:
    where = "--on"
    return ConfigError(where, [problem])


def _check_unique(side: Side, on: Sequence[str]) -> None:
    import polars as pl

    counted = side.frame.select(on).drop_nulls().group_by(on).agg(pl.len().alias(AT))
    twice = counted.filter(pl.col(AT) > 1).head(1).collect(engine="streaming")
    for *values, num_rows in twice.iter_rows():
        told = ", ".join(f"{name} = {value!r}" for name, value in zip(on, values, strict=True))
        msg = (
            f"{told} is in {num_rows} rows of snapshot {side.manifest.number}, expected in one; "
            "name more columns"
        )
        raise _bad_on(msg)


def _pairs(both: _Both, spans: Sequence[Span] | None) -> pl.DataFrame:
    """Every row of both snapshots once: its class, where it stands in each, its labels in each."""
    import polars as pl

    ours = both.ours
    old = both.old.rows((both.inputs, [name for name, _ in ours]), both.labels, both.on)
    new = both.new.rows((both.inputs, [name for _, name in ours]), both.labels, both.on)
    if spans is not None:
        keys = [KEY]
        new = _rekeyed(new, both, spans)
    else:
        keys = [key_name(number) for number in range(len(both.on))]
        old, new = old.drop_nulls(keys), new.drop_nulls(keys)
    kind = (
        pl.when(pl.col(AT).is_null())
        .then(_REMOVED)
        .when(pl.col(AT + _OLD).is_null())
        .then(_ADDED)
        .when(pl.col(INPUT) != pl.col(INPUT + _OLD))
        .then(_INPUT_CHANGED)
        .when(pl.col(ANSWER) != pl.col(ANSWER + _OLD))
        .then(_ANSWER_CHANGED)
        .otherwise(_SAME)
        .cast(pl.UInt8)
        .alias(_CLASS)
    )
    names = [AT, *(label_name(number) for number in range(len(both.labels)))]
    wanted = [column for name in names for column in (name, name + _OLD)]
    joined = new.join(old, on=keys, how="full", suffix=_OLD)
    return joined.select(kind, *wanted).collect(engine="streaming")


def _rekeyed(rows: pl.LazyFrame, both: _Both, spans: Sequence[Span]) -> pl.LazyFrame:
    """Rows of the new snapshot under the keys that they had in the old one; null: not there."""
    import polars as pl

    names = ("first", "was", "length")
    moved = [
        (
            both.new.starts[span.segment] + span.start,
            both.old.starts[span.old_segment] + span.old_start,
            span.length,
        )
        for span in spans
    ]
    table = pl.LazyFrame(moved, schema=dict.fromkeys(names, pl.Int64), orient="row")
    offset = pl.col(KEY) - pl.col("first")
    return (
        rows.set_sorted(KEY)
        .join_asof(table.set_sorted("first"), left_on=KEY, right_on="first", coalesce=False)
        .with_columns(pl.when(offset < pl.col("length")).then(pl.col("was") + offset).alias(KEY))
        .drop(names)
    )


def _told(
    root: Path, both: _Both, pairs: pl.DataFrame, examples: Sequence[Mapping[str, Any]]
) -> Diff:
    num = dict(pairs[_CLASS].value_counts().iter_rows())
    was, now = both.old.compared, both.new.compared
    manifests = (both.old.manifest, both.new.manifest)
    num_rows = [manifest.num_ok + manifest.num_errors for manifest in manifests]
    num_named = [len(pairs) - pairs[name].null_count() for name in (AT + _OLD, AT)]
    return Diff(
        output=str(root),
        old=manifests[0].number,
        new=manifests[1].number,
        matched_by=", ".join(both.on) or _POSITION,
        num_old=num_rows[0],
        num_new=num_rows[1],
        num_same=num.get(_SAME, 0),
        num_added=num.get(_ADDED, 0),
        num_removed=num.get(_REMOVED, 0),
        num_input_changed=num.get(_INPUT_CHANGED, 0),
        num_answer_changed=num.get(_ANSWER_CHANGED, 0),
        num_without_key=(num_rows[0] - num_named[0], num_rows[1] - num_named[1]),
        columns_came=[name for key, name in now.items() if key not in was],
        columns_went=[name for key, name in was.items() if key not in now],
        columns_retyped=[
            name
            for key, name in now.items()
            if key in was and both.old.schema[was[key]] != both.new.schema[name]
        ],
        labels=[_moves(both, pairs, label, number) for number, label in enumerate(both.labels)],
        examples=examples,
    )


def _moves(both: _Both, pairs: pl.DataFrame, label: str, number: int) -> LabelMoves:
    import polars as pl

    name = label_name(number)
    counted = (
        pairs.lazy()
        .filter(pl.col(_CLASS) <= _INPUT_CHANGED)
        .group_by(pl.col(name + _OLD).alias("old"), pl.col(name).alias("new"))
        .agg(pl.len().alias("num_rows"))
        .with_columns(pl.col("old", "new").cast(pl.String))
        .sort("num_rows", "old", "new", descending=[True, False, False])
        .collect(engine="streaming")
    )
    column = both.new.prefix + label
    now = both.new.manifest.tally[column]
    last = both.old.manifest.tally[both.old.prefix + label]
    drift = total_variation(now, last)
    return LabelMoves(column, dict(last), dict(now), drift, counted.to_dicts())


def _examples(both: _Both, pairs: pl.DataFrame, num_rows: int) -> list[dict[str, Any]]:
    """The first changed rows, with what differs in them."""
    import polars as pl

    changed = pairs.filter(pl.col(_CLASS).is_in(list(_KINDS))).bottom_k(num_rows, by=AT).sort(AT)
    compared = [*((name, name) for name in both.inputs), *both.ours]
    found = []
    for kind, at, at_old in changed.select(_CLASS, AT, AT + _OLD).iter_rows():
        new, old = both.new.row(at), both.old.row(at_old)
        where = ", ".join(f"{name} = {new[name]!r}" for name in both.on) or both.new.where(at)
        columns = {name: [old[was], new[name]] for was, name in compared if old[was] != new[name]}
        found.append({"where": where, "changed": _KINDS[kind], "columns": columns})
    return found
