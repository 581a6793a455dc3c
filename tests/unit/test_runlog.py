"""What a run leaves for people."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchgen.records import EngineStats
from batchgen.runlog import RunLog, memory_mib, new_run_id, utc_now
from batchgen.stats import RunStats

FOLDER = "_batchgen/runs/run-1"


@pytest.fixture
def log(storage):
    return RunLog(storage, "_batchgen/runs", "run-1")


def sample(elapsed_s):
    return RunStats(0.0, 10).sample(elapsed_s, 3, EngineStats(num_running=2))


def test_nothing_is_made_before_the_first_write(storage, log):
    assert log.run_id == "run-1"
    assert not storage.root.exists()


def test_the_live_view_is_rewritten(storage, log):
    for state in ("starting the engine", "running"):
        log.live({"state": state, "num_left": 4})
    live = json.loads(storage.read(f"{FOLDER}/live.json"))
    assert live == {
        "run_id": "run-1",
        "pid": os.getpid(),
        "host": live["host"],
        "state": "running",
        "num_left": 4,
    }
    assert storage.list(FOLDER) == [f"{FOLDER}/live.json"]


def test_samples_are_written_every_twelfth_and_at_the_end(storage, log):
    for at in range(11):
        log.sample(sample(at))
    assert storage.read(f"{FOLDER}/stats.parquet") is None
    log.sample(sample(11))
    log.sample(sample(12))
    path = storage.path(f"{FOLDER}/stats.parquet")
    assert pq.read_table(path)["elapsed_s"].to_pylist() == list(range(12))
    log.finish({"state": "complete"})
    table = pq.read_table(path)
    assert table["elapsed_s"].to_pylist() == list(range(13))
    assert table["num_running"].to_pylist() == [2] * 13
    assert table["kv_cache_usage"].null_count == 13
    assert min(table["memory_mib"].to_pylist()) > 10


def test_every_figure_of_a_sample_has_a_column(storage, log):
    log.sample(sample(0))
    log.finish({})
    columns = pq.read_schema(storage.path(f"{FOLDER}/stats.parquet")).names
    assert columns == [*sample(0), "memory_mib"]


def test_a_run_without_a_sample_leaves_an_empty_table(storage, log):
    path = log.finish({"state": "refused", "reason": "no"})
    assert path == str(storage.path(f"{FOLDER}/summary.json"))
    assert json.loads(Path(path).read_bytes()) == {"state": "refused", "reason": "no"}
    assert pq.read_table(storage.path(f"{FOLDER}/stats.parquet")).num_rows == 0


def test_the_engine_can_write_its_log_where_it_is_told(storage, log):
    Path(log.engine_log).write_text("hello", encoding="utf-8")
    assert storage.read(f"{FOLDER}/vllm.log") == b"hello"


def test_run_ids_sort_by_time_and_never_repeat():
    early = datetime(2024, 2, 29, 23, 59, 58, tzinfo=UTC)
    late = datetime(2024, 3, 1, tzinfo=UTC)
    first, second = new_run_id(early), new_run_id(late)
    assert first.startswith("20240229T235958-")
    assert len(first) == 22
    assert first < second
    assert len({new_run_id(early) for _ in range(100)}) == 100


def test_the_clock_for_records_is_utc():
    assert utc_now().utcoffset().total_seconds() == 0


def test_memory_is_in_mib():
    assert 10 < memory_mib() < 100_000
