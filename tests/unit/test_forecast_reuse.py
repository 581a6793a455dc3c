"""What earlier runs measured, from books alone; and how a forecast is told."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from batchgen.pipeline.prepare import prepare
from batchgen.preview.estimate import last_run
from batchgen.preview.plan import Forecast, Rows
from batchgen.store.books import STATE
from tests.fakes import plan


@pytest.fixture
def books(storage, make_job):
    """A job, and what writes a run of it into its output."""
    prepared = prepare(make_job())

    def write(epoch, run_id, *, recipe=None, is_trial=False, **run):
        made = plan(3, number=epoch)
        job = {**made.job, "recipe": recipe or prepared.recipe}
        fingerprint = prepared.recipe_fingerprint if recipe is None else "another"
        fields = {**asdict(made), "job": job, "recipe_fingerprint": fingerprint}
        claim = {"plan": epoch, "run_id": run_id, "host": "n1", "is_trial": is_trial}
        totals = {
            "verdicts": {"1": {"ok": 8, "truncated": 2}, "2": {"ok": 2}},
            "num_prompt_tokens": 100,
            "num_output_tokens": 50,
            "working_s": 4.0,
            **run,
        }
        engine = {"device": "H100", "max_model_len": 4096, "startup_s": 30.0}
        summary = {"run_id": run_id, "started_at": "now", "run": totals, "engine": engine}
        for name, content in (
            (f"plan/{epoch:06}.json", fields),
            (f"epochs/{epoch:06}.json", claim),
            (f"runs/{run_id}/summary.json", summary),
        ):
            text = json.dumps({"format": 1, **content}).encode()
            assert storage.put_if_absent(f"{STATE}/{name}", text)

    return prepared, write


def test_the_newest_run_of_this_recipe_counts(storage, books):
    prepared, write = books
    assert last_run(storage, prepared) is None
    write(1, "first")
    write(2, "second", working_s=8.0)
    other = {**prepared.recipe, "prompt": {"user": "another"}}
    write(3, "other", recipe=other)
    found = last_run(storage, prepared)
    assert found is not None
    assert (found.run_id, found.is_same_recipe, found.working_s) == ("second", True, 8.0)
    # A second attempt is no second row.
    assert (found.num_rows, found.prompt_tokens, found.startup_s) == (10, 100, 30.0)


def test_a_trial_of_tune_counts_only_where_no_other_run_is(storage, books):
    prepared, write = books
    write(1, "another recipe", recipe={**prepared.recipe, "prompt": {"user": "another"}})
    write(2, "trial", is_trial=True)
    assert last_run(storage, prepared).run_id == "trial"
    write(3, "ordinary")
    write(4, "trial again", is_trial=True)
    assert last_run(storage, prepared).run_id == "ordinary"


def test_a_run_of_the_same_model_is_better_than_none(storage, books):
    prepared, write = books
    write(1, "other model", recipe={**prepared.recipe, "model": {"name": "another"}})
    assert last_run(storage, prepared) is None
    write(2, "other prompt", recipe={**prepared.recipe, "prompt": {"user": "another"}})
    found = last_run(storage, prepared)
    assert found is not None
    assert (found.run_id, found.is_same_recipe) == ("other prompt", False)


def test_a_run_that_computed_nothing_measured_nothing(storage, books):
    prepared, write = books
    write(1, "good")
    write(2, "copies only", verdicts={})
    write(3, "torn")
    storage.path(f"{STATE}/runs/torn/summary.json").write_text("{", encoding="utf-8")
    write(4, "gone")
    storage.path(f"{STATE}/runs/gone/summary.json").unlink()
    found = last_run(storage, prepared)
    assert found is not None
    assert found.run_id == "good"


def test_a_refusal_is_told_after_the_warnings():
    forecast = Forecast("refused", 2, "the job: is wrong", warnings=["careful"])
    assert forecast.as_text() == "warning: careful\nrefused: the job: is wrong"


def test_kinds_of_rows_that_there_are_none_of_are_left_out():
    rows = Rows(1_300, num_new=1_000, num_reused=300)
    text = Forecast("ready", output="out", plan_number=3, rows=rows).as_text()
    assert text.splitlines() == [
        "a run would begin plan 3 in out",
        "  rows     1,300 planned: 1,000 new, 300 reused",
    ]
