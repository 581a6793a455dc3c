"""A schema's type, what becomes JSON text, and that no value is changed on its way to a column."""

import json
import re
import sys
from pathlib import Path

import duckdb
import jsonschema
import orjson
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.answers.typed import MAX_LEVELS, MAX_SCHEMAS, typed_schema

DATA = Path(__file__).parents[1] / "data" / "schemas"
S, I, F, B = pa.string(), pa.int64(), pa.float64(), pa.bool_()  # noqa: E741
STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
NULL = {"type": "null"}


def fields(**properties):
    return {"type": "object", "properties": properties}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (STRING | {"format": "date", "maxLength": 3}, S),
        (INTEGER | {"minimum": 0}, I),
        (NUMBER, F),
        ({"type": "boolean"}, B),
        ({"type": ["string", "null"]}, S),
        ({"type": ["null", "integer"]}, I),
        ({"type": ["integer", "number", "null"]}, F),
        ({"anyOf": [INTEGER, NULL]}, I),
        ({"oneOf": [NULL, fields(a=STRING)]}, pa.struct([("a", S)])),
        ({"anyOf": [INTEGER, NUMBER, NULL]}, F),
        ({"anyOf": [STRING, {"enum": ["a"]}]}, S),
        ({"oneOf": [fields(a=INTEGER), fields(a={"enum": [1, 2]})]}, pa.struct([("a", I)])),
        ({"enum": ["a", "b"]}, S),
        ({"enum": ["a", None]}, S),
        ({"enum": [1, 2, None]}, I),
        ({"enum": [1, 2.5]}, F),
        ({"enum": [True, False]}, B),
        ({"const": "x"}, S),
        ({"const": 3}, I),
        ({"const": True}, B),
        ({"type": "array", "items": INTEGER}, pa.list_(I)),
        ({"items": {"type": "array", "items": NUMBER}}, pa.list_(pa.list_(F))),
        (fields(b=STRING, a=INTEGER), pa.struct([("b", S), ("a", I)])),
        ({"properties": {"a": STRING}, "required": ["a"]}, pa.struct([("a", S)])),
        (fields(a=STRING) | {"additionalProperties": False}, pa.struct([("a", S)])),
        (fields(a=STRING) | {"additionalProperties": True}, pa.struct([("a", S)])),
        # allOf: all of it in one.
        ({"allOf": [INTEGER], "description": "x", "minimum": 1}, I),
        ({"allOf": [NUMBER, INTEGER]}, I),
        ({"allOf": [fields(a=STRING), fields(b=INTEGER)]}, pa.struct([("a", S), ("b", I)])),
        ({"allOf": [fields(a=NUMBER), fields(a=INTEGER)]}, pa.struct([("a", I)])),
        (fields(a=STRING) | {"allOf": [{"required": ["a"]}]}, pa.struct([("a", S)])),
        # Branches that only narrow, on top of what is said beside them.
        (
            fields(a=STRING, b=STRING) | {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
            pa.struct([("a", S), ("b", S)]),
        ),
        (STRING | {"anyOf": [{"pattern": "a"}, {"format": "date"}]}, S),
        (STRING | {"anyOf": [STRING, INTEGER]}, S),
        (
            fields(a=STRING) | {"if": {"properties": {"a": {"const": "x"}}}, "then": {}},
            pa.struct([("a", S)]),
        ),
    ],
)
def test_type(schema, expected):
    typed = typed_schema(schema)
    assert typed.type == expected
    assert list(typed.fallbacks) == []


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({}, "any value"),
        ({"description": "x", "minimum": 3}, "any value"),
        ({"properties": {"a": STRING}, "items": STRING}, "any value"),
        (NULL, "nothing but null"),
        ({"const": None}, "nothing but null"),
        ({"type": ["string", "integer"]}, "several types: integer, string"),
        ({"anyOf": [STRING, INTEGER]}, "anyOf or oneOf of different types"),
        ({"anyOf": [STRING, {}]}, "anyOf or oneOf of different types"),
        # Both are text in Arrow, but one of them is JSON.
        ({"anyOf": [STRING, {"type": "object"}]}, "anyOf or oneOf of different types"),
        ({"oneOf": [fields(a=STRING), fields(b=STRING)]}, "anyOf or oneOf of different types"),
        ({"oneOf": [fields(a=STRING), fields(a={})]}, "anyOf or oneOf of different types"),
        ({"anyOf": [{"items": STRING}, {"items": {}}]}, "anyOf or oneOf of different types"),
        ({"enum": ["a", 1]}, "an enum of different types"),
        ({"enum": [True, 1]}, "an enum of different types"),
        ({"enum": [2**63]}, "an enum of different types"),
        ({"const": {"a": 1}}, "an enum of different types"),
        ({"type": "array"}, "an array without items"),
        ({"type": "array", "prefixItems": [STRING]}, "an array with a schema for each place"),
        ({"type": "array", "items": [STRING]}, "an array with a schema for each place"),
        ({"type": "object"}, "an object without properties"),
        (fields(), "an object without properties"),
        (
            {"type": "object", "additionalProperties": STRING},
            "an object with any keys (additionalProperties)",
        ),
        (
            fields(a=STRING) | {"additionalProperties": {}},
            "an object with any keys (additionalProperties)",
        ),
        (
            fields(a=STRING) | {"patternProperties": {"^x": STRING}},
            "an object with any keys (patternProperties)",
        ),
        ({"allOf": [STRING, INTEGER]}, "no type fits all that is said"),
        (STRING | {"anyOf": [INTEGER, NULL]}, "no type fits all that is said"),
        (
            fields(a=STRING) | {"if": {"required": ["a"]}, "then": {"properties": {"b": STRING}}},
            "'b' only in if, then, else or dependentSchemas",
        ),
        (
            fields(a=STRING) | {"dependentSchemas": {"a": {"allOf": [fields(c=STRING)]}}},
            "'c' only in if, then, else or dependentSchemas",
        ),
        (fields(a=STRING) | {"$dynamicRef": "#x"}, "a $dynamicRef"),
        ({"$ref": "#"}, "$ref '#' is recursive"),
    ],
)
def test_what_is_left_open_is_json_text(schema, why):
    typed = typed_schema(schema)
    assert typed.type == S
    assert list(typed.fallbacks) == [f"$: {why}"]
    assert json.loads(typed.value({"x": [1, None, "é"]})) == {"x": [1, None, "é"]}
    assert typed.value("a") == '"a"'
    assert typed.value(None) is None


def test_true_and_false_in_place_of_a_schema():
    typed = typed_schema(fields(a=True, b=False, c={"type": "array", "items": True}))
    assert typed.type == pa.struct([("a", S), ("b", S), ("c", pa.list_(S))])
    assert list(typed.fallbacks) == [
        "$.a: any value",
        "$.b: nothing fits `false`",
        "$.c[]: any value",
    ]
    assert typed.value({"a": {}, "c": [1, "x", None]}) == {
        "a": "{}",
        "b": None,
        "c": ["1", '"x"', None],
    }


def test_fallbacks_say_where():
    schema = fields(**{"a b": {"type": "array", "items": fields(c={})}, "d": STRING})
    assert list(typed_schema(schema).fallbacks) == ["$['a b'][].c: any value"]


def test_refs_are_followed():
    schema = {
        "$id": "https://example.org/s.json#",
        "$ref": "#/definitions/a~1b",
        "definitions": {
            "a/b": fields(x={"$ref": "#/%24defs/list"}, y={"$ref": "#"}),
        },
        "$defs": {"list": {"type": "array", "items": {"$ref": "#/$defs/n~0"}}, "n~": INTEGER},
    }
    typed = typed_schema(schema)
    assert typed.type == pa.struct([("x", pa.list_(I)), ("y", S)])
    assert list(typed.fallbacks) == ["$.y: $ref '#' is recursive"]


def test_a_recursive_ref_is_json_text_where_it_recurs():
    schema = {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": fields(v=INTEGER, next={"anyOf": [{"$ref": "#/$defs/node"}, NULL]}),
        },
    }
    typed = typed_schema(schema)
    assert typed.type == pa.struct([("v", I), ("next", S)])
    assert list(typed.fallbacks) == ["$.next: $ref '#/$defs/node' is recursive"]
    answer = {"v": 1, "next": {"v": 2, "next": {"v": 3, "next": None}}}
    assert json.loads(typed.value(answer)["next"]) == answer["next"]


def test_recursion_through_all_of_is_seen():
    node = {"allOf": [fields(next={"$ref": "#/$defs/node"})]}
    typed = typed_schema({"$ref": "#/$defs/node", "$defs": {"node": node}})
    assert typed.type == pa.struct([("next", S)])


def test_branches_that_only_narrow_cost_nothing():
    schema, expected = STRING, S
    for _ in range(6):
        schema = fields(a=schema) | {"anyOf": [{"required": ["a"]}] * 10}
        expected = pa.struct([("a", expected)])
    assert typed_schema(schema).type == expected


def test_the_same_ref_beside_itself_is_not_recursive():
    point = fields(x=NUMBER)
    schema = {
        "allOf": [{"$ref": "#/$defs/point"}],
        "properties": {"to": {"$ref": "#/$defs/point"}},
        "$defs": {"point": point},
    }
    typed = typed_schema(schema)
    assert typed.type == pa.struct([("x", F), ("to", pa.struct([("x", F)]))])


def nested(levels):
    schema, value, kind = INTEGER, 1, I
    for level in range(levels):
        if level % 2:
            schema, value, kind = {"items": schema}, [value], pa.list_(kind)
        else:
            schema, value, kind = fields(x=schema), {"x": value}, pa.struct([("x", kind)])
    return schema, value, kind


def test_fifty_levels_are_typed_and_more_are_text():
    schema, value, kind = nested(MAX_LEVELS)
    assert typed_schema(schema).type == kind
    assert typed_schema(schema).value(value) == value
    schema, value, kind = nested(MAX_LEVELS + 1)
    typed = typed_schema(schema)
    assert [why.partition(": ")[2] for why in typed.fallbacks] == ["more than 50 levels"]
    assert '{"x":1}' in json.dumps(typed.value(value)).replace('\\"', '"')


@pytest.mark.parametrize("keyword", ["properties", "allOf", "anyOf"])
def test_few_lines_that_describe_endless_columns_end(keyword):
    def twice(name):
        both = [{"$ref": f"#/$defs/{name}"}, {"$ref": f"#/$defs/{name}"}]
        return fields(a=both[0], b=both[1]) if keyword == "properties" else {keyword: both}

    schema = twice("d0") | {"$defs": {f"d{i}": twice(f"d{i + 1}") for i in range(40)}}
    schema["$defs"]["d40"] = STRING
    fallbacks = typed_schema(schema).fallbacks
    # Where anyOf gives up in the middle of a branch, the branches are no longer the same.
    expected = f"more than {MAX_SCHEMAS}" if keyword != "anyOf" else "different types"
    assert any(expected in why for why in fallbacks)


def test_a_schema_nested_without_end_is_refused():
    schema = STRING
    for _ in range(sys.getrecursionlimit()):
        schema = {"anyOf": [schema]}
    with pytest.raises(ValueError, match="the schema is nested too deeply"):
        typed_schema(schema)


def test_enums_are_the_choices_among_strings():
    schema = fields(
        tone={"enum": ["warm", "cold", None, "warm"]},
        described={"oneOf": [{"const": "x", "title": "X"}, {"enum": ["y"]}, NULL]},
        free=STRING,
        either={"anyOf": [{"enum": ["a", "b"]}, STRING]},
        only={"const": "one"},
        n={"enum": [1, 2]},
        many={"items": {"enum": ["a", "b"]}},
        narrowed={"allOf": [{"enum": ["a", "b", "c"]}, {"enum": ["c", "a"]}]},
        by_ref={"$ref": "#/$defs/e"},
    )
    schema["$defs"] = {"e": {"type": "string", "enum": ["p", "q"]}}
    assert typed_schema(schema).enums == {
        "tone": ("warm", "cold"),
        "described": ("x", "y"),
        "narrowed": ("a", "c"),
        "by_ref": ("p", "q"),
    }
    assert typed_schema({"enum": ["b", "a"]}).enums == {"": ("b", "a")}
    tagged = {"oneOf": [fields(k={"const": k}, n=INTEGER) for k in ("r", "s")]}
    assert typed_schema(tagged).enums == {"k": ("r", "s")}


@pytest.mark.parametrize(
    ("schema", "parsed", "expected"),
    [
        (STRING, "\x00é🙂", "\x00é🙂"),
        (INTEGER, 1.0, 1),
        (INTEGER, -(2**63), -(2**63)),
        (INTEGER, 2**63 - 1, 2**63 - 1),
        (NUMBER, 3, 3.0),
        ({"type": "boolean"}, False, False),
        (fields(a=STRING, b=INTEGER), {"b": 1}, {"a": None, "b": 1}),
        (fields(a=STRING), {"a": None}, {"a": None}),
        ({"items": fields(a=STRING)}, [None, {}], [None, {"a": None}]),
        ({}, {"b": 2**64, "a": [1.0, None]}, '{"b":18446744073709551616,"a":[1.0,null]}'),
    ],
)
def test_value(schema, parsed, expected):
    found = typed_schema(schema).value(parsed)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("schema", "parsed", "message"),
    [
        (STRING, 1, "$: expected a string, found an integer"),
        (INTEGER, True, "$: expected an integer, found a boolean"),
        (INTEGER, 1.5, "$: expected an integer, found a number"),
        (INTEGER, 2**63, "$: expected an integer of 64 bits, found a larger one"),
        (INTEGER, 1e300, "$: expected an integer of 64 bits, found a larger one"),
        (NUMBER, True, "$: expected a number, found a boolean"),
        (NUMBER, "1", "$: expected a number, found a string"),
        (NUMBER, 10**400, "$: expected a number of 64 bits, found a larger one"),
        ({"type": "boolean"}, 0, "$: expected a boolean, found an integer"),
        ({"items": STRING}, {}, "$: expected an array, found an object"),
        (fields(a=STRING), [], "$: expected an object, found an array"),
        (
            fields(a=fields(b=STRING)),
            {"a": {"x": 1}},
            "$.a: unknown key 'x', which the column cannot hold",
        ),
        (
            fields(**{"a b": {"items": fields(c={"items": INTEGER})}}),
            {"a b": [{}, None, {"c": [1, 2, 3, "4"]}]},
            "$['a b'][2].c[3]: expected an integer, found a string",
        ),
    ],
)
def test_what_a_column_cannot_hold_is_refused(schema, parsed, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        typed_schema(schema).value(parsed)
    assert str(caught.value).startswith("$")
    assert "\n" not in str(caught.value)


def text_or_why(value):
    try:
        return typed_schema({}).value(value)
    except ValueError as error:
        return str(error)


def test_json_as_deep_as_the_parser_reads_is_text_or_refused():
    written = "[" * 300 + "]" * 300  # Deeper than orjson writes.
    assert text_or_why(orjson.loads(written)) == written
    written = "[" * 1020 + "]" * 1020  # Deeper than Python 3.11 does.
    assert text_or_why(orjson.loads(written)).startswith(("$: expected JSON that can be", "[[["))


def test_a_long_unknown_key_is_cut():
    with pytest.raises(ValueError, match="unknown key") as caught:
        typed_schema(fields(a=STRING)).value({"x\n" * 500: 1})
    assert len(str(caught.value)) < 150


def same(parsed, stored):
    """Whether a column's value tells the same as the JSON; text may be JSON."""
    if isinstance(parsed, dict) and isinstance(stored, dict):
        return parsed.keys() <= stored.keys() and all(
            same(parsed.get(key), value) for key, value in stored.items()
        )
    if isinstance(parsed, list) and isinstance(stored, list):
        pairs = zip(parsed, stored, strict=False)
        return len(parsed) == len(stored) and all(same(*pair) for pair in pairs)
    if parsed is None or stored is None:
        return parsed is stored
    if isinstance(stored, str) and stored != parsed:
        return json.loads(stored) == parsed
    return stored == parsed and isinstance(parsed, bool) == isinstance(stored, bool)


def test_same_can_tell():
    assert same({"a": 1}, {"a": 1.0, "b": None})
    assert same({"a": [1]}, '{"a": [1]}')
    for parsed, stored in [({"a": 1}, {"b": None}), ([1], [1, 2]), (1, True), ("a", '"b"')]:
        assert not same(parsed, stored)
    assert not same({}, None)
    assert not same({}, {"a": 1})


def through_parquet(column, folder):
    """The column's values by each reader."""
    path = folder / "answers.parquet"
    pq.write_table(pa.table({"answer": column}), path)
    by_duckdb = duckdb.sql(f"SELECT answer FROM read_parquet('{path}')").fetchall()
    return {
        "pyarrow": pq.read_table(path)["answer"].to_pylist(),
        "polars": pl.read_parquet(path)["answer"].to_list(),
        "duckdb": [row[0] for row in by_duckdb],
    }


@pytest.mark.parametrize("name", ["resume", "feature"])
def test_answers_of_a_public_schema_go_through_parquet(name, tmp_path):
    schema = orjson.loads((DATA / f"{name}.json").read_bytes())
    answers = orjson.loads((DATA / f"{name}_answers.json").read_bytes())
    for answer in answers:
        jsonschema.validate(answer, schema)
    typed = typed_schema(schema)
    column = pa.array([*map(typed.value, answers), None], typed.type)
    for reader, stored in through_parquet(column, tmp_path).items():
        assert len(stored) == len(answers) + 1
        for answer, value in zip([*answers, None], stored, strict=True):
            assert same(answer, value), reader


def test_the_types_of_a_public_schema():
    typed = typed_schema(orjson.loads((DATA / "resume.json").read_bytes()))
    place = pa.struct([("city", S), ("country", S), ("at", pa.list_(F))])
    work = [("start", S), ("end", S), ("employer", S), ("role", S), ("contract", S)]
    work += [("highlights", pa.list_(S)), ("location", place)]
    assert typed.type.field("work").type == pa.list_(pa.struct(work))
    assert typed.type.field("basics").type.field("location").type == place
    assert typed.enums == {
        "seniority": ("junior", "mid", "senior", "lead"),
        "availability": ("now", "notice"),
    }
    assert [why.partition(":")[0] for why in typed.fallbacks] == [
        "$.basics.profiles[].value",
        "$.reports_to.boss",
        "$.salary",
        "$.meta",
    ]


INSTALLED = [
    "jsonschema_specifications/schemas/draft4/metaschema.json",
    "jsonschema_specifications/schemas/draft6/metaschema.json",
    "jsonschema_specifications/schemas/draft7/metaschema.json",
    "setuptools/config/setuptools.schema.json",
    "setuptools/config/distutils.schema.json",
]


@pytest.mark.parametrize("place", INSTALLED)
def test_schemas_of_installed_packages_have_a_type(place):
    paths = [path for folder in sys.path if (path := Path(folder) / place).is_file()]
    if not paths:
        pytest.skip("not installed")
    schema = orjson.loads(paths[0].read_bytes())
    typed = typed_schema(schema)
    if "metaschema" in place:
        minimal = {"title": "x", "required": ["a"], "properties": {"a": {"type": "string"}}}
        assert same(minimal, typed.value(minimal))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
LABELS = st.lists(st.text(max_size=4), min_size=1, max_size=4, unique=True)


def leaves():
    """Pairs of a schema and a strategy for its answers."""
    simple = [
        (STRING, st.text()),
        (INTEGER, st.integers(-(2**63), 2**63 - 1)),
        (NUMBER, st.floats(allow_nan=False, allow_infinity=False)),
        ({"type": "boolean"}, st.booleans()),
        ({}, JSON),
        ({"type": "object"}, st.dictionaries(st.text(), JSON, max_size=3)),
        ({"type": ["integer", "string"]}, st.integers(-9, 9) | st.text(max_size=3)),
    ]
    enums = LABELS.map(lambda labels: ({"enum": labels}, st.sampled_from(labels)))
    return st.sampled_from(simple) | enums


def nullable(pair):
    schema, answers = pair
    return {"anyOf": [schema, NULL]}, answers | st.none()


def array(pair):
    schema, answers = pair
    return {"type": "array", "items": schema}, st.lists(answers, max_size=3)


def object_(pairs):
    required = {"required": list(pairs)[:1]}
    optional = {name: answers for name, (_, answers) in list(pairs.items())[1:]}
    always = {name: answers for name, (_, answers) in list(pairs.items())[:1]}
    schema = fields(**{name: schema for name, (schema, _) in pairs.items()}) | required
    return schema, st.fixed_dictionaries(always, optional=optional)


SCHEMAS = st.recursive(
    leaves(),
    lambda inner: (
        inner.map(nullable)
        | inner.map(array)
        | st.dictionaries(st.text(max_size=4), inner, min_size=1, max_size=4).map(object_)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(SCHEMAS, st.data())
def test_what_goes_into_a_column_comes_out(pair, data):
    schema, strategy = pair
    answers = data.draw(st.lists(strategy, min_size=1, max_size=3))
    jsonschema.Draft202012Validator.check_schema(schema)
    typed = typed_schema(schema)
    column = pa.array([typed.value(answer) for answer in answers], typed.type)
    for answer, stored in zip(answers, column.to_pylist(), strict=True):
        assert same(answer, stored)
