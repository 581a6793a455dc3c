"""The echo engine's faults, as `[model.engine]` tells them: for tests of what stands around it.

    faults = [
      {kind = "die", at = 100},           # when the 100th request is admitted
      {kind = "poison", text = "boom"},   # whenever a prompt with this text is admitted
    ]
    once_file = "/tmp/fired"              # each `at` fault fires once over all engines of the job
    in_process = false                    # host it like vLLM: then it truly dies

`at` counts the requests that one engine has admitted, from 1; an engine that is built anew counts
anew, so without `once_file` the fault comes back with it. `text` strikes every time.

die            in this process: EngineDeadError, for good; hosted: the process exits
out_of_memory  the same in CUDA's words; hosted: SIGKILL, as from the kernel
hang           no step makes progress any more; hosted: the step never returns
vanish         the request never comes back, and the engine forgets it
duplicate      it is answered twice
wrong_id       it is answered under an id that nobody asked for
poison         as die; with `text`
refuse         the row's error `bad_request`; with `text`
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KINDS = (
    "die", "out_of_memory", "hang", "vanish", "duplicate", "wrong_id", "poison", "refuse",
)  # fmt: skip
NEED_TEXT = ("poison", "refuse")


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of the table: what happens, and to which request."""

    kind: str
    at: int | None = None
    text: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} at {self.at if self.text is None else repr(self.text)}"


def read_faults(tables: object) -> tuple[list[Fault], list[str]]:
    """Check the fault table; return the faults, and what is wrong with it."""
    if not isinstance(tables, list | tuple):
        return [], [f"faults = {tables!r} is not a list of tables"]
    problems = [
        f"faults[{number}]: {problem}"
        for number, table in enumerate(tables)
        if (problem := _problem(table))
    ]
    return [] if problems else [Fault(**table) for table in tables], problems


def _problem(table: Any) -> str | None:  # noqa: ANN401
    if not isinstance(table, dict):
        return f"{table!r} is not a table"
    if table.get("kind") not in KINDS:
        return f"kind = {table.get('kind')!r}, expected one of {', '.join(KINDS)}"
    return _problem_of_place(table)


def _problem_of_place(table: Mapping[str, Any]) -> str | None:
    place = {name: value for name, value in table.items() if name != "kind"}
    if table["kind"] in NEED_TEXT and place.keys() != {"text"}:
        return f"{table['kind']} needs text, found {sorted(place)}"
    if len(place) != 1 or not place.keys() <= {"at", "text"}:
        return f"expected either at or text, found {sorted(place)}"
    at, text = table.get("at", 1), table.get("text", "x")
    if type(at) is not int or at < 1 or not isinstance(text, str) or not text:
        return f"{place} is neither a number >= 1 nor a text"
    return None


class FaultTable:
    """Says which faults strike a request; remembers in `once_file` which have struck."""

    def __init__(self, faults: Sequence[Fault], once_file: str | None) -> None:
        self._faults = faults
        self._once_file = Path(once_file) if once_file is not None else None
        self._num_admitted = 0

    def strikes(self, text: str) -> list[Fault]:
        """Count a request in; return the faults that it meets."""
        self._num_admitted += 1
        return [fault for fault in self._faults if self._meets(fault, text)]

    def _meets(self, fault: Fault, text: str) -> bool:
        if fault.text is not None:
            return fault.text in text
        return fault.at == self._num_admitted and self._is_first_time(fault)

    def _is_first_time(self, fault: Fault) -> bool:
        if self._once_file is None:
            return True
        if self._once_file.exists() and str(fault) in self._once_file.read_text().splitlines():
            return False
        # Before the fault, which may leave no time after it.
        fd = os.open(self._once_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, f"{fault}\n".encode())
        os.close(fd)
        return True
