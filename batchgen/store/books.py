"""The values that the ledger keeps: what was planned, claimed, committed, published.

Where the ledger's files are under the output folder is decided here, and what a part says of
itself: the JSON in its Parquet footer, the commit record of its rows.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from batchgen.core.data import parse_json
from batchgen.core.records import Ranges, RowSet
from batchgen.source.files import InputStat
from batchgen.storage import raise_if_not_damage


@dataclass(frozen=True, slots=True)
class Segment:
    """One input file as the plan froze it."""

    path: str
    size_bytes: int
    version: str
    """mtime in ns, or ETag: equal means unchanged without reading."""
    digest: str
    """Content hash: equal means unchanged although the version differs."""
    num_rows: int
    """Physical rows that belong to the job."""
    keys: int | None = None
    """Of JSONL: which of `Plan.keys` it has. Plans of before 0.2 looked at first rows only."""

    @property
    def stat(self) -> InputStat:
        """What tells that the file is still the same."""
        return InputStat(self.size_bytes, self.version)


@dataclass(frozen=True, slots=True)
class Base:
    """An earlier plan that a later one takes rows over from.

    A source of answers and no more: what counts are the later plan's own parts. So whatever
    happens to it (another run publishes it, a disk eats it) can cost work, never a row.
    """

    plan: int
    """Its number."""
    parts: Sequence[str] = ()
    """Its accepted parts, used while it has no manifest."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A job, frozen: what goes in and what is asked of it."""

    number: int
    plan_id: str
    created_at: str
    job: Mapping[str, Any]
    """What must not change under the plan: recipe, input selection, output layout."""
    recipe_fingerprint: str
    input_format: str
    columns: Sequence[str]
    """Every input column, `name: type`, for people."""
    schema: str
    """The input's schema as base64 of Arrow's IPC format, for `source`."""
    carried: Sequence[str]
    segments: Sequence[Segment]
    is_cut: bool = False
    """`input.limit` was filled: files after the last segment are not wanted."""
    bases: Sequence[Base] = ()
    """Plans that answered rows are taken over from, the newest first."""
    takes_errors: bool = True
    """Whether the bases' error rows are taken over like the others, or run again."""
    generation: int = 0
    """How many plans up to this one have tried errors again."""
    rendering: int = 0
    """What prompts are made by, at least, see `pipeline.rendering`: rows of a base that was made by
    less are taken over only if their prompt is still the same."""
    counts_lines: bool = False
    """Of CSV: a bad record over several lines counts as that many rows. Plans of before 0.2
    counted it as one, which hid how much a quote that is not closed had swallowed."""
    keeps: int = 0
    """So many snapshots stay where the job says nothing; 0: all, as in outputs of before 0.2."""
    keys: Sequence[Mapping[str, str]] = ()
    """Of JSONL: what keys files have, key -> kinds of values, joined by commas; each combination
    once."""
    kept: Sequence[tuple[int, int, int]] = ()
    """Published files that hold unchanged rows only and are the next snapshot's as they are: runs
    of files of one base's manifest (first file, file after the last, position in this plan)."""
    kept_of: int = 0
    """Number of that base."""
    rolled_back: int = 0
    """Number of the snapshot that this plan only publishes again; 0: it is no rollback."""
    continues: Sequence[Base] = ()
    """Of a rollback for now: the bases of the next plan, in place of this one."""

    @property
    def prefix(self) -> str:
        """What the names of batchgen's columns begin with; the job file may have another by now."""
        return str(self.job["output"]["prefix"])

    @property
    def seed_generation(self) -> int:
        """By what seeds differ, where errors are tried again; other rows get those of a new job."""
        return 0 if self.takes_errors else self.generation

    @property
    def rows(self) -> RowSet:
        """Segment -> its physical rows."""
        return RowSet((at, Ranges.until(one.num_rows)) for at, one in enumerate(self.segments))

    @property
    def num_rows(self) -> int:
        """Physical rows planned, those that end without a result included."""
        return sum(segment.num_rows for segment in self.segments)


class Places:
    """Where each row of a plan stands among all of them: its position, counted from 0."""

    def __init__(self, plan: Plan) -> None:
        """Count."""
        self.starts = [0, *accumulate(segment.num_rows for segment in plan.segments)]
        """Position of each segment's first row, and of the end."""

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the rows at positions `start` up to, not including, `stop`: segment, row, end."""
        segment = bisect_right(self.starts, start) - 1
        while start < stop:
            first, end = self.starts[segment], min(self.starts[segment + 1], stop)
            if start < end:
                yield segment, start - first, end - first
            start, segment = max(start, end), segment + 1

    def first_of(self, rows: RowSet) -> int:
        """Return the position of the first row of a set."""
        segment, row, _ = next(rows.spans())
        return self.starts[segment] + row

    def nearest_start(self, position: int) -> int:
        """Return the segment's first row, or the end, that is nearest to a position."""
        at = bisect_right(self.starts, position)
        return min(self.starts[max(at - 1, 0) : at + 1], key=lambda start: abs(start - position))


class Part(NamedTuple):
    """A part that is durable."""

    name: str
    footer: PartFooter


class Kept(NamedTuple):
    """A published file, and where its rows are in a plan: its own, or one that keeps the file."""

    file: PublishedFile
    start: int
    """Position of its first row in the plan."""

    @property
    def stop(self) -> int:
        """Position after its last row."""
        return self.start + self.file.num_done


@dataclass(frozen=True, slots=True)
class Durable:
    """What a claim accepts."""

    parts: Sequence[Part] = ()
    rejected: Mapping[str, str] = field(default_factory=dict)
    """Name of a part or a kept file -> why it does not count; its rows are done again."""
    kept: Sequence[Kept] = ()
    """Files that the plan keeps, by position."""
    kept_rows: RowSet = field(default_factory=RowSet)
    """Segment -> the rows that are in them, with a result or without."""

    @property
    def rows(self) -> RowSet:
        """Segment -> its rows that are answered or skipped."""
        in_parts = (part.footer.done.spans() for part in self.parts)
        return RowSet.of_spans(chain(self.kept_rows.spans(), chain.from_iterable(in_parts)))

    def done(self, segment: int) -> Ranges:
        """Rows of a segment that are answered or skipped."""
        return self.rows[segment]

    @property
    def books(self) -> Iterator[PartFooter | PublishedFile]:
        """What counts the rows of each part, and of each kept file."""
        yield from (part.footer for part in self.parts)
        yield from (kept.file for kept in self.kept)

    @property
    def num_ok(self) -> int:
        """Rows answered."""
        return sum(one.num_ok for one in self.books)

    @property
    def num_errors(self) -> int:
        """Rows that ended as errors."""
        return sum(one.num_errors for one in self.books)

    @property
    def num_skipped(self) -> int:
        """Rows that end without a result."""
        return sum(one.num_skipped for one in self.books)

    @property
    def tally(self) -> dict[str, dict[str, int]]:
        """Sums of all tallies."""
        return added(one.tally for one in self.books)

    @property
    def num_done(self) -> int:
        """Physical rows accounted for."""
        return self.num_ok + self.num_errors + self.num_skipped


def added(tallies: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Add tallies up, see `result_files.tally`."""
    total: dict[str, Counter[str]] = {}
    for tally in tallies:
        for name, counts in tally.items():
            total.setdefault(name, Counter()).update(counts)
    return {name: dict(counts) for name, counts in total.items()}


@dataclass(frozen=True, slots=True)
class Epoch:
    """This run's claim."""

    number: int
    plan: Plan
    run_id: str
    durable: Durable


class Chunk(NamedTuple):
    """Bytes of a file, from the end of the chunk before to `end`."""

    end: int
    sha256: str
    """Empty: what proves these bytes is not known yet."""


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file of a snapshot, as the manifest names it; or a version 1 snapshot's index.

    It is a stretch of the input, in order. The files of a snapshot tile all planned rows, so that
    their order says which rows each has: nothing here does, and a file may be of many snapshots.
    """

    name: str
    num_rows: int
    """Results."""
    size_bytes: int
    sha256: str
    """Hash of all its bytes, in hex."""
    num_errors: int = 0
    """Results that are errors."""
    num_skipped: int = 0
    """Rows of its stretch that have ended without a result."""
    footer_bytes: int = 0
    """Length of its end, which says what the rest is."""
    footer_sha256: str = ""
    tally: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Counts of its rows, see `result_files.tally`."""
    order: int | None = None
    """Ascends from file to file, with gaps for those to come; None in version 1."""

    @property
    def alias(self) -> str:
        """The name under which the output folder shows it: tells its place and its content."""
        if self.order is None:
            return self.name.rpartition("/")[2]
        return f"part-{self.order:08d}-{self.sha256[:8]}.parquet"

    @property
    def num_ok(self) -> int:
        """Results that are answers."""
        return self.num_rows - self.num_errors

    @property
    def num_done(self) -> int:
        """Rows of its stretch of the input."""
        return self.num_rows + self.num_skipped

    @property
    def chunks(self) -> Sequence[Chunk]:
        """What proves its bytes: its footer, which has the rest. None in version 1."""
        if not self.footer_sha256:
            return ()
        end = self.size_bytes
        return Chunk(end - self.footer_bytes, ""), Chunk(end, self.footer_sha256)

    def difference(self, path: Path) -> str | None:
        """How a file is not the one that was published; None if every byte is. Reads it.

        Raises:
            OSError: It cannot be read.
        """
        if wrong := self.other_size(path.stat().st_size):
            return wrong
        with path.open("rb") as file:
            is_same = hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
        return None if is_same else "has other bytes than were published (sha256 differs)"

    def other_size(self, num_bytes: int) -> str | None:
        """The same as far as a size tells it."""
        if num_bytes == self.size_bytes:
            return None
        return f"has {num_bytes:,} bytes, {self.size_bytes:,} were published"

    def is_intact(self, path: Path) -> bool:
        """Whether every byte is what was published; False if the file is gone.

        Raises:
            StorageError: It cannot be read right now.
        """
        try:
            return self.difference(path) is None
        except OSError as error:
            raise_if_not_damage(path, error)
            return False


@dataclass(frozen=True, slots=True)
class Manifest:
    """A published snapshot."""

    number: int
    plan_id: str
    epoch: int
    """Number of the claim that published it: no claim up to it names a part any more."""
    run_id: str
    created_at: str
    files: Sequence[PublishedFile]
    """In input order."""
    num_planned: int
    num_ok: int
    num_errors: int
    num_skipped: int
    index: PublishedFile | None = None
    """Of version 1: the file that says which row of the input each published row is."""
    schema: str = ""
    """Digest of the files' schema, see `result_files.schema_digest`; empty in version 1."""
    tally: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Counts of the published rows, see `result_files.tally`; the next snapshot is compared
    with them."""
    gate: Sequence[Mapping[str, Any]] = field(default_factory=list)
    """The gate's figures, see `Limit.as_dict`; `overridden` where one was let through."""

    @property
    def is_tiled(self) -> bool:
        """Whether its files tell their rows by their places: not in version 1."""
        return self.index is None and all(file.order is not None for file in self.files)

    def tiles(self) -> Iterator[Kept]:
        """Yield its files with their places, if it is tiled."""
        start = 0
        for file in self.files:
            yield Kept(file, start)
            start += file.num_done

    def imbalance(self) -> str | None:
        """What does not add up, None if all does."""
        num_results = self.num_ok + self.num_errors
        told = [num_results, self.num_errors, self.num_skipped]
        if not self.is_tiled:
            found = [sum(file.num_rows for file in self.files), *told[1:]]
        else:
            counts = [(file.num_rows, file.num_errors, file.num_skipped) for file in self.files]
            found = [sum(column) for column in zip(*counts, strict=True)] or [0, 0, 0]
        if num_results + self.num_skipped == self.num_planned and told == found:
            return None
        return (
            f"{self.num_planned} rows planned, but {self.num_ok} ok + {self.num_errors} errors + "
            f"{self.num_skipped} skipped, and in the files {found[0]} rows with {found[1]} errors, "
            f"and {found[2]} skipped"
        )


def _are_disjoint(parts: Sequence[Part]) -> bool:
    """Whether no row is in two parts."""
    spans: dict[int, list[tuple[int, int]]] = {}
    for part in parts:
        for segment, rows in part.footer.done.items():
            spans.setdefault(segment, []).extend(rows.spans)
    return all(
        this[1] <= following[0]
        for found in spans.values()
        for this, following in pairwise(sorted(found))
    )


def disjoint(parts: list[Part], rejected: dict[str, str], kept: RowSet) -> list[Part]:
    """Leave out parts that hold a row of an earlier one, or of a kept file; note them as rejected.

    Args:
        parts: In order.
        rejected: Gets those that are left out.
        kept: Rows of kept files.
    """
    # Nearly always, which sorting tells faster than adding up.
    if _are_disjoint(parts) and not any(part.footer.done & kept for part in parts if kept):
        return parts
    accepted: list[Part] = []
    taken = kept
    for part in parts:
        if twice := part.footer.done & taken:
            segment, row, _ = next(twice.spans())
            rejected[part.name] = f"row {row} of segment {segment} is in another part already"
            continue
        accepted.append(part)
        taken |= part.footer.done
    return accepted


FOOTER_KEY = b"batchgen"


@dataclass(frozen=True, slots=True)
class PartFooter:
    """The books of one part.

    Invariant: the ordinals in `done` are `num_ok + num_errors` results and `num_skipped` rows
    that end without a result (blank lines, rows that `where` leaves out).
    """

    plan: str
    """Id of the plan that the ordinals belong to."""
    epoch: int
    run_id: str
    done: RowSet
    """Segment -> physical row numbers."""
    num_ok: int
    num_errors: int
    num_skipped: int
    engine: Mapping[str, Any]
    """Who answered: engine name and version, device, batchgen version."""
    tally: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Counts that the gate needs, see `result_files.tally`."""

    @property
    def num_results(self) -> int:
        """Rows of the Parquet file."""
        return self.num_ok + self.num_errors

    def to_metadata(self) -> dict[bytes, bytes]:
        """Return Parquet key-value metadata."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["done"] = {str(seg): ranges.to_json() for seg, ranges in self.done.items()}
        fields["engine"] = dict(self.engine)
        fields["tally"] = {name: dict(counts) for name, counts in self.tally.items()}
        return {FOOTER_KEY: json.dumps(fields, separators=(",", ":")).encode()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> PartFooter:
        """Read what `to_metadata` wrote.

        Raises:
            ValueError: No such entry, or its books do not balance.
        """
        try:
            fields = parse_json((metadata or {})[FOOTER_KEY])
            fields["done"] = RowSet(
                (int(seg), Ranges.from_json(flat)) for seg, flat in fields["done"].items()
            )
            footer = cls(**fields)
            num_done = footer.done.num_rows
            balance = footer.num_results + footer.num_skipped
            for counts in footer.tally.values():
                sum(counts.values())
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no batchgen footer: {error!r}") from error
        if num_done != balance:
            raise ValueError(f"footer names {num_done} rows, but counts {balance}")
        return footer


STATE = "_batchgen"
PARTS = f"{STATE}/parts"
TRIES = f"{STATE}/try"
"""Where try-outs have an output of their own, with books of its own."""
FILES = f"{STATE}/files"
LISTS = f"{STATE}/lists"
_NUMBERED = re.compile(r"\d{6}\.json")
_WORKER = re.compile(r"e\d+-w(\d+)")


def numbered(kind: str, number: int) -> str:
    """A plan, a claim or a manifest."""
    return f"{STATE}/{kind}/{number:06d}.json"


def rejection_of(name: str, plan: int = 0) -> str:
    """The mark that leaves a part out; or a file that plan `plan` keeps, out of that plan only."""
    of = f"p{plan:06d}-" if plan else ""
    return f"{STATE}/rejected/{of}{name.rpartition('/')[2]}.json"


def seal_of(epoch: int, worker: int) -> str:
    """What says which parts of a worker count."""
    return f"{STATE}/seals/e{epoch:06d}-w{worker:02d}.json"


def worker_of(name: str) -> int:
    """Worker of a part or of a seal; -1 for what is neither."""
    match = _WORKER.match(name.rpartition("/")[2])
    return int(match.group(1)) if match else -1


def epoch_of(name: str) -> int:
    """Epoch of a part or of its temp file, from `e000003-w00-s000012.parquet`."""
    digits = name.rpartition("/")[2].lstrip(".")[1:7]
    return int(digits) if digits.isdigit() else 0


def number_of(name: str) -> int:
    """Number of a plan, a claim or a manifest."""
    return int(name.rpartition("/")[2].partition(".")[0])


def is_numbered(name: str) -> bool:
    """Whether it is a plan, a claim or a manifest, and no other file beside them."""
    return _NUMBERED.fullmatch(name.rpartition("/")[2]) is not None
