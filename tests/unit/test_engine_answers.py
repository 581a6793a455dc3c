"""What is made of requests and answers around vLLM, without vLLM."""

import base64
import json
import math
import random
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers

from batchgen.core.errors import ConfigError, EngineDeadError, EngineError
from batchgen.core.records import EngineSpec, RowError, TokenLogprobs
from batchgen.engine.base import HostedRequest
from batchgen.engine.process import last_words
from batchgen.engine.supervised import SupervisedEngine
from batchgen.engine.vllm.answers import AnswerReader, prompt_end, special_token_ids
from batchgen.engine.vllm.encoder import ChatStyle, encode, has_images
from batchgen.engine.vllm.images import render_images, with_local_images
from batchgen.engine.vllm.params import check_grammars_once, pass_to_reasoner
from batchgen.engine.vllm.settings import llm_kwargs, lora_kwargs
from tests.fakes import ask

LETTERS = SimpleNamespace(
    decode=lambda ids: "".join(map(chr, ids)),
    all_special_ids=[2],
    added_tokens_decoder={3: SimpleNamespace(special=True), 4: SimpleNamespace(special=False)},
)
STYLE = ChatStyle(None, {})
ROOT = Path(__file__).parents[2]


def entry(probability, decoded_token=None):
    logprob = math.log(probability) if probability else -math.inf
    return SimpleNamespace(logprob=logprob, rank=1, decoded_token=decoded_token)


def answer(text, index=0, **rest):
    rest = {"token_ids": [], "logprobs": None, **rest}
    return SimpleNamespace(text=text, index=index, finish_reason="stop", **rest)


def output(*answers):
    return SimpleNamespace(outputs=answers, prompt_token_ids=[1])


def reader():
    return AnswerReader(LETTERS, special_token_ids(LETTERS), None)


def logprobs_of(token_ids, positions, num):
    sample = answer("", token_ids=token_ids, logprobs=positions)
    return reader().read(output(sample), num)[0].logprobs


def test_answers_come_in_the_order_of_their_index():
    samples = reader().read(output(answer("b", 1), answer("a", 0)), None)
    assert [sample.text for sample in samples] == ["a", "b"]
    assert {sample.logprobs for sample in samples} == {None}


def test_the_likeliest_tokens_come_first_and_hopeless_ones_not_at_all():
    position = {97: entry(0.2), 98: entry(0.7), 99: entry(9e-6), 100: entry(0)}
    (one,) = logprobs_of([97], [position], 3)
    assert one == TokenLogprobs(
        "a", pytest.approx(math.log(0.2)), [("b", math.log(0.7)), ("a", math.log(0.2))]
    )


def test_a_sampled_token_beyond_the_likeliest_stands_apart():
    position = {97: entry(0.1), 98: entry(0.7), 99: entry(0.15)}
    (one,) = logprobs_of([97], [position], 2)
    assert (one.token, [token for token, _ in one.top]) == ("a", ["b", "c"])
    assert logprobs_of([97], [position], 0)[0].top == []
    assert len(logprobs_of([97], [position], -1)[0].top) == 3


def test_special_tokens_have_no_text_and_decoded_ones_keep_vllms():
    (one,) = logprobs_of([2], [{2: entry(0.6, "<end>"), 97: entry(0.3, "\u0120a")}], 5)
    assert (one.token, [token for token, _ in one.top]) == (None, [None, "\u0120a"])


def test_special_ids_are_the_tokenizers_and_those_that_end_answers():
    assert special_token_ids(LETTERS) == {2, 3}
    assert special_token_ids(LETTERS, 7, [8, 9], None) == {2, 3, 7, 8, 9}


def spec(**fields):
    return EngineSpec("vllm", "model", fields.pop("model_kwargs", {}), {}, **fields)


def write_adapter(folder, rank):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return str(folder)


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (4, 8), (16, 16), (65, 128), (600, 600)])
def test_room_for_adapters_is_for_the_biggest_of_them(tmp_path, rank, room):
    loras = {"a": write_adapter(tmp_path / "a", 1), "b": write_adapter(tmp_path / "b", rank)}
    expected = {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 2, "max_lora_rank": room}
    assert lora_kwargs(loras) == expected


def test_at_most_eight_adapters_are_on_the_device(tmp_path):
    loras = {str(n): write_adapter(tmp_path / str(n), 8) for n in range(70)}
    kwargs = llm_kwargs(spec(loras=loras), is_cpu=False)
    assert (kwargs["max_loras"], kwargs["max_cpu_loras"]) == (8, 64)
    given = spec(loras=loras, model_kwargs={"max_loras": 3})
    assert llm_kwargs(given, is_cpu=False)["max_loras"] == 3


def test_on_a_cpu_one_slot_for_adapters_stays_empty(tmp_path):
    loras = {str(n): write_adapter(tmp_path / str(n), 8) for n in range(9)}
    for given in ({}, {"max_loras": 2}):
        kwargs = llm_kwargs(spec(loras=loras, model_kwargs=given), is_cpu=True)
        assert (kwargs["max_loras"], kwargs["max_cpu_loras"]) == (10, 10)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read: No such file"),
        *((text, "its rank") for text in ("{}", "[", '{"r": "x"}', '{"r": 1e999}', "[" * 100_000)),
    ],
)
def test_a_folder_without_an_adapter_is_named(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(EngineError, match=rf"^adapter 'red': {tmp_path}/.*{problem}"):
        lora_kwargs({"red": str(tmp_path)})


@pytest.mark.parametrize(
    ("logprobs", "limit"), [(None, None), (0, None), (20, None), (21, 21), (-1, -1)]
)
def test_more_logprobs_than_vllm_gives_raise_its_limit(logprobs, limit):
    asked = EngineSpec("vllm", "model", {}, {"logprobs": logprobs})
    assert llm_kwargs(asked, is_cpu=False).get("max_logprobs") == limit


def test_what_the_job_gives_goes_over_what_we_set():
    given = {"max_logprobs": 5, "reasoning_parser": "b", "mm_processor_cache_gb": 1}
    asked = EngineSpec("vllm", "m", given, {"logprobs": 50}, reasoning_parser="a")
    kwargs = llm_kwargs(asked, is_cpu=False)
    assert {name: kwargs[name] for name in given} == given


def image(url):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def test_chats_with_images_are_left_to_the_engine_with_what_they_bring():
    asked = HostedRequest(5, image("x"), 9, {"n": 2}, "red")
    (encoded,) = encode(None, [asked], STYLE)
    assert encoded.chat == asked.prompt
    assert (encoded.token_ids, encoded.error) == (None, None)
    assert (encoded.request_id, encoded.seed, encoded.params, encoded.lora) == (
        5,
        9,
        {"n": 2},
        "red",
    )


@pytest.mark.parametrize(
    "prompt",
    ["text", [{"role": "user", "content": "text"}], [{"role": "user"}],
     [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}]],
)  # fmt: skip
def test_other_prompts_have_no_images(prompt):
    assert not has_images(prompt)


def test_tools_reach_the_chat_template():
    def apply_chat_template(messages, *, tools, **_):
        return f"{tools}"

    tokenizer = SimpleNamespace(
        apply_chat_template=apply_chat_template,
        encode=lambda text, add_special_tokens: [len(text)],
    )
    asked = [HostedRequest(0, [{"role": "user", "content": "a"}], None)]
    (with_tools,) = encode(tokenizer, asked, ChatStyle(None, {}, [{"name": "find"}]))
    (without,) = encode(tokenizer, asked, STYLE)
    assert list(with_tools.token_ids) == [len("[{'name': 'find'}]")]
    assert list(without.token_ids) == [len("None")]


def test_local_images_are_put_into_the_chat(tmp_path):
    path = tmp_path / "a picture.jpg"
    path.write_bytes(b"abc")
    data = "data:image/jpeg;base64," + base64.b64encode(b"abc").decode()
    for url in (str(path), path.as_uri()):
        assert with_local_images(image(url)) == image(data)
    for url in ("https://example.org/a.png", "data:image/png;base64,abc"):
        assert with_local_images(image(url)) == image(url)
    short = [{"role": "user", "content": [{"type": "image_url", "image_url": str(path)}]}]
    assert with_local_images(short) == image(data)


def test_an_image_for_a_model_that_sees_none_is_that_rows_error():
    llm = SimpleNamespace(model_config=SimpleNamespace(is_multimodal_model=False))
    error = render_images(llm, image("x"), STYLE)
    assert isinstance(error, RowError)
    assert error.error_type == "chat_template_error"
    assert "'image_url'" in error.error


def test_a_missing_image_is_that_rows_error(tmp_path):
    llm = SimpleNamespace(model_config=SimpleNamespace(is_multimodal_model=True))
    error = render_images(llm, image(str(tmp_path / "none.png")), STYLE)
    assert error.error_type == "image_error"
    assert "none.png" in error.error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConfigError("output", ["a", "b"]), ("config", ("output", ("a", "b")))),
        (EngineError("no memory"), ("refused", "no memory")),
        (EngineDeadError("gone"), ("dead", "gone")),
        (ValueError("odd\nthing"), ("dead", "ValueError: odd thing")),
    ],
)
def test_last_words_say_who_is_at_fault(error, words):
    assert last_words(error) == words


class Refusing:
    """An engine that the job is at fault with."""

    facts, capacity, num_in_flight, stats, closed = None, 4, 0, None, False

    def add(self, requests):
        pass

    def step(self, timeout_s):
        raise ConfigError("output", ["no such schema"])

    def close(self):
        self.closed = True


def test_a_job_at_fault_is_told_at_once_and_no_other_engine_is_built():
    built = []

    def build(_):
        built.append(Refusing())
        return built[-1]

    with closing(SupervisedEngine(build, spec)) as engine:
        engine.add([ask(0)])
        with pytest.raises(ConfigError, match="no such schema"):
            engine.step(0)
        assert engine.num_deaths == 0
    assert len(built) == 1
    assert built[0].closed


def test_the_cores_reasoner_is_told_how_chats_are_rendered():
    request = SimpleNamespace(reasoning_parser_kwargs=None)
    processor = SimpleNamespace(process_inputs=lambda name, *, seed: (request, name, seed)[0])
    pass_to_reasoner(SimpleNamespace(input_processor=processor), {"thinking": True})
    assert processor.process_inputs("a", seed=1) is request
    assert request.reasoning_parser_kwargs == {"chat_template_kwargs": {"thinking": True}}
    pass_to_reasoner(SimpleNamespace(), {"thinking": True})


def test_a_grammar_is_checked_once_and_everything_else_each_time():
    checked = []
    processor = SimpleNamespace(_validate_params=lambda params, tasks: checked.append(params.seed))
    engine = SimpleNamespace(input_processor=processor)
    check_grammars_once(engine)
    grammar, other = object(), object()
    for seed, brought in enumerate([grammar, grammar, other, None, None, grammar]):
        params = SimpleNamespace(seed=seed, structured_outputs=brought)
        processor._validate_params(params, ("generate",))
    assert checked == [0, 2, 3, 4]
    check_grammars_once(SimpleNamespace())  # A vLLM without it is left as it is.


def test_a_grammar_that_is_refused_is_refused_each_time():
    def refuse(params, tasks):
        raise ValueError("no")

    processor = SimpleNamespace(_validate_params=refuse)
    check_grammars_once(SimpleNamespace(input_processor=processor))
    params = SimpleNamespace(structured_outputs=object())
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            processor._validate_params(params, ("generate",))


def byte_fallback():
    """A tokenizer like Llama 2's: characters that it lacks are byte tokens."""
    words = ["\u2581", "a", "b", "\u2581a", "\u2581b"]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    model = tokenizers.models.BPE(
        {name: at for at, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True
    )
    made = tokenizers.Tokenizer(model)
    d = tokenizers.decoders
    strip = d.Strip(" ", 1, 0)
    made.decoder = d.Sequence([d.Replace("\u2581", " "), d.ByteFallback(), d.Fuse(), strip])
    made.add_special_tokens(["<unk>", "<img>"])
    return made


def byte_level():
    return tokenizers.Tokenizer.from_file(str(ROOT / "sample_data/model/tokenizer.json"))


def streamed(tokenizer, prompt, answer):
    """An answer's text, token by token, as vLLM's detokenizer makes it."""
    stream, text = tokenizers.decoders.DecodeStream(ids=prompt, skip_special_tokens=True), ""
    for token_id in answer:
        try:
            text += stream.step(tokenizer, token_id) or ""
        except Exception as error:
            if "Invalid prefix" not in str(error):
                raise
            stream = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
            text += stream.step(tokenizer, token_id) or ""
    return text


@pytest.mark.parametrize("make", [byte_fallback, byte_level])
def test_an_answers_text_depends_on_no_more_than_the_prompts_end(make):
    tokenizer, dice = make(), random.Random(1)
    pieces = [
        "a b",
        " ",
        "က" * 15,
        "😀😀",
        "Grüße",
        "b" * 9,
        "x\n",
        "<img>" * 36,
        "<|im_end|>" * 34,
    ]
    num_cut = 0
    for _ in range(600):
        text = "".join(dice.choices(pieces, k=dice.randrange(1, 30)))
        prompt = tokenizer.encode(text, add_special_tokens=False).ids
        answer = tokenizer.encode("".join(dice.choices(pieces, k=3)), add_special_tokens=False).ids
        answer = answer[dice.randrange(3) :][:30] + dice.choices(range(256), k=6)
        end = prompt_end(prompt, tokenizer, skips=True)
        assert prompt[-len(end) :] == end
        num_cut += len(end) < len(prompt)
        assert streamed(tokenizer, end, answer) == streamed(tokenizer, prompt, answer)
    assert num_cut > 200
