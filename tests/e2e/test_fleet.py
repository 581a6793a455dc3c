"""Many workers, one snapshot: the driver and its workers on the echo engine, in threads."""

from __future__ import annotations

import errno
import gzip
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest

from batchgen.api import load
from batchgen.cluster.driver import ManyEngines
from batchgen.cluster.messages import Failed, Ready
from batchgen.core.errors import ConfigError, ExitCode, StorageError
from batchgen.pipeline.compute import OneEngine
from batchgen.pipeline.context import StopSwitch
from batchgen.pipeline.job_run import JobRun
from batchgen.storage import Disk
from tests.e2e.support import published, write_rows
from tests.faulty import BACKEND
from tests.thread_cluster import ThreadCluster

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from batchgen.cluster.messages import Gone, Report
    from batchgen.job.model import JobConfig

ROWS = 1600
SLOW = {"max_num_seqs": 64, "step_s": 0.02, "max_steps": 8}


def tables(folder: Path, **changes: Any) -> dict[str, Any]:
    job: dict[str, Any] = {
        "input": {"path": str(folder / "in.jsonl")},
        "prompt": {"user": "Repeat: {{ text }}"},
        "model": {"backend": "echo", "engine": SLOW},
        "sampling": {"max_tokens": 40, "temperature": 0},
        "output": {"path": str(folder / "out")},
        "checks": {"allow_truncated": True},
        "run": {"flush_s": 0.5, "stats_s": 0.5},
    }
    for name, keys in changes.items():
        job[name] = {**job.get(name, {}), **keys}
    return job


def run(job: dict[str, Any], cluster: Callable[..., ThreadCluster] = ThreadCluster) -> Any:
    config = load(job)
    compute = partial(ManyEngines, connect=cluster) if config.run.is_cluster else OneEngine
    return JobRun(config, stop=StopSwitch(), compute=compute).run()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    write_rows(folder / "in.jsonl", ROWS)
    assert run(tables(folder)).exit_code == 0
    return published(folder / "out")


def blind(report: Report) -> None:
    """Make a worker say that it does not see the input."""
    events = [Ready(sees_input=False) if isinstance(e, Ready) else e for e in report.events]
    report.events[:] = events  # type: ignore[index]


def test_three_replicas_publish_what_one_publishes(
    tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    write_rows(tmp_path / "in.jsonl", ROWS)
    summary = run(tables(tmp_path, run={"replicas": 3}))
    assert summary.exit_code == 0
    assert published(tmp_path / "out") == expected
    assert summary.run["num_ok"] == sum(row["gen_status"] == "ok" for row in expected)


def test_each_replica_may_have_two_engines(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    write_rows(tmp_path / "in.jsonl", ROWS)
    summary = run(tables(tmp_path, run={"replicas": 2, "engines_per_gpu": 2}))
    assert summary.exit_code == 0
    assert published(tmp_path / "out") == expected
    assert summary.engine["settings"]["engines_per_gpu"] == 2


def test_vectors_of_replicas_are_those_of_one_engine(tmp_path: Path) -> None:
    found = []
    for num in (1, 2):
        (folder := tmp_path / str(num)).mkdir()
        write_rows(folder / "in.jsonl", ROWS)
        job = tables(folder, prompt={"template": "{{ text }}"}, run={"replicas": num})
        del job["sampling"], job["prompt"]["user"]
        assert run({"task": "embed", **job}).exit_code == 0
        found.append(published(folder / "out"))
    assert found[0] == found[1]
    assert {len(row["gen_embedding"]) for row in found[0] if row["gen_status"] == "ok"} == {384}


class LateCluster(ThreadCluster):
    """The second worker is heard of only once the first has rows."""

    def __init__(self, job: JobConfig) -> None:
        super().__init__(job)
        self._held: list[tuple[int, Report | Gone]] = []

    def wait(self, timeout_s: float) -> Sequence[tuple[int, Report | Gone]]:
        news = [*self._held, *super().wait(timeout_s)]
        is_early = not self.leases.get(1)
        self._held = [one for one in news if one[0] == 2] if is_early else []
        return [one for one in news if one not in self._held]


def test_who_is_heard_of_first_does_not_take_a_whole_small_job(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 400)
    clusters: list[LateCluster] = []

    def make(job: JobConfig) -> LateCluster:
        clusters.append(LateCluster(job))
        return clusters[0]

    assert run(tables(tmp_path, run={"replicas": 2}), make).exit_code == 0
    first, second = (clusters[0].leases[number] for number in (1, 2))
    assert sum(len(rows) for rows in first[0].rows.values()) == 100  # Half of its share.
    assert second


def test_rows_of_workers_that_die_are_done_by_others_and_once(
    tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    write_rows(tmp_path / "in.jsonl", ROWS)
    killed: list[int] = []

    def kill_some(_: ThreadCluster, number: int, report: Report) -> bool:
        is_due = len(killed) < 4 and report.look is not None and report.look.num_in_flight > 20
        if is_due and number not in killed:
            killed.append(number)
            return False
        return True

    job = tables(tmp_path, run={"replicas": 3})
    summary = run(job, lambda job: ThreadCluster(job, on_report=kill_some))
    assert len(killed) > 2
    assert summary.exit_code == 0
    assert published(tmp_path / "out") == expected
    assert summary.run["num_ok"] + summary.run["num_errors"] == len(expected)


def test_a_worker_that_falls_silent_is_given_up(
    tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    write_rows(tmp_path / "in.jsonl", ROWS)
    muted: list[int] = []

    def mute_first(cluster: ThreadCluster, number: int, report: Report) -> bool:
        if not muted and report.look is not None and report.look.num_in_flight > 20:
            muted.append(number)
            cluster.hired[number].is_mute = True
        return True

    summary = run(
        tables(tmp_path, run={"replicas": 2, "stall_s": 2.0}),
        lambda job: ThreadCluster(job, on_report=mute_first),
    )
    assert muted
    assert any("has said nothing for" in text for text in summary.warnings)
    assert published(tmp_path / "out") == expected


@pytest.mark.parametrize("is_first", [True, False])
def test_settings_that_one_node_refuses_are_the_jobs_trouble_only_if_no_engine_took_them(
    tmp_path: Path, is_first: bool, expected: list[dict[str, Any]]
) -> None:
    write_rows(tmp_path / "in.jsonl", ROWS)
    refused = []

    def refuse(_: ThreadCluster, number: int, report: Report) -> bool:
        is_up = report.look is not None and report.look.num_in_flight > 20
        if not refused and (is_first or is_up):
            refused.append(number)
            report.events[:] = [Failed(ConfigError("[model]", ["vLLM refuses it"]))]  # type: ignore[index]
        return True

    job = tables(tmp_path, run={"replicas": 2})
    if is_first:
        with pytest.raises(ConfigError, match="vLLM refuses it"):
            run(job, lambda job: ThreadCluster(job, on_report=refuse))
        return
    summary = run(job, lambda job: ThreadCluster(job, on_report=refuse))
    assert any("vLLM refuses it" in text for text in summary.warnings)
    assert published(tmp_path / "out") == expected


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl"])
def test_rows_travel_by_way_of_the_driver_where_they_must(
    tmp_path: Path, expected: list[dict[str, Any]], suffix: str
) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    job = tables(tmp_path, run={"replicas": 2})
    if suffix.endswith(".gz"):
        (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
        source.unlink()
        job["input"]["path"] = str(tmp_path / "in.jsonl.gz")
    else:
        job["run"]["order"] = "prefix"
    summary = run(job)
    assert summary.exit_code == 0
    rows = [{**row, "gen_error": None} for row in published(tmp_path / "out")]
    assert rows == [{**row, "gen_error": None} for row in expected]


def test_rows_travel_by_way_of_the_driver_if_a_worker_does_not_see_the_input(
    tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    write_rows(tmp_path / "in.jsonl", ROWS)

    def blind_second(cluster: ThreadCluster, number: int, report: Report) -> bool:
        if number == 2:
            blind(report)
        return True

    clusters: list[ThreadCluster] = []

    def make(job: JobConfig) -> ThreadCluster:
        clusters.append(ThreadCluster(job, on_report=blind_second))
        return clusters[-1]

    summary = run(tables(tmp_path, run={"replicas": 2}), make)
    assert published(tmp_path / "out") == expected
    assert all(lease.payload is not None for lease in clusters[0].leases[2])
    assert any("the input is not to be seen" in text for text in summary.warnings)


@pytest.mark.parametrize("is_killed", [False, True])
def test_equal_requests_are_computed_once_whoever_gets_them(
    tmp_path: Path, is_killed: bool
) -> None:
    lines = [json.dumps({"id": n, "text": f"row {n % 700}"}) for n in range(ROWS)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    job = tables(tmp_path, run={"replicas": 3, "dedupe": "always"}, sampling={"temperature": 0.7})
    on_report = kill_once() if is_killed else None
    summary = run(job, lambda job: ThreadCluster(job, on_report=on_report))
    assert summary.num_ok == ROWS
    assert summary.num_copied == ROWS - 700
    rows = published(tmp_path / "out")
    assert len({row["gen_request_key"] for row in rows}) == 700
    assert [row["id"] for row in rows] == list(range(ROWS))


def test_a_row_that_kills_engines_ends_as_an_error_and_no_other_does(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [{"id": n, "text": "boom" if n == 1234 else f"row {n}"} for n in range(2000)]
    source.write_text("\n".join(map(json.dumps, lines)))
    faults = [{"kind": "poison", "text": "boom"}]
    job = tables(tmp_path, run={"replicas": 2}, gate={"max_error_rate": 1.0})
    job["model"] = {"backend": BACKEND, "engine": {**SLOW, "faults": faults, "in_process": True}}
    summary = run(job)
    assert (summary.num_ok, summary.num_errors) == (1999, 1)
    (error,) = [row for row in published(tmp_path / "out") if row["gen_status"] == "error"]
    assert (error["id"], error["gen_error_type"]) == (1234, "engine_crash")


def test_a_row_that_kills_whole_workers_ends_as_an_error_and_no_other_does(
    tmp_path: Path,
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(json.dumps({"id": n, "text": f"row {n}"}) for n in range(1000)))
    killer = 613

    def dies_of(cluster: ThreadCluster, number: int, report: Report) -> bool:
        return not any(killer in lease.rows.get(0, ()) for lease in cluster.leases.get(number, []))

    summary = run(
        tables(tmp_path, run={"replicas": 2}, gate={"max_error_rate": 1.0}),
        lambda job: ThreadCluster(job, on_report=dies_of),
    )
    assert (summary.num_ok, summary.num_errors) == (999, 1)
    (error,) = [row for row in published(tmp_path / "out") if row["gen_status"] == "error"]
    assert (error["id"], error["gen_error_type"]) == (killer, "engine_crash")
    assert "with this row alone" in error["gen_error"]


def test_stopping_keeps_what_is_finished_and_a_later_run_goes_on(
    tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    write_rows(tmp_path / "in.jsonl", ROWS)
    job = tables(tmp_path, run={"replicas": 2})
    stop = StopSwitch()

    def ask_to_stop(_: ThreadCluster, __: int, report: Report) -> bool:
        if report.look is not None and report.look.counts.num_ok > 200:
            stop.drain()
        return True

    compute = partial(ManyEngines, connect=lambda job: ThreadCluster(job, on_report=ask_to_stop))
    first = JobRun(load(job), stop=stop, compute=compute).run()
    assert first.exit_code == ExitCode.STOPPED
    assert 200 < first.num_durable < ROWS
    second = run({**job, "run": {"flush_s": 0.5}})
    assert second.exit_code == 0
    assert second.run["num_resumed"] == first.num_durable
    assert published(tmp_path / "out") == expected


def test_a_night_computes_only_what_changed(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    job = tables(tmp_path, run={"replicas": 2})
    run(job)
    source.write_text(source.read_text().replace("row 17 ", "line 17 "))
    write_rows(tmp_path / "more.jsonl", 100, start=ROWS)
    job["input"]["path"] = str(tmp_path / "*.jsonl")
    summary = run(job)
    assert summary.run["num_ok"] < 110
    alone = tables(tmp_path, input={"path": job["input"]["path"]})
    alone["output"]["path"] = str(tmp_path / "again")
    run(alone)
    assert published(tmp_path / "out") == published(tmp_path / "again")


def kill_once(min_num_ok: int = 0) -> Callable[[ThreadCluster, int, Report], bool]:
    """Kill a worker that is busy and has told of more than so many rows."""
    killed: list[int] = []

    def on_report(cluster: ThreadCluster, number: int, report: Report) -> bool:
        look = report.look
        if killed or look is None or look.num_in_flight < 8 or look.counts.num_ok < min_num_ok:
            return True
        killed.append(number)
        return False

    return on_report


@pytest.mark.parametrize("is_killed", [True, False])
def test_rows_that_cannot_be_copied_after_all_are_computed_by_the_same_workers(
    tmp_path: Path, is_killed: bool
) -> None:
    lines = [{"id": n, "text": f"row {n % 300}", "good": n < 300} for n in range(600)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rules = {"rules": ["good"], "allow_truncated": True}
    job = tables(tmp_path, checks=rules, gate={"max_error_rate": 1.0}, run={"replicas": 2})
    # The second task begins when each worker has answered some 150 rows.
    on_report = kill_once(200) if is_killed else None
    summary = run(job, lambda job: ThreadCluster(job, on_report=on_report))
    assert (summary.num_ok, summary.num_errors) == (300, 300)
    assert summary.run["num_ok"] + summary.run["num_errors"] == 600
    rows = published(tmp_path / "out")
    assert [row["id"] for row in rows if row["gen_status"] == "ok"] == list(range(300))


def test_a_death_does_not_give_a_bases_answer_to_two_rows_with_draws_of_their_own(
    tmp_path: Path,
) -> None:
    source = tmp_path / "a.parquet"
    pl.DataFrame({"id": range(100), "text": [f"row {n}" for n in range(100)]}).write_parquet(source)
    job = tables(tmp_path, sampling={"temperature": 0.7}, input={"path": str(source)})
    run(job)
    more = {"id": range(600), "text": [f"row {n % 100}" for n in range(600)]}
    pl.DataFrame(more).write_parquet(source)
    job["run"]["replicas"] = 2
    summary = run(job, lambda job: ThreadCluster(job, on_report=kill_once()))
    assert (summary.num_ok, summary.num_copied) == (600, 100)


def test_rows_that_come_back_do_not_go_to_a_worker_that_does_not_see_the_input(
    tmp_path: Path,
) -> None:
    write_rows(tmp_path / "in.jsonl", ROWS)
    killed: list[int] = []

    def blind_second(cluster: ThreadCluster, number: int, report: Report) -> bool:
        if number == 2:
            blind(report)
        look = report.look
        is_due = number == 1 and not killed and look is not None and look.num_in_flight > 8
        killed.extend([1] * is_due)
        return not is_due

    clusters: list[ThreadCluster] = []

    def make(job: JobConfig) -> ThreadCluster:
        clusters.append(ThreadCluster(job, on_report=blind_second))
        return clusters[-1]

    summary = run(tables(tmp_path, run={"replicas": 2}), make)
    assert killed
    assert summary.exit_code == 0
    assert all(lease.payload is not None for lease in clusters[0].leases[2])


class RefusingDisk(Disk):
    """Is full whenever a worker is to be sealed, so many times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def link(self, source: Path, target: Path) -> None:
        if "seals" in target.parts and self.times:
            self.times -= 1
            raise OSError(errno.ENOSPC, "no space left on device")
        super().link(source, target)


@pytest.mark.parametrize("grace_s", [300, 0])
def test_a_worker_is_given_up_once_the_disk_takes_its_seal(
    tmp_path: Path, grace_s: int, expected: list[dict[str, Any]]
) -> None:
    write_rows(tmp_path / "in.jsonl", ROWS)
    job = load(tables(tmp_path, run={"replicas": 2, "disk_grace_s": grace_s}))
    compute = partial(
        ManyEngines, connect=lambda job: ThreadCluster(job, on_report=kill_once(min_num_ok=1))
    )
    made = JobRun(job, stop=StopSwitch(), compute=compute, disk=RefusingDisk(3))
    if not grace_s:
        with pytest.raises(StorageError, match="no space left"):
            made.run()
        return
    summary = made.run()
    assert any("is tried again for 300 s" in text for text in summary.warnings)
    assert published(tmp_path / "out") == expected
