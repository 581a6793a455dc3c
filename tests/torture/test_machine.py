"""Proof 6: runs, crashes, resumes, changing input, `--fresh` and `verify` against a plain model.

The model is two lists: the rows of the input now, and what a reader must see. A crash stops the
process's every later call to the disk, at a call that Hypothesis picks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import batchgen
from batchgen.job.load import parse_job
from batchgen.pipeline.context import RunOptions, StopSwitch
from batchgen.pipeline.job_run import JobRun
from batchgen.storage import LocalStorage
from batchgen.store.ledger import Ledger
from batchgen.store.verify import verify
from tests.torture.disks import CrashError, CrashingDisk


class Job(RuleBasedStateMachine):
    @initialize(num_rows=st.integers(5, 30))
    def begin(self, num_rows: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.output = self.folder / "out"
        self.rows: list[str] = []
        self.num_made = 0
        self.contents: dict[str, list[str]] = {}
        """sha256 of the input -> its rows after the first, for every day so far."""
        self.planned: list[str] | None = None
        self.seen: list[tuple[str | None, str]] | None = None
        self.is_shown = False
        """Whether the last run got as far as to show its snapshot in the output folder."""
        self.grow(num_rows, is_bad=False)
        self.job = parse_job(
            {
                "input": {"path": "in.jsonl"},
                "prompt": {"user": "{{ text }}"},
                "model": {"backend": "echo", "engine": {"max_steps": 3}},
                "sampling": {"max_tokens": 100, "temperature": 0},
                "output": {"path": "out"},
                "run": {"flush_rows": 2, "disk_grace_s": 0},
                "gate": {"max_error_rate": 1.0, "max_shrink": 1.0},
            },
            base=self.folder,
            where="job",
        )

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(num_rows=st.integers(1, 6), is_bad=st.booleans())
    def grow(self, num_rows: int, *, is_bad: bool) -> None:
        for _ in range(num_rows):
            self.rows.append(self.new_row(is_bad=is_bad))
        self.write()

    @rule(at=st.integers(0, 40), is_bad=st.booleans())
    def edit(self, at: int, *, is_bad: bool) -> None:
        self.rows[at % len(self.rows)] = self.new_row(is_bad=is_bad)
        self.write()

    @rule(at=st.integers(0, 40), num_rows=st.integers(1, 3))
    def delete(self, at: int, num_rows: int) -> None:
        at %= len(self.rows)
        del self.rows[at : at + num_rows]
        self.rows = self.rows or [self.new_row(is_bad=False)]
        self.write()

    def new_row(self, *, is_bad: bool) -> str:
        self.num_made += 1
        good = json.dumps({"text": f"row {self.num_made} " + "x" * (self.num_made % 7)})
        return '{"text": ' if is_bad else good

    def write(self) -> None:
        text = "".join(f"{row}\n" for row in ['{"text": "first"}', *self.rows])
        path = self.folder / "in.jsonl"
        path.write_text(text)
        # The kernel's clock may stand still between two changes of one size.
        os.utime(path, ns=(self.num_made + 10**18, self.num_made + 10**18))
        self.contents[hashlib.sha256(text.encode()).hexdigest()] = list(self.rows)

    @rule(crash_at=st.none() | st.integers(20, 160))
    def resume(self, crash_at: int | None) -> None:
        self.run(crash_at, fresh=False, retry=False)

    @rule(crash_at=st.none() | st.integers(0, 200), fresh=st.booleans(), retry=st.booleans())
    def run(self, crash_at: int | None, *, fresh: bool, retry: bool) -> None:
        disk = CrashingDisk(crash_at)
        try:
            options = RunOptions(fresh=fresh, retry_errors=retry and not fresh)
            summary = JobRun(self.job, stop=StopSwitch(), options=options, disk=disk).run()
            assert summary.state in {"complete", "nothing_to_do"}
            self.is_shown = True
            self.note()
            assert self.planned == self.rows
        except CrashError:
            assert crash_at is not None
            disk.bury()
            self.is_shown = False
            self.note()

    def note(self) -> None:
        """After a run or a crash: how far it came is read from the ledger, no more than that."""
        ledger = Ledger(LocalStorage(self.output))
        plan, manifest = ledger.latest_plan(), ledger.latest_manifest()
        if plan is None:
            return
        self.planned = self.contents[plan.segments[0].digest]
        if manifest is not None:
            rows = self.contents[ledger.plan(manifest.number).segments[0].digest]
            self.seen = [
                ("first", "ok"),
                *[
                    (json.loads(row)["text"], "ok") if row.endswith("}") else (None, "error")
                    for row in rows
                ],
            ]

    @rule()
    def check(self) -> None:
        if self.planned is None:
            return
        verdict = verify(self.output)
        problems = verdict.problems
        if not self.is_shown:  # Published, but the run died before the folder showed it.
            problems = [text for text in problems if not text.startswith("part-")]
        assert problems == []
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
