"""Labels to trust: grammars, log probabilities, samples, adapters, parsers and images on vLLM."""

import base64
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import string
import subprocess
import sys
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import save_file

from batchgen.answers.probabilities import label_probabilities
from batchgen.core.errors import ConfigError, EngineError
from batchgen.engine.base import HostedRequest
from batchgen.engine.process import EngineProcess
from batchgen.engine.vllm.images import UP
from tests.contract.test_engine import (
    MODEL,
    ROOT,
    ask,
    chat,
    ids,
    make_spec,
    run,
    step_until_dead,
    wait_until_up,
)
from tests.e2e.support import wait_until

pytestmark = pytest.mark.vllm

LABELS = ["billing", "bug", "how to", "other"]
SCHEMA = {
    "type": "object",
    "properties": {
        "label": {"enum": LABELS},
        "sure": {"type": "boolean"},
        "score": {"type": "integer", "minimum": 0, "maximum": 5},
    },
    "required": ["label", "sure", "score"],
    "additionalProperties": False,
}
TEXTS = [f"Ticket {number}: my parcel number {number * 37} is late." for number in range(40)]


def request(prompt, lora=None, seed=7, **params):
    return HostedRequest(next(ids), prompt, seed, params or None, lora)


def one_of(choices, **params):
    return {"structured_outputs": {"choice": choices}, **params}


def write_adapter(folder, seed, rank):
    """A LoRA adapter of random weights, as peft writes it; big enough to change answers."""
    config = json.loads((MODEL / "config.json").read_bytes())
    hidden, size = config["hidden_size"], config["head_dim"]
    heads = {"q_proj": config["num_attention_heads"], "v_proj": config["num_key_value_heads"]}
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, num_heads in heads.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora"
            down, up = (rank, hidden), (num_heads * size, rank)
            tensors[f"{key}_A.weight"] = rng.normal(0, 0.3, down).astype(np.float32)
            tensors[f"{key}_B.weight"] = rng.normal(0, 0.3, up).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    settings |= {"target_modules": list(heads), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    loras = {"red": write_adapter(folder / "red", 1, 4), "blue": write_adapter(folder / "b", 2, 9)}
    spec = make_spec("vllm", folder / "log", max_tokens=48, logprobs=30)
    # Left to itself, this model fills a form that it never saw with blanks.
    given = {**spec.model_kwargs, "structured_outputs_config": {"disable_any_whitespace": True}}
    with closing(EngineProcess(replace(spec, loras=loras, model_kwargs=given))) as engine:
        wait_until_up(engine)
        yield engine


def test_a_choice_gives_only_what_it_allows(engine):
    completions = run(engine, [request(chat(text), **one_of(LABELS)) for text in TEXTS])
    assert {completion.text for completion in completions} <= set(LABELS)
    assert len({completion.text for completion in completions}) > 1
    assert {completion.finish_reason for completion in completions} == {"stop"}


def test_a_schema_gives_only_what_it_allows_and_compactly_if_told_so(engine):
    params = {"structured_outputs": {"json": SCHEMA}}
    for completion in run(engine, [request(chat(text), **params) for text in TEXTS]):
        answer = json.loads(completion.text)
        assert answer.keys() == SCHEMA["properties"].keys()
        assert answer["label"] in LABELS
        assert answer["score"] in range(6)
        assert isinstance(answer["sure"], bool)
        # vLLM 0.26's xgrammar has one blank after each comma and colon.
        assert completion.text in {json.dumps(answer, separators=s) for s in ((",", ":"), None)}


def test_a_turn_of_the_assistant_goes_on_and_a_form_holds_for_what_follows(engine):
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(MODEL).apply_chat_template(
        chat(TEXTS[0]), tokenize=False, add_generation_prompt=True
    )
    begun = [*chat(TEXTS[0]), {"role": "assistant", "content": "It is "}]
    for params in ({"temperature": 0}, one_of(LABELS, temperature=0)):
        goes_on, raw, new = run(
            engine,
            [request(prompt, **params) for prompt in (begun, f"{text}It is ", chat(TEXTS[0]))],
        )
        assert (goes_on.text, goes_on.num_prompt_tokens) == (raw.text, raw.num_prompt_tokens)
        assert goes_on.num_prompt_tokens > new.num_prompt_tokens
        assert [sample.num_tokens for sample in goes_on.samples] == [goes_on.num_output_tokens]
    assert goes_on.text in LABELS


def test_a_rows_own_schema_is_answered_in_its_own_order(engine):
    for names in (("z", "a"), ("a", "z")):
        schema = {"type": "object", "properties": {name: {"enum": ["x"]} for name in names}}
        schema |= {"required": list(names), "additionalProperties": False}
        (done,) = run(engine, [request("row", structured_outputs={"json": schema})])
        assert list(json.loads(done.text)) == list(names)


def test_requests_with_and_without_grammars_mix(engine):
    grammars = [one_of(["a", "b"]), {"structured_outputs": {"regex": "[0-9]{3}"}}, {}]
    asked = [request(chat(text), **grammars[n % 3]) for n, text in enumerate(TEXTS[:30])]
    for number, completion in enumerate(run(engine, asked)):
        expected = (r"a|b", r"[0-9]{3}", r"(?s).*")[number % 3]
        assert re.fullmatch(expected, completion.text)


def test_a_grammar_that_the_backend_lacks_is_that_rows_error(engine):
    schema = {"type": "integer", "multipleOf": 3}
    bad = request("row", structured_outputs={"json": schema})
    refused, answered = run(engine, [bad, ask("row")])
    assert refused.error.error_type == "bad_request"
    assert "xgrammar" in refused.error.error
    assert answered.error is None


def test_log_probabilities_are_those_after_the_grammar(engine):
    for completion in run(engine, [request(chat(text), **one_of(LABELS)) for text in TEXTS[:10]]):
        (sample,) = completion.samples
        assert len(sample.logprobs) == completion.num_output_tokens
        first, *_, last = sample.logprobs
        assert math.fsum(math.exp(logprob) for _, logprob in first.top) == pytest.approx(
            1, abs=1e-3
        )
        assert {token[0] for token, _ in first.top} <= {label[0] for label in LABELS}
        assert "".join(one.token for one in sample.logprobs[:-1]) == sample.text
        assert last.token is None
        assert last.logprob == pytest.approx(0, abs=1e-3)


def test_every_label_has_its_exact_probability(tmp_path):
    # More than vLLM's 20, so that the likeliest tokens could not be all.
    labels = [*"bcdefghijklmnpqrstuvwxyz", "a question of money", "other"]
    spec = make_spec("vllm", tmp_path / "log", **one_of(labels, max_tokens=48, logprobs="labels"))
    with closing(EngineProcess(spec)) as engine:
        wait_until_up(engine)
        for one in run(engine, [request(chat(text)) for text in TEXTS[:6]]):
            tokens, span = one.samples[0].logprobs, (0, len(one.text))
            found = label_probabilities(one.text, tokens, span, labels, closing="")
            # Each is a lower bound, so that nothing is missing where they sum to 1.
            assert sum(found) == pytest.approx(1, abs=1e-3)
    pairs = ["".join(pair) for pair in itertools.product(string.ascii_lowercase, repeat=2)]
    many = replace(spec, sampling_params={**spec.sampling_params, **one_of(pairs)})
    assert re.match(r"sampling.logprobs: .* begin with \d{3} tokens", refused(many))


def test_log_probabilities_without_a_grammar(engine):
    (completion,) = run(engine, [request("row", temperature=0.0, seed=None)])
    for one in completion.samples[0].logprobs:
        logprobs = [logprob for _, logprob in one.top]
        assert logprobs == sorted(logprobs, reverse=True)
        assert len(logprobs) <= 30
        assert min(logprobs) >= math.log(1e-5)
        assert one.top[0] == (one.token, one.logprob)


def test_top_holds_as_many_as_asked_for_and_the_sampled_one_stands_apart(engine):
    (completion,) = run(engine, [request("row", logprobs=0, temperature=2.0)])
    assert {one.top == [] for one in completion.samples[0].logprobs} == {True}
    assert any(one.logprob < math.log(0.2) for one in completion.samples[0].logprobs)


def test_several_answers_differ_and_repeat_by_seed(engine):
    first, again = run(engine, [request("tell me", n=4, temperature=2.0) for _ in range(2)])
    assert len({sample.text for sample in first.samples}) == 4
    assert [sample.text for sample in again.samples] == [sample.text for sample in first.samples]
    num_tokens = sum(len(sample.logprobs) for sample in first.samples)
    assert first.num_output_tokens == num_tokens


def test_adapters_in_one_batch_answer_as_they_do_alone(engine):
    def greedy(lora, texts):
        return [request(chat(text), lora, None, temperature=0.0, logprobs=0) for text in texts]

    def answers(requests):
        return [completion.text for completion in run(engine, requests)]

    texts = TEXTS[:5]
    alone = [answers(greedy(lora, texts)) for lora in (None, "red", "blue")]
    mixed = answers([one for text in texts for lora in (None, "red", "blue")
                     for one in greedy(lora, [text])])  # fmt: skip
    assert [mixed[number::3] for number in range(3)] == alone
    assert len({tuple(one) for one in alone}) == 3


TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
TEMPLATE = (
    "{% for tool in tools %}{{ tool.function.name }} {% endfor %}"
    "{% for message in messages %}{{ message.content }}{% endfor %}"
)
CALL = '<tool_call>\n{"name": "find", "arguments": {"number": 7}}\n</tool_call>'
THINK, END_OF_THOUGHT, END = 0, 1, 2
"""Token ids that the copy of the model has for its marks."""


def write_thinking_model(folder):
    """The model with two of its tokens named otherwise: as marks of its reasoning."""
    shutil.copytree(MODEL, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_bytes())
    for number, mark in ((THINK, "<think>"), (END_OF_THOUGHT, "</think>")):
        token = tokenizer["added_tokens"][number]
        tokenizer["model"]["vocab"][mark] = tokenizer["model"]["vocab"].pop(token["content"])
        token["content"] = mark
    path.write_text(json.dumps(tokenizer))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "pad_token": "<think>"}))
    return str(folder)


@pytest.fixture(scope="module")
def parsing_engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parsing")
    spec = make_spec("vllm", folder / "log", max_tokens=60)
    parsers = {"reasoning_parser": "deepseek_r1", "tool_call_parser": "hermes"}
    model = write_thinking_model(folder / "model")
    spec = replace(spec, model=model, chat_template=TEMPLATE, tools=TOOLS, **parsers)
    with closing(EngineProcess(spec)) as engine:
        wait_until_up(engine)
        yield engine


def say(text, bias=100.0, seed=7):
    """Make the model end its reasoning, sooner or later, and then say what it must."""
    bias = {END_OF_THOUGHT: bias, END: -100.0}
    return request(chat("hello"), None, seed, **one_of([text], logit_bias=bias))


def test_a_grammar_binds_what_follows_the_reasoning(parsing_engine):
    completions = run(parsing_engine, [say("Sorry!", 6.0, seed) for seed in range(20)])
    samples = [completion.samples[0] for completion in completions]
    ended = [sample for sample in samples if sample.finish_reason == "stop"]
    assert {sample.text for sample in ended} == {"Sorry!"}
    assert len({sample.reasoning for sample in ended}) > 3
    assert all(sample.tool_calls == [] for sample in samples)


def test_a_reasoning_that_never_ends_leaves_no_answer(parsing_engine):
    (completion,) = run(parsing_engine, [say("Sorry!", -100.0)])
    (sample,) = completion.samples
    assert (sample.text, sample.finish_reason) == ("", "length")
    assert len(sample.reasoning) > 20


def test_tool_calls_are_split_off(parsing_engine):
    (completion,) = run(parsing_engine, [say(CALL)])
    (sample,) = completion.samples
    assert sample.text == ""
    ((name, arguments),) = sample.tool_calls
    assert (name, json.loads(arguments)) == ("find", {"number": 7})


def test_a_request_has_its_own_tools(parsing_engine):
    other = [{"type": "function", "function": {"name": "find and more"}}]
    asked = [say(CALL), say(CALL), say(CALL)]
    for number, choice in enumerate(("auto", "none"), 1):
        params = {**asked[number].params, "tools": other, "tool_choice": choice}
        asked[number] = asked[number]._replace(params=params)
    job, auto, none = run(parsing_engine, asked)
    assert [len(one.samples[0].tool_calls) for one in (job, auto, none)] == [1, 1, 0]
    assert none.samples[0].text == CALL
    assert auto.num_prompt_tokens == none.num_prompt_tokens > job.num_prompt_tokens


def test_tools_reach_the_chat_template(parsing_engine):
    (completion,) = run(parsing_engine, [say("No.")])
    with_tools = completion.num_prompt_tokens
    (raw,) = run(parsing_engine, [request("find hello")])
    assert with_tools == raw.num_prompt_tokens


def refused(spec, error=ConfigError):
    """What an engine that does not start says."""
    with closing(EngineProcess(spec)) as engine, pytest.raises(error) as caught:
        step_until_dead(engine, [])
    return str(caught.value)


def test_what_the_job_is_at_fault_for_is_told_before_the_model_loads(tmp_path):
    spec = make_spec("vllm", tmp_path / "log")
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    bad = replace(
        spec,
        # No model: who came as far as loading it would speak of that.
        model=str(tmp_path / "none"),
        sampling_params={"structured_outputs": {"json": schema}},
    )
    text = refused(bad)
    assert text.startswith("output: vLLM cannot compile the JSON schema: xgrammar: ")
    assert "uniqueItems" in text
    assert "\n" not in text


def test_an_unknown_parser_is_told_before_the_model_loads(tmp_path):
    spec = replace(
        make_spec("vllm", tmp_path / "log"),
        reasoning_parser="deepseek-r1",
        tool_call_parser="zzz",
        model=str(tmp_path / "none"),
    )
    text = refused(spec)
    assert "reasoning_parser = 'deepseek-r1': vLLM has no such parser; did you mean" in text
    assert "tool_call_parser = 'zzz': vLLM has no such parser; it has " in text
    assert "hermes" in text


def test_a_bad_adapter_is_named_with_its_folder(tmp_path):
    folder = write_adapter(tmp_path / "bad", 1, 4)
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"no tensors")
    spec = replace(make_spec("vllm", tmp_path / "log"), loras={"bad": folder})
    text = refused(spec, EngineError)
    assert f"adapter 'bad' ({folder})" in text
    assert "\n" not in text


def picture(colour):
    data = io.BytesIO()
    PIL.Image.new("RGB", (40, 40), colour).save(data, "PNG")
    return data.getvalue()


def look_at(*urls):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, *parts]}]


@pytest.fixture(scope="module")
def seeing_spec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing")
    command = [sys.executable, "-m", "tests.contract.vision_model", str(folder / "model")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    spec = make_spec("vllm", folder / "log", temperature=0.0)
    return replace(spec, model=str(folder / "model"))


@pytest.fixture(scope="module")
def seeing_engine(seeing_spec):
    with closing(EngineProcess(seeing_spec)) as engine:
        wait_until_up(engine)
        yield engine


def renderers_of(engine):
    """Process ids of those that render for an engine: of its group, as all that it starts."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            is_one = b"batchgen.engine.vllm.images" in path.read_bytes()
            if is_one and os.getpgid(int(path.parent.name)) == engine.pid:
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_images_rendered_in_processes_get_the_same_answers(seeing_engine, seeing_spec, tmp_path):
    for number, colour in enumerate(("red", "blue", "green", "white")):
        (tmp_path / f"{number}.png").write_bytes(picture(colour))
    (tmp_path / "bad.png").write_bytes(b"no image")
    names = ["0.png", "1.png", "bad.png", "2.png", "0.png", "3.png"]
    asked = [request(look_at(str(tmp_path / name)), seed=None) for name in names * 20]
    here = run(seeing_engine, asked)
    many = replace(
        seeing_spec, model_kwargs={**seeing_spec.model_kwargs, "renderer_num_workers": 2}
    )
    with closing(EngineProcess(many)) as engine:
        engine.add(asked[:1])  # At its first image it starts them.
        wait_until_up(engine)
        while engine.num_in_flight:
            engine.step(1.0)
        log = Path(seeing_spec.log_path)
        wait_until(lambda: log.read_text(errors="replace").count(UP) == 2, 300)
        first = run(engine, asked)
        for pid in renderers_of(engine):
            os.kill(pid, signal.SIGKILL)
        again = run(engine, asked)
        wait_until(lambda: log.read_text(errors="replace").count(UP) == 4, 300)
    for found in (here, first, again):
        assert [one.text for one in found] == [one.text for one in here]
        failed = [one.error.error_type for one in found if one.error]
        assert failed == ["image_error"] * 20


def test_images_reach_the_model(seeing_engine, tmp_path):
    inline = "data:image/png;base64," + base64.b64encode(picture("red")).decode()
    (tmp_path / "red.png").write_bytes(picture("red"))
    (tmp_path / "blue.png").write_bytes(picture("blue"))
    urls = [inline, str(tmp_path / "red.png"), (tmp_path / "blue.png").as_uri()]
    asked = [request(look_at(url), seed=None) for url in urls]
    asked += [request(chat("What is it?"), seed=None), request(look_at(*urls), seed=None)]
    red, same, blue, none, three = run(seeing_engine, asked)
    assert red.error is None
    assert red.text == same.text
    assert len({red.text, blue.text, none.text}) == 3
    assert three.num_prompt_tokens > red.num_prompt_tokens > none.num_prompt_tokens


def test_an_image_that_cannot_be_read_is_that_rows_error(seeing_engine, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    urls = [str(tmp_path / "none.png"), str(tmp_path / "bad.png"), "data:image/png;base64,!"]
    *bad, number, good = run(
        seeing_engine,
        [*(request(look_at(url)) for url in urls), request(look_at(7)), ask(chat("hello"))],
    )
    for completion in (*bad, number):
        assert completion.error.error_type == "image_error"
        assert "\n" not in completion.error.error
    assert "none.png" in bad[0].error.error
    assert good.error is None


def test_an_image_whose_request_was_refused_may_come_again(seeing_engine, tmp_path):
    (tmp_path / "green.png").write_bytes(picture("green"))
    seen = look_at(str(tmp_path / "green.png"))
    refused, answered = run(seeing_engine, [request(seen, max_tokens=-1), request(seen)])
    assert refused.error.error_type == "bad_request"
    assert answered.error is None


def test_seeded_requests_survive_more_prompts_than_fit_in_one_step(tmp_path):
    """On a CPU a prompt that is cut over two steps kills vLLM's runner, if it has a seed."""
    spec = make_spec("vllm", tmp_path / "log", max_tokens=2)
    small = {**spec.model_kwargs, "max_num_batched_tokens": 150}
    texts = [f"ticket {number} " + "late again " * 20 for number in range(20)]
    asked = [request(chat(text), temperature=1.0, seed=number) for number, text in enumerate(texts)]
    with closing(EngineProcess(replace(spec, model_kwargs=small))) as engine:
        wait_until_up(engine)
        completions = run(engine, asked)
    assert [completion.error for completion in completions] == [None] * 20
    # Two do not fit in one step.
    assert all(completion.num_prompt_tokens % 150 > 10 for completion in completions)
