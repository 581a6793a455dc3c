"""Row values to prompt, key and seed; what a template must never do."""

from __future__ import annotations

import datetime as dt
import hashlib
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from batchgen.core.errors import ConfigError
from batchgen.core.records import Ordinal, Request, Result, RowBatch, RowError, is_continued
from batchgen.job.model import Example, PromptConfig
from batchgen.job.recipe import Seeds, row_seed
from batchgen.prompt.builder import PromptBuilder, turns
from batchgen.prompt.sandbox import MAX_CHARS, NULL, Sandbox
from tests.fakes import batch, job, request_builder


def built(values, **prompt):
    return PromptBuilder(PromptConfig(**prompt)).build(values)


def text_of(values, template):
    (message,) = built(values, user=template)
    assert message["role"] == "user"
    return message["content"]


def error_of(values, **prompt):
    outcome = built(values, **prompt)
    assert isinstance(outcome, RowError)
    assert "\n" not in outcome.error
    return outcome.error_type, outcome.error


def test_user_and_system_make_a_chat_in_order():
    assert built({"a": "x", "b": 2}, user="{{ a }}!", system="you are {{ b }}") == [
        {"role": "system", "content": "you are 2"},
        {"role": "user", "content": "x!"},
    ]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("{{ a }}", "x"),
        ("{{ row.a }}", "x"),
        ("{{ row['my col'] }}", "y"),
        ("{% for k in row %}{{ k }},{% endfor %}", "a,my col,n,tags,none,"),
        ("{{ tags|join('+') }} {{ n + 1 }}", "p+q 8"),
        ("{% if none is none %}absent{% endif %}", "absent"),
        ("{{ none or 'unknown' }}", "unknown"),
        ("{{ none|default('d', true) }}", "d"),
        ("{% if missing is defined %}a{% else %}b{% endif %}", "b"),
        ("{{ n }}", "7"),
        ("<b>{{ '<' }}&", "<b><&"),
        ("a\n\n", "a\n"),
        ("{% for i in range(3) %}{{ i }}{% endfor %}", "012"),
    ],
)
def test_templates_see_the_row(template, wanted):
    values = {"a": "x", "my col": "y", "n": 7, "tags": ["p", "q"], "none": None}
    assert text_of(values, template) == wanted


@pytest.mark.parametrize(
    ("template", "error_type", "error"),
    [
        ("hi {{ null }}", "null_value", "the prompt needs a value that is null; null here: null"),
        ("{{ missing }}", "missing_value", "a value that is absent: 'missing' is undefined"),
        ("{{ user.nick }}", "missing_value", "'dict object' has no attribute 'nick'"),
        ("{{ null.x }}", "null_value", "a value that is null; null here: null"),
        ("{{ empty }}", "empty_prompt", "prompt.user renders to nothing"),
        ("{{ blank }}", "empty_prompt", "prompt.user renders to nothing"),
        ("{% if false %}{{ a }}{% endif %}", "empty_prompt", "prompt.user renders to nothing"),
        ("{{ 1 / n }}", "template_error", "ZeroDivisionError: division by zero"),
        ("{{ n + a }}", "template_error", "TypeError: "),
    ],
)
def test_a_row_that_makes_no_prompt_is_an_error_with_its_reason(template, error_type, error):
    values = {"a": "x", "null": None, "empty": "", "blank": " \n\t", "user": {}, "n": 0}
    found_type, found = error_of(values, user=template)
    assert found_type == error_type
    assert error in found


def test_a_null_in_the_system_message_is_an_error_too():
    assert error_of({"a": "x", "b": None}, user="{{ a }}", system="{{ b }}") == (
        "null_value",
        "the prompt needs a value that is null; null here: b",
    )


@pytest.mark.parametrize(
    "template",
    ["{{ a ~ ' ' ~ null }}", "{{ null|upper }}", "{{ null|string }}", "{{ 'x %s'|format(null) }}"],
)
def test_the_word_none_never_gets_into_a_prompt(template):
    assert error_of({"a": "x", "null": None}, user=template)[0] == "null_value"


@pytest.mark.parametrize(
    "template",
    [
        "{{ a.__class__ }}",
        "{{ a.__class__.__mro__[1].__subclasses__() }}",
        "{{ row.__init__.__globals__ }}",
        "{{ a['__class__'] }}",
        "{{ a|attr('__class__') }}",
        "{{ ''.__class__.__base__ ~ a }}",
        "{{ a.format.__self__ }}",
        "{{ '{0.__class__}'.format(a) }}",
        "{{ tags.append('x') }}{{ a }}",
        "{{ tags.clear() }}{{ a }}",
        "{{ user.update({'n': 2}) }}{{ a }}",
        "{{ user.pop('n') }}{{ a }}",
        "{{ range(10**9)|list|length }}{{ a }}",
        "{{ lipsum() }}{{ a }}",
    ],
)
def test_a_template_cannot_escape_nor_change_the_row(template):
    values = {"a": "x", "tags": ["p"], "user": {"n": 1}}
    outcome = built(values, user=template)
    assert isinstance(outcome, RowError), outcome
    assert outcome.error_type in {"template_error", "missing_value"}
    assert values == {"a": "x", "tags": ["p"], "user": {"n": 1}}


def test_one_bad_row_does_not_spoil_the_next():
    builder = PromptBuilder(PromptConfig(user="{{ a }}"))
    assert isinstance(builder.build({"a": None}), RowError)
    assert builder.build({"a": "x"}) == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("key", ["user", "system"])
@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("a\n{{ b", "template error in line 2: unexpected end of template"),
        ("{% if %}", "template error in line 1: Expected an expression"),
        ("{{ a|shout }}", "template error in line 1: No filter named 'shout'."),
        ("{{ ''.__class__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
        ("{% include a %}", "template error in line 1: include reads another file"),
        ("{% import a as b %}{{ b }}", "template error in line 1: import reads another file"),
        ("{{ 'a' * 10**9 }}", "the template makes more than 16,777,216 characters"),
        ("{{ 10**(10**10) }}", "the template makes a number of more than 65,536 bits"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "template cannot be compiled: Recursion"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "template cannot be compiled: Syntax"),
        ("{{ " + "9" * 5000 + " }}", "template cannot be compiled: ValueError: Exceeds"),
    ],
)
def test_a_template_that_can_never_work_is_refused(key, template, problem):
    prompt = PromptConfig(**{"user": "{{ a }}", key: template})
    with pytest.raises(ConfigError) as caught:
        PromptBuilder(prompt)
    (found,) = caught.value.problems
    assert found.startswith(f"prompt.{key}: {problem}")


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% include 'x' %}", "{{ 'a' + 1 }}"])
def test_a_constant_template_that_fails_is_refused(template):
    with pytest.raises(ConfigError, match=r"prompt\.user"):
        PromptBuilder(PromptConfig(user=template))


def test_a_constant_template_that_prints_a_null_is_refused_with_a_reason():
    with pytest.raises(ConfigError, match=r"prompt.user: \S"):
        PromptBuilder(PromptConfig(user="{{ none }}"))


@pytest.mark.parametrize(
    ("prompt", "columns"),
    [
        ({"user": "{{ a }} {{ b.c }}"}, {"a", "b"}),
        ({"user": "{{ a }}", "system": "{{ c }}"}, {"a", "c"}),
        ({"user": "{% for x in a %}{{ x }}{{ loop.index }}{% endfor %}"}, {"a"}),
        ({"user": "hello"}, set()),
        ({"user": "{{ row.a }}"}, {"a", "b", "c"}),
        ({"user": "{% set x = a %}{{ x }}"}, {"a"}),
        ({"messages": "b"}, {"b"}),
        ({"text": "c"}, {"c"}),
    ],
)
def test_the_columns_that_prompts_need(prompt, columns):
    assert PromptBuilder(PromptConfig(**prompt)).columns(["a", "b", "c"]) == columns


def test_a_column_named_row_is_a_column():
    builder = PromptBuilder(PromptConfig(user="{{ row }}"))
    assert builder.columns(["row", "b"]) == {"row"}
    assert builder.build({"row": "r"}) == [{"role": "user", "content": "r"}]


@pytest.mark.parametrize(
    "template",
    [
        "{{ a }}",
        "100 % of {{ a }}, {{ b }}%s and {{a}} again\n\n",
        "{# a #}{{ b }}{% raw %}{{ a }}{% endraw %} {{ '%' }}",
        "{{ a }}{{ 'x' }}",
        "{{ a }} {{ a.b }}",
        "{{ range }} {{ a }}",
        "{{ self }} {{ a }}",
        "{{ row }}",
        "{% if a %}{{ a }}{% endif %}{{ b }}",
        "{% set a = b %}{{ a }}",
    ],
)
def test_putting_texts_together_gives_what_jinja_gives(template):
    values = ["%s", "", "<&>", "{{ b }}", 7, 1.5, True, None, ["x"], b"b", dt.date(2026, 1, 2)]
    render, names = Sandbox().compile_template(template)
    builder = PromptBuilder(PromptConfig(user="x", system=template))
    for row in itertools.product(values, ["b", "", None], [{}, {"self": "s", "range": "r"}]):
        columns = {"a": row[0], "b": row[1], **row[2]}
        nulls = {name: NULL for name in names if columns.get(name, "") is None}
        try:
            wanted = render({"row": columns, **columns, **nulls})
        except Exception:  # noqa: BLE001 - whatever it is, it is the same error
            assert isinstance(builder.build(columns), RowError)
        else:
            assert builder.build(columns)[0]["content"] == wanted


def test_putting_texts_together_has_the_same_limit():
    half = "x" * (MAX_CHARS // 2)
    assert len(text_of({"a": half}, "{{ a }}{{ a }} ")) == MAX_CHARS + 1
    error_type, error = error_of({"a": half, "b": "y"}, user="{{ a }}{{ a }}{{ b }}")
    assert (error_type, "more than" in error) == ("template_error", True)


@pytest.mark.parametrize("name", ["range", "dict", "cycler", "joiner", "namespace"])
def test_a_column_named_like_a_global_of_jinja_is_a_column(name):
    builder = PromptBuilder(PromptConfig(user=f"{{{{ {name} }}}}"))
    assert builder.columns([name, "b"]) == {name}
    assert builder.build({name: "r"}) == [{"role": "user", "content": "r"}]


def test_columns_that_the_input_lacks_are_all_named():
    builder = PromptBuilder(PromptConfig(user="{{ titel }} {{ zzz }} {{ body }}"))
    with pytest.raises(ConfigError) as caught:
        builder.columns(["title", "body"])
    assert caught.value.problems == (
        "no column 'titel' in the input, did you mean 'title'?",
        "no column 'zzz' in the input, it has: title, body",
    )


def test_a_template_in_the_place_of_a_columns_name_is_pointed_to_its_own_key():
    with pytest.raises(ConfigError, match=r"goes in prompt\.template, prompt\.text names a column"):
        PromptBuilder(PromptConfig(text="Q: {{ question }}")).columns(["question"])


def test_a_text_column_is_the_prompt_as_it_is():
    assert built({"t": " {{ not a template }}\n"}, text="t") == " {{ not a template }}\n"


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, ("null_value", "column 't' is null, expected a prompt")),
        (5, ("bad_prompt", "column 't' is int, expected a string")),
        (["a"], ("bad_prompt", "column 't' is list, expected a string")),
        ("", ("empty_prompt", "column 't' is empty")),
        (" \n", ("empty_prompt", "column 't' is empty")),
    ],
)
def test_a_text_column_that_is_no_text_is_an_error(value, error):
    assert error_of({"t": value}, text="t") == error


def test_a_messages_column_is_the_chat_without_its_nulls():
    chat = [
        {"role": "system", "content": "s", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
    ]
    assert built({"m": chat}, messages="m") == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "tool_calls": []},
    ]


def test_sharegpts_conversations_are_chats():
    told = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b", "role": None, "content": None},
        {"role": "user", "content": "c", "from": None},
    ]
    assert [tuple(one.values()) for one in built({"c": told}, messages="c")] == [
        *[("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    ]
    for wrong in ({"from": "mars", "value": "x"}, {"from": ["human"], "value": "x"}):
        assert error_of({"c": [wrong]}, messages="c")[1].startswith("column 'c'[0] has no role")
    error = error_of({"c": [{"from": "human", "value": 3}]}, messages="c")[1]
    assert error.startswith("column 'c'[0].content is neither text nor parts")


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"a": {"b": {"c": "x"}}}, "x"),
        ({"a.b": {"c": "x"}, "a": {"b": {"c": "y"}}}, "x"),
        ({"a.b.c": "x", "a": None}, "x"),
        ({"a": {"b.c": "x"}}, "x"),
        ({"a": {"b": None}}, None),
        ({"a": None}, None),
        ({"a": ["b"]}, None),
    ],
)
def test_a_name_with_dots_is_looked_up_inside(values, wanted):
    builder = PromptBuilder(PromptConfig(text="a.b.c"))
    found = builder.build(values)
    assert found == (wanted or RowError("null_value", "column 'a.b.c' is null, expected a prompt"))
    (column,) = builder.columns(list(values)[:1])
    assert column == next(iter(values))
    with pytest.raises(ConfigError, match=r"no column 'a\.b\.c' in the input"):
        builder.columns(["b", "ab"])


def test_a_prefill_begins_the_assistants_turn():
    begun = {"role": "assistant", "content": "x is "}
    ask = {"role": "user", "content": "x"}
    for form in ({"user": "{{ a }}"}, {"messages": "m"}):
        made = {"prefill": "{{ b }}", **form}
        values = {"a": "x", "b": "x is ", "m": [ask]}
        assert built(values, **made) == [ask, begun]
        assert built({**values, "b": ""}, **made) == [ask]
        assert error_of({**values, "b": None}, **made)[0] == "null_value"
    text = "the chat ends with the assistant already, and prompt.prefill begins its turn"
    assert error_of({"m": [ask, begun]}, messages="m", prefill="y") == ("bad_messages", text)
    with pytest.raises(ValidationError, match=r"prefill goes with user or messages, not"):
        PromptConfig(template="x", prefill="y")
    builder = PromptBuilder(PromptConfig(messages="m", prefill="{{ b }}"))
    assert builder.columns(["m", "b", "c"]) == {"m", "b"}
    probe = PromptBuilder(PromptConfig(user="x", prefill="y")).probe()
    assert [message["role"] for message in probe] == ["user", "assistant"]


def test_a_chat_that_the_assistant_goes_on_with_has_another_key_than_before_it_did():
    asked, begun = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    old = b'recipe[{"content":"a","role":"user"},{"content":"b","role":"assistant"}]'
    assert key_of([asked, begun], messages="text") == key_of("a", user="{{ text }}", prefill="b")
    assert (
        key_of([asked, begun], messages="text") != hashlib.blake2b(old, digest_size=16).hexdigest()
    )
    called = {**begun, "tool_calls": [{"name": "f"}]}
    for chat, is_one in (
        ([asked, begun], True),
        ([begun, asked], False),
        ([asked, called], False),
        ([asked, {**begun, "content": ""}], False),
        ("text", False),
        (("a", "b"), False),
    ):
        assert is_continued(chat) == is_one


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, ("null_value", "column 'm' is null, expected a prompt")),
        ([], ("bad_messages", "column 'm' is an empty list, expected a list of {role, content}")),
        ("hi", ("bad_messages", "column 'm' is str, expected a list of {role, content}")),
        ({}, ("bad_messages", "column 'm' is dict, expected a list of {role, content}")),
        (["hi"], ("bad_messages", "column 'm'[0] has no role, expected {role, content}")),
        (
            [{"role": "user", "content": "a"}, {"content": "b"}],
            ("bad_messages", "column 'm'[1] has no role, expected {role, content}"),
        ),
        ([{"role": 3}], ("bad_messages", "column 'm'[0] has no role, expected {role, content}")),
        *(
            (
                [{"role": "system", "content": "s"}, {"role": "user", "content": content}],
                (
                    "bad_messages",
                    "column 'm'[1].content is neither text nor parts, expected a string or a "
                    "list of parts {type, ...}",
                ),
            )
            for content in (5, ["x"], [None], [{"text": "a"}], [{"type": 1}], {"type": "text"}, b"")
        ),
    ],
)
def test_a_messages_column_that_is_no_chat_is_an_error(value, error):
    assert error_of({"m": value}, messages="m") == error
    images = {"images": "i", "images_folder": "/"}
    assert error_of({"m": value, "i": ["a.png"]}, messages="m", **images) == error


def requests_of(values, *, recipe="recipe", seed=None, **prompt):
    prompt = {"user": None, **prompt} if prompt else {"user": "{{ text }}"}
    sampling = {"temperature": 0.0} if seed is None else {"temperature": 1.0, "seed": seed}
    builder = request_builder(job(prompt=prompt, sampling=sampling), recipe=recipe)
    rows = RowBatch(
        2, range(10, 10 + len(values)), values, batch([0]).carried, {}, batch([0]).skipped
    )
    return list(builder.of(rows))


def key_of(value, **how):
    (request,) = requests_of([{"text": value}], **how)
    return request.request_key


def test_a_batch_becomes_one_entry_a_row_in_order():
    given_batch = batch([3, 4, 5], segment=1, errors={4: RowError("bad", "bad")})
    first, second, third = request_builder().of(given_batch)
    assert (first.request_id, first.ordinal, first.index) == (0, Ordinal(1, 3), 0)
    assert second == Result(Ordinal(1, 4), second.batch, 1, None, None, RowError("bad", "bad"))
    assert (third.request_id, third.ordinal, third.index) == (1, Ordinal(1, 5), 2)


def test_what_waits_keeps_the_carried_columns_and_not_the_parsed_values():
    given_batch = batch([3, 4])
    for request in request_builder().of(given_batch):
        assert request.batch.values == ()
        assert request.batch.carried is given_batch.carried
        assert request.batch.carried["id"][request.index].as_py() == f"0/{request.ordinal.row}"


def test_request_ids_go_on_over_batches():
    builder = request_builder()
    ids = [r.request_id for rows in ([1, 2], [3]) for r in builder.of(batch(rows))]
    assert ids == [0, 1, 2]


def test_equal_prompts_have_equal_keys_wherever_they_stand():
    first, second, other = requests_of([{"text": "a"}, {"text": "a"}, {"text": "b"}])
    assert first.request_key == second.request_key != other.request_key
    assert len(bytes.fromhex(first.request_key)) == 16
    assert first.request_key == key_of("a")


def test_a_key_does_not_change_between_versions():
    """Reuse across runs rests on it: a new value here makes users compute everything again."""
    content = b'recipe[{"content":"a","role":"user"}]'
    assert key_of("a") == hashlib.blake2b(content, digest_size=16).hexdigest()
    assert key_of("a") == "37fabe7459f015329928f960c5e20c10"


def test_keys_differ_by_recipe_and_by_kind_of_prompt():
    keys = [
        key_of("a"),
        key_of("a", recipe="other"),
        key_of("a", text="text"),
        key_of("a", user="{{ text }} "),
        key_of("a", user="{{ text }}", system="s"),
        key_of([{"role": "assistant", "content": "a"}], messages="text"),
    ]
    assert len(set(keys)) == len(keys)


def test_a_chat_in_a_column_has_the_key_of_the_same_chat_from_templates():
    chat = [{"content": "a", "role": "user", "name": None}]
    assert key_of(chat, messages="text") == key_of("a")


@given(st.lists(st.text(max_size=5), min_size=2, max_size=6))
def test_keys_are_equal_exactly_where_texts_are(texts):
    keyed = requests_of([{"text": f"x{text}"} for text in texts])
    for one, two in itertools.combinations(range(len(texts)), 2):
        assert (keyed[one].request_key == keyed[two].request_key) is (texts[one] == texts[two])


@pytest.mark.parametrize(
    "content", ["\ud800", 2**70, {1, 2}, object(), b"x"], ids=["surrogate", "big", "set", "o", "b"]
)
def test_a_chat_that_is_not_json_is_an_error_row(content):
    chat = [{"role": "user", "content": [{"type": "text", "text": content}]}]
    (result,) = requests_of([{"text": chat}], messages="text")
    assert isinstance(result, Result)
    assert result.error.error_type == "bad_prompt"
    assert result.error.error.startswith("the prompt is not text: ")
    assert result.request_key is None


@pytest.mark.parametrize(
    "prompt", [{"text": "text"}, {"user": "{{ text }}"}, {"messages": "text"}], ids=str
)
def test_a_prompt_beyond_any_context_window_is_an_error_row(prompt):
    text = "é" * (9 << 20)  # Fewer characters than the limit, more bytes.
    value = [{"role": "user", "content": text}] if "messages" in prompt else text
    (result,) = requests_of([{"text": value}], **prompt)
    assert isinstance(result, Result)
    assert result.error == RowError("bad_prompt", "the prompt is longer than 16 MiB")


def test_an_error_that_quotes_a_lone_surrogate_or_a_megabyte_can_be_written():
    error = error_of({"a": "x"}, user='{{ a }}{{ "{:x\\ud800}".format(1) }}')[1]
    assert r"Invalid format specifier 'x\ud800'" in error
    error.encode()
    assert len(error_of({"a": "x" * 2**20}, user="{{ row[a] }}")[1]) < 400


def test_a_lone_surrogate_in_a_template_value_is_an_error_row():
    (result,) = requests_of([{"text": "a\ud800"}])
    assert result.error.error_type == "bad_prompt"


def test_dates_in_templates_are_printed_as_python_prints_them():
    assert text_of({"d": dt.date(2024, 2, 29)}, "{{ d }}") == "2024-02-29"


def test_without_a_seed_requests_have_none():
    (request,) = requests_of([{"text": "a"}])
    assert isinstance(request, Request)
    assert request.seed is None


def test_equal_prompts_have_seeds_of_their_own():
    first, second = requests_of([{"text": "a"}, {"text": "a"}], seed=7)
    assert first.request_key == second.request_key
    assert first.seed == row_seed(7, Ordinal(2, 10))
    assert second.seed == row_seed(7, Ordinal(2, 11))
    assert first.seed != second.seed


def test_row_seeds_are_fixed_for_ever():
    assert row_seed(0, Ordinal(0, 0)) == 3218101674565419774


@given(st.integers(0, 2**62 - 1), st.integers(0, 2**31), st.integers(0, 2**40))
def test_row_seeds_fit_what_vllm_takes(job_seed, segment, row):
    assert 0 <= row_seed(job_seed, Ordinal(segment, row)) < 2**62


def test_every_attempt_and_every_later_plan_draws_otherwise():
    at = Ordinal(3, 4)
    seeds = {row_seed(7, at, attempt, plan) for attempt in (1, 2, 11) for plan in (0, 1, 11)}
    assert len(seeds) == 9
    assert row_seed(7, at) == row_seed(7, at, 1, 0)
    warm = job(sampling={"temperature": 1.0, "seed": 7}).sampling
    assert Seeds(warm, 2).of(at, {}, 3) == row_seed(7, at, 3, 2)
    assert Seeds(warm, 2).of(at, {"temperature": 0}, 3) is None


def test_row_seeds_differ_by_job_seed_segment_and_row():
    at = itertools.product((0, 1, 11), (0, 1, 11), (0, 1, 11))
    seeds = {row_seed(job, Ordinal(segment, row)) for job, segment, row in at}
    assert len(seeds) == 27


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% if null %}{{ null }}{% else %}unknown{% endif %}", "unknown"),
        ("{{ null or 'unknown' }}", "unknown"),
        ("{{ null|default('unknown', true) }}", "unknown"),
        ("{% if null is none %}unknown{% endif %}", "unknown"),
        ("{% if null == none %}unknown{% endif %}", "unknown"),
        ("{{ null|tojson }}", "null"),
        ("{{ {'a': null}|tojson }}", '{"a": null}'),
    ],
)
def test_a_null_may_be_tested_and_written_as_json(template, text):
    assert built({"null": None}, user=template) == [{"role": "user", "content": text}]


EXAMPLES = [
    {"user": "my card was charged twice", "assistant": {"label": "billing"}},
    {"user": "where is it", "assistant": "shipping"},
]


def test_examples_stand_between_what_all_rows_share_and_the_row():
    built = PromptBuilder(
        PromptConfig(system="Label it.", user="{{ text }}", examples=EXAMPLES)
    ).build({"text": "hello {{ not a template }}"})
    assert built == [
        {"role": "system", "content": "Label it."},
        {"role": "user", "content": "my card was charged twice"},
        {"role": "assistant", "content": '{"label":"billing"}'},
        {"role": "user", "content": "where is it"},
        {"role": "assistant", "content": "shipping"},
        {"role": "user", "content": "hello {{ not a template }}"},
    ]


def test_an_example_answer_is_written_as_json_whatever_integers_it_has():
    small, large = ({"n": n, "t": "\u00e9", "x": [1e16, 0.5]} for n in (2**64 - 1, 2**70))
    texts = [turns(Example(user="q", assistant=answer))[1]["content"] for answer in (small, large)]
    assert texts[0] == '{"n":18446744073709551615,"t":"\u00e9","x":[1e+16,0.5]}'
    assert texts[1].startswith('{"n":1180591620717411303424,"t":"\u00e9","x":[')
    assert json.loads(texts[1]) == large
