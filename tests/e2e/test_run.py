"""Whole jobs through the real command line on the echo engine."""

from __future__ import annotations

import gzip
import json
import subprocess
from typing import TYPE_CHECKING

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchgen
from batchgen.core.errors import RecipeChangedError
from batchgen.store.books import STATE
from tests.e2e.support import (
    command,
    only_shown,
    published,
    run_cli,
    summary_of,
    wait_until,
    write_job,
    write_rows,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_rows(tmp_path / "in.jsonl", 300)
    return write_job(tmp_path, "in.jsonl")


def test_a_job_publishes_its_rows_in_input_order_with_carried_columns(job: Path) -> None:
    assert summary_of(job)["state"] == "complete"
    rows = published(job.parent / "out")
    answered = [row for row in rows if row["gen_status"] == "ok"]
    assert [row["id"] for row in answered] == sorted(row["id"] for row in answered)
    first = answered[0]
    assert first["text"] == "row 0 "
    assert first["gen_text"] == "Repeat: row 0 "[:40].rstrip() or first["gen_text"]
    assert list(first) == [
        "id",
        "text",
        "gen_text",
        "gen_status",
        "gen_verdict",
        "gen_finish_reason",
        "gen_error_type",
        "gen_error",
        "gen_attempts",
        "gen_num_prompt_tokens",
        "gen_num_cached_tokens",
        "gen_num_output_tokens",
        "gen_request_key",
        "gen_model",
        "gen_recipe",
        "gen_engine",
    ]


def test_counts_balance_and_a_bad_line_names_file_and_line(job: Path) -> None:
    summary = summary_of(job)
    counts = [summary[f"num_{name}"] for name in ("planned", "ok", "errors", "skipped")]
    assert counts == [300, 290, 6, 4]
    errors = [row for row in published(job.parent / "out") if row["gen_status"] == "error"]
    assert errors[0]["gen_error"].startswith("/in.jsonl:50: invalid JSON: ")
    assert errors[0]["id"] is None


def test_jsonl_gzip_and_parquet_give_the_same_request_keys(tmp_path: Path) -> None:
    rows = [{"id": n, "text": f"row {n}"} for n in range(100)]
    text = "\n".join(json.dumps(row) for row in rows)
    sources = {"plain.jsonl": text.encode(), "packed.jsonl.gz": gzip.compress(text.encode())}
    keys = {}
    for name, data in sources.items():
        (tmp_path / name).write_bytes(data)
    pl.DataFrame(rows).write_parquet(tmp_path / "table.parquet")
    for name in [*sources, "table.parquet"]:
        assert (
            run_cli("run", write_job(tmp_path, name, output={"path": name + ".out"})).returncode
            == 0
        )
        frame = batchgen.read(tmp_path / f"{name}.out").collect()
        assert frame["id"].to_list() == list(range(100))
        keys[name] = frame["gen_request_key"].to_list()
    assert keys["plain.jsonl"] == keys["packed.jsonl.gz"] == keys["table.parquet"]
    assert len(set(keys["plain.jsonl"])) == 100


def test_a_finished_job_says_so_exits_0_and_is_left_as_it_is(job: Path) -> None:
    summary_of(job)
    files = sorted((job.parent / "out").rglob("part-*.parquet"))
    stamps = [file.stat().st_mtime_ns for file in files]
    again = summary_of(job)
    assert again["state"] == "nothing_to_do"
    assert again["num_ok"] == 290
    assert [file.stat().st_mtime_ns for file in files] == stamps


def test_a_changed_recipe_is_refused_with_the_difference(job: Path) -> None:
    summary_of(job)
    refused = run_cli("run", job, "--set", "sampling.max_tokens=9")
    assert refused.returncode == 2
    assert "sampling.max_tokens: 40 -> 9" in refused.stderr


def test_of_a_changed_input_only_the_edited_row_runs_and_of_a_touched_one_none(job: Path) -> None:
    summary_of(job)
    before = published(job.parent / "out")
    source = job.parent / "in.jsonl"
    source.touch()
    assert summary_of(job)["state"] == "nothing_to_do"
    source.write_text(source.read_text().replace("row 7 ", "row X "))
    summary = summary_of(job)
    assert summary["state"] == "complete"
    assert (summary["run"]["num_ok"], summary["run"]["num_errors"]) == (1, 0)
    assert summary["num_carried"] == 300 - 1
    after = published(job.parent / "out")
    assert [row["id"] for row in after] == [row["id"] for row in before]
    assert [row["id"] for row in after if row not in before] == [7]
    assert after[7]["gen_text"] == before[7]["gen_text"].replace("row 7 ", "row X ")
    rows = batchgen.read(job.parent / "out").collect()
    in_this_run = rows.filter(pl.col("gen_run_id") == summary["run_id"])
    assert in_this_run["id"].to_list() == [7]


def test_fresh_starts_anew_and_replaces_the_snapshot(job: Path) -> None:
    summary_of(job)
    before = published(job.parent / "out")
    summary = summary_of(job, "--fresh", "--set", "sampling.max_tokens=9")
    assert summary["state"] == "complete"
    after = published(job.parent / "out")
    assert [row["id"] for row in after] == [row["id"] for row in before]
    assert max(row["gen_num_output_tokens"] or 0 for row in after) == 9


def test_a_stopped_fresh_run_leaves_the_published_snapshot_as_it_was(job: Path) -> None:
    summary_of(job)
    before = published(job.parent / "out")
    files = {f.name: f.read_bytes() for f in (job.parent / "out").glob("part-*")}
    over = run_cli("run", job, "--fresh", "--set", "gate.max_error_rate=0.001")
    assert over.returncode == 3
    assert published(job.parent / "out") == before
    assert {f.name: f.read_bytes() for f in (job.parent / "out").glob("part-*")} == files


def test_over_the_error_limit_nothing_is_published_until_the_limit_is_raised(job: Path) -> None:
    over = run_cli("run", job, "--set", "gate.max_error_rate=0.01")
    assert over.returncode == 3
    assert "6 of 296 rows are errors, over gate.max_error_rate = 0.01" in over.stderr
    assert not list((job.parent / "out").glob("part-*.parquet"))
    shown = run_cli("show", job, "--errors", "-n", "1")
    assert "bad_json" in shown.stdout
    raised = summary_of(job)
    assert raised["state"] == "complete"
    assert raised["run"]["num_ok"] == 0


def test_an_input_that_changes_during_the_run_stops_it_and_is_named(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 3000)
    slow = {"backend": "echo", "engine": {"max_num_seqs": 4, "step_s": 0.01}}
    job = write_job(tmp_path, "in.jsonl", model=slow, run={"max_in_flight": 8})
    parts = tmp_path / "out" / STATE / "parts"
    with subprocess.Popen(command("run", job), stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: parts.is_dir() and any(parts.glob("*.parquet")))
        with source.open("a") as out:
            out.write('{"id": 3000, "text": "late"}\n')
        _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"{source}: has " in told
    assert "it must not change while a job runs" in told
    assert not list((tmp_path / "out").glob("part-*.parquet"))


def test_several_files_and_where_and_limit(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 100)
    write_rows(tmp_path / "b.jsonl", 100, start=100)
    chosen = {"where": "id % 2 = 0", "limit": 60, "columns": ["id"]}
    job = write_job(tmp_path, "[ab].jsonl", input=chosen)
    assert summary_of(job)["state"] == "complete"
    frame = batchgen.read(job).collect()
    kept = frame.filter(gen_status="ok")["id"].to_list()
    assert len(frame) == 60
    assert kept == sorted(kept)
    assert all(number % 2 == 0 for number in kept)
    assert "text" not in frame.columns


def test_an_empty_input_publishes_an_empty_table_with_the_schema(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("")
    job = write_job(tmp_path, "in.jsonl", prompt={"user": "constant"})
    assert summary_of(job)["state"] == "complete"
    frame = batchgen.read(job).collect()
    assert frame.shape[0] == 0
    assert "gen_text" in frame.columns


def test_footers_stats_and_summary_say_who_made_them(job: Path) -> None:
    summary = summary_of(job)
    metadata = pq.read_metadata(only_shown(job.parent / "out")).metadata
    assert metadata[b"batchgen.run"].decode() == summary["run_id"]
    assert metadata[b"batchgen.engine"] == b"echo 1"
    runs = job.parent / "out" / STATE / "runs" / summary["run_id"]
    assert json.loads((runs / "summary.json").read_text())["num_ok"] == 290
    stats = pq.read_table(runs / "stats.parquet").to_pylist()
    assert stats[-1]["num_ok"] == 290
    assert stats[-1]["memory_mib"] > 10


def test_the_same_from_python(job: Path) -> None:
    summary = batchgen.run(job)
    assert (summary.state, summary.num_ok, summary.num_errors) == ("complete", 290, 6)
    assert batchgen.read(job).select(pl.len()).collect().item() == 296
    with pytest.raises(RecipeChangedError, match=r"prompt.user: 'Repeat: \{\{ text \}\}' -> 'x'"):
        batchgen.run(job, overrides=["prompt.user=x"])


def test_the_output_may_not_be_a_folder_with_other_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 10)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part-00000.parquet").write_bytes(b"mine")
    refused = run_cli("run", write_job(tmp_path, "in.jsonl"))
    assert refused.returncode == 2
    assert (
        "holds part files and no _batchgen/, a job's state: bring that back, too" in refused.stderr
    )
    assert (tmp_path / "out" / "part-00000.parquet").read_bytes() == b"mine"


def test_files_that_come_while_a_job_is_unfinished_bring_their_rows_and_columns(
    tmp_path: Path,
) -> None:
    """Rows that are answered already are not computed again, though they are read otherwise now."""
    for name, value in (("a", 1), ("b", 2)):
        rows = [{"x": value, "text": f"{name} {n}"} for n in range(50)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = write_job(tmp_path, "*.jsonl", gate={"max_error_rate": 0.0})
    with (tmp_path / "b.jsonl").open("a") as out:
        out.write("\n{")
    assert run_cli("run", job).returncode == 3
    came = {"x": "no number", "text": "c", "extra": 1}
    (tmp_path / "c.jsonl").write_text("\n".join([json.dumps(came)] * 900))
    summary = summary_of(job, "--set", "gate.max_error_rate=0.5")
    assert summary["state"] == "complete"
    # The 900 new rows are one question; the line that is no JSON is an error row as it was.
    assert (summary["run"]["num_ok"], summary["run"]["num_errors"]) == (1, 0)
    assert summary["num_carried"] + summary["num_copied"] == 101 + 899
    frame = batchgen.read(job).collect()
    assert len(frame) == 1001
    assert frame["extra"].to_list() == [None] * 101 + [1] * 900
    assert frame["gen_text"].to_list()[-1] == "Repeat: c"


def test_an_unfinished_job_goes_on_with_the_columns_that_its_plan_froze(tmp_path: Path) -> None:
    """A limit that is filled wants no further files, whatever they would make of the columns."""
    rows = [{"x": 1, "text": f"a {n}"} for n in range(50)]
    (tmp_path / "a.jsonl").write_text("{\n" + "\n".join(map(json.dumps, rows)))
    tables = {"input": {"path": "*.jsonl", "limit": 40}}
    job = write_job(tmp_path, "*.jsonl", gate={"max_error_rate": 0.0}, **tables)
    assert run_cli("run", job).returncode == 3
    bad = {"x": "no number", "text": "c", "extra": 1}
    (tmp_path / "c.jsonl").write_text("\n".join([json.dumps(bad)] * 900))
    summary = summary_of(job, "--set", "gate.max_error_rate=0.5")
    assert (summary["state"], summary["run"]["num_resumed"]) == ("complete", 40)
    frame = batchgen.read(job).collect()
    assert (frame.schema["x"], len(frame), "extra" in frame.columns) == (pl.Int64, 40, False)


def test_a_where_that_lets_nothing_through_publishes_no_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 60)
    job = write_job(tmp_path, "in.jsonl", input={"where": "id < 0"}, gate={"max_error_rate": 1.0})
    summary = summary_of(job)
    assert (summary["num_ok"], summary["num_errors"], summary["num_skipped"]) == (0, 1, 59)


def test_types_that_arrow_cannot_take_pass_through(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": [f"row {n}" for n in range(40)],
            "view": pa.array([f"v{n}" for n in range(40)], pa.string_view()),
            "views": pa.array([[f"v{n}"] for n in range(40)], pa.list_(pa.string_view())),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    job = write_job(tmp_path, "in.parquet", run={"flush_rows": 7})
    assert summary_of(job)["state"] == "complete"
    read = pq.read_table(only_shown(tmp_path / "out"), columns=["text", "view"])
    assert read.to_pylist() == table.select(["text", "view"]).to_pylist()


def test_a_row_that_where_cannot_judge_is_an_error_row(tmp_path: Path) -> None:
    rows = [{"id": str(n), "text": f"row {n}"} for n in range(30)]
    rows[7]["id"] = "seven"
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = write_job(tmp_path, "in.jsonl", input={"where": "CAST(id AS INTEGER) >= 5"})
    summary = summary_of(job)
    assert (summary["num_ok"], summary["num_errors"], summary["num_skipped"]) == (24, 1, 5)
    assert summary["run"]["error_types"] == {"where_failed": 1}
