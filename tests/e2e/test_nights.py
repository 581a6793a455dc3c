"""Seven nights of one job whose input changes, each compared with a full recompute.

On the echo engine through the real command line; nights of other kinds of jobs in this process.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import batchgen
from batchgen.storage import LocalStorage
from batchgen.store.books import STATE
from batchgen.store.ledger import Ledger
from tests.e2e.nights import (
    BAD,
    SLOW,
    TOO_LONG,
    World,
    check_night,
    make_rows,
    origins,
    steady,
)
from tests.e2e.support import command, run_cli, summary_of, wait_until, write_job

if TYPE_CHECKING:
    from tests.e2e.nights import Line, Origins, Row

ROOT = Path(__file__).parents[2]


def test_seven_nights_each_equal_a_full_recompute_and_cost_what_changed(tmp_path: Path) -> None:
    world = World(tmp_path)
    known = the_first(world)
    known = the_second_appends(world, known)
    known = the_third_edits(world, known)
    the_fourth_changes_nothing(world)
    known = the_fifth_crashes(world, known)
    known = the_sixth_overlaps(world, known)
    known = the_sixth_has_a_deadline(world, known)
    the_seventh_changes_the_recipe(world)
    assert run_cli("verify", world.job).returncode == 0


def the_first(world: World) -> Origins:
    world.first_night()
    summary = summary_of(world.job)
    assert (summary["num_ok"], summary["num_errors"], summary["num_skipped"]) == (215, 3, 2)
    return check_night(world, summary, {}, new_errors=3)


def the_second_appends(world: World, known: Origins) -> Origins:
    world.files["a"] += [*make_rows(300, 310), row_with("row 0 ", "appended"), BAD["jsonl"]]
    world.files["c"] += [*make_rows(310, 320), {"id": 1, "text": TOO_LONG, "note": "appended"}]
    world.files["d"] = make_rows(320, 350)
    world.write()
    summary = summary_of(world.job)
    assert summary["run"]["num_ok"] == 50
    assert summary["num_carried"] >= 220
    return check_night(world, summary, known, new_errors=1)  # The refused one is known too.


def the_third_edits(world: World, known: Origins) -> Origins:
    edit_everything(world)
    world.path("d").rename(world.path("e"))
    world.files["e"] = world.files.pop("d")
    world.write()
    world.path("c").touch()
    summary = summary_of(world.job)
    assert summary["run"]["num_ok"] == 12
    return check_night(world, summary, known)


def edit_everything(world: World) -> None:
    """Edits in place, insertions, deletions, moves within and between files; 12 new texts."""
    a, b = world.files["a"], world.files["b"]
    for number in (3, 35, 72):
        a[number] = row_with(f"edited {number}", "edited")
    a[5] = {**as_row(a[5]), "note": "another note for the same text"}
    b[7] = {**as_row(b[7]), "note": "another note for the same text"}
    a[36:36] = [*make_rows(400, 406), row_with("row 0 ", "inserted"), ""]  # Above a bad row.
    del a[10:15]
    b[20:20] = [row_with("twice", "one"), row_with("twice", "two")]
    b[-2], b[-3] = b[-3], b[-2]
    b += a[60:66]
    del a[60:66]
    b[3] = row_with("edited", "b")
    b.insert(0, row_with("first of all", "inserted"))


def the_fourth_changes_nothing(world: World) -> None:
    before = files_of(world)
    for is_touched in (False, True):
        if is_touched:
            world.path("a").touch()
        summary = summary_of(world.job)
        assert (summary["state"], summary["exit_code"]) == ("nothing_to_do", 0)
        assert summary["engine"] == {}
        assert (summary["run"]["num_ok"], summary["run"]["num_errors"]) == (0, 0)
        assert files_of(world) == before


def files_of(world: World) -> dict[str, int]:
    """What tells of work: plans, claims, parts, published files, and when they were written."""
    kinds = ("part-*", f"{STATE}/plan/*", f"{STATE}/epochs/*", f"{STATE}/parts/*")
    return {str(path): path.stat().st_mtime_ns for kind in kinds for path in world.out.glob(kind)}


def the_fifth_crashes(world: World, known: Origins) -> Origins:
    """kill -9 in the middle; before the next run the input changes once more."""
    world.files["a"][20:20] = make_rows(500, 560)
    world.files["f"] = make_rows(560, 600)
    world.write()
    before, last = world.published(), ledger_of(world).latest_plan_number()
    with subprocess.Popen(command("run", world.job, *SLOW), stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: ledger_of(world).latest_plan_number() > last)
        wait_until(lambda: newly_durable(world, known) >= 40)
        process.kill()
    new = origins(world.durable_rows()).keys() - known.keys()
    assert 40 <= len(new) < 100
    assert world.published() == before  # Readers see the fourth night until this one is done.
    known = merged(known, origins(world.durable_rows()))
    world.files["a"][20:30] = make_rows(600, 606)
    world.files["a"].insert(0, row_with("on top", "after the crash"))
    world.files["g"] = world.files.pop("f")[5:]
    world.write()
    summary = summary_of(world.job)
    return check_night(world, summary, known)


def newly_durable(world: World, known: Origins) -> int:
    """Rows of the newest plan that its own runs computed."""
    if not world.durable().num_done:
        return 0
    return len(origins(world.durable_rows()).keys() - known.keys())


def the_sixth_overlaps(world: World, known: Origins) -> Origins:
    """Whoever comes second ends at once, or waits and finds nothing to do."""
    world.files["b"] += make_rows(700, 950)
    world.write()
    lock = world.out / STATE / "lock"
    with subprocess.Popen(
        command("run", world.job, *SLOW, "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as first:
        wait_until(lambda: lock.exists() and str(first.pid) in lock.read_text())
        with subprocess.Popen(
            command("run", world.job, "--wait", "--json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as waiting:
            second = run_cli("run", world.job)
            assert first.poll() is None
            assert waiting.poll() is None
            told, _ = first.communicate(timeout=180)
            told_last, _ = waiting.communicate(timeout=180)
    assert second.returncode == 75
    assert f"process {first.pid} on" in second.stderr
    last = json.loads(told_last)
    assert (waiting.returncode, last["state"]) == (0, "nothing_to_do")
    assert last["run"]["num_ok"] == 0
    return check_night(world, json.loads(told), known, new_errors=0)


def the_sixth_has_a_deadline(world: World, known: Origins) -> Origins:
    """The run stops in time with work left; the next one goes on."""
    world.files["b"] += make_rows(1000, 1600)
    world.write()
    began_s = time.monotonic()
    first = summary_of(world.job, *SLOW, "--max-runtime", "12s")
    assert time.monotonic() - began_s < 60
    assert (first["exit_code"], first["state"]) == (75, "stopped")
    num_ok = first["run"]["num_ok"]
    assert 20 <= num_ok < 600
    known = merged(known, origins(world.durable_rows()))
    second = summary_of(world.job)
    assert second["run"]["num_ok"] == 600 - num_ok
    return check_night(world, second, known, new_errors=0)


def the_seventh_changes_the_recipe(world: World) -> None:
    """Refused with what differs; relabelled when asked to."""
    del world.files["b"][-700:]
    world.write()
    before = world.published()
    change = ("--set", "prompt.user=Say: {{ text }}")
    refused = run_cli("run", world.job, *change)
    assert refused.returncode == 2
    assert "prompt.user: 'Repeat: {{ text }}' -> 'Say: {{ text }}'" in refused.stderr
    assert "--accept-recipe" in refused.stderr
    assert world.published() == before
    summary = summary_of(world.job, *change, "--accept-recipe")
    check_night(world, summary, {}, overrides=change[1:])
    assert {row["gen_text"].partition(" ")[0] for row in world.published() if row["gen_text"]} == {
        "Say:"
    }


def row_with(text: str, note: str) -> Row:
    return {"id": None, "text": text, "note": note}


def as_row(line: Line) -> Row:
    assert isinstance(line, dict)
    return line


def merged(one: Origins, other: Origins) -> Origins:
    return {text: one.get(text, set()) | other.get(text, set()) for text in one | other}


def ledger_of(world: World) -> Ledger:
    return Ledger(LocalStorage(world.out))


# --- other jobs -------------------------------------------------------------------------------


def run_here(world: World) -> dict[str, Any]:
    return batchgen.run(world.job).as_dict()


def three_nights(world: World, *, is_deduped: bool = True) -> None:
    """The first three of the seven, in this process."""
    world.first_night()
    known = check_night(world, run_here(world), {}, is_deduped=is_deduped)
    world.files["a"] += [*make_rows(300, 310), row_with("row 0 ", "appended")]
    world.files["d"] = make_rows(320, 350)
    world.write()
    known = check_night(world, run_here(world), known, is_deduped=is_deduped)
    edit_everything(world)
    world.files["e"] = world.files.pop("d")
    world.write()
    check_night(world, run_here(world), known, is_deduped=is_deduped)
    assert run_here(world)["state"] == "nothing_to_do"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_other_formats_compute_what_changed(tmp_path: Path, kind: str) -> None:
    three_nights(World(tmp_path, kind))


def test_rows_that_where_leaves_out_stay_out(tmp_path: Path) -> None:
    world = World(tmp_path, input={"where": "note <> 'note 3' or note is null"})
    three_nights(world)
    assert not any(row["note"] == "note 3" for row in world.published())


@pytest.mark.parametrize("dedupe", ["always", "never"])
def test_equal_prompts_run_once_or_each_as_told(tmp_path: Path, dedupe: str) -> None:
    three_nights(World(tmp_path, run={"dedupe": dedupe}), is_deduped=dedupe == "always")


def test_sampled_answers_stay_and_new_rows_are_what_a_full_recompute_gives(tmp_path: Path) -> None:
    world = World(tmp_path, sampling={"temperature": 1}, output={"with_seed": True})
    world.first_night()
    run_here(world)
    before = world.published()
    edit_everything(world)
    world.write()
    summary = run_here(world)
    now, whole = world.published(), world.recomputed()
    assert all(row["gen_seed"] is not None for row in now if row["gen_status"] == "ok")
    texts = {row["text"] for row in before if row["gen_request_key"]}
    kept = {(row["text"], row["gen_seed"], row["gen_latency_s"]) for row in before}
    num_computed = 0
    for row, recomputed in zip(now, whole, strict=True):
        names = ("id", "text", "note", "gen_status", "gen_text", "gen_error", "gen_request_key")
        assert [row[name] for name in names] == [recomputed[name] for name in names]
        is_kept = (row["text"], row["gen_seed"], row["gen_latency_s"]) in kept
        # Of equal rows each has its own draw, so one that came or moved to another file is new.
        if row["text"] not in (None, "row 0 "):
            assert is_kept == (row["text"] in texts)
        if not is_kept:
            assert steady([row]) == steady([recomputed])
            num_computed += row["gen_status"] == "ok"
    assert sum(row["text"] == "row 0 " for row in now) == 4
    assert summary["run"]["num_ok"] == num_computed == 15


@pytest.mark.vllm
def test_on_vllm_a_night_with_edits_computes_the_edited_rows_alone(tmp_path: Path) -> None:
    rows = [{"id": n, "text": f"Parcel {n} came {n % 9} days late."} for n in range(200)]
    job = write_job(
        tmp_path,
        "in.jsonl",
        model={
            "backend": "vllm",
            "name": str(ROOT / "sample_data" / "model"),
            "engine": {"enforce_eager": True, "kv_cache_memory_bytes": 32 << 20},
        },
        sampling={"max_tokens": 8, "temperature": 0},
    )

    def night() -> tuple[dict[str, Any], list[Row]]:
        lines = [json.dumps(row) for row in rows]
        (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
        summary = batchgen.run(job)
        return summary.as_dict(), batchgen.read(job).collect().to_dicts()

    first, before = night()
    assert first["run"]["num_ok"] == 200
    for number in (40, 170):
        rows[number]["text"] = f"Parcel {number} is broken."
    second, after = night()
    assert second["run"]["num_ok"] + second["run"]["num_errors"] == 2
    assert (second["num_ok"], second["num_carried"]) == (200, 198)
    assert [row["id"] for row in after] == list(range(200))
    for number, (was, now) in enumerate(zip(before, after, strict=True)):
        if number in (40, 170):
            assert now["text"] == f"Parcel {number} is broken."
            assert (now["gen_status"], now["gen_run_id"]) == ("ok", second["run_id"])
            assert now["gen_request_key"] != was["gen_request_key"]
        else:
            assert now == was
