"""One server: its HTTP, what it has, and whether it can be relied upon right now.

What goes wrong is one of four things, and each is an exception here: the row is refused, the
server is busy, the attempt failed (nobody knows whose fault it was), or the job asks for what the
server has not. A reply counts only if it is surely this request's: vLLM repeats the id that was
sent along; of others at least no id may come twice, as it does where a reply is sent doubly.

No redirect is followed, no proxy and no `.netrc` is looked for, certificates are verified: what is
sent goes to the host that the job names, and to no other.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import aiohttp
import orjson

from batchgen.core.errors import one_line
from batchgen.core.records import EngineSpec, RowError
from batchgen.endpoints import identity, messages
from batchgen.endpoints.messages import BadReplyError, LackingError, Server, Unsuitable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection

    from batchgen.endpoints.messages import Asked, Reply
    from batchgen.endpoints.window import Window
    from batchgen.engine.base import EngineRequest

LOOK_S = 10.0
"""How long a server may take to say which models it has."""
TRIAL_S = 120.0
NO_ANSWER = "no answer in"
TRIAL_TOKENS = 8
MOST_TRIED = 32_768
"""Tokens of a context that a server is tried with."""
LEAST_MOST_BYTES = 16 << 20
"""No answer is larger but by what was asked for: beyond, it is not read to its end."""
ROOM_S = 0.25
"""Between two looks at whether a server has room for more."""
LOAD = re.compile(rb"^vllm:num_requests_(running|waiting)\{.*\} ([0-9.e+]+)$", re.MULTILINE)
BUSY = frozenset({429, 503, 529})
OF_THE_ROW = frozenset({400, 413, 422})
OF_THE_JOB = frozenset({401, 403, 404, 405})


class RowRefusedError(Exception):
    """The server will not answer this request, however often it is asked."""

    def __init__(self, error: RowError) -> None:
        super().__init__(error.error)
        self.error = error


class BusyError(Exception):
    """The server has too much to do."""

    def __init__(self, wait_s: float | None) -> None:
        super().__init__("the server is busy")
        self.wait_s = wait_s
        """As it says itself."""


class AttemptError(Exception):
    """No answer came, or none that can be used."""

    def __init__(self, text: str, *, is_from_server: bool = False) -> None:
        super().__init__(text)
        self.is_from_server = is_from_server
        """It answered, so that it was alive."""


class WrongServerError(Exception):
    """The job asks for what the server does not have."""


@dataclass(slots=True)
class Endpoint:
    """One server. Belongs to the loop's thread."""

    url: str
    window: Window
    server: Server | None = None
    served: Mapping[str, Any] = field(default_factory=dict)
    """By what its model is known again, see `identity`."""
    max_model_len: int | None = None
    cut_at: int | None = None
    """So many tokens it counts of a prompt that it has cut; None: not known to cut any."""
    is_tied: bool = False
    """It repeats the id of a request in its answer."""
    is_out: bool = True
    """Not used, until it has shown again that it works."""
    ready_s: float = 0.0
    """Busy until then."""
    num_busy: int = 0
    """Refusals in a row."""
    num_bad: int = 0
    """Failed attempts in a row."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """What runs there."""
    answered_s: float = 0.0
    lives: list[list[float]] = field(default_factory=list)
    """Spans in which it surely was not restarted: an answer came that was asked for before."""
    seen: dict[str, None] = field(default_factory=dict)
    """The last ids of answers."""

    @property
    def host(self) -> str:
        """For people."""
        return urlsplit(self.url).netloc

    def room(self, now_s: float) -> int:
        """How many more requests it may have."""
        is_usable = not self.is_out and now_s >= self.ready_s
        return self.window.size - len(self.tasks) if is_usable else 0

    def note_answer(self, began_s: float, now_s: float) -> None:
        """It has answered what it was asked at `began_s`."""
        self.num_bad = self.num_busy = 0
        self.answered_s = now_s
        if self.lives and began_s <= self.lives[-1][1]:
            self.lives[-1] = [min(began_s, self.lives[-1][0]), now_s]
        else:
            self.lives = [*self.lives[-99:], [began_s, now_s]]

    def lived_through(self, at_s: float) -> bool:
        """Whether it surely was alive at that time, and went on."""
        return any(start <= at_s <= end for start, end in self.lives)


class _Connector(aiohttp.TCPConnector):
    """Lends no connection on which more came than was asked for: it would be the next answer."""

    lent: ContextVar[ResponseHandler | None] = ContextVar("lent", default=None)
    """The connection that a task's last request went over."""

    async def connect(
        self, req: aiohttp.ClientRequest, traces: list[Any], timeout: aiohttp.ClientTimeout
    ) -> Connection:
        """Lend a connection. See `aiohttp.BaseConnector`."""
        while True:
            connection = await super().connect(req, traces, timeout)
            protocol = connection.protocol
            if protocol is not None and not protocol.should_close:
                self.lent.set(protocol)
                return connection
            connection.close()

    def distrust(self) -> None:
        """Close the connection that this task's last answer came over."""
        if (protocol := self.lent.get()) is not None:
            protocol.close()


class Http:
    """Speaks to servers; one for all of them."""

    def __init__(self, key: str | None, trial: EngineRequest, most: int, timeout_s: float) -> None:
        """Bind; nothing is opened.

        Args:
            key: For all servers.
            trial: To try a server with.
            most: Connections.
            timeout_s: Of an answer.
        """
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._key = key
        self._trial = trial
        self._most = most
        self._timeout_s = timeout_s
        self._nonce, self._num = secrets.token_hex(8), 0
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def ask(
        self,
        endpoint: Endpoint,
        request: EngineRequest,
        spec: EngineSpec,
        timeout_s: float = 0,
        *,
        may_be_cut: bool = False,
    ) -> tuple[Reply, Asked]:
        """Have a request answered.

        Raises:
            RowRefusedError, BusyError, AttemptError, WrongServerError: It was not.
            Unsuitable: It cannot be asked.
        """
        assert endpoint.server is not None  # noqa: S101 - by the caller
        try:
            asked = messages.ask(request, spec, endpoint.server)
            data = orjson.dumps(asked.body)
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise RowRefusedError(RowError("bad_request", one_line(error))) from None
        self._num += 1
        nonce = f"{self._nonce}{self._num:016x}"  # 32 digits: llama-cpp-python takes UUIDs only.
        timeout_s = timeout_s or self._timeout_s
        most_bytes = _most_bytes(asked)
        status, headers, data = await self._send(
            endpoint, asked.path, timeout_s, data, nonce, most_bytes
        )
        try:
            self._check_status(status, headers, data, request)
            reply = messages.read(data, asked)
            self._check_id(endpoint, reply, nonce)
        except LackingError:
            raise
        except BadReplyError as error:
            self._distrust()
            raise AttemptError(str(error), is_from_server=True) from None
        may_be_cut = may_be_cut or endpoint.server.is_vllm
        if not may_be_cut and (
            text := messages.cut(request, reply.num_prompt_tokens, endpoint.cut_at)
        ):
            raise RowRefusedError(text)
        return reply, asked

    def _distrust(self) -> None:
        """What comes over a connection that brought nonsense may be another's answer."""
        self._connector.distrust()

    def _check_status(
        self, status: int, headers: Mapping[str, str], data: bytes, request: EngineRequest
    ) -> None:
        if status == 200:
            return
        if status in BUSY:
            raise BusyError(retry_after_s(headers.get("Retry-After"), time.time()))
        if status in OF_THE_ROW:
            raise RowRefusedError(messages.refusal(self._clean(data), status, request))
        if 300 <= status < 400:
            raise WrongServerError(
                f"HTTP {status}: it sends on to another place, expected model.base_url to be that"
            )
        text = f"HTTP {status}: {messages.told(self._clean(data), request)}"
        if status == 404:
            text += "; does model.base_url end in /v1?"
        if status in OF_THE_JOB:
            raise WrongServerError(text)
        raise AttemptError(text, is_from_server=True)

    def _clean(self, data: bytes) -> bytes:
        return data.replace(self._key.encode(), b"***") if self._key else data

    def _check_id(self, endpoint: Endpoint, reply: Reply, nonce: str) -> None:
        if endpoint.is_tied and nonce not in reply.reply_id:
            raise BadReplyError("an answer to another request")
        if reply.reply_id in endpoint.seen:
            raise BadReplyError("an answer that came before")
        endpoint.seen[reply.reply_id] = None
        if len(endpoint.seen) > 20_000:
            del endpoint.seen[next(iter(endpoint.seen))]

    async def _send(
        self,
        endpoint: Endpoint,
        path: str,
        timeout_s: float,
        data: bytes | None = None,
        nonce: str = "",
        most_bytes: int = LEAST_MOST_BYTES,
    ) -> tuple[int, Mapping[str, str], bytes]:
        if self._session is None:
            self._connector = _Connector(limit=self._most, ttl_dns_cache=60)
            self._session = aiohttp.ClientSession(
                connector=self._connector,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        headers = {**self._headers, "X-Request-Id": nonce} if nonce else self._headers
        try:
            async with self._session.request(
                "GET" if data is None else "POST",
                urljoin(f"{endpoint.url}/", path),
                data=data,
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=LOOK_S),
            ) as response:
                return response.status, response.headers, await _body(response, most_bytes)
        except aiohttp.ClientConnectorCertificateError:
            raise WrongServerError(
                "its certificate is not trusted; SSL_CERT_FILE may name the authority's"
            ) from None
        except TimeoutError:
            raise AttemptError(f"{NO_ANSWER} {timeout_s:.0f} s") from None
        except AttemptError:
            raise
        except Exception as error:  # noqa: BLE001 - the library, and whatever came
            raise AttemptError(one_line(error, 200)) from None

    async def open(self, endpoint: Endpoint, spec: EngineSpec, *, is_pinned: bool) -> None:
        """Find out what a server is and has, and try it with a request like the job's.

        Raises:
            WrongServerError: It has not what the job asks for.
            BusyError, AttemptError: It cannot be told now.
        """
        models = await self.models(endpoint)
        found = _find_models(models, spec)
        card = models.get(found[None], {})
        is_vllm = card.get("owned_by") == "vllm"
        root, name = str(card.get("root") or spec.model), spec.model
        is_hub = root.count("/") == 1 and not root.startswith(("/", "."))
        if is_pinned and not is_vllm:
            raise WrongServerError(
                "the job pins the very model, which can be relied upon only with vLLM's server"
            )
        if is_pinned and is_hub and root != name:
            raise WrongServerError(f"its model {found[None]!r} is {root!r}, expected {name!r}")
        length = card.get("max_model_len")
        endpoint.max_model_len = length if isinstance(length, int) else None
        wanted = spec.model_kwargs.get("max_model_len")
        if wanted is not None and length is not None and length != wanted:
            raise WrongServerError(f"its max_model_len is {length}, and the job's {wanted}")
        endpoint.server = Server(found, is_vllm, limit=endpoint.max_model_len)
        await self._try(endpoint, spec)
        about = {"id": found[None], "root": card.get("root"), "version": ""}
        if is_vllm:
            about["version"] = str((await self._told(endpoint, "../version")).get("version", ""))
        elif loaded := await self._loaded(endpoint, found[None]):
            about["root"], context = loaded
            if wanted is not None and context < wanted:
                raise WrongServerError(f"its context is {context} tokens, and the job's {wanted}")
            endpoint.max_model_len = context
            await self._find_cut(endpoint, spec, context)
        endpoint.served = about

    async def models(self, endpoint: Endpoint) -> dict[str, dict[str, Any]]:
        """Ask which models a server has; none where it does not say.

        Raises:
            WrongServerError, BusyError, AttemptError: It does not answer that.
        """
        status, headers, data = await self._send(endpoint, "models", LOOK_S)
        if status == 404:
            return {}  # Not all have it.
        self._check_status(status, headers, data, self._trial)
        try:
            return {card["id"]: card for card in orjson.loads(data)["data"]}
        except (ValueError, TypeError, LookupError):
            self._distrust()
            raise AttemptError("its list of models is none", is_from_server=True) from None

    async def widen(self, endpoint: Endpoint, most: int, pump: Callable[[], None]) -> None:
        """Let a vLLM server have more while it says that it has room, before it has answered."""
        while True:
            await asyncio.sleep(ROOM_S)
            window, num_mine = endpoint.window, len(endpoint.tasks)
            is_vllm = endpoint.server is not None and endpoint.server.is_vllm
            if endpoint.is_out or not is_vllm or not window.size <= num_mine < most:
                continue
            with suppress(AttemptError, WrongServerError):
                status, _, data = await self._send(endpoint, "../metrics", LOOK_S)
                found = {b"running": 0, b"waiting": 0}
                loads = LOAD.findall(data) if status == 200 else []
                if not loads:
                    return  # A proxy before it may hide that.
                for name, value in loads:  # Each of its engines has a line.
                    found[name] += int(float(value))
                window.widen(time.monotonic(), num_mine, found[b"running"], found[b"waiting"])
                pump()

    async def _told(self, endpoint: Endpoint, path: str) -> dict[str, Any]:
        """What a server says there; nothing where it, or a proxy before it, does not."""
        status, _, data = await self._send(endpoint, path, LOOK_S)
        with suppress(ValueError):
            found = orjson.loads(data) if status == 200 else {}
            return found if isinstance(found, dict) else {}
        self._distrust()
        return {}

    async def _loaded(self, endpoint: Endpoint, name: str) -> tuple[str, int] | None:
        """Ask Ollama for the digest and the context of a model that has just answered."""
        models = (await self._told(endpoint, "../api/ps")).get("models")
        for one in models if isinstance(models, list) else ():
            if one.get("model") == name and isinstance(one.get("context_length"), int):
                return str(one.get("digest")), one["context_length"]
        return None

    async def _find_cut(self, endpoint: Endpoint, spec: EngineSpec, context: int) -> None:
        """Find out what a server counts of a prompt that is longer than its context, see `was_cut`.

        One that refuses it cuts none. With a large context that would take minutes.
        """
        if endpoint.cut_at is not None or context > MOST_TRIED:
            return
        long = identity.request("yes " * (context + 64), self._trial)
        small = identity.asking(spec, with_logprobs=False)
        with suppress(RowRefusedError, AttemptError):
            reply, _ = await self.ask(endpoint, long, small, TRIAL_S, may_be_cut=True)
            endpoint.cut_at = reply.num_prompt_tokens

    async def question(self, endpoint: Endpoint, spec: EngineSpec) -> dict[str, Any]:
        """Ask what tells models apart; a server that takes no question like it has no answer.

        Raises:
            BusyError, AttemptError, WrongServerError: It does not answer that.
        """
        request = identity.request(identity.QUESTION, self._trial)
        for with_logprobs in (True, False):
            how = identity.asking(spec, with_logprobs=with_logprobs)
            with suppress(LackingError, RowRefusedError):
                reply, _ = await self.ask(endpoint, request, how, TRIAL_S)
                return identity.answer(reply)
        return {}

    async def _try(self, endpoint: Endpoint, spec: EngineSpec) -> None:
        """Ask for a few tokens in the job's own way: what is missing shows here, before any row."""
        assert endpoint.server is not None  # noqa: S101 - by the caller
        sampling = dict(spec.sampling_params)
        tokens = max(TRIAL_TOKENS, sampling.get("min_tokens") or 0)
        sampling["max_tokens"] = min(tokens, sampling.get("max_tokens") or tokens)
        small = replace(spec, sampling_params=sampling)
        try:
            reply, asked = await self.ask(endpoint, self._trial, small, TRIAL_S)
            if endpoint.server.is_vllm and self._nonce not in reply.reply_id:
                reply, asked = await self.ask(endpoint, self._trial, small, TRIAL_S)
        except RowRefusedError as error:
            key = "max_completion_tokens"
            if key in str(error) and endpoint.server.max_tokens_key != key:
                endpoint.server = endpoint.server._replace(max_tokens_key=key)
                return await self._try(endpoint, spec)
            raise WrongServerError(str(error)) from None
        except (Unsuitable, LackingError) as error:
            raise WrongServerError(str(error)) from None
        except AttemptError as error:
            if "json_object" not in str(error) or not endpoint.server.has_schemas:
                raise
            endpoint.server = endpoint.server._replace(has_schemas=False)
            return await self._try(endpoint, spec)
        endpoint.is_tied = endpoint.is_tied or self._nonce in reply.reply_id
        if problem := messages.unsplit(reply.samples, asked):
            raise WrongServerError(problem)
        return None


async def _body(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    """Read an answer's bytes, but no more than it can have."""
    chunks, num_bytes = [], 0
    async for chunk in response.content.iter_any():
        num_bytes += len(chunk)
        if num_bytes > most_bytes:
            response.close()
            raise AttemptError(f"an answer of more than {most_bytes:,} bytes", is_from_server=True)
        chunks.append(chunk)
    return b"".join(chunks)


def _most_bytes(asked: Asked) -> int:
    """Room for each token that may be in an answer, and for those listed beside it."""
    tokens = asked.body.get("max_tokens") or asked.body.get("max_completion_tokens") or 0
    return LEAST_MOST_BYTES + int(asked.n * tokens * (256 + 512 * (1 + (asked.num_logprobs or 0))))


def _find_models(cards: Mapping[str, Mapping[str, Any]], spec: EngineSpec) -> dict[str | None, str]:
    """Find the server's names for the job's model and adapters; all as they are without a list."""
    wanted: dict[str | None, str] = {None: spec.model, **{name: name for name in spec.loras}}
    if not cards:
        return wanted
    if spec.model not in cards:
        roots = [name for name, card in cards.items() if card.get("root") == spec.model]
        wanted[None] = next(iter(roots), spec.model)
    if missing := [name for name in wanted.values() if name not in cards]:
        raise WrongServerError(
            f"it has no model {missing[0]!r}; it has {', '.join(map(repr, cards))[:300]}"
        )
    return wanted


def retry_after_s(text: str | None, now_s: float) -> float | None:
    """Read a `Retry-After` header: seconds, or a date; None where there is none that says it.

    Args:
        text: The header.
        now_s: Seconds since 1970.
    """
    try:
        return max(0.0, float(text or ""))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text or "").timestamp() - now_s)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
