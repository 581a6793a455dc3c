"""The echo engine's own options and limits."""

import itertools
import time
from contextlib import closing

import pytest

from batchgen.core.errors import ConfigError
from batchgen.core.records import EngineSpec
from batchgen.engine.base import HostedRequest
from batchgen.engine.echo import EchoEngine, read_options


def make_engine(max_tokens=16, max_in_flight=None, **options):
    sampling = {"max_tokens": max_tokens}
    return EchoEngine(EngineSpec("echo", "none", options, sampling, max_in_flight=max_in_flight))


def requests(prompts):
    return [HostedRequest(number, prompt, None) for number, prompt in enumerate(prompts)]


def run(engine, prompts):
    engine.add(requests(prompts))
    completions = list(itertools.chain.from_iterable(iter(lambda: engine.step(1.0), [])))
    return sorted(completions, key=lambda completion: completion.request_id)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_num_seq": 1}, "unknown option 'max_num_seq'; did you mean 'max_num_seqs'?"),
        ({"zzz": 1}, "unknown option 'zzz'; expected one of max_num_seqs, step_s"),
        ({"max_num_seqs": 0}, "max_num_seqs = 0: Input should be greater than or equal to 1"),
        ({"max_num_seqs": True}, "max_num_seqs = True: Input should be a valid integer"),
        ({"max_steps": "2"}, "max_steps = '2': Input should be a valid integer"),
        ({"step_s": -0.1}, "step_s = -0.1: Input should be greater than or equal to 0"),
        ({"max_model_len": 0}, "max_model_len = 0: Input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_option_is_named(options, problem):
    with pytest.raises(ConfigError) as caught:
        read_options(options)
    assert problem in str(caught.value)


def test_every_wrong_option_is_named_at_once():
    with pytest.raises(ConfigError, match="2 problems"):
        read_options({"step_s": -1, "nonsense": 1})


def test_no_model_length_is_no_limit():
    engine = make_engine(max_tokens=None, max_model_len=None)
    (completion,) = run(engine, ["x" * 100_000])
    assert completion.num_output_tokens == 100_000


def test_answer_is_cut_at_max_tokens_as_vllm_does_without_one():
    engine = EchoEngine(EngineSpec("echo", "none", {}, {}))
    (completion,) = run(engine, ["x" * 20])
    assert (completion.text, completion.finish_reason) == ("x" * 16, "length")


def test_a_character_is_never_cut_in_two():
    (completion,) = run(make_engine(max_tokens=4), ["aé€z"])
    assert (completion.text, completion.num_output_tokens) == ("aé", 3)


def test_prompt_and_answer_together_fit_the_model_length():
    fits, too_long = run(make_engine(max_tokens=90, max_model_len=100), ["x" * 60, "x" * 100])
    assert (fits.num_output_tokens, fits.finish_reason) == (40, "length")
    assert too_long.error.error_type == "prompt_too_long"
    assert too_long.error.error.startswith("the prompt has 100 tokens")


def test_chat_is_its_contents_joined_by_newlines():
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    (completion,) = run(make_engine(), [chat])
    assert completion.text == "a\nb"


def test_no_more_than_max_num_seqs_run_at_once():
    engine = make_engine(max_num_seqs=4)
    engine.add(requests(["x"] * 10))
    assert [len(engine.step(0)) for _ in range(4)] == [4, 4, 2, 0]


def test_refusals_do_not_take_places():
    engine = make_engine(max_num_seqs=2)
    engine.add(requests(["", "", "a", "b", "c"]))
    assert [completion.request_id for completion in engine.step(0)] == [0, 1, 2, 3]


def test_finish_order_is_the_same_in_every_run():
    prompts = [f"row {number}" for number in range(50)]
    orders = []
    for _ in range(2):
        engine = make_engine(max_num_seqs=8, max_steps=5)
        engine.add(requests(prompts))
        orders.append([c.request_id for c in itertools.chain(*(engine.step(0) for _ in range(99)))])
    assert orders[0] == orders[1] != sorted(orders[0])
    assert sorted(orders[0]) == list(range(50))


def test_a_step_takes_its_time_and_the_caller_waits_no_longer_than_asked():
    engine = make_engine(step_s=0.2)
    engine.add(requests(["x"]))
    started = time.monotonic()
    assert engine.step(0.05) == []
    assert len(engine.step(5.0)) == 1
    assert time.monotonic() - started >= 0.19


@pytest.mark.parametrize(
    ("options", "capacity"),
    [
        ({}, 4096),
        ({"step_s": 0.1}, 512),
        ({"step_s": 0.1, "max_in_flight": 30}, 30),
        ({"max_in_flight": 9999}, 9999),
    ],
)
def test_capacity_is_twice_what_runs_and_more_when_steps_are_free(options, capacity):
    assert make_engine(**options).capacity == capacity


def test_close_drops_what_is_in_flight():
    with closing(make_engine()) as engine:
        engine.add(requests(["x"] * 3))
        assert engine.num_in_flight == 3
    assert engine.num_in_flight == 0
    assert engine.step(0) == []


def ask(engine, prompt="abcdef", params=None, lora=None):
    engine.add([HostedRequest(0, prompt, None, params, lora)])
    (completion,) = engine.step(1.0)
    return completion


def test_a_request_may_have_its_own_limits():
    engine = make_engine(max_tokens=4)
    short = ask(engine, params={"max_tokens": 2, "n": 3})
    assert [sample.text for sample in short.samples] == ["ab"] * 3
    assert short.num_output_tokens == 6
    assert ask(engine, params={"n": 1, "temperature": 2}).text == "abcd"
    assert ask(engine, params={"max_tokens": None}).text == "abcdef"
    assert ask(engine).text == "abcd"


def test_the_job_may_ask_for_several_answers():
    engine = EchoEngine(EngineSpec("echo", "none", {}, {"n": 2, "logprobs": 5}))
    assert [sample.text for sample in ask(engine).samples] == ["abcdef"] * 2


@pytest.mark.parametrize("params", [{"max_tokens": 0}, {"max_tokens": "2"}, {"n": None}, {"n": 0}])
def test_limits_that_are_none_are_refused(params):
    refused = ask(make_engine(), params=params)
    assert refused.error.error_type == "bad_request"
    assert next(iter(params)) in refused.error.error
    with pytest.raises(ConfigError, match="sampling"):
        EchoEngine(EngineSpec("echo", "none", {}, params))


def test_only_the_jobs_adapters_are_known():
    spec = EngineSpec("echo", "none", {}, {}, loras={"red": "folder", "blue": "folder"})
    engine = EchoEngine(spec)
    assert ask(engine, lora="red").text == "abcdef"
    refused = ask(engine, lora="green")
    assert refused.error.error_type == "unknown_adapter"
    assert "'green'; the job has red, blue" in refused.error.error
    assert engine.num_in_flight == 0


@pytest.mark.parametrize("content", [5, None, ["x"], [None], [{"type": "text"}], {}])
def test_content_that_is_no_text_is_the_rows_error(content):
    answer = ask(make_engine(), [{"role": "user", "content": content}])
    assert answer.error.error_type == "chat_template_error"
