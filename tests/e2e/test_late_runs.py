"""What a run that was frozen and wakes too late may do, put there by hand at the worst moment."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

import batchgen
from batchgen.api import load
from batchgen.core.errors import FencedError, GateError
from batchgen.pipeline.context import RunOptions, StopSwitch
from batchgen.pipeline.job_run import JobRun
from batchgen.storage import Disk, LocalStorage
from batchgen.store.books import STATE
from batchgen.store.ledger import Ledger
from batchgen.store.verify import verify
from batchgen.store.visible import show
from tests.e2e.support import write_job, write_rows

if TYPE_CHECKING:
    from pathlib import Path

    from batchgen.store.books import Manifest

NUM_ROWS = 120
HELD_BACK = {"max_error_rate": 0.0}
"""Some rows are bad: every row is durable, nothing is published."""


def test_a_part_that_comes_after_the_claim_is_in_no_snapshot(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", NUM_ROWS)
    job = write_job(tmp_path, "in.jsonl", gate=HELD_BACK)
    for _ in range(2):
        with pytest.raises(GateError):
            batchgen.run(job)
    parts = tmp_path / "out" / STATE / "parts"
    first = parts / "e000001-w00-s000000.parquet"
    # The second run has claimed the job and accepted what it saw; this one is of the first.
    shutil.copy(first, parts / "e000001-w00-s000099.parquet")
    batchgen.run(job, publish_anyway=True)
    ids = batchgen.read(tmp_path / "out").collect()["id"].drop_nulls().to_list()
    assert len(ids) == len(set(ids)) > NUM_ROWS * 0.9


class Sleeper(Ledger):
    """Looked for the newest snapshot, fell asleep, and wakes when there is a newer one."""

    has_looked = False

    def latest_manifest(self) -> Manifest | None:
        if self.has_looked:
            return super().latest_manifest()
        self.has_looked = True
        return self.manifest(1)


def test_a_run_that_slept_while_showing_its_snapshot_shows_the_newest(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", NUM_ROWS)
    job = write_job(tmp_path, "in.jsonl", output={"keep_snapshots": 2})
    batchgen.run(job)
    batchgen.run(job, fresh=True)
    out = tmp_path / "out"
    files = {path.name: path.read_bytes() for path in out.glob("part-*.parquet")}
    sleeper = Sleeper(LocalStorage(out))
    old = sleeper.manifest(1)
    assert old is not None
    show(sleeper, old)
    assert {path.name: path.read_bytes() for path in out.glob("part-*.parquet")} == files


class Overtaken(Disk):
    """Falls asleep before a file of some kind gets its name, and wakes when another run is through.

    That one begins anew and keeps one snapshot, so that it removes all that the sleeper knew.
    """

    def __init__(self, job: Path, kind: str) -> None:
        self._job = job
        self._kind = kind
        self.has_slept = False

    def link(self, source: Path, target: Path) -> None:
        if target.parent.name == self._kind and not self.has_slept:
            self.has_slept = True
            keep = ["output.keep_snapshots=1"]
            batchgen.run(self._job, fresh=True, steal=True, overrides=keep)
        super().link(source, target)


@pytest.mark.parametrize(
    ("kind", "fresh"),
    [("plan", True), ("files", True), ("manifests", True), ("epochs", False), ("parts", False)],
)
def test_a_run_that_wakes_when_all_that_it_knew_is_pruned_is_told_so(
    tmp_path: Path, kind: str, fresh: bool
) -> None:
    write_rows(tmp_path / "in.jsonl", NUM_ROWS)
    job = write_job(tmp_path, "in.jsonl")
    batchgen.run(job)
    write_rows(tmp_path / "in.jsonl", NUM_ROWS, start=50)
    disk = Overtaken(job, kind)
    late = JobRun(load(job), stop=StopSwitch(), options=RunOptions(fresh=fresh), disk=disk)
    with pytest.raises(FencedError):
        late.run()
    assert disk.has_slept
    assert late.summary is not None
    assert late.summary.state == "stopped"
    books = tmp_path / "out" / STATE
    assert len(list((books / "manifests").iterdir())) == 1  # Not the sleeper's, of no plan.
    checked = verify(tmp_path / "out")
    assert not checked.problems + checked.older_problems
    assert batchgen.run(job).state == "nothing_to_do"


class Published(Disk):
    """Falls asleep once its manifest is there, and wakes when the next night is through."""

    def __init__(self, job: Path) -> None:
        self._job = job
        self.has_slept = False

    def link(self, source: Path, target: Path) -> None:
        super().link(source, target)
        if target.parent.name == "manifests" and not self.has_slept:
            self.has_slept = True
            write_rows(self._job.parent / "in.jsonl", NUM_ROWS, start=50)
            batchgen.run(self._job, steal=True)


def test_a_snapshot_that_was_there_before_a_newer_one_stays(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", NUM_ROWS)
    job = write_job(tmp_path, "in.jsonl")
    disk = Published(job)
    late = JobRun(load(job), stop=StopSwitch(), options=RunOptions(), disk=disk)
    assert late.run().state == "complete"
    assert disk.has_slept
    ledger = Ledger(LocalStorage(tmp_path / "out"))
    assert [one.number for one in ledger.manifests()] == [1, 2]
    first, last = (batchgen.read(job, number).collect()["id"].drop_nulls() for number in (1, 2))
    assert (first.min(), last.min()) == (0, 50)
    checked = verify(tmp_path / "out")
    assert not checked.problems + checked.older_problems
