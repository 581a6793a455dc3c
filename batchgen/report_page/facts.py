"""What a report tells of a run, gathered from its folder and from the output as it is now.

Rows are read by row group: figures from four narrow columns of at most `MOST_GROUPS` of them,
texts of a handful of rows. So a report of any output is bounded in time and memory.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.core.errors import OutputError, StorageError
from batchgen.core.places import Root
from batchgen.pipeline.publish import total_variation
from batchgen.storage.remote import storage_at
from batchgen.store.books import STATE, Manifest, Plan
from batchgen.store.ledger import Ledger
from batchgen.store.result_files import ATTEMPTS, RESULT_FIELDS, VERDICT, ResultFile
from batchgen.store.runs import figures_in
from batchgen.views.rows import INPUT, MOST_GROUPS, Output, Place, as_json, output_of, short
from batchgen.views.status import live_view, status_of

if TYPE_CHECKING:
    from batchgen.storage import LocalStorage

_MOST_ROWS, _MOST_KINDS, _MOST_COLUMNS = 5, 12, 24
_MOST_LABELS, _MOST_LABEL_COLUMNS = 12, 8
_MOST_SAMPLES = 160


class Bar(NamedTuple):
    """A line of a table with a bar."""

    name: str
    num: int
    share: float
    """Of all, 0 to 1."""
    before: float | None = None
    """The share in the last snapshot; None: it is not known."""


@dataclass(frozen=True, slots=True)
class Labels:
    """How often each label of a column was given."""

    column: str
    bars: Sequence[Bar]
    num_more: int
    """Labels that are not among the bars."""
    drift: float | None
    """Total variation distance from the last snapshot, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long prompts or answers are, in tokens."""

    what: str
    mean: float
    median: float
    p95: float
    longest: int
    bars: Sequence[Bar]


class Cell(NamedTuple):
    """A column of a row."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row, as far as it is shown."""

    where: str
    cells: Sequence[Cell]
    num_more: int
    """Further columns."""


class Kind(NamedTuple):
    """Errors of one type."""

    error_type: str
    num_rows: int
    row: ShownRow | None


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """What a report tells."""

    with_rows: bool = True
    """Whether texts of rows may be in it, and messages that may quote them."""
    price: tuple[float, str] | None = None
    """Of all GPUs for an hour, and its currency."""
    score: str = ""
    """How good the labels are, in lines; empty without gold labels."""


@dataclass(slots=True)
class Facts:
    """All of it; what is not known, or must not be told, is empty."""

    root: str
    run_id: str
    options: ReportOptions
    summary: Mapping[str, Any]
    """As the run wrote it; of one that is at work or was killed, what its folder tells."""
    plan: Plan | None = None
    last: Manifest | None = None
    """The snapshot before."""
    labels: Sequence[Labels] = ()
    counts: Mapping[str, Sequence[Bar]] = field(default_factory=dict)
    """Finish reasons, attempts, verdicts."""
    lengths: Sequence[Lengths] = ()
    num_looked: int = 0
    """Rows that finish reasons and lengths are of."""
    kinds: Sequence[Kind] = ()
    rows: Sequence[ShownRow] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    """Rows of stats.parquet, thinned out."""
    deaths: Sequence[tuple[float, str]] = ()
    """When engines died, in seconds from the start, and why."""
    made_by: Sequence[str] = ("", "")
    """Models and engines of the rows."""
    trouble: str = ""
    """Why the rows could not be looked at."""


def gather(root: Root, options: ReportOptions, run_id: str | None = None) -> Facts:
    """Look up what there is to tell.

    Args:
        root: The output folder.
        options: What may be told.
        run_id: Of which run; None: the newest.

    Raises:
        OutputError: No run has been here, or its rows cannot be read.
    """
    storage = storage_at(root)
    ledger = Ledger(storage)
    run_id = run_id or live_view(storage, None).get("run_id")
    if run_id is None:
        raise OutputError(f"{root}: {ledger.why_no_plan() or 'its runs have left no figures'}")
    folder = f"{STATE}/runs/{run_id}"
    summary = figures_in(storage, f"{folder}/summary.json") or _unfinished(root, run_id)
    plan = ledger.latest_plan()
    facts = Facts(str(root), run_id, options, summary, plan)
    facts.samples = _samples(storage, folder)
    facts.deaths = list(_deaths(storage, folder, summary))
    output = output_of(root)
    if plan is not None and output is not None:
        facts.last = ledger.manifest_before(plan.number)
        manifest = output.manifest
        tally = manifest.tally if manifest is not None else ledger.durable(plan).tally
        facts.labels = list(_labels(tally, facts.last))
        for name in (VERDICT, ATTEMPTS):
            facts.counts = {**facts.counts, name: _bars(tally.get(name, {}))}
        try:
            _look(facts, output)
        except OutputError as error:  # The rest is worth telling all the same.
            facts.trouble = str(error)
    return facts


def _unfinished(root: Root, run_id: str) -> Mapping[str, Any]:
    """Sum up a run that has not written how it ended."""
    found = status_of(root)
    live = {**live_view(storage_at(root), run_id), **found.get("run", {})}
    is_at_work = found["state"] == "running" and live.get("run_id") == run_id
    num_rows = live.get("num_rows", 0)
    return {
        "state": "running" if is_at_work else "killed",
        "num_planned": num_rows,
        "num_left": live.get("num_left", 0),
        "elapsed_s": live.get("elapsed_s", 0.0),
        **{name: live.get(name, 0) for name in ("num_ok", "num_errors", "num_skipped")},
    }


def _samples(storage: LocalStorage, folder: str) -> Sequence[Mapping[str, Any]]:
    """Read the run's samples, those of the whole run, at most so many."""
    with suppress(StorageError), ResultFile(storage.path(f"{folder}/stats.parquet")) as file:
        rows = [row for _, table in file.groups() for row in table.to_pylist()]
        whole = [row for row in rows if row["replica"] is None]
        return whole[:: -(-len(whole) // _MOST_SAMPLES) or 1]
    return []


def _deaths(
    storage: LocalStorage, folder: str, summary: Mapping[str, Any]
) -> Iterator[tuple[float, str]]:
    for name in storage.list(folder):
        if "/engine-death-" in name and (death := figures_in(storage, name)):
            with suppress(ValueError, TypeError, KeyError):
                began = datetime.fromisoformat(summary["started_at"])
                after = datetime.fromisoformat(death["died_at"]) - began
                yield after.total_seconds(), str(death["reason"])


def _bars(counts: Mapping[str, int], last: Mapping[str, int] | None = None) -> list[Bar]:
    """Make a bar for each, the largest first; what there was before and is not now is 0."""
    total, total_before = sum(counts.values()) or 1, sum((last or {}).values())
    before = {name: num / total_before for name, num in (last or {}).items()}
    names = sorted(counts.keys() | before.keys(), key=lambda name: (-counts.get(name, 0), name))
    return [
        Bar(
            name,
            counts.get(name, 0),
            counts.get(name, 0) / total,
            before.get(name, 0.0) if before else None,
        )
        for name in names
    ]


def _labels(tally: Mapping[str, Mapping[str, int]], last: Manifest | None) -> Iterator[Labels]:
    """Compare labels with those of the last snapshot; they are of a set that the job declares."""
    columns = [name for name in tally if name not in {VERDICT, ATTEMPTS}]
    for column in columns[:_MOST_LABEL_COLUMNS]:
        before = last.tally.get(column) if last is not None else None
        bars = _bars(tally[column], before)
        drift = total_variation(tally[column], before) if before else None
        yield Labels(column, bars[:_MOST_LABELS], len(bars[_MOST_LABELS:]), drift)


def _look(facts: Facts, output: Output) -> None:
    """Look at rows: figures of many, texts of few."""
    tokens: dict[str, list[pa.ChunkedArray]] = {"prompts": [], "answers": []}
    sizes: list[tuple[int, int, int]] = []
    names = ("finish_reason", "model", "engine", "num_prompt_tokens", "num_output_tokens")
    texts: list[Counter[str]] = [Counter() for _ in names[:3]]
    for at, group, table in output.groups([output.column(name) for name in names], MOST_GROUPS):
        sizes.append((at, group, table.num_rows))
        for column, counter in zip(table.columns[:3], texts, strict=True):
            counted = pc.value_counts(column.drop_null()).to_pylist()
            counter.update({entry["values"]: entry["counts"] for entry in counted})
        for column, chunks in zip(table.columns[3:], tokens.values(), strict=True):
            chunks.extend(column.chunks)
    facts.num_looked = sum(num for _, _, num in sizes)
    reasons, models, engines = texts
    facts.made_by = [", ".join(sorted(counter)) for counter in (models, engines)]
    facts.counts = {"finish reason": _bars(reasons), **facts.counts}
    found = (_lengths(what, chunks) for what, chunks in tokens.items())
    facts.lengths = [lengths for lengths in found if lengths is not None]
    kinds = output.error_kinds()[:_MOST_KINDS]
    examples: list[ShownRow | None] = [None] * len(kinds)
    if facts.options.with_rows:
        draw = random.Random(facts.run_id)  # noqa: S311 - the same rows each time
        weights = [num for _, _, num in sizes]
        drawn = draw.choices(sizes, weights, k=_MOST_ROWS) if any(weights) else []
        places = {Place(at, group, draw.randrange(num)) for at, group, num in drawn}
        facts.rows = _shown(output, sorted(places))
        examples = [*_shown(output, [kind.first for kind in kinds])]
    facts.kinds = [
        Kind(kind.error_type, kind.num_rows, row) for kind, row in zip(kinds, examples, strict=True)
    ]


def _lengths(what: str, chunks: Sequence[pa.Array]) -> Lengths | None:
    """Sum up token counts, with a bar for each power of two."""
    values = pa.chunked_array(chunks, pa.int32()).drop_null()
    if not len(values):
        return None
    median, p95, longest = pc.quantile(values, [0.5, 0.95, 1.0]).to_pylist()
    bits = pc.floor(pc.log2(pc.max_element_wise(values, pa.scalar(1, pa.int32()))))
    counted = {int(e["values"]): e["counts"] for e in pc.value_counts(bits).to_pylist()}
    bars = [
        Bar(
            f"{2**bit if bit else 0}\u2013{2 ** (bit + 1) - 1}",
            counted.get(bit, 0),
            counted.get(bit, 0) / len(values),
        )
        for bit in range(min(counted), max(counted) + 1)
    ]
    return Lengths(what, pc.mean(values).as_py(), median, p95, int(longest), bars)


def _shown(output: Output, places: Sequence[Place]) -> list[ShownRow]:
    """Read rows: the input's columns, the answer's, and what is wrong."""
    ours = {output.column(field.name) for field in RESULT_FIELDS} - {output.column("error")}
    shown = []
    for row in output.rows(places):
        where = str(row.pop(INPUT, ""))
        cells = [
            Cell(name, value if isinstance(value, str) else _text(value))
            for name, value in row.items()
            if value is not None and name not in ours
        ]
        shown.append(ShownRow(where, cells[:_MOST_COLUMNS], len(cells[_MOST_COLUMNS:])))
    return shown


def _text(value: object) -> str:
    return json.dumps(as_json(short(value)), ensure_ascii=False, default=str)
