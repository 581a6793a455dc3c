"""What the phases of one run share."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from batchgen.core.errors import StorageError
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.run_stats import RunStats
    from batchgen.storage import LocalStorage
    from batchgen.store.ledger import Ledger
    from batchgen.store.runs import RunLock, RunLog

_NUM_TIMES = 20


class Stop(StrEnum):
    """How far a run has been asked to stop."""

    NO = "no"
    DRAIN = "drain"
    """Admit nothing more; let what is in flight finish within the grace."""
    NOW = "now"


class StopSwitch:
    """Asked by signal handlers and by the deadline, read by the runner. Only ever moves forward."""

    def __init__(self) -> None:
        self.state = Stop.NO
        self.is_patient = False
        """Who asked will say when to stop waiting for what is in flight: no grace is counted."""
        self.is_heard = False
        """A runner's loop is looking; nobody else has to act on a second asking."""

    def ask(self) -> None:
        """Ask once: drain. Ask again: now."""
        self.state = Stop.DRAIN if self.state is Stop.NO else Stop.NOW

    def drain(self) -> None:
        """Admit nothing more; `now` will come when it is time."""
        if self.state is Stop.NO:
            self.is_patient = True
            self.state = Stop.DRAIN

    def now(self) -> None:
        """Stop waiting."""
        self.state = Stop.NOW


@dataclass(slots=True)
class Notes:
    """Warnings: kept for the summary, and shown at once while there is a progress line."""

    texts: list[str] = field(default_factory=list)
    show: Callable[[str], None] | None = None

    def add(self, text: str) -> None:
        """Tell, once."""
        if text in self.texts:
            return
        self.texts.append(text)
        if self.show is not None:
            self.show(text)

    def show_by(self, show: Callable[[str], None]) -> None:
        """Show what was told already, and from now on each as it comes."""
        for text in self.texts:
            show(text)
        self.show = show


@dataclass(slots=True)
class Taken:
    """Rows of this run that no engine computed."""

    num_rows: int = 0
    """All of them, those that end without a result included."""
    num_copied: int = 0
    """Of these, copies of another row's answer."""
    num_ok: int = 0
    num_errors: int = 0
    num_skipped: int = 0
    known_at_s: float | None = None
    """When it was known which rows can be taken over, on the monotonic clock."""


@dataclass(frozen=True, slots=True)
class RunContext:
    """One run's own."""

    job: JobConfig
    run_id: str
    storage: LocalStorage
    ledger: Ledger
    lock: RunLock
    log: RunLog
    stats: RunStats
    stop: StopSwitch
    notes: Notes = field(default_factory=Notes)
    taken: Taken = field(default_factory=Taken)
    is_trial: bool = False
    """Of `batchgen tune`: rows are to be alike from one trial to the next, so that the long ones
    are not first."""
    commits_s: list[float] = field(default_factory=list)
    """How long the last commits took; for the deadline."""
    deaths: list[str] = field(default_factory=list)
    """Why engines have died, one after the other."""

    def is_stopped(self) -> bool:
        """Whether the run has been asked to end early."""
        return self.stop.state is not Stop.NO

    def note_commit(self, seconds: float) -> None:
        """A commit took so long."""
        self.commits_s.append(seconds)
        del self.commits_s[:-_NUM_TIMES]

    def note_death(self, death: Mapping[str, Any], whose: str = "") -> None:
        """Keep what is known of an engine's death, and warn of it.

        Args:
            death: `EngineDeath.as_dict`.
            whose: Text behind its number, where there are many engines.
        """
        self.deaths.append(str(death["reason"]))
        number = len(self.deaths)
        path = self.log.engine_death(number, death)
        self.notes.add(f"engine death {number}{whose}: {death['reason']}; see {path}")

    def tell_disk_trouble(self, error: StorageError) -> None:
        """A commit was refused."""
        grace = f"{self.job.run.disk_grace_s:.0f} s"
        self.notes.add(f"a commit was refused and is tried again for {grace}: {error}")
