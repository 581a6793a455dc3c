"""`batchgen run-batch` in the place of `vllm run-batch`: killed, gone on with, and its answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.slow
def test_answers_are_those_of_vllms_own(tmp_path: Path) -> None:
    # vLLM's takes no completions (entrypoints/openai/run_batch.py, 0.32).
    chats = [line for line in requests(60, str(MODEL)) if "messages" in line["body"]]
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
