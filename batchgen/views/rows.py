"""Rows of an output, for people: those asked for, where each stands in the input, errors by kind.

`Rows` and `Status` are what looking at an output gives in Python: values for programs, lines for
people.

Files are read by row group, each at most some 8 MiB, and only those that hold what is looked for;
of a very long output a spread of them tells of errors and lengths. Damage that only a hash could
show is not looked for: that is what `batchgen verify` is for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.core.data import pl, take_rows
from batchgen.core.errors import ConfigError, ExitCode, OutputError, SourceError, suggestion
from batchgen.core.places import Root
from batchgen.core.records import Ranges
from batchgen.core.runtime import Told, command, option, printable
from batchgen.pipeline.frozen import check_unchanged
from batchgen.source.text import read_lines
from batchgen.source.values import to_python
from batchgen.storage.remote import storage_at
from batchgen.store.books import PARTS, Kept, Manifest, Places, Plan, Segment
from batchgen.store.ledger import Ledger
from batchgen.store.published import groups_of, row_groups, stretches
from batchgen.store.result_files import ROW, SEGMENT, ResultFile
from batchgen.store.snapshot import find_snapshot
from batchgen.views.status import as_text, exit_code_of, not_begun

if TYPE_CHECKING:
    from batchgen.storage import LocalStorage


INPUT, LINE = "_batchgen_input", "_batchgen_line"
"""Keys of a shown row beside its columns: where it stands in the input, and its line there."""
MOST_GROUPS = 1000
"""Row groups that are looked at for figures: some 16 million rows."""
_ORDINAL = (SEGMENT, ROW)
_MOST_KINDS = 10
_MOST_CHARS = 200


class Place(NamedTuple):
    """Where a row is: numbers of the file, of the row group in it, and of the row in that."""

    file: int
    group: int
    row: int


class ErrorKind(NamedTuple):
    """Errors of one type."""

    error_type: str
    num_rows: int
    first: Place


@dataclass(frozen=True, slots=True)
class Output:
    """Rows that can be seen: of a snapshot, or of the newest plan as far as they are durable."""

    storage: LocalStorage
    plan: Plan
    names: Sequence[str]
    """Their files."""
    manifest: Manifest | None
    """None: they are not published."""
    kept: Mapping[str, Kept]
    """Name -> file and place, of files that tell their rows by it: not of parts and version 1."""

    def column(self, name: str) -> str:
        """Name a column of batchgen's; by the plan, since the job file may have changed."""
        return f"{self.plan.prefix}{name}"

    def column_names(self) -> list[str]:
        """Names of the columns that users see."""
        with ResultFile(self.storage.path(self.names[0])) as file:
            found = [name for name in file.column_names if name not in _ORDINAL]
            self._check(file)
        return found

    def groups(
        self,
        columns: Sequence[str] | None = None,
        most: int | None = None,
        *,
        errors: bool = False,
    ) -> Iterator[tuple[int, int, pa.Table]]:
        """Yield file, number and rows of row groups, in order.

        Args:
            columns: Of these columns; None: all.
            most: About so many, spread over all files; None: all of them.
            errors: Only of files that may have errors.

        Raises:
            OutputError: A file cannot be read.
        """
        step = 1 if most is None else -(-len(self.names) // most)
        files = range(0, len(self.names), step)
        each = None if most is None else -(-most // len(files))
        for at in files:
            kept = self.kept.get(self.names[at])
            if errors and kept is not None and not kept.file.num_errors:
                continue
            for number, table in self._read(at, columns, each=each):
                yield at, number, table

    def _read(
        self,
        at: int,
        columns: Sequence[str] | None,
        *,
        each: int | None = None,
        among: Collection[int] | None = None,
    ) -> Iterator[tuple[int, pa.Table]]:
        with ResultFile(self.storage.path(self.names[at])) as file:
            step = 1 if each is None else max(1, -(-file.num_groups // each))
            for number in range(0, file.num_groups, step):
                if among is None or number in among:
                    table = file.group(number, columns)
                    self._check(file)
                    yield number, table
            self._check(file)

    def _check(self, file: ResultFile) -> None:
        if file.problem is None:
            return
        number = self.manifest.number if self.manifest is not None else None
        newest = Ledger(self.storage).latest_manifest()
        advice = f"`{command('verify')}` tells more"
        if number is not None and newest is not None and number != newest.number:
            advice = f"bring snapshot {number}'s files back from a backup, if they are needed"
        msg = f"{self.storage.where}: its rows cannot be read ({file.problem}); {advice}"
        raise OutputError(msg)

    def rows(
        self, places: Sequence[Place], columns: Sequence[str] | None = None, *, lines: bool = False
    ) -> list[dict[str, Any]]:
        """Read rows in full, in the order of their places.

        Args:
            places: Which rows.
            columns: Of these columns; None: all.
            lines: With `LINE`, the row's line of the input, where it is still there.

        Returns:
            A mapping a row: `INPUT`, where it is known, then the columns.
        """
        among: dict[int, set[int]] = {}
        for place in places:
            among.setdefault(place.file, set()).add(place.group)
        found: dict[Place, dict[str, Any]] = {}
        for at, numbers in among.items():
            for number, table in self._read(at, columns, among=numbers):
                here = [place for place in places if place[:2] == (at, number)]
                some = take_rows(table, pa.array([place.row for place in here], pa.int64()))
                found.update(zip(here, _readable(some), strict=True))
        ordinals = self._ordinals(places, among)
        shown = []
        for place in places:
            row = {name: value for name, value in found[place].items() if name not in _ORDINAL}
            told = self._told(*ordinals[place], lines=lines) if place in ordinals else {}
            shown.append({**told, **row})
        return shown

    def _ordinals(
        self, places: Sequence[Place], among: Mapping[int, Collection[int]]
    ) -> dict[Place, tuple[int, int]]:
        """Look up segment and row of each place; of a snapshot without an index of none."""
        tables: dict[tuple[int, int], pa.Table] = {}
        for at, numbers in among.items():
            if self.names[at].startswith(f"{PARTS}/"):
                for number, table in self._read(at, _ORDINAL, among=numbers):
                    tables[at, number] = table
        files = {self.storage.path(self.names[at]): at for at in among}
        kept = (one for at in among if (one := self.kept.get(self.names[at])) is not None)
        told = groups_of(stretches(self.storage, kept, Places(self.plan)))
        if not self.kept:
            told = row_groups(self.storage, self.manifest, self.plan)
        with suppress(OutputError):
            for file, number, ordinals in told:
                at = files.get(file.path, -1)
                if number in among.get(at, ()):
                    tables[at, number] = ordinals()
        found = {}
        for place in places:
            if (table := tables.get(place[:2])) is not None:
                segment, row = (table.column(name)[place.row].as_py() for name in _ORDINAL)
                found[place] = (segment, row)
        return found

    def _told(self, segment: int, row: int, *, lines: bool) -> Mapping[str, str | None]:
        file, is_lines = self.plan.segments[segment], self.plan.input_format in ("jsonl", "openai")
        told = {INPUT: f"row {row} of {file.path}" + (f" (line {row + 1})" if is_lines else "")}
        if lines and is_lines:
            line = _line(file, row, self.plan.job["input"].get("encoding"))
            return {**told, LINE: line}
        return told

    def places(self, num_rows: int, test: tuple[str, str | None] | None = None) -> list[Place]:
        """Find the first rows, in order.

        Args:
            num_rows: At most so many.
            test: A column and the text by which it tells errors, or None for any text; None: all
                rows.
        """
        found: list[Place] = []
        wanted = test[1] if test is not None else None
        column_names = [test[0] if test else self.column("status")]
        for at, number, table in self.groups(column_names, errors=test is not None):
            if len(found) >= num_rows:
                break
            column = table.column(0)
            is_wanted = pc.is_valid(column) if wanted is None else pc.equal(column, wanted)
            here = pc.indices_nonzero(is_wanted)[: num_rows - len(found)]
            found += [Place(at, number, row) for row in here.to_pylist()]
        return found

    def error_kinds(self) -> list[ErrorKind]:
        """Count errors by type, most first; of a very long output in a part of it."""
        found: dict[str, ErrorKind] = {}
        for at, number, table in self.groups([self.column("error_type")], MOST_GROUPS, errors=True):
            column = table.column(0)
            for entry in pc.value_counts(column.drop_null()).to_pylist():
                kind, num = entry["values"], entry["counts"]
                if before := found.get(kind):
                    found[kind] = before._replace(num_rows=before.num_rows + num)
                else:
                    row = pc.index(column, kind).as_py()
                    found[kind] = ErrorKind(kind, num, Place(at, number, row))
        return sorted(found.values(), key=lambda kind: (-kind.num_rows, kind.error_type))


def output_of(root: Root, snapshot: int | None = None) -> Output | None:
    """Find the rows that can be seen under an output folder; None if there are none yet.

    Args:
        root: The folder.
        snapshot: Number of an old snapshot; None: the newest plan's rows.

    Raises:
        OutputError: There is no such snapshot, or the folder was written by another version.
    """
    storage = storage_at(root)
    ledger = Ledger(storage)
    if snapshot is not None:
        manifest, plan = find_snapshot(ledger, snapshot), ledger.plan(snapshot)
        return _published(storage, plan, manifest)
    newest, latest = ledger.latest_plan(), ledger.latest_manifest()
    if newest is None:
        return None
    if latest is not None and latest.number == newest.number:
        return _published(storage, newest, latest)
    durable = ledger.durable(newest)
    kept = {one.file.name: one for one in durable.kept}
    names = [*(part.name for part in durable.parts), *kept]
    return Output(storage, newest, names, None, kept) if names else None


def _published(storage: LocalStorage, plan: Plan, manifest: Manifest) -> Output:
    kept = {one.file.name: one for one in manifest.tiles()} if manifest.is_tiled else {}
    return Output(storage, plan, [file.name for file in manifest.files], manifest, kept)


@dataclass(frozen=True, slots=True)
class Shown:
    """Which rows are to be shown, and what of them."""

    num_rows: int = 5
    errors: bool = False
    """Only rows that are errors."""
    error_type: str | None = None
    """Only errors of this type."""
    columns: Sequence[str] = ()
    """Only these columns; empty: all."""
    snapshot: int | None = None
    """Of an old snapshot, whatever has been done since."""
    lines: bool = False
    """With each row's line of the input, where that is a file of lines."""


def rows(root: Root, asked: Shown) -> list[dict[str, Any]]:
    """Read the first rows of the snapshot, or of what is durable while nothing is published.

    Raises:
        OutputError: There is no such snapshot, or the folder was written by another version.
        ConfigError: There is no such column, or no error of this type.
    """
    output = output_of(root, asked.snapshot)
    if output is None:
        return []
    known = output.column_names()
    if unknown := [name for name in asked.columns if name not in known]:
        raise ConfigError(
            option("--columns"), [f"no column {n!r}{suggestion(n, known)}" for n in unknown]
        )
    test: tuple[str, str | None] | None = None
    if asked.errors:
        test = output.column("status"), "error"
    if asked.error_type is not None:
        test = (output.column("error_type"), asked.error_type)
    places = output.places(asked.num_rows, test)
    if asked.error_type is not None and asked.num_rows and not places:
        kinds = [kind.error_type for kind in output.error_kinds()]
        told = f"no error {asked.error_type!r}{suggestion(asked.error_type, kinds)}"
        raise ConfigError(option("--error-type"), [told])
    return output.rows(places, asked.columns or None, lines=asked.lines)


def error_lines(root: Root) -> list[str]:
    """Say of each type of error how many rows have it, and what is wrong with one; most first."""
    output = output_of(root)
    if output is None:
        return []
    kinds, column = output.error_kinds()[:_MOST_KINDS], output.column("error")
    lines = []
    for kind, row in zip(kinds, output.rows([kind.first for kind in kinds], [column]), strict=True):
        why, where = " ".join(str(row[column] or "").split()), str(row.get(INPUT, ""))
        # Texts of the reader name file and line themselves.
        is_placed = not where or where.partition(" of ")[2].partition(" (line ")[0] in why
        line = f"{kind.error_type} {kind.num_rows:,}: {why if is_placed else f'{where}: {why}'}"
        lines.append(line if len(line) <= _MOST_CHARS else f"{line[: _MOST_CHARS - 3]}...")
    return lines


def readable(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """Return rows as Python's values; what Python has no type for is text, see `source.values`."""
    return _readable(frame.to_arrow())


def _readable(table: pa.Table) -> list[dict[str, Any]]:
    columns = [map(_plain, to_python(column.combine_chunks())) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _plain(value: Any) -> Any:  # noqa: ANN401 - a column's value has any type
    """Bytes that are not UTF-8 as Python writes them: in a prompt they would be an error."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return bytes(value) if isinstance(value, bytes) else value


def as_json(value: Any) -> Any:  # noqa: ANN401 - a row's value has any type
    """Return the same with null for numbers that JSON has no form for, as many parsers demand."""
    if isinstance(value, dict):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(file: Segment, row: int, encoding: str | None) -> str | None:
    """Read a line of the input; None where it is there no more, or too long for a row."""
    with suppress(SourceError):
        check_unchanged(file)
        for found in read_lines(file.path, Ranges([(row, row + 1)]), 1, encoding=encoding):
            for line in found.lines:
                return None if line is None else line.decode("utf-8", "backslashreplace")
    return None


PLACE = "--- "
"""Begins the line that names a row."""


@dataclass(frozen=True, slots=True, repr=False)
class Status(Told):
    """The state of a job; `status["state"]` and the other keys are those of `status_of`."""

    root: Root
    facts: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - a fact of any type
        return self.facts[name]

    @property
    def exit_code(self) -> ExitCode:
        """What the shell gives, for monitors."""
        return exit_code_of(self.facts)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dict(self.facts)

    def as_text(self) -> str:
        """The lines that a person reads."""
        return as_text(self.root, self.facts)


@dataclass(frozen=True, slots=True, repr=False)
class Rows(Told):
    """Rows of an output: a sequence of dicts, column -> value."""

    root: Root
    rows: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, at: int) -> Mapping[str, Any]:
        return self.rows[at]

    @property
    def reason(self) -> str | None:
        """Why there are none; None if there are some."""
        if self.rows:
            return None
        why = not_begun(self.root)
        return f"{self.root}: {why}" if why else "no such rows"

    def as_text(self) -> str:
        """The lines that a person reads: where each row is, and its columns that have a value."""
        lines = []
        for number, row in enumerate(self.rows):
            place = str(row.get(INPUT, f"row {number} of those shown"))
            lines.append(f"{PLACE}{printable(place, keep='')}")
            for name, value in row.items():
                if value is not None and name != INPUT:
                    shown = "line" if name == LINE else printable(name, keep="")
                    lines.append(f"{shown:24} {short(value)}")
        return "\n".join(lines) or str(self.reason)


_LISTS = ("output", "text", "reasoning", "tool_calls", "logprobs")
"""Columns that may have a value for each sample."""


def exploded(frame: pl.LazyFrame, prefix: str) -> pl.LazyFrame:
    """Return a row for each sample, in order; a row without any answer stays one row.

    This is a way to read and not to publish: a published file has one row for each row of the
    input, which is what nights, `diff` and the books of a run go by.

    What `samples` tells goes to the columns of the same names, and its place to `sample`.

    Args:
        frame: A snapshot's rows.
        prefix: Of batchgen's columns.

    Raises:
        OutputError: They do not tell their samples one by one.
    """
    names, samples = frame.collect_schema().names(), f"{prefix}samples"
    if samples not in names:
        raise OutputError(f"explode: no column {samples!r}, expected one with sampling.n > 1")
    lists = [prefix + name for name in _LISTS if prefix + name in names]
    one, number = pl.col(samples).struct, pl.int_ranges(pl.col(samples).list.len())
    error = pl.when(one.field("error").is_not_null())
    told = {name: one.field(name) for name in ("verdict", "finish_reason", "num_output_tokens")}
    told |= {"error": one.field("error"), "error_type": error.then(one.field("verdict"))}
    told["status"] = error.then(pl.lit("error")).otherwise(pl.lit("ok"))
    is_one = pl.col(samples).is_not_null()
    return (
        frame.with_columns(number.alias(f"{prefix}sample"))
        .explode(*lists, samples, f"{prefix}sample")
        .with_columns(
            one.field("cumulative_logprob").alias(f"{prefix}cumulative_logprob"),
            *(
                pl.when(is_one).then(value).otherwise(pl.col(prefix + name)).alias(prefix + name)
                for name, value in told.items()
            ),
        )
        .drop(samples)
    )


def short(value: Any) -> Any:  # noqa: ANN401 - a column's value has any type
    """Round numbers to the nine digits that people may read; JSON has all of them."""
    if isinstance(value, dict):
        return {name: short(item) for name, item in value.items()}
    if isinstance(value, list):
        return [short(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value
