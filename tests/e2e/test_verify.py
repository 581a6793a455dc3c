"""`batchgen verify` finds what is damaged, says it, and the next run redoes it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchgen
from batchgen.core.errors import GateError
from batchgen.storage import LocalStorage
from batchgen.store.books import STATE
from batchgen.store.ledger import Ledger
from batchgen.store.runs import RunLock
from batchgen.store.verify import verify
from batchgen.store.visible import expose, show
from tests.e2e.support import alias_of, published, run_cli, write_job, write_rows
from tests.harm import flip, overwrite

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from batchgen.store.books import Part


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_rows(tmp_path / "in.jsonl", 300)
    return write_job(tmp_path, "in.jsonl", output={"rows_per_file": 200})


def verdict_of(job: Path, exit_code: int) -> dict[str, Any]:
    done = run_cli("verify", job, "--json")
    assert done.returncode == exit_code, done.stderr
    verdict: dict[str, Any] = json.loads(done.stdout)
    return verdict


def test_a_published_job_is_proven(job: Path) -> None:
    run_cli("run", job)
    verdict = verdict_of(job, 0)
    counts = [verdict[f"num_{name}"] for name in ("planned", "ok", "errors", "skipped", "left")]
    assert counts == [300, 290, 6, 4, 0]
    assert verdict["num_files"] == 2
    assert verdict["num_bytes"] == sum(
        path.stat().st_size for path in (job.parent / "out").glob("part-*.parquet")
    )
    told = run_cli("verify", job).stdout
    assert told.startswith("300 planned = 290 ok + 6 errors + 4 skipped + 0 left; 2 files, ")


def test_every_flipped_byte_of_a_snapshot_is_found(job: Path) -> None:
    run_cli("run", job)
    path = job.parent / "out" / alias_of(job.parent / "out", 1)
    for at in range(0, path.stat().st_size, path.stat().st_size // 7):
        flip(path, at)
        (problem,) = verdict_of(job, 1)["problems"]
        assert "published rows are damaged" in problem
        flip(path, at)
    assert verdict_of(job, 0)["problems"] == []


def test_a_bad_part_is_named_and_only_its_rows_are_redone(job: Path) -> None:
    assert run_cli("run", job, "--set", "gate.max_error_rate=0.001").returncode == 3
    storage = LocalStorage(job.parent / "out")
    ledger = Ledger(storage)
    plan = ledger.latest_plan()
    assert plan is not None
    part = ledger.durable(plan).parts[1]
    flip(storage.path(part.name), 400)
    (problem,) = verdict_of(job, 1)["problems"]
    assert problem.startswith(f"{part.name}: could not verify page integrity")
    done = json.loads(run_cli("run", job, "--json").stdout)
    assert done["state"] == "complete"
    num_redone = done["run"]["num_ok"] + done["run"]["num_errors"]
    assert num_redone == part.footer.num_results
    assert verdict_of(job, 0)["num_ok"] == 290
    assert len(published(job.parent / "out")) == 296


def test_parts_of_an_unfinished_second_night_are_read_too(job: Path) -> None:
    batchgen.run(job)
    with pytest.raises(GateError):
        batchgen.run(job, fresh=True, overrides=["gate.max_error_rate=0.001"])
    part = newest_part(job)
    flip(job.parent / "out" / part.name, 400)
    (problem,) = verify(job.parent / "out").problems
    assert problem.startswith(f"{part.name}: could not verify page integrity")


def test_a_part_that_holds_a_row_twice_is_named(job: Path) -> None:
    with pytest.raises(GateError):
        batchgen.run(job, overrides=["gate.max_error_rate=0.001"])
    name = newest_part(job).name
    path = job.parent / "out" / name
    rows = pq.read_table(path)
    twice = pa.concat_tables([rows.slice(0, 1), rows.slice(0, 1), rows.slice(2)])
    sink = pa.BufferOutputStream()
    pq.write_table(twice.replace_schema_metadata(rows.schema.metadata), sink)
    overwrite(path, sink.getvalue().to_pybytes())
    (problem,) = verify(job.parent / "out").problems
    assert problem == f"{name}: holds a row twice; the next run redoes its rows"


def newest_part(job: Path) -> Part:
    """The first part of the newest plan."""
    ledger = Ledger(LocalStorage(job.parent / "out"))
    plan = ledger.latest_plan()
    assert plan is not None
    return ledger.durable(plan).parts[0]


def test_a_part_of_another_job_is_named_and_does_not_count(job: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_rows(other / "in.jsonl", 300)
    foreign = write_job(other, "in.jsonl")
    for one in (job, foreign):
        assert run_cli("run", one, "--set", "gate.max_error_rate=0.001").returncode == 3
    name = "e000001-w00-s000000.parquet"
    parts = job.parent / "out" / STATE / "parts"
    (parts / name).write_bytes((other / "out" / STATE / "parts" / name).read_bytes())
    assert any("belongs to another plan" in text for text in verdict_of(job, 1)["problems"])
    assert run_cli("run", job).returncode == 0
    assert len(published(job.parent / "out")) == 296


def test_a_snapshot_whose_file_is_gone_is_a_problem(job: Path) -> None:
    run_cli("run", job)
    ledger = Ledger(LocalStorage(job.parent / "out"))
    manifest = ledger.latest_manifest()
    assert manifest is not None
    ledger.storage.path(manifest.files[0].name).unlink()
    (problem,) = verdict_of(job, 1)["problems"]
    assert "No such file" in problem


def test_there_must_be_a_job_to_verify(job: Path) -> None:
    done = run_cli("verify", job)
    assert done.returncode == 2
    out = job.parent / "out"
    assert done.stderr == (
        f"batchgen: {out}: nothing to verify, the job has not been run yet; start it with "
        f"`batchgen run {job}`\n"
    )


# --- what the output folder shows of the snapshot ------------------------------------------------

MENDED = "the next run puts it right"
SEEN = "readers of part-*.parquet get its rows too"


def forget(out: Path) -> None:
    (out / alias_of(out)).unlink()


def put_another(out: Path) -> None:
    data = (out / alias_of(out, 1)).read_bytes()
    (out / alias_of(out)).unlink()
    (out / alias_of(out)).write_bytes(data)


def flip_a_copy(out: Path) -> None:
    copy_back(out, alias_of(out))
    flip(out / alias_of(out), 100)


def double(out: Path) -> None:
    shutil.copyfile(out / alias_of(out, 1), out / "part-00002500-00000000.parquet")


def lose_in_a_link(out: Path) -> None:
    (out / alias_of(out)).unlink()
    (out / alias_of(out)).symlink_to(out / "nowhere")


def copy_back(out: Path, name: str) -> None:
    """The same bytes in a file of their own, as a backup brings them."""
    data = (out / name).read_bytes()
    (out / name).unlink()
    (out / name).write_bytes(data)


def ledger_of(job: Path) -> Ledger:
    return Ledger(LocalStorage(job.parent / "out"))


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (forget, f"FIRST: is missing in the output folder; {MENDED}"),
        (put_another, f"FIRST: has NUM bytes, NUM were published; {MENDED}"),
        (flip_a_copy, f"FIRST: has other bytes than were published (sha256 differs); {MENDED}"),
        (
            double,
            f"part-00002500-00000000.parquet: is no file of the newest snapshot, {SEEN}; the next "
            "run removes it",
        ),
        (lose_in_a_link, f"FIRST: cannot be read (No such file or directory); {MENDED}"),
    ],
)
def test_what_is_shown_and_not_published_is_named_and_the_next_run_mends_it(
    job: Path, harm: Callable[[Path], None], problem: str
) -> None:
    batchgen.run(job)
    out = job.parent / "out"
    harm(out)
    (found,) = verify(out).problems
    found = found.replace(alias_of(out), "FIRST")
    words = ["NUM" if word.replace(",", "").isdigit() else word for word in found.split()]
    assert " ".join(words) == problem
    assert batchgen.run(job).state == "nothing_to_do"
    assert verify(out).problems == []
    assert sorted(path.name for path in out.glob("part-*")) == [alias_of(out), alias_of(out, 1)]


def test_verify_exits_1_where_a_shown_file_is_missing(job: Path) -> None:
    batchgen.run(job)
    forget(job.parent / "out")
    done = run_cli("verify", job)
    assert done.returncode == 1
    assert done.stdout.startswith(
        f"{alias_of(job.parent / 'out')}: is missing in the output folder"
    )
    assert done.stdout.endswith("1 problems\n")


def test_showing_says_what_it_mends(job: Path) -> None:
    batchgen.run(job)
    ledger = ledger_of(job)
    manifest = ledger.latest_manifest()
    assert manifest is not None
    assert show(ledger, manifest).mended == []
    out = job.parent / "out"
    forget(out)
    copy_back(out, alias_of(out, 1))
    double(out)
    (out / "part-mine.parquet").touch()
    assert show(ledger, manifest).mended == [
        f"{out}: did not show snapshot 1 as it was published ({alias_of(out)} was missing, "
        f"{alias_of(out, 1)} was another file or a copy, part-00002500-00000000.parquet was there "
        "beside them); its files are shown again"
    ]
    assert show(ledger, manifest).mended == []


def test_a_backup_without_hard_links_is_well_and_its_own_damage_is_named(job: Path) -> None:
    batchgen.run(job)
    shutil.copytree(job.parent / "out", job.parent / "backup")
    backup = job.parent / "backup"
    first = alias_of(backup)
    assert not (backup / first).samefile(job.parent / "out" / first)
    assert verify(backup).problems == []
    flip(backup / alias_of(backup, 1), 100)
    assert [text.partition(":")[0] for text in verify(backup).problems] == [alias_of(backup, 1)]


def test_a_damaged_snapshot_is_brought_back_from_what_is_shown(job: Path) -> None:
    batchgen.run(job)
    out, manifest = job.parent / "out", ledger_of(job).latest_manifest()
    assert manifest is not None
    copy_back(out, alias_of(out))
    own = out / manifest.files[0].name
    flip(own, 100)
    (problem,) = verify(out).problems
    assert problem.endswith(f"brought back from {alias_of(out)}, which is whole")
    assert own.samefile(out / alias_of(out))
    assert verify(out).problems == []
    (out / alias_of(out, 1)).unlink()
    own_second = out / manifest.files[1].name
    own_second.unlink()
    assert (
        f"{alias_of(out, 1)}: is missing in the output folder; mend {manifest.files[1].name} first"
        in (verify(out).problems)
    )


def test_files_and_folders_that_no_run_touches_are_to_be_removed_by_hand(job: Path) -> None:
    batchgen.run(job)
    out = job.parent / "out"
    (out / "part-mine.parquet").touch()
    (out / "part-00009000-00000000.parquet").mkdir()
    (out / "notes.parquet").touch()  # No reader of part-*.parquet sees it.
    assert verify(out).problems == [
        "part-00009000-00000000.parquet: is a folder, where only files belong; remove it or give "
        "it another name",
        f"part-mine.parquet: is no file of batchgen's, {SEEN}; remove it or give it another name",
    ]


def test_what_a_run_is_about_to_show_is_no_problem(job: Path) -> None:
    batchgen.run(job)
    out, ledger = job.parent / "out", ledger_of(job)
    manifest = ledger.latest_manifest()
    assert manifest is not None
    lock = RunLock(ledger.storage, "another")

    def publish_slowly() -> None:
        time.sleep(0.2)
        expose(ledger, manifest)
        lock.release()

    forget(out)
    lock.acquire()
    run = threading.Thread(target=publish_slowly)
    run.start()
    try:
        assert verify(out).problems == []
    finally:
        run.join()


def test_what_a_run_at_work_does_not_mend_is_a_problem(job: Path) -> None:
    batchgen.run(job)
    lock = RunLock(LocalStorage(job.parent / "out"), "another")
    forget(job.parent / "out")
    lock.acquire()
    try:
        assert len(verify(job.parent / "out", patience_s=0.1).problems) == 1
    finally:
        lock.release()


def test_before_the_next_snapshot_the_run_that_completes_mends(job: Path) -> None:
    batchgen.run(job)
    with pytest.raises(GateError):
        batchgen.run(job, fresh=True, overrides=["gate.max_error_rate=0.001"])
    forget(job.parent / "out")
    (problem,) = verify(job.parent / "out").problems
    assert problem.endswith("; the next run that completes puts it right")
    assert batchgen.run(job).state == "complete"
    assert verify(job.parent / "out").problems == []


def test_a_run_that_publishes_and_prunes_meanwhile_is_no_problem(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 150)
    job = write_job(
        tmp_path,
        "in.jsonl",
        output={"rows_per_file": 5, "keep_snapshots": 1},
        run={"flush_rows": 5},
    )
    batchgen.run(job)

    def publish_again() -> None:
        for _ in range(2):  # So the third look at the latest is at a job that stands still.
            batchgen.run(job, fresh=True)

    runs = threading.Thread(target=publish_again)
    runs.start()
    problems = []
    try:
        while runs.is_alive():
            problems += verify(tmp_path / "out").problems
    finally:
        runs.join()
    assert problems == []
