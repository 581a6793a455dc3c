"""Answers from the prompt to the published column, on the echo engine, which answers what it reads.

So a prompt is written to be the answer: right, wrong or too long, as the test wants it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest

import batchgen
from batchgen.core.errors import OutputError
from tests.e2e.support import published, run_cli, summary_of, write_job

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["a", "b"]}, "n": {"type": "integer", "maximum": 9}},
    "required": ["label"],
    "additionalProperties": False,
}
ANSWERS = ['{"label":"a","n":1}', '{"label":"b"}', '{"label":"c"}', "no", '{"label":"a","n":10}']
STRICT = {"checks": {"allow_truncated": False}, "gate": {"max_error_rate": 1.0}}


def job_of(folder: Path, texts: list[Any], **tables: Any) -> Path:
    """A job whose answers are these texts; a mapping is a row with more columns."""
    rows = [text if isinstance(text, dict) else {"text": text} for text in texts]
    lines = [json.dumps({"id": number, **row}) for number, row in enumerate(rows)]
    (folder / "in.jsonl").write_text("\n".join(lines))
    return write_job(folder, "in.jsonl", **{**STRICT, "prompt": {"user": "{{ text }}"}, **tables})


def column(job: Path, name: str) -> list[Any]:
    return batchgen.read(job).select(name).collect()[name].to_list()


def test_answers_become_typed_columns_and_wrong_ones_error_rows_with_their_text(tmp_path: Path):
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    job = job_of(tmp_path, ANSWERS, output={"schema": "s.json", "flatten": True})
    summary = summary_of(job)
    assert (summary["num_ok"], summary["num_errors"]) == (2, 3)
    assert summary["run"]["verdicts"] == {"1": {"ok": 2, "schema_violation": 2, "invalid_json": 1}}
    frame = batchgen.read(job).collect()
    assert frame["gen_label"].to_list() == ["a", "b", None, None, None]
    assert frame.schema["gen_n"] == pl.Int64
    assert frame["gen_text"].to_list() == ANSWERS
    assert frame["gen_verdict"].to_list() == [
        *("ok", "ok", "schema_violation", "invalid_json", "schema_violation")
    ]
    assert frame["gen_error_type"].to_list()[2:] == frame["gen_verdict"].to_list()[2:]
    assert frame["gen_error"][4] == "$.n: 10 is greater than the maximum of 9"


def test_the_same_as_one_struct(tmp_path: Path):
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    job = job_of(tmp_path, ANSWERS, output={"schema": "s.json"})
    summary_of(job)
    frame = batchgen.read(job).filter(pl.col("gen_output").struct.field("label") == "a").collect()
    assert frame["gen_output"].to_list() == [{"label": "a", "n": 1}]


def test_a_rule_refuses_and_names_itself(tmp_path: Path):
    job = job_of(
        tmp_path,
        ["yes", "no", "no"],
        output={"choice": ["yes", "no"]},
        checks={"rules": ["not (gen_label = 'no' and id = 2)"]},
    )
    summary_of(job)
    assert column(job, "gen_verdict") == ["ok", "ok", "refused"]
    assert column(job, "gen_label") == ["yes", "no", "no"]
    assert "rules[0]" in column(job, "gen_error")[2]


def test_failed_rows_climb_the_ladder_and_others_do_not_wait(tmp_path: Path):
    texts = ["short", "x" * 60, "x" * 500, "y" * 30]
    ladder = [{"max_tokens": 100, "on": ["truncated"]}, {"max_tokens": 200}]
    job = job_of(tmp_path, texts, retry=ladder, sampling={"max_tokens": 40})
    summary = summary_of(job)
    assert column(job, "gen_verdict") == ["ok", "ok", "truncated", "ok"]
    assert column(job, "gen_attempts") == [1, 2, 3, 1]
    assert [len(text) for text in column(job, "gen_text")] == [5, 60, 200, 30]
    run = summary["run"]
    assert run["num_retries"] == 3
    assert run["verdicts"] == {
        "1": {"ok": 2, "truncated": 2},
        "2": {"ok": 1, "truncated": 1},
        "3": {"truncated": 1},
    }
    assert run["num_output_tokens"] == 5 + 30 + 40 + 60 + 40 + 100 + 200
    # The order of the input holds, whatever came when.
    assert column(job, "id") == [0, 1, 2, 3]


def test_telling_the_error_shows_the_model_its_answer(tmp_path: Path):
    job = job_of(
        tmp_path,
        ["a"],
        output={"choice": ["b"]},
        retry=[{"tell_error": True}],
        sampling={"max_tokens": 200},
    )
    summary_of(job)
    (text,) = column(job, "gen_text")
    assert text.startswith("a\na\nThis answer was refused: 'a' is none of the 1 labels.")


def test_the_ladder_may_change_under_a_job_and_the_checks_may_not(tmp_path: Path):
    job = job_of(tmp_path, ["a" * 50], sampling={"max_tokens": 40})
    strict = ("--set", "gate.max_error_rate=0")
    assert run_cli("run", job, *strict).returncode == 3
    job = job_of(tmp_path, ["a" * 50], sampling={"max_tokens": 40}, retry=[{"max_tokens": 90}])
    assert run_cli("run", job, *strict).returncode == 3
    refused = run_cli("run", job, "--set", "checks.allow_truncated=true")
    assert refused.returncode == 2
    assert "checks.allow_truncated: False -> True" in refused.stderr


def test_samples_are_lists_and_vote(tmp_path: Path):
    job = job_of(
        tmp_path,
        ["yes", "what"],
        output={"choice": ["yes", "no"], "with_seed": True},
        sampling={"n": 3, "temperature": 1.0},
    )
    summary_of(job)
    assert column(job, "gen_text") == [["yes"] * 3, ["what"] * 3]
    assert column(job, "gen_label") == ["yes", None]
    assert column(job, "gen_agreement") == [1.0, None]
    assert len(set(column(job, "gen_seed"))) == 2


def test_samples_are_read_a_row_each(tmp_path: Path):
    rows = [{"text": "a" * 9}, {"text": "ok"}, {"text": None}]
    sampling = {"n": 2, "temperature": 1.0, "max_tokens": 5}
    checks = {"allow_truncated": False, "rules": ["gen_text <> 'no'"]}
    job = job_of(tmp_path, [*rows, {"text": "no"}], sampling=sampling, checks=checks)
    summary_of(job)
    names = ["text", *(f"gen_{n}" for n in ("sample", "text", "verdict", "status", "error_type"))]
    frame = batchgen.read(job, explode=True).collect()
    assert frame.select(names).rows() == [
        ("a" * 9, 0, "a" * 5, "truncated", "error", "truncated"),
        ("a" * 9, 1, "a" * 5, "truncated", "error", "truncated"),
        ("ok", 0, "ok", "ok", "ok", None),
        ("ok", 1, "ok", "ok", "ok", None),
        (None, None, None, "error", "error", "null_value"),
        *[("no", at, "no", "refused", "error", "refused") for at in range(2)],
    ]
    assert frame["gen_num_output_tokens"].to_list() == [5, 5, 2, 2, None, 2, 2]


def test_an_output_of_before_samples_were_told_goes_on_without(tmp_path: Path):
    sampling = {"n": 2, "temperature": 1.0}
    job = job_of(tmp_path, ["a", "b"], sampling=sampling, output={"samples": False})
    summary_of(job)
    rows = ["a", "b", "c"]
    assert summary_of(job_of(tmp_path, rows, sampling=sampling))["run"]["num_ok"] == 1
    with pytest.raises(OutputError, match="no column 'gen_samples'"):
        batchgen.read(job, explode=True)
    told = job_of(tmp_path, rows, sampling=sampling, output={"samples": True})
    refused = run_cli("run", told)
    assert "output.samples: not set -> True" in refused.stderr


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chats_and_sampling_may_be_inside_a_column(tmp_path: Path, kind: str):
    told = [
        {"messages": [{"role": "user", "content": "x" * 50}], "own": {"max_tokens": size}}
        for size in (9, 99)
    ]
    job = job_of(
        tmp_path,
        [{"body": body} for body in told],
        input={"path": f"in.{kind}"},
        prompt={"messages": "body.messages", "prefill": "{{ body.own.max_tokens }}"},
        sampling={"column": "body.own", "max_tokens": 40},
    )
    job.write_text(job.read_text().replace('user = "Repeat: {{ text }}"\n', ""))
    pl.read_ndjson(tmp_path / "in.jsonl").write_parquet(tmp_path / "in.parquet")
    summary_of(job)
    assert column(job, "gen_verdict") == ["truncated", "ok"]
    assert column(job, "gen_text") == ["x" * 9, "x" * 50 + "\n99"]


def test_rows_bring_their_own_sampling_and_schema(tmp_path: Path):
    rows = [
        {"text": "x" * 60, "own": {"max_tokens": 100}},
        {"text": "x" * 60, "own": None},
        {"text": "x", "own": {"max_tokens": -1}},
    ]
    job = job_of(tmp_path, rows, sampling={"column": "own", "max_tokens": 40})
    summary_of(job)
    assert column(job, "gen_verdict") == ["ok", "truncated", "error"]
    assert column(job, "gen_error_type")[2] == "bad_sampling"

    schema = json.dumps({"type": "object", "required": ["a"]})
    rows = [{"text": '{"a":1}', "s": schema}, {"text": '{"b":1}', "s": schema}]
    job = job_of(tmp_path, rows, output={"path": "other", "schema_column": "s"})
    summary_of(job)
    assert column(job, "gen_verdict") == ["ok", "schema_violation"]


def test_origin_is_in_every_row(tmp_path: Path):
    job = job_of(tmp_path, ["a", "b"])
    summary = summary_of(job)
    frame = batchgen.read(job).collect()
    assert frame["gen_model"].to_list() == ["echo"] * 2
    assert frame["gen_engine"].to_list() == ["echo 1"] * 2
    assert frame["gen_run_id"].to_list() == [summary["run_id"]] * 2
    assert frame["gen_recipe"].n_unique() == 1
    assert len(frame["gen_recipe"][0]) == 32


@pytest.mark.parametrize(
    ("tables", "problem"),
    [
        ({"output": {"regex": "("}}, "regex: '('"),
        ({"output": {"schema": "none.json"}}, "output.schema: "),
        ({"checks": {"rules": ["gen_txt = 'a'"]}}, "did you mean 'gen_text'?"),
        ({"gate": {"drift_column": "gen_label"}}, "drift_column"),
        ({"gate": {"max_drift": 0.1}}, "max_drift: the answer has no labels"),
        (
            {
                "sampling": {"n": 2},
                "output": {"samples": False},
                "checks": {"rules": ["len(gen_text) < 400"]},
            },
            "rules[0] = 'len(gen_text) < 400': invalid series dtype",
        ),
        ({"checks": {"min_ok_samples": 2}}, "checks.min_ok_samples = 2, expected at most"),
        ({"checks": {"rules": ["gen_text ~ '('"]}}, "regex error"),
        ({"retry": [{}]}, "retry[0]: changes nothing at temperature 0"),
        ({"sampling": {"column": "owns"}}, "sampling.column: no column 'owns'"),
        (
            {
                "prompt": {"user": "{{ text }}", "examples_file": "e.jsonl"},
                "output": {"choice": ["a"]},
            },
            "examples[0]: schema_violation: 'c' is none of the 1 labels",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_check_finds_what_cannot_work(tmp_path: Path, tables: dict[str, Any], problem: str):
    (tmp_path / "e.jsonl").write_text('{"user": "q", "assistant": "c"}')
    checked = run_cli("check", job_of(tmp_path, ["a"], **tables))
    assert (checked.returncode, problem in checked.stderr) == (2, True), checked.stderr


def test_check_says_which_parts_of_a_schema_become_json_text(tmp_path: Path):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "meta": {"type": "object"}},
    }
    (tmp_path / "s.json").write_text(json.dumps(schema))
    said = run_cli("check", job_of(tmp_path, ["a"], output={"schema": "s.json"})).stdout
    assert "output: struct<a: int64, meta: string>" in said
    assert "as JSON  $.meta: " in said


def test_the_summary_says_what_retries_were_good_for(tmp_path: Path):
    job = job_of(tmp_path, ["ok", "x" * 60], retry=[{"max_tokens": 100}])
    said = run_cli("run", job).stdout
    assert "1 attempts more: 50.0% of the answers ok at first, 100.0% in the end" in said


def test_an_answer_that_was_asked_for_again_by_a_rule_over_the_row_is_no_other_rows(
    tmp_path: Path,
) -> None:
    lines = [{"id": n, "text": "one and the same", "good": n == 1} for n in range(2)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    job = write_job(
        tmp_path,
        "in.jsonl",
        checks={"rules": ["good"], "allow_truncated": False},
        retry=[{"on": ["refused"], "max_tokens": 2}],
        gate={"max_error_rate": 1.0},
    )
    assert run_cli("run", job).returncode == 0
    rows = published(tmp_path / "out")
    found = [(row["gen_status"], row["gen_verdict"], row["gen_attempts"]) for row in rows]
    assert found == [("error", "truncated", 2), ("ok", "ok", 1)]
