"""Outputs that batchgen 0.1.0 left are gone on with: nothing that is done is computed again.

See `tests/data/outputs-0.1.0/make.py` for what they hold. They are copies, as a person may make
of a folder: without hard links and with other times and paths than their books know.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import batchgen
from batchgen.cli import cli

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchgen.pipeline.context import Summary

OUTPUTS = Path(__file__).parents[1] / "data" / "outputs-0.1.0"
PUBLISHED = {
    "nights": (34, 4, 1, 2, "b3d3d3d8b4b80e19"),
    "csv": (14, 6, 4, 1, "4f8c918f8410d277"),
    "parquet": (30, 0, 0, 1, "6b2a8834d9a676bd"),
}
"""Case -> ok, errors and skipped rows, snapshots, and a digest of the rows that users read."""


def copied(case: str, folder: Path) -> Path:
    """The job file of a copy."""
    shutil.copytree(OUTPUTS / case, folder / case, copy_function=shutil.copyfile)
    return folder / case / "job.toml"


def printed(*args: str | Path) -> str:
    """What a command that must succeed prints."""
    done = CliRunner().invoke(cli, [*map(str, args)], catch_exceptions=False)
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout


def facts(*args: str | Path) -> dict[str, Any]:
    """The same with `--json`."""
    found: dict[str, Any] = json.loads(printed(*args, "--json"))
    return found


def digest_of(frame: pl.DataFrame) -> str:
    """A digest of every value and type, in order."""
    text = f"{frame.schema}\n{frame.rows()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def files_of(out: Path) -> dict[str, bytes]:
    """Every file of an output but its lock, with what is in it."""
    found = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def read(job: Path) -> pl.DataFrame:
    """The published rows but those of lines that are no rows, whose errors name the file anew."""
    frame = batchgen.read(job).collect()
    kind = next(name for name in frame.columns if name.endswith("_error_type"))
    return frame.filter(~pl.col(kind).fill_null("").str.starts_with("bad_"))


def num_computed(summary: Summary) -> int:
    """Answers that the engine gave in this run."""
    return sum(sum(found.values()) for found in summary.run.get("verdicts", {}).values())


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_next_night_computes_no_row_and_the_one_after_has_nothing_to_do(
    tmp_path: Path, case: str
) -> None:
    job = copied(case, tmp_path)
    old = read(job)
    plan = facts("plan", job)["rows"]
    assert plan["num_reused"] == plan["num_rows"] == sum(PUBLISHED[case][:3])
    summary = batchgen.run(job)
    assert (summary.exit_code, num_computed(summary)) == (0, 0)
    assert read(job).equals(old)
    before = files_of(job.parent / "out")
    again = batchgen.run(job)
    assert (again.state, again.exit_code, again.warnings) == ("nothing_to_do", 0, [])
    assert files_of(job.parent / "out") == before
    assert facts("verify", job)["problems"] == []


@pytest.mark.parametrize("case", PUBLISHED)
def test_its_commands_read_it(tmp_path: Path, case: str) -> None:
    job = copied(case, tmp_path)
    ok, errors, skipped, num_snapshots, digest = PUBLISHED[case]
    counts = {"num_ok": ok, "num_errors": errors, "num_skipped": skipped}
    frame = batchgen.read(job).collect()
    assert (frame.height, digest_of(frame)) == (ok + errors, digest)
    verdict = facts("verify", job)
    assert (verdict | counts, verdict["problems"]) == (verdict, [])
    status = facts("status", job)
    assert (status | counts, status["state"]) == (status, "complete")
    assert len(facts("snapshots", job)["snapshots"]) == num_snapshots
    assert printed("show", job, "-n", "100").count("--- row ") == ok + errors
    shown = CliRunner().invoke(cli, ["show", str(job), "-n", "100", "--errors"]).stdout
    assert shown.count("--- row ") == errors


def edit_jsonl(folder: Path) -> None:
    path = folder / "data" / "a.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    row = {**json.loads(lines[3]), "text": '{"label":"invoice","urgency":3}'}
    lines[3] = json.dumps(row)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def edit_csv(folder: Path) -> None:
    path = folder / "in.csv"
    path.write_text(path.read_text().replace("\n3,maybe,", "\n3,perhaps,"))


def edit_parquet(folder: Path) -> None:
    path = folder / "data" / "0.parquet"
    table = pq.read_table(path)
    names = ["another", *table["name"].to_pylist()[1:]]
    pq.write_table(table.set_column(0, "name", pa.array(names)), path)


@pytest.mark.parametrize(
    ("case", "edit"), [("nights", edit_jsonl), ("csv", edit_csv), ("parquet", edit_parquet)]
)
def test_a_night_with_one_edited_row_computes_one(
    tmp_path: Path, case: str, edit: Callable[[Path], None]
) -> None:
    job = copied(case, tmp_path)
    old = read(job).rows()
    edit(job.parent)
    assert facts("plan", job)["todo"]["num_to_compute"] == 1
    summary = batchgen.run(job)
    assert (summary.state, num_computed(summary)) == ("complete", 1)
    assert facts("verify", job)["problems"] == []
    new = read(job).rows()
    assert len(new) == len(old)
    assert sum(before != after for before, after in zip(old, new, strict=True)) == 1


def test_an_interrupted_run_is_gone_on_with(tmp_path: Path) -> None:
    job = copied("interrupted", tmp_path)
    done = CliRunner().invoke(cli, ["status", str(job), "--json"])
    status = json.loads(done.stdout)
    assert (status["state"], status["num_durable"]) == ("interrupted", 20)
    assert done.exit_code == 1  # It was killed.
    assert facts("verify", job)["num_left"] == 20
    summary = batchgen.run(job)
    assert (summary.state, summary.num_ok, num_computed(summary)) == ("complete", 40, 20)
    assert facts("verify", job)["problems"] == []
    origins = batchgen.read(job).collect()["gen_run_id"].to_list()
    assert len({*origins[:20]}) == len({*origins[20:]}) == 1
    assert origins[0] != origins[20]


def test_two_nights_are_compared_and_pruned(tmp_path: Path) -> None:
    job = copied("nights", tmp_path)
    counts = {"num_old": 35, "num_new": 38, "num_same": 33, "num_added": 3, "num_removed": 0}
    diff = facts("diff", job, "--on", "id")
    assert (diff | counts, diff["num_without_key"]) == (diff, [1, 1])
    assert [example["where"] for example in diff["examples"]] == ["id = 102"]
    removed = facts("prune", job, "--keep", "1")["removed"]
    assert [snapshot["number"] for snapshot in removed] == [1]
    assert facts("verify", job)["problems"] == []
    assert batchgen.read(job).collect().height == 38


def test_there_is_a_way_back_to_its_snapshots(tmp_path: Path) -> None:
    job = copied("nights", tmp_path)
    nights = [batchgen.read(job, snapshot=number).collect() for number in (1, 2)]
    edit_jsonl(job.parent)
    assert num_computed(batchgen.run(job)) == 1  # Snapshot 3, of this version.
    for number, rows in enumerate(nights, 1):
        assert facts("rollback", job, str(number))["rolled_back_to"] == number
        assert batchgen.read(job).collect().equals(rows)
        assert pl.read_parquet(job.parent / "out" / "part-*.parquet").equals(rows)
        assert facts("verify", job)["problems"] == []
        assert printed("show", job, "-n", "100").count(" (line ") == rows.height
    assert num_computed(batchgen.run(job)) == 1  # The edit, as of the night before it.
    assert batchgen.run(job).state == "nothing_to_do"
