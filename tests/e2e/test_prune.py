"""Deleted means gone: what a removed row said is nowhere once its snapshots are pruned."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import polars as pl
import pytest

import batchgen
from batchgen.core.errors import GateError
from batchgen.source.text import DIGEST_BYTES
from batchgen.store.books import STATE
from tests.e2e.support import run_cli, shown, write_job

CANARY = "yellow-canary-4711"
LINES = {
    17: json.dumps({"id": 17, "text": f"my name is {CANARY}"}),
    18: json.dumps({"id": 18, "text": None, "note": CANARY}),  # An error row, in the examples too.
}
DIGESTS = [hashlib.sha256(line.encode()).digest()[:DIGEST_BYTES] for line in LINES.values()]


def write_day(folder: Path, *, with_canary: bool, num_rows: int = 60) -> None:
    lines = [json.dumps({"id": n, "text": f"row {n}"}) for n in range(num_rows)]
    if with_canary:
        lines = [LINES.get(n, line) for n, line in enumerate(lines)]
    (folder / "in.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def told_in(root: Path) -> list[str]:
    """Files below a folder that say it: as it is, as Parquet, or as a row's digest."""
    found = []
    for path in sorted(root.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            texts = [data.decode("utf-8", "replace"), path.name]
            if path.suffix == ".parquet":
                texts.append(str(pl.read_parquet(path).to_dicts()))
            if any(CANARY in text for text in texts) or any(one in data for one in DIGESTS):
                found.append(str(path.relative_to(root)))
    return found


@pytest.fixture
def job(tmp_path: Path) -> Path:
    gate = {"max_error_rate": 1.0}
    output = {"rows_per_file": 20}
    return write_job(tmp_path, "in.jsonl", output=output, gate=gate, run={"flush_rows": 10})


def test_a_removed_row_is_nowhere_once_its_snapshots_are_pruned(job: Path) -> None:
    folder = job.parent
    write_day(folder, with_canary=True)
    with pytest.raises(GateError):  # Its parts stay for the next run, its summary for people.
        batchgen.run(job, overrides=["gate.max_error_rate=0.001"])
    batchgen.run(job)
    assert run_cli("try", job, "-n", "30").returncode == 0
    assert len(told_in(folder / "out")) > 2
    write_day(folder, with_canary=False)
    batchgen.run(job)
    told = told_in(folder / "out")  # In the snapshot before, on purpose.
    assert {Path(name).parts[1] for name in told} >= {"files", "rows", "runs"}, told
    done = run_cli("prune", job, "--keep", "1")
    assert done.returncode == 0, done.stderr
    assert told_in(folder / "out") == []
    assert run_cli("verify", job).returncode == 0
    # What stays is what a next night needs: nothing is computed again.
    write_day(folder, with_canary=False, num_rows=61)
    assert batchgen.run(job).run["num_ok"] == 1


def test_a_night_is_pruned_by_the_default_of_a_new_output_and_never_of_an_old_one(
    job: Path,
) -> None:
    folder, plans = job.parent, job.parent / "out" / STATE / "plan"
    write_day(folder, with_canary=False)
    batchgen.run(job)
    plan = json.loads((plans / "000001.json").read_text())
    assert plan["keeps"] == 30
    batchgen.run(job, fresh=True, overrides=["output.keep_snapshots=1"])
    assert json.loads((plans / "000002.json").read_text())["keeps"] == 30
    assert len(list(plans.iterdir())) == 1
    batchgen.run(job, fresh=True, overrides=["output.keep_snapshots=0"])
    assert len(list(plans.iterdir())) == 2


def test_how_pruning_is_asked_and_what_it_tells(job: Path) -> None:
    write_day(job.parent, with_canary=False)
    for _ in range(3):
        batchgen.run(job, fresh=True)
    assert run_cli("prune", job).returncode == 2
    assert run_cli("prune", job, "--older-than", "30").returncode == 2
    assert json.loads(run_cli("prune", job, "--older-than", "1d", "--json").stdout)["removed"] == []
    told = json.loads(run_cli("prune", job, "--keep", "2", "--dry-run", "--json").stdout)
    assert [line["number"] for line in told["removed"]] == [1]
    assert len(told["runs"]) == 1
    assert told["freed_bytes"] > told["removed"][0]["size_bytes"]
    done = run_cli("prune", job, "--keep", "2")
    assert done.stdout.startswith("removed:\n     1  ")
    assert "1 of 3 snapshots and 1 run folder removed, " in done.stdout
    names = shown(job.parent / "out")
    assert len(names) == 3
    assert run_cli("verify", job).returncode == 0
