"""Values of rows in templates: as JSON, absent, of odd kinds; each row's trouble is its own."""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal
from uuid import UUID

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchgen.core.data import NotText
from batchgen.core.errors import ConfigError
from batchgen.core.records import Request, Result, RowBatch, RowError
from batchgen.job.load import load_job
from batchgen.job.model import PromptConfig
from batchgen.pipeline.prepare import prepare
from batchgen.prompt.builder import PromptBuilder
from tests.fakes import batch, job, request_builder


def built(values, **prompt):
    return PromptBuilder(PromptConfig(**prompt)).build(values)


def text_of(template, **values):
    found = built(values, user=template)
    assert not isinstance(found, RowError), found
    return found[-1]["content"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(value=JSON, indent=st.none() | st.integers(0, 4), ascii_only=st.booleans())
def test_tojson_writes_what_json_dumps_does(value, indent, ascii_only):
    how = {"ensure_ascii": ascii_only, "indent": indent}
    first = str(indent).lower()
    text = text_of(f"|{{{{ v|tojson({first}, ensure_ascii=a) }}}}", v=value, a=ascii_only)
    assert text == "|" + json.dumps(value, sort_keys=True, **how)


def test_tojson_keeps_letters_and_signs_and_takes_what_json_dumps_does():
    value = {"b": "Müller & Söhne <大阪> it's", "a": [1, {}]}
    assert text_of("{{ v|tojson }}", v=value) == (
        '{"a": [1, {}], "b": "Müller & Söhne <大阪> it\'s"}'
    )
    assert text_of("{{ v|tojson(sort_keys=false, separators=(',', ':')) }}", v=value) == (
        '{"b":"Müller & Söhne <大阪> it\'s","a":[1,{}]}'
    )
    assert text_of("{{ v|tojson(ensure_ascii=true) }}", v="ü&") == '"\\u00fc&"'
    # It is plain text, which escapes nothing that is added to it.
    assert text_of("{{ v|tojson + '<' }}{{ v|tojson ~ '&' }}", v="<") == '"<"<"<"&'
    assert text_of("{{ vs|map('tojson')|join(' ') }}", vs=["é", 1]) == '"é" 1'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (dt.date(2026, 11, 30), '"2026-11-30"'),
        (dt.datetime(2026, 11, 30, 1, 2, 3, tzinfo=dt.UTC), '"2026-11-30T01:02:03+00:00"'),
        (dt.time(1, 2), '"01:02:00"'),
        (dt.timedelta(days=1, seconds=2), '"1 day, 0:00:02"'),
        (Decimal("4.10"), "4.10"),
        (Decimal("12345678901234567890.123456789"), "12345678901234567890.123456789"),
        (UUID(int=5), '"00000000-0000-0000-0000-000000000005"'),
        (b"caf\xc3\xa9", '"café"'),
        (np.float32(1.5), "1.5"),
        (np.int64(7), "7"),
        (np.bool_(True), "true"),
        (np.array([[1, 2], [3, 4]]), "[[1, 2], [3, 4]]"),
        (np.datetime64("2026-11-30"), '"2026-11-30"'),
        ((1, "a"), '[1, "a"]'),
        (2**70, "1180591620717411303424"),
        (None, "null"),
    ],
)
def test_values_that_json_has_no_type_for(value, text):
    assert text_of("{{ v|tojson }}", v=value) == text
    assert text_of("{{ v|tojson }}", v=[value, {"k": value}]) == f'[{text}, {{"k": {text}}}]'


def test_what_cannot_be_json_is_that_rows_error():
    absent = built({"v": {}}, user="{{ v.x|tojson }}")
    assert absent.error_type == "missing_value"
    assert built({"v": NotText(b"\xff")}, user="{{ v|tojson }}").error_type == "invalid_utf8"
    assert built({"v": {1}}, user="{{ v|tojson }}") == RowError(
        "template_error", "TypeError: set is not JSON"
    )


ROW = {"null": None, "deep": {"x": None, "y": {"z": 1}}, "text": "", "zero": 0}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ null|default('none') }}", "none"),
        ("{{ null|d('none') }}", "none"),
        ("{{ row.null|default('none') }}", "none"),
        ("{{ row.absent|default('none') }}", "none"),
        ("{{ row['absent']|default('none') }}", "none"),
        ("{{ deep.x|default('none') }}", "none"),
        ("{{ row.deep.x.y|default('none') }}", "none"),
        ("{{ row.deep.a.b.c|default('none') }}", "none"),
        ("{{ row.absent.b['c'][0].d|default('none') }}", "none"),
        ("{{ null.x.y|default('none') }}", "none"),
        ("{{ null['x']|default('none') }}", "none"),
        ("{{ deep.y.z|default('none') }}", "1"),
        ("<{{ text|default('none') }}>", "<>"),
        ("{{ zero|default('none') }}", "0"),
        ("{{ text|default('none', true) }}{{ zero|default('0', boolean=true) }}", "none0"),
        ("{{ null|default(deep.x|default('b')) }}", "b"),
        (
            "{{ deep.a.b is defined }} {{ null.x is defined }} {{ null is none }}",
            "False False True",
        ),
        ("{% filter default('none') %}x{% endfilter %}", "x"),
    ],
)
def test_a_default_stands_for_what_is_absent_and_for_a_null(template, text):
    assert text_of("{{ text }}" + template, **ROW) == text


@pytest.mark.parametrize(
    ("template", "error_type"),
    [
        ("{{ null }}", "null_value"),
        ("{{ null.x }}", "null_value"),
        ("{{ null['x'].y }}", "null_value"),
        ("{{ row.deep.x }}", "null_value"),
        ("{{ row.deep.a.b }}", "missing_value"),
        ("{{ row.absent ~ '' }}", "missing_value"),
        ("{% if row.absent.x %}{% endif %}a", "missing_value"),
        ("{% for i in deep.a.b %}{% endfor %}a", "missing_value"),
        ("{{ deep.a() }}", "missing_value"),
        ("{{ null|default }}", "empty_prompt"),
        ("{{ [deep.a] }}", "missing_value"),
    ],
)
def test_without_a_default_it_is_that_rows_error(template, error_type):
    assert built(ROW, user=template).error_type == error_type


def notes(columns=("subject", "text", "label"), **prompt):
    return PromptBuilder(PromptConfig(**prompt)).notes(columns)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ({"user": "{{ text }}: {subject}"}, ["prompt.user: {subject} in single braces is text"]),
        (
            {"user": "{{ text }}", "system": "Of { label }: {%raw%}{text}{%endraw%}"},
            ["prompt.system: {label} in single braces is text"],
        ),
        (
            {"user": "Rate {subject}."},
            ["prompt.user: {subject} in single braces is text", "prompt.user: no column is used"],
        ),
        ({"user": "Rate {title}."}, ["prompt.user: no column is used"]),
        (
            {"user": "{% for i in range(3) %}{{ i }}{% endfor %}"},
            ["prompt.user: no column is used"],
        ),
        ({"user": "{{ text }}"}, []),
        ({"user": 'Answer as {"subject": "...", "n": {}} for {{ text }}'}, []),
        ({"user": "f(x) = {x}; {0}; ${name}; {{ text }}"}, []),
        ({"user": "Write {text} for {{ text }}"}, []),
        ({"user": "{{ row['subject'] }} {# {subject} #}"}, []),
        ({"user": "Same", "system": "{{ text }}"}, []),
        ({"user": "What is it?", "images": "text"}, []),
        ({"user": "{{ text }}{{ titel.x|default('') }}"}, ["prompt: no column 'titel' in the"]),
        ({"text": "text"}, []),
        ({"messages": "text"}, []),
    ],
)
def test_prompts_that_are_equal_by_mistake_are_told(prompt, found):
    told = notes(**prompt)
    assert len(told) == len(found)
    assert all(line.startswith(start) for line, start in zip(told, found, strict=True))


JOB = """
[input]
path = "in.jsonl"
[prompt]
user_file = "user.jinja"
system_file = "system.jinja"
examples_file = "examples.jsonl"
tools_file = "tools.json"
chat_template_file = "chat.jinja"
[model]
backend = "echo"
[sampling]
max_tokens = 8
[output]
path = "out"
schema = "schema.json"
"""


def test_a_byte_order_mark_of_a_file_is_no_text_of_it(tmp_path):
    files = {
        "in.jsonl": '{"text": "a"}',
        "job.toml": JOB,
        "user.jinja": "Say {{ text }}",
        "system.jinja": "Be brief",
        "examples.jsonl": '{"user": "q", "assistant": "{}"}\n',
        "tools.json": "[{}]",
        "chat.jinja": "{{ messages }}",
        "schema.json": '{"type": "object"}',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
    prepared = prepare(load_job(tmp_path / "job.toml"))
    prompt = prepared.builder.build({"text": "a"})
    assert [message["content"] for message in prompt] == ["Be brief", "q", "{}", "Say a"]
    assert prepared.engine_spec(None).chat_template == "{{ messages }}"
    assert prepared.job.output.json_schema == {"type": "object"}
    # The recipe is that of earlier versions, so that outputs go on; what keys cannot tell is told.
    assert prepared.recipe["prompt"]["user"] == "\ufeffSay {{ text }}"
    assert [note[:55] for note in prepared.notes] == [
        "prompt.chat_template_file begins with a byte order mark"
    ]


def nested(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


ODD = st.one_of(
    JSON,
    st.floats(),
    st.integers(min_value=10**4300, max_value=10**5000),
    st.dates() | st.datetimes() | st.timedeltas() | st.times(),
    st.decimals() | st.uuids() | st.binary(max_size=8),
    st.text(st.characters(codec=None), max_size=5),
    st.sampled_from(["\ud800", "{{ x }}", "\0", "a" * 100, NotText(b"\xff")]),
    st.integers(1, 2000).map(nested),
)
TEMPLATES = [
    "{{ v }}",
    "{{ v|tojson }}",
    "{{ v|string|length }}{{ v }}",
    "{{ v|default('x') }}{{ row.v.w|default('y') }}",
    "{% for i in v %}{{ i }}{% endfor %}.",
    "{{ v ~ w }}{{ v + w }}",
    "{{ v * 3 }}{{ '%s' % v }}{{ '{}'.format(v) }}",
    "{{ v|sort|join(',') }}{{ v.items() }}",
    "{{ v|int }}{{ v|float }}{{ v|round }}{{ v|abs }}",
    "{{ v == w }}{{ v in [w] }}{{ {v: w} }}",
    "{{ v|list|first|upper }}{{ v|escape }}{{ v|urlencode }}",
]


def outcome_of(value, other, **tables):
    rows = [{"v": value, "w": other, "m": [{"role": "user", "content": "x"}]}]
    none = batch([0])
    one = RowBatch(0, range(1), rows, none.carried, {}, none.skipped)
    (found,) = request_builder(job(**tables)).of(one)
    error = found.error if isinstance(found, Result) else None
    if error is not None:
        error.error.encode()
        assert "\n" not in error.error
    else:
        assert isinstance(found, Request)
    return found


@given(value=ODD, other=ODD, template=st.sampled_from(TEMPLATES))
def test_whatever_a_row_holds_it_is_a_prompt_or_that_rows_error(value, other, template):
    outcome_of(value, other, prompt={"user": template, "system": "{{ w }}"})
    assert not isinstance(outcome_of(1, 2, prompt={"user": "{{ v }}"}), Result)


MESSAGES = {"prompt": {"user": None, "messages": "v"}}
PARTS = st.fixed_dictionaries(
    {"role": st.just("user") | ODD, "content": st.lists(st.dictionaries(st.text(), ODD)) | ODD}
)


@given(value=ODD | st.lists(PARTS, max_size=3), other=ODD)
@example(value={"\n": False}, other=0)
@example(value=10**5000, other=0)
@example(value={"a\n\ud800": [{"\n": 1}]}, other=0)
def test_the_same_of_what_a_row_brings_itself(value, other):
    outcome_of(value, other, **MESSAGES)
    outcome_of(value, other, prompt={"user": None, "text": "v"})
    outcome_of(value, other, prompt={"user": "x", "images": "v", "images_folder": "/nowhere"})
    chat = {"user": None, "messages": "m"}
    outcome_of(value, other, prompt=chat, sampling={"max_tokens": 1, "column": "v"})
    outcome_of(value, other, prompt=chat, output={"path": "out", "schema_column": "v"})
    outcome_of(value, other, prompt=chat, model={"lora": {"a": "/x"}, "lora_column": "v"})


def test_a_note_is_no_error(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}')
    (tmp_path / "job.toml").write_text(
        '[input]\npath="in.jsonl"\n[prompt]\nuser="{text}"\n[model]\nbackend="echo"\n'
        '[sampling]\nmax_tokens=8\n[output]\npath="out"\n'
    )
    assert len(prepare(load_job(tmp_path / "job.toml")).notes) == 2
    with pytest.raises(ConfigError, match="no column 'txet'"):
        PromptBuilder(PromptConfig(user="{{ txet }}{text}")).columns(["text"])


def test_a_column_that_has_a_default_may_be_absent_from_the_whole_input():
    template = (
        "{{ a }}{{ b|default('B') }}{{ c.d['e']|d('C') }}{% if f is defined %}{{ f }}{% endif %}"
    )
    builder = PromptBuilder(PromptConfig(user=template, system="{{ row.x|default('X') }}"))
    assert builder.columns(["row", "a"]) == {"row", "a"}
    assert PromptBuilder(PromptConfig(user=template)).columns(["a", "c"]) == {"a", "c"}
    assert text_of(template, a="x") == "xBC"
    assert text_of(template, a="x", b=None, c=None, f=1) == "xBC1"
    with pytest.raises(ConfigError, match="no column 'g'"):
        PromptBuilder(PromptConfig(user="{{ a|default(g) }}")).columns(["a"])
