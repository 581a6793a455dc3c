"""Every fault of an engine, through the real command line: nothing lost, twice, or wrong."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import batchgen
from batchgen.store.books import STATE
from tests.e2e import support
from tests.e2e.support import run_cli, write_job, write_rows
from tests.faulty import BACKEND

ROOT = Path(__file__).parents[2]
NUM_ROWS = 400
POISON = ["row 77 ", "row 177 ", "row 178 ", "row 301 "]
ENGINE = {"max_num_seqs": 16, "max_steps": 4, "step_s": 0.001}


def toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {toml(item)}' for key, item in value.items())}}}"
    return json.dumps(value)


def make_job(folder: Path, faults: list[dict[str, Any]], how: str = "here", **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_rows(folder / "in.jsonl", NUM_ROWS)
    run = {"flush_rows": 50, "stall_s": 3.0, "engines_per_gpu": 2 if how == "two" else 1}
    job = write_job(folder, "in.jsonl", run=run, model={"backend": BACKEND})
    lines = [
        f"{key} = {toml(value)}"
        for key, value in {**ENGINE, "in_process": how == "here", **options}.items()
    ]
    if faults:
        lines.append(f"faults = {toml(faults)}")
    with job.open("a", encoding="utf-8") as file:
        file.write("\n".join(["", "[model.engine]", *lines]))
    return job


def published(output: Path) -> list[dict[str, Any]]:
    """Without keys and recipe: the engine's options, faults too, are of the recipe."""
    rows = support.published(output)
    of_recipe = {"gen_request_key", "gen_recipe"}
    return [{k: v for k, v in row.items() if k not in of_recipe} for row in rows]


def run(job: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a job; return its summary and the deaths recorded in the run's folder."""
    done = run_cli("run", job, "--json")
    assert "Traceback" not in done.stderr
    summary = json.loads(done.stdout)
    assert summary["exit_code"] == done.returncode, done.stderr
    folder = job.parent / "out" / STATE / "runs" / summary["run_id"]
    files = sorted(folder.glob("engine-death-*.json"))
    return summary, [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def fault_free(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fault-free")
    summary, deaths = run(make_job(folder / "job", []))
    assert (summary["exit_code"], summary["warnings"], deaths) == (0, [], [])
    return published(folder / "job" / "out")


HOW = pytest.mark.parametrize("how", ["here", "hosted", "two"])
"""In this process, in one of its own, or two engines as for one GPU."""


FAULTS = [
    ("die", 1, "the engine died"),
    ("out_of_memory", 1, "max_num_seqs = 8 from then on"),
    ("hang", 1, "engine death 1"),
    ("vanish", 0, "1 requests were lost"),
    ("duplicate", 0, "1 answers that came twice, or unasked, were dropped"),
    ("wrong_id", 0, "1 answers that came twice, or unasked, were dropped"),
]


@pytest.mark.parametrize(
    ("how", "kind", "num_deaths", "warning"),
    [
        (how, *fault)
        for how, faults in (("here", FAULTS), ("hosted", FAULTS), ("two", FAULTS[:3]))
        for fault in faults
    ],
)
def test_a_fault_changes_no_row(
    tmp_path: Path,
    fault_free: list[dict[str, Any]],
    how: str,
    kind: str,
    num_deaths: int,
    warning: str,
) -> None:
    if kind == "vanish" and how != "here":
        # The host's own count says that the request is still there: only the stall tells.
        num_deaths, warning = 1, "the engine hangs: no row finished, nothing changed"
    faults = [{"kind": kind, "at": at} for at in (100,)]
    job = make_job(tmp_path, faults, once_file=str(tmp_path / "fired"), how=how)
    summary, deaths = run(job)
    assert (tmp_path / "fired").read_text() == f"{kind} at 100\n"
    assert (summary["exit_code"], summary["state"]) == (0, "complete")
    assert published(tmp_path / "out") == fault_free
    assert len(deaths) == num_deaths
    assert warning in "\n".join(summary["warnings"])
    for death in deaths:
        assert len(death["in_flight"]) == death["num_in_flight"] > 0
        assert {"request_id", "ordinal", "request_key"} == set(death["in_flight"][0])
        assert len(death["in_flight"][0]["ordinal"]) == 2


@HOW
def test_many_deaths_in_one_run_change_no_row(
    tmp_path: Path, fault_free: list[dict[str, Any]], how: str
) -> None:
    faults = [{"kind": "die", "at": at} for at in (1, 20, 40, 60, 80, 100)]
    job = make_job(tmp_path, faults, once_file=str(tmp_path / "fired"), how=how)
    summary, deaths = run(job)
    assert summary["exit_code"] == 0
    assert len(deaths) == 6
    assert published(tmp_path / "out") == fault_free


@HOW
@pytest.mark.parametrize("texts", [POISON[:1], POISON], ids=["one", "several"])
def test_poison_rows_are_errors_and_all_others_as_without_them(
    tmp_path: Path, fault_free: list[dict[str, Any]], how: str, texts: list[str]
) -> None:
    faults = [{"kind": "poison", "text": text} for text in texts]
    summary, deaths = run(make_job(tmp_path, faults, how=how))
    assert summary["exit_code"] == 0
    rows = published(tmp_path / "out")
    crashed = [row for row in rows if row["gen_error_type"] == "engine_crash"]
    assert sorted(row["id"] for row in crashed) == [int(text.split()[1]) for text in texts]
    others = [row for row in rows if row["gen_error_type"] != "engine_crash"]
    ids = {row["id"] for row in crashed}
    assert others == [row for row in fault_free if row["id"] not in ids]
    blamed = [death["blamed"]["ordinal"] for death in deaths if death["blamed"]]
    assert sorted(blamed) == [[0, number] for number in sorted(ids)]


@HOW
def test_an_engine_that_always_dies_stops_the_job_and_blames_no_row(
    tmp_path: Path, how: str
) -> None:
    summary, deaths = run(make_job(tmp_path, [{"kind": "die", "at": 1}], how=how))
    assert (summary["exit_code"], summary["state"]) == (1, "fault")
    # Of two, one gives up; the other one's deaths are told, too.
    num = int(summary["reason"].split()[3])
    assert summary["reason"].startswith(f"the engine died {num} times, with any of 4 rows")
    assert (num < len(deaths) <= 2 * num) if how == "two" else num == len(deaths)
    assert ".log; what was finished stays, run again to go on" in summary["reason"]
    assert num <= 20
    # The eight errors are lines that are no JSON: no row is put down as the engine's killer.
    assert (summary["num_ok"], summary["num_errors"]) == (0, NUM_ROWS // 50)
    assert all(death["num_in_flight"] for death in deaths)


def test_what_finished_before_the_engine_gave_up_is_committed(tmp_path: Path) -> None:
    # Each engine answers some rows; the deaths outrun the progress.
    job = make_job(tmp_path, [{"kind": "die", "at": 12}], max_num_seqs=4, step_s=0.0, max_steps=1)
    summary, _ = run(job)
    assert (summary["exit_code"], summary["state"]) == (1, "fault")
    assert "too often for the" in summary["reason"]
    assert 0 < summary["num_ok"] < NUM_ROWS - 20


@pytest.mark.vllm
def test_vllm_killed_in_the_middle_of_a_run_costs_no_row(tmp_path: Path) -> None:
    lines = [json.dumps({"id": n, "text": f"Parcel {n} is late."}) for n in range(2000)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    job = write_job(
        tmp_path,
        "in.jsonl",
        model={
            "backend": "vllm",
            "name": str(ROOT / "sample_data" / "model"),
            "engine": {"enforce_eager": True, "kv_cache_memory_bytes": 32 << 20},
        },
        run={"flush_rows": 100},
        sampling={"max_tokens": 12, "temperature": 0},
    )
    killed = threading.Event()
    threading.Thread(target=_kill_engine, args=(tmp_path / "out", killed), daemon=True).start()
    summary = batchgen.run(job)
    assert killed.is_set()
    assert (summary.state, summary.num_ok, summary.num_errors) == ("complete", 2000, 0)
    frame = batchgen.read(job).collect()
    assert frame["id"].to_list() == list(range(2000))
    folder = tmp_path / "out" / STATE / "runs" / summary.run_id
    (record,) = folder.glob("engine-death-*.json")
    assert "SIGKILL" in json.loads(record.read_text())["reason"]


def _kill_engine(output: Path, killed: threading.Event) -> None:
    """SIGKILL this process's engine once the first part is durable."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if any((output / STATE / "parts").glob("*.parquet")):
            for child in psutil.Process().children():
                if "batchgen.engine.process" in child.cmdline():
                    os.kill(child.pid, signal.SIGKILL)
                    killed.set()
                    return
        time.sleep(0.01)
