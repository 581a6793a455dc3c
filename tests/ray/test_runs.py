"""Whole runs on a real Ray cluster: the same snapshot as with one engine."""

from __future__ import annotations

import json
import signal
import subprocess
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest

import batchgen
from tests.e2e.support import (
    as_vectors,
    command,
    published,
    run_cli,
    summary_of,
    write_job,
    write_rows,
)
from tests.ray.support import nodes, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.ray.support import Nodes

ROOT = Path(__file__).parents[2]
ROWS = 1500
ENGINE = {"max_num_seqs": 16, "step_s": 0.03, "max_steps": 6, "in_process": False}
MODEL = {"backend": "echo", "engine": ENGINE}


@pytest.fixture(scope="module")
def three() -> Iterator[Nodes]:
    with nodes(3, cpus=1) as found:
        yield found


def on(cluster: Nodes, **run: Any) -> dict[str, Any]:
    return {"replicas": 2, "ray_address": cluster.address, "flush_s": 0.5, "stats_s": 0.5, **run}


def replicas_now(job: Path) -> list[dict[str, Any]]:
    status = json.loads(run_cli("status", job, "--json").stdout)
    return list(status.get("run", {}).get("replicas", []))


def test_nodes_and_the_driver_die_and_the_snapshot_is_that_of_one_engine(
    three: Nodes, tmp_path: Path
) -> None:
    write_rows(tmp_path / "in.jsonl", ROWS)
    assert run_cli("run", write_job(tmp_path, "in.jsonl", model=MODEL)).returncode == 0
    expected = published(tmp_path / "out")
    many = tmp_path / "many"
    many.mkdir()
    write_rows(many / "in.jsonl", ROWS)
    job = write_job(many, "in.jsonl", model=MODEL, run=on(three, replicas="auto"))
    extra = three.add(cpus=1)
    # So slow that it is not through before a busy machine has seen what it waits for.
    slowly = command("run", job, "--set", "run.max_in_flight=2")

    def num_working() -> int:
        return sum(one["num_ok"] > 20 for one in replicas_now(job))

    with subprocess.Popen(slowly, stderr=subprocess.PIPE, text=True) as first:
        wait_until(lambda: num_working() >= 3, 90)
        three.remove(extra)
        wait_until(lambda: any(one["restarts"] for one in replicas_now(job)), 90)
        first.send_signal(signal.SIGKILL)
    summary = summary_of(job)
    assert 0 < summary["run"]["num_resumed"] < ROWS
    assert published(many / "out") == expected
    (stats,) = (many / "out").glob(f"_batchgen/runs/{summary['run_id']}/stats.parquet")
    frame = pl.read_parquet(stats)
    # A worker that comes up when the others are through has nothing to tell.
    assert len(set(frame["replica"].unique()) - {None}) >= 2
    whole = frame.filter(pl.col("replica").is_null())
    assert whole["num_ok"][-1] == summary["run"]["num_ok"]


def test_vectors_of_replicas_are_those_of_one_engine(three: Nodes, tmp_path: Path) -> None:
    found = []
    for run in ({}, on(three)):
        (folder := tmp_path / str(len(found))).mkdir()
        write_rows(folder / "in.jsonl", ROWS)
        job = write_job(folder, "in.jsonl", model=MODEL, run=run)
        job.write_text(as_vectors(job.read_text()))
        assert summary_of(job)["state"] == "complete"
        found.append(published(folder / "out"))
    assert found[0] == found[1]
    assert {len(row["gen_embedding"]) for row in found[0] if row["gen_status"] == "ok"} == {384}


@pytest.mark.vllm
def test_two_vllm_replicas_answer_what_one_answers(three: Nodes, tmp_path: Path) -> None:
    tables = tomllib.loads((ROOT / "jobs" / "quickstart.toml").read_text())
    tables["input"]["path"] = str(ROOT / "sample_data" / "tickets.jsonl")
    tables["input"]["limit"] = 120
    tables["model"] |= {"name": str(ROOT / "sample_data" / "model"), "max_num_seqs": 16}
    tables["model"]["engine"]["kv_cache_memory_bytes"] = 32 << 20
    tables["output"]["schema"] = str(ROOT / "jobs" / "ticket.schema.json")
    answers = []
    for run in ({}, on(three)):
        tables["output"]["path"] = str(tmp_path / f"out-{len(answers)}")
        summary = batchgen.run({**tables, "run": run})
        assert summary.state == "complete"
        columns = ["subject", "gen_status", "gen_label", "gen_urgency", "gen_request_key"]
        answers.append(batchgen.read(tables["output"]["path"]).select(columns).collect())
    assert answers[0].equals(answers[1])
    engines = summary.engine
    assert engines["name"] == "vllm"
