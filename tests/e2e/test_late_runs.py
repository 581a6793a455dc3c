"""What a run that was frozen and wakes too late may do, put there by hand at the worst moment."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

import batchgen
from batchgen.core.errors import GateError
from batchgen.storage import LocalStorage
from batchgen.store.books import STATE
from batchgen.store.ledger import Ledger
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
