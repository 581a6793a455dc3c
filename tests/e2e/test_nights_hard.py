"""Nights that want to go wrong: files that move under a run, equal rows with answers of their own,
errors that stay, input that does not arrive. Each is compared with what a new job would publish."""

from __future__ import annotations

import json
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import pytest

import batchgen
from batchgen.core.errors import (
    EngineError,
    GateError,
    InputChangedError,
    RecipeChangedError,
    SourceError,
)
from batchgen.job.load import load_job
from batchgen.pipeline.compute import OneEngine
from batchgen.pipeline.context import RunOptions, StopSwitch
from batchgen.pipeline.job_run import JobRun
from batchgen.source.files import InputStat
from batchgen.storage import LocalStorage
from batchgen.store.ledger import Ledger
from tests.e2e.support import published, run_cli, write_job
from tests.fakes import FakeEngine, as_version_1, put_version_1
from tests.harm import overwrite

if TYPE_CHECKING:
    from pathlib import Path


FAST = ["model.engine.max_num_seqs=1000"]
"""Speed is no part of the recipe."""


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def numbered(start: int, stop: int) -> list[dict[str, Any]]:
    return [{"id": n, "text": f"row {n}", "pad": "x" * 500} for n in range(start, stop)]


def recomputed(folder: Path, job: Path) -> list[dict[str, Any]]:
    """What a new job publishes for the same input."""
    out = folder / "whole" / "out"
    batchgen.run(job, overrides=[f"output.path={out}"])
    return published(out)


def test_a_file_rewritten_in_place_under_a_run_costs_no_row_and_misplaces_none(
    tmp_path: Path,
) -> None:
    """As `cp` and `rsync --inplace` do: what was read before is the old file's."""
    source = tmp_path / "in.jsonl"
    rows = numbered(0, 8000)
    write_lines(source, rows)
    engine = {"max_num_seqs": 50, "step_s": 0.005}
    job = write_job(
        tmp_path,
        "in.jsonl",
        input={"columns": ["id", "text"]},
        model={"engine": engine},
        run={"flush_rows": 200, "max_in_flight": 50},
    )

    def rewrite() -> None:
        parts = tmp_path / "out" / "_batchgen" / "parts"
        while len(list(parts.glob("e*.parquet"))) < 3:
            time.sleep(0.01)
        with source.open("r+", encoding="utf-8") as file:
            for row in [{"id": -1, "text": "brand new", "pad": "x" * 500}, *rows]:
                file.write(json.dumps(row) + "\n")

    thread = threading.Thread(target=rewrite)
    thread.start()
    with pytest.raises(InputChangedError, match="must not change while a job runs"):
        batchgen.run(job)
    thread.join()
    summary = batchgen.run(job, overrides=["run.max_in_flight=2000", *FAST])
    assert summary.num_carried >= 200
    assert [row["id"] for row in published(tmp_path / "out")] == [-1, *range(8000)]
    answers = batchgen.read(job).select("text", "gen_text").collect()
    assert all(text in answer for text, answer in answers.iter_rows())


def test_input_that_did_not_arrive_is_refused_and_what_is_published_stays(tmp_path: Path) -> None:
    for day in ("2026-11-01", "2026-11-02"):
        write_lines(tmp_path / f"{day}.jsonl", numbered(0, 3))
    (tmp_path / "2026-11-02.jsonl").unlink()
    job = write_job(tmp_path, "{date}.jsonl")
    assert run_cli("run", job, "--date", "2026-11-01").returncode == 0
    night = run_cli("run", job, "--date", "2026-11-02")
    assert night.returncode == 2
    assert "2026-11-02.jsonl: names no file" in night.stderr
    assert len(published(tmp_path / "out")) == 3


def test_fewer_files_or_another_order_is_a_change(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", numbered(0, 3))
    write_lines(tmp_path / "b.jsonl", numbered(3, 5))
    job = write_job(tmp_path, "*.jsonl")
    batchgen.run(job)
    batchgen.run(job, overrides=["input.path=['b.jsonl', 'a.jsonl']"])
    assert [row["id"] for row in published(tmp_path / "out")] == [3, 4, 0, 1, 2]
    narrowed = batchgen.run(job, overrides=["input.path=a.jsonl"])
    assert [row["id"] for row in published(tmp_path / "out")] == [0, 1, 2]
    assert narrowed.run["num_ok"] == 0
    assert " is gone" in narrowed.warnings[0]
    with pytest.raises(SourceError):
        batchgen.run(job, overrides=["input.path=nosuch.jsonl"])


@pytest.mark.parametrize("dedupe", ["auto", "never"])
def test_equal_rows_with_draws_of_their_own_do_not_share_one(tmp_path: Path, dedupe: str) -> None:
    def write(num_rows: int) -> None:
        pl.DataFrame({"id": range(num_rows), "text": ["same"] * num_rows}).write_csv(
            tmp_path / "in.csv"
        )

    write(5)
    job = write_job(
        tmp_path,
        "in.csv",
        sampling={"temperature": 0.8},
        output={"with_seed": True},
        run={"dedupe": dedupe},
    )
    batchgen.run(job)
    write(6)
    summary = batchgen.run(job)
    now = set(batchgen.read(job).collect()["gen_seed"])
    assert len(now) == 6
    assert summary.num_copied == 1  # The first keeps its answer; the others are drawn anew.


def test_a_broken_off_sampled_job_gives_each_equal_row_its_own_draw(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [{"text": "same"}] * 400)
    job = write_job(
        tmp_path,
        "in.jsonl",
        sampling={"temperature": 0.8},
        output={"with_seed": True},
        model={"engine": {"max_num_seqs": 1, "step_s": 0.02}},
        run={"flush_rows": 5, "max_in_flight": 1},
    )
    stopped = batchgen.run(job, max_runtime_s=4)
    assert stopped.state == "stopped"
    assert 0 < stopped.num_durable < 400
    batchgen.run(job, overrides=["run.max_in_flight=200", *FAST])
    assert batchgen.read(job).collect()["gen_seed"].n_unique() == 400


def test_errors_that_did_not_change_stay_also_where_rules_read_the_input(tmp_path: Path) -> None:
    """Of a CSV file, whose rows are told by their requests."""

    def write(num_rows: int, kind: str = "b") -> None:
        kinds = ["a" if n % 3 else kind for n in range(num_rows)]
        texts = [f"row {n} " + "long " * (n % 2 * 50) for n in range(num_rows)]
        pl.DataFrame({"text": texts, "kind": kinds}).write_csv(tmp_path / "in.csv")

    write(12)
    job = write_job(
        tmp_path,
        "in.csv",
        checks={"rules": ["kind = 'a'"], "allow_truncated": False},
        gate={"max_error_rate": 1},
    )
    first = batchgen.run(job)
    assert first.num_errors == 8
    write(13)
    second = batchgen.run(job)
    assert (second.num_copied, second.run["num_ok"] + second.run["num_errors"]) == (12, 1)
    assert published(tmp_path / "out") == recomputed(tmp_path, job)
    write(13, kind="a")  # Now the rule lets them pass: the answer has to be asked for again.
    third = batchgen.run(job)
    assert third.num_ok > second.num_ok
    assert [row["gen_status"] for row in published(tmp_path / "out")] == [
        "error" if n % 2 else "ok" for n in range(13)
    ]


def test_a_state_that_tells_nothing_is_never_equal() -> None:
    """Some HTTP servers give neither ETag nor time: such a file is read to be compared."""
    stat = InputStat(5, "")
    assert not stat.is_still(InputStat(5, ""))
    assert InputStat(5, "1").is_still(InputStat(5, "1"))
    assert not InputStat(5, "1").is_still(InputStat(5, "2"))


def test_a_folder_of_others_is_told_to_the_hook_too(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", numbered(0, 1))
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("mine", encoding="utf-8")
    told = tmp_path / "told.json"
    command = ["sh", "-c", f"cat > {told}"]
    job = write_job(tmp_path, "in.jsonl", run={"on_finish": command})
    assert run_cli("run", job).returncode == 2
    assert json.loads(told.read_text(encoding="utf-8"))["state"] == "refused"
    assert [path.name for path in out.iterdir()] == ["diary.txt"]


def test_a_rotated_log_is_known_by_its_content(tmp_path: Path) -> None:
    """Also where requests could not tell, since they are those of another recipe."""
    write_lines(tmp_path / "current.jsonl", numbered(0, 50))
    job = write_job(tmp_path, "*.jsonl")
    batchgen.run(job)
    accepted = batchgen.run(
        job, overrides=["sampling.max_tokens=30"], accept_recipe=True, only_errors=True
    )
    assert (accepted.num_carried, accepted.run["num_ok"]) == (50, 0)
    (tmp_path / "current.jsonl").rename(tmp_path / "2026-11-22.jsonl")
    write_lines(tmp_path / "current.jsonl", numbered(50, 100))
    night = batchgen.run(job, overrides=["sampling.max_tokens=30"])
    assert (night.num_carried, night.run["num_ok"]) == (50, 50)
    told = run_cli("diff", job, "--json")
    assert json.loads(told.stdout)["num_added"] == 50
    assert json.loads(told.stdout)["num_input_changed"] == 0


def test_a_deadline_that_is_over_starts_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", numbered(0, 5))
    job = write_job(tmp_path, "in.jsonl")
    stopped = batchgen.run(job, max_runtime_s=0.1)
    assert (stopped.exit_code, stopped.engine, stopped.num_planned) == (75, {}, 0)
    assert "max runtime" in str(stopped.reason)
    assert batchgen.run(job).num_ok == 5


def test_what_a_run_that_was_killed_while_it_planned_has_left_is_removed(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", numbered(0, 5))
    job = write_job(tmp_path, "in.jsonl")
    batchgen.run(job)
    left = tmp_path / "out" / "_batchgen" / "rows" / ".scan.20261101T000000-abcdef-1.tmp"
    left.write_bytes(b"digests")
    write_lines(tmp_path / "in.jsonl", numbered(0, 6))
    batchgen.run(job)
    assert not left.exists()


def test_a_day_without_rows_is_published_as_one_where_the_job_says_so(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", numbered(0, 5))
    job = write_job(tmp_path, "in.jsonl")
    batchgen.run(job)
    write_lines(tmp_path / "in.jsonl", [])
    with pytest.raises(GateError, match=r"0 rows are 5 fewer than .*, over gate\.max_shrink"):
        batchgen.run(job)
    assert batchgen.read(job).collect().height == 5
    assert batchgen.run(job, overrides=["gate.max_shrink=1"]).state == "complete"
    frame = batchgen.read(job).collect()
    assert (frame.height, "text" in frame.columns) == (0, True)


def test_without_its_index_a_snapshot_still_answers_by_key_and_a_plan_says_so(
    tmp_path: Path,
) -> None:
    write_lines(tmp_path / "in.jsonl", numbered(0, 20))
    job = write_job(tmp_path, "in.jsonl")
    batchgen.run(job)
    ledger = Ledger(LocalStorage(tmp_path / "out"))
    put_version_1(ledger, as_version_1(ledger.storage, ledger.latest_manifest(), ledger.plan(1)))
    (index,) = (tmp_path / "out" / "_batchgen" / "snapshots").glob("*/index.parquet")
    damaged = bytearray(index.read_bytes())
    damaged[10] ^= 1
    overwrite(index, damaged)
    write_lines(tmp_path / "in.jsonl", numbered(0, 21))
    plan = run_cli("plan", job, "--exact", "--json")
    assert plan.returncode == 0, plan.stderr
    night = batchgen.run(job)
    assert (night.num_carried, night.num_copied, night.run["num_ok"]) == (0, 20, 1)
    assert any("index.parquet: damaged" in text for text in night.warnings)
    assert published(tmp_path / "out") == recomputed(tmp_path, job)


class NoEngine(FakeEngine):
    """Says when it is first used that it has not started."""

    warnings: ClassVar[list[str]] = []

    def add(self, requests: object) -> None:
        msg = "model.engine.enforce_egar: unknown option"
        raise EngineError(msg)


def fail_to_start(job: Path, **options: bool) -> None:
    """A run whose engine does not start, as vLLM's tells: some time after the plan is put."""
    build: Any = lambda *_, **__: NoEngine()  # noqa: E731
    compute = partial(OneEngine, build=build)
    made = load_job(job)
    with pytest.raises(EngineError, match="enforce_egar"):
        JobRun(made, stop=StopSwitch(), options=RunOptions(**options), compute=compute).run()


def typo(folder: Path, **tables: Any) -> Path:
    engine = {"backend": "echo", "engine": {"enforce_egar": True}}
    return write_job(folder, "in.jsonl", model=engine, **tables)


def test_a_start_that_failed_does_not_pin_the_job(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", numbered(0, 5))
    fail_to_start(typo(tmp_path))
    fail_to_start(typo(tmp_path, prompt={"user": "{{ id }}"}))
    job = write_job(tmp_path, "in.jsonl")
    foreseen = json.loads(run_cli("plan", job, "--json").stdout)
    summary = batchgen.run(job)
    assert (summary.state, summary.num_ok) == ("complete", 5)
    (warning,) = summary.warnings
    assert warning == ("plan 2 came to nothing, and the job is another now: a new plan replaces it")
    assert (foreseen["exit_code"], foreseen["warnings"]) == (0, [warning])
    assert foreseen["plan_number"] == 3
    assert run_cli("verify", job).returncode == 0


def test_rows_that_no_engine_has_answered_do_not_pin_the_job(tmp_path: Path) -> None:
    """Broken lines and rows taken over are committed before the engine is up."""
    source = tmp_path / "in.jsonl"
    write_lines(source, numbered(0, 5))
    gate = {"max_error_rate": 1.0}
    job = write_job(tmp_path, "in.jsonl", gate=gate)
    batchgen.run(job)
    with source.open("a") as file:
        file.writelines('{"broken\n' for _ in range(21))
        file.write('{"id": 9, "text": "new"}\n')
    write_job(tmp_path, "in.jsonl", gate=gate, prompt={"user": "{{ id }}"})
    fail_to_start(job, accept_recipe=True, only_errors=True)
    parts = (tmp_path / "out/_batchgen/parts").iterdir()
    assert sum(len(pl.read_parquet(part)) for part in parts) == 26
    write_job(tmp_path, "in.jsonl", gate=gate)
    summary = batchgen.run(job)
    assert (summary.state, summary.num_ok, summary.num_errors) == ("complete", 6, 21)
    assert summary.run["num_ok"] == 1


def test_a_start_that_failed_does_not_open_the_way_over_what_is_published(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", numbered(0, 5))
    job = write_job(tmp_path, "in.jsonl")
    first = batchgen.run(job)
    with pytest.raises(RecipeChangedError):
        batchgen.run(typo(tmp_path))
    fail_to_start(job, accept_recipe=True)
    write_job(tmp_path, "in.jsonl", prompt={"user": "{{ id }}"})
    with pytest.raises(RecipeChangedError) as caught:
        batchgen.run(job)
    assert caught.value.changes == ("prompt.user: 'Repeat: {{ text }}' -> '{{ id }}'",)
    job = write_job(tmp_path, "in.jsonl")  # Undone: everything is known.
    again = batchgen.run(job)
    assert (again.state, again.num_carried, again.run["num_ok"]) == ("complete", 5, 0)
    rows = batchgen.read(job).collect()
    assert set(rows["gen_run_id"]) == {first.run_id}


def test_a_filter_that_matched_nothing_is_mended_without_ado(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", numbered(0, 5))
    job = write_job(tmp_path, "in.jsonl")
    batchgen.run(job)
    write_job(tmp_path, "in.jsonl", input={"where": "id > 100"})
    with pytest.raises(
        GateError, match=r"look at input\.path, input\.where and input\.limit; to publish"
    ):
        batchgen.run(job)
    write_job(tmp_path, "in.jsonl", input={"where": "id > 1"})
    mended = batchgen.run(job)
    assert (mended.num_ok, mended.num_skipped, mended.run["num_ok"]) == (3, 2, 0)


def test_only_errors_says_which_files_run_whole(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("id,text\n1,a\n2,b\n3,c\n")
    job = write_job(tmp_path, "in.csv")
    batchgen.run(job)
    path.write_text("id,text\n1,a\n2,B!\n3,c\n")
    job = write_job(tmp_path, "in.csv", prompt={"user": "Say: {{ text }}"})
    how = ("--accept-recipe", "--only-errors")
    foreseen = json.loads(run_cli("plan", job, *how, "--json").stdout)
    summary = batchgen.run(job, accept_recipe=True, only_errors=True)
    assert summary.run["num_ok"] == 3
    in_python = [told.replace("--only-errors", "only_errors=True") for told in foreseen["warnings"]]
    assert summary.warnings == in_python
    assert foreseen["warnings"] == [
        f"--only-errors: 3 rows of {path} run again, edited or not: which rows of a csv file were "
        "edited cannot be told across recipes"
    ]
