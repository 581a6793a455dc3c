"""Whole runs whose output is in a bucket of a real S3 server, by the real command line's code."""

from __future__ import annotations

import json
import threading
import time

import pytest
from click.testing import CliRunner

import batchgen
from batchgen.cli import cli
from batchgen.core.errors import BatchgenError
from batchgen.storage.remote import storage_at
from batchgen.store.books import STATE
from tests import s3
from tests.e2e.support import VOLATILE, write_job, write_rows

ROWS = 150


@pytest.fixture(scope="module", autouse=True)
def endpoint(tmp_path_factory):
    with s3.s3_server(tmp_path_factory.mktemp("s3") / "data") as endpoint:
        yield endpoint


@pytest.fixture
def url(request):
    return f"s3://{s3.BUCKET}/{request.node.originalname}"


@pytest.fixture
def job(tmp_path, url):
    write_rows(tmp_path / "in.jsonl", ROWS)
    return write_job(
        tmp_path,
        "in.jsonl",
        output={"path": url, "keep_snapshots": 1},
        gate={"max_error_rate": 0.5},
    )


def shell(*args):
    """What the shell prints, and its exit code."""
    done = CliRunner().invoke(cli, [*map(str, args)])
    if isinstance(done.exception, BatchgenError):
        return str(done.exception), done.exception.exit_code
    return done.stdout, done.exit_code


def rows(output):
    return batchgen.read(output).drop(VOLATILE).collect().to_dicts()


def test_nights_in_a_bucket_are_nights_in_a_folder(tmp_path, job, url, monkeypatch):
    for num_rows in (ROWS, ROWS + 40):
        write_rows(tmp_path / "in.jsonl", num_rows)
        summaries = [
            batchgen.run(job, overrides={"output.path": path})
            for path in (url, str(tmp_path / "out"))
        ]
        assert [one.state for one in summaries] == ["complete", "complete"]
        there, here = (one.run["num_ok"] for one in summaries)
        assert there == here
        assert rows(url) == rows(tmp_path / "out")
        assert batchgen.run(job).state == "nothing_to_do"
        (name,) = json.loads(shell("status", url, "--json")[0])["files"]
        assert name.startswith(f"{url}/{STATE}/files/")
    retried = batchgen.run(job, retry_errors=True)
    assert retried.run["num_errors"] == 3  # Every bad line again, and nothing else.
    for text in (shell("status", url), shell("status", job)):
        assert "complete, published at" in text[0]
    assert shell("verify", url)[1] == 0
    assert "row 1" in shell("show", url, "-n", "2")[0]
    assert "nothing to do" in shell("plan", job)[0]
    logs = storage_at(batchgen.api.output_of(url)).list(f"{STATE}/runs")
    assert len(logs) == 3


def test_whichever_request_goes_wrong_the_rows_are_right(tmp_path, job, url, endpoint, monkeypatch):
    monkeypatch.setattr("batchgen.storage.remote._WAITS_S", (0.01,) * 6)
    write_rows(tmp_path / "in.jsonl", 20)
    with s3.Proxy(endpoint, point=10**9) as proxy:
        how = {"storage.endpoint": proxy.url, "storage.timeout_s": 5}
        batchgen.run(job, overrides={"output.path": f"{url}-whole", **how})
        num = proxy.asked.total()
        for fault, part in (("away", 0.5), ("silent", 0.85)):
            proxy.fault, proxy.point = fault, proxy.asked.total() + int(part * num)
            done = batchgen.run(job, overrides={"output.path": f"{url}-{fault}", **how})
            assert proxy.asked.total() > proxy.point
            assert done.state == "complete"
            assert rows(f"{url}-{fault}") == rows(f"{url}-whole")


def test_a_damaged_object_is_told_and_computed_again(job, url):
    batchgen.run(job)
    storage = storage_at(batchgen.api.output_of(url))
    (name,) = storage.list(f"{STATE}/files")
    before = rows(url)
    whole = storage.read(name)
    storage.replace(name, whole[:100] + b"!" + whole[101:])
    text, code = shell("verify", url)
    assert (code, "published rows are damaged" in text) == (1, True)
    assert shell("run", job)[1] == 1
    assert batchgen.run(job, retry_errors=True).state == "complete"
    assert rows(url) == before
    assert shell("verify", url)[1] == 0


def test_a_second_run_is_told_who_is_at_work(job, url):
    slow = {"model.engine": {"step_s": 0.05, "max_num_seqs": 1}}
    runner = threading.Thread(target=lambda: batchgen.run(job, overrides=slow))
    runner.start()
    until_s = time.monotonic() + 60
    while '"state": "running"' not in shell("status", url, "--json")[0]:
        assert time.monotonic() < until_s
    text, code = shell("run", job)
    assert (code, "is at work on this job" in text) == (75, True)
    runner.join()
    assert batchgen.run(job, overrides=slow).state == "nothing_to_do"


def test_what_was_published_is_looked_at_and_goes_as_in_a_folder(tmp_path, job, url):
    out = tmp_path / "out"
    places, nights = (url, str(out)), []
    for num_rows in (ROWS, ROWS + 40):
        write_rows(tmp_path / "in.jsonl", num_rows)
        for path in places:
            batchgen.run(job, overrides={"output.path": path, "output.keep_snapshots": 5})
        nights.append(rows(url))
    diffs = [shell("diff", path, "--on", "id", "--json") for path in places]
    assert [code for _, code in diffs] == [0, 0]
    there, here = (json.loads(text) for text, _ in diffs)
    assert there | {"output": ""} == here | {"output": ""}
    same = json.loads(shell("compare", url, out, "--json")[0])
    assert (same["num_both"] > ROWS, same["num_differ"]) == (True, 0)
    assert shell("report", url)[0].strip().startswith(f"{url}/{STATE}/runs/")
    text, code = shell("prune", url, "--older-than", "1h")
    assert (code, text.startswith("0 of 2 snapshots removed")) == (0, True)
    assert shell("rollback", url)[1] == 0
    assert rows(url) == nights[0]
    listed = json.loads(shell("snapshots", url, "--json")[0])["snapshots"]
    assert [one["is_shown"] for one in listed] == [False, False, True]
    assert "2 of 3 snapshots" in shell("prune", url, "--keep", "1")[0]
    assert (rows(url), shell("verify", url)[1]) == (nights[0], 0)


def test_a_score_is_that_of_a_folder(tmp_path, job, url):
    out = tmp_path / "out"
    asked = {"output.choice": ["a", "b"], "gate.max_error_rate": 1.0}
    for path in (url, str(out)):
        batchgen.run(job, overrides={"output.path": path, **asked})
    scores = [shell("score", path, "--gold", "id", "--json") for path in (url, out)]
    assert [code for _, code in scores] == [0, 0]
    assert scores[0][0].replace(url, "") == scores[1][0].replace(str(out), "")


def test_what_is_not_there_yet_is_refused_in_a_line(job, url):
    text, code = shell("try", job, "-n", "1")
    assert (code, text) == (
        2,
        f"{url}: is in an object store, expected a folder; this is not supported there yet",
    )


def test_a_bucket_that_is_not_ours_is_refused_before_an_engine_starts(job, url):
    storage_at(batchgen.api.output_of(url)).put_if_absent("theirs", b"x")
    for verb in ("run", "plan", "doctor"):
        text, code = shell(verb, job)
        assert (code, "not batchgen's" in text) == (2, True)
