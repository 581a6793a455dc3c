"""Completions to results: columns, votes, rules, and the ladder of attempts."""

from __future__ import annotations

import itertools
import math

import pyarrow as pa
import pytest

from batchgen.answers.output_format import answer_columns, make_format
from batchgen.answers.validate import Retries, check_retries, check_rules, final, rule_schema
from batchgen.core.errors import ConfigError
from batchgen.core.records import Completion, RowError, Sample, TokenLogprobs, Verdict
from batchgen.job.recipe import Seeds, row_seed
from tests.fakes import batch, completion, job, judge_of, request_builder

CHOICE = {"output": {"choice": ["yes", "no"]}}
OBJECT = {
    "type": "object",
    "properties": {"label": {"enum": ["a", "b"]}, "n": {"type": "integer"}},
    "required": ["label"],
    "additionalProperties": False,
}


def asked(*samples, made=None, error=None):
    (request,) = request_builder(made).of(batch([0]))
    given = [s if isinstance(s, Sample) else Sample(s, "stop") for s in samples]
    return request, Completion(request.request_id, given, 3, 0, 2, 0.1, error)


def judged(*samples, error=None, **tables):
    made = job(**tables)
    (result,) = judge_of(made).judge([asked(*samples, made=made, error=error)])
    form = make_format(made.output)
    names = [field.name for field in answer_columns(made, form).fields]
    return result, None if result.values is None else dict(zip(names, result.values, strict=True))


def test_free_text_is_one_column():
    result, values = judged("hello")
    assert (result.verdict, result.error, result.attempts) == (Verdict.OK, None, 1)
    assert values == {"text": "hello"}


def test_a_request_without_an_answer_is_an_error_without_values():
    result, values = judged(error=RowError("engine_crash", "dead"))
    assert (result.verdict, result.error.error_type, values) == ("error", "engine_crash", None)


def test_a_refused_answer_keeps_its_text():
    result, values = judged("maybe", **CHOICE)
    assert (result.verdict, result.error.error_type) == ("schema_violation",) * 2
    assert values == {"label": None, "text": "maybe"}


@pytest.mark.parametrize(
    ("tables", "verdict", "is_ok"),
    [
        ({}, "truncated", False),
        ({"checks": {"allow_truncated": True}}, "truncated", True),
        ({"checks": {"allow_truncated": True}, "output": {"regex": "h.*"}}, "truncated", False),
    ],
)
def test_cut_text_counts_only_where_it_is_allowed(tables, verdict, is_ok):
    result, values = judged(Sample("hel", "length"), **tables)
    assert (result.verdict, result.error is None) == (verdict, is_ok)
    assert values["text"] == "hel"


def test_samples_vote_and_the_first_of_equals_wins():
    many = {"sampling": {"n": 4, "temperature": 1.0}, **CHOICE}
    _, values = judged("no", "yes", "yes", "yes", **many)
    assert (values["label"], values["agreement"]) == ("yes", 0.75)
    assert values["text"] == ["no", "yes", "yes", "yes"]
    _, values = judged("no", "yes", "no", "yes", **many)
    assert (values["label"], values["agreement"]) == ("no", 0.5)


def test_bad_samples_do_not_vote_but_count_in_the_share():
    many = {"sampling": {"n": 4, "temperature": 1.0}, **CHOICE}
    result, values = judged("?", "?", "?", "yes", **many)
    assert (result.verdict, values["label"], values["agreement"]) == ("ok", "yes", 0.25)
    result, values = judged("?", "?", "?", "?", **many)
    assert (result.verdict, values["label"], values["agreement"]) == (
        "schema_violation",
        None,
        None,
    )


FOUR = {"sampling": {"n": 4, "temperature": 1.0, "logprobs": 0}}


def test_of_each_sample_it_is_told_what_became_of_it():
    logprobs = [TokenLogprobs("a", -0.25, []), TokenLogprobs(None, -0.5, [])]
    cut = Sample("hell", "length", num_tokens=4)
    result, values = judged(Sample("a", "stop", logprobs, num_tokens=2), cut, cut, cut, **FOUR)
    assert (result.verdict, result.error) == ("ok", None)
    good, *bad = values["samples"]
    assert good == {
        "verdict": "ok",
        "finish_reason": "stop",
        "num_output_tokens": 2,
        "cumulative_logprob": -0.75,
        "error": None,
    }
    assert [one["verdict"] for one in bad] == ["truncated"] * 3
    assert bad[0]["error"].startswith("cut off at max_tokens")
    _, values = judged("a", "b", output={"samples": False}, sampling={"n": 2})
    assert values.keys() == {"text"}


@pytest.mark.parametrize(("min_ok", "is_ok"), [(1, True), (2, True), (3, False), (4, False)])
def test_a_row_is_ok_if_enough_of_its_samples_are(min_ok, is_ok):
    tables = {**FOUR, "checks": {"min_ok_samples": min_ok, "rules": ["gen_text <> 'bad'"]}}
    result, values = judged("a", "bad", "c", Sample("d", "length"), **tables)
    assert (result.error is None) == is_ok
    assert [one["verdict"] for one in values["samples"]] == ["ok", "refused", "ok", "truncated"]
    if not is_ok:
        text = f"2 of 4 samples are ok, expected {min_ok}; sample 1: rules[0] = \"gen_text <> 'bad'"
        assert (result.verdict, result.error.error[: len(text)]) == ("refused", text)


def test_a_rule_reads_a_sample_as_if_it_were_alone_and_what_it_refuses_has_no_vote():
    many = {"sampling": {"n": 4}, "output": {"choice": ["yes", "no"]}}
    samples = [Sample(text, "stop", num_tokens=at) for at, text in enumerate(["no", "no", "yes"])]
    for rule, label, agreement in (
        ("gen_label = 'yes'", "yes", 1 / 3),
        ("gen_num_output_tokens > 0 AND len(id) > 0", "no", 1 / 3),
        ("gen_finish_reason = 'length'", "no", 2 / 3),
    ):
        _, values = judged(*samples, checks={"rules": [rule]}, **many)
        assert values["label"] == label
        assert values["agreement"] == pytest.approx(agreement)


def test_a_schema_gives_a_struct_or_a_column_for_each_field():
    good = '{"label":"b","n":4}'
    _, values = judged(good, output={"schema": OBJECT})
    assert values == {"output": {"label": "b", "n": 4}, "text": good}
    _, values = judged(good, output={"schema": OBJECT, "flatten": True})
    assert values == {"label": "b", "n": 4, "text": good}
    _, values = judged("{}", output={"schema": OBJECT, "flatten": True})
    assert values == {"label": None, "n": None, "text": "{}"}
    _, values = judged(good, "{}", output={"schema": OBJECT}, sampling={"n": 2, "temperature": 1.0})
    assert values["output"] == [{"label": "b", "n": 4}, None]


def test_flatten_needs_an_object():
    for tables in (
        {"output": {"schema": {"type": "integer"}, "flatten": True}},
        {"output": {"schema": OBJECT, "flatten": True}, "sampling": {"n": 2}},
    ):
        made = job(**tables)
        with pytest.raises(ConfigError, match="flatten: expected a schema of an object"):
            answer_columns(made, make_format(made.output))


def test_label_columns_are_known_to_the_gate():
    def labels(**tables):
        made = job(**tables)
        return list(answer_columns(made, make_format(made.output)).labels)

    assert labels() == []
    assert labels(**CHOICE) == ["label"]
    assert labels(output={"schema": OBJECT}) == ["output.label"]
    assert labels(output={"schema": OBJECT, "flatten": True}) == ["label"]
    assert labels(output={"schema": {"enum": ["x", "y"]}}) == ["output"]


def step(token, **top):
    chances = sorted(top.items(), key=lambda item: -item[1])
    return TokenLogprobs(
        token,
        math.log(top[token or "END"]),
        [(None if name == "END" else name, math.log(p)) for name, p in chances],
    )


def test_a_choice_with_logprobs_has_a_probability_for_each_label():
    tokens = [step("yes", yes=0.8, no=0.2), step(None, END=1.0)]
    tables = {"sampling": {"logprobs": 5}, **CHOICE}
    _, values = judged(Sample("yes", "stop", tokens), **tables)
    assert values["probabilities"] == pytest.approx({"yes": 0.8, "no": 0.2})
    _, values = judged(Sample("?", "stop", tokens), **tables)
    assert values["probabilities"] is None


def test_reasoning_before_a_choice_does_not_count():
    thought = [step("hm", hm=1.0), step(None, END=1.0)]
    tokens = [*thought, step("no", yes=0.3, no=0.7), step(None, END=1.0)]
    tables = {"sampling": {"logprobs": 5}, "model": {"reasoning_parser": "qwen3"}, **CHOICE}
    _, values = judged(Sample("no", "stop", tokens, "hm"), **tables)
    assert values["probabilities"] == pytest.approx({"yes": 0.3, "no": 0.7})


def test_an_enum_of_a_schema_has_a_probability_for_each_label():
    tokens = [step('{"label":"', **{'{"label":"': 1.0}), step("b", a=0.4, b=0.6)]
    tokens += [step('"}', **{'"}': 0.7, '","n":1}': 0.3}), step(None, END=1.0)]
    tables = {"sampling": {"logprobs": 5}, "output": {"schema": OBJECT}}
    _, values = judged(Sample('{"label":"b"}', "stop", tokens), **tables)
    assert values["probabilities"] == {"label": pytest.approx({"a": 0.4, "b": 0.6})}


def test_the_probability_of_the_label_that_was_given_is_a_column_by_option():
    labels = [step("no", yes=0.3, no=0.7), step(None, END=1.0)]
    whole = [step('"', **{'"': 1.0}), step("b", a=0.4, b=0.6), step('"', **{'"': 1.0})]
    field = [step('{"label":"', **{'{"label":"': 1.0}), step("b", a=0.4, b=0.6)]
    field += [step('"}', **{'"}': 1.0}), step(None, END=1.0)]
    for text, tokens, form, name, probability in (
        ("no", labels, CHOICE["output"], "label_probability", 0.7),
        ("maybe", labels, CHOICE["output"], "label_probability", None),
        ("no", None, CHOICE["output"], "label_probability", None),
        ('"b"', whole, {"schema": {"enum": ["a", "b"]}}, "output_probability", 0.6),
        ('{"label":"b"}', field, {"schema": OBJECT}, "label_probability", 0.6),
        ('{"label":"b"}', field, {"schema": OBJECT, "flatten": True}, "label_probability", 0.6),
        ("{}", field, {"schema": OBJECT}, "label_probability", None),
    ):
        tables = {"sampling": {"logprobs": 5}, "output": {**form, "label_probability": True}}
        _, values = judged(Sample(text, "stop", tokens), **tables)
        assert values[name] == (probability and pytest.approx(probability))
    for tables in (
        {"sampling": {"logprobs": 5}},
        CHOICE,
        {"sampling": {"logprobs": 5, "n": 2}, **CHOICE},
    ):
        made = job(**{**tables, "output": {**tables.get("output", {}), "label_probability": True}})
        with pytest.raises(ConfigError, match="label_probability: expected a choice or enums"):
            answer_columns(made, make_format(made.output))


def test_an_answer_that_is_an_enum_as_a_whole_has_a_probability_for_each_label():
    tokens = [step('"', **{'"': 1.0}), step("b", a=0.4, b=0.6), step('"', **{'"': 1.0})]
    tables = {"sampling": {"logprobs": 5}, "output": {"schema": {"enum": ["a", "b"]}}}
    _, values = judged(Sample('"b"', "stop", [*tokens, step(None, END=1.0)]), **tables)
    assert values["probabilities"] == pytest.approx({"a": 0.4, "b": 0.6})
    assert values["output"] == "b"


def test_free_text_with_logprobs_has_them_all():
    tokens = [step("hi", hi=0.5, yo=0.5), step(None, END=1.0)]
    _, values = judged(Sample("hi", "stop", tokens), sampling={"logprobs": 2})
    assert [at["token"] for at in values["logprobs"]] == ["hi", None]
    assert [top["token"] for top in values["logprobs"][0]["top"]] == ["hi", "yo"]


def test_reasoning_and_tool_calls_have_columns():
    model = {"reasoning_parser": "qwen3", "tool_call_parser": "hermes"}
    sample = Sample("answer", "stop", None, "because", [("get", "{}")])
    _, values = judged(sample, model=model)
    assert values == {
        "text": "answer",
        "reasoning": "because",
        "tool_calls": [{"name": "get", "arguments": "{}"}],
    }


def rule_result(rule, text="abc", **tables):
    return judged(text, checks={"rules": [rule]}, **tables)[0]


@pytest.mark.parametrize(
    ("rule", "is_ok"),
    [
        ("len(gen_text) < 4", True),
        ("len(gen_text) < 3", False),
        ("gen_text in ('abc', 'x')", True),
        ("id = '0/0'", True),
        ("id <> '0/0'", False),
        ("gen_finish_reason = 'stop' and gen_num_output_tokens = 2", True),
        ("cast(gen_text as int) > 0", False),
    ],
)
def test_rules_read_carried_and_added_columns(rule, is_ok):
    result = rule_result(rule)
    assert (result.error is None) == is_ok
    if not is_ok:
        assert (result.verdict, result.error.error_type) == ("refused", "refused")
        assert "rules[0]" in result.error.error


TEXTS = ["0/0", "x", "0/2"]


def test_rules_judge_each_row_by_itself():
    made = job(checks={"rules": ["gen_text = id", "len(id) > 0"]})
    requests = list(request_builder(made).of(batch([0, 1, 2])))
    pairs = [(r, completion(r.request_id, text=t)) for r, t in zip(requests, TEXTS, strict=True)]
    results = judge_of(made).judge(pairs)
    assert [result.verdict for result in results] == ["ok", "refused", "ok"]
    assert "rules[0] = 'gen_text = id' is not true" in results[1].error.error


def test_rules_see_fields_of_the_schema():
    output = {"schema": OBJECT}
    assert rule_result("gen_output.n > 3", '{"label":"a","n":4}', output=output).error is None
    assert rule_result("gen_output.n > 4", '{"label":"a","n":4}', output=output).error
    # Null is not true.
    assert rule_result("gen_output.n > 4", '{"label":"a"}', output=output).error


def test_wrong_rules_are_refused_all_at_once():
    made = job()
    columns = answer_columns(made, make_format(made.output))
    schema = rule_schema(pa.schema([("id", pa.string())]), columns, "gen_")
    with pytest.raises(ConfigError) as caught:
        check_rules(["gen_txt = 'a'", "len(gen_text)", "id = 'a'", "max(gen_text) = 'a'"], schema)
    assert len(caught.value.problems) == 3
    assert "rules[0]" in caught.value.problems[0]
    assert "did you mean 'gen_text'" in caught.value.problems[0]


def failing(made, verdict=Verdict.TRUNCATED, text="abc"):
    (request,) = request_builder(made).of(batch([0]))
    answer = completion(0, text=text)
    error = RowError(verdict.value, "too short")
    (result,) = judge_of(job()).judge([(request, answer)])
    return request, result._replace(error=error, verdict=verdict)


def ladder_of(made):
    return Retries(made.retry, Seeds(made.sampling), itertools.count(100))


def test_each_rung_changes_the_job_and_not_the_rung_before():
    made = job(retry=[{"max_tokens": 64}, {"temperature": 0.5}])
    request, result = failing(made)
    second = ladder_of(made).next(request, result)
    assert (second.request_id, second.attempt, second.params) == (100, 2, {"max_tokens": 64})
    assert (second.ordinal, second.request_key) == (request.ordinal, request.request_key)
    assert (second.seed, second.prompt) == (None, request.prompt)
    third = ladder_of(made).next(second, result)
    assert (third.attempt, third.params) == (3, {"temperature": 0.5})
    assert third.seed == row_seed(0, request.ordinal, 3)
    assert ladder_of(made).next(third, result) is None


def test_a_row_keeps_its_own_parameters_unless_the_rung_has_others():
    made = job(sampling={"column": "own"}, retry=[{"max_tokens": 9}])
    request, result = failing(job())
    own = request._replace(params={"top_p": 0.5, "max_tokens": 3})
    assert ladder_of(made).next(own, result).params == {"top_p": 0.5, "max_tokens": 9}


def test_rungs_are_for_the_verdicts_that_they_name():
    made = job(
        retry=[{"max_tokens": 64, "on": ["truncated"]}, {"temperature": 1.0, "on": ["refused"]}]
    )
    request, cut = failing(made)
    _, refused = failing(made, Verdict.REFUSED)
    assert ladder_of(made).next(request, cut).params == {"max_tokens": 64}
    again = ladder_of(made).next(request, refused)
    assert (again.params, again.attempt, again.retry.rung) == ({"temperature": 1.0}, 2, 1)
    assert ladder_of(made).next(again, cut) is None


def test_errors_of_the_engine_are_not_retried_and_good_answers_stand():
    made = job(retry=[{"temperature": 1.0}])
    request, result = failing(made, Verdict.ERROR)
    assert ladder_of(made).next(request, result) is None
    (good,) = judge_of(made).judge([asked("fine", made=made)])
    assert ladder_of(made).next(request, good) is None


def test_telling_the_error_adds_the_answer_and_what_is_wrong_with_it():
    made = job(retry=[{"tell_error": True}, {"tell_error": True}])
    request, result = failing(made)
    second = ladder_of(made).next(request, result)
    assert second.prompt[:-2] == request.prompt
    assert second.prompt[-2] == {"role": "assistant", "content": "abc"}
    assert second.prompt[-1]["role"] == "user"
    assert "too short" in second.prompt[-1]["content"]
    third = ladder_of(made).next(second, result)
    assert len(third.prompt) == len(second.prompt)


def test_telling_the_error_of_an_answer_that_was_begun_begins_the_next_alike():
    made = job(retry=[{"tell_error": True}], prompt={"user": "{{ text }}", "prefill": "So "})
    request, result = failing(made)
    asked, answer, told, begun = ladder_of(made).next(request, result).prompt
    assert [asked, begun] == request.prompt
    assert answer == {"role": "assistant", "content": "So abc"}
    assert told["role"] == "user"


def test_a_last_attempt_without_an_answer_leaves_the_failed_one():
    made = job(retry=[{"max_tokens": 64}])
    request, result = failing(made)
    second = ladder_of(made).next(request, result)
    _, dead = failing(made, Verdict.ERROR)
    stands = final(second, dead)
    assert (stands.verdict, stands.attempts, stands.completion.text) == ("truncated", 2, "abc")
    assert final(request, dead) is dead


def test_rungs_that_cannot_help_are_refused():
    made = job(retry=[{}, {"max_tokens": 32}, {"max_tokens": 33}, {"temperature": 0.1}])
    with pytest.raises(ConfigError) as caught:
        check_retries(made.retry, made.sampling, is_chat=True)
    assert [problem[:8] for problem in caught.value.problems] == ["retry[0]", "retry[1]"]
    made = job(retry=[{"tell_error": True}])
    check_retries(made.retry, made.sampling, is_chat=True)
    with pytest.raises(ConfigError, match="tell_error: needs a chat"):
        check_retries(made.retry, made.sampling, is_chat=False)
    warm = job(sampling={"temperature": 0.7}, retry=[{}])
    check_retries(warm.retry, warm.sampling, is_chat=True)  # Another seed is another answer.


def test_a_rule_that_cannot_work_is_refused_before_a_row_is_asked():
    made = job(sampling={"n": 2}, output={"samples": False})
    columns = answer_columns(made, make_format(made.output))
    schema = rule_schema(pa.schema({"id": pa.int64()}), columns, "gen_")
    with pytest.raises(ConfigError) as caught:
        check_rules(["len(gen_text) < 400", "gen_finish_reason = 1", "id > 0"], schema)
    first, second = caught.value.problems
    assert first.startswith("rules[0] = 'len(gen_text) < 400': invalid series dtype")
    assert second.startswith("rules[1] = 'gen_finish_reason = 1': cannot compare string")


def test_only_the_row_on_which_a_rule_fails_gets_the_reason():
    rules = {"checks": {"rules": ["CAST(gen_text AS INT) > 1"]}}
    made = job(**rules)
    texts = ["5", "x", "1", "y"]
    given = [asked(text, made=made, error=None) for text in texts]
    given.insert(1, asked(made=made, error=RowError("engine_crash", "dead")))
    found = [r.error and r.error.error for r in judge_of(made).judge(given)]
    rule = "rules[0] = 'CAST(gen_text AS INT) > 1'"
    assert found[:2] == [None, "dead"]
    assert found[3] == f"{rule} is not true"
    assert all(text.startswith(f"{rule} fails: conversion") for text in (found[2], found[4]))
