"""A job file to a frozen plan, and how a plan notices that the world moved."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.core.errors import ConfigError, InputChangedError, SourceError
from batchgen.core.records import Ranges, RowSet
from batchgen.pipeline.frozen import (
    Before,
    check_unchanged,
    freeze,
    input_changes,
    read_rows,
    same_files,
)
from batchgen.pipeline.prepare import (
    as_text,
    check,
    prepare,
)
from batchgen.pipeline.rows import missing
from batchgen.preview.sample import first_prompts
from batchgen.source.columns import read_schema, schema_text
from batchgen.store.books import Durable, Part, PartFooter, Plan
from batchgen.store.ledger import Ledger
from batchgen.store.matching import is_same_reading
from tests.fakes import write_jsonl


@pytest.fixture
def prepared(make_job):
    """Prepare the ten-row job, with tables changed."""
    return lambda *rows, **tables: prepare(make_job(*rows, **tables))


def numbered(start, stop):
    return [{"id": f"r{n}", "text": f"say {n}", "n": n} for n in range(start, stop)]


def many_files(tmp_path, *sizes):
    start = 0
    for at, size in enumerate(sizes):
        write_jsonl(tmp_path / f"in-{at}.jsonl", numbered(start, start + size))
        start += size
    return {"path": "in-*.jsonl"}


def test_a_plan_freezes_files_columns_and_recipe(tmp_path, prepared):
    job = prepared(None, input=many_files(tmp_path, 3, 2))
    plan = freeze(job, 4)
    assert (plan.number, plan.input_format, plan.num_rows) == (4, "jsonl", 5)
    assert [(segment.path, segment.num_rows) for segment in plan.segments] == [
        (str(tmp_path / "in-0.jsonl"), 3),
        (str(tmp_path / "in-1.jsonl"), 2),
    ]
    for segment in plan.segments:
        assert segment.size_bytes == Path(segment.path).stat().st_size
        assert segment.version == str(Path(segment.path).stat().st_mtime_ns)
    assert list(plan.columns) == ["id: string", "text: string", "n: int64"]
    assert list(plan.carried) == ["id", "text", "n"]
    assert read_schema(plan.schema) == job.columns
    assert plan.recipe_fingerprint == job.recipe_fingerprint
    assert plan.job["input"] == {
        "where": None,
        "limit": None,
        "columns": None,
        "types": {},
        "format": None,
    }
    assert plan.job["output"] == {
        "prefix": "gen_",
        "flatten": False,
        "with_seed": False,
    }


def test_each_plan_has_an_id_of_its_own(prepared):
    job = prepared()
    assert freeze(job, 1).plan_id != freeze(job, 1).plan_id


def test_a_plan_that_went_through_the_ledger_shows_no_change(prepared, storage):
    job = prepared(
        input={"limit": 4, "where": "id <> 'r1'", "columns": ["id"]},
        sampling={"stop": ["a"], "temperature": 0.5},
    )
    ledger = Ledger(storage)
    plan = freeze(job, 1)
    ledger.put_plan(plan)
    again = ledger.latest_plan()
    assert again == plan
    assert changes(again, job) == []
    assert read_schema(again.schema) == job.columns


def test_preparing_says_what_will_be_read(prepared):
    job = prepared(input={"columns": ["text"]}, prompt={"user": "{{ id }}"})
    spec = job.spec()
    assert (list(spec.carried), spec.needed, spec.where) == (["text"], {"id"}, None)
    assert job.carried_schema == pa.schema([("text", pa.string())])
    assert job.part_schema.names[:4] == ["_batchgen_segment", "_batchgen_row", "text", "gen_text"]


@pytest.mark.parametrize(
    ("tables", "problem"),
    [
        ({"input": {"path": "no.jsonl"}}, r"no.jsonl: names no file"),
        ({"prompt": {"user": "{{ titel }}"}}, "no column 'titel' in the input"),
        ({"prompt": {"user": "{% if %}"}}, "prompt.user: template error"),
        ({"input": {"columns": ["idd"]}}, "no column 'idd' in the input, it has: id, text"),
        ({"input": {"columns": ["id", "id"]}}, "input.columns: 'id' is listed twice"),
        ({"input": {"where": "nope = 1"}}, "nope"),
        ({"input": {"where": "id ="}}, "where"),
        ({"output": {"prefix": ""}, "input": {"columns": ["text"]}}, "makes the column 'text'"),
        ({"output": {"path": "."}}, "lies in the output folder .*; choose another one"),
        ({"model": {"backend": "vllm", "name": "/no/model"}}, "'/no/model' does not exist"),
    ],
)
def test_what_can_refuse_a_job_does_so_before_it_is_read(prepared, tables, problem):
    with pytest.raises((ConfigError, SourceError), match=problem) as caught:
        prepared(**tables)
    assert caught.value.exit_code == 2


def test_every_wrong_column_is_told_at_once(prepared):
    with pytest.raises(ConfigError) as caught:
        prepared(input={"columns": ["a", "id", "b", "id"]})
    assert len(caught.value.problems) == 3


def test_types_of_the_job_file_are_the_columns_types(prepared):
    job = prepared(input={"types": {"id": "json"}})
    assert job.columns.field("id").metadata == {b"batchgen.type": b"json"}


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [
        (1, [1]),
        (3, [3]),
        (4, [3, 1]),
        (5, [3, 2]),
        (6, [3, 2, 1]),
        (9, [3, 2, 4]),
        (100, [3, 2, 4]),
    ],
)
def test_a_limit_cuts_the_plan_after_so_many_rows(tmp_path, prepared, limit, sizes):
    plan = freeze(prepared(None, input={**many_files(tmp_path, 3, 2, 4), "limit": limit}), 1)
    assert [segment.num_rows for segment in plan.segments] == sizes


@pytest.mark.parametrize(
    ("limit", "sizes"),
    # Even numbers are 0 2 4 | 6 | 8 10 12 of files with rows 0-4, 5-7, 8-12.
    [(1, [1]), (2, [3]), (3, [5]), (4, [5, 2]), (5, [5, 3, 1]), (7, [5, 3, 5]), (99, [5, 3, 5])],
)
def test_a_limit_counts_only_rows_that_where_lets_through(tmp_path, prepared, limit, sizes):
    files = many_files(tmp_path, 5, 3, 5)
    plan = freeze(prepared(None, input={**files, "limit": limit, "where": "n % 2 = 0"}), 1)
    assert [segment.num_rows for segment in plan.segments] == sizes


def test_blank_lines_are_planned_but_do_not_count_for_the_limit(tmp_path, prepared):
    text = "\n".join(["", '{"text": "a"}', "", "{bad", '{"text": "b"}', '{"text": "c"}', ""])
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    job = {"rows": None, "input": {"limit": 3}}
    plan = freeze(prepared(None, input=job["input"]), 1)
    assert plan.num_rows == 5


def touch(path, seconds=1):
    now = path.stat()
    os.utime(path, ns=(now.st_atime_ns, now.st_mtime_ns + seconds * 10**9))


def changes(plan, job):
    return job.changes(plan) + input_changes(plan)


def test_a_file_that_was_only_touched_is_the_same(tmp_path, prepared):
    job = prepared()
    plan = freeze(job, 1)
    touch(tmp_path / "rows.jsonl")
    assert changes(plan, job) == []
    check_unchanged(plan.segments[0])


def test_a_file_that_grew_is_told_by_its_size(tmp_path, prepared):
    job = prepared()
    plan = freeze(job, 1)
    path = tmp_path / "rows.jsonl"
    size = path.stat().st_size
    with path.open("a", encoding="utf-8") as file:
        file.write("{}\n")
    why = f"has {size + 3} bytes, planned with {size}"
    assert changes(plan, job) == [f"input: {path} {why}"]
    with pytest.raises(InputChangedError, match=f"{why}; it must not change while a job runs"):
        check_unchanged(plan.segments[0])


def test_a_file_of_the_same_size_is_told_by_its_content(tmp_path, prepared):
    job = prepared()
    plan = freeze(job, 1)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(path.read_bytes().replace(b"say 3", b"say X"))
    touch(path)
    assert changes(plan, job) == [f"input: {path} has other content than planned"]
    with pytest.raises(InputChangedError, match="has other content than planned") as caught:
        check_unchanged(plan.segments[0])
    assert caught.value.exit_code == 1


def test_size_and_time_decide_without_reading(tmp_path, prepared):
    job = prepared()
    plan = freeze(job, 1)
    path = tmp_path / "rows.jsonl"
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"say 3", b"say X"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert changes(plan, job) == []


def test_files_that_came_and_went_are_told(tmp_path, make_job):
    tables = {"input": many_files(tmp_path, 1, 1)}
    job = prepare(make_job(None, **tables))
    plan = freeze(job, 1)
    assert same_files(plan, job.job)
    write_jsonl(tmp_path / "in-2.jsonl", numbered(5, 6))
    assert same_files(plan, job.job) is None
    (tmp_path / "in-2.jsonl").rename(tmp_path / "in-0.jsonl")
    assert same_files(plan, job.job)  # Its content is told by `input_changes`.
    (tmp_path / "in-0.jsonl").unlink()
    again = prepare(make_job(None, **tables))
    assert changes(plan, again) == [
        f"input: {tmp_path}/in-0.jsonl is gone: does not exist, expected an input file"
    ]
    assert same_files(plan, again.job) is None
    (tmp_path / "in-1.jsonl").unlink()
    with pytest.raises(SourceError, match="names no file"):
        same_files(plan, again.job)


def test_files_in_another_order_are_told(tmp_path, make_job):
    many_files(tmp_path, 1, 1)
    plan = freeze(prepare(make_job(None, input={"path": ["in-0.jsonl", "in-1.jsonl"]})), 1)
    assert same_files(plan, make_job(None, input={"path": ["in-1.jsonl", "in-0.jsonl"]})) is None
    assert same_files(plan, make_job(None, input={"path": "in-*.jsonl"}))


def test_a_file_that_vanishes_during_the_run_stops_it(tmp_path, prepared):
    job = prepared()
    plan = freeze(job, 1)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(InputChangedError, match=r"rows\.jsonl: vanished during the run: does not"):
        check_unchanged(plan.segments[0])


def test_a_limit_that_is_filled_wants_no_new_files(tmp_path, make_job):
    tables = {"input": {**many_files(tmp_path, 2, 2), "limit": 2}}
    job = prepare(make_job(None, **tables))
    plan = freeze(job, 1)
    assert [segment.num_rows for segment in plan.segments] == [2]
    assert same_files(plan, job.job)
    assert changes(plan, job) == []
    write_jsonl(tmp_path / "in-.jsonl", numbered(5, 6))  # Sorts first, so its rows would count.
    assert same_files(plan, job.job) is None


def test_a_limit_that_is_not_filled_wants_new_files(tmp_path, make_job):
    tables = {"input": {**many_files(tmp_path, 2), "limit": 5}}
    plan = freeze(prepare(make_job(None, **tables)), 1)
    assert same_files(plan, make_job(None, **tables))
    write_jsonl(tmp_path / "in-9.jsonl", numbered(5, 6))
    assert same_files(plan, make_job(None, **tables)) is None


@pytest.mark.parametrize(
    ("tables", "lines"),
    [
        ({"prompt": {"user": "{{ id }}"}}, ["prompt.user: '{{ text }}' -> '{{ id }}'"]),
        ({"input": {"where": "id = 'a'"}}, ["""input.where: None -> "id = 'a'\""""]),
        ({"input": {"limit": 3}}, ["input.limit: None -> 3"]),
        ({"input": {"columns": ["id"]}}, ["input.columns: None -> ['id']"]),
        ({"output": {"prefix": "x_"}}, ["output.prefix: 'gen_' -> 'x_'"]),
        ({"output": {"compression": "lz4", "rows_per_file": 3}}, []),
        ({"run": {"flush_s": 1.0, "max_in_flight": 3}}, []),
        ({"model": {"max_num_seqs": 3}}, []),
        (
            {"sampling": {"max_tokens": 5, "top_p": 0.5}},
            ["sampling.max_tokens: 32 -> 5", "sampling.top_p: not set -> 0.5"],
        ),
    ],
)
def test_a_changed_job_is_told_line_by_line(prepared, tables, lines):
    plan = freeze(prepared(), 1)
    assert changes(plan, prepared(**tables)) == lines


def read(job, plan, todo):
    return [
        (one.segment, list(one.rows), list(one.skipped))
        for one in read_rows(plan, todo, job.reader, job.spec())
    ]


def test_only_the_rows_that_are_missing_are_read(tmp_path, prepared):
    job = prepared(None, input={**many_files(tmp_path, 4, 3, 2), "where": "n <> 5"})
    plan = freeze(job, 1)
    footer = PartFooter(
        plan.plan_id, 1, "r", RowSet({0: Ranges.until(4), 1: Ranges.of([0])}), 5, 0, 0, {}
    )
    todo = missing(plan, Durable([Part("p", footer)]))
    assert todo == {1: Ranges.of([1, 2]), 2: Ranges.until(2)}
    assert read(job, plan, todo) == [(1, [2], [1]), (2, [0, 1], [])]


def test_nothing_missing_reads_nothing(tmp_path, prepared):
    job = prepared()
    plan = freeze(job, 1)
    (tmp_path / "rows.jsonl").unlink()
    assert read(job, plan, {}) == []


def test_reading_stops_at_a_file_that_changed_before_its_first_row(tmp_path, prepared):
    job = prepared(None, input=many_files(tmp_path, 2, 2))
    plan = freeze(job, 1)
    rows = read_rows(plan, RowSet({0: Ranges.until(2), 1: Ranges.until(2)}), job.reader, job.spec())
    assert list(next(rows).rows) == [0, 1]
    write_jsonl(tmp_path / "in-1.jsonl", numbered(7, 10))
    with pytest.raises(InputChangedError, match=r"in-1\.jsonl: has "):
        next(rows)


def test_reading_notices_a_file_that_changed_under_it(tmp_path, prepared):
    job = prepared()
    plan = freeze(job, 1)
    rows = read_rows(plan, RowSet({0: Ranges.until(10)}), job.reader, job.spec())
    next(rows)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write("{}\n")
    with pytest.raises(InputChangedError, match="it must not change while a job runs"):
        list(rows)


def test_columns_are_read_as_the_plan_froze_them(tmp_path, prepared):
    """Another guess from the same file, by a later version, must not change a job's types."""
    job = prepared([{"text": "a", "n": 1}, {"text": "b", "n": 2}])
    plan = freeze(job, 1)
    as_float = pa.schema([("text", pa.string()), ("n", pa.float64())])
    schema = schema_text(as_float)
    again = check(job.job).with_plan(replace(plan, schema=schema))
    (found,) = read_rows(plan, RowSet({0: Ranges.until(2)}), again.reader, again.spec())
    assert found.carried.schema.field("n").type == pa.float64()


def test_a_plan_of_parquet_keeps_the_files_types(tmp_path, make_job):
    data_type = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    chats = pa.array([[{"role": "user", "content": "hi"}]] * 3, data_type)
    pq.write_table(
        pa.table({"chat": chats, "k": pa.array([1, 2, 3], pa.int8())}), tmp_path / "a.parquet"
    )
    job = prepare(
        make_job(None, input={"path": "a.parquet"}, prompt={"user": None, "messages": "chat"})
    )
    plan = freeze(job, 1)
    kept = json.loads(json.dumps(asdict(plan)))
    sequences = {
        name: getattr(plan, name) for name in ("segments", "bases", "keys", "kept", "continues")
    }
    assert Plan(**kept | sequences) == plan
    assert read_schema(plan.schema).field("chat").type == data_type
    (found,) = read_rows(plan, RowSet({0: Ranges.of([1])}), job.reader, job.spec())
    assert found.values == [{"chat": [{"role": "user", "content": "hi"}]}]


def test_first_prompts_show_where_a_row_stands_and_what_it_becomes(prepared):
    job = prepared(
        [{"text": "a"}, {"text": None}, {"text": "c"}, {"text": "d"}],
        prompt={"system": "Be brief."},
    )
    assert [(where, as_text(row, job.job)) for where, row in first_prompts(job, 3)] == [
        ("row 0", "[system]\nBe brief.\n[user]\na"),
        ("row 1", "null_value: the prompt needs a value that is null; null here: text"),
        ("row 2", "[system]\nBe brief.\n[user]\nc"),
    ]


def test_first_prompts_are_of_rows_that_will_be_run(tmp_path, prepared):
    job = prepared(None, input={**many_files(tmp_path, 5), "where": "n > 2"})
    assert [(where, as_text(row, job.job)) for where, row in first_prompts(job, 2)] == [
        ("row 3", "[user]\nsay 3"),
        ("row 4", "[user]\nsay 4"),
    ]


@pytest.mark.parametrize(
    ("gate", "problem"),
    [
        ({"drift_column": "gen_lable"}, "drift_column: 'gen_lable' holds no labels"),
        ({"drift_column": "gen_label"}, "drift_column: 'gen_label' holds no labels"),
        (
            {"max_drift": 0.1},
            "max_drift: the answer has no labels, expected output.choice or an enum in "
            "output.schema",
        ),
    ],
)
def test_limits_for_labels_that_there_are_none_of_are_refused_in_every_run(make_job, gate, problem):
    plan = freeze(prepare(make_job()), 1)
    job = check(make_job(gate=gate))
    with pytest.raises(ConfigError, match=problem):
        job.with_input()
    with pytest.raises(ConfigError, match=problem):
        job.with_plan(plan)


def test_a_typo_in_drift_column_is_found_when_a_run_goes_on(make_job):
    choice = {"choice": ["a", "b"]}
    plan = freeze(prepare(make_job(output=choice)), 1)
    good = {"drift_column": "gen_label", "max_drift": 0.1}
    check(make_job(output=choice, gate=good)).with_plan(plan)
    with pytest.raises(ConfigError, match="'gen_lable' holds no labels; did you mean 'gen_label'"):
        check(make_job(output=choice, gate={"drift_column": "gen_lable"})).with_plan(plan)


# --- the delimiter of CSV ------------------------------------------------------------------------


def semicolons(tmp_path, **keys):
    """Two rows by semicolons, three by commas; written once."""
    if not (tmp_path / "in.csv").exists():
        (tmp_path / "in.csv").write_text('id;text\n1;"a\nb"\n2;c\n', encoding="utf-8")
    return {"path": "in.csv", **keys}


def test_a_column_that_only_another_delimiter_would_make_is_hinted_at(tmp_path, prepared):
    with pytest.raises(ConfigError, match=r"is the delimiter ';'\? set input.delimiter"):
        prepared(None, input=semicolons(tmp_path))
    assert prepared(None, input=semicolons(tmp_path, delimiter=";")).columns.names == ["id", "text"]
    with pytest.raises(ConfigError) as caught:
        prepared(None, input=semicolons(tmp_path, delimiter=";"), prompt={"user": "{{ txet }}"})
    assert "delimiter" not in str(caught.value)


def test_another_delimiter_is_another_job_whose_rows_are_counted_anew(tmp_path, prepared):
    before = prepared(None, input=semicolons(tmp_path), prompt={"user": "same"})
    plan = freeze(before, 1)
    assert "delimiter" not in plan.job["input"]  # As in plans of before there was one.
    after = prepared(None, input=semicolons(tmp_path, delimiter=";"), prompt={"user": "same"})
    assert check(after.job).changes(plan) == ["input.delimiter: not set -> ';'"]
    assert check(before.job).changes(plan) == []
    again = freeze(after, 2, Before(seen=plan))
    assert (plan.num_rows, again.num_rows) == (3, 2)
    assert not is_same_reading(plan, again)


def test_a_delimiter_is_for_csv_and_one_character_that_can_end_a_field(tmp_path, make_job):
    text = "input.delimiter: ';' is for CSV, and the input is jsonl; leave it out"
    with pytest.raises(ConfigError, match=text):
        prepare(make_job(input={"delimiter": ";"}))
    for delimiter in ("", ";;", '"', "\n"):
        with pytest.raises(ConfigError, match=r"input(\.delimiter)?: "):
            make_job(None, input=semicolons(tmp_path, delimiter=delimiter))
