"""A `batchgen serve` of its own for a test: started, killed, started again; ended by it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import openai

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

CHAT = "/v1/chat/completions"
ENDS = {"completed", "failed", "cancelled", "expired"}
WAIT_S = 120.0
ECHO = """
[model]
name = "m"
backend = "echo"
"""
SLOW = f"""{ECHO}
[model.engine]
step_s = 0.05
max_num_seqs = 4

[run]
flush_s = 1
grace_s = 0
"""


class Server:
    """The process, and what a client needs to call it."""

    def __init__(self, root: Path, config: str, *words: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.root = root
        self.config = root.with_suffix(".toml")
        self.config.write_text(config)
        self._words = words
        self._process: subprocess.Popen[bytes] | None = None
        self.keys: dict[str, str] = {}
        """Owner -> key."""
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "batchgen", "serve", "--root", str(self.root)]
        command += ["--config", str(self.config), "--port", str(self.port), *self._words]
        with self.root.with_suffix(".log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(self.is_healthy)

    def is_healthy(self) -> bool:
        """Whether it answers; it must not have ended."""
        assert self._process is not None
        assert self._process.poll() is None, self.log
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=10):
                return True
        except (urllib.error.URLError, OSError):
            return False

    @property
    def log(self) -> str:
        """All that it has printed."""
        return self.root.with_suffix(".log").read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it; return its exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            os.kill(self._process.pid, number)
        return self._process.wait(WAIT_S)

    def client(self, key: str = "any", **more: Any) -> openai.OpenAI:
        """An unmodified client."""
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, **more)


def request(number: object, text: str = "hello", **more: Any) -> dict[str, Any]:
    """A line."""
    message = {"role": "user", "content": f"{text} {number}"}
    body = {"model": "m", "messages": [message], "max_tokens": 32}
    return {"custom_id": f"row-{number}", "method": "POST", "url": CHAT, "body": body, **more}


def batch_of(client: openai.OpenAI, lines: Iterable[Any], **more: Any) -> Any:
    """Upload lines, and make a batch of them."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file = client.files.create(file=("in.jsonl", "\n".join(texts).encode()), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", **more
    )


def await_state(client: openai.OpenAI, batch: Any, states: Iterable[str] = ENDS) -> Any:
    """Poll until it is in one of these states."""
    found = batch

    def is_there() -> bool:
        nonlocal found
        found = client.batches.retrieve(batch.id)
        return found.status in states or found.status in ENDS

    wait_for(is_there)
    assert found.status in states, found
    return found


def lines_of(client: openai.OpenAI, name: str | None) -> list[dict[str, Any]]:
    """The lines of a file; none of none."""
    if name is None:
        return []
    return [json.loads(line) for line in client.files.content(name).text.splitlines()]


def wait_for(condition: Any) -> None:
    """Look until it holds."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
