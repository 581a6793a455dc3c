"""What `batchgen doctor` says: findings, one line a fact, and the report of all of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.preview.checkpoint import Weights
    from batchgen.preview.machine import Machine
    from batchgen.preview.memory import Fit, Memory, Settings
    from batchgen.preview.sample import RowLengths

GIB = 2**30
MAX_CHARS = 2000
"""Longest text of a finding: what a model's file says can be of any length."""


class Level(StrEnum):
    """How a fact bears on the job."""

    OK = "ok"
    WARNING = "warning"
    """The job runs, but slower or otherwise than one may expect."""
    PROBLEM = "problem"
    """The job does not run."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about the job on this machine."""

    level: Level
    topic: str
    """One word: gpu, vllm, memory, ..."""
    text: str
    advice: str = ""
    """What to do; empty where nothing is to be done."""


def ok(topic: str, text: str) -> Finding:
    """A fact that needs nothing to be done."""
    return Finding(Level.OK, topic, _line(text))


def warning(topic: str, text: str, advice: str = "") -> Finding:
    """A fact with which the job runs all the same."""
    return Finding(Level.WARNING, topic, _line(text), advice)


def problem(topic: str, text: str, advice: str = "") -> Finding:
    """A fact with which the job does not run."""
    return Finding(Level.PROBLEM, topic, _line(text), advice)


def of_error(topic: str, error: Exception, advice: str = "") -> Finding:
    """A problem with an error's text, in one line."""
    lines = (line.strip() for line in str(error).splitlines())
    return problem(topic, "; ".join(lines) or type(error).__name__, advice)


def _line(text: str) -> str:
    """One line that every terminal takes: a model's file can hold escape sequences."""
    text = text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def gib(num_bytes: float) -> str:
    """Bytes for people: `15.26 GiB`, or MiB below one."""
    size = abs(num_bytes)
    if size < GIB:
        return f"{num_bytes / 2**20:,.0f} MiB"
    return f"{num_bytes / GIB:,.2f} GiB" if size < 100 * GIB else f"{num_bytes / GIB:,.0f} GiB"


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, and the figures behind them; None where a problem hides a figure."""

    findings: Sequence[Finding]
    machine: Machine
    can_run: Mapping[str, str] = field(default_factory=dict)
    """Formats -> yes, weights only, no; of the first GPU."""
    weights: Weights | None = None
    settings: Settings | None = None
    memory: Memory | None = None
    fit: Fit | None = None
    rows: RowLengths | None = None

    @property
    def level(self) -> Level:
        """The worst level of all findings."""
        levels = {finding.level for finding in self.findings}
        return next((one for one in (Level.PROBLEM, Level.WARNING) if one in levels), Level.OK)

    @property
    def reason(self) -> str | None:
        """Text of the first problem."""
        return next((f.text for f in self.findings if f.level == Level.PROBLEM), None)

    @property
    def exit_code(self) -> ExitCode:
        """0 if the job can run here, else 2."""
        return ExitCode.REFUSED if self.level == Level.PROBLEM else ExitCode.COMPLETE

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "state": str(self.level),
            "exit_code": int(self.exit_code),
            "reason": self.reason,
            "kv_cache_tokens": self.fit.kv_cache_tokens if self.fit else None,
            "concurrency": self.fit.concurrency if self.fit else None,
            **dataclasses.asdict(self),
        }

    def as_text(self) -> str:
        """The lines that a person reads: findings, and the verdict."""
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.level:8} {finding.topic:13} {finding.text}")
            if finding.advice:
                lines.append(f"{'':22} -> {finding.advice}")
        verdict = {
            Level.OK: "this machine can run the job",
            Level.WARNING: "this machine can run the job; see the warnings",
            Level.PROBLEM: f"this machine cannot run the job: {self.reason}",
        }
        return "\n".join([*lines, verdict[self.level]])
