"""A try-out shows a sample beside what is published, binds nothing, and its answers are used."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

import batchgen
from batchgen.core.errors import BusyError, ConfigError, RecipeChangedError
from batchgen.pipeline.context import Stop, StopSwitch
from batchgen.quality.try_out import TryOptions, try_out
from batchgen.storage import LocalStorage
from batchgen.store.books import PARTS, TRIES
from batchgen.store.ledger import Ledger
from batchgen.store.runs import RunLock
from tests.e2e.support import (
    command,
    published,
    run_cli,
    summary_of,
    wait_until,
    write_job,
    write_rows,
)
from tests.harm import flip

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 200
OTHER = "prompt.user=Say: {{ text }}"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_rows(tmp_path / "in.jsonl", ROWS)
    return write_job(tmp_path, "in.jsonl")


def state_of(folder: Path) -> dict[str, bytes]:
    """Every file of an output but those of its try-outs."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_relative_to(folder / TRIES)
    }


def ids(tried: Any) -> list[int]:
    return [int(row["where"].rpartition(" ")[2]) for row in tried.rows]


def test_a_try_of_another_prompt_shows_both_answers_and_moves_nothing(job: Path) -> None:
    batchgen.run(job)
    before = state_of(job.parent / "out")
    tried = batchgen.try_out(job, 20, overrides=[OTHER])
    assert state_of(job.parent / "out") == before
    assert (len(tried.rows), tried.num_published, tried.num_same) == (20, 20, 0)
    first = tried.rows[0]
    assert first["prompt"] == "[user]\nSay: row 0 "
    assert first["answer"]["gen_text"] == "Say: row 0 "
    assert first["published"]["gen_text"] == "Repeat: row 0 "
    text = run_cli("try", job, "-n", "20", "--set", OTHER).stdout
    assert "of 20 that snapshot 1 has, 0 have the same answer" in text
    assert "(published: Repeat: row 0 )" in text
    assert "nothing is published" in text
    assert "--accept-recipe" in text
    told = json.loads(run_cli("try", job, "-n", "20", "--set", OTHER, "--json").stdout)
    assert told["rows"] == json.loads(json.dumps(tried.as_dict()["rows"]))
    # What runs next is the job as it was, without a question.
    assert batchgen.run(job).state == "nothing_to_do"


def test_the_run_that_follows_takes_the_rows_over(job: Path) -> None:
    tried = batchgen.try_out(job, 30)
    assert tried.snapshot is None
    assert batchgen.run(job).num_copied == tried.summary.num_ok
    rows = published(job.parent / "out")
    plain = write_job(job.parent, "in.jsonl", output={"path": "plain"})
    assert batchgen.run(plain).num_copied == 0
    assert rows == published(job.parent / "plain")


def test_a_changed_recipe_takes_its_own_try_over_and_not_the_old_one(job: Path) -> None:
    batchgen.run(job)
    batchgen.try_out(job, 10)
    batchgen.try_out(job, 25, overrides=[OTHER])
    foretold = json.loads(
        run_cli("plan", job, "--set", OTHER, "--accept-recipe", "--exact", "--json").stdout
    )
    run = batchgen.run(job, overrides=[OTHER], accept_recipe=True)
    assert run.num_copied == 25 == foretold["todo"]["num_known"]
    assert all(row["gen_text"].startswith("Say") for row in published(job.parent / "out")[:25])


def test_begin_anew_is_no_reason_to_look_at_tries(job: Path) -> None:
    batchgen.try_out(job, 30)
    assert batchgen.run(job, fresh=True).num_copied == 0


def test_random_answers_with_a_temperature_are_what_the_run_would_give(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", ROWS)
    job = write_job(tmp_path, "in.jsonl", sampling={"temperature": 0.8}, output={"with_seed": True})
    tried = batchgen.try_out(job, 20, random=True, seed=3)
    assert batchgen.run(job).num_copied == tried.summary.num_ok
    seeds = {row["id"]: row["gen_seed"] for row in published(tmp_path / "out")}
    plain = write_job(
        *(tmp_path, "in.jsonl"),
        sampling={"temperature": 0.8},
        output={"path": "b", "with_seed": True},
    )
    batchgen.run(plain)
    assert seeds == {row["id"]: row["gen_seed"] for row in published(tmp_path / "b")}


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"num_rows": 3}, [0, 1, 2]),
        ({"num_rows": 3, "where": "id > 50"}, [49, 51, 52]),  # A bad line has no id to tell.
        ({"num_rows": 1, "errors": True}, [49]),
        ({"num_rows": 9, "errors": True}, [49, 99, 149, 199]),
        ({"num_rows": 500, "where": "id IN (7, 8)", "random": True}, [7, 8, 49, 99, 149, 199]),
    ],
)
def test_which_rows_are_tried(job: Path, options: dict[str, Any], rows: list[int]) -> None:
    batchgen.run(job)
    assert ids(batchgen.try_out(job, **options)) == rows


def test_random_rows_are_the_seeds(job: Path) -> None:
    first, again, other = (batchgen.try_out(job, 15, random=True, seed=n) for n in (1, 1, 2))
    assert ids(first) == ids(again) != ids(other)
    assert len(set(ids(first))) == 15 == len(first.rows)


def test_edited_and_moved_rows_find_their_published_answer(job: Path) -> None:
    batchgen.run(job)
    path = job.parent / "in.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = json.dumps({"id": 3, "text": "edited"})
    path.write_text("\n".join([json.dumps({"id": -1, "text": "new"}), *lines]) + "\n")
    rows = batchgen.try_out(job, 8).rows
    assert [row["published"] and row["published"]["gen_text"] for row in rows] == [
        None,
        *(f"Repeat: row {n} {'lorem ' * n}"[:40] for n in range(7)),
    ]


def test_errors_that_the_gate_holds_back_can_be_tried(job: Path) -> None:
    held = ["gate.max_error_rate=0.001"]
    with pytest.raises(batchgen.BatchgenError, match="over gate"):
        batchgen.run(job, overrides=held)
    tried = batchgen.try_out(job, errors=True, overrides=held)
    assert ids(tried) == [49, 99, 149, 199]
    assert tried.snapshot is None


def test_a_job_without_errors_has_none_to_try(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 20)
    job = write_job(tmp_path, "in.jsonl")
    for _ in range(2):
        done = run_cli("try", job, "--errors")
        assert done.returncode == 2
        assert "has no error rows to try" in done.stderr
        batchgen.run(job)


@pytest.mark.parametrize("num", [0, -3])
def test_no_rows_are_no_try(job: Path, num: int) -> None:
    with pytest.raises(ConfigError, match="num_rows"):
        batchgen.try_out(job, num)


def test_a_wrong_expression_is_refused_before_anything_is_written(job: Path) -> None:
    done = run_cli("try", job, "--where", "nothing = 1")
    assert done.returncode == 2
    assert "nothing" in done.stderr
    assert not list((job.parent / "out").rglob("*.parquet"))


def test_a_folder_of_someone_elses_is_not_made_ours(job: Path) -> None:
    out = job.parent / "out"
    out.mkdir()
    (out / "theirs.txt").write_text("x")
    done = run_cli("try", job)
    assert done.returncode == 2
    assert [path.name for path in out.iterdir()] == ["theirs.txt"]


def test_a_place_that_cannot_be_written_costs_only_the_keeping(job: Path) -> None:
    batchgen.run(job)
    (job.parent / "out" / TRIES).write_text("in the way, as a folder without rights would be")
    tried = batchgen.try_out(job, 5, overrides=[OTHER])
    assert (len(tried.rows), tried.num_published) == (5, 5)
    assert "the answers are not kept" in tried.notes[0]
    assert "these answers are not kept" in tried.as_text()
    assert batchgen.run(job, overrides=[OTHER], accept_recipe=True).num_copied == 0


@pytest.mark.parametrize("harm", ["flipped", "gone", "no_books", "odd_plan"])
def test_damage_costs_work_and_no_row(job: Path, harm: str) -> None:
    batchgen.try_out(job, 30)
    place = job.parent / "out" / TRIES
    files = list((place / "_batchgen" / "files").glob("*.parquet"))
    if harm == "flipped":
        for path in files:
            flip(path, path.stat().st_size // 3)
    elif harm == "gone":
        for path in files:
            path.unlink()
    elif harm == "no_books":
        (place / "_batchgen" / "plan" / "000001.json").write_bytes(b"{")
    else:
        plan = place / "_batchgen" / "plan" / "000001.json"
        plan.write_text(plan.read_text().replace('"recipe"', '"recipes"'))
    batchgen.run(job)
    rows = published(job.parent / "out")
    shutil.rmtree(job.parent / "out")
    batchgen.run(job)
    assert rows == published(job.parent / "out")


def test_a_try_while_a_run_is_at_work_and_two_tries_at_once(job: Path) -> None:
    batchgen.run(job)
    out = LocalStorage(job.parent / "out")
    lock = RunLock(out, "someone")
    lock.acquire()
    try:
        assert len(batchgen.try_out(job, 4).rows) == 4
    finally:
        lock.release()
    lock = RunLock(LocalStorage(out.path(TRIES)), "someone")
    lock.acquire()
    try:
        with pytest.raises(BusyError):
            batchgen.try_out(job, 4)
    finally:
        lock.release()


SLOW = {"backend": "echo", "engine": {"max_num_seqs": 4, "step_s": 0.02, "max_steps": 6}}


def test_a_try_that_is_killed_binds_nothing_and_its_rows_count(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", ROWS)
    job = write_job(tmp_path, "in.jsonl", model=SLOW, run={"flush_rows": 10})
    place = tmp_path / "out" / TRIES
    with subprocess.Popen(
        command("try", job, "-n", "150"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: len(list(place.glob(f"{PARTS}/*.parquet"))) > 2)
        process.send_signal(signal.SIGKILL)
    ledger = Ledger(LocalStorage(place))
    plan = ledger.latest_plan()
    assert plan is not None
    num_ok = ledger.durable(plan).num_ok
    assert num_ok > 0
    assert run_cli("status", job).stdout.splitlines()[1].endswith(f"batchgen run {job}`")
    summary = summary_of(job)
    assert summary["num_copied"] == num_ok
    assert summary["num_ok"] + summary["num_errors"] == len(published(tmp_path / "out"))


def test_a_try_that_is_stopped_says_so(job: Path) -> None:
    stop = StopSwitch()
    stop.ask()
    assert stop.state is Stop.DRAIN
    tried = try_out(batchgen.api.load(job), TryOptions(num_rows=5), stop)
    assert tried.exit_code == 75
    assert tried.as_text().startswith("stopped: on purpose")


def test_a_refused_recipe_says_what_changed_and_each_way_on_the_try_first(job: Path) -> None:
    batchgen.run(job)
    done = run_cli("run", job, "--set", OTHER)
    assert done.returncode == 2
    run, tried = (f"batchgen {verb} {job} --set '{OTHER}'" for verb in ("run", "try"))
    assert done.stderr.splitlines() == [
        f"batchgen: {job.parent / 'out'}: the job has changed since this output was made:",
        "  prompt.user: 'Repeat: {{ text }}' -> 'Say: {{ text }}'",
        "ways on (what is published stays until a new snapshot is complete):",
        f"  {tried}: see it on some rows first; touches nothing",
        f"  {run} --accept-recipe: every row again, into a new snapshot",
        f"  {run} --accept-recipe --only-errors: only rows that are errors, edited or new",
        "  undo the change: nothing is computed again",
        "  another output.path: beside this one",
    ]
    with pytest.raises(RecipeChangedError) as caught:
        batchgen.run(job, overrides=[OTHER])
    key, _, value = OTHER.partition("=")
    given = f"overrides={ {key: value}!r}"
    assert f"batchgen.try_out({str(job)!r}, {given}): see it" in str(caught.value)


def test_no_hook_and_no_figures_of_a_try(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 20)
    job = write_job(
        *(tmp_path, "in.jsonl"), run={"on_finish": ["touch", "told"], "metrics_file": "m.prom"}
    )
    batchgen.try_out(job, 5)
    assert not (tmp_path / "told").exists()
    assert not (tmp_path / "m.prom").exists()


def test_only_the_last_tries_are_kept(job: Path) -> None:
    for _ in range(7):
        batchgen.try_out(job, 2)
    assert len(list((job.parent / "out" / TRIES).glob("_batchgen/files/*"))) == 5
