"""Each task but to generate, from the input to the published files; most with the echo engine."""

from __future__ import annotations

import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

import batchgen
from batchgen.core.errors import GateError
from batchgen.job.load import parse_job
from tests.e2e.support import command
from tests.fakes import write_jsonl

ROOT = Path(__file__).parents[2]
ROWS: list[dict[str, Any]] = [{"id": n, "text": f"text {n % 15}", "q": "q"} for n in range(20)]
ROWS[3]["text"] = None
ROWS[4]["text"] = ""


def job(folder: Path, task: str = "embed", rows: Any = ROWS, **tables: Any) -> dict[str, Any]:
    write_jsonl(folder / "in.jsonl", rows)
    prompts = {
        "score": {"query": "{{ q }}", "passage": "{{ text }}"},
        "loglikelihood": {"template": "{{ q }} ", "continuation": "{{ text }}"},
    }
    made: dict[str, Any] = {
        "task": task,
        "input": {"path": str(folder / "in.jsonl")},
        "prompt": prompts.get(task, {"template": "{{ text }}"}),
        "model": {"backend": "echo"},
        "output": {"path": str(folder / "out")},
    }
    for name, table in tables.items():
        made[name] = {**made.get(name, {}), **table}
    return made


def write_toml(folder: Path, made: dict[str, Any]) -> Path:
    lines = [f"task = {json.dumps(made.pop('task'))}"]
    engine = made["model"].pop("engine", {})
    for name, table in {**made, "model.engine": engine}.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    path = folder / "job.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_each_row_has_a_vector_that_every_reader_takes(tmp_path: Path) -> None:
    summary = batchgen.run(job(tmp_path, model={"engine": {"embedding_size": 8}}))
    assert (summary.num_ok, summary.num_errors, summary.num_copied) == (19, 1, 3)
    (path,) = (tmp_path / "out").glob("part-*.parquet")
    rows = pl.read_parquet(path)
    assert rows.schema["gen_embedding"] == pl.Array(pl.Float32, 8)
    assert "gen_text" not in rows.columns
    vectors = rows["gen_embedding"].to_list()
    assert vectors[3] is None
    assert vectors[0] == vectors[15] != vectors[1]  # Equal texts.
    arrow = pq.read_table(path)["gen_embedding"]
    assert arrow.to_pylist() == vectors
    found = duckdb.sql(f"select gen_embedding from '{path}'").fetchall()
    assert [vector and list(vector) for (vector,) in found] == vectors
    (encodings,) = (
        column.encodings
        for column in map(pq.ParquetFile(path).metadata.row_group(0).column, range(6))
        if column.path_in_schema == "gen_embedding.list.element"
    )
    assert "BYTE_STREAM_SPLIT" in encodings


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "guide" / "tasks.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_nearest_rows_as_the_guide_has_it(tmp_path: Path) -> None:
    rows = [{"id": f"a{n}", "text": f"text {n}"} for n in range(30)]
    path = write_toml(tmp_path, job(tmp_path, rows=rows))
    batchgen.run(path)
    code, (query,) = blocks("python")[0], blocks("sql")
    scope: dict[str, Any] = {}
    exec(code.replace("vectors.toml", str(path)), scope)
    assert scope["nearest"]["id"][0] == "a0"
    assert len(scope["nearest"]) == 10
    query = query.replace("out/vectors", str(tmp_path / "out"))
    assert duckdb.sql(query).fetchall()[0][0] == "a17"


def test_filters_and_choices_as_the_guide_has_them(tmp_path: Path) -> None:
    rows = [{"question": n // 4, "text": "abcd"[n % 4] * (1 + n % 3)} for n in range(80)]
    rows = [{**row, "q": row["question"], "choice": row["text"]} for row in rows]
    rows = [{**row, "is_right": row["text"][0] == "b"} for row in rows]
    path = write_toml(tmp_path, job(tmp_path, "loglikelihood", rows))
    batchgen.run(path)
    _, perplexity, choices = blocks("python")
    scope: dict[str, Any] = {}
    exec(perplexity.replace("perplexity.toml", str(path)), scope)
    assert 60 <= len(scope["kept"]) < 80
    exec(choices.replace("choices.toml", str(path)), scope)
    picked = {row["question"]: row for row in scope["picked"].iter_rows(named=True)}
    assert len(picked) == 20
    for question, given in itertools.groupby(
        scope["rows"].rows(named=True), lambda r: r["question"]
    ):
        these = list(given)
        best = max(these, key=lambda row: row["gen_logprob"])
        assert picked[question]["acc"] == best["is_right"]
        best = max(these, key=lambda row: row["gen_logprob"] / len(row["choice"]))
        assert picked[question]["acc_norm"] == best["is_right"]


@pytest.mark.parametrize("text", blocks("toml"))
def test_the_jobs_of_the_guide_load(tmp_path: Path, text: str) -> None:
    made = parse_job(tomllib.loads(text), base=tmp_path, where="tasks.md")
    assert made.task != "generate"


@pytest.mark.parametrize("task", ["embed", "loglikelihood"])
def test_the_next_night_computes_what_is_new(tmp_path: Path, task: str) -> None:
    batchgen.run(job(tmp_path, task))
    again = batchgen.run(job(tmp_path, task, rows=[{"id": 99, "text": "new", "q": "q"}, *ROWS]))
    assert again.run["num_ok"] == 1
    assert again.num_ok == 20
    with pytest.raises(batchgen.BatchgenError, match=r"pooling\.too_long"):
        batchgen.run(job(tmp_path, task, pooling={"too_long": "truncate"}))


def test_likelihoods_are_of_the_continuation_with_the_prompts_blank(tmp_path: Path) -> None:
    # The echo engine's tokens are bytes; an empty continuation has the blank.
    batchgen.run(job(tmp_path, "loglikelihood", pooling={"token_logprobs": True}))
    rows = batchgen.read(job(tmp_path, "loglikelihood")).filter(gen_status="ok").collect()
    found = rows.select("text", "gen_token_logprobs").rows()
    assert len(found) == 19
    for (text, tokens), row in zip(found, rows.iter_rows(named=True), strict=True):
        assert "".join(one["token"] for one in tokens) == f" {text}"
        assert row["gen_num_tokens"] == len(tokens)
        assert row["gen_logprob"] == pytest.approx(sum(one["logprob"] for one in tokens))
        mean = row["gen_logprob"] / len(tokens)
        assert row["gen_perplexity"] == pytest.approx(math.exp(-mean))
    assert set(rows["gen_is_greedy"]) <= {True, False}


@pytest.mark.parametrize(
    ("too_long", "verdicts"),
    [
        ("refuse", ["ok", "error"]),
        ("truncate", ["ok", "truncated"]),
        ("chunk", ["ok", "ok"]),
    ],
)
def test_a_text_that_is_too_long(tmp_path: Path, too_long: str, verdicts: list[str]) -> None:
    made = job(
        tmp_path,
        rows=[{"text": "short"}, {"text": "long" * 10}],
        model={"max_model_len": 20},
        pooling={"too_long": too_long},
        gate={"max_error_rate": 1.0},
    )
    batchgen.run(made)
    rows = batchgen.read(made).collect()
    assert rows["gen_verdict"].to_list() == verdicts
    assert rows["gen_error_type"].to_list()[1] == (
        "prompt_too_long" if too_long == "refuse" else None
    )
    if too_long == "chunk":
        assert rows["gen_num_chunks"].to_list() == [1, 3]


def test_labels_are_counted_and_held_against_the_last_snapshot(tmp_path: Path) -> None:
    batchgen.run(job(tmp_path, "classify", gate={"max_drift": 0.01}))
    rows = batchgen.read(job(tmp_path, "classify")).collect()
    ok = rows.filter(pl.col("gen_status") == "ok")
    likeliest = ok["gen_probabilities"].struct.field("yes") > 0.5
    assert ok["gen_label"].to_list() == ["yes" if is_yes else "no" for is_yes in likeliest]
    assert (ok["gen_probability"] >= 0.5).all()
    # Texts of one label only.
    label = rows["gen_label"][0]
    alike = [row for row, its in zip(ROWS, rows["gen_label"], strict=True) if its == label]
    with pytest.raises(GateError, match="drift"):
        batchgen.run(job(tmp_path, "classify", rows=alike, gate={"max_drift": 0.01}))


def test_a_pair_has_a_score_that_rules_may_read(tmp_path: Path) -> None:
    made = job(tmp_path, "score", checks={"rules": ["gen_score > 0.5"]}, gate={"max_error_rate": 1})
    batchgen.run(made)
    rows = batchgen.read(made).collect()
    assert set(rows["gen_verdict"]) == {"ok", "refused", "error"}
    assert (rows.filter(pl.col("gen_verdict") == "ok")["gen_score"] > 0.5).all()


def test_plan_and_check_say_what_a_run_would_do(tmp_path: Path) -> None:
    path = write_toml(tmp_path, job(tmp_path, "score"))
    told = subprocess.run(command("check", path), capture_output=True, text=True, check=True).stdout
    assert "score: float" in told
    assert "[query]\nq\n[passage]\ntext 0" in told
    plan = subprocess.run(
        command("plan", path, "--json"), capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(plan)["todo"]["num_to_compute"] == 16


def test_plan_says_that_each_continuation_pays_for_its_prompt(tmp_path: Path) -> None:
    path = write_toml(tmp_path, job(tmp_path, "loglikelihood"))
    plan = batchgen.plan(path)
    assert any("pays for its whole prompt" in text for text in plan.warnings)
    assert plan.survey is not None
    # "q" and " text 0", a byte between the two, and so on; and the empty text.
    wanted = sum(len(f"q\n text {n}") for n in range(15)) + len("q\n ")
    assert plan.survey.prompt_tokens == wanted
    assert "[prompt]\nq\n[continuation]\n text 0" in str(batchgen.check(path))


@pytest.mark.parametrize("task", ["embed", "loglikelihood"])
def test_a_killed_run_goes_on_and_gives_the_same_numbers(tmp_path: Path, task: str) -> None:
    rows = [{"id": n, "text": f"text {n}", "q": "q"} for n in range(3000)]
    slow = {"engine": {"embedding_size": 16, "step_s": 0.01, "max_num_seqs": 20}}
    (tmp_path / "whole").mkdir()
    whole = job(tmp_path / "whole", task, rows=rows, model={"engine": {"embedding_size": 16}})
    batchgen.run(whole)
    path = write_toml(tmp_path, job(tmp_path, task, rows, model=slow, run={"flush_rows": 100}))
    parts = tmp_path / "out" / "_batchgen" / "parts"
    process = subprocess.Popen(command("run", path), stderr=subprocess.DEVNULL)
    while len(list(parts.glob("*.parquet"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = batchgen.run(path)
    assert resumed.num_ok == 3000
    assert 0 < resumed.run["num_ok"] < 3000
    columns = ["id", "gen_embedding"] if task == "embed" else ["id", "gen_logprob"]
    both = [batchgen.read(one).select(columns).collect() for one in (path, whole)]
    assert both[0].equals(both[1])
    assert subprocess.run(command("verify", path), capture_output=True, check=False).returncode == 0


def by_transformers(folder: Path, model: str, texts: list[Any]) -> Any:
    """Values of a classifier or a cross-encoder of the sample."""
    (folder / "texts.json").write_text(json.dumps(texts))
    place = ROOT / "sample_data" / "encoders" / model
    module = [sys.executable, "-m", "tests.contract.pooling_models", folder, place]
    subprocess.run([*module, folder / "texts.json"], cwd=ROOT, check=True)
    (values,) = map(np.load, folder.glob("*.npy"))
    return values


@pytest.mark.vllm
@pytest.mark.parametrize("task", ["classify", "score", "loglikelihood"])
def test_the_jobs_of_the_repository_run_on_the_cpu(tmp_path: Path, task: str) -> None:
    path = ROOT / "jobs" / "tasks" / f"{task}.toml"
    # The Parquet file has the good rows alone, with the texts.
    changes = {"input.path": str(ROOT / "sample_data" / "tickets.parquet"), "input.limit": 120}
    changes |= {"input.columns": ["subject", "body", "gold_label"], "model.dtype": "float32"}
    changes |= {"output.path": str(tmp_path / "out")}
    batchgen.run(path, overrides=changes)
    rows = batchgen.read(tmp_path / "out").filter(gen_status="ok").collect()
    assert len(rows) >= 115
    if task == "loglikelihood":
        assert rows["gen_perplexity"].is_between(1, 1e6).all()
        assert rows["gen_num_tokens"].min() > 5
        return
    texts = [f"{subject}\n{body}" for subject, body in rows.select("subject", "body").rows()]
    if task == "classify":
        wanted = by_transformers(tmp_path, "classifier", texts)
        found = rows["gen_probabilities"].struct.unnest().to_numpy()
        right = rows["gen_label"] == rows["gold_label"]
        assert right.mean() > 0.8
    else:
        wanted = by_transformers(tmp_path, "reranker", [("refund", text) for text in texts])
        found = rows.select("gen_score").to_numpy()
        is_refund = rows["gold_label"] == "refund"
        fits, others = (rows.filter(which)["gen_score"].mean() for which in (is_refund, ~is_refund))
        assert fits > 2 * others
    assert np.allclose(found, wanted, atol=1e-3)
