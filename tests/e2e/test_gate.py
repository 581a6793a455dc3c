"""The gate and `--retry-errors`, through the real command line on the echo engine."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

import batchgen
from batchgen.core.errors import GateError
from batchgen.storage import LocalStorage
from batchgen.store.books import STATE, Base
from batchgen.store.ledger import Ledger
from tests.e2e.support import (
    command,
    only_shown,
    published,
    run_cli,
    wait_until,
    write_job,
)
from tests.harm import flip

if TYPE_CHECKING:
    from pathlib import Path

NUM_ROWS = 200
STRICT = {"allow_truncated": False}
AGAIN = [{"max_tokens": 100}]
"""The rung that long rows need: no part of the recipe, so a finished job may get it."""


def write_input(folder: Path, num_rows: int = NUM_ROWS) -> None:
    """Every 4th row is too long for max_tokens = 40; some rows are bad, some blank."""
    lines = []
    for number in range(num_rows):
        text = f"row {number} " + "lorem " * (8 if number % 4 == 0 else 1)
        good = json.dumps({"id": number, "text": text})
        lines.append("{bad" if number % 50 == 49 else "" if number % 70 == 69 else good)
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_job(folder: Path, **tables: Any) -> Path:
    return write_job(folder, "in.jsonl", **{"checks": STRICT, "run": {"flush_rows": 20}, **tables})


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a run publishes that had the rung from the start."""
    folder = tmp_path_factory.mktemp("whole")
    write_input(folder)
    job = make_job(folder, retry=AGAIN)
    assert run_cli("run", job).returncode == 0
    rows = published(folder / "out")
    assert {row["gen_status"] for row in rows if row["gen_error_type"] is None} == {"ok"}
    assert sum(row["gen_status"] == "error" for row in rows) == 4
    return rows


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """54 of 198 rows are errors: 50 too long, 4 bad."""
    write_input(tmp_path)
    return make_job(tmp_path)


def give_rung(job: Path, **tables: Any) -> Path:
    return make_job(job.parent, retry=AGAIN, **tables)


def run_json(*args: str | Path, code: int = 0) -> dict[str, Any]:
    done = run_cli("run", *args, "--json")
    assert done.returncode == code, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def ledger_of(job: Path) -> Ledger:
    return Ledger(LocalStorage(job.parent / "out"))


def assert_is_whole(job: Path, expected: list[dict[str, Any]]) -> None:
    assert published(job.parent / "out") == expected
    verdict = json.loads(run_cli("verify", job, "--json").stdout)
    assert verdict["problems"] == []
    assert verdict["num_planned"] == NUM_ROWS


# --- the gate ---------------------------------------------------------------------------------


def test_over_the_error_limit_nothing_is_published_and_examples_are_named(job: Path) -> None:
    done = run_cli("run", job)
    assert done.returncode == 3
    *_, example, bad, limit, hint = done.stderr.splitlines()
    assert limit == (
        "batchgen: 54 of 198 rows are errors, over gate.max_error_rate = 0.1; nothing published"
    )
    assert example == (
        f"batchgen: truncated 50: row 0 of {job.parent}/in.jsonl (line 1): cut off at max_tokens "
        "or max_model_len, after 40 characters"
    )
    assert bad.startswith("batchgen: bad_json 4: ")
    assert "--publish-anyway" in hint
    assert not list((job.parent / "out").glob("part-*"))
    (summary,) = (job.parent / "out" / STATE / "runs").glob("*/summary.json")
    gate = json.loads(summary.read_text())["gate"]
    assert [(entry["name"], entry["exceeded"]) for entry in gate] == [
        ("max_error_rate", True),
        ("max_truncated_rate", False),
        ("max_retry_rate", False),
        ("max_shrink", False),
    ]
    assert gate[0]["figure"] == 54 / 198


@pytest.mark.parametrize(
    ("gate", "told"),
    [
        ({"max_truncated_rate": 0.01}, "50 of 198 rows are cut off at max_tokens, over"),
        ({"max_retry_rate": 0.2}, "50 of 198 rows needed more than one attempt, over"),
    ],
)
def test_other_limits_hold_a_job_back_too(job: Path, gate: dict[str, Any], told: str) -> None:
    tables = {"retry": AGAIN} if "max_retry_rate" in gate else {}
    make_job(job.parent, gate={"max_error_rate": 1.0, **gate}, **tables)
    done = run_cli("run", job)
    assert done.returncode == 3
    assert told in done.stderr
    assert "batchgen: bad_json 4: " in done.stderr


def test_publish_anyway_publishes_warns_and_is_recorded(job: Path) -> None:
    assert run_cli("run", job).returncode == 3
    done = run_cli("run", job, "--publish-anyway")
    assert done.returncode == 0, done.stderr
    text = "54 of 198 rows are errors, over gate.max_error_rate = 0.1"
    assert f"warning: published over a limit of the gate: {text}" in done.stdout
    manifest = ledger_of(job).latest_manifest()
    assert manifest is not None
    assert [entry.get("overridden") for entry in manifest.gate] == [True, None, None, None]
    assert manifest.tally["verdict"] == {"ok": 144, "truncated": 50, "error": 4}
    assert len(batchgen.read(job.parent / "out").collect()) == 198


def label_job(folder: Path, labels: list[str], **tables: Any) -> Path:
    rows = [json.dumps({"label": label}) for label in labels]
    (folder / "in.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    choice = {"choice": ["refund", "invoice", "other"]}
    return write_job(folder, "in.jsonl", prompt={"user": "{{ label }}"}, output=choice, **tables)


def test_a_shrunk_night_is_held_against_all_rows_of_the_last_errors_too(job: Path) -> None:
    lines = (job.parent / "in.jsonl").read_text().splitlines(keepends=True)
    batchgen.run(job, overrides=["gate.max_error_rate=1"])
    (job.parent / "in.jsonl").write_text("".join(lines[: len(lines) // 2]))
    summary = batchgen.run(job, overrides=["gate.max_error_rate=1"])
    (shrink,) = [entry for entry in summary.gate if entry["name"] == "max_shrink"]
    assert summary.num_errors
    assert shrink["text"].endswith(" fewer than the 198 of the last snapshot")


def cut(job: Path, num_rows: int) -> None:
    path = job.parent / "in.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:num_rows]))


def test_a_new_output_holds_back_a_night_that_lost_more_than_half_of_its_rows(
    tmp_path: Path,
) -> None:
    job = label_job(tmp_path, ["refund"] * 20)
    first = batchgen.run(job)
    assert "shrink" not in str(first)  # There is nothing yet that could.
    limit = ["input.limit=9"]
    with pytest.raises(
        GateError, match=r"11 fewer than .*, over gate\.max_shrink = 0\.5"
    ) as caught:
        batchgen.run(job, overrides=limit)
    assert caught.value.exit_code == 3
    assert "look at input.path, input.where and input.limit" in str(caught.value)
    assert len(batchgen.read(job).collect()) == 20
    # The night without the limit is not bound by the one that was held back.
    assert batchgen.run(job).state == "complete"
    cut(job, 10)
    assert batchgen.run(job).num_ok == 10  # Half is not more than half.
    cut(job, 4)
    with pytest.raises(GateError):
        batchgen.run(job)
    assert batchgen.run(job, publish_anyway=True).num_ok == 4


@pytest.mark.parametrize("limit", [0.0, 0.7, 1.0])
def test_a_limit_that_is_set_goes_before_the_default(tmp_path: Path, limit: float) -> None:
    job = label_job(tmp_path, ["refund"] * 20, gate={"max_shrink": limit})
    batchgen.run(job)
    cut(job, 8)
    if limit < 0.6:
        with pytest.raises(GateError, match=f"over gate.max_shrink = {limit:g}"):
            batchgen.run(job)
    else:
        assert batchgen.run(job).num_ok == 8
    label_job(tmp_path, ["refund"] * 3)  # Not set any more: the default again.
    with pytest.raises(GateError, match=r"over gate\.max_shrink = 0\.5"):
        batchgen.run(job)


def test_an_output_of_before_the_default_goes_on_as_it_was(tmp_path: Path) -> None:
    job = label_job(tmp_path, ["refund"] * 20)
    batchgen.run(job)
    path = tmp_path / "out" / STATE / "manifests" / "000001.json"
    manifest = json.loads(path.read_text())
    manifest["gate"] = [entry for entry in manifest["gate"] if entry["name"] != "max_shrink"]
    path.write_text(json.dumps(manifest))
    for num_rows in (6, 1):
        cut(job, num_rows)
        assert batchgen.run(job).num_ok == num_rows
    cut(job, 0)
    with pytest.raises(GateError, match=r"over gate.max_shrink = 0.999"):
        batchgen.run(job)


def test_labels_that_drift_from_the_last_snapshot_hold_the_next_one_back(tmp_path: Path) -> None:
    limit = {"gate": {"max_drift": 0.1}}
    job = label_job(tmp_path, ["refund"] * 12 + ["invoice"] * 88, **limit)
    first = run_json(job)
    assert [(e["column"], e["figure"]) for e in first["gate"] if e["name"] == "max_drift"] == [
        ("gen_label", None)
    ]
    label_job(tmp_path, ["refund"] * 63 + ["invoice"] * 137, **limit)
    done = run_cli("run", job, "--fresh")
    assert done.returncode == 3
    assert (
        "gen_label has drifted by 0.195 from the last snapshot (invoice 88.0 % -> 68.5 %, refund "
        "12.0 % -> 31.5 %), over gate.max_drift = 0.1; nothing published"
    ) in done.stderr
    assert run_json(job, "--publish-anyway")["state"] == "complete"
    third = run_json(job, "--fresh")  # Compared with what was published, not with the first.
    assert [e["figure"] for e in third["gate"] if e["name"] == "max_drift"] == [0.0]
    assert "drift of gen_label 0 of at most 0.1" in run_cli("run", job).stdout


# --- --retry-errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("is_published", [True, False])
def test_only_error_rows_run_again(
    job: Path, expected: list[dict[str, Any]], *, is_published: bool
) -> None:
    first = run_cli("run", job, *(["--publish-anyway"] if is_published else []))
    assert first.returncode == (0 if is_published else 3)
    give_rung(job)
    summary = run_json(job, "--retry-errors")
    assert (summary["state"], summary["num_ok"], summary["num_errors"]) == ("complete", 194, 4)
    assert summary["run"]["num_ok"] + summary["run"]["num_errors"] == 54
    assert summary["num_carried"] == NUM_ROWS - 54
    assert_is_whole(job, expected)
    kept = batchgen.read(job.parent / "out").collect()["gen_run_id"].value_counts()
    assert sorted(kept["count"]) == [54, 144]  # Rows that were taken over tell who answered them.


def test_a_job_that_failed_again_is_held_back_again_and_may_be_tried_once_more(
    job: Path, expected: list[dict[str, Any]]
) -> None:
    assert run_cli("run", job).returncode == 3
    assert run_cli("run", job, "--retry-errors").returncode == 3
    give_rung(job)
    assert run_json(job, "--retry-errors")["state"] == "complete"
    assert ledger_of(job).latest_plan_number() == 3
    assert_is_whole(job, expected)


@pytest.mark.parametrize("is_published", [True, False])
def test_no_engine_is_started_for_rows_that_never_reach_one(
    tmp_path: Path, *, is_published: bool
) -> None:
    write_input(tmp_path)
    apart = {"backend": "echo", "engine": {"in_process": False}}
    limit = {"max_error_rate": 0.5 if is_published else 0.001}
    job = make_job(tmp_path, checks={}, model=apart, gate=limit)  # Only 4 bad lines are errors.
    code = 0 if is_published else 3
    assert run_json(job, code=code)["engine"]["name"] == "echo"
    again = run_json(job, "--retry-errors", code=code)
    assert (again["run"]["num_errors"], again["engine"]) == (4, {})
    assert not (job.parent / "out" / STATE / "runs" / again["run_id"] / "vllm.log").exists()
    assert run_cli("run", job, "--publish-anyway").returncode == 0
    # Without its bad lines: their text is new.
    text = (tmp_path / "in.jsonl").read_text(encoding="utf-8")
    (tmp_path / "in.jsonl").write_text(text.replace("{bad", '{"id": 1, "text": "b"}'))
    mended = run_json(job)
    assert (mended["num_errors"], mended["engine"]["name"]) == (0, "echo")


SLOW = {"backend": "echo", "engine": {"max_num_seqs": 4, "step_s": 0.05}}
"""Another recipe than that of `expected`: keys differ, rows do not."""


def unkeyed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = {"gen_request_key", "gen_recipe"}
    return [{name: row[name] for name in row if name not in keys} for row in rows]


@pytest.mark.parametrize("num_durable", [1, NUM_ROWS - 54 + 5], ids=["taking over", "computing"])
@pytest.mark.parametrize("is_published", [True, False])
def test_killed_in_the_middle_it_goes_on_and_readers_see_the_old_snapshot_until_then(
    job: Path, expected: list[dict[str, Any]], num_durable: int, *, is_published: bool
) -> None:
    tables = {"model": SLOW, "run": {"flush_rows": 5}}
    make_job(job.parent, **tables)
    run_cli("run", job, *(["--publish-anyway"] if is_published else []))
    give_rung(job, **tables)
    ledger = ledger_of(job)
    with subprocess.Popen(
        command("run", job, "--retry-errors"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_until(
            lambda: (
                (plan := ledger.latest_plan()) is not None
                and plan.number == 2
                and ledger.durable(plan).num_done >= num_durable
            )
        )
        process.kill()
    if is_published:
        assert batchgen.read(job.parent / "out").collect()["gen_status"].value_counts()[
            "count"
        ].to_list() in ([54, 144], [144, 54])
    facts = json.loads(run_cli("status", job, "--json").stdout)
    assert (facts["state"], facts["retries_plan"]) == ("interrupted", 1)
    assert num_durable <= facts["num_durable"] < NUM_ROWS
    assert run_cli("verify", job).returncode == 0
    resumed = run_json(job)
    assert resumed["run"]["num_resumed"] == facts["num_durable"] + resumed["num_carried"]
    assert resumed["num_carried"] <= max(0, NUM_ROWS - 54 - facts["num_durable"])
    assert unkeyed(published(job.parent / "out")) == unkeyed(expected)


def test_stopped_by_a_signal_it_goes_on(job: Path, expected: list[dict[str, Any]]) -> None:
    make_job(job.parent, model=SLOW)
    run_cli("run", job)
    give_rung(job, model=SLOW)
    ledger = ledger_of(job)
    with subprocess.Popen(
        command("run", job, "--retry-errors"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: ledger.latest_epoch()[0] == 2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 75
    assert run_json(job, "--retry-errors")["state"] == "complete"
    assert unkeyed(published(job.parent / "out")) == unkeyed(expected)


def test_going_on_with_an_unfinished_job_comes_first(job: Path) -> None:
    done = run_json(job, "--retry-errors", code=3)
    assert done["warnings"] == [
        "error rows are tried again once every row has ended: run with --retry-errors then"
    ]
    assert ledger_of(job).latest_plan_number() == 1


def test_without_error_rows_there_is_nothing_to_do(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    job = make_job(tmp_path)
    assert run_cli("run", job).returncode == 0
    again = run_json(job, "--retry-errors")
    assert again["state"] == "nothing_to_do"
    assert again["reason"].startswith("there are no error rows to try again; already complete")
    assert ledger_of(job).latest_plan_number() == 1


def test_fresh_and_retry_errors_do_not_go_together(job: Path) -> None:
    done = run_cli("run", job, "--fresh", "--retry-errors")
    assert done.returncode == 2
    assert "fresh runs every row again and retry_errors only some" in done.stderr
    assert not (job.parent / "out").exists()


def test_another_recipe_is_refused(job: Path) -> None:
    assert run_cli("run", job, "--publish-anyway").returncode == 0
    give_rung(job, prompt={"user": "Say: {{ text }}"})
    done = run_cli("run", job, "--retry-errors")
    assert done.returncode == 2
    assert "the job has changed since this output was made" in done.stderr
    assert "prompt.user: 'Repeat: {{ text }}' -> 'Say: {{ text }}'" in done.stderr
    assert ledger_of(job).latest_plan_number() == 1


@pytest.mark.parametrize("change", ["longer", "edited", "new file"])
@pytest.mark.parametrize("retries", [True, False])
def test_rows_that_came_meanwhile_run_and_error_rows_on_request(
    tmp_path: Path, change: str, *, retries: bool
) -> None:
    more = tmp_path / "more"
    more.mkdir()
    write_input(more)
    tables = {"input": {"path": "more/*.jsonl"}, "gate": {"max_error_rate": 1.0}}
    job = make_job(tmp_path, **tables)
    assert run_cli("run", job).returncode == 0
    make_job(tmp_path, retry=AGAIN, **tables)
    new = json.dumps({"id": 1000, "text": "new"}) + "\n"
    lines = (more / "in.jsonl").read_text().splitlines(keepends=True)
    if change == "longer":
        (more / "in.jsonl").write_text("".join([*lines, new]))
    elif change == "edited":
        (more / "in.jsonl").write_text("".join([*lines[:2], new, *lines[3:]]))
    else:
        (more / "new.jsonl").write_text(new)
    summary = run_json(job, *(["--retry-errors"] if retries else []))
    assert summary["state"] == "complete"
    # 50 rows are too long and 4 are bad.
    assert summary["run"]["num_ok"] + summary["run"]["num_errors"] == (55 if retries else 1)
    assert summary["num_carried"] == NUM_ROWS - (54 if retries else 0) - (change == "edited")
    assert summary["num_errors"] == (4 if retries else 54)
    plan = ledger_of(job).latest_plan()
    assert plan is not None
    assert (plan.number, plan.bases, plan.takes_errors) == (2, (Base(1),), not retries)
    assert plan.generation == int(retries)
    assert run_cli("verify", job).returncode == 0
    found = {row["id"]: row["gen_text"] for row in published(tmp_path / "out")}
    assert found[1000] == "Repeat: new"
    assert (2 in found) is (change != "edited")


@pytest.mark.parametrize("at", [200, 3000, -100], ids=["page", "later page", "footer"])
def test_a_damaged_published_file_is_repaired(tmp_path: Path, at: int) -> None:
    write_input(tmp_path)
    job = make_job(tmp_path, retry=AGAIN, output={"rows_per_file": 60})
    assert run_cli("run", job).returncode == 0
    whole = published(tmp_path / "out")
    manifest = ledger_of(job).latest_manifest()
    assert manifest is not None
    damaged = manifest.files[1]
    flip(tmp_path / "out" / damaged.alias, at)
    found = run_cli("verify", job)
    assert found.returncode == 1
    assert f"{damaged.name}: " in found.stdout
    assert "--retry-errors` computes them again" in found.stdout
    summary = run_json(job, "--retry-errors")
    assert any(f"{damaged.name}: damaged" in text for text in summary["warnings"])
    # The damaged file's rows, and the error rows of the others.
    num_run = summary["run"]["num_ok"] + summary["run"]["num_errors"]
    assert damaged.num_rows <= num_run <= damaged.num_rows + 4
    assert run_cli("verify", job).returncode == 0
    assert published(tmp_path / "out") == whole


def test_damage_is_repaired_where_no_row_is_an_error(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"row {number}"}) for number in range(50)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    job = make_job(tmp_path)
    assert run_cli("run", job).returncode == 0
    whole = published(tmp_path / "out")
    flip(only_shown(tmp_path / "out"), 300)
    assert run_json(job, "--retry-errors")["run"]["num_ok"] == 50
    assert run_cli("verify", job).returncode == 0
    assert published(tmp_path / "out") == whole


def test_a_published_file_that_is_gone_is_computed_again(tmp_path: Path) -> None:
    write_input(tmp_path)
    job = make_job(tmp_path, retry=AGAIN, output={"rows_per_file": 60})
    assert run_cli("run", job).returncode == 0
    whole = published(tmp_path / "out")
    manifest = ledger_of(job).latest_manifest()
    assert manifest is not None
    for path in (manifest.files[1].name, manifest.files[1].alias):
        (tmp_path / "out" / path).unlink()
    assert "--retry-errors` computes them again" in run_cli("verify", job).stdout
    summary = run_json(job, "--retry-errors")
    num_run = summary["run"]["num_ok"] + summary["run"]["num_errors"]
    assert manifest.files[1].num_rows <= num_run <= manifest.files[1].num_rows + 4
    assert_is_whole(job, whole)
    assert len(list((tmp_path / "out").glob("part-*"))) == 4


def test_a_damaged_list_of_files_is_named_and_nothing_is_published_over_it(job: Path) -> None:
    run_cli("run", job, "--publish-anyway")
    storage = ledger_of(job).storage
    (name,) = storage.list(f"{STATE}/lists")
    whole = storage.path(name).read_bytes()
    storage.path(name).chmod(0o644)
    storage.path(name).write_bytes(whole[:-40])
    shown = published_bytes(job.parent / "out")
    for args in (("verify",), ("run",), ("run", "--retry-errors"), ("status",)):
        done = run_cli(args[0], job, *args[1:])
        assert done.returncode in {1, 2}, (args, done.stdout)
        assert name in done.stdout + done.stderr, args
    assert published_bytes(job.parent / "out") == shown
    storage.path(name).write_bytes(whole)
    assert run_cli("verify", job).returncode == 0


def published_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("part-*")}


def test_if_only_rows_to_take_over_are_missing_no_engine_is_started(
    job: Path, expected: list[dict[str, Any]]
) -> None:
    assert run_cli("run", job, "--publish-anyway").returncode == 0
    give_rung(job, gate={"max_error_rate": 0.0})
    assert run_cli("run", job, "--retry-errors").returncode == 3
    ledger = ledger_of(job)
    carried, *_ = ledger.storage.list(f"{STATE}/parts")
    flip(ledger.storage.path(carried), 900)
    assert run_cli("verify", job).returncode == 1
    summary = run_json(job, "--publish-anyway")
    assert (summary["state"], summary["engine"]) == ("complete", {})
    assert summary["num_carried"] == NUM_ROWS - 54 - summary["num_skipped"]
    assert_is_whole(job, expected)


def test_a_base_that_another_run_publishes_meanwhile_is_read_where_it_is_then(
    job: Path, expected: list[dict[str, Any]]
) -> None:
    """Its parts are gone, its snapshot is there."""
    assert run_cli("run", job).returncode == 3
    ledger = ledger_of(job)
    parts = {name: ledger.storage.read(name) for name in ledger.storage.list(f"{STATE}/parts")}
    run_cli("run", job, "--retry-errors")  # Held back: plan 2 has plan 1's parts as its base.
    plan = ledger.latest_plan()
    assert plan is not None
    assert plan.bases == (Base(1, tuple(parts)),)
    assert (plan.takes_errors, plan.generation) == (False, 1)
    for name in ledger.storage.list(f"{STATE}/parts"):
        if "/e000002" in name:
            ledger.storage.remove(name)
    other = job.parent / "out" / STATE
    hidden = job.parent / "hidden"
    hidden.mkdir()
    for kind in ("plan", "epochs"):
        (other / kind / "000002.json").rename(hidden / f"{kind}.json")
    assert run_cli("run", job, "--publish-anyway").returncode == 0  # The frozen run of plan 1.
    for kind in ("plan", "epochs"):
        (hidden / f"{kind}.json").replace(other / kind / "000002.json")
    assert not any(name in parts for name in ledger.storage.list(f"{STATE}/parts"))
    give_rung(job)
    summary = run_json(job)
    assert summary["num_carried"] == NUM_ROWS - 54
    assert_is_whole(job, expected)
