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
from bisect import bisect_right
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from batchgen.core.data import to_polars
from batchgen.core.errors import ConfigError, OutputError
from batchgen.core.runtime import command, option
from batchgen.pipeline.publish import total_variation
from batchgen.storage import LocalStorage
from batchgen.store.ledger import Ledger
from batchgen.store.published import row_groups
from batchgen.store.result_files import (
    ATTEMPTS,
    RESULT_FIELDS,
    ROW,
    SEGMENT,
    VERDICT,
    ResultFile,
    scan,
)
from batchgen.store.snapshot import find_snapshot
from batchgen.views.labels import OLD, LabelMoves, added_moves, moves_in, short
from batchgen.views.pairing import paired
from batchgen.views.rows import readable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import polars as pl

    from batchgen.store.books import Plan

SAME, ANSWER_CHANGED, INPUT_CHANGED, ADDED, REMOVED = range(5)
KINDS = {ANSWER_CHANGED: "answer", INPUT_CHANGED: "input"}
CLASS = "class"
POSITION = "position"
AT, _PLACE, _KEY, INPUT, ANSWER = "at", "place", "key", "input", "answer"
"""Columns of `Side.rows`: number of the row among the published ones, where it stands among the
planned ones of its snapshot and of the old one, and hashes of what is compared."""
_BUCKET_ROWS, _MOST_BUCKETS = 2**17, 1024
_CHUNK_ROWS = 2**13
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


class Side:
    """A snapshot, as it lies on the disk; nothing is held open."""

    def __init__(self, ledger: Ledger, number: int, called: str = "") -> None:
        """Look at its columns; no row is read.

        Args:
            ledger: The output's books.
            number: Of the snapshot.
            called: What texts call it.

        Raises:
            OutputError: There is no such snapshot.
        """
        self.storage = ledger.storage
        self.name = called or f"snapshot {number}"
        self.manifest = find_snapshot(ledger, number)
        self.num_rows = self.manifest.num_ok + self.manifest.num_errors
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
            msg = f"{self.name} lacks the column {name!r} that its manifest names"
            raise OutputError(msg)
        if isinstance(self.frame.select(value).collect_schema().dtypes()[0], pl.List):
            value = value.cast(pl.List(pl.String)).list.join(", ", ignore_nulls=True)
        is_ok = pl.col(f"{self.plan.prefix}status") == "ok"
        return pl.when(is_ok).then(value.cast(pl.String))

    def compared(self, both: Both) -> list[pl.Expr]:
        """What is read of each row: its keys, hashes, labels."""
        import polars as pl

        hashes = []
        for kind in (INPUT, ANSWER):
            names = [self.columns[key] for key in both.shared if key[0] == kind]
            value = pl.struct(names).hash() if names else pl.lit(0, pl.UInt64)
            hashes.append(value.alias(kind))
        labels = [
            self.labels[label].cast(pl.String).alias(label_name(number))
            for number, label in enumerate(both.labels)
        ]
        keys = [pl.col(name).alias(key) for key, name in zip(both.keys, both.on, strict=False)]
        return [*keys, *hashes, *labels]

    def rows(self, both: Both) -> Iterator[pl.DataFrame]:
        """Read what is compared, piece by piece, with `AT` and, unless named, `_PLACE`.

        Raises:
            OutputError: It is not known which planned row each is, and no column names it.
        """
        import polars as pl

        at, ahead = 0, pl.Series(_PLACE, [], pl.Int64)
        places = None if both.on else self._places()
        wanted = self.compared(both)
        for frame in self._frames(wanted):
            rows, num = frame.select(wanted), len(frame)
            columns = [pl.int_range(at, at + num, dtype=pl.Int64, eager=True).alias(AT)]
            if places is not None:
                while len(ahead) < num and (more := next(places, None)) is not None:
                    ahead.append(more)
                columns.append(ahead.head(num))
                ahead = ahead.slice(num)
            at += num
            yield rows.with_columns(columns)

    def _frames(self, wanted: Sequence[pl.Expr]) -> Iterator[pl.DataFrame]:
        """Yield the rows, with what is wanted of them, so few at a time that memory is no matter.

        Raises:
            ArrowException: A file is damaged.
            StorageError: It cannot be read right now.
        """
        read = list(dict.fromkeys(name for value in wanted for name in value.meta.root_names()))
        for entry in self.manifest.files:
            with ResultFile(self.storage.path(entry.name)) as file:
                for _, table in file.groups(read or self.schema.names()[:1], is_proven=False):
                    for batch in table.to_batches(_CHUNK_ROWS):
                        yield to_polars(batch)
                if file.problem is not None:
                    raise pa.ArrowInvalid(file.problem)
            pa.default_memory_pool().release_unused()

    def _places(self) -> Iterator[pl.Series]:
        """Yield for each row group where its rows stand among the planned ones."""
        import polars as pl

        if self.manifest.index is None and not self.manifest.is_tiled:
            msg = f"{self.name} has no index of rows; name them with {option('--on')}"
            raise OutputError(msg)
        starts = pl.Series(self.starts)
        for _, _, ordinals in row_groups(self.storage, self.manifest, self.plan):
            segments, rows = (pl.Series(ordinals().column(name)) for name in (SEGMENT, ROW))
            yield (starts.gather(segments) + rows).alias(_PLACE)

    def where(self, place: int) -> str:
        """Name the file and the row of the input that stands there among the planned ones."""
        segment = bisect_right(self.starts, place) - 1
        return f"{self.plan.segments[segment].path} row {place - self.starts[segment]}"

    def row(self, at: int) -> dict[str, Any]:
        """Read a published row in full."""
        return readable(self.frame.slice(at, 1).collect())[0]

    def check_names(self, rows: pl.DataFrame, keys: Sequence[str], on: Sequence[str]) -> None:
        """Refuse rows that one name is for.

        Raises:
            ConfigError: There are such.
        """
        import polars as pl

        twice = rows.group_by(keys).agg(pl.len().alias(AT)).filter(pl.col(AT) > 1).head(1)
        for *values, num_rows in twice.iter_rows():
            row = ", ".join(f"{name} = {value!r}" for name, value in zip(on, values, strict=True))
            msg = f"{row} is in {num_rows} rows of {self.name}, expected in one; name more columns"
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
                    msg = f"{side.name} has no column {name!r}, expected one of: {known}"
                    raise _bad_on(msg)
            was, now = self.old.schema[name], self.new.schema[name]
            if was != now or was.is_nested():
                msg = f"{name} is {was} and {now}, expected one plain type in both snapshots"
                raise _bad_on(msg)

    def pairs(self, folder: Path) -> Iterator[pl.DataFrame]:
        """Pair the rows: each of both once, its class, where it stands in each, its labels.

        Args:
            folder: For temporary files.

        Raises:
            ConfigError: Columns of `on` do not name rows.
        """
        moves = None if self.on else self._moves()  # First, as it takes memory of its own.
        old = self._spread(self.old, folder / "old", None)
        new = self._spread(self.new, folder / "new", moves)
        for number in sorted(old.numbers | new.numbers):
            sides = old.rows(number), new.rows(number)
            for side, rows in zip((self.old, self.new), sides, strict=True):
                if self.on:
                    side.check_names(rows, self.keys, self.on)
            yield self._joined(*sides)

    def _spread(self, side: Side, folder: Path, moves: pl.DataFrame | None) -> _Buckets:
        """Read the rows of a snapshot; both rows of a pair go into buckets of one number."""
        import polars as pl

        num_rows = max(
            one.manifest.num_ok + one.manifest.num_errors for one in (self.old, self.new)
        )
        num_buckets = min(num_rows // _BUCKET_ROWS + 1, _MOST_BUCKETS)
        schema = side.frame.select(side.compared(self)).collect_schema()
        schema.update(dict.fromkeys([AT] if self.on else [AT, _PLACE, _KEY], pl.Int64()))
        buckets = _Buckets(folder, schema)
        if self.on:
            number = pl.struct(self.keys).hash() % num_buckets
            for rows in side.rows(self):
                buckets.add(rows.drop_nulls(self.keys), number)
            return buckets
        number = pl.coalesce(_KEY, _PLACE) // (num_rows // num_buckets + 1)
        for rows in side.rows(self):
            buckets.add(_rekeyed(rows, moves), number)
        return buckets

    def _moves(self) -> pl.DataFrame:
        """Where runs of rows of the new snapshot stand, and where they stood in the old."""
        import polars as pl

        was, now = self.old.starts, self.new.starts
        spans = paired(self.old.place, self.new.place)
        moves = (
            (now[span.segment] + span.start, was[span.old_segment] + span.old_start, span.length)
            for span in spans
        )
        names = ("first", "was", "length")
        return pl.DataFrame(moves, schema=dict.fromkeys(names, pl.Int64), orient="row")

    def _joined(self, old: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
        import polars as pl

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
        place = [] if self.on else [_PLACE]
        return new.join(old, on=self.keys, how="full", suffix=OLD).select(kind, *wanted, *place)


def _rekeyed(rows: pl.DataFrame, moves: pl.DataFrame | None) -> pl.DataFrame:
    """Give rows the keys that they had in the old snapshot; null: not there."""
    import polars as pl

    if moves is None:
        return rows.with_columns(pl.col(_PLACE).alias(_KEY))
    offset = pl.col(_PLACE) - pl.col("first")
    return (
        rows.set_sorted(_PLACE)
        .join_asof(moves.set_sorted("first"), left_on=_PLACE, right_on="first", coalesce=False)
        .with_columns(pl.when(offset < pl.col("length")).then(pl.col("was") + offset).alias(_KEY))
        .drop(moves.columns)
    )


class _Buckets:
    """Rows on the disk, by number."""

    def __init__(self, folder: Path, schema: pl.Schema) -> None:
        folder.mkdir()
        self.numbers: set[int] = set()
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
        import polars as pl

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
                    "where": where or both.new.where(row[_PLACE]),
                    "changed": KINDS[row[CLASS]],
                    "columns": columns,
                }
            )
        return found


def compared(
    root: Path, both: Both, num_examples: int, on_pairs: Callable[[pl.DataFrame], object] = len
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


def _summed(root: Path, both: Both, found: _Found) -> Diff:
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
