"""`batchgen run-batch` in the place of `vllm run-batch`: killed, gone on with, and its answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from tests.e2e.support import command, run_cli, wait_until

MODEL = Path(__file__).parents[2] / "sample_data" / "model"
TEXTS = ["Hello", "What is the subject?", "Is it angry?", "Label: ", "1, 2, 3, "]


def requests(num: int, model: str) -> list[dict[str, Any]]:
    lines = []
    for number in range(num):
        text = f"{TEXTS[number % len(TEXTS)]} {number}"
        if is_chat := number % 3 > 0:
            own: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
        else:
            own = {"prompt": text}
        url = f"/v1/{'chat/completions' if is_chat else 'completions'}"
        body = {"model": model, "max_tokens": 12, "temperature": 0, **own}
        lines.append({"custom_id": f"r{number}", "method": "POST", "url": url, "body": body})
    return lines


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", requests(300, "tiny"))
    target = tmp_path / "out.jsonl"
    words = ["run-batch", "-i", source, "-o", target, "--model", "tiny", "--set"]
    words += ["model.backend=echo", "--set", "run.flush_s=0.1", "--max-num-seqs", "2"]
    words += ["--step-s", "0.02"]
    parts = tmp_path / "out.jsonl.batchgen" / "_batchgen" / "parts"
    for num in (1, 3):
        with subprocess.Popen(command(*words), stderr=subprocess.DEVNULL) as run:
            wait_until(lambda num=num: len([*parts.glob("*.parquet")]) >= num, 120)
            run.kill()
        assert not target.exists()
    ended = run_cli(*words)
    assert (ended.returncode, ended.stderr.count("error")) == (0, 0), ended.stderr
    assert [line["custom_id"] for line in read(target)] == [f"r{n}" for n in range(300)]
    told = target.read_bytes()
    target.unlink()
    cleaned = run_cli(*words, "--clean")
    assert "300 answers, 0 errors" in cleaned.stdout
    assert target.read_bytes() == told
    assert [path.name for path in tmp_path.iterdir() if "batchgen" in path.name] == []


class Store(BaseHTTPRequestHandler):
    """Serves `source`, takes `told` at the second time of asking, refuses `/no`."""

    source, told = b"", [b""]

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.source)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.source)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        is_again = self.path == "/out.jsonl?sig=x" and self.told.append(body) is None
        codes = {True: 200 if len(self.told) > 2 else 503, False: 403}
        self.send_response(codes[is_again])
        self.send_header("Content-Length", "0")
        self.end_headers()


def test_files_may_be_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "in.jsonl", requests(9, "tiny"))
    Store.source = source.read_bytes()
    with ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        words = ["run-batch", "-i", f"{address}/in.jsonl?sig=y", "--model", "tiny"]
        words += ["--set", "model.backend=echo", "-o"]
        ended = run_cli(*words, f"{address}/out.jsonl?sig=x")
        refused = run_cli(*words, f"{address}/no")
        server.shutdown()
    assert "out.jsonl: 9 answers, 0 errors" in ended.stdout, ended.stderr
    assert "sig" not in ended.stdout
    first, told = Store.told[1:]
    assert first == told
    names = [json.loads(one)["custom_id"] for one in told.splitlines()]
    assert names == [f"r{number}" for number in range(9)]
    assert (refused.returncode, "403" in refused.stderr) == (2, True), refused.stderr
    assert len(read(tmp_path / "no.batchgen" / "openai-output.jsonl")) == 9


@pytest.mark.slow
def test_answers_are_those_of_vllms_own(tmp_path: Path) -> None:
    # vLLM's takes no completions (entrypoints/openai/run_batch.py, 0.32).
    chats = [line for line in requests(60, str(MODEL)) if "messages" in line["body"]]
    for chat in chats[::3]:
        chat["body"] |= {"logprobs": True, "top_logprobs": 2}
    source = write(tmp_path / "in.jsonl", chats)
    flags = ["--model", MODEL, "--dtype", "float32", "--max-num-seqs", "16", "--enforce-eager"]
    ours = tmp_path / "ours.jsonl"
    ended = run_cli("run-batch", "-i", source, "-o", ours, *flags, timeout=600)
    assert ended.returncode == 0, ended.stderr
    theirs = tmp_path / "theirs.jsonl"
    words = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch", "-i", source, "-o", theirs]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    subprocess.run([*words, *flags], check=True, env=environment, timeout=600)
    answers = {line["custom_id"]: line["response"]["body"] for line in read(theirs)}
    told = read(ours)
    assert len(told) == len(answers) == len(chats)
    for line in told:
        own, other = line["response"]["body"], answers[line["custom_id"]]
        assert own["usage"]["total_tokens"] == other["usage"]["total_tokens"]
        mine, its = own["choices"][0], other["choices"][0]
        assert mine["message"]["content"] == its["message"]["content"]
        assert mine["finish_reason"] == its["finish_reason"]
        assert (mine["logprobs"] is None) is (its["logprobs"] is None)
        if mine["logprobs"] is not None:
            pairs = zip(mine["logprobs"]["content"], its["logprobs"]["content"], strict=True)
            for own_token, other_token in pairs:
                assert abs(own_token["logprob"] - other_token["logprob"]) < 1e-3
                # Below 1e-5 a token was no real alternative, and is left out.
                likely = [one for one in other_token["top_logprobs"] if one["logprob"] > -11.5]
                assert len(own_token["top_logprobs"]) == len(likely)
            ChatCompletion.model_validate(own)


def hostile(canary: Path, address: str) -> list[dict[str, Any]]:
    """A hundred bodies that would have something read, called, run, or never end."""
    places = [str(canary), canary.as_uri(), f"{address}/x.png", "../../etc/passwd"]
    parts = [{"type": "image_url", "image_url": {"url": place}} for place in places]
    parts += [{"type": "image_url", "image_url": place} for place in places]
    parts += [{"type": kind, kind: {"url": place}} for kind in MEDIA for place in places]
    parts += [{"type": "image_url", "image_url": {"url": places[0]}, "uuid": "x"}]
    bodies: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": [part]}]} for part in parts
    ]
    template = "{% for x in range(10**9) %}{{ x }}{% endfor %}" + f"{{% include '{canary}' %}}"
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    bodies += [{**chat, name: value} for name in KNOBS for value in (template, {"x": template})]
    nested: Any = "x"
    for _ in range(300):
        nested = {"properties": {"x": nested}}
    slow = [{"pattern": "(a+)+$"}, {"pattern": "(" * 3000}, {"maxLength": 10**9}, nested]
    slow += [{"enum": ["x" * 300_000]}, {"$ref": canary.as_uri()}, {"$ref": f"{address}/s.json"}]
    for schema in slow:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        bodies.append({**chat, "response_format": form})
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        bodies.append({**chat, "tools": [tool], "tool_choice": "required"})
    bodies += [{**chat, "model": place} for place in places]
    bodies += [{**chat, "stop": ["x" * 10_000] * 100, "max_tokens": 10**18}]
    bodies += [{"messages": [{"role": role, "content": "x"}]} for role in ("tool", "", "x" * 9999)]
    return bodies


MEDIA = ("input_audio", "audio_url", "video_url", "image_embeds", "image_pil", "file")
KNOBS = (
    *("chat_template", "chat_template_kwargs", "mm_processor_kwargs", "vllm_xargs", "documents"),
    *("kv_transfer_params", "guided_json", "guided_regex", "structured_outputs", "tools"),
    *("logits_processors", "priority", "cache_salt", "extra_body", "prompt_embeds", "functions"),
    *("add_generation_prompt", "continue_final_message", "repetition_detection", "prediction"),
    *(
        "web_search_options",
        "audio",
        "truncate_prompt_tokens",
        "allowed_token_ids",
        "bad_words",
        "n",
    ),
)


def test_hostile_bodies_have_nothing_read_called_or_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary.png"
    canary.write_text("canary-7f3a")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        bodies = hostile(canary, address)
        assert len(bodies) >= 100
        asked = {"method": "POST", "url": "/v1/chat/completions"}
        usual = {"model": str(MODEL), "max_tokens": 8, "temperature": 0}
        lines = [
            {**asked, "custom_id": f"h{number}", "body": {**usual, **body}}
            for number, body in enumerate(bodies)
        ]
        good = requests(6, str(MODEL))
        source = write(tmp_path / "in.jsonl", [*lines, *good])
        target = tmp_path / "out.jsonl"
        flags = ["--model", MODEL, "--dtype", "float32", "--enforce-eager"]
        ended = run_cli("run-batch", "-i", source, "-o", target, *flags, timeout=900)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert ended.returncode == 0, ended.stderr
    told = read(target)
    assert len(told) == len(lines) + len(good)
    statuses = [line["response"]["status_code"] for line in told if line["response"]]
    assert statuses[-len(good) :] == [200] * len(good)
    assert "canary-7f3a" not in target.read_text()
