"""Claims, accepted parts, fencing, plans and manifests, on real part files."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.core.errors import AccountingError, FencedError, OutputError, StorageError
from batchgen.core.records import Ranges, RowError, RowSet
from batchgen.storage import Disk, LocalStorage
from batchgen.store.books import (
    FILES,
    LISTS,
    Base,
    Manifest,
    Part,
    PartFooter,
    PublishedFile,
    numbered,
)
from batchgen.store.footers import FOOTERS, WORTH_PARTS
from batchgen.store.ledger import Ledger
from batchgen.store.result_files import PartContext, PartWriter, part_schema
from tests.fakes import batch, plan, put_version_1, results
from tests.harm import overwrite

if TYPE_CHECKING:
    from pathlib import Path

    from batchgen.store.books import Durable, Epoch, Plan

PARTS = "_batchgen/parts"
SCHEMA = part_schema(pa.schema([("id", pa.string())]), [pa.field("text", pa.string())], "gen_")
PLAN = plan(10, 5)


@pytest.fixture
def ledger(storage: LocalStorage) -> Ledger:
    return Ledger(storage)


def writer(
    ledger: Ledger, epoch: Epoch, *, plan_id: str | None = None, worker: int = 0
) -> PartWriter:
    context = PartContext(
        plan_id=plan_id or epoch.plan.plan_id,
        epoch=epoch.number,
        worker=worker,
        run_id=epoch.run_id,
        schema=SCHEMA,
        prefix="gen_",
    )
    return PartWriter(ledger.storage, PARTS, context)


def commit(out: PartWriter, segment: int, *rows: int) -> str:
    facts = {"engine": "fake", "version": "7"}
    return out.commit(results(batch(rows, segment=segment)), {}, facts).name


def claim(ledger: Ledger, run_id: str, on: Plan = PLAN) -> Epoch:
    return ledger.claim(on, run_id, {"host": "h", "pid": 1})


def names(epoch: Epoch) -> list[str]:
    return [part.name.rpartition("/")[2] for part in epoch.durable.parts]


def put_part(ledger: Ledger, name: str, footer: PartFooter, num_rows: int) -> str:
    """A part file that need not be true to its footer."""
    columns = {name: list(range(num_rows)) for name in PLAN.carried or ["x"]}
    table = pa.table(columns).replace_schema_metadata(footer.to_metadata())
    path = ledger.storage.path(f"{PARTS}/{name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return f"{PARTS}/{name}"


def footer(**changes: object) -> PartFooter:
    whole = PartFooter("plan-a", 1, "run-1", RowSet({0: Ranges.until(2)}), 2, 0, 0, {})
    return replace(whole, **changes)


def manifest(**changes: object) -> Manifest:
    whole = Manifest(
        number=1,
        plan_id="plan-a",
        epoch=1,
        run_id="run-1",
        created_at="2025-01-01T00:00:00+00:00",
        files=[PublishedFile("a.parquet", 12, 1, "a", num_errors=2, num_skipped=3, order=1000)],
        num_planned=15,
        num_ok=10,
        num_errors=2,
        num_skipped=3,
    )
    return replace(whole, **changes)


def test_the_first_claim_is_epoch_one_and_accepts_nothing(ledger):
    epoch = claim(ledger, "run-1")
    assert (epoch.number, epoch.run_id, epoch.plan) == (1, "run-1", PLAN)
    assert (list(epoch.durable.parts), epoch.durable.rejected) == ([], {})
    number, content = ledger.latest_epoch()
    assert number == 1
    assert content == {
        "plan": 1,
        "plan_id": "plan-a",
        "run_id": "run-1",
        "host": "h",
        "pid": 1,
        "accepted": [],
    }


def test_before_any_claim_there_is_no_epoch_and_nothing_is_durable(ledger):
    assert ledger.latest_epoch() == (0, {})
    assert ledger.durable(PLAN).num_done == 0


def test_the_next_claim_accepts_what_the_last_epoch_committed(ledger):
    out = writer(ledger, claim(ledger, "run-1"))
    commit(out, 0, 3, 0, 7)
    out.commit(
        results(batch([1, 4], segment=1), errors={4: RowError("bad", "it is bad")}),
        RowSet({1: Ranges.of([0]), 0: Ranges.of([9])}),
        {},
    )
    durable = claim(ledger, "run-2").durable
    assert [part.name for part in durable.parts] == [
        f"{PARTS}/e000001-w00-s000000.parquet",
        f"{PARTS}/e000001-w00-s000001.parquet",
    ]
    assert list(durable.done(0)) == [0, 3, 7, 9]
    assert list(durable.done(1)) == [0, 1, 4]
    assert (durable.num_ok, durable.num_errors, durable.num_skipped) == (4, 1, 2)
    assert durable.num_done == 7
    assert not durable.rejected


def test_parts_of_many_epochs_pile_up_through_the_claims(ledger):
    for number in range(3):
        commit(writer(ledger, claim(ledger, f"run-{number}")), 0, number)
    last = claim(ledger, "run-3")
    assert last.number == 4
    assert names(last) == [f"e{epoch:06d}-w00-s000000.parquet" for epoch in (1, 2, 3)]
    assert list(last.durable.done(0)) == [0, 1, 2]


def test_a_running_epochs_own_parts_count_at_once(ledger):
    epoch = claim(ledger, "run-1")
    out = writer(ledger, epoch)
    assert ledger.durable(PLAN).num_done == 0
    commit(out, 0, 0, 1)
    assert ledger.durable(PLAN).num_done == 2


def test_a_late_part_of_a_fenced_run_is_not_accepted(ledger):
    zombie = writer(ledger, claim(ledger, "run-1"))
    commit(zombie, 0, 0)
    second = claim(ledger, "run-2")
    late = commit(zombie, 0, 1, 2)
    commit(writer(ledger, second), 0, 1)
    third = claim(ledger, "run-3")
    assert ledger.storage.read(late) is not None
    assert names(third) == ["e000001-w00-s000000.parquet", "e000002-w00-s000000.parquet"]
    assert list(third.durable.done(0)) == [0, 1]
    assert not third.durable.rejected


def test_a_claim_of_another_plan_starts_from_nothing(ledger):
    commit(writer(ledger, claim(ledger, "run-1")), 0, 0, 1)
    fresh = claim(ledger, "run-2", plan(10, 5, plan_id="plan-b", number=2))
    assert (fresh.number, names(fresh), dict(fresh.durable.rejected)) == (2, [], {})


REJECTED = {
    "another plan": (footer(plan="plan-b"), 2, "belongs to another plan"),
    "too short": (footer(), 1, "holds 1 rows, its footer says 2"),
    "too long": (footer(), 3, "holds 3 rows, its footer says 2"),
    "past its segment": (
        footer(done=RowSet({1: Ranges([(4, 6)])})),
        2,
        "names row 5 of segment 1, which has 5",
    ),
    "no such segment": (
        footer(done=RowSet({2: Ranges.until(2)})),
        2,
        "names row 1 of segment 2, which has 0",
    ),
    "books do not balance": (footer(num_skipped=1), 2, "footer names 2 rows, but counts 3"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_a_part_that_does_not_fit_is_rejected_with_the_reason(ledger, case):
    wrong, num_rows, why = REJECTED[case]
    epoch = claim(ledger, "run-1")
    good = commit(writer(ledger, epoch), 0, 5)
    bad = put_part(ledger, "e000001-w00-s000009.parquet", wrong, num_rows)
    durable = claim(ledger, "run-2").durable
    assert [part.name for part in durable.parts] == [good]
    assert durable.rejected == {bad: why}


def test_a_part_of_a_foreign_parquet_file_is_rejected(ledger):
    claim(ledger, "run-1")
    path = ledger.storage.path(f"{PARTS}/e000001-w00-s000000.parquet")
    path.parent.mkdir()
    pq.write_table(pa.table({"x": [1]}), path)
    (why,) = claim(ledger, "run-2").durable.rejected.values()
    assert why == "no batchgen footer: KeyError(b'batchgen')"


def test_a_part_is_rejected_wherever_it_is_torn(ledger):
    epoch = claim(ledger, "run-1")
    name = commit(writer(ledger, epoch), 0, 0, 1)
    path = ledger.storage.path(name)
    whole = path.read_bytes()
    for size in (0, 1, 4, 12, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        overwrite(path, whole[:size])
        durable = ledger.durable(PLAN)
        assert durable.parts == []
        assert durable.rejected[name].startswith("unreadable: ")
        assert "\n" not in durable.rejected[name]
    overwrite(path, whole)
    assert ledger.durable(PLAN).num_done == 2


def test_a_part_that_vanished_is_rejected_and_its_rows_are_missing_again(ledger):
    name = commit(writer(ledger, claim(ledger, "run-1")), 0, 0, 1)
    claim(ledger, "run-2")
    ledger.storage.remove(name)
    durable = claim(ledger, "run-3").durable
    assert list(durable.rejected) == [name]
    assert not durable.done(0)


def test_the_later_of_two_parts_with_the_same_row_is_rejected(ledger):
    out = writer(ledger, claim(ledger, "run-1"))
    first = commit(out, 0, 1, 2, 3)
    second = commit(out, 0, 3, 4)
    third = commit(out, 0, 5)
    fourth = commit(out, 0, 1)
    fifth = commit(out, 1, 3)
    durable = claim(ledger, "run-2").durable
    assert [part.name for part in durable.parts] == [first, third, fifth]
    assert durable.rejected == {
        second: "row 3 of segment 0 is in another part already",
        fourth: "row 1 of segment 0 is in another part already",
    }


def test_a_rejected_part_does_not_take_its_rows(ledger):
    claim(ledger, "run-1")
    bad = put_part(ledger, "e000001-w00-s000000.parquet", footer(), num_rows=1)
    good = put_part(ledger, "e000001-w00-s000001.parquet", footer(), num_rows=2)
    durable = ledger.durable(PLAN)
    assert ([part.name for part in durable.parts], list(durable.rejected)) == ([good], [bad])
    assert list(durable.done(0)) == [0, 1]


def test_a_rejected_part_is_kept_while_the_job_lives(ledger):
    claim(ledger, "run-1")
    bad = put_part(ledger, "e000001-w00-s000000.parquet", footer(), num_rows=1)
    claim(ledger, "run-2")
    assert ledger.storage.read(bad) is not None


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """An output with more parts than a claim opens twice, and a claim that has opened them."""
    root = tmp_path_factory.mktemp("many") / "out"
    ledger = Ledger(LocalStorage(root))
    claim(ledger, "run-1", MANY)
    for row in range(0, WORTH_PARTS * 2, 2):
        put_part(
            ledger,
            f"e000001-w00-s{row // 2:06d}.parquet",
            footer(plan=MANY.plan_id, done=RowSet({0: Ranges([(row, row + 2)])})),
            2,
        )
    claim(ledger, "run-2", MANY)
    return root


MANY = plan(WORTH_PARTS * 2)


@pytest.fixture
def copied(many, tmp_path) -> Ledger:
    """The same, in which a test may do harm; links, so that parts stay what they were."""
    shutil.copytree(many, tmp_path / "out", copy_function=os.link)
    return Ledger(LocalStorage(tmp_path / "out"))


def opened(ledger: Ledger) -> tuple[Durable, list[str]]:
    """What counts, and which parts were opened for it."""
    found: list[str] = []
    return ledger.durable(MANY, lambda told: found.append(told.name)), found


def test_what_many_parts_say_is_not_asked_twice(copied):
    durable, found = opened(copied)
    assert durable.num_done == MANY.num_rows
    assert found == []


def put_instead(ledger: Ledger, name: str, data: bytes) -> None:
    """Not in place: the file is shared."""
    ledger.storage.remove(name)
    ledger.storage.path(name).write_bytes(data)


def harm_replaced(ledger: Ledger, name: str) -> None:
    """Another part of the same size under its name, which ends other rows."""
    path = ledger.storage.path(name)
    other = ledger.storage.path(name.replace("s000500", "s000501"))
    facts = path.stat()
    put_instead(ledger, name, other.read_bytes())
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def harm_cut(ledger: Ledger, name: str) -> None:
    put_instead(ledger, name, ledger.storage.path(name).read_bytes()[:-9])


def harm_removed(ledger: Ledger, name: str) -> None:
    ledger.storage.remove(name)


@pytest.mark.parametrize("harm", [harm_replaced, harm_cut, harm_removed])
def test_a_part_that_is_not_what_was_rolled_up_does_not_count_as_it(copied, harm):
    name = f"{PARTS}/e000001-w00-s000500.parquet"
    harm(copied, name)
    durable, found = opened(copied)
    assert durable.num_done == MANY.num_rows - 2
    assert len(durable.rejected) == 1
    assert found in ([], [name])


@pytest.mark.parametrize("at", [10, -10])
def test_footers_that_were_rolled_up_and_damaged_are_not_believed(copied, at):
    (name,) = copied.storage.list(FOOTERS)
    data = bytearray(copied.storage.read(name))
    data[at] ^= 1
    put_instead(copied, name, bytes(data))
    durable, found = opened(copied)
    assert (durable.num_done, len(found)) == (MANY.num_rows, WORTH_PARTS)


def test_where_footers_are_removed_the_next_claim_rolls_them_up_again(copied):
    for name in copied.storage.list(FOOTERS):
        copied.storage.remove(name)
    assert claim(copied, "run-3", MANY).durable.num_done == MANY.num_rows
    assert opened(copied)[1] == []


def test_footers_go_with_the_parts(copied):
    copied.tidy(manifest(epoch=2))
    assert copied.storage.list(FOOTERS) == []


def test_temp_files_among_the_parts_are_not_looked_at(ledger):
    claim(ledger, "run-1")
    path = ledger.storage.path(f"{PARTS}/.e000001-w00-s000000.parquet.run-1-1.tmp")
    path.parent.mkdir()
    path.write_bytes(b"half a par")
    assert claim(ledger, "run-2").durable.rejected == {}


def test_a_run_is_fenced_by_a_later_claim_and_told_whose(ledger):
    first = claim(ledger, "run-1")
    ledger.check_fence(first)
    second = ledger.claim(PLAN, "run-2", {"host": "box"})
    ledger.check_fence(second)
    with pytest.raises(FencedError, match="run run-2 on box has taken this job over") as caught:
        ledger.check_fence(first)
    assert caught.value.exit_code == 75


def test_claims_that_race_get_a_number_each_and_see_what_came_before(tmp_path):
    num_racers = 8
    barrier = threading.Barrier(num_racers)
    won: list[Epoch] = []

    def race(at: int) -> None:
        mine = Ledger(LocalStorage(tmp_path, temp_tag=f"run-{at}"))
        barrier.wait()
        won.append(claim(mine, f"run-{at}"))

    threads = [threading.Thread(target=race, args=(at,)) for at in range(num_racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(epoch.number for epoch in won) == list(range(1, num_racers + 1))
    held = LocalStorage(tmp_path).list("_batchgen/epochs")
    by_number = {epoch.number: epoch.run_id for epoch in won}
    assert [json.loads((tmp_path / name).read_bytes())["run_id"] for name in held] == [
        by_number[number] for number in sorted(by_number)
    ]


class HastyStorage(LocalStorage):
    """Lets another run claim just before this one's first claims land."""

    others = 0
    committing = True

    def put_if_absent(self, name: str, data: bytes) -> bool:
        if self.others and "/epochs/" in name:
            self.others -= 1
            rival = Ledger(LocalStorage(self.root, temp_tag="rival"))
            epoch = claim(rival, f"rival-{self.others}")
            if self.committing:
                commit(writer(rival, epoch), 0, self.others)
        return super().put_if_absent(name, data)


def test_a_claim_that_loses_looks_again_and_accepts_the_winners_parts(tmp_path):
    storage = HastyStorage(tmp_path, temp_tag="run-a")
    storage.others = 3
    epoch = claim(Ledger(storage), "run-a")
    assert epoch.number == 4
    assert list(epoch.durable.done(0)) == [0, 1, 2]


def test_a_claim_that_always_loses_gives_up(tmp_path):
    storage = HastyStorage(tmp_path)
    storage.others, storage.committing = 100, False
    with pytest.raises(OutputError, match="other runs keep claiming this job"):
        claim(Ledger(storage), "run-a")


def test_a_plan_comes_back_as_it_was_put(ledger):
    assert ledger.latest_plan() is None
    ledger.put_plan(PLAN)
    later = plan(1, plan_id="plan-b", number=2)
    ledger.put_plan(later)
    assert ledger.latest_plan() == later
    assert ledger.plan(1) == PLAN
    assert PLAN.num_rows == 15


def test_a_plan_with_a_base_comes_back_with_it(ledger):
    bases = (Base(2, (f"{PARTS}/a.parquet", f"{PARTS}/b.parquet")), Base(1))
    again = replace(PLAN, number=3, bases=bases, takes_errors=False, generation=2)
    ledger.put_plan(again)
    assert ledger.latest_plan() == again


def test_a_plan_from_before_there_were_bases_takes_nothing_over(ledger):
    fields = asdict(PLAN)
    for name in ("bases", "takes_errors", "generation"):
        del fields[name]
    content = json.dumps({"format": 1, **fields}).encode()
    ledger.storage.put_if_absent("_batchgen/plan/000001.json", content)
    assert ledger.latest_plan() == PLAN
    assert (PLAN.bases, PLAN.takes_errors, PLAN.generation) == ((), True, 0)


def test_named_parts_of_an_earlier_plan_are_found_though_a_later_plan_has_the_claim(ledger):
    out = writer(ledger, claim(ledger, "run-1"))
    first, second = commit(out, 0, 0, 1), commit(out, 0, 2)
    gone = f"{PARTS}/e000001-w00-s000007.parquet"
    later = plan(10, 5, plan_id="plan-b", number=2)
    commit(writer(ledger, claim(ledger, "run-2", later)), 0, 9)
    found = ledger.parts(PLAN, [second, gone, first])
    assert [part.name for part in found.parts] == [first, second]
    assert list(found.rejected) == [gone]
    assert ledger.durable(PLAN).num_done == 0


def test_parts_of_a_held_back_plan_stay_while_its_successor_is_unpublished(ledger):
    """Whatever earlier snapshot is shown again meanwhile."""
    ledger.put_manifest(manifest(number=1, epoch=1))
    claim(ledger, "run-1")
    kept = commit(writer(ledger, claim(ledger, "run-2", plan(3, plan_id="b", number=2))), 0, 1)
    claim(ledger, "run-3", plan(3, plan_id="c", number=3))
    ledger.tidy(manifest(number=1, epoch=1))
    assert ledger.storage.list(PARTS) == [kept]


def test_durable_rows_are_tallied(ledger):
    out = writer(ledger, claim(ledger, "run-1"))
    commit(out, 0, 0, 1)
    out.commit(results(batch([4], segment=1), errors={4: RowError("bad", "it is")}), {}, {})
    assert ledger.durable(PLAN).tally == {
        "verdict": {"ok": 2, "error": 1},
        "attempts": {"1": 2, "0": 1},
    }


def test_a_plan_number_that_is_taken_is_not_taken_again(ledger):
    ledger.put_plan(PLAN)
    with pytest.raises(FencedError, match="another run has just planned this job; run again"):
        ledger.put_plan(replace(PLAN, plan_id="plan-b"))
    assert ledger.plan(1).plan_id == "plan-a"


def test_a_plan_number_that_is_absent_is_refused(ledger):
    with pytest.raises(OutputError, match=r"plan/000003.json: not a batchgen file .* is gone"):
        ledger.plan(3)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", r"Expecting value"),
        (b'{"format": 1', r"Expecting ',' delimiter"),
        (b"[1]", r"'str' object"),
        (b'{"number": 1}', r"'format'"),
        (b'{"format": 3}', r"format 3, this batchgen reads 2"),
        (b'{"format": 2}', r"'segments'"),
        (b'{"format": 1}', r"'segments'"),
        (b'{"format": 1, "segments": [{}]}', r"missing 5 required positional arguments"),
        (b'{"format": 1, "segments": []}', r"missing \d+ required positional arguments"),
        (b'{"format": 1, "segments": [], "colour": 1}', r"unexpected keyword argument 'colour'"),
        (b'{"format": 1, "segments": [], "bases": [{}]}', r"missing 1 required .* 'plan'"),
        (b"\xff", r"invalid start byte"),
    ],
)
def test_a_plan_of_another_version_is_refused_by_name(ledger, content, why):
    ledger.storage.put_if_absent("_batchgen/plan/000001.json", content)
    with pytest.raises(OutputError, match=f"not a batchgen file of this version .*{why}"):
        ledger.latest_plan()


def test_a_manifest_is_put_once_and_the_first_one_holds(ledger):
    assert ledger.manifest(1) is None
    assert ledger.latest_manifest() is None
    first = ledger.put_manifest(manifest())
    second = ledger.put_manifest(manifest(run_id="run-2", created_at="later"))
    assert first == second == ledger.manifest(1) == ledger.latest_manifest() == manifest()


def test_the_latest_manifest_is_the_highest_plans(ledger):
    ledger.put_manifest(manifest(number=2))
    ledger.put_manifest(manifest(number=10, run_id="run-2"))
    assert ledger.latest_manifest().number == 10


def test_the_snapshot_before_a_plan_is_the_newest_of_earlier_plans(ledger):
    for number in (1, 4):
        ledger.put_manifest(manifest(number=number))
    before = {number: ledger.manifest_before(number) for number in (1, 2, 4, 5)}
    assert {number: found and found.number for number, found in before.items()} == {
        1: None,
        2: 1,
        4: 1,
        5: 4,
    }


def test_a_manifest_from_before_there_was_an_index_is_read(ledger):
    fields = asdict(manifest())
    for name in ("index", "tally", "gate"):
        del fields[name]
    content = json.dumps({"format": 1, **fields}).encode()
    ledger.storage.put_if_absent("_batchgen/manifests/000001.json", content)
    assert ledger.latest_manifest() == manifest()
    assert (manifest().index, manifest().tally, manifest().gate) == (None, {}, [])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_planned": 16},
        {"num_planned": 14},
        {"num_ok": 11},
        {"num_errors": 1},
        {"num_skipped": 0},
        {"files": []},
        {"files": [PublishedFile("a", 12, 1, ""), PublishedFile("b", 1, 1, "")]},
        {"files": [PublishedFile("a", 12, 1, "", num_errors=1, num_skipped=3, order=1)]},
        {"files": [PublishedFile("a", 12, 1, "", num_errors=2, num_skipped=2, order=1)]},
        # Too few results and too many skipped rows must not cancel out.
        {"num_ok": 9, "num_skipped": 4},
    ],
)
def test_books_that_do_not_balance_are_never_published(ledger, changes):
    with pytest.raises(AccountingError, match=r"rows planned, but .* not published"):
        ledger.put_manifest(manifest(**changes))
    assert ledger.latest_manifest() is None


def test_after_publishing_parts_up_to_the_epoch_go_and_later_ones_stay(ledger):
    first = claim(ledger, "run-1")
    commit(writer(ledger, first), 0, 0)
    second = claim(ledger, "run-2")
    commit(writer(ledger, second), 0, 1)
    live = claim(ledger, "run-3", plan(3, plan_id="plan-b", number=2))
    kept = commit(writer(ledger, live), 0, 2)
    folder = ledger.storage.path(PARTS)
    for epoch in (1, 3):
        (folder / f".e{epoch:06d}-w00-s000005.parquet.x-1.tmp").write_bytes(b"")
    ledger.tidy(manifest(epoch=second.number))
    assert sorted(path.name for path in folder.iterdir()) == [
        ".e000003-w00-s000005.parquet.x-1.tmp",
        kept.rpartition("/")[2],
    ]


def test_removing_before_there_is_any_part_is_fine(ledger):
    claim(ledger, "run-1")
    ledger.tidy(manifest())
    assert ledger.storage.list(PARTS) == []


def test_snapshots_that_no_manifest_names_go_and_named_and_later_ones_stay(ledger):
    old = PublishedFile("_batchgen/snapshots/e000002/part-00000.parquet", 12, 1, "")
    put_version_1(ledger, manifest(epoch=2, files=[old], index=old))
    for epoch in (1, 2, 3):
        ledger.storage.put_if_absent(f"_batchgen/snapshots/e{epoch:06d}/part-00000.parquet", b"x")
    ledger.tidy(manifest(epoch=2))
    names = [name.rpartition("/")[2] for name in ledger.storage.list("_batchgen/snapshots")]
    assert names == ["e000002", "e000003"]


def test_files_and_lists_that_no_manifest_names_go_and_named_and_later_ones_stay(ledger):
    def entry(epoch, text):
        name = f"{FILES}/e{epoch:06d}-00000-{text * 16}.parquet"
        return PublishedFile(name, 12, 1, text, num_errors=2, num_skipped=3, order=1000)

    shared = entry(2, "a")
    ledger.put_manifest(manifest(number=1, epoch=2, files=[shared]))
    ledger.put_manifest(manifest(number=2, epoch=3, files=[shared]), shares_with=1)
    assert ledger.lists_of(1) == ledger.lists_of(2)
    ledger.put_manifest(manifest(number=3, epoch=5, files=[entry(5, "b")]), shares_with=2)
    for one in (shared, entry(1, "c"), entry(2, "c"), entry(5, "b"), entry(6, "c")):
        ledger.storage.put_if_absent(one.name, b"x")
    for epoch in (1, 6):
        ledger.storage.put_if_absent(f"{LISTS}/e{epoch:06d}-{'c' * 32}.json", b"x")
    ledger.tidy(manifest(epoch=5))
    names = [name.rpartition("/")[2][:13] for name in ledger.storage.list(FILES)]
    assert names == ["e000002-00000", "e000005-00000", "e000006-00000"]
    names = [name.rpartition("/")[2][:7] for name in ledger.storage.list(LISTS)]
    assert names == ["e000002", "e000005", "e000006"]


def test_a_run_of_an_older_plan_cannot_claim(ledger):
    for number in (1, 2):
        ledger.put_plan(plan(3, plan_id=f"plan-{number}", number=number))
    with pytest.raises(FencedError, match="another run has begun a newer plan"):
        claim(ledger, "run-1", plan(3, plan_id="plan-1", number=1))
    assert claim(ledger, "run-1", plan(3, plan_id="plan-2", number=2)).number == 1


def test_the_fence_tells_a_run_whose_plan_is_published(ledger):
    epoch = claim(ledger, "run-1")
    ledger.put_manifest(manifest(run_id="run-9"))
    with pytest.raises(FencedError, match="run run-9 has published this job"):
        ledger.check_fence(epoch)


def test_a_part_that_cannot_be_opened_right_now_is_not_condemned(ledger):
    claim(ledger, "run-1")
    name = put_part(ledger, "e000001-w00-s000000.parquet", footer(), num_rows=2)
    path = ledger.storage.path(name)
    path.unlink()
    path.symlink_to(path.name)  # Opening it fails with ELOOP: trouble, but no damage.
    with pytest.raises(StorageError):
        ledger.durable(PLAN)


def test_foreign_names_beside_the_claims_are_not_read(ledger):
    claim(ledger, "run-1")
    ledger.storage.path("_batchgen/epochs/notes.txt").write_text("mine", encoding="utf-8")
    assert claim(ledger, "run-2").number == 2


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_whoever_runs_whenever_each_row_is_durable_at_most_once(tmp_path_factory, data):
    """Runs claim, commit what is missing in any pieces, stall and wake up late."""
    ledger = Ledger(LocalStorage(tmp_path_factory.mktemp("job")))
    job = plan(6, 3)
    alive: list[tuple[Epoch, PartWriter, list[tuple[int, int]]]] = []
    accepted: dict[str, Part] = {}
    for step in range(data.draw(st.integers(1, 10))):
        if not alive or data.draw(st.booleans()):
            epoch = claim(ledger, f"run-{step}", job)
            # What one claim accepts, every later claim accepts too.
            assert accepted.keys() <= {part.name for part in epoch.durable.parts}
            accepted = {part.name: part for part in epoch.durable.parts}
            todo = [
                (segment, row)
                for segment, planned in enumerate(job.segments)
                for row in Ranges.until(planned.num_rows) - epoch.durable.done(segment)
            ]
            alive.append((epoch, writer(ledger, epoch), todo))
            continue
        _, out, todo = data.draw(st.sampled_from(alive))
        if todo:
            segment, row = todo.pop(data.draw(st.integers(0, len(todo) - 1)))
            commit(out, segment, row)
    durable = ledger.durable(job)
    assert not durable.rejected
    held = [
        (segment, row)
        for part in durable.parts
        for segment, rows in part.footer.done.items()
        for row in rows
    ]
    assert len(held) == len(set(held)) == durable.num_done
    newest, _, todo = max(alive, key=lambda run: run[0].number)
    assert len(todo) + durable.num_done == job.num_rows
    assert newest.number == ledger.latest_epoch()[0]


def test_what_a_worker_writes_after_its_seal_is_not_accepted(ledger):
    epoch = claim(ledger, "run-1")
    given_up, other = writer(ledger, epoch, worker=7), writer(ledger, epoch, worker=70)
    before, beside = commit(given_up, 0, 0), commit(other, 0, 1)
    ledger.check_seal(epoch, 7)
    ledger.seal(epoch, 7)
    late = commit(given_up, 0, 2)
    with pytest.raises(FencedError, match=r"worker 7 was given up"):
        ledger.check_seal(epoch, 7)
    ledger.check_seal(epoch, 70)
    counted = [part.name for part in ledger.durable(epoch.plan).parts]
    assert counted == [before, beside]
    assert late not in ledger.latest_epoch()[1]["accepted"]
    assert [part.name for part in claim(ledger, "run-2").durable.parts] == counted


def test_a_seal_stays_what_it_was(ledger):
    epoch = claim(ledger, "run-1")
    out = writer(ledger, epoch, worker=3)
    first = commit(out, 0, 0)
    assert ledger.seal(epoch, 3) == [first]
    commit(out, 0, 1)
    assert ledger.seal(epoch, 3) == [first]
    assert [part.name for part in ledger.durable(epoch.plan).parts] == [first]


def test_of_two_that_seal_a_worker_at_once_both_go_by_the_seal_that_was_first(tmp_path):
    class Raced(Disk):
        """Somebody else's seal, made before the second part, is there first."""

        def link(self, source, target):
            if "seals" in target.parts:
                target.write_text(json.dumps({"format": 1, "parts": [first]}))
            super().link(source, target)

    ledger = Ledger(LocalStorage(tmp_path, disk=Raced()))
    epoch = claim(ledger, "run-1")
    out = writer(ledger, epoch, worker=3)
    first = commit(out, 0, 0)
    commit(out, 0, 1)
    assert ledger.seal(epoch, 3) == [first]
    assert [part.name for part in ledger.durable(epoch.plan).parts] == [first]


def test_a_run_that_wakes_is_fenced_by_any_later_claim_whatever_was_pruned(ledger):
    epoch = claim(ledger, "run-a")
    claim(ledger, "run-b")
    claim(ledger, "run-c")
    ledger.storage.remove(numbered("epochs", 2))
    with pytest.raises(FencedError, match="run-c"):
        ledger.check_fence(epoch)
    ledger.storage.remove(numbered("epochs", 1))

    class Asleep(Ledger):
        """Looked before any of them had claimed."""

        def latest_epoch(self):
            return 0, {}

    late = claim(Asleep(ledger.storage), "run-late")
    assert late.number == 1
    with pytest.raises(FencedError, match="run-c"):
        ledger.check_fence(late)
