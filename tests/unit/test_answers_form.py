"""Which answers are of the job's form, and what is told of those that are not."""

from __future__ import annotations

import json
import time

import pytest

from batchgen.answers.output_format import make_format
from batchgen.core.errors import ConfigError
from batchgen.core.records import Retry, Sample, Verdict
from batchgen.job.model import OutputConfig
from tests.fakes import batch, request_builder

SCHEMA = {
    "type": "object",
    "properties": {
        "label": {"enum": ["billing", "refund"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 10},
    },
    "required": ["label", "score"],
    "additionalProperties": False,
}
GOOD = '{"label": "billing", "score": 3}'
DEEP: dict = {}
for _ in range(120):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
DRAFT_3 = "http://json-schema.org/draft-03/schema#"
DRAFT_7 = "http://json-schema.org/draft-07/schema#"


def request(params=None):
    (made,) = request_builder().of(batch([0]))
    return made._replace(params=params)


def read(text, reason="stop", *, params=None, **output):
    form = make_format(OutputConfig.model_validate({"path": "out", **output}))
    return form.read(Sample(text, reason), request(params))


@pytest.mark.parametrize(
    ("output", "text", "reason", "verdict"),
    [
        ({}, "anything", "stop", "ok"),
        ({}, "", "stop", "ok"),
        ({}, "anyth", "length", "truncated"),
        ({"schema": SCHEMA}, GOOD, "stop", "ok"),
        # All of it is there: only the end token did not fit.
        ({"schema": SCHEMA}, GOOD, "length", "ok"),
        ({"schema": SCHEMA}, GOOD[:-1], "length", "truncated"),
        ({"schema": SCHEMA}, GOOD[:-1], "stop", "invalid_json"),
        ({"schema": SCHEMA}, "Sure! " + GOOD, "stop", "invalid_json"),
        ({"schema": SCHEMA}, '{"label": "other", "score": 3}', "stop", "schema_violation"),
        ({"schema": SCHEMA}, '{"label": "refund", "score": 11}', "stop", "schema_violation"),
        ({"schema": SCHEMA}, '{"label": "refund"}', "stop", "schema_violation"),
        ({"schema": SCHEMA}, '{"label": "refund", "score": NaN}', "stop", "invalid_json"),
        ({"schema": {}}, '["\\ud800"]', "stop", "invalid_json"),
        ({"schema": {}}, "1e999", "stop", "invalid_json"),
        ({"schema": {"type": "integer"}}, "12", "length", "truncated"),
        ({"schema": {"type": "integer"}}, "12", "stop", "ok"),
        # The schema allows it, the column cannot hold it.
        ({"schema": {"type": "integer"}}, str(2**63), "stop", "schema_violation"),
        ({"choice": ["a", "ab", "c"]}, "a", "stop", "ok"),
        ({"choice": ["a", "ab", "c"]}, "a", "length", "truncated"),
        ({"choice": ["a", "ab", "c"]}, "c", "length", "ok"),
        ({"choice": ["a", "ab", "c"]}, "abc", "stop", "schema_violation"),
        ({"choice": ["a", "ab", "c"]}, "b", "length", "truncated"),
        ({"choice": ["a"]}, " a", "stop", "schema_violation"),
        ({"regex": "[0-9]+"}, "12", "stop", "ok"),
        ({"regex": "[0-9]+"}, "12a", "stop", "schema_violation"),
        ({"regex": "[0-9]+"}, "12", "length", "truncated"),
        ({"grammar": 'root ::= "a"'}, "a", "stop", "ok"),
        ({"grammar": 'root ::= "a"'}, "a", "length", "truncated"),
        ({"json_object": True}, "{}", "stop", "ok"),
        ({"json_object": True}, "[]", "stop", "schema_violation"),
        ({"json_object": True}, "{", "stop", "invalid_json"),
    ],
)
def test_each_answer_has_its_verdict(output, text, reason, verdict):
    reading = read(text, reason, **output)
    assert reading.verdict == verdict
    assert (reading.error is None) == (verdict == "ok")
    if reading.error is not None:
        assert reading.error.error_type == verdict
        assert "\n" not in reading.error.error


def test_values_are_typed():
    assert read(GOOD, schema=SCHEMA).value == {"label": "billing", "score": 3}
    assert read("a", choice=["a"]).value == "a"
    assert read("anything").value is None


def test_a_violation_says_where_and_is_short():
    error = read('{"label": "refund", "score": 11}', schema=SCHEMA).error
    assert error.error == "$.score: 11 is greater than the maximum of 10"
    long = read('{"label": "%s", "score": 1}' % ("x" * 5000), schema=SCHEMA).error
    assert len(long.error) <= 300


def test_a_row_may_bring_its_schema_also_on_a_retry():
    params = {"structured_outputs": {"json": SCHEMA}}
    assert read(GOOD, params=params, schema_column="s").verdict is Verdict.OK
    assert read("{}", params=params, schema_column="s").verdict is Verdict.SCHEMA_VIOLATION
    form = make_format(OutputConfig.model_validate({"path": "out", "schema_column": "s"}))
    again = request()._replace(retry=Retry(request(params), None, 0))
    assert form.read(Sample("{}", "stop"), again).verdict is Verdict.SCHEMA_VIOLATION


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
        {"properties": {"label": {"pattern": "(a+)+"}}},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "minProperties": 1},
    ],
)
def test_recursive_schemas_are_applied(schema):
    assert (
        read('{"n": {"n": {}}, "label": "aa"}', schema_column="s", params=_own(schema)).error
        is None
    )


def _own(schema):
    return {"structured_outputs": {"json": schema}}


def test_a_schema_that_never_ends_is_the_rows_error():
    endless = {"$ref": "#"}
    reading = read("{}", schema_column="s", params=_own(endless))
    assert reading.error.error.startswith("the schema cannot be applied: RecursionError")


# Python's `re` doubles its time with each a: this takes it centuries.
ENDLESS = "^(a+)+$"
HARD = "a" * 60 + "!"


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string", "pattern": ENDLESS}, HARD),
        ({"patternProperties": {ENDLESS: False}, "additionalProperties": False}, {HARD: 1}),
        ({"propertyNames": {"pattern": ENDLESS}}, {HARD: 1}),
        # Ways around: each is a schema to jsonschema, which would take its stock validator.
        ({"$schema": DRAFT_7, "items": {"$ref": "#"}, "pattern": ENDLESS}, [HARD]),
        ({"items": {"$schema": DRAFT_7, "pattern": ENDLESS}}, [HARD]),
        ({"x": {"y": {"$schema": DRAFT_7, "pattern": ENDLESS}}, "$ref": "#/x/y"}, HARD),
        (
            {"$defs": {"a": {"$anchor": "n", "pattern": ENDLESS}}, "propertyNames": {"$ref": "#n"}},
            {HARD: 1},
        ),
    ],
)
@pytest.mark.timeout(20)
def test_no_pattern_holds_the_job(schema, value):
    text = json.dumps(value)
    own = read(text, schema_column="s", params=_own(schema))
    assert own.verdict is Verdict.SCHEMA_VIOLATION
    assert "cannot be applied" not in own.error.error
    assert read(text, schema=schema).verdict is Verdict.SCHEMA_VIOLATION


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"pattern": "b"}, ["abc", 3], ["xyz"]),  # Is searched for.
        ({"pattern": "^b$"}, ["b"], ["b\n", "ab"]),
        ({"pattern": r"^\p{L}+$"}, ["\u00e9t\u00e9"], ["1"]),
        (
            {"patternProperties": {"^x": {"type": "integer"}}},
            [{"x1": 1, "y": "a"}, []],
            [{"x1": "a"}, {"x1": 1, "x2": None}],
        ),
        (
            {"properties": {"a": {}}, "patternProperties": {"^x": {}, "z$": {}},
             "additionalProperties": False},
            [{"a": 1, "x1": 1, "yz": 2}, {}],
            [{"a": 1, "b": 2}, {"ax": 1}],
        ),
        (
            {"patternProperties": {"^x": {}}, "additionalProperties": {"type": "integer"}},
            [{"x": "a", "b": 1}],
            [{"x": "a", "b": "c"}],
        ),
    ],
)  # fmt: skip
def test_patterns_mean_what_json_schema_says(schema, good, bad):
    for verdict, values in (("ok", good), ("schema_violation", bad)):
        for value in values:
            text = json.dumps(value)
            assert read(text, schema_column="s", params=_own(schema)).verdict == verdict, value


def test_the_jobs_own_schema_may_look_around():
    schema = {"type": "string", "pattern": r"^(?!no)(.)\1"}
    assert read('"aab"', schema=schema).verdict is Verdict.OK
    assert read('"nob"', schema=schema).verdict is Verdict.SCHEMA_VIOLATION
    unevaluated = {"patternProperties": {"^a": {}}, "unevaluatedProperties": False}
    assert read('{"a": 1}', schema=unevaluated).verdict is Verdict.OK
    assert read('{"b": 1}', schema=unevaluated).verdict is Verdict.SCHEMA_VIOLATION


@pytest.mark.parametrize(
    ("divisor", "good", "bad"),
    [
        (0.01, [4.02, 0.29, 19.99, 0.07, 1e308, 1e22, 10**400, 0, -1.1], [4.025, 0.0100000000001]),
        (0.1, [0.3, 1.1, 10**30], [0.35]),
        (1e-308, [1e308], []),
        (0.3, [0.9, 3 * 10**30], [10**30, 1]),
        (3, [3 * 10**30, 6.0], [10**30, 3 * 10**30 + 1, 4.5]),
    ],
)
def test_multiples_are_those_of_the_numbers_as_they_are_written(divisor, good, bad):
    for schema in (
        {"multipleOf": divisor},
        {"$schema": DRAFT_3, "divisibleBy": divisor},
        {"$schema": DRAFT_7, "multipleOf": divisor},
    ):
        for verdict, values in (("ok", good), ("schema_violation", bad)):
            for value in values:
                text = json.dumps(value)
                assert read(text, schema_column="s", params=_own(schema)).verdict == verdict, value
    error = read("4.025", schema={"type": "number", "multipleOf": 0.01}).error
    assert error.error == "$: 4.025 is not a multiple of 0.01"


def test_a_reference_by_name_is_followed():
    schema = {"$ref": "#number", "$defs": {"n": {"$anchor": "number", "type": "integer"}}}
    assert read("3", schema=schema).value == 3
    assert read('"a"', schema=schema).verdict is Verdict.SCHEMA_VIOLATION


def test_what_only_looks_like_a_reference_is_none():
    schema = {
        "properties": {"$ref": {"type": "string"}, "$schema": {"const": {"$ref": "x.json"}}},
        "default": {"$ref": "x.json"},
    }
    good = '{"$ref": "a", "$schema": {"$ref": "x.json"}}'
    assert read(good, schema=schema).verdict is Verdict.OK
    assert read('{"$ref": 1}', schema=schema).verdict is Verdict.SCHEMA_VIOLATION


@pytest.mark.parametrize("value", [2**63, 2**64, -(2**80), 10**400, [{"a": 2**70}]])
def test_integers_of_any_length_are_exact(value):
    reading = read(json.dumps(value), schema={})
    assert reading.verdict is Verdict.OK
    assert reading.value == json.dumps(value, separators=(",", ":"))
    other = {"const": 2**80 + 1}
    assert read(str(2**80), schema=other).verdict is Verdict.SCHEMA_VIOLATION
    assert read(str(2**80 + 1), schema_column="s", params=_own(other)).verdict is Verdict.OK


@pytest.mark.parametrize(
    "text",
    [
        f"[{10**400}, NaN]",
        f"[{10**400}, Infinity]",
        f"[{10**400}, 1e999]",
        f'[{10**400}, "\\ud800"]',
        f"[{2**80}",
        "1" * 5000,
        "[" * 1020 + str(2**80) + "]" * 1020,
    ],
)
def test_long_integers_excuse_nothing_else(text):
    assert read(text, schema={}).verdict is Verdict.INVALID_JSON


def test_many_labels_cost_little():
    start = time.perf_counter()
    form = make_format(
        OutputConfig.model_validate({"path": "out", "choice": [f"l{n}" for n in range(20_000)]})
    )
    assert time.perf_counter() - start < 5
    for label, verdict in (("l1999", "truncated"), ("l2000", "ok"), ("l19999", "ok")):
        assert form.read(Sample(label, "length"), None).verdict == verdict


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ({"schema": {"type": "nothing"}}, "schema: $.type: 'nothing' is not valid"),
        ({"schema": {"$ref": "https://example.org/x.json"}}, "is another document"),
        ({"schema": {"$ref": "#/$defs/none"}}, "$defs/none"),
        ({"schema": {"items": {"$ref": 3}}}, "$.items['$ref']: 3 is not of type 'string'"),
        ({"schema": {"anyOf": {"type": "string"}}}, "is not of type 'array'"),
        ({"schema": {"properties": {"a": 3}}}, "$.properties.a: 3 is not of type 'object'"),
        ({"schema": {"$schema": 5}}, "schema: $.$schema: expected the name of a draft, found 5"),
        ({"schema": {"$schema": []}}, "schema: $.$schema: expected the name of a draft"),
        ({"schema": DEEP}, "more than 64 objects and arrays inside each other"),
        ({"schema": {"not": {"$ref": "#/$defs/x"}}}, "$.not: $ref '#/$defs/x' leads nowhere"),
        ({"schema": {"if": {"$ref": "#name"}}}, "$.if: $ref '#name' leads nowhere"),
        ({"schema": {"contains": {"$ref": "#/type"}, "type": "array"}}, "expected a schema"),
        ({"schema": {"propertyNames": {"$ref": "#/x"}, "x": {"type": 1}}}, "$/x.type: 1 is not"),
        ({"schema": {"$defs": {"a": {"$dynamicRef": "x.json"}}}}, "'x.json' is another document"),
        ({"schema": {"properties": {"a": {"pattern": "("}}}}, "$.properties.a: pattern '('"),
        (
            {"schema": {"patternProperties": {r"\p{L}": {}}, "unevaluatedProperties": False}},
            "has to be Python's, too",
        ),
        ({"regex": "("}, "regex: '(': missing )"),
        ({"choice": ["a", "a"]}, "choice: expected different labels"),
        ({"choice": [""]}, "choice: expected different labels"),
    ],
)
def test_wrong_forms_are_refused(output, problem):
    with pytest.raises(ConfigError) as caught:
        make_format(OutputConfig.model_validate({"path": "out", **output}))
    assert problem in str(caught.value)


def test_what_vllm_is_asked_for():
    def asked(**output):
        return make_format(OutputConfig.model_validate({"path": "o", **output})).structured_outputs

    assert asked() is None
    assert asked(schema_column="s") is None
    assert asked(schema=SCHEMA) == {"json": SCHEMA}
    assert asked(choice=["a", "b"]) == {"choice": ["a", "b"]}
    assert asked(regex="a+") == {"regex": "a+"}
    assert asked(grammar="g") == {"grammar": "g"}
    assert asked(json_object=True) == {"json_object": True}


def doubling(num_steps):
    """Each definition refers to the next one twice."""
    steps = {
        f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}, {"$ref": f"#/$defs/a{n + 1}"}]}
        for n in range(num_steps)
    }
    return {"$defs": {**steps, f"a{num_steps}": {}}, "$ref": "#/$defs/a0"}


def nested(num_levels):
    """Alternatives in alternatives, each gone through again for what was evaluated."""
    schema = {}
    for _ in range(num_levels):
        schema = {"anyOf": [schema, schema], "unevaluatedProperties": False}
    return schema


@pytest.mark.timeout(60)
@pytest.mark.parametrize("schema", [doubling(30), nested(12)])
def test_a_rows_schema_that_doubles_the_work_is_the_rows_error(schema):
    reading = read('{"x": 1}', schema_column="s", params=_own(schema))
    assert "TooMuchWorkError: more than 100000 keywords" in reading.error.error
    assert read("{}", schema_column="s", params=_own(doubling(5))).error is None
