"""Tasks other than to generate: what goes with each, what a model can do, how texts are cut."""

from __future__ import annotations

import json
import math
import struct
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.answers.numbers import number_columns
from batchgen.core.data import column_of
from batchgen.core.errors import ConfigError
from batchgen.core.records import EngineSpec, RowError, Sample, TaskFacts, TokenLogprobs, Verdict
from batchgen.engine.base import HostedRequest, task_facts
from batchgen.engine.vllm.encoder import ChatStyle, encode
from batchgen.engine.vllm.pooling import (
    CONTINUED,
    Fit,
    Likelihoods,
    Pieces,
    encode_pair,
    pairs_of,
    tasks_of,
)
from batchgen.job.load import parse_job
from batchgen.job.recipe import make_recipe
from batchgen.pipeline.prepare import check
from batchgen.prompt.builder import PromptBuilder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from batchgen.job.model import JobConfig

PROMPTS: dict[str, dict[str, str]] = {
    "embed": {"template": "{{ text }}"},
    "classify": {"text": "text"},
    "score": {"query": "{{ q }}", "passage": "{{ text }}"},
    "loglikelihood": {"template": "{{ q }}", "continuation": "{{ text }}"},
}


def tables(task: str, **changes: Any) -> dict[str, Any]:
    made = {
        "task": task,
        "input": {"path": "rows.jsonl"},
        "prompt": PROMPTS.get(task, {"user": "{{ text }}"}),
        "model": {"backend": "echo"},
        "output": {"path": "out"},
    }
    if task == "generate":
        made["sampling"] = {"max_tokens": 4}
    for name, table in changes.items():
        made[name] = {**made.get(name, {}), **table} if isinstance(table, dict) else table
    return made


def load(tmp_path: Path, task: str, **changes: Any) -> JobConfig:
    return parse_job(tables(task, **changes), base=tmp_path, where="job.toml")


@pytest.mark.parametrize(
    ("task", "changes", "problem"),
    [
        ("embed", {"sampling": {"max_tokens": 4}}, "[sampling] is for answers that are generated"),
        ("embed", {"retry": [{"max_tokens": 4}]}, "[retry] is for answers that are generated"),
        ("embed", {"prompt": {"user": "x"}}, "found user and template, expected exactly one"),
        ("score", {"prompt": {"passage": None}}, "query and passage go together"),
        ("embed", {"output": {"choice": ["a"]}}, "output.choice is for answers"),
        ("classify", {"output": {"schema": {"type": "object"}}}, "output.schema is for answers"),
        ("classify", {"pooling": {"dimensions": 4}}, "pooling.dimensions does not go with"),
        ("score", {"pooling": {"too_long": "chunk"}}, "pooling.too_long = 'chunk' is for embed"),
        ("loglikelihood", {"pooling": {"too_long": "chunk"}}, "texts, not a continuation"),
        ("loglikelihood", {"pooling": {"dimensions": 4}}, "pooling.dimensions does not go with"),
        ("loglikelihood", {"prompt": {"template": None}}, "found none of them, expected exactly"),
        ("loglikelihood", {"prompt": {"template": None, "text": "a"}}, "without template"),
        ("loglikelihood", {"sampling": {"max_tokens": 4}}, "[sampling] is for answers that are"),
        ("embed", {"prompt": {"continuation": "a"}}, "prompt.continuation does not go with task"),
        ("embed", {"pooling": {"token_logprobs": True}}, "pooling.token_logprobs does not go with"),
        ("generate", {"pooling": {"too_long": "refuse"}}, "pooling.too_long does not go with"),
        ("embed", {"pooling": {"prefix": "a", "prompt_name": "b"}}, "expected one"),
        ("rank", {}, "task: 'rank' is wrong, expected: 'generate', 'embed'"),
    ],
)
def test_what_does_not_go_with_a_task_is_refused(
    tmp_path: Path, task: str, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, task, **changes)
    assert problem in str(error.value)


@pytest.mark.parametrize("task", ["embed", "classify"])
def test_a_chat_or_a_pair_is_no_text(tmp_path: Path, task: str) -> None:
    for prompt in ({"user": "x"}, {"messages": "m"}, {"query": "a", "passage": "b"}):
        with pytest.raises(ConfigError, match="does not go with task"):
            parse_job({**tables(task), "prompt": prompt}, base=tmp_path, where="job.toml")


def test_a_job_that_generates_has_the_recipe_that_it_had(tmp_path: Path) -> None:
    recipe = make_recipe(load(tmp_path, "generate"), {})
    assert sorted(recipe) == ["model", "prompt", "sampling"]
    assert recipe == make_recipe(parse_job(without_task(), base=tmp_path, where="job.toml"), {})
    embed = make_recipe(load(tmp_path, "embed", pooling={"dimensions": 8}), {})
    assert (embed["task"], embed["pooling"]) == ("embed", {"dimensions": 8})
    assert "sampling" not in embed


def without_task() -> dict[str, Any]:
    made = tables("generate")
    del made["task"]
    return made


def model(folder: Path, **files: Any) -> EngineSpec:
    """A model's folder with these JSON files, and a spec for it."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return EngineSpec("vllm", str(folder), {}, {}, task="embed")


POOLING = [
    {"path": "", "type": "st.models.Transformer"},
    {"path": "1", "type": "st.models.Pooling"},
]


@pytest.mark.parametrize(
    ("config", "kwargs", "tasks"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, {}, ("generate", "loglikelihood")),
        ({"architectures": ["LlamaForCausalLM"]}, {"convert": "embed"}, ("embed", "score")),
        ({"architectures": ["BertModel"]}, {}, ("embed", "score")),
        ({"architectures": ["BertForSequenceClassification"]}, {}, ("classify",)),
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "x"}},
            {},
            ("score", "classify"),
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"]},
            {
                "hf_overrides": {
                    "architectures": ["Qwen3ForSequenceClassification"],
                    "num_labels": 1,
                }
            },
            ("score", "classify"),
        ),
        ({"architectures": ["BertForTokenClassification"]}, {}, ()),
    ],
)
def test_the_files_of_a_model_tell_what_it_can_do(
    tmp_path: Path, config: dict[str, Any], kwargs: dict[str, Any], tasks: Sequence[str]
) -> None:
    spec = model(tmp_path / "m", config=config)
    given = EngineSpec("vllm", spec.model, kwargs, {}, task="embed")
    assert tuple(tasks_of(given)) == tasks
    has_pooling = model(tmp_path / "m", modules=POOLING)
    if config["architectures"][0].endswith("ForCausalLM") and not kwargs:
        assert tuple(tasks_of(has_pooling)) == ("embed", "score")


def test_a_task_that_a_model_cannot_do_is_refused_with_those_that_it_can(tmp_path: Path) -> None:
    spec = model(tmp_path / "m", config={"architectures": ["BertForSequenceClassification"]})
    with pytest.raises(ConfigError, match=r"task: 'embed': by its files .* can do classify;"):
        task_facts(spec)
    for task in ("embed", "loglikelihood"):
        job = load(tmp_path, task, model={"backend": "vllm", "name": str(tmp_path / "m")})
        with pytest.raises(ConfigError, match="can do classify"):
            check(job)


def test_an_engine_of_ones_own_without_tasks_generates_only() -> None:
    spec = EngineSpec("tests.fakes:FakeEngine", "", {}, {}, task="score")
    with pytest.raises(ConfigError, match=r"'score': the engine .* can do generate only"):
        task_facts(spec)


def test_a_server_is_not_asked_for_likelihoods(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", config={"architectures": ["LlamaForCausalLM"]}).model
    spec = EngineSpec("openai", folder, {}, {}, task="loglikelihood")
    with pytest.raises(ConfigError, match="needs an engine here, not a server"):
        task_facts(spec)
    assert task_facts(replace(spec, backend="vllm")) == TaskFacts(2)


@pytest.mark.parametrize(
    ("config", "pooling", "found"),
    [
        ({"hidden_size": 32}, {}, 32),
        ({"hidden_size": 32, "matryoshka_dimensions": [8, 16]}, {"dimensions": 8}, 8),
        ({"hidden_size": 32, "is_matryoshka": True}, {"dimensions": 9}, 9),
        ({"hidden_size": 32}, {"dimensions": 32}, 32),
        ({"hidden_size": 32}, {"dimensions": 8}, "not said to be trained for fewer than 32"),
        ({"hidden_size": 32, "matryoshka_dimensions": [8]}, {"dimensions": 9}, "the model has 8"),
        ({"hidden_size": 32, "is_matryoshka": True}, {"dimensions": 64}, "the model has 32"),
        ({"text_config": {"hidden_size": 16}}, {}, 16),
        ({}, {}, "does not say how many numbers"),
    ],
)
def test_the_files_tell_how_long_a_vector_is(
    tmp_path: Path, config: dict[str, Any], pooling: dict[str, Any], found: int | str
) -> None:
    folder = model(tmp_path / "m", config={"architectures": ["BertModel"], **config}).model
    spec = EngineSpec("vllm", folder, {}, {}, task="embed", pooling=pooling)
    if isinstance(found, int):
        assert task_facts(spec).size == found
    else:
        with pytest.raises(ConfigError, match=found):
            task_facts(spec)


def test_a_dense_module_is_the_last_word_on_the_size(tmp_path: Path) -> None:
    modules = [*POOLING, {"path": "2", "type": "st.models.Dense"}]
    config = {"architectures": ["BertModel"], "hidden_size": 32}
    spec = model(
        tmp_path / "m", config=config, modules=modules, **{"2__config": {"out_features": 7}}
    )
    assert task_facts(spec).size == 7


def test_a_prompt_is_found_by_its_name(tmp_path: Path) -> None:
    files: dict[str, Any] = {"config": {"architectures": ["BertModel"], "hidden_size": 4}}
    files["config_sentence_transformers"] = {"prompts": {"query": "query: ", "passage": ""}}
    folder = model(tmp_path / "m", **files).model

    def prefix(**pooling: str) -> str:
        return task_facts(EngineSpec("vllm", folder, {}, {}, task="embed", pooling=pooling)).prefix

    assert [prefix(), prefix(prompt_name="query"), prefix(prefix="my: ")] == ["", "query: ", "my: "]
    with pytest.raises(ConfigError, match=r"no prompt 'querry'; did you mean 'query'"):
        prefix(prompt_name="querry")


class Letters:
    """A tokenizer: a token a letter, with marks around a text."""

    model_input_names = ("input_ids",)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = [ord(letter) for letter in text]
        return [1, *ids, 2, 3] if add_special_tokens else ids

    def __call__(self, text: str, text_pair: str, **_: object) -> dict[str, list[int]]:
        ids = [1, *map(ord, text), 2, *map(ord, text_pair), 2, 3]
        second = len(text_pair) + 2
        return {"input_ids": ids, "token_type_ids": [0] * (len(ids) - second) + [1] * second}


WORDS = st.text(st.characters(min_codepoint=10, max_codepoint=99), max_size=60)


@given(
    WORDS, st.integers(4, 30), st.sampled_from(["truncate", "chunk"]), st.sampled_from(["", "q:"])
)
def test_what_is_cut_fits_and_keeps_its_marks_and_its_prefix(
    text: str, limit: int, how: str, prefix: str
) -> None:
    tokenizer = Letters()
    fit = Fit(tokenizer, limit, {"too_long": how}, prefix)
    ids = array("i", tokenizer.encode(prefix + text))
    pieces = fit.pieces(ids)
    if isinstance(pieces, RowError):
        assert limit - 3 <= len(prefix) <= len(ids) - 3
        return
    assert all(len(piece) <= limit for piece in pieces)
    texts = ["".join(map(chr, piece[1:-2])) for piece in pieces]
    assert all(piece[0] == 1 and list(piece[-2:]) == [2, 3] for piece in pieces)
    assert all(one.startswith(prefix) for one in texts)
    whole = "".join(one.removeprefix(prefix) for one in texts)
    assert whole == (text if how == "chunk" or len(ids) <= limit else text[: len(whole)])
    assert len(pieces) == 1 or len(ids) > limit


def test_a_text_that_is_too_long_is_refused_unless_the_job_says_otherwise() -> None:
    found = Fit(Letters(), 8, {}).pieces(array("i", range(9)))
    assert found == RowError(
        "prompt_too_long", "the text has 9 tokens, the model takes 8 (max_model_len)"
    )
    assert Fit(Letters(), 8, {}).pieces(array("i", range(8))) == [array("i", range(8))]


def test_a_pair_is_cut_in_its_second_text_alone() -> None:
    tokenizer = Letters()
    joined = encode_pair(tokenizer, "joined", ("abc", "defghij"))
    assert joined.boundary == 5
    (piece,) = Fit(tokenizer, 10, {"too_long": "truncate"}).pieces(joined.first, joined.boundary)
    assert list(piece) == [1, *map(ord, "abc"), 2, *map(ord, "def"), 2, 3]
    refused = Fit(tokenizer, 7, {"too_long": "truncate"}).pieces(joined.first, joined.boundary)
    assert isinstance(refused, RowError)


def test_how_a_pair_is_read_depends_on_the_model(tmp_path: Path) -> None:
    reader = {"architectures": ["BertForSequenceClassification"], "num_labels": 1}
    assert pairs_of(model(tmp_path / "a", config=reader)) == "joined"
    assert pairs_of(model(tmp_path / "b", config={**reader, "use_sep_token": False})) == "in a row"
    assert pairs_of(model(tmp_path / "c", config={"architectures": ["BertModel"]})) == "apart"
    apart = encode_pair(Letters(), "apart", ("a", "b"))
    assert (apart.num_tokens, list(apart.second or ())) == (8, [1, 98, 2, 3])


@pytest.mark.parametrize(
    ("prompt", "continuation", "pair"),
    [
        ("a b", " c", ("a b", " c")),
        ("a b \n", "c", ("a b", " \nc")),
        ("", " c", ("", " c")),
        ("  ", "c", ("", "  c")),
    ],
)
def test_blanks_at_the_end_of_a_prompt_belong_to_its_continuation(
    tmp_path: Path, prompt: str, continuation: str, pair: tuple[str, str]
) -> None:
    builder = PromptBuilder(load(tmp_path, "loglikelihood").prompt, may_be_empty=True)
    assert builder.build({"q": prompt, "text": continuation}) == pair


class Twos:
    """A tokenizer: two letters a token, as many as there are; with or without a mark before."""

    def __init__(self, start: int | None, *, adds_it: bool) -> None:
        self.bos_token_id, self.eos_token_id, self._adds = start, None, adds_it

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        pairs = (text[at : at + 2] for at in range(0, len(text), 2))
        tokens = [int.from_bytes(pair.encode(), "big") for pair in pairs]
        return [self.bos_token_id or 0, *tokens] if self._adds else tokens

    def decode(self, tokens: list[int]) -> str:
        return str(tokens)


@pytest.mark.parametrize("adds_it", [False, True])
@pytest.mark.parametrize(
    ("prompt", "num"),
    [
        (("abcd", "ef"), 1),  # Both end where a token does.
        (("abc", "def"), 1),  # A token reaches over: it counts to the prompt, as in lm-eval.
        (("abc", "d"), 0),
        (("", "abcd"), 2),
        ("abcd", 2),
        (("ab", ""), 0),
        ("", 0),
    ],
)
def test_the_boundary_is_where_lm_eval_draws_it(prompt: Any, num: int, *, adds_it: bool) -> None:
    tokenizer = Twos(7, adds_it=adds_it)
    (one,) = encode(tokenizer, [HostedRequest(0, prompt, None)], ChatStyle(None, {}, (), CONTINUED))
    ids = one.token_ids or array("i")
    assert len(ids) - one.boundary == num
    whole = "".join(prompt)
    has_start = adds_it or not isinstance(prompt, tuple) or not prompt[0]
    assert list(ids) == [7] * has_start + Twos(None, adds_it=False).encode(whole)


def likelihoods(limit: int, **pooling: Any) -> Likelihoods:
    spec = EngineSpec("vllm", "", {}, {}, task="loglikelihood", pooling=pooling)
    return Likelihoods(spec, limit, Twos(7, adds_it=False), "params")


class Output:
    """As vLLM's, flat: of token t the log probability -t and the rank t."""

    def __init__(self, token_ids: Sequence[int], num_missing: int = 0) -> None:
        self.prompt_token_ids = token_ids
        self.logprobs = [float(-token) for token in token_ids][1 + num_missing :]
        self.ranks = list(token_ids)[1 + num_missing :]

    @property
    def prompt_logprobs(self) -> Output | None:
        return self if self.logprobs else None


@given(
    st.integers(2, 60), st.integers(1, 59), st.integers(3, 30), st.sampled_from(["chunk", "cut"])
)
def test_each_token_of_a_continuation_counts_once(
    num: int, boundary: int, limit: int, how: str
) -> None:
    # Only texts alone are read in pieces.
    boundary = 1 if how == "chunk" else min(boundary, num - 1)
    asked = likelihoods(limit, too_long={"cut": "truncate"}.get(how, how), token_logprobs=True)
    given_ = Pieces(array("i", range(num)), boundary=boundary)
    parts = asked.parts(given_)
    assert not isinstance(parts, RowError)
    assert all(2 <= len(part.token_ids) < limit for part in parts)  # One is left to generate.
    completion = asked.completion(3, given_, [Output(part.token_ids) for part in parts], 0.0)
    (sample,) = completion.samples
    found = memoryview(sample.numbers or b"").cast("f").tolist()
    counted = found[len(found) // 2 :]
    assert [-number for number in found[: len(found) // 2]] == counted
    assert [token for token, _, _ in sample.logprobs or ()] == [f"[{int(n)}]" for n in counted]
    is_cut = how == "cut" and num >= limit
    assert sample.finish_reason == ("length" if is_cut else "stop")
    wanted = list(range(boundary, num))
    assert counted == (wanted[: limit - 2] if is_cut else wanted)


def test_a_likelihood_that_is_too_long_or_of_nothing_is_refused() -> None:
    asked, nothing = likelihoods(5), "a likelihood needs at least one token"
    for num, boundary, problem in ((5, 2, "takes fewer than 5"), (3, 3, nothing), (3, 0, nothing)):
        found = asked.parts(Pieces(array("i", range(num)), boundary=boundary))
        assert isinstance(found, RowError)
        assert problem in found.error
    assert not isinstance(asked.parts(Pieces(array("i", range(4)), boundary=2)), RowError)


@pytest.mark.parametrize("num_missing", [1, 3])
def test_too_few_log_probabilities_are_an_error(num_missing: int) -> None:
    given_ = Pieces(array("i", range(4)), boundary=2)
    output = Output(given_.first, num_missing)
    error = likelihoods(9).completion(3, given_, [output], 0.0).error
    expected = f"vLLM gave {3 - num_missing} log probabilities, expected 3"
    assert error == RowError("bad_loglikelihood", expected)


def test_columns_of_a_likelihood(tmp_path: Path) -> None:
    job = load(tmp_path, "loglikelihood", pooling={"token_logprobs": True})
    form, columns = number_columns(job, TaskFacts(2))
    names = [field.name for field in columns.fields]
    assert names == ["logprob", "num_tokens", "perplexity", "is_greedy", "token_logprobs"]

    def read(*numbers: float) -> list[Any]:
        tokens = [TokenLogprobs("t", number, ()) for number in numbers[: len(numbers) // 2]]
        sample = Sample("", "stop", tokens, numbers=floats(*numbers))
        return columns.values((sample,), (form.read(sample, None),))

    assert read(-1, -3, 1, 1) == [-4, 2, math.exp(2), True, [("t", -1), ("t", -3)]]
    assert read(-1, -3, 1, 2)[3] is False
    assert read(-3e38, 9)[2] == math.inf
    for wrong in ((), (-1,), (-1, 1, 1), (math.nan, 1), (-math.inf, 1), (0.5, 1)):
        assert read(*wrong) == [None] * 5


def floats(*numbers: float) -> bytes:
    return struct.pack(f"{len(numbers)}f", *numbers)


BAD = {
    "empty": b"",
    "too few": floats(1, 2),
    "too many": floats(1, 2, 3, 4),
    "not whole": floats(1, 2, 3)[:-1],
    "not a number": floats(1, math.nan, 3),
    "infinite": floats(1, math.inf, 3),
    "both infinities": floats(math.inf, -math.inf, 3),
    "zero": floats(0, 0, 0),
    "minus zero": floats(-0.0, 0, -0.0),
}


@pytest.mark.parametrize("numbers", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("task", ["embed", "score"])
def test_a_wrong_value_is_an_error_of_its_row(tmp_path: Path, task: str, numbers: bytes) -> None:
    size = 3 if task == "embed" else 1
    numbers = numbers if task == "embed" else numbers[:4] if len(numbers) != 8 else numbers
    if task == "score" and numbers == floats(1):
        return  # That is one.
    form, columns = number_columns(load(tmp_path, task), TaskFacts(size))
    sample = Sample("", "stop", numbers=numbers)
    reading = form.read(sample, None)
    assert (reading.verdict, reading.error and reading.error.error_type) == (
        Verdict.ERROR,
        f"bad_{task}",
    )
    assert columns.values((sample,), (reading,)) == [None]


def test_a_number_beyond_float16_is_an_error_where_the_column_is_that(tmp_path: Path) -> None:
    job = load(tmp_path, "embed", pooling={"dtype": "float16"})
    form, _ = number_columns(job, TaskFacts(2))
    most = 65_504.0
    for number in (-70_000, 70_000, most + 1, -most - 1, 2**17, 3e38):
        assert form.read(Sample("", "stop", numbers=floats(1, number)), None).error is not None
    for number in (-most, most, 2**14, 2**15, -(2**15)):
        assert form.read(Sample("", "stop", numbers=floats(1, number)), None).error is None


def test_the_largest_numbers_are_numbers(tmp_path: Path) -> None:
    form, _ = number_columns(load(tmp_path, "embed"), TaskFacts(2))
    for number in (3.4e38, -3.4e38, 2.0**127, -(2.0**126), 1e-45):
        assert form.read(Sample("", "stop", numbers=floats(number, 0)), None).error is None


def classes(tmp_path: Path, facts: TaskFacts, *numbers: float) -> dict[str, Any]:
    form, columns = number_columns(load(tmp_path, "classify"), facts)
    sample = Sample("", "stop", numbers=floats(*numbers))
    values = columns.values((sample,), (form.read(sample, None),))
    return dict(zip((field.name for field in columns.fields), values, strict=True))


def test_the_likeliest_label_or_all_that_hold(tmp_path: Path) -> None:
    one = classes(tmp_path, TaskFacts(3, ["a", "b", "c"]), 0.25, 0.5, 0.25)
    assert one == {
        "label": "b",
        "probability": 0.5,
        "probabilities": {"a": 0.25, "b": 0.5, "c": 0.25},
    }
    some = classes(tmp_path, TaskFacts(3, ["a", "b", "c"], is_multi_label=True), 0.5, 0.75, 0)
    assert some["labels"] == ["a", "b"]
    none = classes(tmp_path, TaskFacts(2, ["a", "b"], is_multi_label=True), 0, 0)
    assert none["labels"] == []


@given(
    st.lists(st.none() | st.lists(st.floats(-4, 4, width=16), min_size=3, max_size=3)),
    st.sampled_from([pa.float32(), pa.float16()]),
)
def test_vectors_become_columns_as_they_are(
    vectors: list[list[float] | None], kind: pa.DataType
) -> None:
    values = [None if vector is None else array("f", vector).tobytes() for vector in vectors]
    column = column_of(values, pa.list_(kind, 3))
    assert column.type == pa.list_(kind, 3)
    assert column.to_pylist() == vectors
    assert pl.Series(column.cast(pa.list_(pa.float32(), 3))).to_list() == vectors
