"""`batchgen serve` as an unmodified `openai` client meets it; no vLLM."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import openai
import pytest

from tests.serving import (
    CHAT,
    ECHO,
    SLOW,
    Server,
    await_state,
    batch_of,
    lines_of,
    request,
    wait_for,
)

pytestmark = pytest.mark.proof
MODEL = Path(__file__).parents[2] / "sample_data" / "model"


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(config=ECHO, *words):
        servers.append(Server(tmp_path / f"root-{len(servers)}", config, *words))
        return servers[-1]

    yield start
    for server in servers:
        server.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One server for tests that do not end it; each has a key of its own."""
    folder = tmp_path_factory.mktemp("serve")
    keys, made = folder / "keys", {}
    limits = "[serve]\nmax_file_mb = 1\nmax_requests = 200\nmax_batches = 5\nmax_files = 12\n"
    for owner in ("ann", "bob", "cid", "dan", "eve", "fay"):
        made[owner] = new_key(keys, owner)
    assert keys.stat().st_mode & 0o077 == 0
    server = Server(folder / "root", f"{ECHO}\n{limits}", "--keys", str(keys))
    server.keys = made
    yield server
    server.end(signal.SIGKILL)


def ids_of(client, batch):
    """custom_ids of both files: each line of the input must be in exactly one."""
    both = [lines_of(client, name) for name in (batch.output_file_id, batch.error_file_id)]
    return [[line["custom_id"] for line in lines] for lines in both]


def test_a_batch_from_upload_to_deletion(serve):
    server = serve()
    client = server.client()
    batch = batch_of(client, [request(at) for at in range(30)], metadata={"night": "one"})
    assert batch.status == "validating"
    assert (batch.request_counts.total, batch.metadata) == (0, {"night": "one"})
    done = await_state(client, batch, {"completed"})
    assert (done.request_counts.total, done.request_counts.completed) == (30, 30)
    assert done.usage.output_tokens > 30
    assert (done.error_file_id, done.model) == (None, "m")
    assert done.in_progress_at <= done.finalizing_at <= done.completed_at
    answers = lines_of(client, done.output_file_id)
    assert [line["custom_id"] for line in answers] == [f"row-{at}" for at in range(30)]
    body = openai.types.chat.ChatCompletion.model_validate(answers[7]["response"]["body"])
    assert body.choices[0].message.content == "hello 7"
    assert client.files.wait_for_processing(done.output_file_id).purpose == "batch_output"

    async def same():
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="any") as own:
            assert (await own.batches.retrieve(batch.id)).to_dict() == done.to_dict()
            return [one.id async for one in own.files.list()]

    assert asyncio.run(same()) == [done.output_file_id, done.input_file_id]
    out = server.root / "batches" / batch.id / "out"
    assert list(out.glob("*.parquet"))
    assert client.files.delete(done.output_file_id).deleted
    assert not out.exists()
    assert client.files.delete(done.input_file_id).deleted
    left = [path for path in server.root.rglob("*") if path.is_file()]
    assert not any(b"hello" in path.read_bytes() for path in left), left
    assert client.batches.retrieve(batch.id).status == "completed"
    with pytest.raises(openai.NotFoundError):
        client.files.content(done.output_file_id)
    assert server.end() == 0


def test_lines_at_fault_and_files_at_fault(shared):
    client = shared.client(shared.keys["ann"])
    wrong = request("b")
    wrong["body"]["temperature"] = "warm"
    made = [
        batch_of(client, lines) for lines in ([request("a"), wrong], [wrong], FAULTY, ["{"] * 150)
    ]
    mixed = await_state(client, made[0], {"completed"})
    assert ids_of(client, mixed) == [["row-a"], ["row-b"]]
    (line,) = lines_of(client, mixed.error_file_id)
    assert (line["response"]["status_code"], line["error"]) == (400, None)
    assert line["response"]["body"]["error"]["code"] == "invalid_value"
    assert await_state(client, made[1], {"completed"}).output_file_id is None
    failed = await_state(client, made[2], {"failed"})
    assert [(error.line, error.code) for error in failed.errors.data] == [
        (1, "invalid_json_line"),
        (3, "duplicate_custom_id"),
        (4, "invalid_url"),
        (5, "invalid_request"),
        (6, "model_not_found"),
        (7, "invalid_method"),
        (8, "missing_required_parameter"),
        (9, "invalid_json_line"),
    ]
    assert (failed.output_file_id, failed.error_file_id) == (None, None)
    assert len(await_state(client, made[3], {"failed"}).errors.data) == 100
    ends = {"empty_file": ["", ""], "too_many_requests": [request(at) for at in range(201)]}
    made = [batch_of(client, lines) for lines in ends.values()]
    for one, code in zip(made, ends, strict=True):
        (error,) = await_state(client, one, {"failed"}).errors.data
        assert error.code == code


def line(number, body=(), **more):
    made = request(number, **more)
    return {**made, "body": {**made["body"], **dict(body)}}


FAULTY = [
    *("{", line("a"), line("a"), line("e", url="/v1/embeddings"), line("f", {"stream": True})),
    *(line("g", {"model": "another"}), line("m", method="GET"), line("h", custom_id=None), "[]"),
]


def test_wrong_calls_are_refused_in_the_form_of_the_api(shared):
    client = shared.client(shared.keys["cid"])

    def upload(data=b"{}", name="in.jsonl", **more):
        return client.files.create(**{"file": (name, data), "purpose": "batch", **more})

    file = upload()
    right = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    for wrong, param, code in (
        ({"endpoint": "/v1/audio"}, "endpoint", "invalid_value"),
        ({"completion_window": "1h"}, "completion_window", "invalid_value"),
        ({"metadata": {"a": "b" * 513}}, "metadata", "invalid_value"),
        ({"output_expires_after": {"seconds": 5}}, "output_expires_after", "invalid_value"),
        ({"extra_body": {"priority": 1}}, "priority", "unknown_parameter"),
        ({"input_file_id": "../../etc/passwd"}, "file_id", "not_found"),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            client.batches.create(**{**right, **wrong})
        assert (caught.value.param, caught.value.code) == (param, code)
        assert caught.value.response.headers["x-should-retry"] == "false"
    for call, param, code in (
        (lambda: client.batches.list(limit=101), "limit", "integer_above_max_value"),
        (lambda: client.batches.list(limit=0), "limit", "integer_below_min_value"),
        (lambda: client.batches.list(after="batch_none"), "after", "invalid_value"),
        (lambda: upload(purpose="fine-tune"), "purpose", "invalid_value"),
        (lambda: upload(bytes(1_200_000)), "file", "file_too_large"),
        (lambda: upload(expires_after={"seconds": 1}), "expires_after", "invalid_value"),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            call()
        assert (caught.value.param, caught.value.code) == (param, code)
    for name in ("..%2F..%2Fabout.json", "%2e%2e", "file-0"):
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(name)
    with pytest.raises(openai.NotFoundError):
        client.post("/nothing", cast_to=object)
    assert [one.filename for one in client.files.list()] == ["in.jsonl"]
    names = [upload(name=name).filename for name in ("../../etc/passwd", "x" * 300)]
    assert names == ["passwd", "x" * 255]
    assert client.models.retrieve("m").id == "m"


def test_pages_follow_each_other(shared):
    client = shared.client(shared.keys["dan"])
    made = [batch_of(client, [request(at)]).id for at in range(5)]
    assert [one.id for one in client.batches.list(limit=2)] == made[::-1]
    page = client.batches.list(limit=2)
    assert page.has_more
    assert not client.batches.list(limit=2, after=made[1]).has_more
    files = [one.id for one in client.files.list(limit=2, purpose="batch", order="asc")]
    assert len(files) == 5
    for name in made:
        await_state(client, client.batches.retrieve(name), {"completed"})


def test_a_request_that_is_repeated_makes_one_batch(shared):
    client = shared.client(shared.keys["eve"])
    first = batch_of(client, [request(1)])
    told = {"input_file_id": first.input_file_id, "endpoint": CHAT, "completion_window": "24h"}
    again = client.batches.create(**told, extra_headers={"x-stainless-retry-count": "1"})
    assert again.id == first.id
    assert client.batches.create(**told).id != first.id
    named = {"Idempotency-Key": "night-1"}
    third = client.batches.create(**told, extra_headers=named)
    assert client.batches.create(**told, extra_headers=named).id == third.id
    with pytest.raises(openai.BadRequestError, match="Idempotency-Key"):
        client.batches.create(**told, metadata={"a": "b"}, extra_headers=named)
    assert len(list(client.batches.list())) == 3


def test_cancelled_and_expired_batches_keep_what_they_have(serve):
    server = serve(SLOW)
    client = server.client()
    batch = batch_of(client, [request(at) for at in range(1500)])
    wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0)
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = await_state(client, batch, {"cancelled"})
    right, wrong = ids_of(client, done)
    assert right
    assert wrong
    assert sorted(right + wrong) == sorted(f"row-{at}" for at in range(1500))
    counts = done.request_counts
    assert (counts.completed, counts.failed) == (len(right), len(wrong))
    last = lines_of(client, done.error_file_id)[-1]
    assert (last["response"], last["error"]["code"]) == (None, "batch_cancelled")
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(batch.id)
    short = serve(f"{SLOW}\n[serve]\nwindow_h = 0.002\n").client()
    over = await_state(short, batch_of(short, [request(at) for at in range(1500)]), {"expired"})
    right, wrong = ids_of(short, over)
    assert len(right) + len(wrong) == 1500
    assert lines_of(short, over.error_file_id)[-1]["error"]["code"] == "batch_expired"


def test_killed_in_any_state_it_goes_on(serve):
    server = serve(SLOW)
    client = server.client()
    batches = [batch_of(client, [request(at) for at in range(200)]) for _ in range(3)]
    server.end(signal.SIGKILL)
    server.start()
    wait_for(lambda: client.batches.retrieve(batches[0].id).request_counts.completed > 0)
    server.end(signal.SIGKILL)
    server.start()
    client.batches.cancel(batches[2].id)
    server.end(signal.SIGKILL)
    server.start()
    ends = [await_state(client, one).status for one in batches]
    assert ends == ["completed", "completed", "cancelled"]
    for one in batches:
        right, wrong = ids_of(client, client.batches.retrieve(one.id))
        assert sorted(right + wrong) == sorted(f"row-{at}" for at in range(200))
    with pytest.raises(AssertionError, match="another server is at work on it"):
        Server(server.root, SLOW)


def test_keys_see_their_own_and_nothing_else_goes_without(shared):
    ann, bob = (shared.client(shared.keys[name]) for name in ("fay", "bob"))
    batch = await_state(ann, batch_of(ann, [request("secret-1")]), {"completed"})
    told = {"endpoint": CHAT, "completion_window": "24h"}
    for call in (
        *(lambda: bob.batches.retrieve(batch.id), lambda: bob.batches.cancel(batch.id)),
        *(lambda: bob.files.retrieve(batch.output_file_id),),
        *(lambda: bob.files.content(batch.output_file_id),),
        *(lambda: bob.files.delete(batch.output_file_id),),
        lambda: bob.batches.create(input_file_id=batch.input_file_id, **told),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert not list(bob.batches.list()) + list(bob.files.list())
    for key in ("none", "sk-wrong", shared.keys["ann"][:-1]):
        with pytest.raises(openai.AuthenticationError):
            shared.client(key, max_retries=0).models.list()
    for _ in range(10):
        ann.files.create(file=b"{}", purpose="batch")
    with pytest.raises(openai.BadRequestError, match="delete some"):
        ann.files.create(file=b"{}", purpose="batch")
    calls = (shared.root / "calls.jsonl").read_text()
    assert json.loads(calls.splitlines()[-1])["key"] == "fay"
    written = calls + shared.log + (shared.root.parent / "keys").read_text()
    assert "secret" not in written
    assert not any(key in written for key in shared.keys.values())


def new_key(keys, owner):
    words = ["--root", "none", "--keys", str(keys), "--new-key", owner]
    command = [sys.executable, "-m", "batchgen", "serve", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_others_are_not_let_in_without_keys():
    command = [sys.executable, "-m", "batchgen", "serve", "--root", "x", "--host", "0.0.0.0"]
    told = subprocess.run([*command, "--model", "m"], capture_output=True, text=True, check=False)
    assert (told.returncode, "--keys FILE" in told.stderr) == (2, True)


def test_hostile_connections_leave_it_at_work(shared):
    flood = b"GET /v1/models HTTP/1.1\r\n" + b"x: " + b"a" * 200_000
    endless = b"POST /v1/files HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n"
    endless += f"authorization: Bearer {shared.keys['bob']}\r\n".encode()
    endless += b"content-type: multipart/form-data; boundary=b\r\n\r\n"
    head = b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
    endless += f"{len(head):x}\r\n".encode() + head + b"\r\n"
    endless += (b"10000\r\n" + b"a" * 65536 + b"\r\n") * 40
    for data, code in ((flood, b"400"), (endless, b"413"), (b"\0" * 1000, b"400")):
        with socket.create_connection(("127.0.0.1", shared.port), timeout=30) as connection:
            with suppress(OSError):
                connection.sendall(data)
            told = b""
            with suppress(OSError):
                told = connection.recv(100)
            assert not told or code in told, told
    slow = [socket.create_connection(("127.0.0.1", shared.port)) for _ in range(50)]
    for connection in slow:
        connection.sendall(b"POST /v1/files HTTP/1.1\r\n")
    client = shared.client(shared.keys["bob"])
    await_state(client, batch_of(client, [request(1)]), {"completed"})
    for connection in slow:
        connection.close()
    wait_for(lambda: not list((shared.root / "tmp").iterdir()))
    figures = client.get("/../metrics", cast_to=str)
    assert 'batchgen_batches{status="completed"}' in figures


@pytest.mark.slow
@pytest.mark.vllm
def test_a_model_of_this_machine_is_warm_between_batches(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config = f"""
[model]
name = "{MODEL}"
max_model_len = 512
max_num_seqs = 16
gpu_memory_utilization = 0.1

[model.engine]
enforce_eager = true
"""
    server = serve(config)
    client = server.client()
    lines = [line(at, {"model": "model"}) for at in range(40)]
    made = [batch_of(client, lines) for _ in range(3)]
    for one in made:
        done = await_state(client, one, {"completed"})
        assert (done.request_counts.completed, done.request_counts.failed) == (40, 0)
    answers = [lines_of(client, client.batches.retrieve(one.id).output_file_id) for one in made]
    texts = [[own["response"]["body"]["choices"][0]["message"] for own in file] for file in answers]
    assert len(texts[0]) == 40
    told = {"input_file_id": made[0].input_file_id, "completion_window": "24h"}
    with pytest.raises(openai.BadRequestError, match="endpoint"):
        client.batches.create(endpoint="/v1/embeddings", **told)
    started = (server.root / "engine.log").read_text()
    assert started.count("Started server process") == 1
    assert server.end() == 0


def test_what_cannot_be_served_is_refused_before_it_listens(tmp_path):
    config = tmp_path / "serve.toml"
    for text, told in (
        ('[model]\nname = "none"\n', "none"),
        ('[model]\nname = "m"\nbackend = "ecko"\n', "ecko"),
        (f"{ECHO}\n[serve]\nat_once = 0\n", "serve.at_once"),
        (f"{ECHO}\n[input]\npath = 'x'\n", "[input] is each batch's own"),
        ("", "no model"),
    ):
        config.write_text(text)
        words = ["serve", "--root", str(tmp_path / "root"), "--config", str(config)]
        command = [sys.executable, "-m", "batchgen", *words]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (ran.returncode, told in ran.stderr) == (2, True), ran.stderr
