"""Rendering and tokenizing, against a tokenizer that is ten lines long."""

from types import SimpleNamespace

import pytest

from batchgen.core.errors import EngineError, one_line
from batchgen.engine.base import HostedRequest, flatten_parts
from batchgen.engine.vllm.encoder import MAX_BATCH, ChatStyle, Encoder, encode

PLAIN = ChatStyle(None, {})


class Letters:
    """A slow tokenizer: one token a letter; a raw text begins with 0; refuses '!'."""

    def apply_chat_template(
        self, messages, *, chat_template, tokenize, add_generation_prompt, **kw
    ):
        assert tokenize is False
        goes_on = messages[-1]["role"] == "assistant"
        assert kw.get("continue_final_message", False) == goes_on != add_generation_prompt
        prefix = chat_template or ""
        return prefix + "".join(message["content"] for message in messages) + kw.get("suffix", "")

    def encode(self, text, *, add_special_tokens):
        if "!" in text:
            raise ValueError("no\n'!'")
        return [0] * add_special_tokens + [ord(letter) for letter in text]


class FastLetters(Letters):
    """The same with a Rust-like batch inside; counts its batches."""

    def __init__(self):
        self.batches = []
        self._tokenizer = SimpleNamespace(encode_batch_fast=self.encode_batch_fast)

    def encode_batch_fast(self, texts, *, add_special_tokens):
        self.batches.append(list(texts))
        ids = [Letters.encode(self, text, add_special_tokens=add_special_tokens) for text in texts]
        return [SimpleNamespace(ids=row) for row in ids]

    def encode(self, text, *, add_special_tokens):
        self.batches.append(text)
        return super().encode(text, add_special_tokens=add_special_tokens)


def chat(text):
    return [{"role": "user", "content": text}]


def requests(*prompts):
    return [HostedRequest(number, prompt, number) for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize("tokenizer", [Letters(), FastLetters()], ids=["slow", "fast"])
def test_raw_texts_get_special_tokens_and_chats_bring_their_own(tokenizer):
    raw, rendered = encode(tokenizer, requests("ab", chat("ab")), PLAIN)
    assert list(raw.token_ids) == [0, 97, 98]
    assert list(rendered.token_ids) == [97, 98]
    assert (raw.request_id, raw.seed, rendered.request_id, rendered.seed) == (0, 0, 1, 1)


def test_the_jobs_chat_template_and_its_arguments_reach_the_tokenizer():
    (encoded,) = encode(Letters(), requests(chat("b")), ChatStyle("a", {"suffix": "c"}))
    assert list(encoded.token_ids) == [97, 98, 99]


class Tools(Letters):
    """Writes the tools that it is given, and the calls of the chat."""

    def apply_chat_template(self, messages, *, tools, **_):
        return f"{tools} {[message.get('tool_calls') for message in messages]}"


def test_a_request_may_bring_its_own_tools_and_calls_have_their_arguments_as_objects():
    called = [{"function": {"name": "f", "arguments": '{"x": 1}'}}, {"name": "g"}]
    said = [{"role": "assistant", "tool_calls": called}, *chat("a")]
    given = [HostedRequest(0, said, 0, {"tools": ["own"]}), HostedRequest(1, said, 1)]
    style = PLAIN._replace(tools=["job"])
    texts = ["".join(map(chr, one.token_ids)) for one in encode(Tools(), given, style)]
    calls = [{"function": {"name": "f", "arguments": {"x": 1}}}, {"name": "g"}]
    assert texts == [f"{tools} {[calls, None]}" for tools in (["own"], ["job"])]


def test_a_chat_that_ends_with_the_assistant_is_left_open():
    begun = [*chat("a"), {"role": "assistant", "content": "b"}]
    (encoded,) = encode(Letters(), requests(begun), PLAIN)
    assert list(encoded.token_ids) == [97, 98]


@pytest.mark.parametrize("tokenizer", [Letters(), FastLetters()], ids=["slow", "fast"])
def test_a_text_that_cannot_be_encoded_is_its_own_error(tokenizer):
    good, bad, other = encode(tokenizer, requests("a", "b!", "c"), PLAIN)
    assert bad.error.error_type == "tokenizer_error"
    assert bad.error.error == "ValueError: no '!'"
    assert bad.token_ids is None
    assert (list(good.token_ids), list(other.token_ids)) == ([0, 97], [0, 99])


def test_a_template_that_fails_is_its_own_error():
    bad, good = encode(Letters(), requests([{"role": "user"}], chat("c")), PLAIN)
    assert bad.error.error_type == "chat_template_error"
    assert bad.error.error == "KeyError: 'content'"
    assert list(good.token_ids) == [99]


def test_texts_are_encoded_in_one_call():
    tokenizer = FastLetters()
    encode(tokenizer, requests("a", "b", chat("c"), "d"), PLAIN)
    assert tokenizer.batches == [["a", "b", "d"], ["c"]]


def test_an_empty_text_has_no_tokens_and_is_no_error_here():
    (encoded,) = encode(Letters(), requests(chat("")), PLAIN)
    assert (list(encoded.token_ids), encoded.error) == ([], None)


def test_text_parts_become_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert flatten_parts([{"role": "user", "content": parts}]) == chat("a\nb")


def test_parts_that_are_not_text_are_refused():
    with pytest.raises(TypeError, match="type 'audio', only 'text'"):
        flatten_parts([{"role": "user", "content": [{"type": "audio"}, {"type": "text"}]}])


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("two\n  lines"), "ValueError: two lines"),
        (KeyError(), "KeyError"),
        (ValueError("x" * 999), "ValueError: " + "x" * 488),
    ],
)
def test_an_exception_fits_one_line(error, text):
    assert one_line(error) == text


def take(encoder, count):
    taken = []
    while len(taken) < count:
        batch = encoder.take(5.0)
        assert batch
        taken += batch
    return taken


def test_the_encoder_keeps_the_order_and_cuts_large_batches():
    tokenizer = FastLetters()
    encoder = Encoder(lambda: tokenizer, PLAIN)
    prompts = ["x"] * (MAX_BATCH + 10)
    encoder.submit(requests(*prompts))
    taken = take(encoder, len(prompts))
    assert [encoded.request_id for encoded in taken] == list(range(len(prompts)))
    assert [len(batch) for batch in tokenizer.batches] == [MAX_BATCH, 10]
    assert encoder.take(0) == []
    encoder.close()


def test_a_tokenizer_that_does_not_load_is_an_engine_error():
    def fail():
        raise OSError("no tokenizer.json")

    encoder = Encoder(fail, PLAIN)
    with pytest.raises(
        EngineError, match=r"tokenizer cannot be loaded: OSError: no tokenizer\.json"
    ):
        encoder.take(5.0)
    encoder.close()


@pytest.mark.parametrize("part", ["x", None, 5])
def test_a_part_that_is_no_object_is_refused(part):
    with pytest.raises(TypeError, match=r"a content part is no object, expected \{type, text\}"):
        flatten_parts([{"role": "user", "content": [part]}])
