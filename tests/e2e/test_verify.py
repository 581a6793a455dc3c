"""`batchgen verify` finds what is damaged, says it, and the next run redoes it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from batchgen.ledger.ledger import Ledger
from batchgen.ledger.names import STATE
from batchgen.storage import LocalStorage
from tests.e2e.support import published, run_cli, write_job, write_rows

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_rows(tmp_path / "in.jsonl", 300)
    return write_job(tmp_path, "in.jsonl", output={"rows_per_file": 200})


def verdict_of(job: Path, exit_code: int) -> dict[str, Any]:
    done = run_cli("verify", job, "--json")
    assert done.returncode == exit_code, done.stderr
    verdict: dict[str, Any] = json.loads(done.stdout)
    return verdict


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_a_published_job_is_proven(job: Path) -> None:
    run_cli("run", job)
    verdict = verdict_of(job, 0)
    counts = [verdict[f"num_{name}"] for name in ("planned", "ok", "errors", "skipped", "left")]
    assert counts == [300, 290, 6, 4, 0]
    assert verdict["num_files"] == 2
    assert verdict["num_bytes"] == sum(
        path.stat().st_size for path in (job.parent / "out").glob("part-*.parquet")
    )
    told = run_cli("verify", job).stdout
    assert told.startswith("300 planned = 290 ok + 6 errors + 4 skipped + 0 left; 2 files, ")


def test_every_flipped_byte_of_a_snapshot_is_found(job: Path) -> None:
    run_cli("run", job)
    path = job.parent / "out" / "part-00001.parquet"
    for at in range(0, path.stat().st_size, path.stat().st_size // 7):
        flip(path, at)
        (problem,) = verdict_of(job, 1)["problems"]
        assert "part-00001.parquet: " in problem
        flip(path, at)
    assert verdict_of(job, 0)["problems"] == []


def test_a_bad_part_is_named_and_only_its_rows_are_redone(job: Path) -> None:
    assert run_cli("run", job, "--set", "gate.max_error_rate=0.001").returncode == 3
    storage = LocalStorage(job.parent / "out")
    ledger = Ledger(storage)
    plan = ledger.latest_plan()
    assert plan is not None
    part = ledger.durable(plan).parts[1]
    flip(storage.path(part.name), 400)
    (problem,) = verdict_of(job, 1)["problems"]
    assert problem.startswith(f"{part.name}: could not verify page integrity")
    done = json.loads(run_cli("run", job, "--json").stdout)
    assert done["state"] == "complete"
    num_redone = done["run"]["num_ok"] + done["run"]["num_errors"]
    assert num_redone == part.footer.num_results
    assert verdict_of(job, 0)["num_ok"] == 290
    assert len(published(job.parent / "out")) == 296


def test_a_part_of_another_job_is_named_and_does_not_count(job: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_rows(other / "in.jsonl", 300)
    foreign = write_job(other, "in.jsonl")
    for one in (job, foreign):
        assert run_cli("run", one, "--set", "gate.max_error_rate=0.001").returncode == 3
    name = "e000001-w00-s000000.parquet"
    parts = job.parent / "out" / STATE / "parts"
    (parts / name).write_bytes((other / "out" / STATE / "parts" / name).read_bytes())
    assert any("belongs to another plan" in text for text in verdict_of(job, 1)["problems"])
    assert run_cli("run", job).returncode == 0
    assert len(published(job.parent / "out")) == 296


def test_a_snapshot_whose_file_is_gone_is_a_problem(job: Path) -> None:
    run_cli("run", job)
    ledger = Ledger(LocalStorage(job.parent / "out"))
    manifest = ledger.latest_manifest()
    assert manifest is not None
    ledger.storage.path(manifest.files[0]["name"]).unlink()
    (problem,) = verdict_of(job, 1)["problems"]
    assert "No such file" in problem


def test_there_must_be_a_job_to_verify(job: Path) -> None:
    done = run_cli("verify", job)
    assert done.returncode == 2
    assert "there is no job here to verify" in done.stderr
