"""What the doctor found: one record for programs, and the lines that a person reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import ExitCode
from batchgen.preview.findings import Level

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.preview.findings import Finding
    from batchgen.preview.fit import Fit
    from batchgen.preview.lengths import RowLengths
    from batchgen.preview.machine import Machine
    from batchgen.preview.memory import Memory, Settings
    from batchgen.preview.weights import Weights


@dataclass(frozen=True, slots=True)
class Report:
    """All of it. Parts are None where a problem before them hides them."""

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
        """The worst."""
        levels = {finding.level for finding in self.findings}
        return next((one for one in (Level.PROBLEM, Level.WARNING) if one in levels), Level.OK)

    @property
    def reason(self) -> str | None:
        """The first problem."""
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
            "findings": [finding.as_dict() for finding in self.findings],
            "kv_cache_tokens": self.fit.kv_cache_tokens if self.fit else None,
            "concurrency": self.fit.concurrency if self.fit else None,
            "can_run": dict(self.can_run),
            **{
                name: dataclasses.asdict(part) if (part := getattr(self, name)) else None
                for name in ("machine", "weights", "settings", "memory", "fit", "rows")
            },
        }


def told(report: Report) -> str:
    """The lines that a person reads."""
    lines = []
    for finding in report.findings:
        lines.append(f"{finding.level:8} {finding.topic:13} {finding.text}")
        if finding.advice:
            lines.append(f"{'':22} -> {finding.advice}")
    verdict = {
        Level.OK: "this machine can run the job",
        Level.WARNING: "this machine can run the job; see the warnings",
        Level.PROBLEM: f"this machine cannot run the job: {report.reason}",
    }
    return "\n".join([*lines, verdict[report.level]])
