"""What earlier plans have answered, read back for a later one: by place, and by request.

Rows that stand in both plans are taken over under their new ordinals, from parts or from a
snapshot. Of other rows, equal requests are computed once: in memory is where each answer is, 16
bytes a row; the answers stay on the disk. What is damaged is left out and told of: its rows are
then computed again.

Of requests that are answered, or being answered, the key is known by its first 64 bits, see `keys`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.core.data import pl, take_rows
from batchgen.core.errors import OutputError
from batchgen.core.records import Request, RowSet
from batchgen.core.runtime import option
from batchgen.source.columns import retyped
from batchgen.store.keys import KeySet, prefix_of, prefixes_of, read_keys
from batchgen.store.published import PublishedRows, ordinals_of, proofs
from batchgen.store.result_files import ROW, SEGMENT, ResultFile, check_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from batchgen.storage import LocalStorage
    from batchgen.store.books import Chunk, Manifest, Part, Plan
    from batchgen.store.matching import Renumbering


Dedupe = Literal["auto", "always", "never"]


class Deduper:
    """Lets the first of equal requests pass and sets the others aside. For any thread.

    Where sampling is greedy, or the job says so, equal requests share one answer. Otherwise each
    row has its own draw: of equal rows that could not be taken over one by one, the first keeps
    the base's answer, unless the plan has used one of that key; the others are drawn anew.
    """

    def __init__(self, base: KeySet, own: KeySet, dedupe: Dedupe) -> None:
        """Begin.

        Args:
            base: Answered in the plans that this one is based on.
            own: Answered in this plan; grows.
            dedupe: Whether rows of one job may share an answer; auto: where sampling is greedy.
        """
        self._base = base
        self._own = own
        self._dedupe = dedupe
        self._lock = threading.Lock()
        self.num_set_aside = 0
        """Rows that wait for another row's answer."""
        self.num_taken_back = 0
        """Requests that were let pass and have not been computed."""

    def passing(self, requests: Sequence[Request]) -> list[Request]:
        """The requests that have to be computed."""
        prefixes = [prefix_of(request.request_key) for request in requests]
        passes = self.let_pass(prefixes, [request.seed is not None for request in requests])
        return [request for request, passed in zip(requests, passes, strict=True) if passed]

    def let_pass(self, prefixes: Sequence[int], has_seed: Sequence[bool]) -> list[bool]:
        """Whether each request, by the first 64 bits of its key, has to be computed."""
        with self._lock:
            in_base, in_own = self._base.know(prefixes), self._own.know(prefixes)
            passes = [
                not self._has_answer(*one)
                for one in zip(prefixes, has_seed, in_base, in_own, strict=True)
            ]
            self.num_set_aside += len(passes) - sum(passes)
        return passes

    def take_back(self, those: Iterable[tuple[int, bool]]) -> None:
        """Requests (prefix, has_seed) that were let pass were not computed: others like them may.

        As far as they are remembered one by one; what is not waits for an answer that does not
        come, and is computed in the end.
        """
        with self._lock:
            for prefix, has_seed in those:
                self.num_taken_back += 1
                # One with a draw of its own has not been remembered; another like it may be.
                if shares(self._dedupe, has_seed=has_seed):
                    self._own.forget(prefix)

    def _has_answer(self, prefix: int, has_seed: bool, in_base: bool, in_own: bool) -> bool:  # noqa: FBT001
        if shares(self._dedupe, has_seed=has_seed):
            return in_base or in_own or not self._own.add(prefix)
        if not has_seed:
            return in_base  # It would be the same again.
        return in_base and not in_own and self._own.add(prefix)


def shares(dedupe: Dedupe, *, has_seed: bool) -> bool:
    """Whether a request may have the answer of an equal one."""
    return not has_seed if dedupe == "auto" else dedupe == "always"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to take over."""

    schema: pa.Schema
    """Schema of parts."""
    prefix: str
    moves: Renumbering
    """Which rows, and where they go."""
    takes_errors: bool
    """Whether rows that are errors are wanted too."""
    tell: Callable[[str], None]
    """Hears of damage."""
    carried: frozenset[str] = frozenset()
    """Columns of the input: those that may be new, or have another type than they had."""

    def of(self, table: pa.Table) -> pa.Table:
        """The wanted rows of a table in the part schema, under their new ordinals."""
        return self.moves.table(table, self.prefix, takes_errors=self.takes_errors)


class Piece(NamedTuple):
    """Rows taken over."""

    table: pa.Table
    """Results in the part schema."""
    skipped: RowSet
    """Rows that end without a result."""
    engine: str
    """Who answered."""


def from_parts(storage: LocalStorage, parts: Sequence[Part], wanted: Wanted) -> Iterator[Piece]:
    """Yield the wanted rows of parts, answered or skipped, part by part.

    Raises:
        StorageError: Something cannot be read right now.
    """
    for part in parts:
        if not part.footer.done & wanted.moves.old_rows:
            continue
        facts = part.footer.engine
        engine = f"{facts.get('engine', '')} {facts.get('version', '')}".strip()
        try:
            tables, skipped = _read_part(storage.path(part.name), part)
        except ValueError as error:
            wanted.tell(f"{part.name}: damaged ({error}); its rows are done again")
            continue
        if skipped is None:
            wanted.tell(f"{part.name}: damaged; rows that cannot be read are done again")
        found = [wanted.of(_in_part_schema(rows, wanted)) for rows in tables]
        table = pa.concat_tables([wanted.schema.empty_table(), *found])
        yield Piece(table, wanted.moves.ranges(RowSet() if skipped is None else skipped), engine)


def _read_part(path: Path, part: Part) -> tuple[list[pa.Table], RowSet | None]:
    """The row groups that can be read, and the skipped rows, None if they cannot be told.

    Raises:
        ValueError: Nothing of the part can be believed.
    """
    with ResultFile(path) as file:
        tables = [table for _, table in file.groups()]
        if not file.num_groups and file.problem is not None:
            raise ValueError(file.problem)
        is_whole = file.problem is None
    seen = check_rows(tables, part.footer, is_all=is_whole)
    return tables, part.footer.done - seen if is_whole else None


def gathered(pieces: Iterable[Piece], max_rows: int, max_bytes: int) -> Iterator[Piece]:
    """Join pieces to ones worth a part each, their rows in ordinal order.

    Args:
        pieces: Disjoint.
        max_rows: Yield as soon as there are so many rows.
        max_bytes: Or so many bytes of Arrow memory.
    """
    held: list[Piece] = []
    num_rows = num_bytes = 0
    for piece in pieces:
        held.append(piece)
        num_rows += piece.table.num_rows
        num_bytes += piece.table.nbytes
        if num_rows >= max_rows or num_bytes >= max_bytes:
            yield _joined(held)
            held, num_rows, num_bytes = [], 0, 0
    if held and (joined := _joined(held)).table.num_rows + len(joined.skipped):
        yield joined


def _joined(pieces: Sequence[Piece]) -> Piece:
    table = pa.concat_tables([piece.table for piece in pieces])
    order = pc.sort_indices(table, sort_keys=[(SEGMENT, "ascending"), (ROW, "ascending")])
    skipped = RowSet.of_spans(span for piece in pieces for span in piece.skipped.spans())
    engines = sorted({name for piece in pieces for name in piece.engine.split(", ")} - {""})
    return Piece(take_rows(table, order), skipped, ", ".join(engines))


_ENGINE_KEY = b"batchgen.engine"


def from_snapshot(
    storage: LocalStorage, manifest: Manifest, plan: Plan, wanted: Wanted
) -> Iterator[Piece]:
    """Yield the wanted rows of a snapshot in its ordinal order, and those it skipped last.

    Args:
        storage: The output.
        manifest: The snapshot's.
        plan: The plan that it is of.
        wanted: Which rows.

    Raises:
        OutputError: Rows cannot be told apart, or it has other columns.
        StorageError: Something cannot be read right now.
    """
    moves = wanted.moves
    with PublishedRows(storage, manifest, plan) as snapshot:
        for one in snapshot.files(moves.old_rows):
            num_damaged = 0 if one.num_groups else one.entry.num_rows
            for group in range(one.num_groups):
                if not (here := (rows := one.rows(group)) & moves.old_rows):
                    continue
                found = one.file.group(group)
                if found is None:
                    num_damaged += here.num_rows
                    continue
                table = wanted.of(_with_ordinals(one.file, found, ordinals_of(rows), wanted))
                engine = one.file.metadata.get(_ENGINE_KEY, b"").decode()
                yield Piece(table, RowSet(), engine)
            if num_damaged:
                why = f"damaged ({one.file.problem}); {num_damaged:,} rows done again"
                wanted.tell(f"{one.entry.name}: {why}")
        if manifest.num_skipped:
            skipped = moves.ranges(snapshot.skipped(moves.old_rows))
            yield Piece(wanted.schema.empty_table(), skipped, "")


def _with_ordinals(
    file: ResultFile, rows: pa.Table, ordinals: pa.Table, wanted: Wanted
) -> pa.Table:
    """Published rows with their ordinals."""
    if {*wanted.schema.names[ordinals.num_columns :]} - {*rows.column_names, *wanted.carried}:
        raise OutputError(
            f"{file.path}: has other columns than this job's parts; use the batchgen that wrote "
            f"it, or begin anew with {option('--fresh')}"
        )
    for at, name in enumerate((SEGMENT, ROW)):
        rows = rows.add_column(at, ordinals.schema.field(at).with_name(name), ordinals.column(at))
    return _in_part_schema(rows, wanted)


def _in_part_schema(rows: pa.Table, wanted: Wanted) -> pa.Table:
    """Rows with the columns of now: carried ones may be new, or have another type.

    A row with a value that the new type does not hold is left out. There is none, unless somebody
    else wrote the file: a type follows from all values of the input.
    """
    columns: list[pa.ChunkedArray | pa.Array] = []
    misfits: set[int] = set()
    for field in wanted.schema:
        if field.name in wanted.carried and field.name not in rows.column_names:
            columns.append(pa.nulls(rows.num_rows, field.type))
        elif field.name in wanted.carried:
            old = rows.schema.field(field.name)
            column, bad = retyped(rows.column(field.name), old, field)
            columns.append(column)
            misfits.update(bad)
        else:
            columns.append(rows.column(field.name).cast(field.type))
    table = pa.Table.from_arrays(columns, schema=wanted.schema)
    if not misfits:
        return table
    fitting = [at for at in range(len(table)) if at not in misfits]
    return take_rows(table, pa.array(fitting, pa.int64()))


class Source(NamedTuple):
    """A Parquet file of results: a part, or a published file."""

    name: str
    takes_errors: bool
    """Whether a row that is an error answers for rows like it."""
    chunks: Sequence[Chunk] = ()
    """Hashes of a published file: an answer is believed if its row group is what was written."""


def published_sources(
    storage: LocalStorage, manifest: Manifest, *, takes_errors: bool
) -> list[Source]:
    """The files of a snapshot.

    Raises:
        StorageError: Its index cannot be read right now.
    """
    return [Source(file.name, takes_errors, chunks) for file, chunks in proofs(storage, manifest)]


def key_prefixes(
    storage: LocalStorage, sources: Sequence[Source], prefix: str, tell: Callable[[str], None]
) -> Iterator[pl.Series]:
    """Yield the first 64 bits of every key that has an answer, repeats included, piece by piece.

    Raises:
        StorageError: A source cannot be read right now.
    """
    for source in sources:
        known = read_keys(storage, source.name, takes_errors=source.takes_errors)
        if known is not None:
            yield known
            continue
        for _, keys in _key_groups(storage, source, prefix, tell):
            yield keys["prefix"]


def _key_groups(
    storage: LocalStorage, source: Source, prefix: str, tell: Callable[[str], None]
) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield each row group's number and its rows that answer: `prefix`, `row`, `is_ok`."""
    key, status = f"{prefix}request_key", f"{prefix}status"
    with ResultFile(storage.path(source.name), source.chunks) as file:
        # Whose answer is copied is proven then.
        for group, table in file.groups([key, status], is_proven=False):
            keys = pl.DataFrame(
                {
                    "prefix": prefixes_of(pl.Series(table.column(key).cast(pa.string()))),
                    "row": pl.int_range(table.num_rows, dtype=pl.UInt32, eager=True),
                    "is_ok": pl.Series(table.column(status).cast(pa.string())) == "ok",
                }
            )
            answers = pl.col("prefix").is_not_null() & (
                pl.lit(source.takes_errors) | pl.col("is_ok")
            )
            yield group, keys.filter(answers)
        _tell_of(file, tell)


def _tell_of(file: ResultFile, tell: Callable[[str], None]) -> None:
    if file.problem is not None:
        tell(f"{file.path.name}: damaged ({file.problem}); its answers are not used again")


@dataclass(eq=False)
class AnsweredKeys:
    """Finds the answer of each request key. Its files must stay while it is in use."""

    storage: LocalStorage
    """Where the sources are."""
    sources: Sequence[Source]
    """Where two have a key, the earlier one answers; an ok row before an error."""
    columns: Sequence[pa.Field]
    """What to return of an answer, in the part schema: nothing carried, no ordinal."""
    prefix: str
    """Of batchgen's columns."""
    tell: Callable[[str], None]
    """Hears of damage."""

    def __post_init__(self) -> None:
        """Begin.

        Raises:
            StorageError: A source cannot be read right now.
        """
        self._columns = pa.schema(self.columns)
        self._groups: list[tuple[Source, int]] = []
        self._index = self._read(self.sources)

    def _read(self, sources: Sequence[Source]) -> pl.DataFrame:
        """Read where the answers are, those that are ok first.

        Neither sorted nor without repeats: at ten million rows, either would cost more memory than
        the places themselves.
        """
        kinds = {"prefix": pl.UInt64, "group": pl.UInt32, "row": pl.UInt32}
        found = {is_ok: [pl.DataFrame(schema=kinds)] for is_ok in (True, False)}
        for source in sources:
            for group, keys in _key_groups(self.storage, source, self.prefix, self.tell):
                self._groups.append((source, group))
                number = pl.lit(len(self._groups) - 1, pl.UInt32)
                rows = keys.with_columns(group=number)
                for is_ok, frames in found.items():
                    frames.append(rows.filter(pl.col("is_ok") == is_ok).select(*kinds))
        return pl.concat([*found[True], *found[False]])

    def find(self, keys: Sequence[str]) -> tuple[list[int], pa.Table]:
        """Look answers up.

        Args:
            keys: Request keys, repeats allowed.

        Returns:
            Indexes into `keys` that have an answer, ascending, and the answers, one row each.

        Raises:
            StorageError: A source cannot be read right now.
        """
        wanted = pl.DataFrame({"key": keys}, schema={"key": pl.String}).with_row_index("at")
        wanted = wanted.with_columns(prefix=prefixes_of(wanted["key"]))
        here = self._index.join(wanted, on="prefix", how="semi", maintain_order="left")
        here = here.unique("prefix", keep="first", maintain_order=True)
        hits = wanted.join(here, on="prefix").sort("group", "at")
        places: list[int] = []
        tables = [self._columns.empty_table()]
        # Mostly many row groups of one file are asked for in a row.
        by_group = hits.partition_by("group", maintain_order=True)
        for source, those in groupby(by_group, lambda rows: self._groups[rows["group"][0]][0]):
            with ResultFile(self.storage.path(source.name), source.chunks) as file:
                for rows in those:
                    answers = self._answers(file, self._groups[rows["group"][0]][1])
                    if answers is None:
                        continue
                    table = take_rows(answers, rows["row"].cast(pl.Int64).to_arrow())
                    found = pl.Series(table.column(f"{self.prefix}request_key"), dtype=pl.String)
                    is_same = found == rows["key"]
                    tables.append(table.filter(is_same.to_arrow()))
                    places += rows["at"].filter(is_same).to_list()
                _tell_of(file, self.tell)
        order = sorted(range(len(places)), key=places.__getitem__)
        answers = take_rows(pa.concat_tables(tables), pa.array(order, pa.int64()))
        return [places[at] for at in order], answers

    def _answers(self, file: ResultFile, group: int) -> pa.Table | None:
        table = file.group(group, self._columns.names)
        try:
            return None if table is None else table.cast(self._columns)
        except pa.ArrowException:  # The footer of a part has no checksum: its types may lie.
            self.tell(f"{file.path.name}: damaged; answers in it are not used again")
            return None
