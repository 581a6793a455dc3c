"""What looking at an output gives: values for programs, lines for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchgen.core.runtime import Told, printable
from batchgen.views import rows as view
from batchgen.views.status import as_text, exit_code_of, not_begun

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from batchgen.core.errors import ExitCode

PLACE = "--- "
"""Begins the line that names a row."""


@dataclass(frozen=True, slots=True, repr=False)
class Status(Told):
    """The state of a job; `status["state"]` and the other keys are those of `status_of`."""

    root: Path
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

    root: Path
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
                    lines.append(f"{shown:24} {value}")
        return "\n".join(lines) or str(self.reason)
