"""Two snapshots that are compared: their columns, labels and rows, a few at a time, and pairs.

`LabelMoves` is how one column of labels moved between two times that rows were answered.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa

from batchgen.core.data import to_polars
from batchgen.core.errors import ConfigError, OutputError
from batchgen.core.runtime import option
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
from batchgen.views.pairing import paired
from batchgen.views.rows import readable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from batchgen.storage import LocalStorage
    from batchgen.store.books import Plan
    from batchgen.store.ledger import Ledger


SAME, ANSWER_CHANGED, INPUT_CHANGED, ADDED, REMOVED = range(5)
KINDS = {ANSWER_CHANGED: "answer", INPUT_CHANGED: "input"}
CLASS = "class"
POSITION = "position"
_BUCKET_ROWS, _MOST_BUCKETS = 2**16, 1024
AT, PLACE, KEY, INPUT, ANSWER = "at", "place", "key", "input", "answer"
"""Columns of `Side.rows`: number of the row among the published ones, where it stands among the
planned ones of its snapshot and of the old one, and hashes of what is compared."""
_HASHES = {INPUT, ANSWER}
_CHUNK_ROWS = 2**13
_COMPARED = {"status", "verdict", "error_type"}
"""Compared of what batchgen says of a row; the rest differs from run to run."""
_MEASURED = {"probabilities", "logprobs"}
"""Not compared either: the last digits differ where the same answer is computed again."""


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
        whole = f"{self.plan.prefix}output"  # Fields of it are labels, too; names may hold dots.
        fields = self.schema.get(whole)
        inner = name.removeprefix(f"{whole}.")
        if name in self.schema:
            value = pl.col(name)
        elif isinstance(fields, pl.Struct) and inner in dict(fields):
            value = pl.col(whole).struct.field(inner)
        else:
            raise OutputError(f"{self.name} lacks the column {name!r} that its manifest names")
        if isinstance(self.frame.select(value).collect_schema().dtypes()[0], pl.List):
            value = value.cast(pl.List(pl.String)).list.join(", ", ignore_nulls=True)
        is_ok = pl.col(f"{self.plan.prefix}status") == "ok"
        return pl.when(is_ok).then(value.cast(pl.String))

    def compared(self, both: Both) -> list[pl.Expr]:
        """What is read of each row: its keys, hashes, labels."""
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
        """Read what is compared, piece by piece, with `AT` and, unless named, `PLACE`.

        Raises:
            OutputError: It is not known which planned row each is, and no column names it.
        """
        ahead = pl.Series(PLACE, [], pl.Int64)
        places = None if both.on else self._places(both.shared_files)
        wanted = self.compared(both)
        for at, frame in self._frames(wanted, both.shared_files):
            rows, num = frame.select(wanted), len(frame)
            columns = [pl.int_range(at, at + num, dtype=pl.Int64, eager=True).alias(AT)]
            if places is not None:
                while len(ahead) < num and (more := next(places, None)) is not None:
                    ahead.append(more)
                columns.append(ahead.head(num))
                ahead = ahead.slice(num)
            yield rows.with_columns(columns)

    def shared_rows(self, both: Both) -> Iterator[pl.DataFrame]:
        """Read the labels of rows that stand in files of both snapshots, see `rows`."""
        labels = [one for one in self.compared(both) if one.meta.output_name() not in _HASHES]
        others = {file.name for file in self.manifest.files} - both.shared_files
        for at, frame in self._frames(labels, others):
            yield frame.select(*labels, pl.int_range(at, at + pl.len(), dtype=pl.Int64).alias(AT))

    def _frames(
        self, wanted: Sequence[pl.Expr], left_out: Collection[str]
    ) -> Iterator[tuple[int, pl.DataFrame]]:
        """Yield rows with what is wanted of them, a few at a time, and the number of the first.

        Those of files that are left out are counted only.

        Raises:
            ArrowException: A file is damaged.
            StorageError: It cannot be read right now.
        """
        read = list(dict.fromkeys(name for value in wanted for name in value.meta.root_names()))
        after = 0
        for entry in self.manifest.files:
            at, after = after, after + entry.num_rows
            if entry.name in left_out:
                continue
            with ResultFile(self.storage.path(entry.name)) as file:
                for _, table in file.groups(read or self.schema.names()[:1], is_proven=False):
                    for batch in table.to_batches(_CHUNK_ROWS):
                        yield at, to_polars(batch)
                        at += batch.num_rows
                if file.problem is not None:
                    raise pa.ArrowInvalid(file.problem)
            pa.default_memory_pool().release_unused()

    def spans(self) -> dict[str, tuple[int, int, str]]:
        """File -> where it begins and ends among the planned rows, and its hash."""
        files = self.manifest.files if self.manifest.is_tiled else ()
        stops = [0, *accumulate(file.num_done for file in files)]
        return {
            file.name: (start, stop, file.sha256)
            for file, start, stop in zip(files, stops, stops[1:], strict=False)
        }

    def _places(self, left_out: Collection[str]) -> Iterator[pl.Series]:
        """Yield for each row group where its rows stand among the planned ones."""
        if self.manifest.index is None and not self.manifest.is_tiled:
            raise OutputError(f"{self.name} has no index of rows; name them with {option('--on')}")
        starts = pl.Series(self.starts)
        paths = {self.storage.path(name) for name in left_out}
        for file, _, ordinals in row_groups(self.storage, self.manifest, self.plan):
            if file.path in paths:
                continue
            segments, rows = (pl.Series(ordinals().column(name)) for name in (SEGMENT, ROW))
            yield (starts.gather(segments) + rows).alias(PLACE)

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
        twice = rows.group_by(keys).agg(pl.len().alias(AT)).filter(pl.col(AT) > 1).head(1)
        for *values, num_rows in twice.iter_rows():
            row = ", ".join(f"{name} = {value!r}" for name, value in zip(on, values, strict=True))
            msg = f"{row} is in {num_rows} rows of {self.name}, expected in one; name more columns"
            raise bad_on(msg)


class Buckets:
    """Rows spread over temporary files by number: what belongs together is in one of them."""

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
        found = [pl.DataFrame(schema=self._schema)]
        if number in self.numbers:
            with (self._folder / str(number)).open("rb") as file:
                while file.peek(1):
                    found.append(pl.DataFrame(pa.ipc.open_stream(file).read_all()))
        return pl.concat(found)


def label_name(number: int) -> str:
    """Name the column of `Both.pairs` with the new side's label of a number; `OLD` behind it."""
    return f"label_{number}"


def bad_on(problem: str) -> ConfigError:
    """Refuse columns that are to name rows."""
    return ConfigError("--on", [problem])


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
        self.keys = [f"on_{number}" for number in range(len(on))] or [KEY]
        self.shared = [key for key in new.columns if key in old.columns and self._is_alike(key)]
        """Keys of columns that both have, of one type."""
        self.labels = [name for name in new.labels if name in old.labels]
        self.shared_files: set[str] = set()
        """Files of both whose rows are each the same row in both: not compared."""
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
                    raise bad_on(msg)
            was, now = self.old.schema[name], self.new.schema[name]
            if was != now or was.is_nested():
                msg = f"{name} is {was} and {now}, expected one plain type in both snapshots"
                raise bad_on(msg)

    def pairs(self, folder: Path) -> Iterator[pl.DataFrame]:
        """Pair the rows: each of both once, its class, where it stands in each, its labels.

        Args:
            folder: For temporary files.

        Raises:
            ConfigError: Columns of `on` do not name rows.
        """
        moves = None if self.on else self._moves()  # First, as it takes memory of its own.
        if moves is not None:
            yield from self._shared(moves)
        old = self._spread(self.old, folder / "old", None)
        new = self._spread(self.new, folder / "new", moves)
        for number in sorted(old.numbers | new.numbers):
            sides = old.rows(number), new.rows(number)
            for side, rows in zip((self.old, self.new), sides, strict=True):
                if self.on:
                    side.check_names(rows, self.keys, self.on)
            yield self._joined(*sides)

    def _shared(self, moves: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """Pair the rows of files that both snapshots have and whose rows are paired one by one.

        Nothing of them differs, so that no more than their labels is read.
        """
        ends = pl.col("first") + pl.col("length"), pl.col("was") + pl.col("length")
        is_new = (pl.col("first") != ends[0].shift()) | (pl.col("was") != ends[1].shift())
        run = is_new.fill_null(value=True).cum_sum().alias("run")
        runs = moves.group_by(run, maintain_order=True).agg(
            pl.col("first", "was").first(), pl.col("length").sum()
        )
        found = {first: (was, length) for _, first, was, length in runs.iter_rows()}
        starts, before = list(found), self.old.spans()
        for name, (start, stop, sha256) in self.new.spans().items():
            first = starts[at - 1] if (at := bisect_right(starts, start)) else stop
            was, length = found.get(first, (0, 0))
            moved = (was + start - first, was + stop - first, sha256)
            if stop <= first + length and before.get(name) == moved:
                self.shared_files.add(name)
        names = [AT, *(label_name(number) for number in range(len(self.labels)))]
        columns = [column for name in names for column in (name, pl.col(name).alias(name + OLD))]
        same, place = pl.lit(SAME, pl.UInt8).alias(CLASS), pl.lit(None, pl.Int64).alias(PLACE)
        for rows in self.new.shared_rows(self) if self.shared_files else ():
            yield rows.select(same, *columns, place)

    def _spread(self, side: Side, folder: Path, moves: pl.DataFrame | None) -> Buckets:
        """Read the rows of a snapshot; both rows of a pair go into buckets of one number."""
        num_rows = max(
            one.manifest.num_ok + one.manifest.num_errors for one in (self.old, self.new)
        )
        # By keys, each few rows go to all buckets, which are twice as large to be half as many.
        num_buckets = min((num_rows // _BUCKET_ROWS >> bool(self.on)) + 1, _MOST_BUCKETS)
        schema = side.frame.select(side.compared(self)).collect_schema()
        schema.update(dict.fromkeys([AT] if self.on else [AT, PLACE, KEY], pl.Int64()))
        buckets = Buckets(folder, schema)
        if self.on:
            number = pl.struct(self.keys).hash() % num_buckets
            for rows in side.rows(self):
                buckets.add(rows.drop_nulls(self.keys), number)
            return buckets
        number = pl.coalesce(KEY, PLACE) // (num_rows // num_buckets + 1)
        for rows in side.rows(self):
            buckets.add(_rekeyed(rows, moves), number)
        return buckets

    def _moves(self) -> pl.DataFrame:
        """Where runs of rows of the new snapshot stand, and where they stood in the old."""
        was, now = self.old.starts, self.new.starts
        spans = paired(self.old.place, self.new.place)
        moves = (
            (now[span.segment] + span.start, was[span.old_segment] + span.old_start, span.length)
            for span in spans
        )
        names = ("first", "was", "length")
        return pl.DataFrame(moves, schema=dict.fromkeys(names, pl.Int64), orient="row")

    def _joined(self, old: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
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
        place = [] if self.on else [PLACE]
        return new.join(old, on=self.keys, how="full", suffix=OLD).select(kind, *wanted, *place)


def _rekeyed(rows: pl.DataFrame, moves: pl.DataFrame | None) -> pl.DataFrame:
    """Give rows the keys that they had in the old snapshot; null: not there."""
    if moves is None:
        return rows.with_columns(pl.col(PLACE).alias(KEY))
    offset = pl.col(PLACE) - pl.col("first")
    return (
        rows.set_sorted(PLACE)
        .join_asof(moves.set_sorted("first"), left_on=PLACE, right_on="first", coalesce=False)
        .with_columns(pl.when(offset < pl.col("length")).then(pl.col("was") + offset).alias(KEY))
        .drop(moves.columns)
    )


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
