"""Back to an older snapshot, and what the next night makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest

import batchgen
from batchgen.core.errors import BusyError, FencedError, GateError, OutputError, RecipeChangedError
from batchgen.pipeline.rollback import roll_back
from batchgen.storage import Disk, LocalStorage
from batchgen.store.books import STATE
from batchgen.store.ledger import Ledger
from batchgen.store.runs import RunLock
from batchgen.store.verify import verify
from tests.e2e.support import run_cli, shown, write_job
from tests.harm import flip

if TYPE_CHECKING:
    from collections.abc import Sequence

OLD = Path(__file__).parents[1] / "data" / "outputs-0.1.0"


def write_day(folder: Path, texts: Sequence[str | None]) -> None:
    rows = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts))
    (folder / "in.jsonl").write_text(rows, encoding="utf-8")


FIRST = [f"row {n}" for n in range(60)]
SECOND = [f"row {n}" if n % 20 else f"edited {n}" for n in range(60)]
THIRD = [*SECOND, "one more"]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Two nights: three rows were edited between them."""
    made = write_job(tmp_path, "in.jsonl", output={"rows_per_file": 10})
    for texts in (FIRST, SECOND):
        write_day(tmp_path, texts)
        batchgen.run(made)
    return made


def texts_of(out: Path) -> list[str]:
    """By the names in the folder, as readers have it."""
    return pl.read_parquet(f"{out}/part-*.parquet")["text"].to_list()


def test_what_readers_see_is_the_old_snapshot_under_a_new_number(job: Path) -> None:
    out = job.parent / "out"
    done = run_cli("rollback", job, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["snapshot"], told["rolled_back_to"], told["instead_of"]) == (3, 1, 2)
    assert (told["num_ok"], told["num_errors"], told["next_run_from"]) == (60, 0, 3)
    assert texts_of(out) == batchgen.read(out).collect()["text"].to_list() == FIRST
    assert batchgen.read(out, 2).collect()["text"].to_list() == SECOND
    assert verify(out).problems == []
    state = json.loads(run_cli("status", job, "--json").stdout)
    assert (state["state"], state["plan"]) == ("complete", 3)
    assert len(json.loads(run_cli("snapshots", job, "--json").stdout)["snapshots"]) == 3


def test_nothing_is_written_but_a_plan_a_claim_and_a_manifest(job: Path) -> None:
    out = job.parent / "out"
    before = {path for path in (out / STATE).rglob("*") if path.is_file()}
    batchgen.rollback(job, 1)
    made = {path for path in (out / STATE).rglob("*") if path.is_file()} - before
    kinds = sorted(str(path.relative_to(out / STATE).parts[0]) for path in made)
    assert [kind for kind in kinds if kind not in {"lists", "lock"}] == [
        "epochs",
        "manifests",
        "plan",
    ]


def computed_by(job: Path, **options: Any) -> int:
    return batchgen.run(job, **options).run["num_ok"]


def test_the_next_night_compares_its_input_with_it(job: Path) -> None:
    out = job.parent / "out"
    batchgen.rollback(job, 1)
    write_day(job.parent, THIRD)
    assert computed_by(job) == 4  # The edits of the second night too: what they were is put aside.
    assert texts_of(out) == THIRD
    assert verify(out).problems == []


def test_with_an_input_that_is_as_it_was_there_is_nothing_to_do(job: Path) -> None:
    batchgen.rollback(job, 1)
    write_day(job.parent, FIRST)
    assert batchgen.run(job).state == "nothing_to_do"
    assert texts_of(job.parent / "out") == FIRST


def test_for_now_the_next_night_goes_on_from_the_newest(job: Path) -> None:
    out = job.parent / "out"
    done = run_cli("rollback", job, "1", "--for-now")
    assert "the next run goes on from 2" in done.stdout
    assert texts_of(out) == FIRST
    assert run_cli("prune", job, "--keep", "1").returncode == 0  # What it goes on from stays.
    write_day(job.parent, THIRD)
    assert computed_by(job) == 1
    assert texts_of(out) == THIRD
    assert verify(out).problems == []


def test_for_now_ends_with_the_next_night_whatever_has_changed(job: Path) -> None:
    batchgen.rollback(job, 1, for_now=True)
    batchgen.rollback(job, 1, for_now=True)
    assert computed_by(job) == 0
    assert texts_of(job.parent / "out") == SECOND
    assert batchgen.run(job).state == "nothing_to_do"


def test_a_recipe_that_is_another_by_now_is_refused_by_the_next_night_as_ever(job: Path) -> None:
    overrides = ["prompt.user=Again: {{ text }}"]
    batchgen.run(job, overrides=overrides, accept_recipe=True)
    batchgen.rollback(job, 2)
    with pytest.raises(RecipeChangedError, match=r"prompt\.user"):
        batchgen.run(job, overrides=overrides)
    assert batchgen.run(job).state == "nothing_to_do"
    batchgen.rollback(job, 3, for_now=True)
    assert batchgen.run(job).state == "complete"
    assert texts_of(job.parent / "out") == SECOND


def hold_back(job: Path) -> None:
    """A third night: its rows are answered, and not published."""
    write_day(job.parent, [*THIRD, None])
    with pytest.raises(GateError):
        batchgen.run(job, overrides=["gate.max_error_rate=0.0"])


@pytest.mark.parametrize("for_now", [False, True])
def test_a_night_that_is_not_published_is_not_lost_by_it(job: Path, *, for_now: bool) -> None:
    out = job.parent / "out"
    hold_back(job)
    if not for_now:
        with pytest.raises(OutputError, match="plan 3 is not published yet and has answers"):
            batchgen.rollback(job, 1)
        assert texts_of(out) == SECOND
        return
    assert batchgen.rollback(job, 1, for_now=True).next_run_from == 3
    assert texts_of(out) == FIRST
    assert computed_by(job) == 0
    assert texts_of(out) == [*THIRD, None]
    assert verify(out).problems == []


def test_what_there_is_not_or_is_shown_already_is_refused(job: Path, tmp_path: Path) -> None:
    for number, why in ((2, "readers see it already"), (9, "there is no snapshot 9")):
        done = run_cli("rollback", job, str(number))
        assert done.returncode == 2
        assert why in done.stderr
    assert run_cli("prune", job, "--keep", "1").returncode == 0
    done = run_cli("rollback", job)
    assert (done.returncode, "is the only one" in done.stderr) == (2, True)
    assert run_cli("rollback", tmp_path / "none").returncode == 2


def test_a_damaged_snapshot_is_no_way_back(job: Path) -> None:
    out, ledger = job.parent / "out", Ledger(LocalStorage(job.parent / "out"))
    old, new = ledger.manifest(1), ledger.manifest(2)
    assert old is not None
    assert new is not None
    shared = {file.name for file in new.files}
    (name, *_) = [file.name for file in old.files if file.name not in shared]
    flip(out / name, 200)
    with pytest.raises(OutputError, match="no way back to snapshot 1"):
        batchgen.rollback(job, 1)
    assert texts_of(out) == SECOND
    assert verify(out).problems == []


def test_a_run_at_work_is_left_alone(job: Path) -> None:
    lock = RunLock(LocalStorage(job.parent / "out"), "run-9")
    lock.acquire()
    try:
        with pytest.raises(BusyError, match="run-9"):
            batchgen.rollback(job)
        assert run_cli("rollback", job).returncode == 75
    finally:
        lock.release()
    assert texts_of(job.parent / "out") == SECOND


def test_a_run_that_was_frozen_meanwhile_is_fenced(job: Path) -> None:
    """Where the file system has no locks, the claim decides."""
    ledger = Ledger(LocalStorage(job.parent / "out"))
    hold_back(job)
    plan = ledger.latest_plan()
    assert plan is not None
    frozen = ledger.claim(plan, "frozen", {})
    batchgen.rollback(job, 1, for_now=True)
    with pytest.raises(FencedError, match="rollback-"):
        ledger.check_fence(frozen)


class KilledError(BaseException):
    """What ends a process in the middle, as nothing catches it."""


class Killing(Disk):
    """Ends it before one of the calls that change the disk."""

    def __init__(self, at: int) -> None:
        self.left = at

    def _count(self) -> None:
        if not self.left:
            raise KilledError
        self.left -= 1

    def create(self, path: Path):
        self._count()
        return super().create(path)

    def link(self, source: Path, target: Path) -> None:
        self._count()
        super().link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._count()
        super().unlink(path)

    def sync_folder(self, path: Path) -> None:
        self._count()
        super().sync_folder(path)


def seen(out: Path) -> list[str] | None:
    try:
        return texts_of(out)
    except (OSError, pl.exceptions.PolarsError):
        return None


@pytest.mark.parametrize("for_now", [False, True])
def test_killed_at_any_step_readers_see_one_snapshot_and_all_goes_on(
    job: Path, tmp_path: Path, *, for_now: bool
) -> None:
    out, begun = tmp_path / "out", tmp_path / "begun"
    shutil.copytree(out, begun, copy_function=shutil.copy2)
    outcomes: list[Sequence[str] | None] = []
    at, is_through = 0, False
    while not is_through:
        shutil.rmtree(out)
        shutil.copytree(begun, out)
        storage = LocalStorage(out, temp_tag="killed", disk=Killing(at))
        try:
            roll_back(storage, 1, for_now=for_now)
            is_through = True
        except KilledError:
            pass
        outcomes.append(seen(out))
        assert outcomes[-1] in (FIRST, SECOND, None), at
        if at % 2:
            batchgen.rollback(job, 1)
            assert seen(out) == FIRST
        else:
            write_day(tmp_path, THIRD)
            assert computed_by(job) in ({1} if for_now else {1, 4}), at
            assert seen(out) == THIRD
        assert verify(out).problems == []
        at += 1
    assert at > 25
    assert FIRST in outcomes
    assert SECOND in outcomes


def test_readers_during_it_see_one_snapshot_or_an_error(job: Path) -> None:
    out = job.parent / "out"
    for number in range(6):
        batchgen.rollback(job, 1 + number % 2)
        assert seen(out) == (SECOND if number % 2 else FIRST)
        assert len(shown(out)) == 6
