"""What a prompt is made of a row by, and which rows were made otherwise by an earlier batchgen.

Where a fix changes what a prompt is, answers to the old prompts stay: they are valid, and only
the user knows whether they are worth computing again. So a fix is a `Change` here:

1. Raise `RENDERING` by one (once a release is enough) and add a `Change` with that number: its
   words for people, and a test that tells from the job and the columns that prompts read, without
   a row, whether it can touch the job at all. Too broad a test costs time, too narrow a one hides
   rows.
2. That is all. Whether a row's prompt differs is told by its `request_key`, which is a hash of the
   prompt: where a change may touch a job, its answered rows are read and rendered, and those whose
   key is another one now count. Rows whose prompt is the same never count.

`Plan.rendering` says by what a plan's rows are made at least, absent in plans of 0.1.0. `plan` and
`run` tell the number of old rows; `--rerender` makes a plan that takes over only the others. New
and edited rows, and what is left of an unfinished plan, are always rendered as they are today.
The recipe and its fingerprint know nothing of it, so no output is refused. Once a night has found
no old row, its plan is as new as the program and nobody looks again.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from batchgen.core.data import pl
from batchgen.core.errors import StorageError
from batchgen.core.records import Ranges, Request, RowSet
from batchgen.core.runtime import option
from batchgen.pipeline.frozen import read_rows, request_builder
from batchgen.prompt.builder import BYTE_ORDER_MARK
from batchgen.source.values import holds_bytes
from batchgen.store.books import STATE, Plan
from batchgen.store.keys import prefix_of, prefixes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from batchgen.job.model import JobConfig
    from batchgen.pipeline.prepare import Prepared
    from batchgen.storage import LocalStorage

_COUNTED = f"{STATE}/rendering.json"
RENDERING = 1
"""Today's; 0 is that of batchgen 0.1.0."""


class Change(NamedTuple):
    """A change of what some prompts are."""

    since: int
    """The first `RENDERING` that has it."""
    of: str
    """For people, after "the old rendering of"."""
    may_touch: Callable[[JobConfig, pa.Schema], bool]
    """Whether prompts of this job can differ by it; gets the columns that prompts read."""


def _reads_bytes(job: JobConfig, read: pa.Schema) -> bool:
    return any(holds_bytes(field.type) for field in read if field.name != job.prompt.images)


def _templates_match(pattern: str) -> Callable[[JobConfig, pa.Schema], bool]:
    wanted = re.compile(pattern)

    def match(job: JobConfig, _: pa.Schema) -> bool:
        return any(wanted.search(text) for text in (job.prompt.user, job.prompt.system) if text)

    return match


CHANGES = (
    Change(1, "binary columns", _reads_bytes),
    # It was for HTML: letters beyond ASCII and the signs <, >, & and ' were escaped.
    Change(1, "tojson", _templates_match(r"\btojson\b")),
    # A null was no absent value to it, and nothing could be asked of what is absent.
    Change(
        1,
        "default",
        _templates_match(
            r"\bdefault\b|\|\s*d\b|['\"]d['\"]|[.\]]\w*\s+is\s+(not\s+)?(un)?defined\b"
        ),
    ),
    # A new turn was begun after them.
    Change(1, "chats that end with the assistant", lambda job, _: job.prompt.messages is not None),
    Change(1, "a byte order mark", _templates_match(f"^{BYTE_ORDER_MARK}")),
)


def changes_since(rendering: int, prepared: Prepared) -> str:
    """Name the changes that may touch a job's prompts, for people; empty if there are none."""
    columns = prepared.columns
    read = pa.schema([columns.field(name) for name in sorted(prepared.spec().needed)])
    found = [one for one in CHANGES if one.since > rendering]
    return " and of ".join(one.of for one in found if one.may_touch(prepared.job, read))


class OldRows(NamedTuple):
    """Rows whose prompt today's rendering makes another, told to people."""

    num: int = 0
    of: str = ""
    """What is rendered otherwise."""
    is_again: bool = False
    """Whether they run again."""
    num_unread: int = 0
    """Further rows that only their requests tell: of these, all that are old run again."""

    @property
    def texts(self) -> list[str]:
        """Sentences for people."""
        texts = []
        if self.num:
            rows, were = ("row", "was") if self.num == 1 else ("rows", "were")
            text = f"{self.num:,} {rows} {were} made with the old rendering of {self.of}"
            end = ": run again" if self.is_again else f"; {option('--rerender')} runs them again"
            texts.append(f"{text}{end}")
        if self.num_unread:
            told = "rows of changed files are told by their requests only"
            text = f"{self.num_unread:,} {told}: what was made with the old rendering of {self.of}"
            texts.append(f"{text} runs again")
        return texts


def recalled(storage: LocalStorage, plan: Plan, of: str) -> OldRows | None:
    """Return what was counted of a published plan; None if nobody has, by this rendering."""
    try:
        found = json.loads(storage.read(_COUNTED) or b"")
        if found["of"] == [plan.plan_id, RENDERING, of]:
            return OldRows(int(found["num"]), of)
    except (ValueError, TypeError, KeyError, RecursionError, StorageError):
        pass  # It is counted again.
    return None


def remember(storage: LocalStorage, plan: Plan, old: OldRows) -> None:
    """Keep what was counted, so that nights on which nothing happens read no row for it."""
    counted = {"of": [plan.plan_id, RENDERING, old.of], "num": old.num}
    with suppress(StorageError):
        storage.replace(_COUNTED, json.dumps(counted).encode())


def old_rows(
    prepared: Prepared,
    plan: Plan,
    rows: RowSet,
    answers: Iterable[pa.Table],
    on_batch: Callable[[], object],
) -> RowSet:
    """Find the rows whose request is another one than their answer was made for.

    Reads and renders all of them.

    Args:
        prepared: The job.
        plan: Whose ordinals these are.
        rows: Segment -> rows that are answered.
        answers: Their ordinals, `request_key` and `recipe`, in that order. A row of an older
            recipe does not count: nobody can tell what its prompt would be now.
        on_batch: Called now and then; what it raises ends the work.
    """
    known = _Keys(plan.recipe_fingerprint, answers)
    builder = request_builder(prepared, plan)
    spec = replace(prepared.spec(), carried=())
    found: list[tuple[int, int, int]] = []
    for batch in read_rows(plan, rows, prepared.reader, spec):
        on_batch()
        keys = [
            prefix_of(made.request_key) if isinstance(made, Request) else None
            for made in builder.of(batch)
        ]
        old = Ranges.of(known.differing(batch.segment, batch.rows, keys))
        found += [(batch.segment, start, stop) for start, stop in old.spans]
    return RowSet.of_spans(found)


class _Keys:
    """The first 64 bits of the keys of answered rows, 16 bytes a row."""

    def __init__(self, recipe: str, answers: Iterable[pa.Table]) -> None:
        kinds = {"segment": pl.Int32, "row": pl.Int64, "key": pl.UInt64}
        frames = [pl.DataFrame(schema=kinds)]
        for table in answers:
            frame = pl.DataFrame(table.rename_columns([*"ab", "key", "recipe"]))
            keys = prefixes_of(frame["key"].cast(pl.String))
            frame = frame.select(segment="a", row="b", key=keys, recipe="recipe")
            of_recipe = frame.filter(pl.col("recipe").cast(pl.String) == recipe)
            frames.append(of_recipe.select(pl.col(name).cast(kinds[name]) for name in kinds))
        whole = pl.concat(frames).sort("segment", "row")
        self._by_segment = {
            int(part["segment"][0]): part.select("row", "key")
            for part in whole.partition_by("segment")
        }

    def differing(self, segment: int, rows: Iterable[int], keys: Iterable[int | None]) -> list[int]:
        """Of these rows of a segment, those that have another key, or one and no one."""
        known: pl.DataFrame | None = self._by_segment.get(segment)
        if known is None:
            return []
        now = pl.DataFrame(
            {"row": list(rows), "now": list(keys)}, schema={"row": pl.Int64, "now": pl.UInt64}
        )
        if not len(now):
            return []
        first, last = now["row"][0], now["row"][-1]
        start = known["row"].search_sorted(first, side="left")
        stop = known["row"].search_sorted(last, side="right")
        both = now.join(known[start:stop], on="row")
        return both.filter(pl.col("now").ne_missing(pl.col("key")))["row"].sort().to_list()
