"""What a run leaves for people."""

from __future__ import annotations

import errno
import itertools
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchgen.core.records import EngineStats
from batchgen.pipeline.stats import RunStats
from batchgen.storage import Disk, LocalStorage
from batchgen.store.runs import RunLog, memory_mib, new_run_id, utc_now

FOLDER = "_batchgen/runs/run-1"


@pytest.fixture
def log(storage):
    return RunLog(storage, "run-1")


def sample(elapsed_s):
    return RunStats(0.0, 10).sample(elapsed_s, 3, EngineStats(num_running=2))


def test_nothing_is_made_before_the_first_write(storage, log):
    assert log.run_id == "run-1"
    assert not storage.root.exists()


class FullDisk(Disk):
    def write(self, file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_costs_figures_and_no_run(tmp_path):
    log = RunLog(LocalStorage(tmp_path, disk=FullDisk()), "run-1")
    log.live({"state": "running"})
    log.finish({"state": "complete"})
    assert not list(tmp_path.rglob("*.json"))


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


def test_the_live_view_of_a_fleet_has_its_replicas(storage, log):
    log.live({"state": "running"}, replicas=[{"replica": 1}])
    assert json.loads(storage.read(f"{FOLDER}/live.json"))["replicas"] == [{"replica": 1}]


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
    assert columns == [*sample(0), "memory_mib", "replica", "restarts"]


def test_samples_are_as_they_were_given_with_the_memory(log):
    log.sample({**sample(1), "num_replicas": 3})
    (found,) = log.samples
    assert found == {**sample(1), "num_replicas": 3, "memory_mib": found["memory_mib"]}
    log.finish({})


class CountingStorage(LocalStorage):
    """Counts what is rewritten."""

    num_replaced = 0

    def replace(self, name: str, data: bytes) -> None:
        self.num_replaced += 1
        super().replace(name, data)


def test_a_long_run_writes_its_samples_ever_more_rarely(tmp_path):
    storage = CountingStorage(tmp_path / "out", temp_tag="run-a")
    log = RunLog(storage, "run-1")
    for at in range(3000):
        log.sample(sample(at))
    assert len(log.samples) == 3000
    # The first 50 after 12 each, then every time a fiftieth more.
    assert 100 < storage.num_replaced < 140


def replicas(elapsed_s, num):
    return [{**sample(elapsed_s), "replica": at, "restarts": 1, "host": "a"} for at in range(num)]


def table_of(storage):
    return pq.read_table(storage.path(f"{FOLDER}/stats.parquet"))


def test_replicas_have_rows_of_their_own(storage, log):
    log.sample(sample(0.0))
    log.sample_replicas(replicas(0.0, 2))
    log.sample_replicas([])
    log.finish({})
    table = table_of(storage)
    assert table["replica"].to_pylist() == [None, 0, 1]
    assert table["restarts"].to_pylist() == [None, 1, 1]
    assert len(log.samples) == 1


@pytest.mark.parametrize(("num", "times"), [(2, [0, 1, 2, 3]), (16, [0, 2, 3]), (40, [0, 3])])
def test_many_replicas_have_rows_more_rarely_but_the_last_ones(storage, log, num, times):
    for at in range(3):
        log.sample_replicas(replicas(float(at), num))
    log.sample_replicas(replicas(3.0, num), is_last=True)
    log.finish({})
    table = table_of(storage)
    assert table.num_rows == num * len(times)
    assert sorted(set(table["elapsed_s"].to_pylist())) == times


def test_of_very_many_rows_older_moments_are_thinned_out(storage, log, monkeypatch):
    monkeypatch.setattr("batchgen.store.runs._MOST_ROWS", 100)
    for at in range(500):
        log.sample_replicas(replicas(float(at), 4))
    log.finish({})
    table = table_of(storage)
    times = table["elapsed_s"].to_pylist()[::4]
    assert 50 <= table.num_rows <= 100
    assert table["replica"].to_pylist() == [0, 1, 2, 3] * len(times)
    assert times == sorted(times)
    assert times[-3:] == [497.0, 498.0, 499.0]
    gaps = [late - early for early, late in itertools.pairwise(times)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 8


def test_a_run_without_a_sample_leaves_an_empty_table(storage, log):
    path = log.finish({"state": "refused", "reason": "no"})
    assert path == str(storage.path(f"{FOLDER}/summary.json"))
    assert json.loads(Path(path).read_bytes()) == {"state": "refused", "reason": "no"}
    assert pq.read_table(storage.path(f"{FOLDER}/stats.parquet")).num_rows == 0


def test_the_engine_can_write_its_log_where_it_is_told(storage, log):
    Path(log.engine_log).write_text("hello", encoding="utf-8")
    assert storage.read(f"{FOLDER}/vllm.log") == b"hello"


def test_each_worker_has_a_log_and_warnings_of_all_are_counted_once(storage, log):
    assert log.num_engine_warnings() == 0
    line = "(EngineCore pid=7) WARNING 11-22 18:06:31 [cpu_worker.py:140] {}\n"
    for path, texts in (
        (log.engine_log, "a"),
        (log.engine_log_of(3), "ab"),
        (log.engine_log_of(214), "bc"),
        (str(storage.path(f"{FOLDER}/other.log")), "d"),
    ):
        Path(path).write_text("".join(map(line.format, texts)) + "INFO x\n", encoding="utf-8")
    assert storage.list(FOLDER) == [
        f"{FOLDER}/{name}.log" for name in ("other", "vllm-03", "vllm-214", "vllm")
    ]
    assert log.num_engine_warnings() == 3


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
