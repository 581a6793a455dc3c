"""Old snapshots through the real command line: listed, read, compared, pruned."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

import batchgen
from batchgen.core.errors import OutputError
from batchgen.store.books import STATE
from tests.e2e.support import command, run_cli, wait_until, write_job

if TYPE_CHECKING:
    from pathlib import Path

LABELS = ["refund", "invoice", "other"]


def write_input(folder: Path, rows: list[dict[str, Any] | str]) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def first_night() -> list[dict[str, Any] | str]:
    """50 rows, the label of each in its text; one is bad, one blank."""
    rows: list[dict[str, Any] | str] = [
        {"id": number, "text": LABELS[number % 3], "note": f"note {number}"} for number in range(50)
    ]
    rows[10], rows[20] = "{bad", ""
    return rows


def second_night() -> list[dict[str, Any] | str]:
    """One answer and one note edited, five rows gone, two rows came."""
    rows = first_night()
    rows[3] = {"id": 3, "text": "invoice", "note": "note 3"}
    rows[4] = {"id": 4, "text": "invoice", "note": "edited"}
    del rows[30:35]
    return [*rows, *({"id": number, "text": "other", "note": ""} for number in (50, 51))]


def run(job: Path, *args: str) -> None:
    done = run_cli("run", job, *args)
    assert done.returncode == 0, done.stderr


def from_json(*args: str | Path) -> dict[str, Any]:
    done = run_cli(*args, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def make_nights(folder: Path) -> Path:
    """A job with snapshots of two nights."""
    write_input(folder, first_night())
    job = write_job(folder, "in.jsonl", prompt={"user": "{{ text }}"}, output={"choice": LABELS})
    run(job)
    write_input(folder, second_night())
    run(job, "--fresh")
    return job


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only to be looked at."""
    return make_nights(tmp_path_factory.mktemp("nights"))


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """To be changed."""
    return make_nights(tmp_path)


def test_snapshots_are_listed_with_the_newest_last(nights: Path) -> None:
    found = from_json("snapshots", nights)
    assert found["output"] == str(nights.parent / "out")
    first, second = found["snapshots"]
    assert [entry["number"] for entry in (first, second)] == [1, 2]
    assert [(entry["num_ok"], entry["num_errors"]) for entry in (first, second)] == [
        (48, 1),
        (45, 1),
    ]
    assert [entry["is_shown"] for entry in (first, second)] == [False, True]
    assert first["recipe"] == second["recipe"]
    files = (nights.parent / "out" / STATE / "files").glob("e000001-*")
    assert first["size_bytes"] == sum(path.stat().st_size for path in files)
    lines = run_cli("snapshots", nights.parent / "out").stdout.splitlines()
    assert len(lines) == 2
    assert f"run {first['run_id']}  recipe {first['recipe'][:12]}  48 ok, 1 errors" in lines[0]
    assert lines[1].endswith("  shown")


def test_a_snapshot_that_was_let_through_the_gate_is_marked(job: Path) -> None:
    run(job, "--fresh", "--publish-anyway", "--set", "gate.max_error_rate=0.001")
    assert from_json("snapshots", job)["snapshots"][2]["overridden"] == ["max_error_rate"]
    line = run_cli("snapshots", job).stdout.splitlines()[2]
    assert line.endswith("  shown, over gate.max_error_rate")


def test_nothing_published_is_no_error(tmp_path: Path) -> None:
    write_input(tmp_path, first_night())
    job = write_job(tmp_path, "in.jsonl")
    done = run_cli("snapshots", job)
    told = f"{tmp_path}/out: the job has not been run yet; start it with `batchgen run {job}`\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", told)
    assert from_json("snapshots", job)["snapshots"] == []


def test_an_old_snapshot_stays_readable_by_its_number(nights: Path) -> None:
    out = nights.parent / "out"
    assert batchgen.read(nights).collect().equals(batchgen.read(out, 2).collect())
    assert len(batchgen.read(out, snapshot=1).collect()) == 49
    with pytest.raises(OutputError, match="there is no snapshot 3, expected one of: 1, 2"):
        batchgen.read(out, 3)
    shown = run_cli("show", nights, "--snapshot", "1", "-n", "100").stdout
    assert shown.count("--- row") == 49
    assert run_cli("show", nights, "-n", "100").stdout.count("--- row") == 46
    assert run_cli("show", nights, "--snapshot", "1", "--errors").stdout.count("bad_json") == 1
    assert run_cli("show", nights, "--snapshot", "3").returncode == 2


def test_an_old_snapshot_is_shown_while_a_newer_plan_is_unfinished(job: Path) -> None:
    held_back = run_cli("run", job, "--fresh", "--set", "gate.max_error_rate=0.001")
    assert held_back.returncode == 3
    assert run_cli("show", job, "--snapshot", "1", "-n", "100").stdout.count("--- row") == 49


@pytest.mark.parametrize("on", [(), ("--on", "id")])
def test_diff_counts_rows_and_says_how_labels_moved(nights: Path, on: tuple[str, ...]) -> None:
    found = from_json("diff", nights, *on)
    counts = {name: value for name, value in found.items() if name.startswith("num_")}
    num_without_key = [1, 1] if on else [0, 0]  # The bad row has no id.
    assert counts == {
        "num_old": 49,
        "num_new": 46,
        "num_same": 41 + (not on),
        "num_added": 2,
        "num_removed": 5,
        "num_input_changed": 2,
        "num_answer_changed": 0,
        "num_without_key": num_without_key,
    }
    (labels,) = found["labels"]
    assert labels["column"] == "gen_label"
    assert labels["before"] == {"refund": 17, "invoice": 16, "other": 15}
    assert labels["after"] == {"refund": 14, "invoice": 15, "other": 16}
    moved = [move for move in labels["moves"] if move["old"] != move["new"]]
    assert moved == [{"old": "refund", "new": "invoice", "num_rows": 1}]
    num_stayed = sum(move["num_rows"] for move in labels["moves"]) - 1
    assert num_stayed == 42 + (not on)
    first, second = found["examples"]
    assert first["where"] == ("id = 3" if on else f"{nights.parent}/in.jsonl row 3")
    assert first["columns"]["gen_label"] == ["refund", "invoice"]
    assert second["columns"] == {"note": ["note 4", "edited"]}


def test_diff_is_printed_for_people(nights: Path) -> None:
    done = run_cli("diff", nights.parent / "out", "-n", "1")
    assert done.returncode == 0, done.stderr
    drift = from_json("diff", nights)["labels"][0]["drift"]
    assert done.stdout.splitlines() == [
        "snapshot 1 -> 2, rows paired by equal content and place in the input",
        "  rows     49 -> 46: 2 added, 5 removed, 2 changed, 42 same",
        "  changed  2 in their input, 0 in their answer only",
        "  edited   some of those added and removed may be one row that was edited, which only a "
        "key can tell: --on COL",
        f"labels gen_label, drift {drift:.3g}",
        "  other                  15 -> 16",
        "  invoice                16 -> 15",
        "  refund                 17 -> 14",
        "  1 rows: refund -> invoice",
        f"--- {nights.parent}/in.jsonl row 3: input changed",
        "text                     'refund' -> 'invoice'",
        "gen_label                'refund' -> 'invoice'",
        "gen_text                 'refund' -> 'invoice'",
    ]


def test_diff_of_another_recipe_compares_what_both_have(job: Path) -> None:
    chosen = {"input": {"columns": ["id", "text"]}, "prompt": {"user": "{{ text }}"}}
    run(write_job(job.parent, "in.jsonl", **chosen), "--fresh")
    found = from_json("diff", job, "2", "3")
    assert (found["columns_went"], found["columns_came"]) == (["note", "gen_label"], [])
    assert (found["labels"], found["num_same"], found["num_input_changed"]) == ([], 46, 0)
    lines = run_cli("diff", job, "3", "2").stdout.splitlines()
    assert "  columns  came: note, gen_label" in lines


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["1"], "1 snapshot given, expected none or two: OLD NEW"),
        (["1", "7"], "there is no snapshot 7, expected one of: 1, 2"),
        (["--on", "text"], "rows of snapshot 1, expected in one; name more columns"),
        (["--on", "idd"], "has no column 'idd', expected one of: id, text, note"),
    ],
)
def test_a_diff_that_cannot_be_is_refused(nights: Path, args: list[str], problem: str) -> None:
    done = run_cli("diff", nights, *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


def test_prune_keeps_the_newest_and_what_is_left_is_whole(job: Path) -> None:
    run(job, "--fresh")
    would = from_json("prune", job, "--keep", "2", "--dry-run")
    assert (would["dry_run"], [entry["number"] for entry in would["removed"]]) == (True, [1])
    assert len(from_json("snapshots", job)["snapshots"]) == 3
    done = run_cli("prune", job.parent / "out", "--keep", "2")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith("1 of 3 snapshots and 1 run folder removed, ")
    assert [entry["number"] for entry in from_json("snapshots", job)["snapshots"]] == [2, 3]
    files = (job.parent / "out" / STATE / "files").iterdir()
    assert {path.name[:7] for path in files} == {"e000002", "e000003"}
    assert from_json("verify", job)["problems"] == []
    assert len(batchgen.read(job, 2).collect()) == 46
    assert run_cli("show", job, "--snapshot", "1").returncode == 2
    assert from_json("prune", job, "--keep", "2")["removed"] == []


def test_a_run_after_pruning_goes_on_as_before(job: Path) -> None:
    assert len(from_json("prune", job, "--keep", "1")["removed"]) == 1
    again = from_json("run", job)
    assert again["state"] == "nothing_to_do"
    run(job, "--fresh")
    assert [entry["number"] for entry in from_json("snapshots", job)["snapshots"]] == [2, 3]


def test_prune_needs_a_number_of_at_least_one(nights: Path) -> None:
    assert run_cli("prune", nights).returncode == 2
    assert run_cli("prune", nights, "--keep", "0").returncode == 2
    assert len(from_json("snapshots", nights)["snapshots"]) == 2


def test_prune_exits_75_while_a_run_is_at_work(job: Path) -> None:
    step = ("--set", "model.engine.step_s=2")  # Three texts, three steps: equal rows run once.
    one = ("--set", "model.engine.max_num_seqs=1")
    parts = job.parent / "out" / STATE / "parts"
    with subprocess.Popen(
        command("run", job, "--fresh", "--set", "run.flush_rows=1", *one, *step),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        wait_until(lambda: any(parts.glob("*.parquet")))
        done = run_cli("prune", job, "--keep", "1")
        process.send_signal(signal.SIGKILL)
    assert done.returncode == 75
    assert f"process {process.pid} on" in done.stderr
    assert done.stderr.rstrip().endswith("prune when it has ended")
    # Nobody holds the job any more; the unfinished plan's own parts stay.
    num_parts = len(list(parts.iterdir()))
    assert len(from_json("prune", job, "--keep", "1")["removed"]) == 1
    assert len(list(parts.iterdir())) == num_parts > 0
    run(job, *step)
    assert len(batchgen.read(job).collect()) == 46
