"""Figures and limits of the gate, from counts alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.core.errors import GateError
from batchgen.job.model import GateConfig
from batchgen.pipeline.publish import exceeded_text, judge_gate, total_variation

TALLY = {
    "verdict": {"ok": 940, "truncated": 40, "error": 20},
    "attempts": {"0": 20, "1": 900, "2": 70, "10": 10},
}


def judged(gate: dict, counts=(940, 60), tally=TALLY, last=None):
    return {limit.name: limit for limit in judge_gate(GateConfig(**gate), counts, tally, last)}


def test_every_figure_is_there_without_any_limit():
    limits = judged({})
    assert {name: limit.figure for name, limit in limits.items()} == {
        "max_error_rate": 0.06,
        "max_truncated_rate": 0.04,
        "max_retry_rate": 0.08,
    }
    assert [limit.limit for limit in limits.values()] == [0.1, None, None]
    assert not any(limit.is_exceeded for limit in limits.values())


@pytest.mark.parametrize(
    ("name", "figure", "text"),
    [
        ("max_error_rate", 0.06, "60 of 1,000 rows are errors"),
        ("max_truncated_rate", 0.04, "40 of 1,000 rows are cut off at max_tokens"),
        ("max_retry_rate", 0.08, "80 of 1,000 rows needed more than one attempt"),
    ],
)
def test_a_limit_is_exceeded_above_it_and_not_at_it(name, figure, text):
    at = judged({name: figure})[name]
    above = judged({name: figure - 0.001})[name]
    assert (at.is_exceeded, above.is_exceeded) == (False, True)
    assert exceeded_text([at]) == ""
    assert exceeded_text([above]) == f"{text}, over gate.{name} = {figure - 0.001:g}"


def test_a_job_without_results_exceeds_nothing():
    limits = judged({"max_error_rate": 0, "max_truncated_rate": 0}, (0, 0), {}, {})
    assert not any(limit.is_exceeded for limit in limits.values())


def test_exceeded_limits_are_told_together():
    limits = judge_gate(GateConfig(max_error_rate=0, max_retry_rate=0), (940, 60), TALLY, None)
    assert exceeded_text(limits) == (
        "60 of 1,000 rows are errors, over gate.max_error_rate = 0; "
        "80 of 1,000 rows needed more than one attempt, over gate.max_retry_rate = 0"
    )


def labels(**counts):
    return {**TALLY, "gen_label": counts}


def drift(gate, now, last):
    return judged({"max_drift": 0.1, **gate}, tally=now, last=last)["max_drift"]


def test_drift_is_the_total_variation_and_names_the_labels_that_moved_most():
    last = labels(refund=12, invoice=50, other=20, praise=18)
    limit = drift({}, labels(refund=63, invoice=100, other=1, praise=36), last)
    assert limit.figure == pytest.approx(0.195)
    assert limit.is_exceeded
    assert limit.text == (
        "gen_label has drifted by 0.195 from the last snapshot "
        "(other 20.0 % -> 0.5 %, refund 12.0 % -> 31.5 %)"
    )


def test_alike_labels_have_not_drifted_and_new_ones_count():
    assert drift({}, labels(a=1, b=3), labels(a=10, b=30)).figure == 0
    assert drift({}, labels(c=4), labels(a=10, b=30)).figure == 1


@pytest.mark.parametrize("last", [None, {}, TALLY, labels()])
def test_without_labels_to_compare_with_drift_is_unknown_and_holds_nothing_back(last):
    limit = drift({"max_drift": 0}, labels(a=1), last)
    assert (limit.figure, limit.is_exceeded) == (None, False)
    assert limit.as_dict()["figure"] is None
    assert limit.text == "gen_label has no labels, or had none in the last snapshot, to compare"


def test_each_label_column_has_its_drift_unless_one_is_chosen():
    now = {**labels(a=1), "gen_output.tone": {"kind": 4}}
    last = {**labels(b=1), "gen_output.tone": {"kind": 9}}
    limits = judge_gate(GateConfig(), (5, 0), now, last)[3:]
    assert [(limit.column, limit.figure) for limit in limits] == [
        ("gen_label", 1.0),
        ("gen_output.tone", 0.0),
    ]
    only = judge_gate(GateConfig(drift_column="gen_output.tone"), (5, 0), now, last)[3:]
    assert [limit.column for limit in only] == ["gen_output.tone"]


def test_a_column_of_labels_that_is_not_there_is_told_and_not_passed_over():
    (limit,) = judge_gate(GateConfig(drift_column="gen_x", max_drift=0.1), (5, 0), TALLY, TALLY)[3:]
    assert (limit.column, limit.figure) == ("gen_x", None)


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 50)),
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 50)),
)
def test_total_variation_is_a_distance(p, q):
    found = total_variation(p, q)
    assert found == total_variation(q, p)  # To the last bit: limits must not flicker.
    if not sum(p.values()) or not sum(q.values()):
        assert found is None
    else:
        assert -1e-9 <= found <= 1 + 1e-9
        assert total_variation(p, p) == 0


def test_a_limit_as_plain_values():
    limit = judged({"max_error_rate": 0.05})["max_error_rate"]
    plain = {
        "name": "max_error_rate",
        "figure": 0.06,
        "limit": 0.05,
        "text": "60 of 1,000 rows are errors",
        "exceeded": True,
    }
    assert limit.as_dict() == plain
    assert limit.as_dict(is_overridden=True) == {**plain, "overridden": True}
    passed = judged({})["max_error_rate"]
    assert passed.as_dict(is_overridden=True) == {**plain, "limit": 0.1, "exceeded": False}


def test_the_error_shows_what_to_do():
    error = GateError("6 of 9 rows are errors, over gate.max_error_rate = 0.1", [{"name": "x"}])
    assert str(error).splitlines() == [
        "6 of 9 rows are errors, over gate.max_error_rate = 0.1; nothing published",
        "`batchgen show JOB --errors` shows error rows, `batchgen run JOB --retry-errors` tries "
        "them again; to publish all the same, run again with --publish-anyway or with a higher "
        "limit",
    ]
    assert (error.exit_code, error.gate) == (3, ({"name": "x"},))


@pytest.mark.parametrize(
    ("num_last", "figure", "is_exceeded"),
    [(1000, 0.0, False), (900, 0.0, False), (1250, 0.2, False), (1252, 252 / 1252, True)],
)
def test_rows_that_are_gone_since_the_last_snapshot_count(num_last, figure, is_exceeded):
    *others, shrink = judge_gate(GateConfig(max_shrink=0.2), (940, 60), TALLY, TALLY, num_last)
    assert (shrink.name, shrink.figure, shrink.is_exceeded) == ("max_shrink", figure, is_exceeded)
    assert not any(limit.is_exceeded for limit in others)
    num_gone = max(num_last - 1000, 0)
    text = f"1,000 rows are {num_gone:,} fewer than the {num_last:,} of the last snapshot"
    assert shrink.text == text
    assert exceeded_text([shrink]) == (f"{text}, over gate.max_shrink = 0.2" if is_exceeded else "")


def test_a_first_or_an_empty_snapshot_has_nothing_to_shrink_from():
    first = judged({"max_shrink": 0.0})["max_shrink"]
    assert (first.figure, first.is_exceeded) == (None, False)
    (empty,) = judge_gate(GateConfig(max_shrink=0.0), (0, 0), {}, None, 0)[3:]
    assert (empty.figure, empty.is_exceeded) == (0.0, False)


def test_an_input_that_is_gone_altogether_has_shrunk_by_all_of_it():
    (limit,) = judge_gate(GateConfig(max_shrink=0.99), (0, 0), {}, None, 5)[3:]
    assert (limit.figure, limit.is_exceeded) == (1.0, True)


def test_without_a_limit_the_shrinking_is_still_told():
    assert judge_gate(GateConfig(), (8, 0), {}, {}, 10)[-1].figure == 0.2


PUBLISH = "to publish all the same, run again with --publish-anyway or with a higher limit"


def last_line(limits):
    return str(
        GateError(exceeded_text(limits), [limit.as_dict() for limit in limits])
    ).splitlines()[-1]


def test_without_error_rows_none_are_named():
    limits = judge_gate(GateConfig(max_drift=0.1), (4, 0), labels(a=1), labels(b=1))
    assert last_line(limits) == PUBLISH


def test_error_rows_that_no_engine_has_seen_are_to_be_mended_and_not_tried_again():
    tally = {"verdict": {"error": 20, "ok": 20}, "attempts": {"0": 20, "1": 20}}
    mend = (
        "no error row has reached the engine: mend the input (`batchgen show JOB --errors` shows "
        "them) and run again"
    )
    limits = judge_gate(GateConfig(), (20, 20), tally, None)
    assert last_line(limits) == f"{mend}; {PUBLISH}"
    one_more = judge_gate(GateConfig(), (20, 21), tally, None)
    assert "--retry-errors" in last_line(one_more)
    passed = judge_gate(GateConfig(max_error_rate=0.5), (20, 20), tally, None)[0].as_dict()
    assert "hint" not in passed


def test_a_night_without_any_row_does_not_replace_one_with_rows_unasked():
    limits = judge_gate(GateConfig(), (0, 0), {}, {}, 5)
    assert exceeded_text(limits) == (
        "0 rows are 5 fewer than the 5 of the last snapshot, over gate.max_shrink = 0.999"
    )
    assert last_line(limits) == (
        "where no row at all is left, gate.max_shrink is 0.999 unless it is set: look at "
        f"input.path, input.where and input.limit; {PUBLISH}"
    )
    for gate, counts, num_last in [
        ({"max_shrink": 1.0}, (0, 0), 5),
        ({}, (1, 0), 5000),
        ({}, (0, 1), 5000),
        ({}, (0, 0), 0),
        ({}, (0, 0), None),
    ]:
        assert (
            exceeded_text(
                judge_gate(GateConfig(max_error_rate=1, **gate), counts, {}, {}, num_last)
            )
            == ""
        )
