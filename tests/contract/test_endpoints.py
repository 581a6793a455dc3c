"""What rows may rely on when servers do what they should not; see tests/servers.py."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from batchgen.core.errors import ConfigError, EngineError
from batchgen.core.records import EngineSpec
from batchgen.endpoints.engine import OpenAIEngine
from batchgen.engine.base import HostedRequest
from tests.servers import KEY, StandIn, error, stand_in

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 120.0
ids = itertools.count()


def spec_of(*servers, sampling=None, model="m", max_in_flight=None, **endpoint):
    params = {"max_tokens": 40, "temperature": 0.0, **(sampling or {})}
    endpoint = {"urls": [server.url for server in servers], **endpoint}
    endpoint = {"request_timeout_s": 5.0, "endpoint_grace_s": 60.0, **endpoint}
    return EngineSpec("openai", model, {}, params, endpoint=endpoint, max_in_flight=max_in_flight)


def asks(num, text="row {} and so on"):
    return [
        HostedRequest(next(ids), [{"role": "user", "content": text.format(n)}], None)
        for n in range(num)
    ]


def text_of(request):
    return request.prompt[-1]["content"]


def answers(engine, requests, timeout_s=WAIT_S):
    """Have requests answered: each exactly once."""
    engine.add(requests)
    wanted = {request.request_id for request in requests}
    found = {}
    until = time.monotonic() + timeout_s
    while engine.num_in_flight:
        assert time.monotonic() < until, f"{len(found)} of {len(requests)} came back"
        for completion in engine.step(0.2):
            assert completion.request_id in wanted
            assert completion.request_id not in found
            found[completion.request_id] = completion
    assert found.keys() == wanted
    return [found[request.request_id] for request in requests]


def check(engine, requests, **options):
    """All are answered, each with its own text."""
    for request, completion in zip(requests, answers(engine, requests, **options), strict=True):
        assert completion.error is None
        assert completion.text == text_of(request)[:40]


def never(engine):
    """Step an engine that has nothing to give."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        assert engine.step(0.2) == []
    pytest.fail("nothing happened")


def refusal(spec):
    with closing(OpenAIEngine(spec)) as engine:
        never(engine)


class Every:
    """Spoils each n-th request of those that are rows, by a fault of `FAULTS`."""

    def __init__(self, fault, each=4, until=10**9):
        self.fault, self.each, self.until, self.num, self.spoilt = fault, each, until, 0, 0

    def __call__(self, server, request, body):
        if "row" not in json.dumps(body):
            return None
        self.num += 1
        if self.num % self.each or self.num > self.until:
            return None
        self.spoilt += 1
        return self.fault(server, request, body)


async def raw(request, data, *, close=True):
    """Write bytes as they are, and cut the line."""
    transport = request.transport
    transport.write(data)
    if close:
        transport.close()
    await asyncio.sleep(0.05)
    raise web.HTTPServiceUnavailable


def head(length, status="200 OK", *more):
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, *more, "", ""]).encode()


def whole(server, request, body):
    return json.dumps(server.reply(request, body)).encode()


async def cut(server, request, body):
    data = whole(server, request, body)
    await raw(request, head(len(data)) + data[: len(data) // 2])


async def reset(server, request, body):
    request.transport.abort()
    await asyncio.sleep(0.05)


async def doubled(server, request, body):
    data = whole(server, request, body)
    server.answered += 1
    await raw(request, 2 * (head(len(data)) + data), close=False)


async def late(server, request, body):
    """The same once more, a moment later: it comes where the next answer is awaited."""
    data = whole(server, request, body)
    transport = request.transport
    asyncio.get_running_loop().call_later(0.02, transport.write, head(len(data)) + data)
    return web.Response(body=data, content_type="application/json")


def others(server, request, body):
    """Of another row: id and all."""
    before = getattr(server, "kept", None)
    server.kept = server.reply(request, body)
    return web.json_response(before or {"choices": []})


def garbage(server, request, body):
    return web.Response(body=b"\x00\xff<html>" * 50, content_type="application/json")


def no_answer(server, request, body):
    return web.json_response({**server.reply(request, body), "choices": []})


def broken_off(server, request, body):
    reply = server.reply(request, body)
    reply["choices"][0]["finish_reason"] = "abort"
    return web.json_response(reply)


def large(server, request, body):
    return web.Response(body=b"x" * (10 << 20), content_type="application/json")


async def endless(server, request, body):
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(100):
        await response.write(b" " * (1 << 20))
    return response


async def slow_bytes(server, request, body):
    data = whole(server, request, body)
    response = web.StreamResponse(headers={"Content-Length": str(len(data))})
    await response.prepare(request)
    for at in range(0, len(data), 40):
        await response.write(data[at : at + 40])
        await asyncio.sleep(0.02)
    return response


async def hung(server, request, body):
    await server.end.wait()


def oops(server, request, body):
    return error(500, "internal error")


def many(server, request, body):
    return error(429, "slow down", **{"Retry-After": "0.2"})


def unavailable(server, request, body):
    return error(503)


def elsewhere(server, request, body):
    return web.Response(status=307, headers={"Location": "http://127.0.0.2:1/v1/chat/completions"})


FAULTS = [
    *(cut, reset, doubled, late, others, garbage, no_answer, broken_off, large, endless),
    *(slow_bytes, hung, oops, many, unavailable, elsewhere),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_server_that_spoils_replies_costs_no_row(fault):
    faults = Every(fault, each=40 if fault is hung else 9)
    with (
        stand_in(delay_s=0.01, faults=faults) as server,
        closing(OpenAIEngine(spec_of(server, request_timeout_s=2.0, max_in_flight=16))) as engine,
    ):
        check(engine, asks(100))
    assert faults.spoilt


@pytest.mark.proof
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_nothing_but_faults_for_a_while_costs_no_row(fault):
    num = 6 if fault is unavailable else 60
    faults = Every(fault, each=1, until=num)
    with (
        stand_in(faults=faults) as server,
        closing(OpenAIEngine(spec_of(server, request_timeout_s=0.5, max_in_flight=16))) as engine,
    ):
        check(engine, asks(100))
    assert faults.spoilt == num


def test_a_server_that_is_killed_and_comes_back_costs_no_row():
    server = StandIn(delay_s=0.02).start()
    with closing(OpenAIEngine(spec_of(server, max_in_flight=32))) as engine:
        requests = asks(600)
        wave = threading.Thread(target=lambda: check(engine, requests))
        wave.start()
        for _ in range(5):
            until = server.answered + 40
            while server.answered < until and wave.is_alive():
                time.sleep(0.005)
            server.stop()
            server = StandIn(delay_s=0.02, port=server.port).start()
        wave.join(WAIT_S)
        assert not wave.is_alive()
        server.stop()


def test_rows_go_where_there_is_room_and_on_when_a_server_dies():
    one = StandIn(delay_s=0.05).start()
    with (
        stand_in(delay_s=0.05) as two,
        closing(OpenAIEngine(spec_of(one, two, max_in_flight=32))) as engine,
    ):
        check(engine, asks(200))
        assert min(one.answered, two.answered) > 50
        one.stop()
        check(engine, asks(100))


@pytest.mark.proof
def test_a_server_that_hangs_costs_no_row():
    with (
        stand_in(delay_s=0.01) as good,
        stand_in(delay_s=0.01, faults=Every(hung, each=1)) as bad,
        closing(
            OpenAIEngine(spec_of(good, bad, request_timeout_s=2.0, max_in_flight=16))
        ) as engine,
    ):
        check(engine, asks(300))
        assert good.answered >= 300


@pytest.mark.parametrize(
    ("fault", "num"),
    [(reset, 1), *(pytest.param(one, 100, marks=pytest.mark.proof) for one in (cut, oops, hung))],
)
def test_a_row_that_always_fails_is_an_error_and_the_others_are_not(fault, num):
    def spoil(server, request, body):
        return fault(server, request, body) if "poison" in json.dumps(body) else None

    with (
        stand_in(delay_s=0.005, faults=spoil) as one,
        stand_in(delay_s=0.005, faults=spoil) as two,
        closing(OpenAIEngine(spec_of(one, two, request_timeout_s=0.5, max_in_flight=8))) as engine,
    ):
        poison = asks(1, "poison {}")
        rows = asks(num - 1)
        *others, last = answers(engine, [*rows, *poison])
        assert [answer.text for answer in others] == [text_of(row)[:40] for row in rows]
        assert last.error is not None
        assert last.error.error_type == "endpoint_failed"
        assert "poison" not in last.error.error
        tried = [
            sum("poison" in json.dumps(body) for body in server.asked) for server in (one, two)
        ]
        assert min(tried) > 0
        assert sum(tried) >= 3


def test_a_row_that_ends_the_server_is_an_error_and_costs_no_other(tmp_path):
    """It takes all that is under way with it, each time."""

    def spoil(server, request, body):
        if "poison" not in json.dumps(body):
            return None
        for line in list(server.lines):
            line.abort()
        return hung(server, request, body)

    with (
        stand_in(delay_s=0.02, faults=spoil) as server,
        closing(OpenAIEngine(spec_of(server, max_in_flight=16))) as engine,
    ):
        rows, poison = asks(150), asks(1, "poison {}")
        *found, last = answers(engine, [*rows, *poison])
        assert last.error.error_type == "endpoint_failed"
        assert [answer.text for answer in found] == [text_of(row)[:40] for row in rows]


def test_a_server_that_refuses_a_row_is_believed():
    def spoil(server, request, body):
        text = body["messages"][-1]["content"]
        if "long" in text:
            return error(400, "This model's maximum context length is 4096 tokens")
        if "secret" in text:
            return error(400, f"cannot read: {text}")
        return error(422, "no") if "odd" in text else None

    with stand_in(faults=spoil) as server, closing(OpenAIEngine(spec_of(server))) as engine:
        texts = [
            "row {} long",
            "row {} of a secret that is nobody's business",
            "row {} odd",
            "row {}",
        ]
        requests = [asks(1, text)[0] for text in texts]
        found = [answer.error for answer in answers(engine, requests)]
    assert [one and one.error_type for one in found] == [
        *("prompt_too_long", "bad_request", "bad_request", None),
    ]
    assert "secret" not in found[1].error


def test_nothing_for_too_long_ends_it_and_says_so():
    with (
        stand_in(faults=Every(unavailable, each=1)) as server,
        closing(OpenAIEngine(spec_of(server, endpoint_grace_s=1.0))) as engine,
    ):
        engine.add(asks(10))
        with pytest.raises(EngineError, match=r"no server has answered.*busy.*run again to go on"):
            never(engine)


@pytest.mark.proof
def test_a_server_that_answers_trials_and_no_row_makes_no_errors():
    """It ends the run: nothing is proven against its rows."""
    with (
        stand_in(faults=Every(oops, each=1)) as server,
        closing(OpenAIEngine(spec_of(server, endpoint_grace_s=10.0))) as engine,
    ):
        engine.add(asks(40))
        with pytest.raises(EngineError, match="no server has answered"):
            never(engine)


def test_a_row_that_is_always_too_much_is_an_error_in_the_end():
    def spoil(server, request, body):
        return error(429, **{"Retry-After": "0"}) if "poison" in str(body) else None

    with (
        stand_in(delay_s=0.02, faults=spoil) as server,
        closing(OpenAIEngine(spec_of(server, endpoint_grace_s=3.0))) as engine,
    ):
        much, *others = answers(engine, [*asks(1, "poison {}"), *asks(300)])
    assert much.error.error_type == "endpoint_failed"
    assert all(answer.error is None for answer in others)


def test_a_server_that_is_not_there_yet_is_waited_for():
    server = StandIn().start()
    server.stop()
    with closing(OpenAIEngine(spec_of(server))) as engine:
        later = StandIn(port=server.port)
        timer = threading.Timer(1.0, later.start)
        timer.start()
        check(engine, asks(5))
        later.stop()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"key": "other"}, "HTTP 401: wrong key"),
        ({"model": "another"}, "it has no model 'm'; it has 'another'"),
        ({"faults": lambda *_: error(400, "no grammar here")}, "HTTP 400: no grammar here"),
        ({"faults": elsewhere}, "it sends on to another place"),
    ],
    ids=["key", "model", "request", "redirect"],
)
def test_what_a_server_lacks_is_told_before_the_first_row(options, problem):
    with stand_in(**options) as server:
        with pytest.raises(ConfigError, match=problem):
            refusal(spec_of(server))
        assert len(server.asked) <= 1


@pytest.mark.parametrize(
    ("sampling", "problem"),
    [
        ({"top_k": 5}, "sampling.top_k is vLLM's"),
        ({"logprobs": 3}, "no log probabilities"),
        ({"structured_outputs": {"regex": "a+"}}, "output.regex needs vLLM's server"),
    ],
)
def test_what_only_vllm_has_is_refused_elsewhere(sampling, problem):
    with stand_in(kind="plain") as server, pytest.raises(ConfigError, match=problem):
        refusal(spec_of(server, sampling=sampling))


def test_fewer_answers_than_asked_for_are_refused():
    def one(server, request, body):
        return web.json_response(server.reply(request, {**body, "n": 1}))

    with stand_in(faults=one) as server, pytest.raises(ConfigError, match="1 of 3 answers"):
        refusal(spec_of(server, sampling={"n": 3}))


def test_a_choice_is_asked_for_as_a_schema_where_there_are_no_choices():
    def label(server, request, body):
        if "response_format" not in body:
            return None
        schema = body["response_format"]["json_schema"]["schema"]
        chosen = json.dumps({"answer": schema["properties"]["answer"]["enum"][1]})
        reply = server.reply(request, body)
        reply["choices"][0] |= {"message": {"content": chosen}, "finish_reason": "stop"}
        return web.json_response(reply)

    form = {"structured_outputs": {"choice": ["yes", "no"]}}
    with (
        stand_in(kind="plain", faults=label) as server,
        closing(OpenAIEngine(spec_of(server, sampling=form))) as engine,
    ):
        assert {answer.text for answer in answers(engine, asks(5))} == {"no"}


def quoting(server, request, body):
    """Answers another text to the fixed question, and rows as ever."""
    if "rainbow" not in json.dumps(body):
        return None
    return web.json_response(
        server.reply(request, {**body, "messages": [{"content": "? " + "x" * 30}]})
    )


def facts_of(server, **endpoint):
    with closing(OpenAIEngine(spec_of(server, **endpoint))) as engine:
        check(engine, asks(1))
        return engine.facts.served


@pytest.mark.parametrize(
    ("kind", "change", "problem"),
    [
        ("vllm", {"logprob": -0.7, "version": "0.33.0"}, None),
        ("vllm", {"logprob": -0.9}, "at a log probability of -0.90, where it was -0.50: another"),
        ("vllm", {"faults": quoting}, "'\\?' as token 1, where it was 'N'"),
        ("plain", {"root": "n"}, "its model is 'n', and was 'm': another model; --fresh"),
        ("plain", {"faults": quoting}, None),
    ],
    ids=["noise", "weights", "tokens", "root", "no-logprobs"],
)
def test_a_server_with_another_model_is_refused(kind, change, problem):
    with stand_in(kind=kind) as server:
        known = facts_of(server)
    with stand_in(kind=kind, **change) as other:
        if problem is None:
            assert facts_of(other, known=known).keys() == known.keys()
            return
        with pytest.raises(ConfigError, match=problem):
            refusal(spec_of(other, known=known))
        assert not [body for body in other.asked if "row" in json.dumps(body)]


def test_servers_with_two_models_are_refused_together():
    with (
        stand_in() as one,
        stand_in(logprob=-2.0) as two,
        pytest.raises(ConfigError, match="another model"),
    ):
        refusal(spec_of(one, two))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "ollama", "context": 400}, "row {} " + "of twenty letters" * 30),
        ({"kind": "ollama", "context": 400, "shifts": False}, "row {} " + "of twenty letters" * 30),
        ({"kind": "plain", "context": 400}, "row {} " + "a b c " * 100),
        ({"kind": "llama.cpp", "context": 400}, "row {} " + "a b c " * 100),
    ],
    ids=["ollama", "ollama-refuses", "some-other", "llama.cpp"],
)
def test_a_prompt_that_a_server_cuts_in_silence_is_an_error(options, text):
    """And one that just fits is none."""
    with stand_in(**options) as server, closing(OpenAIEngine(spec_of(server))) as engine:
        check(engine, asks(3, "row {} " + "x" * 380))
        found = [one.error for one in answers(engine, [*asks(2, text), *asks(1)])]
    assert [one and one.error_type for one in found] == ["prompt_too_long", "prompt_too_long", None]
    is_said = options["kind"] == "llama.cpp" or not options.get("shifts", True)
    assert ("exceeds the available context" if is_said else "has cut the prompt") in found[0].error


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"context": 400}, "its context is 400 tokens, and the job's 512"),
        ({"context": 1, "kind": "plain"}, "the server has cut the prompt to 1 tokens"),
    ],
    ids=["told", "tried"],
)
def test_a_context_that_is_too_small_is_told_before_the_first_row(options, problem):
    with stand_in(**{"kind": "ollama", **options}) as server:
        spec = spec_of(server)
        with pytest.raises(ConfigError, match=problem):
            refusal(replace(spec, model_kwargs={"max_model_len": 512}))


def test_a_server_that_loads_its_model_is_waited_for():
    """As llama.cpp's does: its list is there before, and all else is 503."""
    loading = Every(unavailable, each=1, until=2)
    with (
        stand_in(kind="llama.cpp", faults=lambda *asked: loading(*asked[:2], "row")) as server,
        closing(OpenAIEngine(spec_of(server))) as engine,
    ):
        check(engine, asks(5))
    assert loading.spoilt == 2


def test_bounds_hold():
    with stand_in() as server:
        started = time.monotonic()
        with closing(OpenAIEngine(spec_of(server, requests_per_minute=600))) as engine:
            check(engine, asks(25))
            assert time.monotonic() - started > 1.0
    with stand_in(delay_s=0.02) as server:
        with closing(OpenAIEngine(spec_of(server, max_in_flight=3))) as engine:
            check(engine, asks(30))
        assert server.most_at_once <= 3
    with stand_in() as server:
        started = time.monotonic()
        with closing(OpenAIEngine(spec_of(server, tokens_per_minute=60_000))) as engine:
            check(engine, asks(60))  # Some 30 tokens each, of 1,000 a second.
            assert time.monotonic() - started > 0.5


@pytest.mark.parametrize(("others", "least", "most"), [(0, 301, 400), (1, 256, 256)])
def test_vllm_s_server_gets_more_before_its_first_answer_while_nothing_waits(others, least, most):
    held = []

    async def hold(server, request, body):
        while "row" in json.dumps(body) and not held:
            await asyncio.sleep(0.01)
            if server.at_once >= least and server.looks >= 8:
                held.append(server.at_once)

    with (
        stand_in(room=300, others=others, faults=hold) as server,
        closing(OpenAIEngine(spec_of(server, request_timeout_s=WAIT_S))) as engine,
    ):
        check(engine, asks(450))
    assert least <= held[0] <= most


def job_file(folder, server, num=40, **tables):
    """A job whose rows a server answers; the key's variable is KEY_OF_TEST."""
    rows = [{"id": n, "text": f"row {n} has a secret: canary-prompt"} for n in range(num)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "input": {"path": "rows.jsonl", "columns": ["id"]},
        "prompt": {"user": "{{ text }}"},
        "model": {
            "backend": "openai", "name": "m", "base_url": server.url, "api_key_env": "KEY_OF_TEST",
        },
        "sampling": {"max_tokens": 8, "temperature": 0},
        "output": {"path": "out"},
        "checks": {"allow_truncated": True},
        "run": {"endpoint_grace_s": 2.0},
    }  # fmt: skip
    for name, table in tables.items():
        given[name] = {**given.get(name, {}), **table}
    lines = []
    for name, table in given.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path = folder / "job.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def batchgen(*arguments):
    command = [sys.executable, "-m", "batchgen", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KEY_OF_TEST": KEY}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.proof
def test_a_run_that_no_server_answers_stops_and_goes_on_where_it_was(tmp_path):
    server = StandIn(key=KEY, faults=lambda *_: hold(server), delay_s=0.0).start()

    def hold(server):
        return error(503) if server.answered >= 20 else None

    job = job_file(tmp_path, server)
    first = batchgen("run", job, "--json")
    summary = json.loads(first.stdout)
    assert (first.returncode, summary["num_ok"] >= 15, summary["num_left"] > 0) == (1, True, True)
    assert "no server has answered" in first.stderr
    server.faults = None
    before = server.answered
    second = json.loads(batchgen("run", job, "--json").stdout)
    assert (second["exit_code"], second["num_ok"], second["num_errors"]) == (0, 40, 0)
    assert server.answered - before <= 40 - summary["num_ok"] + 2  # And two trials.
    server.stop()


def test_neither_key_nor_prompt_is_anywhere_but_at_the_server(tmp_path):
    spoilt = itertools.count()

    def spoil(server, request, body):
        number = next(spoilt) if "row" in str(body) else 1
        texts = [f"wrong {request.headers['Authorization']}", f"cannot: {body['messages']}"]
        return error(400 + 100 * (number % 4 > 1), texts[number % 2]) if number % 3 == 0 else None

    with stand_in(key=KEY, faults=spoil) as server:
        job = job_file(tmp_path, server, gate={"max_error_rate": 1.0}, output={"path": "out"})
        done = batchgen("run", job, "--json")
        wrong = batchgen("run", job, "--fresh", "--set", f"model.api_key_env={KEY}")
        told = [done.stdout, done.stderr, wrong.stdout, wrong.stderr]
        told += [one.stdout for one in (batchgen("show", job, "--errors"), batchgen("plan", job))]
    assert json.loads(done.stdout)["num_errors"] > 5
    assert wrong.returncode == 2
    texts = [text.encode() for text in told]
    texts += [file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(texts) > 10
    for text in texts:
        assert KEY.encode() not in text
        assert b"canary-prompt" not in text


def test_a_budget_is_never_overdrawn(tmp_path):
    with stand_in(key=KEY) as server:
        job = job_file(tmp_path, server, num=400, run={"max_tokens_total": 8000})
        runs = [json.loads(batchgen("run", job, "--json").stdout) for _ in range(2)]
    for done in runs:
        spent = done["run"]["num_prompt_tokens"] + done["run"]["num_output_tokens"]
        assert 7000 < spent <= 8000
        assert (done["exit_code"], done["state"]) == (75, "stopped")
        assert "max_tokens_total = 8000 is spent" in done["reason"]
    assert runs[1]["num_ok"] > 1.5 * runs[0]["num_ok"]


def test_the_next_night_knows_the_server_s_model_again(tmp_path):
    """Another model is refused, another version is told; `--fresh` begins with what there is."""
    ways = [
        ({}, 5, (), 0, []),
        ({"logprob": -3.0}, 10, (), 2, []),
        ({"logprob": -3.0}, 10, ("--fresh",), 0, []),
        ({"logprob": -3.0, "version": "0.33.0"}, 15, (), 0, ["version: '0.32.0' -> '0.33.0'"]),
    ]
    port = 0
    for server, num, options, code, told in ways:
        with stand_in(key=KEY, port=port, **server) as one:
            port = one.port
            job = job_file(tmp_path, one, num)
            done = json.loads(batchgen("run", job, "--json", *options).stdout)
            assert done["exit_code"] == code
            assert [text.partition("what it was, ")[2] for text in done["warnings"]] == told
            rows = [body for body in one.asked if "canary" in json.dumps(body)]
            assert len(rows) == (num if options else 5) * (code == 0)


@pytest.mark.proof
def test_plan_check_and_doctor_ask_no_server(tmp_path):
    server = StandIn(key=KEY).start()
    server.stop()
    job = job_file(tmp_path, server)
    told = {name: batchgen(name, job) for name in ("plan", "check", "doctor")}
    assert {name: one.returncode for name, one in told.items()} == dict.fromkeys(told, 0)
    assert "tokens of prompts are told as bytes" in told["plan"].stderr + told["plan"].stdout
    assert server.url in told["doctor"].stdout
