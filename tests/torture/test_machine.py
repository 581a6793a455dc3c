"""Proof 6: runs, crashes, resumes, growing input, `--fresh` and `verify` against a plain model.

The model is two lists: the rows of the input now, and what a reader must see. A crash stops the
process's every later call to the disk, at a call that Hypothesis picks.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import batchgen
from batchgen.config.load import parse_job
from batchgen.errors import RecipeChangedError
from batchgen.executor.local import LocalRun
from batchgen.executor.options import RunOptions
from batchgen.ledger import Ledger
from batchgen.runner import StopSwitch
from batchgen.storage import Disk, LocalStorage
from batchgen.verify import verify


class CrashError(BaseException):
    """The process is gone: nothing may catch it and go on."""


class CrashingDisk(Disk):
    """Works until its n-th call; from then on every call fails."""

    def __init__(self, crash_at: int | None) -> None:
        self.left = crash_at
        self.files: list[Any] = []

    def count(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise CrashError

    def create(self, path: Path) -> Any:
        self.count()
        self.files.append(super().create(path))
        return self.files[-1]

    def write(self, file: Any, data: bytes) -> None:
        self.count()
        super().write(file, data)

    def sync(self, file: Any) -> None:
        self.count()
        super().sync(file)

    def sync_folder(self, path: Path) -> None:
        self.count()
        super().sync_folder(path)

    def link(self, source: Path, target: Path) -> None:
        self.count()
        super().link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        self.count()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self.count()
        super().unlink(path)


class Job(RuleBasedStateMachine):
    @initialize(num_rows=st.integers(5, 30))
    def begin(self, num_rows: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.output = self.folder / "out"
        self.rows: list[str] = []
        self.planned: list[str] | None = None
        self.seen: list[tuple[str | None, str]] | None = None
        self.grow(num_rows, is_bad=False)
        self.job = parse_job(
            {
                "input": {"path": "in.jsonl"},
                "prompt": {"user": "{{ text }}"},
                "model": {"backend": "echo", "engine": {"max_steps": 3}},
                "sampling": {"max_tokens": 100, "temperature": 0},
                "output": {"path": "out"},
                "run": {"flush_rows": 2, "disk_grace_s": 0},
                "gate": {"max_error_rate": 1.0},
            },
            base=self.folder,
            where="job",
        )

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(num_rows=st.integers(1, 6), is_bad=st.booleans())
    def grow(self, num_rows: int, *, is_bad: bool) -> None:
        for _ in range(num_rows):
            number = len(self.rows)
            good = json.dumps({"text": f"row {number} " + "x" * (number % 7)})
            self.rows.append('{"text": ' if is_bad else good)
        text = "".join(f"{row}\n" for row in ['{"text": "first"}', *self.rows])
        (self.folder / "in.jsonl").write_text(text)

    @rule(crash_at=st.none() | st.integers(20, 120))
    def resume(self, crash_at: int | None) -> None:
        self.run(crash_at, fresh=self.planned not in (None, self.rows), retry=False)

    @rule(crash_at=st.none() | st.integers(0, 150), fresh=st.booleans(), retry=st.booleans())
    def run(self, crash_at: int | None, *, fresh: bool, retry: bool) -> None:
        if self.planned not in (None, self.rows) and not fresh:
            with pytest.raises(RecipeChangedError, match=r"in\.jsonl has"):
                LocalRun(self.job, stop=StopSwitch(), disk=CrashingDisk(None)).run()
            return
        disk = CrashingDisk(crash_at)
        try:
            options = RunOptions(fresh=fresh, retry_errors=retry and not fresh)
            summary = LocalRun(self.job, stop=StopSwitch(), options=options, disk=disk).run()
            assert summary.state in {"complete", "nothing_to_do"}
        except CrashError:
            assert crash_at is not None
            for file in disk.files:  # As the kernel does for a dead process.
                file.close()
        self.note()

    def note(self) -> None:
        """After a run or a crash: how far it came is read from the ledger, no more than that."""
        ledger = Ledger(LocalStorage(self.output))
        plan, manifest = ledger.latest_plan(), ledger.latest_manifest()
        if plan is None:
            return
        if plan.num_rows == len(self.rows) + 1:
            self.planned = list(self.rows)
        if manifest is not None and manifest.num_planned == len(self.rows) + 1:
            self.seen = [
                ("first", "ok"),
                *[
                    (json.loads(row)["text"], "ok") if row.endswith("}") else (None, "error")
                    for row in self.rows
                ],
            ]

    @rule()
    def check(self) -> None:
        if self.planned is None:
            return
        verdict = verify(self.output)
        assert verdict.problems == []
        ended = verdict.num_ok + verdict.num_errors + verdict.num_skipped
        assert verdict.num_planned == ended + verdict.num_left

    @invariant()
    def readers_see_a_whole_snapshot(self) -> None:
        if getattr(self, "seen", None) is None:
            return
        rows = batchgen.read(self.output).collect()
        found = list(zip(rows["gen_text"], rows["gen_status"], strict=True))
        assert [(text.rstrip() if text else None, status) for text, status in found] == [
            (text.rstrip() if text else None, status) for text, status in self.seen or []
        ]


TestJob = Job.TestCase
TestJob.settings = settings(
    max_examples=80,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
