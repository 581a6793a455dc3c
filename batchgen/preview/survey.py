"""Reads rows that are to do, all or a sample, and finds what would become of them.

Of each row that would reach the engine four numbers are kept (21 bytes), so that every row of a
large job may be looked at; prompts themselves are dropped as soon as they are counted.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.core.ranges import Ranges
from batchgen.core.records import Request, RowError
from batchgen.pipeline.frozen import read_rows
from batchgen.preview.figures import (
    BLOCK_TOKENS,
    PrefixCache,
    estimate_duplicates,
    lengths_of,
)
from batchgen.store.books import NO_ROWS
from batchgen.store.dedupe import prefix_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from batchgen.core.records import Result
    from batchgen.pipeline.prepare import Prepared
    from batchgen.preview.figures import Lengths
    from batchgen.preview.tokens import Tokenize
    from batchgen.prompt.requests import RequestBuilder
    from batchgen.store.books import Plan
    from batchgen.store.dedupe import Dedupe, KnownKeys

SAMPLE_ROWS = 2000
_SEED = 0
_UNKNOWN = -1
"""Prompt tokens of a row that only the engine can render: it has images."""


@dataclass(frozen=True, slots=True)
class How:
    """How rows are looked at."""

    max_tokens: int
    """The job's; a row may have its own."""
    n: int = 1
    max_model_len: int | None = None
    known: KnownKeys | None = None
    """Requests that have an answer already."""
    dedupe: Dedupe = "auto"
    """Whether rows of one job may share an answer, see `known.Sieve`."""
    is_exact: bool = False
    """Look at every row."""
    sample_rows: int = SAMPLE_ROWS
    """Look at so many otherwise; prefixes are always looked for in so many."""
    block_tokens: int = BLOCK_TOKENS


@dataclass(slots=True)
class Seen:
    """What the rows looked at are."""

    num_rows: int = 0
    num_skipped: int = 0
    """Blank, or left out by `where`."""
    bad: Counter[str] = field(default_factory=Counter)
    """Error type -> rows that end before the engine generates anything."""
    num_known: int = 0
    """The same request has an answer already."""
    keys: array[int] = field(default_factory=lambda: array("Q"))
    """Of every other row: 64 bits of its request_key,"""
    lengths: array[int] = field(default_factory=lambda: array("i"))
    """its prompt's tokens, -1 where unknown,"""
    rooms: array[int] = field(default_factory=lambda: array("q"))
    """and the most tokens that its answers may have; 0 for a prompt that is too long."""
    shares: array[int] = field(default_factory=lambda: array("b"))
    """1 if equal rows may have one answer."""
    num_tight: int = 0
    """The model's context ends before `max_tokens` would."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What became of the rows to do. Counts are those of all of them, estimated from a sample."""

    num_rows: int
    """To do."""
    num_looked: int
    """Of them, read. Equal if exact."""
    num_skipped: int
    bad: Mapping[str, int]
    num_known: int
    num_duplicates: int
    """Equal to another row, whose answer they get."""
    num_repeats: int
    """Equal to another row, and computed all the same."""
    num_too_long: int
    num_tight: int
    num_unknown: int
    """Rows with images: to compute, prompt tokens unknown."""
    num_to_compute: int
    """Rows that the engine answers."""
    max_output_tokens: int
    lengths: Lengths | None
    """Of the prompts looked at that are to compute."""
    prefix_share: float | None
    num_prefix_prompts: int

    @property
    def is_exact(self) -> bool:
        """Whether every row was looked at."""
        return self.num_looked == self.num_rows

    @property
    def num_bad(self) -> int:
        """Rows that end as errors before the engine."""
        return sum(self.bad.values())

    @property
    def prompt_tokens(self) -> int | None:
        """Of the rows to compute; None if it cannot be told."""
        if self.lengths is None:
            return None if self.num_to_compute else 0
        num = self.num_to_compute - self.num_unknown
        return self.lengths.total if self.is_exact else round(self.lengths.mean * num)


def survey(
    plan: Plan,
    todo: Mapping[int, Ranges],
    prepared: Prepared,
    builder: RequestBuilder,
    tokenize: Tokenize,
    how: How,
) -> Survey:
    """Look at rows to do.

    Args:
        plan: What a run would do.
        todo: Segment -> rows that it would read.
        prepared: The job.
        builder: Makes requests.
        tokenize: Counts their tokens.
        how: How many to look at, and what to see in them.

    Raises:
        SourceError: A file cannot be read, or changed since the plan.
    """
    sample = sampled(todo, how.sample_rows)
    chosen = todo if how.is_exact else sample
    cache = PrefixCache(how.block_tokens)
    fed: set[str] = set()
    seen = Seen()
    for batch in read_rows(plan, chosen, prepared.reader, prepared.spec()):
        seen.num_rows += len(batch.rows) + len(batch.skipped)
        seen.num_skipped += len(batch.skipped)
        requests = _requests(builder.of(batch), seen, how.known)
        for request, tokens in zip(requests, tokenize(requests), strict=True):
            if isinstance(tokens, RowError):
                seen.bad[tokens.error_type] += 1
                continue
            _note(seen, request, _UNKNOWN if tokens is None else len(tokens), how)
            if tokens is None or not seen.rooms[-1]:
                continue
            is_copy = seen.shares[-1] and request.request_key in fed
            if not is_copy and request.ordinal.row in sample.get(batch.segment, NO_ROWS):
                fed.add(request.request_key)
                cache.feed(tokens)
    num_rows = sum(len(rows) for rows in todo.values())
    return summed(seen, num_rows, cache)


def _requests(
    outcomes: Iterable[Request | Result], seen: Seen, known: KnownKeys | None
) -> list[Request]:
    """The requests that need an answer; counts the other rows."""
    requests = []
    for outcome in outcomes:
        if isinstance(outcome, Request):
            requests.append(outcome)
        else:
            seen.bad[outcome.error.error_type if outcome.error is not None else "error"] += 1
    if known is None or not requests:
        return requests
    is_known = known.know([prefix_of(request.request_key) for request in requests])
    seen.num_known += sum(is_known)
    return [request for request, is_there in zip(requests, is_known, strict=True) if not is_there]


def _note(seen: Seen, request: Request, num_tokens: int, how: How) -> None:
    # A row's own max_tokens; `n` is the job's alone.
    max_tokens = (request.params or {}).get("max_tokens", how.max_tokens)
    room = max_tokens
    if how.max_model_len is not None and num_tokens >= 0:
        room = max(0, min(max_tokens, how.max_model_len - num_tokens))
    seen.keys.append(prefix_of(request.request_key))
    seen.shares.append(how.dedupe == "always" or (how.dedupe == "auto" and request.seed is None))
    seen.lengths.append(num_tokens)
    seen.rooms.append(room * how.n)
    seen.num_tight += 0 < room < max_tokens


def summed(seen: Seen, num_rows: int, cache: PrefixCache) -> Survey:
    """Sum up, from the rows looked at to all.

    Args:
        seen: The rows looked at.
        num_rows: Rows to do.
        cache: What the sampled prompts share.
    """
    table = pa.table(
        {
            "key": _column(seen.keys, pa.uint64()),
            "length": _column(seen.lengths, pa.int32()),
            "room": _column(seen.rooms, pa.int64()),
        }
    )
    is_exact = seen.num_rows == num_rows
    scale = 1.0 if is_exact or not seen.num_rows else num_rows / seen.num_rows
    shares = pc.equal(_column(seen.shares, pa.int8()), 1)
    sharing, alone = table.filter(shares), table.filter(pc.invert(shares))
    sharing, num_duplicates = _grouped(sharing, scale)
    kept, scale_kept = table, scale
    if is_exact:
        kept = pa.concat_tables([sharing, alone])
    elif len(table):
        # Equal requests are equally long: for its means a sample needs no thinning.
        scale_kept = scale - num_duplicates / len(table)
    fits = pc.greater(kept["room"], 0)
    num_fitting = pc.sum(fits).as_py() or 0
    counted = kept["length"].filter(pc.and_(fits, pc.greater_equal(kept["length"], 0)))
    return Survey(
        num_rows=num_rows,
        num_looked=seen.num_rows,
        num_skipped=round(seen.num_skipped * scale),
        bad={kind: round(num * scale) for kind, num in seen.bad.most_common()},
        num_known=round(seen.num_known * scale),
        num_duplicates=num_duplicates,
        num_repeats=_grouped(alone, scale)[1],
        num_too_long=round((len(kept) - num_fitting) * scale_kept),
        num_tight=round(seen.num_tight * scale),
        num_unknown=round((num_fitting - len(counted)) * scale_kept),
        num_to_compute=round(num_fitting * scale_kept),
        max_output_tokens=round((pc.sum(kept["room"]).as_py() or 0) * scale_kept),
        lengths=lengths_of(_counts(counted)),
        prefix_share=cache.share,
        num_prefix_prompts=cache.num_prompts,
    )


def _grouped(table: pa.Table, scale: float) -> tuple[pa.Table, int]:
    """One row a key, if every row is here; and how many of all rows are beyond that.

    Args:
        table: The rows looked at.
        scale: So many times as many rows there are in all.
    """
    if scale != 1.0:
        times = Counter(table["key"].to_pylist()).values()
        return table, round(estimate_duplicates(times, len(table), round(len(table) * scale)))
    if not len(table):
        return table, 0
    # Sorted and not hashed: that takes five times the memory.
    order = pc.sort_indices(table["key"])
    keys = table["key"].take(order).combine_chunks()
    is_first = pc.not_equal(keys.slice(1), keys.slice(0, len(keys) - 1))
    firsts = order.filter(pa.concat_arrays([pa.array([True]), is_first]))
    return table.take(firsts), len(table) - len(firsts)


def _column(values: array[int], kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _counts(values: pa.ChunkedArray) -> dict[int, int]:
    found: Any = pc.value_counts(values)
    values, counts = found.field("values").to_pylist(), found.field("counts").to_pylist()
    return dict(zip(values, counts, strict=True))


def sampled(todo: Mapping[int, Ranges], num_rows: int, seed: int = _SEED) -> dict[int, Ranges]:
    """Choose rows at random, each with the same chance; the same ones every time.

    Returns:
        Segment -> rows of `todo`, `num_rows` in all or as many as there are.
    """
    total = sum(len(rows) for rows in todo.values())
    if num_rows >= total:
        return dict(todo)
    # Not for secrets: a plan that is made twice should say the same.
    picked = sorted(random.Random(seed).sample(range(total), num_rows))  # noqa: S311
    found: dict[int, list[int]] = {}
    spans = ((number, span) for number, rows in todo.items() for span in rows.spans)
    ends = itertools.accumulate(len(range(*span)) for rows in todo.values() for span in rows.spans)
    at = 0
    for (number, (_, stop)), end in zip(spans, ends, strict=True):
        while at < num_rows and picked[at] < end:
            found.setdefault(number, []).append(stop - (end - picked[at]))
            at += 1
    return {number: Ranges.of(rows) for number, rows in found.items()}
