"""Which rows of a new plan are rows of an earlier one, told without parsing any.

A file with the same content has the same rows. Of a JSONL file that changed, lines are compared by
their digests: those at the same place, at the place to which an insertion or a deletion has
shifted them, and those that moved by some hundred thousand lines. What is not matched is no loss
but work: such a row is read, and then its `request_key` decides.

    _batchgen/rows/SHA256.bin        of the input file with that content, one digest a physical row

A digest is the first half of the sha256 of a row as it stands in the file, 16 bytes. Equal digests
are equal rows. Only that: a digest file that is gone, torn or damaged makes rows look new, never
old.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from batchgen.core.data import pl, take_rows
from batchgen.core.records import Ranges, RowSet
from batchgen.core.runtime import open_file
from batchgen.source.columns import partition_texts, read_schema
from batchgen.source.text import DIGEST_BYTES
from batchgen.storage import LocalStorage, storage_error
from batchgen.store.result_files import ROW, SEGMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import pyarrow as pa

    from batchgen.store.books import Durable, Plan, Segment

    ReadDigests = Callable[[int, int], bytes]


_BLOCK_ROWS = 2**17
_AHEAD_ROWS = 2**17
"""How far a row may have moved to be found: at least this, at most three times as far."""
MAX_SPANS = 500_000
"""Most spans of a pair of plans: beyond, reading rows costs less memory than telling them apart."""
_LARGE_BYTES, _MOST_TIMES = 64 << 20, 64
DIGESTS = "_batchgen/rows"


def digests_of(digest: str) -> str:
    """The digest file of an input file with this content hash."""
    return f"{DIGESTS}/{digest}.bin"


class DigestFile:
    """Collects the digests of one file while it is scanned; nothing is there until `commit`."""

    def __init__(self, storage: LocalStorage, input_bytes: int = 2**63) -> None:
        """Begin.

        Args:
            storage: The output.
            input_bytes: Size of the input file. A file of nearly nothing but line ends has
                digests that are a thousand times as large: not worth keeping.

        Raises:
            StorageError: The temp file cannot be created.
        """
        self._most_bytes = _LARGE_BYTES + _MOST_TIMES * input_bytes
        self._storage = storage
        self._pending = storage.begin(f"{DIGESTS}/scan")
        self._error: OSError | None = None
        self._num_bytes = 0

    def add(self, digests: bytes) -> None:
        """Append; an error waits for `commit`, so that readers hear of none but their own."""
        self._num_bytes += len(digests)
        if self._error is None and self._num_bytes <= self._most_bytes:
            try:
                self._pending.write(digests)
            except OSError as error:
                self._error = error

    def commit(self, digest: str) -> None:
        """Name the file after the content that was scanned; leave none where no row was told.

        Raises:
            StorageError: It cannot be written.
        """
        if self._error is not None:
            self.discard()
            raise storage_error(self._storage.path(DIGESTS), self._error) from self._error
        if 0 < self._num_bytes <= self._most_bytes:
            self._pending.commit(f"{digest}.bin")
        else:
            self.discard()

    def discard(self) -> None:
        """Drop what was collected."""
        self._pending.discard()


def digest_reader(
    storage: LocalStorage, digest: str, num_rows: int
) -> Callable[[int, int], bytes] | None:
    """What reads the digests of rows `start` to `stop` of a file; None if they are not known.

    Args:
        storage: The output.
        digest: Content hash of the input file.
        num_rows: At least so many rows it must have.
    """
    path = storage.path(digests_of(digest))
    try:
        if path.stat().st_size < num_rows * DIGEST_BYTES:
            return None
    except OSError:
        return None

    def read(start: int, stop: int) -> bytes:
        try:
            with open_file(path) as file:
                file.seek(start * DIGEST_BYTES)
                data = file.read((stop - start) * DIGEST_BYTES)
        except OSError:
            data = b""  # Unknown rows cost work, no more.
        return data.ljust((stop - start) * DIGEST_BYTES, b"\0")

    return read


def blocks(num_rows: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """Start and stop of block after block."""
    for start in range(0, num_rows, block_rows):
        yield start, min(start + block_rows, num_rows)


class Span(NamedTuple):
    """Rows that follow each other in both plans."""

    segment: int
    start: int
    old_segment: int
    old_start: int
    length: int


def is_same_reading(old: Plan, new: Plan) -> bool:
    """Whether the rows of equal lines can be taken over: same selection, columns that are there."""
    tables = [
        {key: value for key, value in plan.job["input"].items() if key != "limit"}
        for plan in (old, new)
    ]
    return (
        tables[0] == tables[1]
        and old.input_format == new.input_format
        and _has_columns(old, new)
        and (old.counts_lines == new.counts_lines or _came_to_the_same(old, new))
    )


def _has_columns(old: Plan, new: Plan) -> bool:
    """Whether an earlier plan's rows have all that a later one carries, if with other types.

    That is so where the types are said to follow from all values, and what is not carried was not
    there: not before 0.2.
    """
    if old.schema == new.schema and list(old.carried) == list(new.carried):
        return True
    if not old.keys or any(segment.keys is None for segment in old.segments):
        return False
    return {*new.carried} - {*old.carried} <= {*new.carried}.difference(*old.keys)


def _came_to_the_same(old: Plan, new: Plan) -> bool:
    """Whether two ways to count rows gave one number; with a limit, that cannot be told."""
    num_rows = {segment.digest: segment.num_rows for segment in old.segments}
    return not (old.is_cut or new.is_cut) and all(
        num_rows.get(segment.digest, segment.num_rows) == segment.num_rows
        for segment in new.segments
    )


def match(storage: LocalStorage, old: Plan, new: Plan) -> list[Span]:
    """Find the rows of `old` in `new`: each at most once, each found at most once.

    Args:
        storage: With the digests of rows.
        old: An earlier plan.
        new: The plan that follows it, `is_same_reading`.
    """
    spans: list[Span] = []
    columns, were = read_schema(new.schema), read_schema(old.schema)
    for number, other in pairs(old.segments, new.segments):
        paths = new.segments[number].path, old.segments[other].path
        # What folders tell is part of a row, though no digest has it.
        if partition_texts(paths[0], columns) != partition_texts(paths[1], were):
            continue
        for start, was, length in match_files(storage, old.segments[other], new.segments[number]):
            spans.append(Span(number, start, other, was, length))
            if len(spans) > MAX_SPANS:
                return spans
    return spans


def match_files(
    storage: LocalStorage, before: Segment, after: Segment
) -> Iterator[tuple[int, int, int]]:
    """Yield runs of rows that two files have in common: (new start, old start, length).

    None of files that differ and whose rows have no digests, see `has_digests`.
    """
    if before.digest == after.digest:
        yield 0, 0, min(before.num_rows, after.num_rows)
        return
    old_rows = digest_reader(storage, before.digest, before.num_rows)
    new_rows = digest_reader(storage, after.digest, after.num_rows)
    if old_rows is not None and new_rows is not None:
        for runs in _aligned(old_rows, before.num_rows, new_rows, after.num_rows):
            yield from runs


def has_digests(storage: LocalStorage, *files: Segment) -> bool:
    """Whether the rows of files can be told apart without reading the files."""
    return all(digest_reader(storage, one.digest, one.num_rows) is not None for one in files)


def count_common(
    storage: LocalStorage,
    old: Sequence[tuple[Segment, Ranges]],
    new: Sequence[tuple[Segment, Ranges]],
) -> int | None:
    """Count rows of some files that stand, anywhere, among rows of others.

    Returns:
        None if it cannot be told, as not all of them have digests.
    """
    if not has_digests(storage, *(file for file, _ in (*old, *new))):
        return None
    counts = [
        pl.concat([_frame(b"", 0), *(frame for one in side for frame in _digests(storage, *one))])
        .group_by("a", "b")
        .len()
        for side in (old, new)
    ]
    both = counts[0].join(counts[1], on=["a", "b"])
    return int(both.select(pl.min_horizontal("len", "len_right").sum()).item())


def _digests(storage: LocalStorage, file: Segment, rows: Ranges) -> Iterator[pl.DataFrame]:
    read = digest_reader(storage, file.digest, file.num_rows)
    if read is not None:
        for start, stop in rows.spans:
            yield _frame(read(start, stop), start)


def pairs(old: Sequence[Segment], new: Sequence[Segment]) -> Iterator[tuple[int, int]]:
    """Yield the new and the old number of files to compare: of one content, else of one name.

    Content first: a log that was rotated has its rows under another name, and its name has others.
    """
    free = dict(enumerate(old))
    rest = dict(enumerate(new))
    for key in (
        lambda segment: (segment.path, segment.digest),
        lambda segment: segment.digest,
        lambda segment: segment.path,
    ):
        waiting: dict[object, list[int]] = {}
        for other in reversed(free):
            waiting.setdefault(key(free[other]), []).append(other)
        for number in list(rest):
            if others := waiting.get(key(rest[number])):
                other = others.pop()
                del free[other], rest[number]
                yield number, other


def _aligned(
    old: ReadDigests, num_old: int, new: ReadDigests, num_new: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Yield runs of equal rows, block by block: (new start, old start, length)."""
    shift = 0  # Old row minus new row, where the last block ended.
    num_read = 0
    free = _frame(b"", 0)  # Old rows that are read and not taken.
    for start, stop in blocks(num_new, _BLOCK_ROWS):
        upto = min(max(stop + shift + _AHEAD_ROWS, num_read), num_old)
        free = pl.concat([free, _frame(old(num_read, upto), num_read)])
        num_read = upto
        found, free = _matched(_frame(new(start, stop), start), free, shift)
        # What lies far behind is not searched again.
        free = free.filter(pl.col("row") >= start + shift - _AHEAD_ROWS)
        if len(found):
            shift = found["old"][-1] - found["row"][-1]
            yield _runs(found)


def _frame(digests: bytes, first: int) -> pl.DataFrame:
    """Rows with their digests in two halves; rows without one left out."""
    import pyarrow as pa

    num = len(digests) // 8
    halves = pl.Series(pa.Array.from_buffers(pa.uint64(), num, [None, pa.py_buffer(digests)]))
    if not num:
        halves = pl.Series([], dtype=pl.UInt64)
    frame = pl.DataFrame(
        {
            "row": pl.int_range(first, first + num // 2, dtype=pl.Int64, eager=True),
            "a": halves.gather_every(2),
            "b": halves.gather_every(2, 1),
        }
    )
    return frame.filter((pl.col("a") != 0) | (pl.col("b") != 0))


def _matched(
    new: pl.DataFrame, free: pl.DataFrame, shift: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Pairs `row`, `old` in the order of `row`, and the old rows that are left.

    First what is at its place, which is nearly everything on most nights; then the rest. Where a
    row stands several times, the first that is left meets the first.
    """
    at_place = (
        new.with_columns(old=pl.col("row") + shift)
        .join(free, left_on=["old", "a", "b"], right_on=["row", "a", "b"], how="semi")
        .select("row", "old")
    )
    rest = new.join(at_place, on="row", how="anti")
    free = free.join(at_place, left_on="row", right_on="old", how="anti")
    if rest.is_empty() or free.is_empty():
        return at_place, free
    moved = (
        _counted(rest)
        .join(
            _counted(free.join(rest, on=["a", "b"], how="semi")).rename({"row": "old"}),
            on=["a", "b", "count"],
        )
        .select("row", "old")
    )
    free = free.join(moved, left_on="row", right_on="old", how="anti")
    return pl.concat([at_place, moved]).sort("row"), free


def _counted(rows: pl.DataFrame) -> pl.DataFrame:
    """Tell equal rows apart by their count: the first, the second, ..."""
    return rows.sort("row").with_columns(count=pl.int_range(pl.len()).over("a", "b"))


def _runs(pairs: pl.DataFrame) -> list[tuple[int, int, int]]:
    """Pairs in the order of `row` as runs that grow together."""
    starts = (
        pairs.with_row_index("at")
        .filter(((pl.col("row").diff() != 1) | (pl.col("old").diff() != 1)).fill_null(value=True))
        .with_columns(length=pl.col("at").shift(-1, fill_value=len(pairs)) - pl.col("at"))
    )
    return list(starts.select("row", "old", "length").iter_rows())


def restricted(spans: Iterable[Span], todo: RowSet) -> list[Span]:
    """The parts of spans whose new rows are in `todo`."""
    found = []
    for span in spans:
        rows = todo.get(span.segment)
        if rows is None:
            continue
        for start, stop in rows.within(span.start, span.start + span.length):
            moved = start - span.start
            found.append(
                Span(span.segment, start, span.old_segment, span.old_start + moved, stop - start)
            )
    return found


def answered_by(spans: Sequence[Span], durable: Durable) -> list[Span]:
    """The parts of spans whose old rows have ended in the parts of an unfinished plan."""
    found = []
    done = durable.rows
    for span in spans:
        stop = span.old_start + span.length
        for first, end in done[span.old_segment].within(span.old_start, stop):
            start = span.start + first - span.old_start
            found.append(Span(span.segment, start, span.old_segment, first, end - first))
    return found


class Renumbering:
    """Spans between two plans, ready for use. Immutable."""

    def __init__(self, spans: Sequence[Span], old: Plan, new: Plan) -> None:
        """Prepare.

        Args:
            spans: See `matching.match`; disjoint in both plans.
            old: The earlier plan.
            new: The later plan.
        """
        by_old: dict[int, list[Span]] = {}
        for span in sorted(spans, key=lambda span: (span.old_segment, span.old_start)):
            by_old.setdefault(span.old_segment, []).append(span)
        self._by_old = by_old
        self.old_rows = old.rows & RowSet.of_spans(
            (span.old_segment, span.old_start, span.old_start + span.length) for span in spans
        )
        """Old segment -> the rows that are in the later plan."""
        names = Span._fields
        ordered = [span for found in by_old.values() for span in found]
        self._frame = pl.DataFrame(ordered, schema=dict.fromkeys(names, pl.Int64), orient="row")
        self._same_path = [
            segment
            for segment, found in by_old.items()
            if old.segments[segment].path == new.segments[found[0].segment].path
        ]

    def table(self, table: pa.Table, prefix: str, *, takes_errors: bool) -> pa.Table:
        """Rows of a table in the part schema that are in the later plan, with its ordinals.

        Error texts of rows that never became a request name the file and the line: those are
        taken only where both still hold.

        Args:
            table: Rows of the earlier plan, in ordinal order.
            prefix: Of batchgen's columns.
            takes_errors: Whether rows that are errors are wanted too.
        """
        facts = pl.DataFrame(
            {
                "old_segment": pl.Series(table.column(SEGMENT)).cast(pl.Int64),
                "row": pl.Series(table.column(ROW)),
                "is_ok": pl.Series(table.column(f"{prefix}status")) == "ok",
                "has_key": pl.Series(table.column(f"{prefix}request_key")).is_not_null(),
            }
        ).with_row_index("at")
        found = facts.sort("old_segment", "row").join_asof(
            self._frame,
            left_on="row",
            right_on="old_start",
            by="old_segment",
            strategy="backward",
            coalesce=False,
            check_sortedness=False,
        )
        offset = pl.col("row") - pl.col("old_start")
        is_wanted = pl.col("is_ok")
        if takes_errors:
            stays = pl.col("old_segment").is_in(self._same_path) & (
                pl.col("old_start") == pl.col("start")
            )
            is_wanted = is_wanted | pl.col("has_key") | stays
        found = found.filter((offset < pl.col("length")) & is_wanted).select(
            "at", "segment", row=pl.col("start") + offset
        )
        rows = take_rows(table, found["at"].cast(pl.Int64).to_arrow())
        for name in (SEGMENT, ROW):
            at = rows.schema.get_field_index(name)
            field = rows.schema.field(at)
            values = found["segment" if name == SEGMENT else "row"].to_arrow().cast(field.type)
            rows = rows.set_column(at, field, values)
        return rows

    def ranges(self, rows: RowSet) -> RowSet:
        """Segment -> rows in the later plan of rows of the earlier one."""
        spans: list[tuple[int, int, int]] = []
        for segment, found in rows.items():
            moves = self._by_old.get(segment, [])
            starts = [span.old_start for span in moves]
            for first, stop in found.spans:
                at = max(bisect_right(starts, first) - 1, 0)
                while at < len(moves) and moves[at].old_start < stop:
                    span = moves[at]
                    here = max(first, span.old_start)
                    end = min(stop, span.old_start + span.length)
                    if here < end:
                        shift = span.start - span.old_start
                        spans.append((span.segment, here + shift, end + shift))
                    at += 1
        return RowSet.of_spans(spans)
