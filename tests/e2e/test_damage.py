"""Published files that somebody writes over, cuts, replaces or takes away: a run says so."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import batchgen
from batchgen.core.errors import DamagedSnapshotError
from batchgen.storage import LocalStorage
from batchgen.store.ledger import Ledger
from batchgen.store.verify import verify
from batchgen.views.status import status_of
from tests.e2e.support import alias_of, published, run_cli, shown, write_job, write_rows
from tests.harm import overwrite

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_ROWS = 60
REPO = Path(__file__).parents[2]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = make_job(tmp_path)
    batchgen.run(path)
    return path


def make_job(folder: Path) -> Path:
    write_rows(folder / "in.jsonl", NUM_ROWS)
    gate = {"max_error_rate": 1.0}
    return write_job(folder, "in.jsonl", output={"rows_per_file": 40}, gate=gate)


def own_of(out: Path, at: int = 0) -> Path:
    """A file of the newest snapshot, in the snapshot's folder."""
    manifest = Ledger(LocalStorage(out)).latest_manifest()
    assert manifest is not None
    return out / manifest.files[at].name


def write_over(out: Path) -> None:
    overwrite(out / alias_of(out), (out / alias_of(out, 1)).read_bytes())


def write_over_with_as_many_bytes(out: Path) -> None:
    data = bytearray((out / alias_of(out)).read_bytes())
    data[300:340] = bytes(40)
    overwrite(out / alias_of(out), bytes(data))


def append(out: Path) -> None:
    overwrite(out / alias_of(out), (out / alias_of(out)).read_bytes() + b"more")


def cut(out: Path) -> None:
    overwrite(out / alias_of(out), (out / alias_of(out)).read_bytes()[:-50])


def empty(out: Path) -> None:
    overwrite(out / alias_of(out), b"")


def take_both_away(out: Path) -> None:
    own_of(out).unlink()
    (out / alias_of(out)).unlink()


SHARED_DAMAGE = [write_over, write_over_with_as_many_bytes, append, cut, empty, take_both_away]


@pytest.mark.parametrize("harm", SHARED_DAMAGE)
def test_a_damaged_snapshot_is_not_complete_and_retry_errors_repairs_it(
    job: Path, harm: Callable[[Path], None]
) -> None:
    out = job.parent / "out"
    whole = published(out)
    harm(out)
    done = run_cli("run", job)
    assert done.returncode == 1
    assert str(own_of(out)) in done.stderr
    assert "--retry-errors" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(DamagedSnapshotError):  # Said again, until it is repaired.
        batchgen.run(job)
    assert batchgen.run(job, retry_errors=True).state == "complete"
    assert verify(out).problems == []
    assert published(out) == whole
    assert batchgen.run(job).state == "nothing_to_do"


@pytest.mark.parametrize("harm", SHARED_DAMAGE)
def test_plan_says_what_the_run_then_does(job: Path, harm: Callable[[Path], None]) -> None:
    harm(job.parent / "out")
    plan = json.loads(run_cli("plan", job, "--json").stdout)
    assert (plan["state"], plan["exit_code"]) == ("refused", 1)
    plan = json.loads(run_cli("plan", job, "--json", "--retry-errors").stdout)
    summary = batchgen.run(job, retry_errors=True)
    assert plan["rows"]["num_reused"] == summary.num_carried < NUM_ROWS - 10


@pytest.mark.parametrize("harm", SHARED_DAMAGE)
def test_the_next_night_computes_damaged_rows_again(
    job: Path, harm: Callable[[Path], None]
) -> None:
    out = job.parent / "out"
    whole = published(out)
    name = own_of(out).name
    harm(out)
    with (job.parent / "in.jsonl").open("a") as lines:
        lines.write('{"id": 1000, "text": "new"}\n')
    summary = batchgen.run(job)
    assert summary.state == "complete"
    assert any(f"{name}: damaged" in text for text in summary.warnings)
    assert verify(out).problems == []
    assert published(out)[:-1] == whole


def test_fresh_needs_nothing_of_what_is_damaged(job: Path) -> None:
    out = job.parent / "out"
    whole = published(out)
    write_over(out)
    assert batchgen.run(job, fresh=True).state == "complete"
    assert verify(out).problems == []
    assert published(out) == whole


def replace_what_is_shown(out: Path) -> None:
    (out / alias_of(out)).unlink()
    (out / alias_of(out)).write_bytes((out / alias_of(out, 1)).read_bytes())


def replace_by_rename(out: Path) -> None:
    (out / "new").write_bytes(b"not even Parquet")
    (out / "new").replace(out / alias_of(out))


def show_a_link(out: Path) -> None:
    (out / "kept").write_bytes((out / alias_of(out)).read_bytes())
    (out / alias_of(out)).unlink()
    (out / alias_of(out)).symlink_to(out / "kept")


@pytest.mark.parametrize("harm", [replace_what_is_shown, replace_by_rename, show_a_link])
def test_what_only_readers_saw_is_put_right_and_told(
    job: Path, harm: Callable[[Path], None]
) -> None:
    out = job.parent / "out"
    whole = published(out)
    harm(out)
    summary = batchgen.run(job)
    assert summary.state == "nothing_to_do"
    assert any(f"{alias_of(out)} was another file or a copy" in text for text in summary.warnings)
    assert (out / alias_of(out)).samefile(own_of(out))
    assert verify(out).problems == []
    assert published(out) == whole


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_damaged_file_is_brought_back_from_what_is_shown(job: Path, *, is_gone: bool) -> None:
    out = job.parent / "out"
    own, data = own_of(out), (out / alias_of(out)).read_bytes()
    (out / alias_of(out)).unlink()
    (out / alias_of(out)).write_bytes(data)
    if is_gone:
        own.unlink()
    else:
        overwrite(own, data[:-1])
    summary = batchgen.run(job)
    assert summary.state == "nothing_to_do"
    assert any("brought back from" in text for text in summary.warnings)
    assert own.read_bytes() == data
    assert (out / alias_of(out)).samefile(own)
    assert verify(out).problems == []


def test_a_link_that_is_shown_does_not_become_the_snapshots_file(job: Path) -> None:
    out = job.parent / "out"
    show_a_link(out)
    own_of(out).unlink()
    with pytest.raises(DamagedSnapshotError):
        batchgen.run(job)
    assert (out / alias_of(out)).is_symlink()


@pytest.mark.parametrize("is_relative", [True, False])
def test_a_link_in_place_of_the_snapshots_file_is_damage(job: Path, *, is_relative: bool) -> None:
    out = job.parent / "out"
    own, before = own_of(out), published(out)
    elsewhere = job.parent / "elsewhere.parquet"
    elsewhere.write_bytes(own.read_bytes())
    own.unlink()
    own.symlink_to(os.path.relpath(elsewhere, own.parent) if is_relative else elsewhere)
    done = run_cli("run", job)
    assert done.returncode == 0, done.stderr
    assert "is a link or a folder, a file was published; brought back from" in done.stdout
    elsewhere.unlink()
    assert not own.is_symlink()
    assert not (out / alias_of(out)).is_symlink()
    assert published(out) == before
    assert run_cli("verify", job).returncode == 0


def test_a_file_brought_back_from_a_backup_is_well(job: Path) -> None:
    out = job.parent / "out"
    data = (out / alias_of(out)).read_bytes()
    cut(out)
    with pytest.raises(DamagedSnapshotError):
        batchgen.run(job)
    overwrite(own_of(out), data)
    assert batchgen.run(job).state == "nothing_to_do"
    assert verify(out).problems == []


def test_status_tells_of_files_that_are_cut_or_gone(job: Path) -> None:
    out = job.parent / "out"
    assert "damaged" not in status_of(out)
    cut(out)
    own_of(out, 1).unlink()
    first, second = status_of(out)["damaged"]
    assert "bytes, " in first
    assert second.endswith(f"{own_of(out, 1).name}: is missing")
    assert f"{own_of(out, 1).name}: is missing" in run_cli("status", job).stdout


def test_show_says_what_it_cannot_read(job: Path) -> None:
    own_of(job.parent / "out").unlink()
    done = run_cli("show", job)
    assert done.returncode == 2
    assert "its rows cannot be read" in done.stderr
    assert f"`batchgen verify {job}` tells more" in done.stderr
    assert "Traceback" not in done.stderr


# --- what is no damage: copies, moves, touches ----------------------------------------------------


def copied(out: Path, new: Path) -> None:
    shutil.copytree(out, new)


def copied_without_times(out: Path, new: Path) -> None:
    shutil.copytree(out, new, copy_function=shutil.copyfile)


def copied_by_cp(out: Path, new: Path) -> None:
    subprocess.run(["cp", "-r", out, new], check=True)


def through_tar(out: Path, new: Path) -> None:
    tar = out.parent / "out.tar"
    subprocess.run(["tar", "-cf", tar, "-C", out, "."], check=True)
    new.mkdir()
    subprocess.run(["tar", "-xf", tar, "-C", new], check=True)


def moved(out: Path, new: Path) -> None:
    out.rename(new)


def touched(out: Path, new: Path) -> None:
    out.rename(new)
    for path in new.rglob("*.parquet"):
        path.touch()


def noted_by_nobody(out: Path, new: Path) -> None:
    (out / "_batchgen/seen.json").unlink()
    out.rename(new)


def noted_torn(out: Path, new: Path) -> None:
    overwrite(out / "_batchgen/seen.json", b'{"_batchgen')
    out.rename(new)


def noted_unreadably(out: Path, new: Path) -> None:
    (out / "_batchgen/seen.json").unlink()
    (out / "_batchgen/seen.json").write_bytes(b"\xff[1, 2]")
    out.rename(new)


def noted_too_deep(out: Path, new: Path) -> None:
    (out / "_batchgen/seen.json").unlink()
    (out / "_batchgen/seen.json").write_bytes(b"[" * 100_000)
    out.rename(new)


def written_by_0_1_0(out: Path, new: Path) -> None:
    (out / "_batchgen/seen.json").unlink()
    for path in out.rglob("*.parquet"):
        path.chmod(0o644)
    out.rename(new)


@pytest.mark.parametrize(
    "moves",
    [
        *(copied, copied_without_times, copied_by_cp, through_tar, moved, touched),
        *(noted_by_nobody, noted_torn, noted_unreadably, noted_too_deep, written_by_0_1_0),
    ],
)
def test_a_folder_that_was_moved_goes_on_and_is_read_once(
    job: Path, moves: Callable[[Path, Path], None]
) -> None:
    out, new = job.parent / "out", job.parent / "new"
    whole = published(out)
    moves(out, new)
    there = [f"output.path={new}"]
    assert batchgen.run(job, overrides=there).state == "nothing_to_do"
    notes = (new / "_batchgen/seen.json").read_bytes()
    noted = (new / "_batchgen/seen.json").stat()
    assert batchgen.run(job, overrides=there).state == "nothing_to_do"
    assert (new / "_batchgen/seen.json").read_bytes() == notes
    # Written again, it would have been a file that was read again.
    assert (new / "_batchgen/seen.json").stat().st_mtime_ns == noted.st_mtime_ns
    assert verify(new).problems == []
    assert published(new) == whole
    assert_read_only(new)


# --- rights ---------------------------------------------------------------------------------------


def assert_read_only(out: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in out.glob("part-*.parquet")}
    assert modes
    assert not any(mode & 0o222 for mode in modes.values()), modes


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o444), (0o027, 0o440), (0o077, 0o400)])
def test_what_is_published_is_read_only_and_no_wider_than_the_umask(
    tmp_path: Path, umask: int, mode: int
) -> None:
    job = make_job(tmp_path)
    before = os.umask(umask)
    try:
        batchgen.run(job)
    finally:
        os.umask(before)
    found = [*(tmp_path / "out").rglob("*.parquet"), *(tmp_path / "out").rglob("0*.json")]
    found = [path for path in found if "runs" not in path.parts]
    assert len(found) > 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in found} == {mode}


def test_rights_that_somebody_widened_are_taken_back_and_no_others(job: Path) -> None:
    out = job.parent / "out"
    (out / alias_of(out)).chmod(0o660)
    (out / alias_of(out, 1)).chmod(0o600)
    batchgen.run(job)
    modes = [stat.S_IMODE((out / name).stat().st_mode) for name in shown(out)]
    assert modes == [0o440, 0o400]


SETPRIV = shutil.which("setpriv")


@pytest.mark.skipif(os.geteuid() == 0 and SETPRIV is None, reason="root, and no setpriv")
def test_whom_rights_bind_cannot_write_over_what_is_published_and_every_verb_works(
    tmp_path: Path,
) -> None:
    def bound(*args: str | Path) -> subprocess.CompletedProcess[str]:
        """Python, without root's right to write wherever it likes."""
        drop = [SETPRIV, "--bounding-set", "-dac_override,-fowner"] if os.geteuid() == 0 else []
        command = [*drop, sys.executable, *args]
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)

    job, out = make_job(tmp_path), tmp_path / "out"
    first = bound("-m", "batchgen", "run", job)
    assert first.returncode == 0, first.stderr
    wrote = bound("-c", f"open({str(out / alias_of(out))!r}, 'r+b')")
    assert "PermissionError" in wrote.stderr
    assert_read_only(out)
    for extra in (["--fresh"], ["--fresh", "--set", "output.keep_snapshots=1"], []):
        done = bound("-m", "batchgen", "run", job, *extra)
        assert done.returncode == 0, done.stderr
    assert bound("-m", "batchgen", "prune", job, "--keep", "1").returncode == 0
    assert bound("-m", "batchgen", "verify", job).returncode == 0
    assert batchgen.run(job).state == "nothing_to_do"
    assert len(published(out)) == NUM_ROWS
