"""Rows that leave the snapshot are counted before a run computes any, and by its plan."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest

import batchgen
from batchgen.api import load
from batchgen.pipeline.context import RunOptions
from batchgen.preview.plan import PlanOptions, foresee
from tests.e2e.support import run_cli, write_job, write_rows

if TYPE_CHECKING:
    from pathlib import Path

NUM_ROWS = 140
"""Lines of each file: two are blank, two are no JSON and end as error rows."""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A finished job over two files of 140 lines, of which 138 are published."""
    for at in range(2):
        write_rows(tmp_path / f"in-{at}.jsonl", NUM_ROWS, start=1400 * at)
    job = write_job(tmp_path, str(tmp_path / "in-*.jsonl"))
    assert batchgen.run(job).num_leaving == 0
    return job


def check(job: Path, num_leaving: int, *overrides: str, **options: Any) -> str:
    """Hold a plan and the run after it against a number, and against what is published.

    Returns:
        What both say of it, if anything.
    """
    before = published_texts(job)
    forecast = foresee(lambda: load(job, overrides), PlanOptions(RunOptions(**options)))
    summary = batchgen.run(job, overrides=overrides, **options)
    assert forecast.as_dict()["num_leaving"] == summary.as_dict()["num_leaving"] == num_leaving
    notes = [text for text in summary.warnings if "the snapshot" in text]
    assert [text for text in forecast.warnings if "the snapshot" in text] == notes
    assert len(notes) == (num_leaving > 0)
    for note in notes:
        assert f"warning: {note}" in forecast.as_text()
    after = published_texts(job)
    assert len(before) - len(after) <= num_leaving
    return notes[0] if notes else ""


def published_texts(job: Path) -> list[str]:
    return batchgen.read(job.parent / "out").collect()["id"].cast(pl.String).to_list()


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def test_a_limit_on_a_finished_job(job: Path) -> None:
    note = check(job, 276 - 100, "input.limit=100", "gate.max_shrink=1")
    assert note == "input.limit = 100: 176 rows leave the snapshot"
    assert len(published_texts(job)) == 100


def test_a_file_that_is_gone(job: Path) -> None:
    gone = job.parent / "in-1.jsonl"
    gone.unlink()
    note = check(job, 138)
    assert note == f"the input file {gone} is gone: 138 rows leave the snapshot"


@pytest.mark.parametrize("retry_errors", [False, True])
def test_lines_that_are_deleted(job: Path, *, retry_errors: bool) -> None:
    """The one that is blank was no row of the snapshot."""
    path = job.parent / "in-0.jsonl"
    lines = lines_of(path)
    assert lines[69] == ""
    write_lines(path, lines[:60] + lines[70:])
    note = check(job, 9, retry_errors=retry_errors)
    assert note == f"fewer rows in {path}: 9 rows leave the snapshot"


def test_a_filter_that_is_narrowed(job: Path) -> None:
    """Lines that are no JSON are error rows, whatever the filter is."""
    note = check(job, 136, "input.where=id IS NULL OR id >= 1400")
    assert note == "input.where has changed: 136 rows leave the snapshot"
    assert len(published_texts(job)) == 140
    assert check(job, 0) == ""


def test_a_filter_that_lets_other_rows_through(job: Path) -> None:
    """As many as before, and others: those that are left out leave."""
    numbers = [int(text) for text in published_texts(job) if text is not None]
    num_odd = sum(number % 2 for number in numbers)
    check(job, num_odd, "input.where=id IS NULL OR id % 2 = 0")
    num_even = len(numbers) - num_odd
    note = check(job, num_even, "input.where=id IS NULL OR id % 2 = 1")
    assert note == f"input.where has changed: {num_even} rows leave the snapshot"


def test_rows_that_a_filter_now_leaves_out_since_they_were_edited(job: Path) -> None:
    keep = "input.where=id IS NULL OR id <> 7"
    check(job, 1, keep)
    path = job.parent / "in-0.jsonl"
    lines = lines_of(path)
    lines[3] = lines[3].replace('"id": 3', '"id": 7')
    lines[4] = lines[4].replace("row", "another row")
    write_lines(path, lines)
    note = check(job, 1, keep)
    assert note == f"fewer rows in {path}: 1 row leaves the snapshot"


def test_nothing_leaves(job: Path) -> None:
    """Moved and renamed, edited, longer, split over other files, and a copy elsewhere."""
    folder = job.parent
    (folder / "in-0.jsonl").rename(folder / "in-5.jsonl")
    assert check(job, 0) == ""
    lines = lines_of(folder / "in-5.jsonl")
    lines[0] = lines[0].replace("row", "edited row")
    write_lines(folder / "in-5.jsonl", [*lines, *lines[:10]])
    assert check(job, 0) == ""
    write_lines(folder / "in-5.jsonl", lines[:100])
    write_lines(folder / "in-6.jsonl", [*lines[100:], *lines[:10]])
    assert check(job, 0) == ""
    for name in ("in-1.jsonl", "in-5.jsonl", "in-6.jsonl", "out"):
        (folder / "new" / name).parent.mkdir(exist_ok=True)
        shutil.move(folder / name, folder / "new" / name)
    moved = write_job(folder / "new", str(folder / "new" / "in-*.jsonl"))
    assert check(moved, 0) == ""


def test_a_new_recipe_over_fewer_rows(job: Path) -> None:
    """As somebody does who tries out a prompt on a finished job."""
    tried = ("prompt.user=Say again: {{ text }}", "input.limit=100", "gate.max_shrink=1")
    note = check(job, 176, *tried, accept_recipe=True)
    assert note == "input.limit = 100: 176 rows leave the snapshot"
    path = job.parent / "in-0.jsonl"
    write_lines(path, lines_of(path)[:50])
    assert check(job, 50, *tried, "input.path=in-0.jsonl", fresh=True)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_files_without_digests_are_counted_by_their_totals(tmp_path: Path, kind: str) -> None:
    """Rows of a file that is gone may stand in one that has grown."""
    frame = pl.DataFrame({"id": range(60), "text": [f"text {n}" for n in range(60)]})
    write = getattr(pl.DataFrame, f"write_{kind}")
    files = [tmp_path / f"in-{at}.{kind}" for at in range(3)]
    for at, file in enumerate(files):
        write(frame.slice(20 * at, 20), file)
    job = write_job(tmp_path, str(tmp_path / f"in-*.{kind}"))
    batchgen.run(job)
    write(frame.slice(0, 15), files[0])
    assert check(job, 5) == f"fewer rows in {files[0]}: 5 rows leave the snapshot"
    files[1].rename(tmp_path / f"in-9.{kind}")
    assert check(job, 0) == ""
    files[2].unlink()
    write(frame.slice(0, 35), files[0])
    gone = f"the input file {files[2]} is gone"
    assert check(job, 20) == f"{gone}: at most 20 rows leave the snapshot"


def test_an_unfinished_night_is_held_against_the_snapshot_too(job: Path) -> None:
    """The plan is there already, and its run goes on."""
    (job.parent / "in-1.jsonl").unlink()
    strict = ("gate.max_shrink=0.1",)
    with pytest.raises(batchgen.BatchgenError):
        batchgen.run(job, overrides=strict)
    assert check(job, 138, "gate.max_shrink=1.0")


def test_the_shell_says_it(job: Path) -> None:
    limit = ("--set", "input.limit=100", "--set", "gate.max_shrink=1")
    sentence = "warning: input.limit = 100: 176 rows leave the snapshot"
    assert sentence in run_cli("plan", job, *limit).stdout
    assert json.loads(run_cli("plan", job, *limit, "--json").stdout)["num_leaving"] == 176
    done = run_cli("run", job, *limit)
    assert done.returncode == 0
    assert sentence in done.stdout + done.stderr
