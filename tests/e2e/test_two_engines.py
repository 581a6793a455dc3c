"""Two engines are no other job: the same rows, seeds and keys, and either goes on for the other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import batchgen
from batchgen.core.errors import ConfigError
from batchgen.job.load import parse_job
from tests.e2e.support import as_vectors, published, run_cli, summary_of, write_job, write_rows

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TWO = ("--set", "run.engines_per_gpu=2")
SAMPLING = {"temperature": 1.0, "max_tokens": 16}
NUM_ROWS = 400


def make_job(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    write_rows(folder / "in.jsonl", NUM_ROWS)
    return write_job(
        folder,
        "in.jsonl",
        sampling=SAMPLING,
        output={"path": "out", "with_seed": True},
        model={"backend": "echo", "engine": {"max_num_seqs": 16, "max_steps": 5}},
    )


def test_the_snapshot_is_that_of_one_engine_seeds_and_keys_too(tmp_path: Path) -> None:
    one, two = make_job(tmp_path / "one"), make_job(tmp_path / "two")
    plan = json.loads(run_cli("plan", two, "--json", *TWO).stdout)
    alone, shared = summary_of(one), summary_of(two, *TWO)
    assert shared["engine"]["settings"] == plan["engine_settings"] == {"engines_per_gpu": 2}
    for summary in (alone, shared):
        assert (summary["state"], summary["warnings"]) == ("complete", [])
    rows = published(tmp_path / "two" / "out")
    assert rows == published(tmp_path / "one" / "out")
    assert {row["gen_seed"] is None for row in rows if row["gen_status"] == "ok"} == {False}
    logs = (tmp_path / "two" / "out" / "_batchgen" / "runs" / shared["run_id"]).glob("*.log")
    assert {path.name for path in logs} == {"vllm.log", "vllm-02.log"}


def test_vectors_are_those_of_one_engine(tmp_path: Path) -> None:
    found = []
    for name, more in (("one", ()), ("two", TWO)):
        job = make_job(tmp_path / name)
        job.write_text(as_vectors(job.read_text()).replace("with_seed = true\n", ""))
        assert summary_of(job, *more)["engine"]["settings"] == (
            {"engines_per_gpu": 2} if more else {}
        )
        found.append(published(tmp_path / name / "out"))
    assert found[0] == found[1]
    assert found[0][0]["gen_embedding"] is not None


def test_either_goes_on_with_what_the_other_has_done(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    summary_of(job, *TWO)
    assert summary_of(job)["state"] == "nothing_to_do"
    write_rows(tmp_path / "in.jsonl", NUM_ROWS + 100)
    longer = summary_of(job, *TWO)
    assert longer["num_carried"] == summary_of(job)["num_planned"] - 100
    assert batchgen.read(job).collect()["id"].drop_nulls().is_sorted()


def test_rows_with_equal_requests_run_once(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"id": 1, "text": "the same"}\n' * 100)
    summary = summary_of(job, *TWO, "--set", "sampling.temperature=0")
    assert (summary["num_ok"], summary["num_copied"]) == (100, 99)


@pytest.mark.parametrize("wrong", [0, 17, "many"])
def test_it_is_one_to_sixteen_or_auto(
    job_tables: Callable[..., dict[str, Any]], tmp_path: Path, wrong: object
) -> None:
    tables = job_tables(run={"engines_per_gpu": wrong})
    with pytest.raises(ConfigError, match=r"run\.engines_per_gpu"):
        parse_job(tables, base=tmp_path, where="job.toml")
