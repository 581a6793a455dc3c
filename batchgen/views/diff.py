"""What changed between two snapshots: which rows, and how the labels moved.

Rows are paired first: by the columns of `--on`, or by where they stand in the input. Beside the
equal rows that `matching` finds, rows between the same neighbours are paired if they are as many
as before: they were edited in place. Of files without digests of rows (CSV, Parquet) that
changed, the first row is paired with the first. What is left came or went.

Pairs are compared by hashes of their columns, so that of each row only its key, two hashes and
its labels are held in memory, however long its texts are. A hash has 64 bits and is compared
within a pair only: one change in 2^64 goes unseen.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import ConfigError, OutputError
from batchgen.core.runtime import command, option
from batchgen.pipeline.publish import total_variation
from batchgen.storage import LocalStorage
from batchgen.store.ledger import Ledger
from batchgen.store.result_files import ATTEMPTS, RESULT_FIELDS, ROW, SEGMENT, VERDICT, scan
from batchgen.store.snapshot import find_snapshot
from batchgen.views.labels import OLD, LabelMoves, counted_moves
from batchgen.views.pairing import paired
from batchgen.views.rows import readable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import polars as pl

    from batchgen.store.books import Plan
    from batchgen.store.matching import Span

SAME, ANSWER_CHANGED, INPUT_CHANGED, ADDED, REMOVED = range(5)
KINDS = {ANSWER_CHANGED: "answer", INPUT_CHANGED: "input"}
CLASS = "class"
POSITION = "position"
AT, _KEY, INPUT, ANSWER = "at", "key", "input", "answer"
"""Columns of `Side.rows`: number of the row among the published ones, where it stands among the
planned ones, and hashes of what is compared."""
_COMPARED = {"status", "verdict", "error_type"}
"""Compared of what batchgen says of a row; the rest differs from run to run."""
_MEASURED = {"probabilities", "logprobs"}
"""Not compared either: the last digits differ where the same answer is computed again."""


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

    @property
    def may_hide_edits(self) -> bool:
        """Whether some of the rows that came and went may be edited ones, which no key tells."""
        return self.matched_by == POSITION and self.num_added > 0 and self.num_removed > 0

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
        num_examples: At most so many changed rows are shown in full.

    Raises:
        OutputError: There are no such snapshots, or they cannot be read.
        ConfigError: A column of `on` does not name rows.
    """
    import polars as pl

    ledger = Ledger(LocalStorage(root))
    old, new = numbers or _two_newest(ledger)
    try:
        both = Both(Side(ledger, old), Side(ledger, new), on)
        pairs = both.pairs()
        return _compared(root, both, pairs, changed_rows(both, pairs, num_examples))
    except (pl.exceptions.PolarsError, OSError) as error:
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


class Side:
    """A snapshot, as it lies on the disk; nothing is held open."""

    def __init__(self, ledger: Ledger, number: int) -> None:
        """Look at its columns; no row is read.

        Raises:
            OutputError: There is no such snapshot.
        """
        self.storage = ledger.storage
        self.manifest = find_snapshot(ledger, number)
        self.plan = ledger.plan(number)
        self.frame = scan(self.storage, [file.name for file in self.manifest.files])
        """The published rows."""
        self.schema = self.frame.collect_schema()
        self.starts = [0, *accumulate(segment.num_rows for segment in self.plan.segments)]
        """Key of the first row of each file."""
        self.columns = {(INPUT, name): name for name in self.plan.carried}
        """What is compared, whatever the prefix: (kind, name without prefix) -> name."""
        skipped = {field.name for field in RESULT_FIELDS} - _COMPARED
        for name in self.schema:
            base = name.removeprefix(self.plan.prefix)
            is_measured = base in _MEASURED and self.schema[name].is_nested()
            if not ((INPUT, name) in self.columns or base in skipped or is_measured):
                self.columns[ANSWER, base] = name
        self.labels = {
            name.removeprefix(self.plan.prefix): self._label(name)
            for name in self.manifest.tally
            if name not in {VERDICT, ATTEMPTS}
        }
        """Columns of labels, without the prefix, and how to read them."""

    @property
    def place(self) -> tuple[LocalStorage, Plan]:
        """Where it is, and its plan."""
        return self.storage, self.plan

    def _label(self, name: str) -> pl.Expr:
        """Read a label as text, null unless the row is ok; several of a row as one text.

        Raises:
            OutputError: The snapshot has no such column.
        """
        import polars as pl

        whole = f"{self.plan.prefix}output"  # Fields of it are labels, too; names may hold dots.
        fields = self.schema.get(whole)
        inner = name.removeprefix(f"{whole}.")
        if name in self.schema:
            value = pl.col(name)
        elif isinstance(fields, pl.Struct) and inner in dict(fields):
            value = pl.col(whole).struct.field(inner)
        else:
            number = self.manifest.number
            msg = f"snapshot {number} lacks the column {name!r} that its manifest names"
            raise OutputError(msg)
        if isinstance(self.frame.select(value).collect_schema().dtypes()[0], pl.List):
            value = value.cast(pl.List(pl.String)).list.join(", ", ignore_nulls=True)
        is_ok = pl.col(f"{self.plan.prefix}status") == "ok"
        return pl.when(is_ok).then(value.cast(pl.String))

    def rows(self, both: Both) -> pl.LazyFrame:
        """Read what is compared of each row: `AT`, its keys, hashes, labels.

        Raises:
            OutputError: It is not known which planned row each is, and no column names it.
        """
        import polars as pl

        hashes = []
        for kind in (INPUT, ANSWER):
            names = [self.columns[key] for key in both.shared if key[0] == kind]
            value = pl.struct(names).hash() if names else pl.lit(0, pl.UInt64)
            hashes.append(value.alias(kind))
        labels = [
            self.labels[label].cast(pl.Categorical).alias(label_name(number))
            for number, label in enumerate(both.labels)
        ]
        keys = [pl.col(name).alias(key) for key, name in zip(both.keys, both.on, strict=False)]
        rows = self.frame.select(*keys, *hashes, *labels)
        if not both.on:
            start = pl.col(SEGMENT).replace_strict(
                list(range(len(self.plan.segments))),
                self.starts[:-1],
                default=0,
                return_dtype=pl.Int64,
            )
            places = self._index().select((start + pl.col(ROW)).alias(_KEY))
            rows = pl.concat([places, rows], how="horizontal")
        return rows.with_row_index(AT)

    def _index(self) -> pl.LazyFrame:
        if self.manifest.index is None:
            number, on = self.manifest.number, option("--on")
            msg = f"snapshot {number} has no index of rows; name them with {on}"
            raise OutputError(msg)
        return scan(self.storage, [self.manifest.index.name])

    def where(self, at: int) -> str:
        """Name the file and the row of the input that a published row is."""
        segment, row = self._index().slice(at, 1).collect().row(0)
        return f"{self.plan.segments[segment].path} row {row}"

    def row(self, at: int) -> dict[str, Any]:
        """Read a published row in full."""
        return readable(self.frame.slice(at, 1).collect())[0]

    def check_names(self, on: Sequence[str]) -> None:
        """Refuse columns that do not name its rows.

        Raises:
            ConfigError: One is absent or no plain value; or two rows have one name.
        """
        import polars as pl

        number = self.manifest.number
        counted = self.frame.select(on).drop_nulls().group_by(on).agg(pl.len().alias(AT))
        twice = counted.filter(pl.col(AT) > 1).head(1).collect(engine="streaming")
        for *values, num_rows in twice.iter_rows():
            row = ", ".join(f"{name} = {value!r}" for name, value in zip(on, values, strict=True))
            msg = (
                f"{row} is in {num_rows} rows of snapshot {number}, expected in one; name more "
                "columns"
            )
            raise _bad_on(msg)


def label_name(number: int) -> str:
    """Name the column of `Both.pairs` with the new side's label of a number; `OLD` behind it."""
    return f"label_{number}"


def _bad_on(problem: str) -> ConfigError:
    where = "--on"
    return ConfigError(where, [problem])


class Both:
    """Two snapshots and what of them is compared."""

    def __init__(self, old: Side, new: Side, on: Sequence[str]) -> None:
        """Look at what both have.

        Raises:
            ConfigError: A column of `on` does not name rows.
        """
        self.old = old
        self.new = new
        self.on = on
        self.keys = [f"on_{number}" for number in range(len(on))] or [_KEY]
        self.shared = [key for key in new.columns if key in old.columns and self._is_alike(key)]
        """Keys of columns that both have, of one type."""
        self.labels = [name for name in new.labels if name in old.labels]
        self._check_names()

    def _is_alike(self, key: tuple[str, str]) -> bool:
        old, new = self.old, self.new
        return old.schema[old.columns[key]] == new.schema[new.columns[key]]

    def _check_names(self) -> None:
        for name in self.on:
            for side in (self.old, self.new):
                if name not in side.schema:
                    known = ", ".join(side.plan.carried)
                    number = side.manifest.number
                    msg = f"snapshot {number} has no column {name!r}, expected one of: {known}"
                    raise _bad_on(msg)
            was, now = self.old.schema[name], self.new.schema[name]
            if was != now or was.is_nested():
                msg = f"{name} is {was} and {now}, expected one plain type in both snapshots"
                raise _bad_on(msg)
        for side in (self.old, self.new) if self.on else ():
            side.check_names(self.on)

    def pairs(self) -> pl.DataFrame:
        """Pair the rows: each of both once, its class, where it stands in each, its labels."""
        import polars as pl

        old, new = self.old.rows(self), self.new.rows(self)
        if self.on:
            old, new = old.drop_nulls(self.keys), new.drop_nulls(self.keys)
        else:
            new = self._rekeyed(new, paired(self.old.place, self.new.place))
        kind = (
            pl.when(pl.col(AT).is_null())
            .then(REMOVED)
            .when(pl.col(AT + OLD).is_null())
            .then(ADDED)
            .when(pl.col(INPUT) != pl.col(INPUT + OLD))
            .then(INPUT_CHANGED)
            .when(pl.col(ANSWER) != pl.col(ANSWER + OLD))
            .then(ANSWER_CHANGED)
            .otherwise(SAME)
            .cast(pl.UInt8)
            .alias(CLASS)
        )
        names = [AT, *(label_name(number) for number in range(len(self.labels)))]
        wanted = [column for name in names for column in (name, name + OLD)]
        joined = new.join(old, on=self.keys, how="full", suffix=OLD)
        return joined.select(kind, *wanted).collect(engine="streaming")

    def _rekeyed(self, rows: pl.LazyFrame, spans: Sequence[Span]) -> pl.LazyFrame:
        """Give rows of the new snapshot the keys that they had in the old; null: not there."""
        import polars as pl

        names = ("first", "was", "length")
        moved = [
            (
                self.new.starts[span.segment] + span.start,
                self.old.starts[span.old_segment] + span.old_start,
                span.length,
            )
            for span in spans
        ]
        table = pl.LazyFrame(moved, schema=dict.fromkeys(names, pl.Int64), orient="row")
        offset = pl.col(_KEY) - pl.col("first")
        return (
            rows.set_sorted(_KEY)
            .join_asof(table.set_sorted("first"), left_on=_KEY, right_on="first", coalesce=False)
            .with_columns(
                pl.when(offset < pl.col("length")).then(pl.col("was") + offset).alias(_KEY)
            )
            .drop(names)
        )


def _compared(
    root: Path, both: Both, pairs: pl.DataFrame, examples: Sequence[Mapping[str, Any]]
) -> Diff:
    num = dict(pairs[CLASS].value_counts().iter_rows())
    was, now = both.old.columns, both.new.columns
    manifests = (both.old.manifest, both.new.manifest)
    num_rows = [manifest.num_ok + manifest.num_errors for manifest in manifests]
    num_named = [len(pairs) - pairs[name].null_count() for name in (AT + OLD, AT)]
    return Diff(
        output=str(root),
        old=manifests[0].number,
        new=manifests[1].number,
        matched_by=", ".join(both.on) or POSITION,
        num_old=num_rows[0],
        num_new=num_rows[1],
        num_same=num.get(SAME, 0),
        num_added=num.get(ADDED, 0),
        num_removed=num.get(REMOVED, 0),
        num_input_changed=num.get(INPUT_CHANGED, 0),
        num_answer_changed=num.get(ANSWER_CHANGED, 0),
        num_without_key=(num_rows[0] - num_named[0], num_rows[1] - num_named[1]),
        columns_came=[name for key, name in now.items() if key not in was],
        columns_went=[name for key, name in was.items() if key not in now],
        columns_retyped=[
            name for key, name in now.items() if key in was and key not in both.shared
        ],
        labels=[label_moves(both, pairs, number) for number in range(len(both.labels))],
        examples=examples,
    )


def label_moves(both: Both, pairs: pl.DataFrame, number: int) -> LabelMoves:
    """Count how the labels of one column moved, by its number in `Both.labels`."""
    import polars as pl

    label = both.labels[number]
    last, now = (
        dict(side.manifest.tally[side.plan.prefix + label]) for side in (both.old, both.new)
    )
    column = both.new.plan.prefix + label
    moves = counted_moves(pairs.lazy().filter(pl.col(CLASS) <= INPUT_CHANGED), label_name(number))
    return LabelMoves(column, last, now, total_variation(now, last), moves)


def changed_rows(both: Both, pairs: pl.DataFrame, num_rows: int) -> list[dict[str, Any]]:
    """Read the first changed rows, and what differs in them."""
    import polars as pl

    is_changed = pl.col(CLASS).is_in(list(KINDS))
    changed = pairs.filter(is_changed).bottom_k(num_rows, by=AT).sort(AT)
    names = [(both.old.columns[key], both.new.columns[key]) for key in both.shared]
    found = []
    for kind, at, at_old in changed.select(CLASS, AT, AT + OLD).iter_rows():
        new, old = both.new.row(at), both.old.row(at_old)
        where = ", ".join(f"{name} = {new[name]!r}" for name in both.on) or both.new.where(at)
        columns = {name: [old[was], new[name]] for was, name in names if old[was] != new[name]}
        found.append({"where": where, "changed": KINDS[kind], "columns": columns})
    return found
