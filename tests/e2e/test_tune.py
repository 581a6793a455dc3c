"""`batchgen tune` on the echo engine: whole searches, and what a run makes of them."""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from batchgen.api import load
from batchgen.store.books import STATE
from batchgen.tuning.trial import Stops, Times
from batchgen.tuning.tune import TuneOptions, Tuning
from tests.e2e.support import command, published, run_cli, summary_of, wait_until, write_job
from tests.faulty import BACKEND

if TYPE_CHECKING:
    from pathlib import Path

SHORT = Times(warm_up_s=1.0, settle_s=0.2, settle_most_s=0.3, least_s=0.6, most_s=0.6)
OPTIONS = TuneOptions(budget_s=60, times=SHORT)
STEP_S = 0.05
MEMORY_ENDS_AT = 1650
"""Requests: more than a trial of 64 at once admits, fewer than one of 128."""


def write_rows(folder: Path, num_rows: int) -> None:
    lines = (json.dumps({"id": at, "text": f"row {at}"}) for at in range(num_rows))
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_slow_job(folder: Path, **tables) -> Path:
    model = {"backend": BACKEND, **tables.pop("model", {})}
    path = write_job(folder, "in.jsonl", run={"grace_s": 0}, model=model, **tables)
    faults = f'faults = [{{kind = "out_of_memory", at = {MEMORY_ENDS_AT}}}]'
    engine = [
        faults,
        f'once_file = "{folder / "fired"}"',
        f"step_s = {STEP_S}",
        "in_process = true",
    ]
    path.write_text("\n".join([path.read_text(), "[model.engine]", *engine, ""]))
    return path


def test_the_best_is_found_an_out_of_memory_survived_and_a_run_uses_what_was_found(
    tmp_path: Path,
) -> None:
    write_rows(tmp_path, 6500)
    path = write_slow_job(tmp_path)
    told_on_the_way: list[str] = []
    job = load(path, ["model.max_num_seqs=32"], tuned=False)
    report = Tuning(job, path, OPTIONS, stops=Stops(), tell=told_on_the_way.append).run()
    # Twice as fast with twice as many at once; memory ends at four times.
    table = report.as_text()
    assert report.state == "tuned", table
    assert report.settings == {"max_num_seqs": 64}, table
    assert report.gain == pytest.approx(2, rel=0.2)
    assert [trial.settings for trial in report.trials] == [
        {},
        {"max_num_seqs": 64},
        {"max_num_seqs": 128},
        {},
        {"max_num_seqs": 64},
    ]
    assert "CUDA out of memory" in (report.trials[2].failure or "")
    assert "failed: the engine died: CUDA out of memory" in table
    assert "the job itself says max_num_seqs = 32, which wins: change it there to 64" in table
    assert told_on_the_way[0] == "trial 1: the job's own settings"
    # Every answer of the trials is kept, and none is published by them.
    assert report.num_answered > 3000
    assert not list((tmp_path / "out").glob("*.parquet"))
    summary = summary_of(path)
    assert summary["state"] == "complete"
    assert summary["tuned"] == {
        "path": str(tmp_path / "job.tuned.toml"),
        "settings": {"max_num_seqs": 64},
    }
    assert summary["engine"]["max_num_seqs"] == 64
    assert summary["run"]["num_resumed"] == report.num_answered
    rows = published(tmp_path / "out")
    assert [row["id"] for row in rows] == list(range(6500))
    assert {row["gen_status"] for row in rows} == {"ok"}


def test_where_no_row_is_left_a_tune_says_so_and_may_measure_without_keeping(
    tmp_path: Path,
) -> None:
    write_rows(tmp_path, 300)
    path = write_slow_job(tmp_path, model={"max_num_seqs": 64})
    job = load(path, tuned=False)
    report = Tuning(job, path, OPTIONS, stops=Stops()).run()
    assert (report.state, report.is_answered) == ("too_few_rows", True)
    assert "none is left: `batchgen run" in report.as_text()
    done = run_cli("run", path, "--no-tuned")
    assert "complete" in done.stdout
    done = run_cli("tune", path, "--json")
    assert (done.returncode, json.loads(done.stdout)["state"]) == (0, "nothing_to_do")
    before = sorted((tmp_path / "out").rglob("*"))
    report = Tuning(job, path, TuneOptions(5, SHORT, keeps_rows=False), stops=Stops()).run()
    assert report.num_answered == 0
    assert sorted((tmp_path / "out").rglob("*")) == before


def test_a_tune_is_stopped_and_locked_out_as_a_run_is(tmp_path: Path) -> None:
    write_rows(tmp_path, 8000)
    # 20 s until the fault: longer than a busy machine needs to start the other.
    path = write_slow_job(tmp_path, model={"max_num_seqs": 4})
    runs = tmp_path / "out" / STATE / "runs"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command("tune", path, "--json"), **pipes) as process:
        try:
            wait_until(lambda: any(runs.glob("*/live.json")))
            busy = run_cli("tune", path)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (busy.returncode, "is at work on this job" in busy.stderr) == (75, True), busy
    assert process.returncode == 75, err
    assert "batchgen: stopping with this trial: rows in flight are left to the next run\n" in err
    report = json.loads(out)
    assert (report["state"], report["tuned_file"]) == ("stopped", None)
    assert not (tmp_path / "job.tuned.toml").exists()


def test_a_job_that_is_refused_ends_a_tune_as_it_ends_a_run(tmp_path: Path) -> None:
    write_rows(tmp_path, 10)
    path = write_slow_job(tmp_path)
    done = run_cli("tune", path, "--json", "--set", "prompt.user={{ txet }}")
    assert done.returncode == 2
    assert json.loads(done.stdout)["state"] == "refused"
    assert "did you mean 'text'" in done.stderr


def test_a_search_that_was_cut_short_leaves_what_an_earlier_one_found(tmp_path: Path) -> None:
    write_rows(tmp_path, 4000)
    path = write_slow_job(tmp_path, model={"max_num_seqs": 16})
    (tmp_path / "job.tuned.toml").write_text("found earlier")
    options = replace(OPTIONS, budget_s=0.1)
    report = Tuning(load(path, tuned=False), path, options, stops=Stops()).run()
    assert (report.state, len(report.trials), report.settings) == ("unconfirmed", 1, {})
    assert "ran out before anything faster was found: more --minutes" in report.as_text()
    assert "best" not in report.as_text()
    assert (tmp_path / "job.tuned.toml").read_text() == "found earlier"
