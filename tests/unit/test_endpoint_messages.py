"""What is sent to a server, and what of its words is believed."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.core.errors import ConfigError
from batchgen.core.records import EngineSpec, TokenLogprobs
from batchgen.endpoints import warm
from batchgen.endpoints.messages import (
    BadReplyError,
    Server,
    Unsuitable,
    ask,
    read,
    told,
)
from batchgen.endpoints.options import Options, started_at
from batchgen.endpoints.server import retry_after_s
from batchgen.engine.base import HostedRequest
from batchgen.pipeline.prepare import check, plain_http

MODEL = Path(__file__).parent.parent.parent / "sample_data" / "model"

VLLM = Server({None: "m", "style": "style"}, is_vllm=True)
PLAIN = Server({None: "m"}, is_vllm=False)
CHAT = [
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def asked(prompt=CHAT, *, server=VLLM, params=None, lora=None, **sampling):
    spec = EngineSpec("openai", "m", {}, {"max_tokens": 5, **sampling}, loras={"style": "/x"})
    return ask(HostedRequest(1, prompt, 7, params, lora), spec, server)


def good_reply(num=1):
    choices = [
        {"index": at, "finish_reason": "stop", "message": {"content": f"answer {at}"}}
        for at in range(num)
    ]
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    return {"id": "x", "choices": choices, "usage": usage}


def test_a_request_says_all_that_the_job_says():
    found = asked(lora="style", params={"temperature": 0.3}, top_k=4, n=2, logprobs=3)
    assert found.path == "chat/completions"
    assert found.body == {
        "model": "style",
        "max_tokens": 5,
        "temperature": 0.3,
        "top_k": 4,
        "n": 2,
        "seed": 7,
        "messages": [{"role": "user", "content": "one\ntwo"}],
        "logprobs": True,
        "top_logprobs": 4,
    }
    text = asked("as it is", structured_outputs={"regex": "a+"})
    assert text.path == "completions"
    assert text.body["prompt"] == "as it is"
    assert text.body["structured_outputs"] == {"regex": "a+"}


def test_several_passages_are_one_request_and_their_scores_come_in_their_order():
    spec = EngineSpec("openai", "m", {}, {"max_tokens": 1}, task="score")
    found = ask(HostedRequest(1, ("who?", "a", "b"), None), spec, VLLM)
    assert found.body == {"model": "m", "text_1": "who?", "text_2": ["a", "b"]}
    one = ask(HostedRequest(1, ("who?", "a"), None), spec, VLLM)
    assert one.body["text_2"] == "a"
    data = [{"index": 1, "score": 0.5}, {"index": 0, "score": 0.25}]
    reply = read(
        json.dumps({"id": "x", "data": data, "usage": {"prompt_tokens": 3}}).encode(), found
    )
    assert memoryview(reply.samples[0].numbers).cast("f").tolist() == [0.25, 0.5]


def test_a_request_has_its_own_tools():
    own = {"tools": [{"type": "function"}], "tool_choice": "none"}
    assert own.items() <= asked(params=own, server=PLAIN).body.items()


def test_only_vllms_server_goes_on_with_the_assistants_turn():
    begun = [*CHAT, {"role": "assistant", "content": "So"}]
    body = asked(begun).body
    assert (body["add_generation_prompt"], body["continue_final_message"]) == (False, True)
    assert not {"add_generation_prompt", "continue_final_message"} & asked().body.keys()
    with pytest.raises(Unsuitable, match="goes on with the assistant's turn"):
        asked(begun, server=PLAIN)


@pytest.mark.parametrize(
    "sampling",
    [
        *({"top_k": 3}, {"min_p": 0.1}, {"ignore_eos": True}, {"stop_token_ids": [1]}),
        *({"structured_outputs": {"regex": "a"}}, {"structured_outputs": {"grammar": "a"}}),
        {"structured_outputs": {"choice": ["a"]}, "logprobs": 2},
    ],
    ids=str,
)
def test_what_only_vllm_has_is_not_sent_to_others(sampling):
    assert asked(**sampling).body
    with pytest.raises(Unsuitable):
        asked(server=PLAIN, **sampling)


@given(st.data())
def test_a_reply_that_is_damaged_anywhere_is_none_or_as_good_as_whole(data):
    """Any place in it has any other value: it is refused, or what rows get is not touched."""
    num = data.draw(st.integers(1, 3))
    reply = good_reply(num)
    paths = [["id"], ["choices"], ["usage"], ["usage", "prompt_tokens"]]
    paths += [["choices", at, *rest] for at in range(num) for rest in ([], ["index"], ["message"])]
    paths += [["choices", at, "finish_reason"] for at in range(num)]
    *path, last = data.draw(st.sampled_from(paths))
    place = reply
    for key in path:
        place = place[key]
    place[last] = data.draw(JSON_VALUES)
    try:
        found = read(json.dumps(reply).encode(), asked(n=num))
    except BadReplyError:
        return
    assert [sample.text for sample in found.samples] == [f"answer {at}" for at in range(num)] or (
        last in ("message", "index")
    )
    assert len(found.samples) == num


@given(st.binary() | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_at_all_make_it_fail_otherwise(data):
    with pytest.raises(BadReplyError):
        read(data, asked())
    assert told(data, HostedRequest(1, CHAT, 1))


def test_special_tokens_are_told_from_text():
    entry = {"bytes": None, "top_logprobs": []}
    tokens = [
        {"token": "ship", "logprob": -0.1, **entry},
        {"token": "ping", "logprob": -0.2, "top_logprobs": [
            {"token": "ping", "logprob": -0.2}, {"token": "<|im_end|>", "logprob": -2.0},
            {"token": "unlikely", "logprob": -30.0},
        ]},
        {"token": "<end>", "logprob": -0.0, **entry},
    ]  # fmt: skip
    reply = good_reply()
    reply["choices"][0] |= {"message": {"content": "shipping"}, "logprobs": {"content": tokens}}
    (sample,) = read(json.dumps(reply).encode(), asked(logprobs=2)).samples
    assert sample.logprobs == [
        TokenLogprobs("ship", -0.1, []),
        TokenLogprobs("ping", -0.2, [("ping", -0.2), (None, -2.0)]),
        TokenLogprobs(None, 0.0, []),
    ]


@given(st.text(min_size=24), st.text(), st.text())
def test_an_error_text_never_repeats_a_prompt(prompt, before, after):
    request = HostedRequest(1, [{"role": "user", "content": prompt}], 1)
    data = json.dumps({"error": {"message": f"{before} {prompt} {after}"}}).encode()
    plain = " ".join(prompt.split())
    assert len(plain) < 24 or plain not in told(data, request)


@pytest.mark.parametrize(
    ("text", "wait_s"),
    [
        *(("3", 3.0), ("0.5", 0.5), ("-4", 0.0), (None, None), ("soon", None), ("nan", 0.0)),
        ("Wed, 21 Oct 2015 07:28:10 GMT", 10.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(text, wait_s):
    assert retry_after_s(text, 1445412480.0) == wait_s


def test_a_key_is_read_from_its_variable_and_never_told(monkeypatch):
    monkeypatch.setenv("THE_KEY", " abc\n")
    assert Options([], api_key_env="THE_KEY").key() == "abc"
    for wrong in ("", "two words", "umläut"):
        monkeypatch.setenv("THE_KEY", wrong)
        with pytest.raises(ConfigError, match="THE_KEY") as caught:
            Options([], api_key_env="THE_KEY").key()
        assert not wrong or wrong not in str(caught.value)


def test_a_warm_engine_counts_only_while_it_runs_and_if_nobody_else_wrote_it(tmp_path, monkeypatch):

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    mine = [os.getpid(), started_at(os.getpid())]
    path = warm.folder() / "d.json"
    state = {"url": "http://127.0.0.1:1/v1", "key_file": "k", "process": mine}
    for process, mode, counts in [
        *((mine, 0o600, True), (mine, 0o644, False), ([mine[0], "1"], 0o600, False)),
        *(([2**22 + 1, mine[1]], 0o600, False), (None, 0o600, False)),
    ]:
        path.write_text(json.dumps({**state, "process": process}))
        path.chmod(mode)
        assert (warm.read_state("d") is not None) is counts
    assert warm.read_state("other") is None
    assert warm.folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *((5, ["--a-b", "5"]), (True, ["--a-b"]), (False, ["--no-a-b"]), (None, [])),
        *(([1, 2], ["--a-b", "1", "2"]), ({"x": 1}, ["--a-b", '{"x": 1}'])),
    ],
    ids=str,
)
def test_a_keyword_is_written_as_the_command_line_has_it(value, words):
    assert warm.argument("a_b", value) == words


SERVER = {"backend": "openai", "name": "m", "base_url": "http://gpu1:8000/v1"}


@pytest.mark.parametrize(
    ("tables", "problem"),
    [
        ({"model": {**SERVER, "base_url": "ftp://x"}}, "base_url = 'ftp://x' is wrong"),
        ({"model": {**SERVER, "base_url": "http://x/v1?k=1"}}, "base_url = .* is wrong"),
        ({"model": {"backend": "openai", "name": "m"}}, "base_url is missing"),
        ({"model": {**SERVER, "name": ""}}, "name is missing"),
        ({"model": {"backend": "echo", "base_url": "http://x/v1"}}, "base_url goes with backend"),
        ({"model": {**SERVER, "api_key_env": "my-Secret"}}, "api_key_env is no name"),
        ({"model": {**SERVER, "base_url": "https://me:pw@x/v1"}}, "has a password in a URL"),
        ({"model": SERVER, "run": {"replicas": 2}}, "does not go with run.replicas"),
        ({"run": {"replicas": 2, "max_tokens_total": 5}}, "max_tokens_total is counted in one"),
    ],
)
def test_what_cannot_be_is_refused_and_no_key_repeated(make_job, tables, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        make_job(**tables)
    assert "Secret" not in str(caught.value)
    assert "pw" not in str(caught.value)


def recipe_of(make_job, **model):
    return check(make_job(model=model)).recipe


def test_the_recipe_says_what_is_served_and_not_where(make_job):
    there = recipe_of(make_job, **SERVER)
    assert there["model"]["files"] == {"served": "m"}
    elsewhere = {**SERVER, "base_url": ["https://a/v1", "https://b/v1"], "api_key_env": "KEY"}
    assert recipe_of(make_job, **elsewhere) == there
    assert recipe_of(make_job, **{**SERVER, "name": "other"}) != there
    commit = recipe_of(make_job, **{**SERVER, "name": "a/b", "revision": "0" * 40})["model"]
    assert (commit["backend"], commit["files"]) == ("vllm", {"hub": "a/b", "commit": "0" * 40})
    here = {"name": str(MODEL), "max_model_len": 512}
    assert recipe_of(make_job, **{**SERVER, **here}) == recipe_of(make_job, backend="vllm", **here)


@pytest.mark.parametrize(
    ("url", "is_told"),
    [
        *(("http://gpu1/v1", True), ("https://gpu1/v1", False), ("http://127.0.0.1:8/v1", False)),
        *(("http://127.0.0.1.evil.net/v1", True), ("http://[::1]:8/v1", False)),
    ],
)
def test_what_everybody_on_the_way_can_read_is_told(url, is_told):
    assert bool(plain_http([url])) is is_told
