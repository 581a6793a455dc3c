"""What a run has to do: nothing, go on, a new plan and from what, or refuse."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pyarrow as pa
import pytest

from batchgen.core.errors import (
    ConfigError,
    FencedError,
    InputChangedError,
    RecipeChangedError,
    SourceError,
)
from batchgen.core.records import Ranges, RowError, RowSet, Verdict, WorkLeft
from batchgen.job.recipe import fingerprint
from batchgen.pipeline.compute import lengths_of, work_of
from batchgen.pipeline.context import RunOptions
from batchgen.pipeline.decide import Hooks, begin, decide
from batchgen.pipeline.frozen import Before, freeze
from batchgen.pipeline.publish import publish
from batchgen.store.books import STATE, Base, Manifest, PublishedFile
from batchgen.store.ledger import Ledger
from batchgen.store.result_files import PartContext, PartWriter
from tests.fakes import batch, results, write_jsonl
from tests.harm import overwrite

PLAIN = RunOptions()
ACCEPT = RunOptions(accept_recipe=True)
ONLY_ERRORS = RunOptions(accept_recipe=True, only_errors=True)
RETRY = RunOptions(retry_errors=True)
FRESH = RunOptions(fresh=True)
OTHER_RECIPE = {"prompt": {"user": "Say {{ text }}"}}
OTHER_SELECTION = {"input": {"path": "in-*.jsonl", "where": "id <> 'r1'"}}


class Lab:
    """A job over two files of two rows, and its books."""

    def __init__(self, tmp_path, make_job, storage):
        self.folder = tmp_path
        self.ledger = Ledger(storage)
        self._make_job = make_job
        for at in range(2):
            self.write(at, 2 * at, 2 * at + 1)

    def write(self, at, *numbers):
        path = self.folder / f"in-{at}.jsonl"
        return write_jsonl(path, [{"id": f"r{n}", "text": f"say {n}"} for n in numbers])

    def decide(self, options=PLAIN, **tables):
        job = self._make_job(None, **{"input": {"path": "in-*.jsonl"}, **tables})
        return decide(self.ledger, job, options)

    def begin(self, options=PLAIN, **tables):
        """What a run would begin with, and what it would say."""
        notes = []
        hooks = Hooks(notes.append, lambda: None, self.ledger.storage)
        return begin(self.ledger, options, self.decide(options, **tables), hooks), notes

    def plan(self, before=None, **tables):
        """What a run would freeze, put."""
        number = self.ledger.latest_plan_number() + 1
        plan = freeze(self.decide(FRESH, **tables).prepared, number, before or Before())
        self.ledger.put_plan(plan)
        return plan

    def commit(self, plan, *rows, skipped=None, epoch=None, error=None, facts=None, **changes):
        """Claim, and end these rows of the first file; all as errors, if there is one.

        `changes` are of the results: attempts, verdict.
        """
        epoch = epoch or self.ledger.claim(plan, "run-1", {})
        ids = pa.record_batch({"id": ["x"] * len(rows), "text": ["y"] * len(rows)})
        schema = self.decide(FRESH).prepared.part_schema
        context = PartContext(plan.plan_id, epoch.number, 0, "run-1", schema, "gen_")
        writer = PartWriter(self.ledger.storage, f"{STATE}/parts", context)
        ended = results(
            batch(rows, carried=ids), errors=dict.fromkeys(rows, error) if error else {}
        )
        ended = [one._replace(**changes) for one in ended]
        return writer.commit(ended, skipped or {}, facts or {}).name

    def publish(self, plan):
        files = [PublishedFile("part-00000.parquet", plan.num_rows, 1, "")]
        self.ledger.put_manifest(
            Manifest(
                number=plan.number,
                plan_id=plan.plan_id,
                epoch=1,
                run_id="run-1",
                created_at="",
                files=files,
                num_planned=plan.num_rows,
                num_ok=plan.num_rows,
                num_errors=0,
                num_skipped=0,
            )
        )
        return plan

    def touch(self, at):
        path = self.folder / f"in-{at}.jsonl"
        now = path.stat()
        os.utime(path, ns=(now.st_atime_ns, now.st_mtime_ns + 10**9))


@pytest.fixture
def lab(tmp_path, make_job, storage):
    return Lab(tmp_path, make_job, storage)


@pytest.fixture(params=[True, False], ids=["published", "unfinished"])
def newest(lab, request):
    """A plan; the last of its life or in the middle of it."""
    plan = lab.plan()
    lab.commit(plan, 0, 1)
    return lab.publish(plan) if request.param else plan


def assert_goes_on(decision, plan):
    assert decision.plan == plan
    assert list(decision.prepared.files) == [segment.path for segment in plan.segments]


def assert_begins(decision, **before):
    """A new plan that goes back to this."""
    assert decision.plan is None
    assert decision.before == Before(**before)


# --- nothing is planned yet, or --fresh -------------------------------------------------------


@pytest.mark.parametrize("options", [PLAIN, FRESH, RETRY, ACCEPT, ONLY_ERRORS])
def test_a_job_that_was_never_planned_begins(lab, options):
    decision = lab.decide(options)
    assert_begins(decision)
    assert len(decision.prepared.files) == 2


@pytest.mark.parametrize("tables", [{}, OTHER_RECIPE, OTHER_SELECTION])
def test_fresh_begins_whatever_changed_and_takes_no_row_over(lab, newest, tables):
    lab.write(0, 7)
    decision = lab.decide(FRESH, **tables)
    assert_begins(decision, seen=newest)  # What is known of files still holds.
    assert decision.notes == ()


# --- nothing has changed ----------------------------------------------------------------------


@pytest.mark.parametrize("options", [PLAIN, RETRY, ACCEPT, ONLY_ERRORS])
@pytest.mark.parametrize("is_touched", [True, False])
def test_an_unchanged_job_goes_on_with_its_newest_plan(lab, newest, options, is_touched):
    if is_touched:
        lab.touch(0)
    decision = lab.decide(options)
    assert_goes_on(decision, newest)
    assert list(decision.notes) == []


def test_the_newest_plan_is_the_one_that_counts(lab):
    lab.publish(lab.plan())
    second = lab.plan(before=Before(bases=(Base(1),), takes_errors=False, generation=1))
    assert_goes_on(lab.decide(), second)


def test_a_filled_limit_wants_no_new_files(lab):
    limit = {"input": {"path": "in-*.jsonl", "limit": 3}}
    plan = lab.publish(lab.plan(**limit))
    lab.write(2, 4)
    decision = lab.decide(**limit)
    assert_goes_on(decision, plan)
    assert list(decision.notes) == []


# --- files have changed -----------------------------------------------------------------------


def edit(lab):
    lab.write(0, 0, 7)


def grow(lab):
    lab.write(0, 0, 1, 7)


def remove(lab):
    (lab.folder / "in-1.jsonl").unlink()


def add(lab):
    lab.write(2, 4)


@pytest.mark.parametrize("change", [edit, grow, remove, add])
def test_a_published_job_takes_over_what_it_can_from_its_snapshot(lab, change):
    plan = lab.publish(lab.plan())
    change(lab)
    decision = lab.decide()
    assert_begins(decision, seen=plan, bases=(Base(plan.number),), takes_errors=True)
    assert len(decision.prepared.files) == {edit: 2, grow: 2, remove: 1, add: 3}[change]


@pytest.mark.parametrize("change", [edit, grow, remove, add])
def test_an_unfinished_job_takes_over_what_is_durable(lab, change):
    plan = lab.plan()
    part = lab.commit(plan, 1)
    change(lab)
    assert_begins(lab.decide(), seen=plan, bases=(Base(plan.number, (part,)),), takes_errors=True)


def test_an_unfinished_job_passes_on_what_it_would_have_taken_over(lab):
    lab.publish(lab.plan())
    second = lab.plan(before=Before(bases=(Base(1),)))
    part = lab.commit(second, 0)
    edit(lab)
    third = lab.decide()
    assert_begins(third, seen=second, bases=(Base(2, (part,)), Base(1)), takes_errors=True)
    lab.plan(before=third.before)
    grow(lab)
    bases = (Base(3), Base(2, (part,)), Base(1))
    assert lab.decide().before.bases == bases


def test_a_published_job_is_all_that_the_next_one_goes_back_to(lab):
    lab.publish(lab.plan())
    second = lab.publish(
        lab.plan(before=Before(bases=(Base(1),), takes_errors=False, generation=1))
    )
    edit(lab)
    assert_begins(lab.decide(), seen=second, bases=(Base(2),), takes_errors=True, generation=1)
    assert second.seed_generation == 1
    assert lab.decide().before.takes_errors  # So that its new rows get the seeds of a new job.


def test_files_in_another_order_are_another_snapshot(lab, newest):
    swapped = {"input": {"path": ["in-1.jsonl", "in-0.jsonl"]}}
    decision = lab.decide(**swapped)
    assert decision.plan is None
    assert [base.plan for base in decision.before.bases] == [1]
    assert [path[-7] for path in decision.prepared.files] == ["1", "0"]


def test_errors_are_run_again_on_request(lab):
    plan = lab.publish(lab.plan())
    edit(lab)
    before = {"seen": plan, "bases": (Base(1),)}
    assert_begins(lab.decide(RETRY), **before, takes_errors=False, generation=1)


def test_a_retry_of_a_retry_is_of_the_next_generation(lab):
    lab.publish(lab.plan(before=Before(generation=1)))
    edit(lab)
    assert lab.decide(RETRY).before.generation == 2


def test_a_retry_whose_input_moves_on_still_takes_no_errors(lab):
    lab.publish(lab.plan())
    lab.plan(before=Before(bases=(Base(1),), takes_errors=False, generation=1))
    edit(lab)
    before = lab.decide().before
    assert before.takes_errors is False
    assert before.bases == (Base(2), Base(1))


def test_a_retry_whose_input_moves_on_keeps_its_generation(lab):
    """Or its errors would be asked for with the seeds with which they failed."""
    lab.publish(lab.plan())
    lab.plan(before=Before(bases=(Base(1),), takes_errors=False, generation=1))
    edit(lab)
    assert lab.decide().before.generation == 1


def test_files_that_are_gone_are_told_of_with_their_rows(lab):
    lab.publish(lab.plan())
    remove(lab)
    begun, notes = lab.begin()
    gone = lab.folder / "in-1.jsonl"
    assert notes == [f"the input file {gone} is gone: 2 rows leave the snapshot"]
    assert begun.leaving.num_rows == 2


def test_an_edited_file_leaves_no_row(lab):
    lab.publish(lab.plan())
    edit(lab)
    begun, notes = lab.begin()
    assert (begun.leaving.num_rows, notes) == (0, [])


def test_an_input_of_which_nothing_is_left_is_refused(lab, newest):
    for path in lab.folder.glob("in-*"):
        path.unlink()
    with pytest.raises(SourceError, match="names no file"):
        lab.decide()


# --- the choice of rows has changed -----------------------------------------------------------


@pytest.mark.parametrize("keys", [{"where": "id <> 'r1'"}, {"limit": 3}, {"columns": ["id"]}])
def test_another_choice_of_rows_is_a_new_plan_once_the_job_is_published(lab, keys):
    plan = lab.publish(lab.plan())
    decision = lab.decide(input={"path": "in-*.jsonl", **keys})
    assert_begins(decision, seen=plan, bases=(Base(1),), takes_errors=True)


@pytest.mark.parametrize("keys", [{"where": "id <> 'r1'"}, {"limit": 3}, {"columns": ["id"]}])
def test_another_choice_of_rows_goes_on_with_what_an_unfinished_job_has(lab, keys):
    plan = lab.plan()
    part = lab.commit(plan, 0)
    decision = lab.decide(input={"path": "in-*.jsonl", **keys})
    assert_begins(decision, seen=plan, bases=(Base(1, (part,)),), takes_errors=True)


# --- the recipe has changed -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tables", "change"),
    [
        (OTHER_RECIPE, "prompt.user: '{{ text }}' -> 'Say {{ text }}'"),
        ({"sampling": {"max_tokens": 9}}, "sampling.max_tokens: 32 -> 9"),
        ({"output": {"prefix": "x_"}}, "output.prefix: 'gen_' -> 'x_'"),
        ({"checks": {"allow_truncated": True}}, "checks.allow_truncated: False -> True"),
    ],
)
def test_another_recipe_is_refused_with_the_difference(lab, newest, tables, change):
    for options in (PLAIN, RETRY):
        with pytest.raises(RecipeChangedError) as caught:
            lab.decide(options, **tables)
        assert caught.value.exit_code == 2
        assert caught.value.changes == (change,)
    is_published = lab.ledger.manifest(newest.number) is not None
    assert ("--only-errors" in str(caught.value)) is is_published
    assert lab.ledger.latest_plan() == newest


def test_a_recipe_that_is_accepted_relabels_every_row(lab, newest):
    decision = lab.decide(ACCEPT, **OTHER_RECIPE)
    assert_begins(decision, seen=newest)
    assert decision.prepared.recipe_fingerprint != newest.recipe_fingerprint


def test_a_recipe_that_is_accepted_for_errors_takes_what_is_ok(lab, newest):
    decision = lab.decide(ONLY_ERRORS, **OTHER_RECIPE)
    if lab.ledger.manifest(newest.number) is not None:
        base = Base(1)
    else:
        base = Base(1, tuple(part.name for part in lab.ledger.durable(newest).parts))
        assert len(base.parts) == 1
    assert_begins(decision, seen=newest, bases=(base,), takes_errors=False, generation=1)


@pytest.mark.parametrize(
    "tables",
    [
        {"output": {"prefix": "x_"}},
        {"output": {"choice": ["a", "b"]}},
        {"sampling": {"n": 2, "temperature": 1.0}},
        {"sampling": {"logprobs": 2}},
    ],
)
def test_rows_of_other_columns_cannot_be_taken_over(lab, newest, tables):
    with pytest.raises(RecipeChangedError, match="answers would have other columns than those"):
        lab.decide(ONLY_ERRORS, **tables)
    assert_begins(lab.decide(ACCEPT, **tables), seen=newest)


def test_a_job_that_does_not_fit_is_refused_before_it_is_compared(lab, newest):
    with pytest.raises(ConfigError, match="no column 'titel' in the input"):
        lab.decide(ACCEPT, prompt={"user": "{{ titel }}"})
    with pytest.raises(ConfigError, match=r"prompt\.user: template error"):
        lab.decide(prompt={"user": "{% if %}"})


def test_an_output_that_is_not_understood_is_refused(lab):
    lab.ledger.storage.put_if_absent("_batchgen/plan/000001.json", b"{}")
    with pytest.raises(Exception, match="not a batchgen file of this version") as caught:
        lab.decide()
    assert caught.value.exit_code == 2


def test_deciding_writes_nothing(lab, newest):
    held = {path: path.read_bytes() for path in lab.folder.rglob("*") if path.is_file()}
    lab.decide()
    edit(lab)
    del held[lab.folder / "in-0.jsonl"]
    lab.decide()
    lab.decide(ACCEPT, **OTHER_RECIPE)
    after = {path: path.read_bytes() for path in lab.folder.rglob("*") if path.is_file()}
    del after[lab.folder / "in-0.jsonl"]
    assert after == held


# --- the newest plan has come to nothing ------------------------------------------------------


def refused(lab, *args, **tables):
    with pytest.raises(RecipeChangedError) as caught:
        lab.decide(*args, **tables)
    return caught.value


def skip_two(lab, plan):
    lab.commit(plan, skipped=RowSet({0: Ranges.until(2)}))


@pytest.mark.parametrize("options", [PLAIN, RETRY, ACCEPT, ONLY_ERRORS])
@pytest.mark.parametrize("tables", [OTHER_RECIPE, OTHER_SELECTION, {"output": {"prefix": "x_"}}])
@pytest.mark.parametrize(
    "begin", [lambda *_: None, lambda lab, plan: lab.ledger.claim(plan, "r", {}), skip_two]
)
def test_a_plan_that_came_to_nothing_binds_nobody(lab, begin, tables, options):
    plan = lab.plan()
    begin(lab, plan)
    decision = lab.decide(options, **tables)
    assert_begins(decision, seen=plan)
    assert decision.replaces == plan
    (note,) = decision.notes
    assert note == "plan 1 came to nothing, and the job is another now: a new plan replaces it"
    assert_goes_on(lab.decide(options), plan)  # As long as nothing has changed.


@pytest.mark.parametrize("attempts", [0, 1])
@pytest.mark.parametrize("kind", ["bad_json", "prompt_too_long", "engine_crash"])
def test_rows_without_an_answer_bind_nobody_whether_an_engine_was_asked_or_not(lab, kind, attempts):
    plan = lab.plan()
    lab.commit(plan, 0, 1, error=RowError(kind, "..."), attempts=attempts)
    assert_begins(lab.decide(**OTHER_RECIPE), seen=plan)


def test_answers_that_are_errors_bind(lab):
    plan = lab.plan()
    error = RowError("schema_violation", "not of the choices")
    lab.commit(plan, 0, 1, error=error, attempts=2, verdict=Verdict.SCHEMA_VIOLATION)
    refused(lab, **OTHER_RECIPE)


def test_one_answer_among_rows_that_have_none_binds(lab):
    plan = lab.plan()
    lab.commit(plan, 0, error=RowError("bad_json", "..."), attempts=0)
    lab.commit(plan, 1)
    refused(lab, **OTHER_RECIPE)


def test_answers_that_were_taken_over_bind_where_they_come_from(lab):
    plan = lab.plan()
    lab.commit(plan, 0, facts={"batchgen": "0.1.0"})
    assert_begins(lab.decide(**OTHER_RECIPE), seen=plan)
    facts = {"batchgen": "0.1.0", "engine": "vllm", "version": "0.26", "device": "cpu"}
    lab.commit(plan, 1, facts=facts)
    refused(lab, **OTHER_RECIPE)


def test_an_input_that_changes_before_the_manifest_is_put_is_not_published(lab):
    plan = lab.plan()
    epoch = lab.ledger.claim(plan, "run-1", {})
    lab.commit(plan, 0, 1, skipped=RowSet({1: Ranges.until(2)}), epoch=epoch)
    prepared = lab.decide(FRESH).prepared
    lab.write(0, 7, 8, 9)
    with pytest.raises(InputChangedError, match="it must not change while a job runs"):
        publish(lab.ledger, prepared, epoch)
    assert lab.ledger.latest_manifest() is None
    lab.write(0, 0, 1)
    assert publish(lab.ledger, prepared, epoch).num_ok == 2


def test_a_part_that_no_claim_accepts_still_binds(lab):
    plan = lab.plan()
    late = lab.ledger.claim(plan, "run-1", {})
    lab.ledger.claim(plan, "run-2", {})
    lab.commit(plan, 0, epoch=late)
    assert lab.ledger.durable(plan).num_done == 0
    refused(lab, **OTHER_RECIPE)


def test_rows_that_a_plan_before_has_ended_still_bind(lab):
    """They are what the newest plan would have taken over."""
    plan = lab.plan()
    part = lab.commit(plan, 0)
    lab.ledger.claim(lab.plan(before=Before(bases=(Base(1, (part,)),))), "run-2", {})
    refused(lab, **OTHER_RECIPE)


def test_what_cannot_be_read_counts_as_rows(lab):
    plan = lab.plan()
    path = lab.ledger.storage.path(lab.commit(plan, 0))
    overwrite(path, path.read_bytes()[:-9])
    refused(lab, **OTHER_RECIPE)


def test_a_plan_is_not_taken_from_a_run_that_may_be_at_work_on_it(lab):
    lab.ledger.claim(lab.plan(), "run-1", {})
    refused(lab, RunOptions(steal=True), **OTHER_RECIPE)


@pytest.fixture
def failed(lab):
    """A snapshot, and a plan by another recipe after it that came to nothing."""
    plan = lab.plan()
    lab.commit(plan, 0, 1)
    published = lab.publish(plan)
    failed = lab.plan(**OTHER_RECIPE)
    lab.ledger.claim(failed, "run-2", {})
    return published, failed


def test_the_snapshot_before_it_still_guards_its_recipe(lab, failed):
    published, _ = failed
    third = {"prompt": {"user": "Sing {{ text }}"}}
    error = refused(lab, **third)
    assert error.changes == ("prompt.user: '{{ text }}' -> 'Sing {{ text }}'",)
    assert "--only-errors" in str(error)
    assert_begins(lab.decide(ACCEPT, **third), seen=published)
    decision = lab.decide(ONLY_ERRORS, **third)
    assert_begins(decision, seen=published, bases=(Base(1),), takes_errors=False, generation=1)


def test_undone_the_change_takes_everything_over_from_the_snapshot(lab, failed):
    published, nothing = failed
    decision = lab.decide()
    assert_begins(decision, seen=published, bases=(Base(1),))
    assert decision.replaces == nothing
    assert_begins(
        lab.decide(RETRY), seen=published, bases=(Base(1),), takes_errors=False, generation=1
    )


def test_rows_after_the_snapshot_bind_to_their_own_recipe(lab, failed):
    lab.commit(failed[1], 0)
    assert refused(lab).changes == ("prompt.user: 'Say {{ text }}' -> '{{ text }}'",)


@pytest.mark.parametrize("end", [Lab.commit, lambda lab, plan, _: lab.publish(plan)])
def test_a_run_that_came_in_between_is_seen_under_the_lock(lab, make_job, end):
    plan = lab.plan()
    job = make_job(None, input={"path": "in-*.jsonl"}, **OTHER_RECIPE)
    decision = decide(lab.ledger, job, PLAIN)
    end(lab, plan, 0)
    with pytest.raises(FencedError, match="another run has just worked on this job; run again"):
        begin(lab.ledger, PLAIN, decision, Hooks(print, print, None))
    assert lab.ledger.latest_plan() == plan


# --- rows of other formats under a new recipe -------------------------------------------------


@pytest.mark.parametrize("num_edited", [0, 1, 2])
def test_only_errors_tells_which_files_run_whole(lab, num_edited):
    paths = [lab.folder / f"in-{at}.csv" for at in range(2)]
    for path in paths:
        path.write_text("id,text\nr1,a\nr2,b\n")
    source = {"input": {"path": "in-*.csv"}}
    plan = lab.plan(**source)
    lab.commit(plan, 0)
    for path in paths[:num_edited]:
        path.write_text("id,text\nr1,a\nr2,B!\n")
    notes = list(lab.decide(ONLY_ERRORS, **source, **OTHER_RECIPE).notes)
    more = " and 1 more files" if num_edited == 2 else ""
    assert notes == [
        f"--only-errors: {2 * num_edited} rows of {paths[0]}{more} run again, edited or not: "
        "which rows of a csv file were edited cannot be told across recipes"
    ] * bool(num_edited)
    assert not lab.decide(ACCEPT, **source, **OTHER_RECIPE).notes


@pytest.mark.parametrize("engine", [{}, {"max_cudagraph_capture_size": 512}])
@pytest.mark.parametrize("is_published", [False, True])
def test_a_plan_of_a_batchgen_that_took_speed_for_recipe_is_gone_on_with(lab, engine, is_published):
    new = lab.plan()
    recipe = dict(new.job["recipe"])
    recipe["model"] = {**recipe["model"], "engine": {"cudagraph_capture_sizes": [1, 2]}}
    old = replace(
        new,
        number=new.number + 1,
        job={**new.job, "recipe": recipe},
        recipe_fingerprint=fingerprint(recipe),
    )
    lab.ledger.put_plan(old)
    lab.commit(old, 0, 1)
    tables = {"model": {"engine": engine}}
    begun, notes = lab.begin(**tables)
    assert (begun.plan, notes) == (old, [])
    lab.write(2, 7)  # And the next night's keys are made as this plan's are.
    begun, _ = lab.begin(**tables)
    assert begun.plan.number == old.number + 1
    assert begun.plan.bases
    assert begun.plan.recipe_fingerprint == old.recipe_fingerprint
    with pytest.raises(RecipeChangedError, match="seed"):
        lab.decide(model={"engine": {**engine, "seed": 1}})


def test_what_is_left_is_told_with_the_last_runs_speed(lab):
    job = lab.decide().prepared.job

    def left():
        return work_of(100, job, lengths_of(job, lab.ledger), lab.ledger)

    def write(run_id, speed, settings, working_s=60.0, **claim):
        lab.ledger.claim(plan, run_id, claim)
        run = {"requests_per_s": speed, "working_s": working_s}
        summary = {"run": run, "engine": {"settings": settings}}
        path = f"{STATE}/runs/{run_id}/summary.json"
        lab.ledger.storage.replace(path, json.dumps(summary).encode())

    assert left() == WorkLeft(100, job.sampling.max_tokens)
    plan = lab.plan()
    write("run-1", 5.0, {"cudagraph_capture_sizes": [1]})
    assert (left().rows_per_s, left().is_compiled) == (5.0, True)
    write("run-2", 7.0, {"compilation_config": {"mode": 0}})
    assert (left().rows_per_s, left().is_compiled) == (7.0, False)
    write("trial", 9.0, {}, is_trial=True)
    write("nothing-done", 0.0, {})
    write("all-at-once", 20_000.0, {}, working_s=0.001)
    lab.ledger.claim(plan, "killed", {})
    lab.ledger.storage.replace(f"{STATE}/runs/torn/summary.json", b"[1")
    lab.ledger.claim(plan, "torn", {})
    assert left().rows_per_s == 7.0
