"""Snapshots that share files: a night writes what changed, and is as a first run over its input."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

import batchgen
from batchgen.core.errors import GateError
from batchgen.storage import LocalStorage
from batchgen.store import snapshot
from batchgen.store.ledger import Ledger
from batchgen.store.verify import verify
from tests.e2e.support import published, write_job
from tests.harm import overwrite

if TYPE_CHECKING:
    from pathlib import Path

    from batchgen.store.books import Manifest


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "LEAST_BYTES", 512)


def line(number: int, **more: object) -> str:
    return json.dumps({"id": number, "text": f"row {number}", **more})


def write(folder: Path, *files: list[str]) -> None:
    for at, lines in enumerate(files):
        (folder / f"in-{at}.jsonl").write_text("".join(f"{one}\n" for one in lines))


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """After its first night: 160 rows in two files."""
    write(tmp_path, [line(n) for n in range(80)], [line(n) for n in range(80, 160)])
    path = write_job(tmp_path, "in-*.jsonl")
    batchgen.run(path)
    return path


def manifests(job: Path) -> list[Manifest]:
    return Ledger(LocalStorage(job.parent / "out")).manifests()


def names(manifest: Manifest) -> list[str]:
    return [file.name for file in manifest.files]


def test_one_edited_row_costs_one_file(job: Path) -> None:
    lines = [line(n) for n in range(80)]
    lines[40] = line(40, text="edited")
    write(job.parent, lines)
    summary = batchgen.run(job)
    old, new = manifests(job)
    assert len(old.files) > 10
    assert len(set(names(new)) - set(names(old))) == 1
    assert (summary.num_carried, summary.run["num_ok"]) == (159, 1)
    assert [row["id"] for row in published(job.parent / "out")] == list(range(160))
    assert verify(job.parent / "out").problems == []


@pytest.mark.parametrize("number", [0, 80, 159])
def test_a_row_that_goes_or_comes_moves_others_without_writing_them(job: Path, number: int) -> None:
    rows = [n for n in range(160) if n != number]
    write(job.parent, [line(n) for n in rows[:80]], [line(n) for n in rows[80:]])
    batchgen.run(job)
    old, new = manifests(job)
    # Where a row has come to another input file, that is the other file's.
    assert len(set(names(new)) - set(names(old))) <= 4
    assert [row["id"] for row in published(job.parent / "out")] == rows


def test_input_files_that_change_places_cost_nothing(job: Path) -> None:
    write(job.parent, [line(n) for n in range(80, 160)], [line(n) for n in range(80)])
    batchgen.run(job)
    old, new = manifests(job)
    assert set(names(new)) == set(names(old))
    assert names(new) != names(old)
    shown = sorted(path.name for path in (job.parent / "out").glob("part-*"))
    assert shown == [file.alias for file in new.files]
    assert [row["id"] for row in published(job.parent / "out")] == [*range(80, 160), *range(80)]


def test_a_new_column_changes_the_schema_of_all_files(job: Path) -> None:
    write(job.parent, [*(line(n) for n in range(80)), line(1000, note="new")])
    batchgen.run(job)
    old, new = manifests(job)
    assert not set(names(new)) & set(names(old))
    rows = published(job.parent / "out")
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    assert "note" in rows[0]


def test_a_row_like_one_that_is_kept_has_a_draw_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, [line(n) for n in range(160)])
    job = write_job(tmp_path, "in-*.jsonl")
    warm = {"sampling.temperature": 1.0}
    batchgen.run(job, overrides=warm)
    write(tmp_path, [line(n) for n in (*range(160), 3)])
    summary = batchgen.run(job, overrides=warm)
    assert set(names(manifests(job)[0])) & set(names(manifests(job)[1]))
    assert (summary.num_carried, summary.num_copied, summary.run["num_ok"]) == (160, 0, 1)


def test_damage_of_a_shared_file_names_all_its_snapshots_and_is_mended_once(job: Path) -> None:
    out = job.parent / "out"
    write(job.parent, [line(1040 if n == 40 else n) for n in range(80)])
    batchgen.run(job)
    old, new = manifests(job)
    (shared, *_) = [file for file in new.files if file.name in names(old)]
    (gone, *_) = [file for file in old.files if file.name not in names(new)]
    whole = {file.name: (out / file.name).read_bytes() for file in (shared, gone)}
    for name, data in whole.items():
        overwrite(out / name, data[:-1] + b"?")
    found = verify(out)
    (told,) = [text for text in found.problems if text.startswith(f"{shared.name}: ")]
    assert "of snapshot 1 too" in told
    (older,) = found.older_problems
    assert older.startswith(f"{gone.name}: ")
    assert "damages snapshot 1" in older
    # Copies, say of a backup: by the names that readers had, and have.
    for file in (shared, gone):
        (out / file.alias).unlink(missing_ok=True)
        (out / file.alias).write_bytes(whole[file.name])
    found = verify(out)
    for told in (found.problems[0], *found.older_problems):
        assert told.endswith(", which is whole")
    assert {name: (out / name).read_bytes() for name in whole} == whole
    (out / gone.alias).unlink()
    found = verify(out)
    assert (found.problems, found.older_problems) == ([], [])


def test_show_of_an_unfinished_night_has_its_new_rows_and_those_that_it_keeps(job: Path) -> None:
    write(job.parent, [line(n) for n in range(80)], [*(line(n) for n in range(80, 160)), "{"])
    with pytest.raises(GateError):
        batchgen.run(job, overrides=["gate.max_error_rate=0.0"])
    seen = batchgen.show(job, num_rows=200)
    assert sorted(row["id"] for row in seen.rows if row["id"] is not None) == [*range(160)]
    where = {row["id"]: row["_batchgen_input"] for row in seen.rows}
    assert where[7].endswith("in-0.jsonl (line 8)")
    assert where[107].endswith("in-1.jsonl (line 28)")
    assert [row["id"] for row in batchgen.show(job, errors=True).rows] == [None]
