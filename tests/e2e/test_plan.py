"""`batchgen plan`: what it says, held against what a run then does."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import batchgen
from batchgen.api import load
from batchgen.preview.plan import PlanOptions, foresee
from batchgen.storage import LocalStorage
from batchgen.store.runs import RunLock
from tests.e2e.support import (
    command,
    run_cli,
    summary_of,
    wait_until,
    write_job,
    write_rows,
)

ROOT = Path(__file__).parents[2]
DEFAULTS = PlanOptions()
SHORT = ("--set", "model.engine.max_model_len=80", "--set", "gate.max_error_rate=1.0")
"""Some prompts are too long, others leave less room than max_tokens."""


def plan_of(job: Path, *args: str, code: int = 0) -> dict[str, Any]:
    """What the command says with `--json`."""
    done = run_cli("plan", job, "--json", *args)
    assert done.returncode == code, done.stderr
    assert "Triton" not in done.stderr  # vLLM says that while it is imported.
    lines = done.stdout.splitlines()
    assert len(lines) == 1, done.stdout
    found: dict[str, Any] = json.loads(lines[0])
    assert found["exit_code"] == code
    return found


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time and content."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def edit(source: Path, *numbers: int) -> None:
    """Write other texts into lines of a JSONL file."""
    lines = source.read_text(encoding="utf-8").splitlines()
    for number in numbers:
        lines[number] = json.dumps({"id": number, "text": f"edited {number}"})
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job of 300 rows: 6 bad, 4 blank."""
    return write_job(tmp_path, str(write_rows(tmp_path / "in.jsonl", 300)))


def computed(summary: dict[str, Any]) -> int:
    """Rows that reached the engine, once each."""
    return sum(summary["run"]["verdicts"].get("1", {}).values())


def test_a_first_plan_says_what_the_run_then_does(job, tmp_path):
    before = files_of(tmp_path)
    found = plan_of(job, "--exact", *SHORT)
    assert files_of(tmp_path) == before
    assert not (tmp_path / "out").exists()
    assert (found["state"], found["plan_number"], found["is_continued"]) == ("ready", 1, False)
    assert found["rows"] == {
        "num_rows": 300,
        "num_new": 300,
        "num_edited": 0,
        "num_unread": 0,
        "num_again": 0,
        "num_reused": 0,
        "num_done": 0,
    }
    summary = summary_of(job, *SHORT)
    todo, run = found["todo"], summary["run"]
    assert todo["num_too_long"] > 0
    assert todo["num_tight"] > 0
    assert todo["num_too_long"] == run["error_types"]["prompt_too_long"]
    assert todo["bad"] == {"bad_json": 6}
    assert todo["num_skipped"] == summary["num_skipped"] == 4
    assert todo["num_to_compute"] == summary["num_ok"]
    assert todo["prompt_tokens"] == run["num_prompt_tokens"]
    assert todo["max_output_tokens"] >= run["num_output_tokens"]
    published = batchgen.read(tmp_path / "out").collect()
    lengths = published["gen_num_prompt_tokens"].drop_nulls()
    assert todo["lengths"]["longest"] == lengths.max()
    assert todo["lengths"]["mean"] == pytest.approx(lengths.mean())
    assert sum(bucket["num"] for bucket in todo["lengths"]["histogram"]) == len(lengths)
    assert found["estimate"] is None


def test_an_unchanged_night_has_nothing_to_do(job, tmp_path):
    run_id = summary_of(job)["run_id"]
    before = files_of(tmp_path)
    found = plan_of(job)
    assert (found["state"], found["todo"]) == ("nothing_to_do", None)
    assert run_id in found["reason"]
    assert found["rows"]["num_done"] == 300
    assert files_of(tmp_path) == before


def test_a_night_with_edits_says_what_is_edited_new_and_reused(job, tmp_path):
    summary_of(job)
    source = tmp_path / "in.jsonl"
    edit(source, 3, 40, 200)
    texts = [f"new {n}" for n in range(10)]
    # One more has the text of a row that was answered; and one is equal to another new one.
    texts += [json.loads(source.read_text(encoding="utf-8").splitlines()[0])["text"], "new 0"]
    with source.open("a", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"id": 300 + number, "text": text}) + "\n")
    before = files_of(tmp_path)
    found = plan_of(job)
    assert files_of(tmp_path) == before
    rows, todo = found["rows"], found["todo"]
    assert (rows["num_rows"], rows["num_reused"]) == (312, 297)
    assert (rows["num_new"], rows["num_edited"], rows["num_again"]) == (12, 3, 0)
    assert (todo["num_rows"], todo["num_known"], todo["num_duplicates"]) == (15, 1, 1)
    assert todo["num_to_compute"] == 13
    assert (found["plan_number"], found["is_continued"]) == (2, False)
    assert computed(summary_of(job)) == 13


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_of_other_formats_are_told_apart_by_their_requests(tmp_path, kind):
    frame = pl.DataFrame({"id": range(50), "text": [f"text {n}" for n in range(50)]})
    files = [tmp_path / f"in-{n}.{kind}" for n in (0, 1)]
    job = write_job(tmp_path, str(tmp_path / f"in-*.{kind}"))
    for at, file in enumerate(files):
        _write(frame.with_columns(pl.col("text") + f" of {at}"), file)
    summary_of(job)
    _write(
        pl.concat([frame.head(40), frame.head(40)]).with_columns(pl.col("text") + " of 0"), files[0]
    )
    _write(frame.tail(5), tmp_path / f"in-2.{kind}")
    found = plan_of(job)
    rows, todo = found["rows"], found["todo"]
    assert (rows["num_new"], rows["num_edited"], rows["num_unread"]) == (5, 0, 80)
    assert (rows["num_reused"], rows["num_rows"]) == (50, 135)
    assert (todo["num_known"], todo["num_to_compute"]) == (80, 5)
    assert computed(summary_of(job)) == 5


def _write(frame: pl.DataFrame, path: Path) -> None:
    if path.suffix == ".csv":
        frame.write_csv(path)
    else:
        frame.write_parquet(path)


def test_files_that_come_go_and_shrink_are_counted(tmp_path):
    for at in range(3):
        write_rows(tmp_path / f"in-{at}.jsonl", 40, start=100 * at)
    job = write_job(tmp_path, str(tmp_path / "in-*.jsonl"))
    summary_of(job)
    (tmp_path / "in-0.jsonl").rename(tmp_path / "in-5.jsonl")  # The same rows by another name.
    (tmp_path / "in-1.jsonl").unlink()
    write_rows(tmp_path / "in-2.jsonl", 30, start=210)  # The first ten lines are gone.
    write_rows(tmp_path / "in-6.jsonl", 20, start=600)
    found = plan_of(job)
    rows = found["rows"]
    assert (rows["num_rows"], rows["num_reused"]) == (90, 70)
    assert (rows["num_new"], rows["num_edited"], rows["num_unread"]) == (20, 0, 0)
    assert any(" is gone" in text or "2 input files" in text for text in found["warnings"])
    assert computed(summary_of(job)) == found["todo"]["num_to_compute"]


def test_an_interrupted_run_is_gone_on_with(job, tmp_path):
    slow = ("--set", "model.engine.step_s=0.02", "--set", "run.flush_rows=5")
    one = ("--set", "model.engine.max_num_seqs=1")
    process = subprocess.Popen(
        command("run", job, "--json", *slow, *one), stdout=subprocess.PIPE, text=True
    )
    wait_until(lambda: len(list((tmp_path / "out" / "_batchgen" / "parts").glob("e*"))) > 3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    summary = json.loads(output)
    assert 0 < summary["num_durable"] < 300
    found = plan_of(job, *slow)
    assert found["is_continued"]
    assert found["rows"]["num_done"] == summary["num_durable"]
    assert found["todo"]["num_rows"] == 300 - summary["num_durable"]
    edit(tmp_path / "in.jsonl", 0)
    moved = plan_of(job, *slow)
    assert not moved["is_continued"]
    assert moved["rows"]["num_reused"] == summary["num_durable"] - 1
    assert computed(summary_of(job, *slow)) == moved["todo"]["num_to_compute"]


def test_error_rows_are_again_to_do_with_retry_errors(job):
    num_errors = summary_of(job, *SHORT)["num_errors"]
    assert num_errors > 6
    assert plan_of(job, *SHORT)["state"] == "nothing_to_do"
    found = plan_of(job, *SHORT, "--retry-errors")
    assert (found["state"], found["plan_number"]) == ("ready", 2)
    assert found["rows"]["num_again"] == found["todo"]["num_rows"] == num_errors
    assert found["rows"]["num_reused"] == 300 - num_errors


def test_a_changed_recipe_is_refused_with_its_diff_and_the_ways_on(job):
    summary_of(job)
    changed = ("--set", "prompt.user=Say again: {{ text }}")
    done = run_cli("plan", job, *changed)
    assert done.returncode == 2
    assert done.stdout.startswith("refused: ")
    assert "prompt.user: 'Repeat: {{ text }}' -> 'Say again: {{ text }}'" in done.stdout
    assert "--accept-recipe" in done.stdout
    assert plan_of(job, *changed, code=2)["state"] == "refused"
    found = plan_of(job, *changed, "--accept-recipe")
    assert found["rows"]["num_new"] == 300
    some = plan_of(job, *changed, "--accept-recipe", "--only-errors")
    assert some["rows"]["num_reused"] == 294
    assert some["rows"]["num_again"] == 6


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--set", "input.path=no.jsonl"), "names no file"),
        (("--set", "prompt.user={{ titel }}"), "no column 'titel'"),
        (("--set", "model.engine.steps=1"), "unknown option 'steps'"),
        (("--set", "run.flushs=1"), "unknown key"),
        (("--fresh", "--retry-errors"), "expected one of them"),
        (("--set", "output.path=in.jsonl"), "is a file, expected a folder"),
    ],
)
def test_what_would_refuse_a_run_refuses_its_plan(job, args, reason):
    found = plan_of(job, *args, code=2)
    assert (found["state"], found["todo"]) == ("refused", None)
    assert reason in found["reason"]
    ran = run_cli("run", job, *args)
    assert ran.returncode == 2
    assert reason in ran.stderr


@pytest.mark.parametrize(
    ("args", "reason"), [(("--rate", "fast"), "is no rate"), (("--gpu-cost", "x"), "is no price")]
)
def test_a_wrong_option_is_refused(job, args, reason):
    done = run_cli("plan", job, *args)
    assert done.returncode == 2
    assert reason in done.stderr


def test_a_run_that_is_at_work_is_told_of_and_refuses_no_plan(job, tmp_path):
    lock = RunLock(LocalStorage(tmp_path / "out"), "the-other-run")
    lock.acquire()
    found = plan_of(job)
    lock.release()
    assert found["state"] == "ready"
    assert "run the-other-run" in found["warnings"][0]
    assert plan_of(job)["warnings"] == []


def test_the_last_run_says_how_long_it_takes(job, tmp_path):
    slow = ("--set", "model.engine.step_s=0.01")
    past = summary_of(job, *slow)
    run = past["run"]
    edit(tmp_path / "in.jsonl", *range(10))
    found = plan_of(job, *slow)
    last, estimate = found["last_run"], found["estimate"]
    assert (last["run_id"], last["is_same_recipe"]) == (past["run_id"], True)
    assert last["num_rows"] == computed(past)
    tokens = run["num_prompt_tokens"] + run["num_output_tokens"]
    assert estimate["rate"]["unit"] == "tokens"  # Edited texts are far shorter.
    assert estimate["rate"]["per_s"] == pytest.approx(tokens / run["working_s"])
    assert (estimate["num_gpus"], estimate["gpu_hours"]) == (0, 0)
    given = plan_of(job, *slow, "--rate", "4rows/s", "--gpu-cost", "3EUR")["estimate"]
    assert given["work_s"] == 2.5
    assert given["rate"]["source"] == "--rate"
    other = plan_of(job, *slow, "--set", "prompt.user=Another: {{ text }}", "--fresh")
    assert other["last_run"]["is_same_recipe"] is False


def test_rows_that_are_all_there_are_only_published(job):
    strict = ("--set", "gate.max_error_rate=0.001")
    assert run_cli("run", job, *strict).returncode == 3
    found = plan_of(job)
    assert found["rows"]["num_done"] == 300
    assert found["todo"] is None
    assert any("would only publish" in text for text in found["warnings"])


def test_a_sample_says_that_it_is_one(job):
    def config():
        return load(job)

    found = foresee(config, PlanOptions(sample_rows=100))
    assert found.survey is not None
    assert (found.survey.is_exact, found.survey.num_looked) == (False, 100)
    text = found.as_text()
    assert "of a sample of 100 of 300 rows" in text
    assert "  prompts  ~" in text
    assert "  engine   " not in text  # It chooses nothing for an engine that is not vLLM on a GPU.
    chosen = replace(found, settings={"cudagraph_capture_sizes": [8, 1024]}).as_text()
    assert "  engine   CUDA graphs for up to 1,024 rows at once\n" in chosen
    exact = foresee(config, DEFAULTS).as_text()
    assert "~" not in exact
    assert "300 rows, told of all" in exact


def test_without_a_rate_it_says_how_to_get_one(job):
    done = run_cli("plan", job)
    assert done.returncode == 0
    assert "cannot be told" in done.stdout
    assert "--rate 250rows/s" in done.stdout


@pytest.mark.vllm
def test_exact_counts_are_those_that_vllm_publishes(tmp_path):
    for name in ("quickstart.toml", "ticket.schema.json"):
        shutil.copy(ROOT / "jobs" / name, tmp_path)
    job, out = tmp_path / "quickstart.toml", tmp_path / "out"
    sample = ROOT / "sample_data"
    args = (
        *("--set", f"input.path={sample}/tickets.jsonl", "--set", f"output.path={out}"),
        *("--set", f"model.name={sample}/model", "--set", "input.limit=60"),
        # Some prompts are longer than this, and none so long that it has no answer at all.
        *("--set", "model.max_model_len=160"),
    )
    found = plan_of(job, "--exact", *args)
    assert not out.exists()
    done = run_cli("run", job, "--json", "--publish-anyway", *args, timeout=280)
    summary = json.loads(done.stdout)
    rows = batchgen.read(out).collect()
    todo = found["todo"]
    lengths = rows.filter(pl.col("gen_run_id") == summary["run_id"])["gen_num_prompt_tokens"]
    assert todo["num_to_compute"] == computed(summary)
    assert todo["prompt_tokens"] == summary["run"]["num_prompt_tokens"]
    assert todo["lengths"]["longest"] == lengths.max()
    assert todo["num_tight"] > 0
    assert found["max_model_len"] == summary["engine"]["max_model_len"] == 160
    assert todo["max_output_tokens"] >= summary["run"]["num_output_tokens"]
