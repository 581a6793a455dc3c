"""Rows that are to do, looked at: what would become of each."""

from __future__ import annotations

import itertools
import json
from array import array

import polars as pl
import pytest

from batchgen.answers.json_schema import row_validator
from batchgen.core.errors import ConfigError, EngineError, InputChangedError
from batchgen.core.records import EngineSpec, Ranges, Request, RowSet
from batchgen.engine.process import build_engine
from batchgen.job.recipe import Seeds
from batchgen.pipeline.frozen import freeze
from batchgen.pipeline.prepare import prepare
from batchgen.preview.plan import temperature_of
from batchgen.preview.sample import (
    config_max_len,
    load_tokenize,
    max_model_len,
    sampled,
    survey,
)
from batchgen.prompt.requests import RequestBuilder
from batchgen.store.keys import KeySet, prefix_of
from tests.unit.test_forecast_cost import past_run

SPEC = EngineSpec("echo", "", {}, {"max_tokens": 8})


@pytest.fixture
def look(make_job):
    """Survey a job whose prompt is its column `text`, all rows unless told otherwise."""

    def run(rows, *, how=None, todo=None, tokenize=None, **tables):
        tables = {"prompt": {"user": None, "text": "text"}, **tables}
        prepared = prepare(make_job(rows, **tables))
        plan = freeze(prepared, 1)
        builder = RequestBuilder(
            prepared.builder,
            prepared.job,
            plan.recipe_fingerprint,
            seeds=Seeds(prepared.job.sampling),
            ids=itertools.count(),
            check_schema=row_validator,
        )
        spec = prepared.engine_spec(None)
        if todo is None:
            todo = RowSet({0: Ranges.until(plan.num_rows)})
        how = {"sample_rows": None, **(how or {})}
        return survey(plan, todo, prepared, builder, tokenize or load_tokenize(spec), **how)

    return run


def rows_of(*texts):
    return [{"id": f"r{n}", "text": text} for n, text in enumerate(texts)]


def test_each_row_is_counted_once_as_what_would_become_of_it(look):
    rows = [*rows_of("aa", "bbb", "aa", None, "x" * 20), "no object", *rows_of("left out")]
    rows[-1]["id"] = "no"
    found = look(
        rows,
        how={"max_model_len": 12},
        input={"where": "id is null or id <> 'no'"},
        sampling={"max_tokens": 10, "temperature": 0},
    )
    assert found.is_exact
    assert (found.num_rows, found.num_looked) == (7, 7)
    assert found.num_skipped == 1
    assert found.bad == {"null_value": 1, "not_an_object": 1}
    assert (found.num_duplicates, found.num_repeats) == (1, 0)
    assert found.num_too_long == 1
    assert found.num_to_compute == 2
    assert found.prompt_tokens == 5
    assert found.lengths is not None
    assert (found.lengths.longest, found.lengths.num) == (3, 2)
    # Ten tokens beside the shorter prompt; nine until the context ends beside the longer.
    assert (found.max_output_tokens, found.num_tight) == (19, 1)


def test_equal_rows_are_computed_each_where_sampling_is_random(look):
    found = look(rows_of("a", "a", "b"), sampling={"max_tokens": 4, "temperature": 1})
    assert (found.num_duplicates, found.num_repeats, found.num_to_compute) == (0, 1, 3)
    assert found.max_output_tokens == 12


@pytest.mark.parametrize(("dedupe", "num"), [("always", 2), ("never", 3)])
def test_the_job_may_say_otherwise(look, dedupe, num):
    found = look(rows_of("a", "a", "b"), run={"dedupe": dedupe})
    assert found.num_to_compute == num


def test_rows_may_have_a_bound_of_their_own_and_n_answers(look):
    rows = [{"id": "a", "text": "a", "own": {"max_tokens": 3}}, {"id": "b", "text": "b"}]
    found = look(rows, sampling={"max_tokens": 100, "n": 2, "column": "own"})
    assert found.max_output_tokens == 2 * (3 + 100)


def test_a_request_with_an_answer_is_not_computed(look, make_job):
    rows = rows_of("a", "b", "c")
    prepared = prepare(make_job(rows, prompt={"user": None, "text": "text"}))
    builder = RequestBuilder(
        prepared.builder,
        prepared.job,
        prepared.recipe_fingerprint,
        seeds=Seeds(prepared.job.sampling),
        ids=itertools.count(),
        check_schema=row_validator,
    )
    todo = Ranges.until(3)
    (batch,) = prepared.reader.read(prepared.files[0], 0, todo, prepared.spec())
    keys = [request.request_key for request in builder.of(batch) if isinstance(request, Request)]
    known = KeySet()
    known.load(pl.Series([prefix_of(keys[1])], dtype=pl.UInt64))
    found = look(rows, how={"known": known})
    assert (found.num_known, found.num_to_compute, found.prompt_tokens) == (1, 2, 2)


def test_only_rows_to_do_are_read(look):
    found = look(rows_of("a", "bb", "ccc"), todo=RowSet({0: Ranges([(1, 2)])}))
    assert (found.num_rows, found.num_to_compute, found.prompt_tokens) == (1, 1, 2)


def test_an_input_that_moved_since_the_plan_is_told(look, tmp_path):
    def tokenize(requests):
        (tmp_path / "rows.jsonl").write_text("gone", encoding="utf-8")
        return load_tokenize(SPEC)(requests)

    with pytest.raises(InputChangedError, match="must not change"):
        look(rows_of("a"), tokenize=tokenize)


def test_prompts_that_only_the_engine_can_count_are_told_apart(look):
    def tokenize(requests):
        return [None if request.prompt == "image" else array("i", [1, 2]) for request in requests]

    found = look(rows_of("image", "a"), tokenize=tokenize, sampling={"max_tokens": 7})
    assert (found.num_to_compute, found.num_unknown, found.prompt_tokens) == (2, 1, 2)
    assert found.max_output_tokens == 14


def test_a_sample_estimates_all(look):
    texts = [f"{n:05} " + "x" * (n % 40) for n in range(4_000)]
    rows = rows_of(*texts)
    for at in range(0, 4_000, 10):
        rows[at]["text"] = None
    how = {"sample_rows": 1_000, "max_model_len": 40}
    found, exact = look(rows, how=how), look(rows, how={"max_model_len": 40})
    assert (found.is_exact, found.num_looked, found.num_rows) == (False, 1_000, 4_000)
    assert exact.num_bad == 400
    for name in ("num_bad", "num_too_long", "num_to_compute", "prompt_tokens"):
        truth = getattr(exact, name)
        assert getattr(found, name) == pytest.approx(truth, rel=0.15), name
        assert getattr(found, name) != truth  # An estimate, or else nothing was sampled.
    assert found.max_output_tokens == pytest.approx(exact.max_output_tokens, rel=0.1)
    assert found == look(rows, how=how)  # The same rows every time.


def test_a_sample_thins_rows_that_are_equal(look):
    rows = rows_of(*(f"text {n % 2_000}" for n in range(4_000)))
    found = look(rows, how={"sample_rows": 1_500})
    assert found.num_duplicates == pytest.approx(2_000, rel=0.15)
    assert found.num_to_compute == 4_000 - found.num_duplicates


def test_nothing_to_do_is_no_trouble(look):
    found = look(rows_of("a"), todo=RowSet())
    assert (found.num_to_compute, found.prompt_tokens, found.lengths) == (0, 0, None)


def test_a_sample_is_a_part_of_what_is_to_do():
    todo = RowSet({0: Ranges([(0, 10), (100, 200)]), 3: Ranges([(5, 95)])})
    found = sampled(todo, 50)
    assert sum(len(rows) for rows in found.values()) == 50
    assert all(not rows - todo[number] for number, rows in found.items())
    assert sampled(todo, 200) == todo
    assert found == sampled(todo, 50)
    assert found != sampled(todo, 50, seed=1)


def test_each_row_has_the_same_chance():
    todo = RowSet({0: Ranges([(0, 3), (7, 9)]), 2: Ranges([(1, 6)])})
    times = dict.fromkeys(
        [(0, 0), (0, 1), (0, 2), (0, 7), (0, 8), *((2, n) for n in range(1, 6))], 0
    )
    for seed in range(2_000):
        for number, rows in sampled(todo, 4, seed).items():
            for row in rows:
                times[number, row] += 1
    assert min(times.values()) > 700
    assert max(times.values()) < 900


def test_echo_tokens_are_those_that_the_echo_engine_counts():
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b\u00e9"}]
    prompts = ["text", "\u00fc\u20ac", chat, "", [{"role": "user"}], "\ud800"]
    requests = [
        Request(at, (0, at), prompt, f"{at:032x}", None, None, 0)  # type: ignore[arg-type]
        for at, prompt in enumerate(prompts)
    ]
    engine = build_engine(SPEC)
    engine.add(requests)
    done = {}
    while engine.num_in_flight:
        done |= {found.request_id: found for found in engine.step(0.1)}
    engine.close()
    for at, tokens in enumerate(load_tokenize(SPEC)(requests)):
        if isinstance(tokens, array):
            assert len(tokens) == done[at].num_prompt_tokens
        else:
            assert tokens == done[at].error


def test_options_that_the_echo_engine_does_not_know_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'step_s'"):
        load_tokenize(EngineSpec("echo", "", {"steps_s": 1}, {}))


def test_the_job_says_the_longest_context_before_an_engine_and_before_the_model(tmp_path):
    config = {"max_position_embeddings": 4096, "text_config": {"max_position_embeddings": 2048}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    spec = EngineSpec("vllm", str(tmp_path), {}, {})
    given = EngineSpec("vllm", str(tmp_path), {"max_model_len": 512}, {})
    past = past_run(max_model_len=1024)
    assert max_model_len(given, past) == (512, "model.max_model_len")
    assert max_model_len(spec, past) == (1024, "run R1")
    assert max_model_len(spec, None) == (2048, "the model's config.json")
    assert max_model_len(SPEC, past) == (None, "echo has no limit")


SAYS_NOTHING = [None, "{", "{}", '{"max_seq_len": "long"}', "[]", "5", "[" * 100_000]
SAYS_NONSENSE = ['{"seq_len": 0}', '{"seq_len": true}', '{"seq_len": 1' + "0" * 400 + "}"]


@pytest.mark.parametrize("text", SAYS_NOTHING + SAYS_NONSENSE)
def test_a_model_may_not_say_it(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert config_max_len(tmp_path / "config.json") is None


def test_the_smallest_of_several_limits_holds(tmp_path):
    config = {"max_position_embeddings": 4096, "seq_length": 1000}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert config_max_len(tmp_path / "config.json") == 1000


@pytest.mark.vllm
def test_a_folder_without_a_tokenizer_is_told(tmp_path):
    with pytest.raises(EngineError, match="the tokenizer cannot be loaded"):
        load_tokenize(EngineSpec("vllm", str(tmp_path), {}, {"max_tokens": 4}))


def test_the_temperature_is_the_jobs_or_the_models_or_vllms(tmp_path):
    def told(sampling=None, backend="vllm", **kwargs):
        return temperature_of(EngineSpec(backend, str(tmp_path), kwargs, sampling or {}))

    assert told() == "1.0 (vLLM's default)"
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert told() == "0.6 (the model's generation_config.json)"
    assert told(generation_config="vllm") == "1.0 (vLLM's default)"
    assert told(override_generation_config={"temperature": 0.2}).startswith("0.2 (the model's")
    assert told({"temperature": 0}) == "0 (sampling.temperature)"
    assert told(backend="openai") == ""
