"""Which snapshots there are, and which go."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from batchgen.core.errors import BusyError, OutputError, StorageError
from batchgen.storage import Disk, LocalStorage
from batchgen.store.books import STATE, Base, Manifest, PublishedFile, Segment
from batchgen.store.ledger import Ledger
from batchgen.store.prune import Keep, prune
from batchgen.store.runs import RunLock
from batchgen.store.snapshot import find_snapshot
from batchgen.views.status import listed
from batchgen.views.status import prune as prune_output
from tests.fakes import plan, put_version_1

if TYPE_CHECKING:
    from pathlib import Path

    from batchgen.store.books import Plan


@pytest.fixture
def ledger(storage: LocalStorage) -> Ledger:
    return Ledger(storage)


def make_plan(number: int, *, inputs: str = "", bases: tuple[int, ...] = ()) -> Plan:
    """A plan of files with the contents `inputs`, one letter each; else of one of its own."""
    segments = [
        Segment(f"/in/{at}.jsonl", 1, "1", f"content-{letter}", 1)
        for at, letter in enumerate(inputs or str(number))
    ]
    made = replace(plan(), number=number, plan_id=f"plan-{number}", segments=segments)
    return replace(made, bases=[Base(base) for base in bases])


def put_digests(ledger: Ledger, made: Plan) -> None:
    for segment in made.segments:
        ledger.storage.put_if_absent(f"{STATE}/rows/{segment.digest}.bin", b"d")


def put_plan(ledger: Ledger, number: int, *, inputs: str = "", bases: tuple[int, ...] = ()) -> None:
    made = make_plan(number, inputs=inputs, bases=bases)
    ledger.put_plan(made)
    put_digests(ledger, made)


def publish(ledger: Ledger, number: int, epoch: int = 0, run_id: str = "") -> None:
    """A snapshot of ten bytes and an index of five, by epoch 10 * `number` unless it is given."""
    epoch = epoch or 10 * number
    folder = f"{STATE}/snapshots/e{epoch:06d}"
    entries = []
    for name, data in (("part-00000.parquet", b"x" * 10), ("index.parquet", b"y" * 5)):
        ledger.storage.put_if_absent(f"{folder}/{name}", data)
        entry = PublishedFile(f"{folder}/{name}", 1, len(data), "")
        entries.append(entry)
    manifest = Manifest(
        number=number,
        plan_id=f"plan-{number}",
        epoch=epoch,
        run_id=run_id or f"run-{number}",
        created_at=f"2026-01-0{number}T00:00:00+00:00",
        files=entries[:1],
        num_planned=1,
        num_ok=1,
        num_errors=0,
        num_skipped=0,
        index=entries[1],
    )
    put_version_1(ledger, manifest)


def put_nights(ledger: Ledger, *numbers: int) -> None:
    for number in numbers:
        put_plan(ledger, number)
        publish(ledger, number)


def numbers_of(ledger: Ledger) -> list[int]:
    return [manifest.number for manifest in ledger.manifests()]


def prune_snapshots(ledger: Ledger, keep: int) -> list[Manifest]:
    return list(prune(ledger, Keep(keep)).manifests)


def names_in(ledger: Ledger, folder: str) -> list[str]:
    return [name.rpartition("/")[2] for name in ledger.storage.list(f"{STATE}/{folder}")]


def test_snapshots_come_oldest_first_and_plans_without_one_are_left_out(ledger):
    put_nights(ledger, 1, 3)
    put_plan(ledger, 2)
    assert numbers_of(ledger) == [1, 3]


def test_a_snapshot_is_found_by_number_and_none_means_the_newest(ledger):
    put_nights(ledger, 1, 2)
    assert find_snapshot(ledger, 1).number == 1
    assert find_snapshot(ledger, None).number == 2


def test_an_unknown_number_lists_those_that_exist(ledger):
    with pytest.raises(OutputError, match="nothing is published here"):
        find_snapshot(ledger, 1)
    put_nights(ledger, 1, 3)
    with pytest.raises(OutputError, match=r"there is no snapshot 2, expected one of: 1, 3$"):
        find_snapshot(ledger, 2)


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [4]), (2, [3, 4]), (4, [1, 2, 3, 4]), (9, [1, 2, 3, 4])]
)
def test_the_newest_are_kept_and_the_rest_goes_with_its_files(ledger, keep, left):
    put_nights(ledger, 1, 2, 3, 4)
    removed = prune_snapshots(ledger, keep)
    assert [manifest.number for manifest in removed] == sorted({1, 2, 3, 4} - set(left))
    assert numbers_of(ledger) == left
    assert names_in(ledger, "snapshots") == [f"e{10 * number:06d}" for number in left]
    assert names_in(ledger, "rows") == [f"content-{number}.bin" for number in left]
    assert names_in(ledger, "plan") == [f"{number:06d}.json" for number in left]


def test_to_keep_none_is_refused():
    with pytest.raises(ValueError, match="keep is 0"):
        Keep(0)


def test_pruning_again_removes_nothing_more(ledger):
    put_nights(ledger, 1, 2, 3)
    assert len(prune_snapshots(ledger, 2)) == 1
    assert prune_snapshots(ledger, 2) == []
    assert numbers_of(ledger) == [2, 3]


def test_nothing_published_is_nothing_to_prune(ledger):
    put_plan(ledger, 1)
    assert prune_snapshots(ledger, 1) == []
    assert names_in(ledger, "rows") == ["content-1.bin"]


def test_what_an_unfinished_plan_takes_rows_from_stays(ledger):
    put_nights(ledger, 1, 2, 3)
    put_plan(ledger, 4, bases=(1,))
    assert [manifest.number for manifest in prune_snapshots(ledger, 1)] == [2]
    assert numbers_of(ledger) == [1, 3]
    assert names_in(ledger, "rows") == [f"content-{number}.bin" for number in (1, 3, 4)]
    # Once it is published, it has what it needed.
    publish(ledger, 4)
    assert [manifest.number for manifest in prune_snapshots(ledger, 1)] == [1, 3]
    assert names_in(ledger, "rows") == ["content-4.bin"]


def test_what_the_unfinished_base_of_an_unfinished_plan_is_based_on_stays(ledger):
    put_nights(ledger, 1, 2)
    put_plan(ledger, 3, bases=(1,))
    put_plan(ledger, 4, bases=(3,))
    assert prune_snapshots(ledger, 1) == []
    assert names_in(ledger, "rows") == [f"content-{number}.bin" for number in (1, 2, 3, 4)]


def test_digests_of_a_file_that_a_kept_snapshot_shares_stay(ledger):
    put_plan(ledger, 1, inputs="ab")
    publish(ledger, 1)
    put_plan(ledger, 2, inputs="bc")
    publish(ledger, 2)
    prune_snapshots(ledger, 1)
    assert names_in(ledger, "rows") == ["content-b.bin", "content-c.bin"]


class Full(Disk):
    """Fails to unlink from the `first` time on."""

    def __init__(self, first: int) -> None:
        self.left = first

    def unlink(self, path: Path) -> None:
        if not self.left:
            raise OSError(5, "Input/output error")
        self.left -= 1
        super().unlink(path)


@pytest.mark.parametrize("first", range(8))
def test_a_pruning_that_died_is_healed_by_the_next(storage, ledger, first):
    put_nights(ledger, 1, 2, 3)
    # Two manifests, two snapshots of two files, two digest files.
    with pytest.raises(StorageError):
        prune_snapshots(Ledger(LocalStorage(storage.root, disk=Full(first))), 1)
    left = numbers_of(ledger)
    assert left == [number for number in (1, 2, 3) if number > first or number == 3]
    for manifest in ledger.manifests():  # What is named is there.
        assert all(storage.path(file.name).exists() for file in manifest.files)
    prune_snapshots(ledger, 1)
    assert names_in(ledger, "manifests") == ["000003.json"]
    assert names_in(ledger, "snapshots") == ["e000030"]
    assert names_in(ledger, "rows") == ["content-3.bin"]


def test_no_name_goes_before_the_manifests_removal_is_durable(storage, ledger):
    put_nights(ledger, 1, 2)
    calls: list[tuple[str, str]] = []

    class Recorded(Disk):
        def unlink(self, path: Path) -> None:
            calls.append(("unlink", path.name))
            super().unlink(path)

        def sync_folder(self, path: Path) -> None:
            calls.append(("sync", path.name))
            super().sync_folder(path)

    prune_snapshots(Ledger(LocalStorage(storage.root, disk=Recorded())), 1)
    first_file = calls.index(("unlink", "part-00000.parquet"))
    assert ("sync", "manifests") in calls[calls.index(("unlink", "000001.json")) : first_file]


def test_lines_tell_sizes_and_which_is_shown(storage, ledger):
    put_nights(ledger, 1, 2)
    assert [line.is_shown for line in listed(storage.root)] == [False, False]
    storage.expose(f"{STATE}/snapshots/e000020/part-00000.parquet", "part-00000.parquet")
    first, second = listed(storage.root)
    assert (first.is_shown, second.is_shown) == (False, True)
    assert (first.number, first.size_bytes, first.num_files) == (1, 15, 1)
    assert (first.run_id, first.recipe, first.overridden) == ("run-1", "f" * 32, [])


def test_a_dry_run_tells_and_removes_nothing(storage, ledger):
    put_nights(ledger, 1, 2, 3)
    assert [line.number for line in prune_output(storage.root, 2, dry_run=True).removed] == [1]
    assert numbers_of(ledger) == [1, 2, 3]
    assert [line.number for line in prune_output(storage.root, 2).removed] == [1]
    assert numbers_of(ledger) == [2, 3]


def test_pruning_waits_for_no_run_and_takes_nothing_from_it(storage, ledger):
    put_nights(ledger, 1, 2)
    lock = RunLock(storage, "run-9")
    lock.acquire()
    with pytest.raises(BusyError, match=r"run run-9 .* is at work on this job; prune when"):
        prune_output(storage.root, 1)
    assert numbers_of(ledger) == [1, 2]
    assert len(prune_output(storage.root, 1, dry_run=True).removed) == 1
    lock.release()
    assert len(prune_output(storage.root, 1).removed) == 1
    assert not lock.is_held()


def test_a_folder_without_a_job_is_not_made_one(tmp_path):
    with pytest.raises(OutputError, match="there is no job here to prune"):
        prune_output(tmp_path / "none", 1)
    assert not (tmp_path / "none").exists()
