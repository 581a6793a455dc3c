"""Stand-ins for servers that speak OpenAI's API, on 127.0.0.1, and a proxy that spoils replies.

A stand-in answers with the beginning of the last message, as the echo engine does, so that a run
through it has known rows. It behaves like vLLM's (`vllm`) or like one that knows OpenAI's API and
no more (`plain`), as vllm/entrypoints/openai, 0.32, and OpenAI's reference describe them. What of
a server's behaviour is to be proven is proven on vLLM's own.

`ollama` and `llama.cpp` are stand-ins for those two, by what their public source says, and no
proof of how they behave: ollama of 2026-08 (llm/llama_server.go, completionPromptForRequest; its
issue 17427; server/routes.go, PsHandler; openai/openai.go, ToUsage) and llama.cpp of 2026-10
(tools/server: `exceed_context_size_error`, and 503 while the model is loaded).
"""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import contextmanager

from aiohttp import web

KEY = "canary-key-7f3a91"


class StandIn:
    """One server, in a thread of its own; `faults` may answer a request in its place."""

    def __init__(self, kind="vllm", model="m", key=None, delay_s=0.0, faults=None, port=0, **more):
        self.kind, self.model, self.key, self.delay_s = kind, model, key, delay_s
        self.version, self.root = more.get("version", "0.32.0"), more.get("root", model)
        self.logprob = more.get("logprob", -0.5)
        """Of each token, which is a letter."""
        self.context, self.shifts = more.get("context"), more.get("shifts", True)
        """Tokens that fit; what is longer is cut (`ollama`, `plain`), or refused."""
        self.room, self.others, self.looks = more.get("room"), more.get("others", 0), 0
        """What it runs at once, as `/metrics` says; what waits there of other clients."""
        self.faults = faults
        self.port = port
        self.asked = []
        """Body of each chat or completion that was answered or spoilt, trials included."""
        self.answered = 0
        self.most_at_once = self.at_once = 0
        self.lines = set()
        """Connections on which something is under way."""
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self):
        self._thread.start()
        assert self._up.wait(60)
        return self

    def stop(self):
        """End at once: what is under way is cut off."""
        self._loop.call_soon_threadsafe(self.end.set)
        self._thread.join(60)

    def _work(self):
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self):
        self.end = asyncio.Event()
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/api/ps", self._loaded)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/v1/completions", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        self._up.set()
        await self.end.wait()
        await runner.cleanup()

    def _refused(self, request):
        if self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        return web.json_response({"error": {"message": "wrong key"}}, status=401)

    async def _models(self, request):
        owner = {"ollama": "library", "llama.cpp": "llamacpp"}.get(self.kind, self.kind)
        card = {"id": self.model, "owned_by": owner, "root": self.root}
        card |= {"max_model_len": 4096} if self.kind == "vllm" else {}
        return self._refused(request) or web.json_response({"data": [card]})

    async def _version(self, request):
        if self.kind != "vllm":
            return web.Response(status=404)
        return web.json_response({"version": self.version})

    async def _metrics(self, request):
        if self.room is None:
            return web.Response(status=404)
        self.looks += 1
        running = min(self.at_once, self.room)
        name, labels = "vllm:num_requests_", '{engine="0",model_name="m"}'
        waiting = self.at_once - running + self.others
        text = f"# TYPE {name}running gauge\n{name}running{labels} {running:.1f}\n"
        text += f"{name}waiting{labels} {waiting:.1f}\n"
        text += f'{name}waiting_by_reason{{engine="0",reason="capacity"}} {waiting:.1f}\n'
        return web.Response(text=text)

    async def _loaded(self, request):
        if self.kind != "ollama":
            return web.Response(status=404)
        model = {"name": self.model, "model": self.model, "digest": self.root}
        return web.json_response({"models": [{**model, "context_length": self.context}]})

    async def _answer(self, request):
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        line = request.transport
        self.lines.add(line)
        try:
            return self._refused(request) or await self._spoilt(request)
        finally:
            self.at_once -= 1
            self.lines.discard(line)

    async def _spoilt(self, request):
        body = await request.json()
        self.asked.append(body)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        found = self.faults(self, request, body) if self.faults else None
        if asyncio.iscoroutine(found):
            found = await found
        if found is not None:
            return found
        num = len(body["messages"][-1]["content"] if "messages" in body else body["prompt"])
        if self.context and num >= self.context and (self.kind == "llama.cpp" or not self.shifts):
            text = f"request ({num} tokens) exceeds the available context size"
            return error(400, f"{text} ({self.context} tokens), try increasing it")
        self.answered += 1
        return web.json_response(self.reply(request, body))

    def reply(self, request, body):
        """What a server that is well answers."""
        is_chat = "messages" in body
        text = body["messages"][-1]["content"] if is_chat else body["prompt"]
        data = text.encode()
        limit = body.get("max_tokens", 16)
        answer = data[:limit].decode("utf-8", "ignore")
        why = "length" if len(data) > limit else "stop"
        choices = []
        for index in range(body.get("n", 1)):
            said = {"message": {"role": "assistant", "content": answer}} if is_chat else {}
            said = said or {"text": answer}
            if self.kind == "vllm" and body.get("logprobs") is not None:
                said["logprobs"] = self._logprobs(answer, is_chat=is_chat)
            choices.append({"index": index, "finish_reason": why, **said})
        number = request.headers.get("X-Request-Id") if self.kind == "vllm" else None
        num = len(data)
        if self.context and num >= self.context:
            num = self.context // 2 + 1
        usage = {"prompt_tokens": num, "completion_tokens": len(answer.encode())}
        self._num = getattr(self, "_num", 0) + 1
        return {"id": f"chatcmpl-{number or self._num}", "choices": choices, "usage": usage}

    def _logprobs(self, answer, *, is_chat):
        if is_chat:
            entry = {"logprob": self.logprob, "top_logprobs": []}
            return {"content": [{"token": letter, **entry} for letter in answer]}
        values = [self.logprob] * len(answer)
        return {"tokens": list(answer), "token_logprobs": values, "top_logprobs": None}


@contextmanager
def stand_in(**options):
    server = StandIn(**options).start()
    try:
        yield server
    finally:
        server.stop()


def error(status, text="no", **headers):
    """A reply that is an error, as OpenAI's API has it."""
    body = json.dumps({"error": {"message": text}})
    return web.Response(status=status, text=body, content_type="application/json", headers=headers)
