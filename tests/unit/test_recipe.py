"""What changes the fingerprint, what does not, and how a change reads."""

from __future__ import annotations

import hashlib

import pytest

from batchgen.job.recipe import SPEED_OPTIONS, diff, fingerprint, make_recipe

FILES = {"config.json": "aa", "model.safetensors": "bb"}


@pytest.fixture
def recipe_of(make_job):
    def make(files=FILES, **tables):
        return make_recipe(make_job(**tables), files)

    return make


def test_a_recipe_is_these_values(recipe_of):
    assert recipe_of(prompt={"system": "s"}) == {
        "prompt": {"user": "{{ text }}", "system": "s", "chat_template_kwargs": {}},
        "model": {"backend": "echo", "trust_remote_code": False, "files": FILES},
        "sampling": {"max_tokens": 32, "temperature": 0.0, "seed": 0},
    }


CHANGES = [
    {"prompt": {"user": "{{ text }} "}},
    {"prompt": {"system": "s"}},
    {"prompt": {"user": None, "text": "text"}},
    {"prompt": {"user": None, "messages": "text"}},
    {"prompt": {"chat_template_kwargs": {"enable_thinking": False}}},
    {"model": {"dtype": "float16"}},
    {"model": {"quantization": "fp8"}},
    {"model": {"max_model_len": 100}},
    {"model": {"trust_remote_code": True}},
    {"model": {"backend": "vllm", "name": "m"}},
    {"model": {"engine": {"kv_cache_dtype": "fp8"}}},
    {"model": {"engine": {"unheard_of": 1}}},
    {"sampling": {"max_tokens": 33}},
    {"sampling": {"temperature": 0.1}},
    {"sampling": {"top_p": 0.9}},
    {"sampling": {"stop": ["\n"]}},
    {"sampling": {"seed": 1}},
    {"sampling": {"n": 2}},
    {"sampling": {"extra": {"logit_bias": {"1": 2.0}}}},
    {"prompt": {"prefill": "So"}},
    {"sampling": {"logprobs": 5}},
    {"sampling": {"column": "own"}},
    {"prompt": {"examples": [{"user": "a", "assistant": "b"}]}},
    {"prompt": {"tools": [{"type": "function"}]}},
    {"prompt": {"images": "pics"}},
    {"model": {"reasoning_parser": "qwen3"}},
    {"model": {"tool_call_parser": "hermes"}},
    {"model": {"lora": {"a": "adapters/a"}, "lora_column": "adapter"}},
    {"model": {"lora": {"a": "adapters/a"}, "lora_column": "other"}},
    {"output": {"schema": {"type": "object"}}},
    {"output": {"schema": {"type": "array"}}},
    # The model answers in this order, and so do the columns stand.
    {"output": {"schema": {"properties": {"a": {}, "b": {}}}}},
    {"output": {"schema": {"properties": {"b": {}, "a": {}}}}},
    {"prompt": {"examples": [{"user": "a", "assistant": {"x": 1, "y": 2}}]}},
    {"prompt": {"examples": [{"user": "a", "assistant": {"y": 2, "x": 1}}]}},
    {"output": {"schema_column": "s"}},
    {"output": {"choice": ["a", "b"]}},
    {"output": {"choice": ["b", "a"]}},
    {"output": {"regex": "a"}},
    {"output": {"grammar": "a"}},
    {"output": {"json_object": True}},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_changes_answers_changes_the_fingerprint_and_is_told(recipe_of, change):
    before, after = recipe_of(), recipe_of(**change)
    assert fingerprint(before) != fingerprint(after)
    assert diff(before, after)


def test_every_change_has_a_fingerprint_of_its_own(recipe_of):
    found = {fingerprint(recipe_of(**change)) for change in [{}, *CHANGES]}
    assert len(found) == len(CHANGES) + 1


@pytest.mark.parametrize("files", [{}, {**FILES, "config.json": "ab"}, {**FILES, "x.json": "cc"}])
def test_another_model_is_another_recipe(recipe_of, files):
    assert fingerprint(recipe_of(files)) != fingerprint(recipe_of())
    assert diff(recipe_of(), recipe_of(files))


@pytest.mark.parametrize(
    "change",
    [
        {"input": {"where": "id = 'a'"}},
        {"input": {"limit": 1}},
        {"output": {"path": "elsewhere"}},
        {"output": {"prefix": "x_", "rows_per_file": 5, "compression": "lz4"}},
        {"run": {"flush_s": 1.0, "max_in_flight": 4}, "gate": {"max_error_rate": 0.5}},
        {"model": {"name": "another-name"}},
        {"model": {"max_num_seqs": 4, "gpu_memory_utilization": 0.5, "tensor_parallel_size": 2}},
        *({"model": {"engine": {option: 1}}} for option in sorted(SPEED_OPTIONS)),
    ],
    ids=str,
)
def test_what_moves_only_time_or_place_is_no_other_recipe(recipe_of, change):
    before, after = recipe_of(), recipe_of(**change)
    assert fingerprint(before) == fingerprint(after)
    assert diff(before, after) == []


def test_a_template_in_a_file_is_the_same_recipe_as_in_the_job(tmp_path, recipe_of):
    (tmp_path / "user.j2").write_text("{{ text }}", encoding="utf-8")
    from_file = recipe_of(prompt={"user": None, "user_file": "user.j2"})
    assert fingerprint(from_file) == fingerprint(recipe_of())


def test_a_chat_template_counts_by_its_text_and_not_by_its_name(tmp_path, recipe_of):
    made = []
    for name, text in [("a.jinja", "A"), ("b.jinja", "A"), ("a.jinja", "B")]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        made.append(recipe_of(prompt={"chat_template_file": name}))
    assert fingerprint(made[0]) == fingerprint(made[1]) != fingerprint(made[2])
    assert diff(made[0], made[2]) == ["prompt.chat_template: 'A' -> 'B'"]


def test_the_order_of_keys_does_not_matter():
    assert fingerprint({"a": {"x": 1, "y": 2}, "b": 3}) == fingerprint(
        {"b": 3, "a": {"y": 2, "x": 1}}
    )


def test_a_fingerprint_does_not_change_between_versions():
    """Plans in users' folders hold it."""
    content = '{"a":["\u00e9",1,null]}'.encode()
    assert fingerprint({"a": ["\u00e9", 1, None]}) == "1e867838d5ca67cfb41a5ff7fc414684"
    assert hashlib.blake2b(content, digest_size=16).hexdigest().startswith("1e867838d5ca67cf")


def test_diff_lines_are_sorted_and_say_both_values():
    old = {"prompt": {"user": "a", "system": "s"}, "sampling": {"max_tokens": 5, "stop": ["x"]}}
    new = {"prompt": {"user": "b"}, "sampling": {"max_tokens": 5, "stop": ["x", "y"], "seed": 0}}
    assert diff(old, new) == [
        "prompt.system: 's' -> not set",
        "prompt.user: 'a' -> 'b'",
        "sampling.seed: not set -> 0",
        "sampling.stop: ['x'] -> ['x', 'y']",
    ]


def test_long_values_are_cut():
    (line,) = diff({"a": "x" * 500}, {"a": 1})
    assert line == f"a: '{'x' * 116}... -> 1"


@pytest.mark.parametrize(("old", "new"), [(1, True), (1, 1.0), (False, 0)])
def test_whatever_changes_the_fingerprint_has_a_line_in_the_diff(old, new):
    assert fingerprint({"a": old}) != fingerprint({"a": new})
    assert diff({"a": old}, {"a": new})


def test_the_form_of_answers_is_named_as_in_the_job_file():
    assert diff({"form": {"grammar": "a"}}, {"form": {"grammar": "b"}}) == [
        "output.grammar: 'a' -> 'b'"
    ]


def sides(old, new):
    (line,) = diff({"a": old}, {"a": new})
    return line.removeprefix("a: ").split(" -> ")


LONG = " ".join(f"word{n}" for n in range(60))


@pytest.mark.parametrize("wrap", [str, lambda text: [text, "z"]])
def test_long_values_are_cut_around_their_first_difference(wrap):
    old, new = sides(wrap(LONG), wrap(LONG.replace("word40", "WORD40")))
    for text, word in ((old, "word40"), (new, "WORD40")):
        assert f"word39 {word} word41" in text
        assert text.strip("'").startswith("...")
        assert text.strip("'").endswith("...")
        assert len(text) <= 122
    assert old != new


def test_a_difference_at_the_end_is_shown_to_the_end():
    old, new = sides(LONG, LONG + " it's new")
    assert old.endswith("word58 word59'")
    assert new.endswith("word58 word59 it's new\"")
    assert old[:20] == new[:20].replace('"', "'")


def test_a_difference_near_the_start_is_shown_from_the_start():
    old, new = sides("Please " + LONG, "Do " + LONG)
    assert (old[:14], new[:10]) == ("'Please word0 ", "'Do word0 ")
    assert old.endswith("...'")


@pytest.mark.parametrize("at", [0, 3, 59, 60, 61, 117, 118, 119, 120, 121, 300, 399])
def test_two_unlike_texts_never_look_alike(at):
    text = "x" * 400
    old, new = sides(text, f"{text[:at]}y{text[at + 1 :]}")
    assert old != new
