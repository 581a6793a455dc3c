"""Two outputs side by side: two models, two prompts, two nights.

Rows are paired as `views.diff` pairs them, and of each no more is held in memory than there: where
it stands, hashes, labels. Answers are read again only for the rows that are shown or written.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.core.data import parse_json
from batchgen.core.errors import ConfigError, OutputError, StorageError
from batchgen.core.runtime import Told, option
from batchgen.job import recipe as recipes
from batchgen.storage.remote import storage_at
from batchgen.store.books import STATE
from batchgen.store.ledger import Ledger
from batchgen.store.snapshot import find_snapshot
from batchgen.views.diff import Diff, compared
from batchgen.views.sides import ANSWER, AT, CLASS, KINDS, OLD, Both, Side

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from batchgen.core.places import Root
    from batchgen.preview.estimate import Price

_CHUNK_ROWS = 2**16


@dataclass(frozen=True, slots=True)
class Figures:
    """One of two outputs."""

    output: str
    snapshot: int
    model: str
    recipe: str
    """Fingerprint."""
    num_ok: int
    num_errors: int
    prompt_tokens: int
    output_tokens: int
    """Of all rows together, as `prompt_tokens`: what they cost."""
    mean_output_tokens: float | None
    """Of an answer; None without any."""
    p95_output_tokens: float | None
    requests_per_s: float | None
    """Speed of the run that published it; None where it computed nothing, or has left no word."""
    cost: float | None = None
    """Of 1,000 rows at that speed; None if that or the price is not known."""
    currency: str = ""

    def priced(self, price: Price) -> Self:
        """Add the cost, by the price for an hour of the GPUs that the run had."""
        speed = self.requests_per_s
        cost = 1000 * price.per_hour / 3600 / speed if speed else None
        return replace(self, cost=cost, currency=price.currency)

    def line(self) -> str:
        """Write it for a person."""
        lengths = speed = ""
        if self.mean_output_tokens is not None:
            mean, p95 = f"{self.mean_output_tokens:,.1f}", f"{self.p95_output_tokens:,.0f}"
            lengths = f" ({mean} an answer, p95 {p95})"
        if self.requests_per_s:
            speed = f", {self.requests_per_s:,.1f} rows/s"
        if self.cost is not None:
            speed += f", {self.cost:.3g} {self.currency}".rstrip() + " per 1,000 rows"
        return (
            f"{self.output} snapshot {self.snapshot}, {self.model}: {self.num_ok:,} ok, "
            f"{self.num_errors:,} errors; {self.prompt_tokens:,} tokens in, "
            f"{self.output_tokens:,} out{lengths}{speed}"
        )


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Told):
    """Two outputs, compared: A first, B second."""

    a: Figures
    b: Figures
    recipe: Sequence[str]
    """What differs between their recipes, a line each."""
    rows: Diff
    """From A to B: `old` and `new` are A and B."""

    def priced(self, price: Price | None) -> Self:
        """Add what 1,000 rows cost in both, if a price is given."""
        if price is None:
            return self
        return replace(self, a=self.a.priced(price), b=self.b.priced(price))

    @property
    def num_both(self) -> int:
        """Rows with the same input in both."""
        return self.rows.num_same + self.rows.num_answer_changed

    @property
    def agreement(self) -> float | None:
        """Share of the rows with the same input that have the same answer; None without any."""
        return self.rows.num_same / self.num_both if self.num_both else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = self.rows
        return {
            "a": asdict(self.a),
            "b": asdict(self.b),
            "recipe": list(self.recipe),
            "matched_by": rows.matched_by,
            "num_both": self.num_both,
            "num_same": rows.num_same,
            "num_differ": rows.num_answer_changed,
            "num_input_changed": rows.num_input_changed,
            "num_only_a": rows.num_removed,
            "num_only_b": rows.num_added,
            "num_without_key": list(rows.num_without_key),
            "agreement": self.agreement,
            "columns_only_a": list(rows.columns_went),
            "columns_only_b": list(rows.columns_came),
            "columns_retyped": list(rows.columns_retyped),
            "labels": [moves.as_dict() for moves in rows.labels],
            "examples": list(rows.examples),
        }

    def as_text(self) -> str:
        """Write it for a person."""
        rows = self.rows
        lines = [f"A  {self.a.line()}", f"B  {self.b.line()}"]
        lines += [f"recipe   {change}" for change in self.recipe]
        lines.append(
            f"rows     {self.num_both:,} in both, {rows.num_removed:,} only in A, "
            f"{rows.num_added:,} only in B, {rows.num_input_changed:,} with another input; paired "
            f"by {rows.paired_by}"
        )
        if self.agreement is not None:
            same, other = f"{rows.num_same:,} the same", f"{rows.num_answer_changed:,} not"
            lines.append(f"answers  {same} ({self.agreement:.1%}), {other}")
        lines += [f"columns  only in A: {name}" for name in rows.columns_went]
        lines += [f"columns  only in B: {name}" for name in rows.columns_came]
        for moves in rows.labels:
            lines += [moves.agreement_line(), *moves.lines()]
        return "\n".join([*lines, *rows.example_lines()])


def compare(
    a: Root,
    b: Root,
    snapshots: tuple[int | None, int | None] = (None, None),
    *,
    on: Sequence[str] = (),
    num_examples: int = 5,
    to: Path | None = None,
) -> Comparison:
    """Compare what is published in two outputs.

    Args:
        a: An output folder.
        b: Another one, or the same.
        snapshots: Numbers of the snapshots; None: the newest.
        on: Columns whose values name a row; none: rows are paired by content and place, see
            `views.diff`.
        num_examples: At most so many rows that differ are shown in full.
        to: A new Parquet file for all rows that differ.

    Raises:
        OutputError: There are no such snapshots, or they cannot be read.
        ConfigError: A column of `on` does not name rows, or there is such a file.
    """
    if to is not None and to.exists():
        raise ConfigError(option("--to"), [f"{to} exists, expected a new file"])
    try:
        first, second = (_side(*one) for one in zip((a, b), snapshots, strict=True))
        both = Both(first, second, on)
        differ = _Differ()
        rows = compared(a, both, num_examples, len if to is None else differ.add)
        figures = _figures(first), _figures(second)
        if to is not None:
            differ.write(both, to)
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError) as error:
        raise OutputError(f"{a}, {b}: cannot be compared ({str(error).splitlines()[0]})") from error
    changes = recipes.diff(first.plan.job["recipe"], second.plan.job["recipe"])
    return Comparison(*figures, changes, rows)


def _side(root: Root, number: int | None) -> Side:
    ledger = Ledger(storage_at(root))
    number = find_snapshot(ledger, number).number
    return Side(ledger, number, f"{root} snapshot {number}")


def _figures(side: Side) -> Figures:
    prefix, manifest = side.plan.prefix, side.manifest
    prompts, outputs = (pl.col(f"{prefix}num_{name}_tokens") for name in ("prompt", "output"))
    found = side.frame.select(
        prompt_tokens=prompts.cast(pl.Int64).sum(),
        output_tokens=outputs.cast(pl.Int64).sum(),
        mean_output_tokens=outputs.mean(),
        p95_output_tokens=outputs.quantile(0.95, "nearest"),
        model=pl.col(f"{prefix}model").drop_nulls().first(),
    ).collect(engine="streaming")
    told = found.to_dicts()[0]
    return Figures(
        output=side.storage.where,
        snapshot=manifest.number,
        model=told.pop("model") or "no model",
        recipe=side.plan.recipe_fingerprint,
        num_ok=manifest.num_ok,
        num_errors=manifest.num_errors,
        requests_per_s=_speed(side),
        **told,
    )


def _speed(side: Side) -> float | None:
    name = f"{STATE}/runs/{side.manifest.run_id}/summary.json"
    try:
        return float(parse_json(side.storage.read(name) or b"")["run"]["requests_per_s"]) or None
    except (StorageError, ValueError, KeyError, TypeError):
        return None  # It is pruned, or torn.


class _Differ:
    """Rows that differ: where they stand in both, 17 bytes each."""

    def __init__(self) -> None:
        kinds = {CLASS: pl.UInt8, AT: pl.Int64, AT + OLD: pl.Int64}
        self._found = [pl.DataFrame(schema=kinds)]

    def add(self, pairs: pl.DataFrame) -> None:
        """Keep those of some pairs."""
        differ = pairs.filter(pl.col(CLASS).is_in(list(KINDS)))
        self._found.append(differ.select(CLASS, AT, AT + OLD))

    def write(self, both: Both, path: Path) -> None:
        """Write them in order, with the input as B has it and the answers of both.

        Raises:
            OSError: They cannot be read, or the file not written.
        """
        carried = both.new.plan.carried
        taken = set(carried)
        changed, at, at_old = (_free(name, taken) for name in ("changed", AT, AT + OLD))
        was, now = (list(_answers(*one, taken)) for one in ((both.old, "a"), (both.new, "b")))
        names = [*carried, changed, *(column.meta.output_name() for column in (*was, *now))]
        kind = pl.col(CLASS).replace_strict(KINDS, return_dtype=pl.String).alias(changed)
        differ = pl.concat(self._found).sort(AT)
        differ = differ.select(kind, pl.col(AT).alias(at), pl.col(AT + OLD).alias(at_old))
        writer: pq.ParquetWriter | None = None
        with replacing(path) as temp:
            for some in (differ.clear(), *differ.iter_slices(_CHUNK_ROWS)):
                new = _at(both.new.frame.select(*carried, *now), some, at)
                old = _at(both.old.frame.select(*was), some, at_old)
                rows = some.join(new, on=at).join(old, on=at_old).sort(at).select(names).to_arrow()
                writer = writer or pq.ParquetWriter(temp, rows.schema)
                writer.write_table(rows)
            if writer is not None:
                writer.close()


def _at(frame: pl.LazyFrame, some: pl.DataFrame, name: str) -> pl.DataFrame:
    """Read some rows of many, by their numbers in a column of `some`."""
    first, last = (some.select(of(name)).item() or 0 for of in (pl.min, pl.max))
    near = frame.slice(first, last - first + 1).with_row_index(name, offset=first)
    wanted = some.lazy().select(name)
    return (
        near.with_columns(pl.col(name).cast(pl.Int64))
        .join(wanted, on=name, how="semi")
        .collect(engine="streaming")
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file to write beside `path`, which it becomes if all goes well."""
    temp = path.with_name(f".{path.name}.tmp")
    try:
        yield temp
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def _answers(side: Side, mark: str, taken: set[str]) -> Iterator[pl.Expr]:
    for (kind, base), name in side.columns.items():
        if kind == ANSWER:
            yield pl.col(name).alias(_free(f"{mark}_{base}", taken))


def _free(name: str, taken: set[str]) -> str:
    """Return a name that no other column has, and take it."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name
