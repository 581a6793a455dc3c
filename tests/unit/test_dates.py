"""Dates in paths: what is a date, what is left alone, what is taken for a slip."""

from __future__ import annotations

import time
from datetime import UTC, date, datetime

import pytest

from batchgen.core.errors import ConfigError
from batchgen.job.files import with_dates
from batchgen.job.load import load_job, parse_job
from batchgen.job.model import JobConfig, today
from batchgen.job.recipe import make_recipe
from batchgen.pipeline.prepare import frozen_job

DAY = date(2026, 3, 1)


@pytest.mark.parametrize(
    ("path", "dated"),
    [
        ("data/{date}.jsonl", "data/2026-03-01.jsonl"),
        ("data/{run_date}.jsonl", "data/2026-03-01.jsonl"),
        ("{yesterday}", "2026-02-28"),
        ("{run_date-3d}", "2026-02-26"),
        ("{run_date+1d}", "2026-03-02"),
        ("{date-60d}", "2025-12-31"),
        ("{yesterday-1d}", "2026-02-27"),
        ("{date:%Y/%m/%d}/x", "2026/03/01/x"),
        ("{yesterday:%d.%m.%y}", "28.02.26"),
        ("{run_date-1d:%j of %G-W%V}", "059 of 2026-W09"),
        ("{date:%b %a 100%%, ü}", "Mar Sun 100%, ü"),
        ("{yesterday}-{date}/*.jsonl", "2026-02-28-2026-03-01/*.jsonl"),
        ("s3://bucket/{date:%Y/%m}/*.parquet", "s3://bucket/2026/03/*.parquet"),
        ("data/[0-9]*/{date}?.csv", "data/[0-9]*/2026-03-01?.csv"),
    ],
)
def test_tokens_become_days(path, dated):
    assert with_dates(path, DAY) == dated


@pytest.mark.parametrize(
    "path",
    [
        "plain.jsonl",
        "{}",
        "{a,b}/x",
        "{id}",
        "{data}",
        "{update}",
        "{0}",
        "{user:%Y}",
        "{yesterday_all_files}",
        "{date",
        "date}",
        "{ts-3d}",
        "{{ text }}",
    ],
)
def test_other_braces_stay(path):
    assert with_dates(path, DAY) == path


@pytest.mark.parametrize(
    ("token", "meant"),
    [
        ("{yesterdy}", "{yesterday}"),
        ("{Date}", "{date}"),
        ("{ date }", "{date}"),
        ("{rundate}", "{run_date}"),
        ("{run-date}", "{run_date}"),
        ("{today}", "{date}"),
        ("{tomorrow}", "{run_date+1d}"),
        ("{date-3}", "{date-3d}"),
        ("{run_date - 3d}", "{run_date-3d}"),
        ("{run_date+2w}", "{run_date+2d}"),
        ("{dates:%Y}", "{date:%Y}"),
    ],
)
def test_a_slip_is_refused_with_what_it_may_mean(token, meant):
    with pytest.raises(ValueError, match="is no date, did you mean") as caught:
        with_dates(f"data/{token}.jsonl", DAY)
    assert str(caught.value) == f"{token!r} is no date, did you mean {meant!r}?"
    with_dates(meant, DAY)


@pytest.mark.parametrize("layout", ["", "iso", "%H", "%Y-%q", "%", "%Y%", "%%", "%%Y"])
def test_a_layout_that_says_no_day_is_refused(layout):
    with pytest.raises(ValueError, match="does not say how to write a day, expected for example"):
        with_dates(f"{{date:{layout}}}", DAY)


def test_two_pairs_of_braces_are_told():
    with pytest.raises(ValueError, match="two pairs of braces, expected one"):
        with_dates("data/{{date}}.jsonl", DAY)
    assert with_dates("{a{date}b}", DAY) == "{a2026-03-01b}"


@pytest.mark.parametrize("token", ["{date-999999d}", "{date+9999999d}", "{date-9999999999999d}"])
def test_days_outside_of_the_calendar_are_refused(token):
    with pytest.raises(ValueError, match="outside of the calendar"):
        with_dates(token, DAY)


@pytest.mark.parametrize(("zone", "hours"), [("Etc/GMT-14", 14), ("Etc/GMT+12", -12)])
def test_today_is_that_of_the_machines_zone(monkeypatch, zone, hours):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        before = datetime.fromtimestamp(time.time() + hours * 3600, UTC).date()
        assert today() in {before, datetime.fromtimestamp(time.time() + hours * 3600, UTC).date()}
    finally:
        monkeypatch.undo()
        time.tzset()


def test_paths_of_input_and_output_are_dated_and_no_others(tmp_path, job_tables):
    tables = job_tables(
        input={"path": ["a/{date}.jsonl", "b/{yesterday}.jsonl"]},
        output={"path": "out/{date:%Y%m%d}", "prefix": "{date}"},
        prompt={"user": "{date}"},
        run={"on_finish": ["./x/{date}", "{date}"], "metrics_file": "{date}.prom"},
    )
    job = parse_job(tables, base=tmp_path, where="job.toml", run_date=DAY)
    assert job.input.path == [f"{tmp_path}/a/2026-03-01.jsonl", f"{tmp_path}/b/2026-02-28.jsonl"]
    assert job.output.path == f"{tmp_path}/out/20260301"
    assert (job.output.prefix, job.prompt.user) == ("{date}", "{date}")
    assert job.run.on_finish == [f"{tmp_path}/x/{{date}}", "{date}"]
    assert job.run.metrics_file == f"{tmp_path}/{{date}}.prom"


def test_set_may_hold_dates(tmp_path, job_tables):
    job = parse_job(
        job_tables(),
        base=tmp_path,
        where="job.toml",
        overrides=["input.path=data/{run_date-3d}.jsonl", "output.path={date}"],
        run_date=DAY,
    )
    assert job.input.path == [f"{tmp_path}/data/2026-02-26.jsonl"]
    assert job.output.path == f"{tmp_path}/2026-03-01"


def test_slips_in_both_paths_are_told_together(tmp_path, job_tables):
    with pytest.raises(ConfigError) as caught:
        parse_job(
            job_tables(input={"path": ["{dat}", "{date}", "{yesterdy}"]}),
            base=tmp_path,
            where="job.toml",
            overrides=["output.path={date:%H}"],
        )
    assert [text.partition(": ")[0] for text in caught.value.problems] == [
        "output.path",
        "input.path",
        "input.path",
    ]


def test_the_run_date_is_kept_beside_the_job_and_is_no_part_of_it(tmp_path, job_tables):
    tables = job_tables()

    def on(day):
        return parse_job(tables, base=tmp_path, where="job.toml", run_date=day)

    job, other = on(DAY), on(date(2027, 1, 1))
    assert (job.run_date, other.run_date) == (DAY, date(2027, 1, 1))
    assert job.model_copy(update={"run": other.run}).run_date == DAY
    assert set(job.model_dump()) == set(JobConfig.model_fields)
    assert job.model_dump() == other.model_dump()
    recipe = make_recipe(job, {})
    assert recipe == make_recipe(other, {})
    assert frozen_job(job, recipe) == frozen_job(other, recipe)
    with pytest.raises(ConfigError, match="run_date: unknown key"):
        parse_job(tables | {"run_date": "2026-03-01"}, base=tmp_path, where="job.toml")


def test_without_a_day_it_is_today(tmp_path, job_tables):
    path = tmp_path / "job.toml"
    path.write_text(
        '[input]\npath = "{date}.jsonl"\n[prompt]\nuser = "x"\n[model]\nbackend = "echo"\n'
        '[sampling]\nmax_tokens = 1\n[output]\npath = "out"\n'
    )
    before = today()
    job = load_job(path)
    assert before <= job.run_date <= today()
    assert job.input.path == [f"{tmp_path}/{job.run_date}.jsonl"]
    assert load_job(path, ["run.flush_s=1"], DAY).input.path == [f"{tmp_path}/2026-03-01.jsonl"]
