"""One snapshot or an error: what readers of the folder see while another one is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl
import pytest

from batchgen.storage import Disk, LocalStorage
from batchgen.store.visible import SWITCHING, expose, faults
from tests.switches import READERS, Turning, make_world, rows_of, switch

if TYPE_CHECKING:
    from pathlib import Path

    from batchgen.store.books import Manifest
    from tests.switches import Rows, World


def test_readers_at_work_see_one_snapshot_or_an_error(tmp_path: Path) -> None:
    found = switch(tmp_path / "out", 40)
    assert all(seen for seen, _ in found.values())


def read(root: Path, how: str) -> Rows | None:
    """What a reader gets; None: an error."""
    try:
        return frozenset(READERS[how](str(root)))
    except (OSError, ValueError, pl.exceptions.PolarsError):
        return None


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = make_world(tmp_path / "out", 3, seed=5)
    made.show(0)
    return made


class KilledError(BaseException):
    """What ends a run in the middle, as nothing catches it."""


class Killing(Disk):
    """Ends the process, so to say, before one of its calls."""

    def __init__(self, at: int) -> None:
        self.left = at

    def _count(self) -> None:
        if not self.left:
            raise KilledError
        self.left -= 1

    def create(self, path: Path):
        self._count()
        return super().create(path)

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._count()
        super().link(source, target)

    def unlink(self, path: Path) -> None:
        self._count()
        super().unlink(path)

    def sync_folder(self, path: Path) -> None:
        self._count()
        super().sync_folder(path)


def killed_at(world: World, at: int, target: Manifest) -> bool:
    ledger = Turning(
        LocalStorage(world.ledger.storage.root, temp_tag=f"killed-{at}", disk=Killing(at))
    )
    ledger.turn = target
    try:
        expose(ledger, target)
    except KilledError:
        return True
    return False


def test_killed_at_any_step_readers_see_one_snapshot_or_an_error_and_the_next_run_mends(
    world: World,
) -> None:
    root, (old, new, _) = world.ledger.storage.root, world.manifests
    outcomes = []
    at = 0
    while killed_at(world, at, new):
        for how in READERS:
            seen = read(root, how)
            assert seen in {rows_of(old), rows_of(new), None}, (at, how)
            outcomes.append(seen)
        world.show(1)
        assert read(root, "glob and open") == rows_of(new)
        world.show(0)
        assert read(root, "glob and open") == rows_of(old)
        at += 1
    assert at > 10
    assert set(outcomes) == {rows_of(old), rows_of(new), None}


def test_the_head_alone_is_an_error_too_while_names_are_switched(world: World) -> None:
    root = world.ledger.storage.root
    world.ledger.storage.replace(SWITCHING, b"by another run")
    frame = pl.scan_parquet(f"{root}/part-*.parquet")
    with pytest.raises((pl.exceptions.PolarsError, OSError)):
        frame.head(1).collect()


class Woken(Disk):
    """Sleeps before its first `kind` of call; another run shows another snapshot meanwhile."""

    def __init__(self, world: World, call: str, at: int) -> None:
        self.world, self.call, self.left = world, call, at

    def _sleep(self, call: str) -> None:
        if call == self.call:
            self.left -= 1
            if self.left == 0:
                self.world.show(2)

    def link(self, source: Path, target: Path) -> None:
        self._sleep("link")
        super().link(source, target)

    def unlink(self, path: Path) -> None:
        self._sleep("unlink")
        super().unlink(path)

    def rename(self, source: Path, target: Path) -> None:
        self._sleep("rename")
        super().rename(source, target)


@pytest.mark.parametrize("call", ["link", "unlink", "rename"])
@pytest.mark.parametrize("at", [1, 2])
def test_a_run_that_wakes_in_the_middle_of_a_switch_brings_nothing_old_back(
    world: World, call: str, at: int
) -> None:
    newest = world.manifests[2]

    class Late(Turning):
        """Knows of the newest snapshot once it has slept."""

        def latest_manifest(self) -> Manifest | None:
            return newest if disk.left <= 0 else self.turn

    disk = Woken(world, call, at)
    ledger = Late(LocalStorage(world.ledger.storage.root, disk=disk))
    ledger.turn = world.manifests[1]
    expose(ledger, world.manifests[1])
    assert disk.left <= 0
    assert faults(world.ledger.storage, newest.files) == {}


def test_nothing_to_switch_touches_nothing(world: World) -> None:
    ledger = Turning(LocalStorage(world.ledger.storage.root, disk=Killing(0)))
    ledger.turn = world.manifests[0]
    expose(ledger, world.manifests[0])


def test_where_the_kernel_refuses_links_a_copy_is_shown_and_stays(world: World) -> None:
    class Refusing(Disk):
        """As for another user's file."""

        num_refused = 0

        def link(self, source: Path, target: Path) -> None:
            if "snapshots" in source.parts:
                self.num_refused += 1
                raise PermissionError(1, "Operation not permitted")
            super().link(source, target)

    disk, newest = Refusing(), world.manifests[1]
    ledger = Turning(LocalStorage(world.ledger.storage.root, disk=disk))
    ledger.turn = newest
    for _ in range(2):
        expose(ledger, newest)
        assert read(world.ledger.storage.root, "polars") == rows_of(newest)
    num_new = len(rows_of(newest) - rows_of(world.manifests[0]))
    assert disk.num_refused == num_new > 0
