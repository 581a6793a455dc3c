"""The values that the ledger keeps: what was planned, claimed, committed, published."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchgen.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from batchgen.footer import PartFooter

NO_ROWS = Ranges()


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
    """The same as base64 of Arrow's IPC schema, for `source`."""
    carried: Sequence[str]
    segments: Sequence[Segment]
    is_cut: bool = False
    """`input.limit` was filled: files after the last segment are not wanted."""
    base: Mapping[str, Any] | None = None
    """Where rows that are ok already are taken from, for a plan that tries errors again: `plan`,
    the number of an earlier one, and `parts`, its accepted parts, used while it has no manifest.
    A source of answers and no more: what counts are this plan's own parts."""

    @property
    def generation(self) -> int:
        """How many plans in a row have tried errors again; seeds differ by it."""
        return int((self.base or {}).get("generation", 0))

    @property
    def num_rows(self) -> int:
        """Physical rows planned, those that end without a result included."""
        return sum(segment.num_rows for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Part:
    """An accepted part."""

    name: str
    footer: PartFooter


@dataclass(frozen=True, slots=True)
class Durable:
    """What a claim accepts."""

    parts: Sequence[Part] = ()
    rejected: Mapping[str, str] = field(default_factory=dict)
    """Part name -> why it does not count; its rows are done again."""

    def done(self, segment: int) -> Ranges:
        """Rows of a segment that are answered or skipped."""
        spans = [
            span for part in self.parts for span in part.footer.done.get(segment, NO_ROWS).spans
        ]
        return Ranges(spans)

    @property
    def num_ok(self) -> int:
        """Rows answered."""
        return sum(part.footer.num_ok for part in self.parts)

    @property
    def num_errors(self) -> int:
        """Rows that ended as errors."""
        return sum(part.footer.num_errors for part in self.parts)

    @property
    def num_skipped(self) -> int:
        """Rows that end without a result."""
        return sum(part.footer.num_skipped for part in self.parts)

    @property
    def tally(self) -> dict[str, dict[str, int]]:
        """Sums of the parts' tallies."""
        return sum_tallies(part.footer.tally for part in self.parts)

    @property
    def num_done(self) -> int:
        """Physical rows accounted for."""
        return self.num_ok + self.num_errors + self.num_skipped


def sum_tallies(
    tallies: Iterable[Mapping[str, Mapping[str, int]]],
) -> dict[str, dict[str, int]]:
    """Add counts up, name by name."""
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


@dataclass(frozen=True, slots=True)
class Manifest:
    """A published snapshot."""

    number: int
    plan_id: str
    epoch: int
    """Of the claim that published it: no claim up to it names a part any more."""
    run_id: str
    created_at: str
    files: Sequence[Mapping[str, Any]]
    """`name`, `num_rows`, `size_bytes`, `sha256` each, in input order."""
    num_planned: int
    num_ok: int
    num_errors: int
    num_skipped: int
    index: Mapping[str, Any] | None = None
    """The file that says which row of the input each published row is: fields as in `files`."""
    tally: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Of the published rows, see `sink.tally`; the next snapshot is compared with it."""
    gate: Sequence[Mapping[str, Any]] = field(default_factory=list)
    """The gate's figures, see `gate.Limit.as_dict`; `overridden` where one was let through."""

    def imbalance(self) -> str | None:
        """What does not add up, None if all does."""
        num_results = self.num_ok + self.num_errors
        num_in_files = sum(file["num_rows"] for file in self.files)
        num_in_index = num_results if self.index is None else self.index["num_rows"]
        is_planned = num_results + self.num_skipped == self.num_planned
        if is_planned and num_results == num_in_files == num_in_index:
            return None
        return (
            f"{self.num_planned} rows planned, but {self.num_ok} ok + {self.num_errors} errors + "
            f"{self.num_skipped} skipped, {num_in_files} rows in the files, {num_in_index} in "
            "the index"
        )
