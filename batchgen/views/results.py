"""What looking at an output gives: values for programs, lines for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchgen.core.data import pl
from batchgen.core.errors import OutputError
from batchgen.core.runtime import Told, printable
from batchgen.views import rows as view
from batchgen.views.status import as_text, exit_code_of, not_begun

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from batchgen.core.errors import ExitCode
    from batchgen.core.places import Root

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
            place = str(row.get(view.INPUT, f"row {number} of those shown"))
            lines.append(f"{PLACE}{printable(place, keep='')}")
            for name, value in row.items():
                if value is not None and name != view.INPUT:
                    shown = "line" if name == view.LINE else printable(name, keep="")
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
