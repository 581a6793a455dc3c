"""Job trouble: the exception tree and the exit codes. Row trouble is data, see `records.RowError`.

    BatchgenError                  exit code
    |-- ConfigError                2  the job file or a command line option is wrong
    |-- SourceError                2  an input file cannot be read as what it says it is
    |   `-- InputChangedError      1  an input file changed or vanished under a run
    |-- RecipeChangedError         2  the output belongs to another recipe or input
    |-- StorageError               1  a write, sync or read of the output failed (disk full, I/O)
    |   `-- StoreAwayError         75 an object store was away for longer than it is waited for
    |-- OutputError                2  the output folder cannot be used
    |   |-- DamagedPartError       1  a committed part is not what was written
    |   |-- DamagedSnapshotError   1  a published file is not what was written
    |   `-- FencedError            75 another run has taken the job over
    |-- BusyError                  75 another run holds the job right now
    |-- StoppedError               75 asked to stop while it read the input
    |-- EngineError                1  the engine did not start
    |   `-- EngineDeadError        1  the engine died under the run
    |-- ProcessDiedError           1  a process that worked for the run was killed
    |-- GateError                  3  complete, but over a limit of the gate: nothing published
    `-- AccountingError            1  the books do not balance: a bug in batchgen, never published

Texts read `where: what is wrong, what was expected; what to do`, on one line, values in `repr`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from enum import IntEnum
from typing import Any

from batchgen.core.runtime import command, option, printable


class ExitCode(IntEnum):
    """What cron sees."""

    COMPLETE = 0
    FAULT = 1
    REFUSED = 2
    OVER_LIMIT = 3
    STOPPED = 75


class BatchgenError(Exception):
    """Root of everything that batchgen raises on purpose; it survives pickling."""

    exit_code = ExitCode.FAULT

    def __str__(self) -> str:
        return printable(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    kind: type[BatchgenError], args: tuple[Any, ...], fields: Mapping[str, Any]
) -> BatchgenError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


class ConfigError(BatchgenError):
    """The job file, or an option, is wrong. Holds every problem found, not the first."""

    exit_code = ExitCode.REFUSED

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.where = where
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            text = f"{where}: {self.problems[0]}"
        else:
            lines = "".join(f"\n  {problem}" for problem in self.problems)
            text = f"{where}: {len(self.problems)} problems{lines}"
        super().__init__(text)


class SourceError(BatchgenError):
    """An input file cannot be read as what it says it is."""

    exit_code = ExitCode.REFUSED

    def __init__(self, path: str, problem: str) -> None:
        self.path = path
        self.problem = problem
        super().__init__(f"{path}: {problem}")


class InputChangedError(SourceError):
    """An input file changed or vanished after the plan froze it."""

    exit_code = ExitCode.FAULT


class RecipeChangedError(BatchgenError):
    """The unfinished or published job under the output folder is not this job."""

    exit_code = ExitCode.REFUSED

    def __init__(self, where: str, changes: Sequence[str], *, is_finished: bool = True) -> None:
        self.where = where
        self.changes = tuple(changes)
        begun = "made" if is_finished else "begun"
        lines = [f"{where}: the job has changed since this output was {begun}:"]
        lines += [f"  {change}" for change in self.changes]
        super().__init__("\n".join([*lines, *_ways_on(is_finished=is_finished)]))


def _ways_on(*, is_finished: bool) -> list[str]:
    """What to do about another recipe, a line each, what costs least first."""
    accept = command("run", "--accept-recipe")
    if is_finished:
        only = command("run", "--accept-recipe", "--only-errors")
        ways = {
            accept: "every row again, into a new snapshot",
            only: "only rows that are errors, edited or new",
            "undo the change": "nothing is computed again",
        }
    else:
        ways = {
            "undo the change": "finish what was begun",
            accept: "go on by the job as it is now",
            command("run", "--fresh"): "begin anew",
        }
    ways = {command("try"): "see it on some rows first; touches nothing", **ways}
    ways["another output.path"] = "beside this one"
    stays = "what is published stays until a new snapshot is complete"
    return [f"ways on ({stays}):", *(f"  {way}: {what}" for way, what in ways.items())]


class OutputError(BatchgenError):
    """The output folder cannot be used for this job."""

    exit_code = ExitCode.REFUSED


class StorageError(BatchgenError):
    """A write, sync or read of the output failed. Everything committed before it stays."""

    exit_code = ExitCode.FAULT

    def __init__(self, path: str, problem: str) -> None:
        self.path = path
        super().__init__(f"{path}: {problem}; what was committed stays, run again to go on")


class StoreAwayError(StorageError):
    """An object store does not answer, or takes the credentials no more: later it may."""

    exit_code = ExitCode.STOPPED


class NoRightError(StorageError):
    """The output is another user's, who has not opened it to this one."""

    exit_code = ExitCode.REFUSED

    def __init__(self, path: str) -> None:
        self.path = path
        BatchgenError.__init__(
            self, f"{path}: is not open to this user; ask whose it is for the right, or run as them"
        )


class DamagedPartError(OutputError):
    """A committed part is not what was written: torn, flipped, overwritten."""

    exit_code = ExitCode.FAULT

    def __init__(self, name: str, problem: str) -> None:
        self.name = name
        self.problem = problem
        super().__init__(
            f"{name}: damaged ({problem}); it does not count any more, run again to redo its rows"
        )


class DamagedSnapshotError(OutputError):
    """A published file is not what was written, and nothing here has its rows any more."""

    exit_code = ExitCode.FAULT


class FencedError(OutputError):
    """A later run has claimed the job; this one must stop. What it wrote late, nobody accepts."""

    exit_code = ExitCode.STOPPED


class BusyError(BatchgenError):
    """Another run holds the job right now."""

    exit_code = ExitCode.STOPPED


class StoppedError(BatchgenError):
    """A run was asked to stop before it had its plan."""

    exit_code = ExitCode.STOPPED


class EngineError(BatchgenError):
    """The engine did not start."""


class EngineDeadError(EngineError):
    """The engine died under the run. Completions that it gave before stay valid."""


class ProcessDiedError(BatchgenError):
    """A process that read or wrote for the run was killed."""

    def __init__(self, status: int) -> None:
        how = f"signal {-status}" if status < 0 else f"exit code {status}"
        why = "; the kernel does that where memory runs out" if status == -9 else ""
        super().__init__(
            f"a process of this run ended by {how}{why}; what was committed stays, run again to go "
            "on"
        )


class GateError(BatchgenError):
    """Every row is answered, but a limit of `[gate]` is exceeded: nothing is published."""

    exit_code = ExitCode.OVER_LIMIT

    def __init__(self, told: str, gate: Sequence[Mapping[str, Any]]) -> None:
        self.gate = tuple(gate)
        """Every figure, see `publish.Limit.as_dict`."""
        super().__init__(f"{told}; nothing published\n{'; '.join(_ways(self.gate))}")


OF_THE_WHOLE = ("max_shrink", "min_accuracy")
"""Limits that no error row is to blame for."""


def _ways(gate: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to do about limits that are exceeded."""
    errors = next((entry for entry in gate if entry.get("name") == "max_error_rate"), {})
    ways = [str(entry["hint"]) for entry in gate if "hint" in entry]
    is_of_rows = any(e.get("exceeded", True) and e.get("name") not in OF_THE_WHOLE for e in gate)
    if is_of_rows and errors.get("figure") != 0 and "hint" not in errors:
        ways.append(
            f"`{command('show', '--errors')}` shows error rows, "
            f"`{command('run', '--retry-errors')}` tries them again"
        )
    anyway = option("--publish-anyway")
    publish = f"to publish all the same, run again with {anyway} or with a higher limit"
    return [*ways, publish]


class AccountingError(BatchgenError):
    """Planned rows and accounted rows differ. Nothing is published on such books."""


def one_line(exc: BaseException, max_chars: int = 500) -> str:
    """Put an exception of someone else's on one line: its type and the text, cut if long."""
    text = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {text}"[:max_chars] if text else type(exc).__name__


def nearest(word: str, known: Collection[str]) -> str | None:
    """What was probably meant; None if nothing is near."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def suggestion(word: str, known: Collection[str]) -> str:
    """`; did you mean 'x'?`, or else what there is."""
    if near := nearest(word, known):
        return f"; did you mean {near!r}?"
    return f"; there are {', '.join(map(repr, known)) or 'none'}"
