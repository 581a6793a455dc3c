"""What goes of an output's past, by number and by age, and what never does."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from batchgen.core.errors import FencedError, StorageError
from batchgen.storage import Disk, LocalStorage
from batchgen.store.books import STATE, TRIES, Epoch
from batchgen.store.ledger import Ledger
from batchgen.store.prune import Keep, outdated, prune
from tests.unit.test_snapshots import make_plan, publish, put_digests

if TYPE_CHECKING:
    from pathlib import Path

NUM = 5


@pytest.fixture
def ledger(storage: LocalStorage) -> Ledger:
    """Five nights, each with a broken run before the one that published: claims 1 to 10."""
    found = Ledger(storage)
    for number in range(1, NUM + 1):
        make_night(found, number)
    return found


def make_night(ledger: Ledger, number: int) -> None:
    made = make_plan(number)
    ledger.put_plan(made)
    put_digests(ledger, made)
    for at, run in enumerate(("broken", "run")):
        run_id = f"2026010{number}T00000{at}-{run}"
        ledger.claim(made, run_id, {})
        for name in ("summary.json", "vllm.log"):
            ledger.storage.replace(f"{STATE}/runs/{run_id}/{name}", b"row 17 said")
    publish(ledger, number, epoch=2 * number, run_id=run_id)


def numbers_in(ledger: Ledger, kind: str) -> list[int]:
    names = ledger.storage.list(f"{STATE}/{kind}")
    return [int(name.rpartition("/")[2].partition(".")[0]) for name in names]


def runs(ledger: Ledger) -> list[str]:
    return [name.rpartition("/")[2] for name in ledger.storage.list(f"{STATE}/runs")]


def test_with_a_snapshot_stay_its_plan_its_claim_and_its_run(ledger: Ledger) -> None:
    prune(ledger, Keep(2))
    assert numbers_in(ledger, "manifests") == numbers_in(ledger, "plan") == [4, 5]
    assert numbers_in(ledger, "epochs") == [8, 9, 10]  # Of a snapshot, and the two newest.
    assert {"20260104T000001-run", "20260105T000001-run"} <= set(runs(ledger))
    assert len(runs(ledger)) <= 4
    assert ledger.storage.list(f"{STATE}/rows") == [f"{STATE}/rows/content-{n}.bin" for n in (4, 5)]


def test_nothing_that_is_young_goes(ledger: Ledger) -> None:
    # Snapshots are of January 2026 by their manifests, the rest is of today.
    since = datetime(2026, 1, 4, tzinfo=UTC)
    assert [one.number for one in prune(ledger, Keep(1, since)).manifests] == [1, 2, 3]
    assert len(runs(ledger)) == 2 * NUM
    old_s = time.time() - 9 * 86400
    for run in runs(ledger)[:3]:
        os.utime(ledger.storage.path(f"{STATE}/runs/{run}"), (old_s, old_s))
    week_ago = datetime.now(tz=UTC) - timedelta(days=7)
    assert len(outdated(ledger, Keep(1, week_ago)).runs) == 3
    assert not outdated(ledger, Keep(8, week_ago)).runs[2:]


def test_a_plan_that_a_run_may_still_publish_late_stays(ledger: Ledger) -> None:
    for number in (NUM + 1, NUM + 2):
        ledger.put_plan(make_plan(number))
    prune(ledger, Keep(1))
    assert numbers_in(ledger, "plan") == [NUM, NUM + 1, NUM + 2]


def test_a_snapshot_whose_plan_is_gone_stays_and_stops_no_pruning(ledger: Ledger) -> None:
    ledger.storage.remove(f"{STATE}/plan/000004.json")
    prune(ledger, Keep(2))
    assert numbers_in(ledger, "manifests") == [4, 5]
    assert numbers_in(ledger, "plan") == [5]


def test_however_old_the_newest_of_each_kind_stays_so_that_no_number_comes_twice(
    ledger: Ledger,
) -> None:
    prune(ledger, Keep(1))
    assert numbers_in(ledger, "manifests") == numbers_in(ledger, "plan") == [NUM]
    assert numbers_in(ledger, "epochs") == [2 * NUM]
    plan = ledger.latest_plan()
    assert plan is not None
    assert ledger.claim(plan, "run-next", {}).number == 2 * NUM + 1


@pytest.mark.parametrize("epoch", range(1, 2 * NUM))
def test_a_run_that_wakes_when_all_that_it_knew_is_pruned_is_refused(
    ledger: Ledger, epoch: int
) -> None:
    old = ledger.plan((epoch + 1) // 2)
    prune(ledger, Keep(1))
    with pytest.raises(FencedError):
        ledger.check_fence(Epoch(epoch, old, "late", ledger.durable(old)))
    if old.number < NUM:
        with pytest.raises(FencedError):
            ledger.claim(old, "late", {})


def test_of_runs_of_one_second_the_last_ones_stay(ledger: Ledger) -> None:
    for run in runs(ledger):
        ledger.storage.remove_folder(f"{STATE}/runs/{run}")
    for at, run in enumerate(("20260109T000000-b", "20260109T000000-c", "20260109T000000-a")):
        name = f"{STATE}/runs/{run}"
        ledger.storage.replace(f"{name}/summary.json", b"{}")
        os.utime(ledger.storage.path(name), (1000.0 + at, 1000.0 + at))
    prune(ledger, Keep(1))
    assert runs(ledger) == ["20260109T000000-a"]


@pytest.mark.parametrize(("tried_at", "stays"), [(-1, False), (0, False), (1, True)])
def test_try_outs_of_before_the_newest_snapshot_go_and_of_the_same_second_too(
    ledger: Ledger, tried_at: int, *, stays: bool
) -> None:
    newest = ledger.latest_manifest()
    assert newest is not None
    made_at = datetime.fromisoformat(newest.created_at) + timedelta(seconds=tried_at)
    tries = Ledger(LocalStorage(ledger.storage.path(TRIES)))
    tries.put_plan(replace(make_plan(1), created_at=made_at.isoformat(timespec="seconds")))
    prune(ledger, Keep(1))
    assert ledger.storage.path(TRIES).exists() == stays


def test_an_unpublished_plan_keeps_what_it_is_based_on(ledger: Ledger) -> None:
    made = make_plan(NUM + 1, bases=(2,))
    ledger.put_plan(made)
    prune(ledger, Keep(1))
    assert numbers_in(ledger, "manifests") == [2, NUM]
    assert numbers_in(ledger, "plan") == [2, NUM, NUM + 1]


class Full(Disk):
    """Fails to unlink from the `first` time on."""

    def __init__(self, first: int) -> None:
        self.left = first

    def unlink(self, path: Path) -> None:
        if not self.left:
            raise OSError(5, "Input/output error")
        self.left -= 1
        super().unlink(path)


def files_of(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_a_pruning_that_dies_at_any_step_is_healed_by_the_next(tmp_path: Path) -> None:
    def new(at: int | str) -> Ledger:
        found = Ledger(LocalStorage(tmp_path / str(at)))
        for number in range(1, NUM + 1):
            make_night(found, number)
        return found

    whole = new("whole")
    prune(whole, Keep(2))
    wanted = files_of(whole.storage.root)
    at, is_through = 0, False
    while not is_through:
        ledger = new(at)
        try:
            prune(Ledger(LocalStorage(ledger.storage.root, disk=Full(at))), Keep(2))
            is_through = True
        except StorageError:
            for manifest in ledger.manifests():  # What is named is there.
                assert ledger.plan(manifest.number)
                assert all(ledger.storage.path(one.name).exists() for one in manifest.files)
        prune(ledger, Keep(2))
        assert files_of(ledger.storage.root) == wanted, at
        at += 1
    assert at > 20
