"""Files of one input that were written by different programs, or lie in `key=value` folders."""

from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchgen
from batchgen.core.errors import BatchgenError
from tests.e2e.support import only_shown, run_cli, write_job

if TYPE_CHECKING:
    from pathlib import Path

WHEN = dt.datetime(2024, 5, 6, 7, 8, 9)  # noqa: DTZ001
NARROW = pa.schema(
    [
        ("text", pa.string()),
        ("n", pa.int32()),
        ("tags", pa.list_(pa.string())),
        ("at", pa.timestamp("us")),
        ("kind", pa.dictionary(pa.int32(), pa.string())),
        ("raw", pa.binary()),
        ("gone", pa.null()),
    ]
)
WIDE = pa.schema(
    [
        ("raw", pa.large_binary()),
        ("text", pa.large_string()),
        ("n", pa.int64()),
        ("tags", pa.large_list(pa.large_string())),
        ("at", pa.timestamp("ns")),
        ("kind", pa.large_string()),
        ("gone", pa.float64()),
    ]
)
USER = "{{ text }} {{ n }} {{ tags }} {{ at }} {{ kind }} {{ raw }}"


def row(number: int) -> dict[str, Any]:
    return {
        "text": f"text {number}",
        "n": number,
        "tags": ["x", None],
        "at": WHEN,
        "kind": "k",
        "raw": b"r\xc3\xa4w",
        "gone": None,
    }


def put(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def keys(job: Path) -> dict[str, str]:
    frame = batchgen.read(job).collect()
    return dict(zip(frame["text"], frame["gen_request_key"], strict=True))


def test_shards_that_differ_in_width_are_one_input_and_prompts_do_not_see_it(tmp_path):
    put(tmp_path / "data/a.parquet", [row(0), row(1)], NARROW)
    put(tmp_path / "data/b.parquet", [row(2), {**row(3), "gone": 0.5}], WIDE)
    put(tmp_path / "data/empty.parquet", [], pa.schema([("other", pa.int8())]))
    job = write_job(tmp_path, "data", prompt={"user": USER})
    assert batchgen.run(job).num_ok == 4
    both = keys(job)
    out = pq.read_table(only_shown(tmp_path / "out"))
    assert out["n"].to_pylist() == [0, 1, 2, 3]
    assert out["gone"].to_pylist() == [None, None, None, 0.5]
    assert out["raw"].to_pylist() == [b"r\xc3\xa4w"] * 4
    assert out["at"].cast(pa.timestamp("us")).to_pylist() == [WHEN] * 4
    frame = pl.read_parquet(only_shown(tmp_path / "out"))
    assert frame["tags"].to_list() == [["x", None]] * 4
    duckdb = pytest.importorskip("duckdb")
    found = duckdb.sql(f"select text, n, kind from '{tmp_path}/out/part-*.parquet'").fetchall()
    assert found == [(f"text {at}", at, "k") for at in range(4)]
    for name in ("a", "b"):  # The same keys whether or not the other shard is there.
        alone = tmp_path / name
        put(alone / "in.parquet", [], pa.schema([]))
        (alone / "in.parquet").write_bytes((tmp_path / f"data/{name}.parquet").read_bytes())
        alone_job = write_job(alone, "in.parquet", prompt={"user": USER})
        batchgen.run(alone_job)
        assert keys(alone_job).items() <= both.items()


def test_a_shard_of_another_width_that_comes_at_night_computes_only_its_rows(tmp_path):
    put(tmp_path / "data/a.parquet", [row(0), row(1)], NARROW)
    job = write_job(tmp_path, "data", prompt={"user": USER})
    batchgen.run(job)
    before = keys(job)
    put(tmp_path / "data/b.parquet", [row(2)], WIDE)
    summary = batchgen.run(job)
    assert summary.num_ok == 3
    assert sum(summary.run["verdicts"]["1"].values()) == 1
    assert before.items() <= keys(job).items()


def test_a_column_in_which_shards_differ_may_be_there_if_nobody_reads_it(tmp_path):
    table = pa.table({"text": ["a"], "x": pa.array([1], pa.int8())})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data/a.parquet")
    pq.write_table(pa.table({"text": ["b"], "x": ["1"], "y": [1]}), tmp_path / "data/b.parquet")
    some = {"path": "data", "columns": ["text"]}
    job = write_job(tmp_path, "data", prompt={"user": "{{ text }}"}, input=some)
    assert batchgen.run(job).num_ok == 2
    for user in ("{{ text }} {{ x }}", "{{ row.text }}"):
        wrong = {"prompt": {"user": user}, "input": some, "output": {"path": "other"}}
        with pytest.raises(BatchgenError, match="'x' is string here, int8 there"):
            batchgen.run(write_job(tmp_path, "data", **wrong))
    everything = write_job(tmp_path, "data", prompt={"user": "{{ text }}"}, output={"path": "o"})
    told = run_cli("run", everything)
    assert told.returncode == 2
    assert "'y' is int64 here, absent there; input.columns may leave columns out" in told.stderr


def test_a_value_that_the_common_type_cannot_hold_is_its_rows_error(tmp_path):
    far = pa.table({"text": ["far", "near"], "at": pa.array([2**40, 0], pa.timestamp("s"))})
    (tmp_path / "data").mkdir()
    pq.write_table(
        far.set_column(1, "at", far["at"].cast(pa.timestamp("ms"))), tmp_path / "data/a.parquet"
    )
    pq.write_table(
        pa.table({"text": ["ns"], "at": pa.array([1], pa.timestamp("ns"))}),
        tmp_path / "data/b.parquet",
    )
    job = write_job(tmp_path, "data", prompt={"user": "{{ text }}"}, gate={"max_error_rate": 1.0})
    batchgen.run(job)
    frame = batchgen.read(job).collect()
    assert frame["gen_error_type"].to_list() == ["type_mismatch", None, None]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_folders_of_keys_and_values_are_columns(tmp_path, suffix):
    for folder, text in (
        ("lang=de/year=2024", "eins"),
        ("lang=en%20GB/year=2025", "one"),
        ("lang=__HIVE_DEFAULT_PARTITION__/year=2025", "none"),
    ):
        path = tmp_path / f"in/{folder}/a.{suffix}"
        path.parent.mkdir(parents=True)
        table = pl.DataFrame({"text": [text]})
        {"jsonl": table.write_ndjson, "csv": table.write_csv, "parquet": table.write_parquet}[
            suffix
        ](path)
    wanted = {"one": ("en GB", 2025), "none": (None, 2025), "eins": ("de", 2024)}
    user = {"user": "{{ text }} {{ year }}{% if lang %} {{ lang }}{% endif %}"}
    for source in ("in", "in/*", "in/**", f"in/**/*.{suffix}"):
        job = write_job(tmp_path, source, prompt=user, output={"path": f"out-{len(source)}"})
        assert batchgen.run(job).num_ok == 3
        frame = batchgen.read(job).collect()
        found = zip(frame["text"], frame["lang"], frame["year"], strict=True)
        assert {text: (lang, year) for text, lang, year in found} == wanted
        assert "eins 2024 de" in frame["gen_text"].to_list()
    filtered = write_job(
        tmp_path,
        "in",
        prompt=user,
        input={"path": "in", "where": "year > 2024 AND lang IS NOT NULL"},
        output={"path": "f"},
    )
    batchgen.run(filtered)
    assert batchgen.read(filtered).collect()["text"].to_list() == ["one"]


def test_what_a_partition_is(tmp_path):
    """Its own column wins; a type may be set; a number is one only as it is written."""
    for folder in ("run=7/lang=de/part=01", "run=7/lang=en/part=02"):
        path = tmp_path / folder / "a.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text('{"text": "a", "lang": "own"}\n')
    job = write_job(tmp_path, "run=7", prompt={"user": "{{ text }}"})
    batchgen.run(job, overrides=['input.types.run="string"'])
    frame = batchgen.read(job).collect()
    assert frame.columns[:4] == ["text", "lang", "run", "part"]
    assert frame.select("lang", "run", "part").rows() == [("own", "7", "01"), ("own", "7", "02")]
    as_number = ['input.types.part="float64"', "output.path=other"]
    assert batchgen.run(job, overrides=as_number).num_ok == 2
    (tmp_path / "run=7/lang=de/part=01").rename(tmp_path / "run=7/lang=de/part=x")
    with pytest.raises(BatchgenError, match="a folder part=x, which is no float64"):
        batchgen.run(job, overrides=as_number)


@pytest.mark.parametrize(("user", "num_new"), [("{{ text }} {{ day }}", 2), ("{{ text }}", 0)])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_a_file_in_another_folder_have_its_value(tmp_path, user, num_new, kind):
    """Its content is the same, its rows are not: what folders tell stands in no digest."""
    for day in ("1", "2"):
        frame = pl.DataFrame({"text": [f"{day}a", f"{day}b"]})
        (tmp_path / f"in/day={day}").mkdir(parents=True)
        path = tmp_path / f"in/day={day}/f.{kind}"
        frame.write_ndjson(path) if kind == "jsonl" else frame.write_parquet(path)
    job = write_job(tmp_path, "in", prompt={"user": user})
    batchgen.run(job)
    (tmp_path / "in/day=2").rename(tmp_path / "in/day=3")
    plan = json.loads(run_cli("plan", job, "--json").stdout)
    assert plan["todo"]["num_to_compute"] == num_new
    assert batchgen.run(job).run["num_ok"] == num_new
    rows = batchgen.read(job).collect().sort("text").select("text", "day").rows()
    assert rows == [("1a", 1), ("1b", 1), ("2a", 3), ("2b", 3)]
    assert batchgen.run(job).state == "nothing_to_do"


def test_folders_that_prompts_do_not_read_are_no_part_of_their_keys(tmp_path):
    path = tmp_path / "in/lang=de/a.parquet"
    put(path, [row(0)], NARROW)
    job = write_job(tmp_path, "in/*/*.parquet", prompt={"user": USER})
    batchgen.run(job)
    assert batchgen.read(job).collect()["lang"].to_list() == ["de"]
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/a.parquet").write_bytes(path.read_bytes())
    flat = write_job(tmp_path, "flat", prompt={"user": USER}, output={"path": "flat-out"})
    batchgen.run(flat)
    assert keys(flat) == keys(write_job(tmp_path, "in/*/*.parquet", prompt={"user": USER}))


def test_a_column_of_nothing_but_nulls_has_no_say_whatever_type_it_is_written_with(tmp_path):
    """As pandas writes a column of texts on a day without any: numbers, all of them null."""
    tags = pa.array([["x"], None], pa.list_(pa.string()))
    texts = {"text": ["a", "b"], "note": ["n", None], "tags": tags}
    nulls = {"text": ["c"], "note": pa.nulls(1, pa.float64()), "tags": pa.nulls(1, pa.float64())}
    (tmp_path / "data").mkdir()
    for number, columns in enumerate([nulls, texts, nulls]):
        pq.write_table(pa.table(columns), tmp_path / f"data/{number}.parquet")
    job = write_job(tmp_path, "data", prompt={"user": "{{ text }}{{ note or '' }}"})
    assert batchgen.run(job).num_ok == 4
    out = pq.read_table(only_shown(tmp_path / "out"))
    assert out["note"].to_pylist() == [None, "n", None, None]
    assert out["tags"].to_pylist() == [None, ["x"], None, None]
