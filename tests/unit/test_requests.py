"""What a row asks for itself: sampling, schema, adapter; each part of its key."""

from __future__ import annotations

import json
import socket

import pyarrow as pa
import pytest

from batchgen.core.records import Ranges, Request, RowBatch
from batchgen.pipeline.prepare import engine_spec
from batchgen.prompt.requests import wrong_option_columns
from tests.fakes import job, request_builder

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
LORA = {"lora": {"formal": "f", "casual": "c"}, "lora_column": "adapter"}


def outcome(row, **tables):
    carried = pa.record_batch({"id": ["0"]})
    rows = RowBatch(0, [0], [{"text": "hi", **row}], carried, {}, Ranges())
    (made,) = request_builder(job(**tables)).of(rows)
    return made


def params(row, **tables):
    made = outcome(row, **tables)
    assert isinstance(made, Request), made.error
    return made.params


@pytest.mark.parametrize(
    "own", [{"max_tokens": 5}, '{"max_tokens": 5}', {"max_tokens": 5, "top_p": None}]
)
def test_a_column_may_give_sampling_parameters(own):
    assert params({"own": own}, sampling={"column": "own"}) == {"max_tokens": 5}


def test_columns_of_a_rows_own_may_be_inside_others():
    own = {"body": {"own": {"max_tokens": 5}, "schema": SCHEMA, "who": "formal"}}
    made = outcome(
        own,
        sampling={"column": "body.own"},
        output={"schema_column": "body.schema"},
        model={**LORA, "lora_column": "body.who"},
    )
    assert made.params == {"max_tokens": 5, "structured_outputs": {"json": SCHEMA}}
    assert made.lora == "formal"
    assert wrong_option_columns(job(sampling={"column": "body.own"}), ["body"]) == []
    (problem,) = wrong_option_columns(job(sampling={"column": "body.own"}), ["bodies"])
    assert problem.startswith("sampling.column: no column 'body.own'")


def test_other_fields_of_vllms_sampling_params_go_to_the_engine_as_they_are():
    extra = {"logit_bias": {"7": -1.5}, "allowed_token_ids": [7, 8]}
    given = engine_spec(job(sampling={"extra": extra, "top_k": 3}), "m").sampling_params
    assert given.keys() == {*extra, "top_k", "n", "max_tokens", "temperature"}
    assert given["logit_bias"] == {"7": -1.5}


@pytest.mark.parametrize("own", [None, "{}", {}])
def test_without_parameters_of_its_own_a_row_is_like_any_other(own):
    made = outcome({"own": own}, sampling={"column": "own"})
    assert made.params is None
    assert made.request_key == outcome({}).request_key


@pytest.mark.parametrize(
    ("own", "problem"),
    [
        ({"max_tokens": 0}, "max_tokens: Input should be greater than 0"),
        ({"max_token": 5}, "max_token: unknown key, expected one of [sampling]"),
        ("[1]", "holds no object"),
        ("{", "holds no object"),
        (7, "holds no object"),
    ],
)
def test_parameters_that_cannot_be_are_the_rows_error(own, problem):
    error = outcome({"own": own}, sampling={"column": "own"}).error
    assert error.error_type == "bad_sampling"
    assert problem in error.error


def test_a_warm_row_has_a_seed_in_a_greedy_job_and_the_other_way_round():
    assert outcome({"own": None}, sampling={"column": "own"}).seed is None
    assert outcome({"own": {"temperature": 1.0}}, sampling={"column": "own"}).seed is not None
    warm = {"column": "own", "temperature": 1.0}
    assert outcome({"own": {"temperature": 0}}, sampling=warm).seed is None


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)])
def test_a_column_may_give_the_schema(schema):
    found = params({"s": schema}, output={"schema_column": "s"})
    assert found == {"structured_outputs": {"json": SCHEMA}}


@pytest.mark.parametrize("schema", [None, "{}", "x", '{"type": "nothing"}', 3])
def test_a_wrong_schema_is_the_rows_error(schema):
    assert outcome({"s": schema}, output={"schema_column": "s"}).error.error_type == "bad_schema"


def nested(levels, wrap, inner):
    for _ in range(levels):
        inner = wrap(inner)
    return inner


def in_properties(schema):
    return {"type": "object", "properties": {"a": schema}}


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"$schema": 5}, "$.$schema: expected the name of a draft, found 5"),
        ({"$schema": []}, "$.$schema: expected the name of a draft, found []"),
        (nested(120, in_properties, {}), "more than 64 objects and arrays inside each other"),
        (nested(400, in_properties, {}), "more than 64 objects and arrays inside each other"),
        (nested(400, lambda inner: [inner], 1), "holds no JSON Schema"),
        ({"enum": nested(400, lambda inner: [inner], 1)}, "more than 64 objects and arrays"),
        (nested(60, lambda inner: {"not": inner}, {"type": "no"}), "'no' is not valid"),
        ({"pattern": "^(?=a)"}, "$: pattern '^(?=a)' needs backtracking, which could run for ever"),
        ({"not": {"patternProperties": {r"(a)\1": {}}}}, "$.not: pattern '(a)\\\\1' needs backtr"),
        ({"pattern": "("}, "or is wrong"),
        (
            {"patternProperties": {"^(a+)+$": {}}, "unevaluatedProperties": False},
            "together with unevaluatedProperties, which could run for ever",
        ),
        ({"not": {"$ref": "#/$defs/none"}}, "$.not: $ref '#/$defs/none' leads nowhere"),
    ],
)
def test_a_schema_that_would_end_or_hold_the_job_is_the_rows_error(schema, problem, as_text):
    own = json.dumps(schema) if as_text else schema
    error = outcome({"s": own}, output={"schema_column": "s"}).error
    assert error.error_type == "bad_schema"
    assert problem in error.error
    assert "\n" not in error.error


@pytest.mark.parametrize(
    "schema",
    [
        {"$dynamicRef": "http://127.0.0.1:9/x.json"},
        {"$dynamicRef": "x.json#a", "$id": "http://127.0.0.1:9/"},
        {"$ref": "x.json", "$id": "http://127.0.0.1:9/"},
        {"not": {"$id": "http://127.0.0.1:9/", "contains": {"$ref": "/etc/passwd"}}},
        {"$schema": "https://json-schema.org/draft/2019-09/schema", "$recursiveRef": "x.json"},
        {"$defs": {"a": {"$id": "file:///etc/", "$ref": "passwd"}}, "$ref": "#/$defs/a"},
        {"x": {"$ref": "file:///etc/passwd"}, "$ref": "#/x"},
    ],
)
def test_a_rows_schema_opens_nothing(schema, monkeypatch):
    def connect(*_):
        pytest.fail("a schema opened a connection")

    monkeypatch.setattr(socket.socket, "connect", connect)
    error = outcome({"s": json.dumps(schema)}, output={"schema_column": "s"}).error
    assert error.error_type == "bad_schema"
    assert "is another document" in error.error


@pytest.mark.parametrize("levels", [100, 900, 3000])
@pytest.mark.parametrize("as_text", [True, False])
def test_deep_sampling_parameters_are_the_rows_error(levels, as_text):
    text = '{"stop":' * levels + "1" + "}" * levels
    own = text if as_text else nested(levels, lambda inner: {"stop": inner}, 1)
    error = outcome({"own": own}, sampling={"column": "own"}).error
    assert error.error_type == "bad_sampling"


@pytest.mark.parametrize(
    "schema",
    [
        {"const": None},
        {"enum": [None, 1]},
        {"properties": {"a": {"default": None}}},
        {"anyOf": [{"const": None}, {"type": "string"}]},
        {"const": 2**80},
    ],
)
def test_a_schema_given_as_text_is_kept_to_the_letter(schema):
    found = params({"s": json.dumps(schema)}, output={"schema_column": "s"})
    assert found == {"structured_outputs": {"json": schema}}
    assert json.dumps(found["structured_outputs"]["json"]) == json.dumps(schema)


def test_nulls_of_structs_are_absent_also_in_lists():
    one = {"type": "string", "pattern": None, "enum": ["a", None]}
    found = params({"s": {"anyOf": [one], "type": None}}, output={"schema_column": "s"})
    assert found["structured_outputs"]["json"] == {
        "anyOf": [{"type": "string", "enum": ["a", None]}]
    }


def test_null_in_sampling_text_is_absent():
    own = '{"max_tokens": null, "top_p": 0.5}'
    assert params({"own": own}, sampling={"column": "own"}) == {"top_p": 0.5}


def test_the_order_of_a_schemas_properties_is_part_of_the_key():
    def key(*names, **own):
        schema = {"properties": {name: {"type": "string"} for name in names}}
        row = {"s": json.dumps(schema), "own": own}
        tables = {"output": {"schema_column": "s"}, "sampling": {"column": "own"}}
        return outcome(row, **tables).request_key

    assert key("a", "b") == key("a", "b")
    assert key("a", "b") != key("b", "a")
    assert key("a", top_p=0.5, top_k=3) == key("a", top_k=3, top_p=0.5)
    assert key("a", top_p=0.5) != key("a")


def test_a_column_may_name_the_adapter():
    assert outcome({"adapter": "formal"}, model=LORA).lora == "formal"
    assert outcome({"adapter": None}, model=LORA).lora is None
    error = outcome({"adapter": "frmal"}, model=LORA).error
    assert error.error_type == "unknown_adapter"
    assert "did you mean 'formal'?" in error.error


def test_a_single_adapter_serves_every_row():
    assert outcome({}, model={"lora": {"formal": "f"}}).lora == "formal"


def test_what_a_row_asks_for_is_part_of_its_key():
    both = {"model": LORA, "sampling": {"column": "own"}}
    keys = [
        outcome({"adapter": None, "own": None}, **both).request_key,
        outcome({"adapter": "formal", "own": None}, **both).request_key,
        outcome({"adapter": "casual", "own": None}, **both).request_key,
        outcome({"adapter": None, "own": {"top_p": 0.5}}, **both).request_key,
        outcome({"adapter": None, "own": {"top_p": 0.6}}, **both).request_key,
    ]
    assert len(set(keys)) == len(keys)


def test_columns_that_the_input_lacks_are_named():
    made = job(model=LORA, sampling={"column": "own"}, output={"schema_column": "s"})
    problems = wrong_option_columns(made, ["adapter", "owns"])
    assert [problem.partition(":")[0] for problem in problems] == [
        "sampling.column",
        "output.schema_column",
    ]
    assert "did you mean 'owns'?" in problems[0]


def test_a_schema_that_takes_long_to_look_through_is_the_rows_error():
    schema = json.dumps({"enum": [f"label {n}" for n in range(30_000)]})
    error = outcome({"s": schema}, output={"schema_column": "s"}).error
    assert (error.error_type, "more than 256 Ki chars" in error.error) == ("bad_schema", True)
