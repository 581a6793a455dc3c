"""Keys and kinds of values that come late in a JSONL file, or in a later night.

A row whose prompt can be made runs; a snapshot has one schema that holds every value exactly; and
no row is computed again because a column has become another.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import batchgen
from batchgen.api import load
from batchgen.core.errors import ConfigError
from batchgen.pipeline.context import RunOptions
from batchgen.pipeline.decide import Hooks, begin, decide
from batchgen.pipeline.prepare import prepare
from batchgen.preview.plan import PlanOptions, foresee
from batchgen.preview.sample import first_prompts
from batchgen.source.columns import is_json, is_text, json_text
from batchgen.storage import LocalStorage
from batchgen.store.ledger import Ledger

SAMPLE = 1000
"""Rows that a job is checked against before its input is read."""


def job_of(tmp_path: Path, **tables: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "input": {"path": str(tmp_path / "in-*.jsonl")},
        "prompt": {"user": "{{ text }}"},
        "model": {"backend": "echo"},
        "sampling": {"max_tokens": 20, "temperature": 0},
        "output": {"path": str(tmp_path / "out")},
        "checks": {"allow_truncated": True},
        "gate": {"max_error_rate": 1.0},
    }
    return {name: {**base.get(name, {}), **tables.get(name, {})} for name in {*base, *tables}}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(job: dict[str, Any], **options: Any) -> batchgen.Summary:
    """Run, and hold the plan before it against it."""
    forecast = foresee(lambda: load(job), PlanOptions(RunOptions(**options)))
    summary = batchgen.run(job, **options)
    told = [text for text in summary.warnings if text.startswith("input: column")]
    assert [text for text in forecast.warnings if text.startswith("input: column")] == told
    return summary


def published(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows as pyarrow reads them, after polars and DuckDB have been seen to read the same."""
    files = sorted(Path(job["output"]["path"]).glob("part-*.parquet"))
    assert len({pa.parquet.read_schema(file).remove_metadata() for file in files}) == 1
    table = pa.dataset.dataset(files).to_table()
    rows = table.to_pylist()
    assert pl.read_parquet(files).rows(named=True) == rows
    found = duckdb.sql(f"select * from read_parquet({[str(file) for file in files]})")
    assert [dict(zip(table.column_names, row, strict=True)) for row in found.fetchall()] == rows
    for row in rows:
        for field in table.schema:
            if is_json(field) and row[field.name] is not None:
                row[field.name] = json.loads(row[field.name])
            if is_text(field) and row[field.name] is not None:
                row[field.name] = Text(row[field.name])
    return rows


class Text(str):
    """A value of a `text` column: equal to the string that it is, or to what it writes."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return str(self) == (other if isinstance(other, str) else json_text(other))


def check_carried(job: dict[str, Any], inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold what is published against the input, key by key."""
    rows = published(job)
    assert len(rows) == len(inputs)
    names = {name for row in inputs for name in row}
    for row, given_row in zip(rows, inputs, strict=True):
        assert row["gen_status"] == "ok", row["gen_error"]
        assert {name: row[name] for name in names} == {name: given_row.get(name) for name in names}
    return rows


VALUES = {
    "string": "seven",
    "int": 7,
    "long": 2**60 + 1,
    "huge": 2**70,
    "float": 0.5,
    "bool": True,
    "list": [1, "x", None],
    "object": {"a": {"b": [2**70]}},
}


SAME = [(None, "string"), ("int", "long"), ("long", "int"), ("float", "int")]
"""First one, then the other: the type that the first one has."""


@pytest.mark.parametrize("late", [None, *VALUES])
@pytest.mark.parametrize("early", [None, *VALUES])
def test_whatever_comes_late_in_a_column_is_carried(tmp_path, early, late):
    rows = [{"text": f"row {at}", "v": VALUES.get(early)} for at in range(SAMPLE)]
    rows += [{"text": f"row {at}", "v": VALUES.get(late)} for at in range(SAMPLE, SAMPLE + 5)]
    write(tmp_path / "in-0.jsonl", rows)
    job = job_of(tmp_path)
    summary = run(job)
    check_carried(job, rows)
    is_told = any(
        "'v'" in text and f"in-0.jsonl:{SAMPLE + 1} on" in text for text in summary.warnings
    )
    is_same = early == late or late is None or (early, late) in SAME
    is_json = {early, late} <= {"huge", "list", "object"}
    assert is_told or is_same or is_json


def test_a_key_that_comes_late_is_carried_and_told(tmp_path):
    rows = [{"text": f"row {at}"} for at in range(SAMPLE)] + [{"text": "late", "label": "x"}]
    write(tmp_path / "in-0.jsonl", rows)
    job = job_of(tmp_path)
    (told,) = run(job).warnings
    assert f"'label' comes late and is carried as string (string from {tmp_path}" in told
    check_carried(job, rows)
    assert run(job).state == "nothing_to_do"


NIGHTS = [
    ({"n": 1}, {"n": 0.5}, "float64"),
    ({"n": 1}, {"n": "x"}, "text"),
    ({"n": 1}, {"n": 2**70}, "json"),
    ({"n": 0.5}, {"n": 2**53 + 1}, "json"),
    ({"n": "x"}, {"n": [1]}, "text"),
    ({"n": None}, {"n": [1]}, "json"),
    ({"n": None}, {"n": 3}, "int64"),
    ({}, {"n": True}, "bool"),
    ({"n": True}, {}, None),
    ({"n": 'a "quoted" \u00fc \\'}, {"n": {"k": 1}}, "text"),
]


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(("first", "then", "word"), NIGHTS)
def test_a_new_file_may_bring_a_wider_type(tmp_path, first, then, word, temperature, is_finished):
    job = job_of(tmp_path, sampling={"temperature": temperature})
    rows = [{"text": f"row {at // 2}", **first} for at in range(40)]
    write(tmp_path / "in-0.jsonl", rows)
    if is_finished:
        run(job)
        before = published(job)
    else:
        stopping = {**job, "run": {"flush_rows": 5}}
        batchgen.run(stopping, max_runtime_s=0.001)
        before = []
    more = [{"text": f"new {at}", **then} for at in range(5)]
    write(tmp_path / "in-1.jsonl", more)
    summary = run(job)
    after = check_carried(job, rows + more)
    if is_finished:
        assert summary.run["num_ok"] == 5
        for old, new in zip(before, after, strict=False):
            ours = [name for name in old if name.startswith("gen_") or name == "text"]
            assert [old[name] for name in ours] == [new[name] for name in ours]
        told = [text for text in summary.warnings if "'n'" in text]
        assert (len(told) == 1) is (word is not None)
        assert all(f"is carried as {word}" in text for text in told)
    again = run(job)
    assert again.state == "nothing_to_do"
    # The odd file goes, and the column is what it was.
    (tmp_path / "in-1.jsonl").unlink()
    assert run(job).run.get("num_ok", 0) == 0
    check_carried(job, rows)


def test_what_is_compared_keeps_its_type_and_costs_rows(tmp_path):
    rows = [{"text": f"row {at}", "n": at} for at in range(SAMPLE)] + [{"text": "x", "n": "odd"}]
    write(tmp_path / "in-0.jsonl", rows)
    job = job_of(tmp_path, input={"where": "n >= 500"})
    batchgen.run(job)
    found = published(job)
    assert [row["gen_status"] for row in found] == ["ok"] * 500 + ["error"]
    assert [row["n"] for row in found] == [*range(500, 1000), None]


def test_a_declared_type_holds_and_costs_rows(tmp_path):
    rows = [{"text": "a", "n": 1}, {"text": "b", "n": "odd"}]
    write(tmp_path / "in-0.jsonl", rows)
    job = job_of(tmp_path, input={"types": {"n": "int64"}})
    batchgen.run(job)
    assert [row["gen_error_type"] for row in published(job)] == [None, "type_mismatch"]


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-5, 5),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
)
ANY = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
ROWS = st.lists(st.dictionaries(st.sampled_from("abc"), ANY), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(nights=st.lists(ROWS, min_size=1, max_size=3))
def test_nights_of_any_values_are_carried_exactly(tmp_path_factory, nights):
    tmp_path = tmp_path_factory.mktemp("nights")
    job = job_of(tmp_path)
    inputs: list[dict[str, Any]] = []
    for night, rows in enumerate(nights):
        texts = [{"text": f"{night} {at}", **row} for at, row in enumerate(rows)]
        write(tmp_path / f"in-{night}.jsonl", texts)
        inputs += texts
        summary = run(job)
        assert summary.run["num_ok"] == len(texts)
        check_carried(job, inputs)


def late_job(tmp_path: Path, tables: dict[str, Any], late: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a job whose second file has these rows at its end, after all that first looks see."""
    write(tmp_path / "in-0.jsonl", [{"text": "first"}])
    early = [{"text": f"row {at}"} for at in range(SAMPLE)]
    write(tmp_path / "in-1.jsonl", [*early, *late])
    job = job_of(tmp_path)
    for table, keys in tables.items():
        job[table] = {**job.get(table, {}), **keys}
    return job


NAMED = [
    {"prompt": {"user": "{{ label }}"}},
    {"prompt": {"user": "{{ label | default('none') }}"}},
    {"input": {"where": "label > 3 OR text = 'row 5'"}},
    {"input": {"where": "label > 3", "limit": 1}},
    {"input": {"columns": ["text", "label"], "limit": 3}},
    {"checks": {"rules": ["label IS NULL OR label < 100"]}},
]


@pytest.mark.parametrize("tables", NAMED)
def test_a_late_key_may_be_named_by_the_job(tmp_path, tables):
    late = [{"text": "x", "label": 7}, {"text": "y", "label": 2}]
    job = late_job(tmp_path, tables, late)
    prepared = prepare(load(job))
    assert any("have no column 'label'" in note for note in prepared.notes)
    shown = [outcome for _, outcome in first_prompts(prepared, 2)]
    assert len(shown) == 2
    summary = run(job)
    rows = published(job)
    kept = [row for row in rows if row.get("label") is not None]
    if "where" in tables.get("input", {}):
        assert [row["label"] for row in kept] == [7]
        assert len(rows) == (1 if "limit" in tables["input"] else 2)
    elif "limit" not in tables.get("input", {}):
        assert [row["label"] for row in kept] == [7, 2]
        assert len(rows) == SAMPLE + 3
    # As with any key that a row lacks.
    num_errors = SAMPLE + 1 if tables == NAMED[0] else 0
    assert summary.num_errors == num_errors
    assert run(job).state == "nothing_to_do"


@pytest.mark.parametrize("tables", [tables for tables in NAMED if "default" not in str(tables)])
def test_a_key_that_comes_nowhere_is_refused(tmp_path, tables):
    job = late_job(tmp_path, tables, [{"text": "x", "labels": 7}])
    assert prepare(load(job)).late == {"label"}
    forecast = foresee(lambda: load(job), PlanOptions(RunOptions()))
    assert (forecast.state, forecast.exit_code) == ("refused", 2)
    ledger, started = Ledger(LocalStorage(tmp_path / "out")), list[str]()
    decision = decide(ledger, load(job), RunOptions())
    hooks = Hooks(print, lambda: started.append("engine"), None)
    with pytest.raises(ConfigError, match="label"):
        begin(ledger, RunOptions(), decision, hooks)
    assert (started, ledger.latest_plan()) == ([], None)


def test_a_key_is_refused_at_once_where_all_rows_are_seen(tmp_path):
    write(tmp_path / "in-0.jsonl", [{"text": f"row {at}"} for at in range(SAMPLE)])
    job = job_of(tmp_path)
    job["prompt"]["user"] = "{{ label }}"
    with pytest.raises(ConfigError, match="no column 'label'"):
        prepare(load(job))
