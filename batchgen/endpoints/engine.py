"""`OpenAIEngine`: servers that speak OpenAI's API, fed as fast as they take it.

It lives in a process of its own, where a thread runs the loop that speaks to the servers:

- A row goes to a server with room. How much room there is finds itself (`window`); a server that
  fails is left out until it has answered a trial.
- "Too many" (429, 503) is nobody's fault: the row waits for its next turn.
- A row whose attempts fail is asked again, elsewhere where there are several servers. It ends as
  an error after three attempts that failed while its server answered others; where many attempts
  fail, whosever they are, after more than three, so that chance makes no errors. An attempt that
  ended with all others of its server, as when that is restarted, does not count; a row to which
  this happens time and again goes last, then alone, since it may be what ends the server.
- Nothing that any server answers for `endpoint_grace_s` ends the run; what is answered stays.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from batchgen.core.errors import ConfigError, EngineDeadError, EngineError, one_line
from batchgen.core.records import (
    Completion,
    EngineFacts,
    EngineSpec,
    EngineStats,
    RowError,
    TaskFacts,
)
from batchgen.core.runtime import option
from batchgen.endpoints.identity import difference
from batchgen.endpoints.messages import Asked, LackingError, Reply, Unsuitable, unsplit
from batchgen.endpoints.options import Options, most_at_once, started_at
from batchgen.endpoints.rows import Row, best_for, enough_failures
from batchgen.endpoints.server import (
    NO_ANSWER,
    AttemptError,
    BusyError,
    Endpoint,
    Http,
    RowRefusedError,
    WrongServerError,
)
from batchgen.endpoints.window import Meter, Window
from batchgen.engine.base import EngineRequest, failed, unknown_adapter
from batchgen.engine.vllm.pooling import task_facts

WHERE = "model.base_url"
FIRST_AT_ONCE, FIRST_AT_VLLM = 8, 256
READ_AHEAD = 256
LOST_BEFORE_LAST, LOST_BEFORE_ALONE = 3, 6
"""Attempts after which a row is kept back, and then goes with no other."""
FEW = 8
"""Of those that are kept back, so many go together."""
MOST_LAST = 64
"""So many that are kept back do not wait until all else is done."""
MOST_BLAMED = 3
"""Rows that fail one after the other, while none is answered, are not to blame any more."""
MOST_BUSY = 8
"""Refusals of a row, over longer than the grace, that are enough where others are answered."""
BAD_BEFORE_OUT = 5
AGAIN_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
BUSY_S = (0.25, 0.5, 1.0, 2.0, 4.0)
QUIET_S = 30.0
"""A server that has not answered for so long, nor for three times its slowest answer, is asked
whether it is there."""
BEAT_S = 1.0


class OpenAIEngine:
    """Implements `Engine`: this is its caller's side, `_Pool` that of the loop's thread."""

    def __init__(self, spec: EngineSpec) -> None:
        self._options = Options(**spec.endpoint)
        self._spec = spec
        self._pool: _Pool | None = None
        self._thread: threading.Thread | None = None
        self._early: list[EngineRequest] = []
        self._guard = threading.Lock()
        self._num_added = 0
        self._num_returned = 0
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()

    @classmethod
    def task_facts(cls, spec: EngineSpec) -> TaskFacts:
        """Say what a model makes of a row, by its files here; no server is asked.

        Raises:
            ConfigError: They are not here, or servers do not do it.
        """
        if spec.task == "loglikelihood":
            raise ConfigError("task", ["'loglikelihood' needs an engine here, not a server"])
        if spec.pooling.get("too_long") == "chunk":
            where = "too_long = 'chunk': a server makes no pieces, expected 'truncate' or 'refuse'"
            raise ConfigError("[pooling]", [where])
        if not (Path(spec.model) / "config.json").is_file():
            what = f"{spec.model!r} is no folder here that has a config.json: for task = "
            what += f"{spec.task!r}, expected the model's (weights need not be in it)"
            raise ConfigError("model.name", [what])
        return task_facts(spec)

    @property
    def facts(self) -> EngineFacts | None:
        """What it is; None until a server has answered a trial."""
        return self._pool.facts if self._pool is not None else None

    @property
    def capacity(self) -> int:
        """As many as all servers may have at once, and some ahead."""
        return most_at_once(self._spec, self._options)[1] + READ_AHEAD

    @property
    def num_in_flight(self) -> int:
        """Requests added and not yet returned."""
        return self._num_added - self._num_returned

    @property
    def stats(self) -> EngineStats:
        """What is at the servers, what waits, and what was counted."""
        return self._pool.stats if self._pool is not None else EngineStats()

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """Hand requests to the loop."""
        self._num_added += len(requests)
        with self._guard:
            if self._pool is None:
                self._early += requests
                return
        self._pool.hand_over(requests)

    def step(self, timeout_s: float) -> list[Completion]:
        """Return what was answered; wait up to `timeout_s` for the first.

        Raises:
            ConfigError: A server lacks what the job asks for, or there is no key.
            EngineError: No server has answered for too long.
        """
        pool = self._pool or self._start()
        found: list[Completion] = []
        with suppress(queue.Empty):
            found.append(self._done.get(timeout=timeout_s))
            while True:
                found.append(self._done.get_nowait())
        self._num_returned += len(found)
        if not found and pool.error is not None:
            raise pool.error
        return found

    def close(self) -> None:
        """Drop all that is under way. Idempotent."""
        if self._pool is not None and self._thread is not None:
            self._pool.stop()
            self._thread.join()

    def _start(self) -> _Pool:
        pool = _Pool(self._spec, self._options, self._done)
        with self._guard:
            self._pool = pool
            pool.hand_over(self._early)
        self._thread = threading.Thread(target=pool.work, name="endpoints", daemon=True)
        self._thread.start()
        return pool


class _Pool:
    """The servers and the rows that are not answered; all but `hand_over` in the loop's thread."""

    def __init__(
        self, spec: EngineSpec, options: Options, done: queue.SimpleQueue[Completion]
    ) -> None:
        self._spec, self._options, self._done = spec, options, done
        self._started_s = time.monotonic()
        self._most, self._whole = most_at_once(spec, options)
        self._http = Http(
            options.key(), options.request(spec.task), self._whole + 8, options.request_timeout_s
        )
        first = min(FIRST_AT_ONCE, self._most)
        self._endpoints = [
            Endpoint(url.rstrip("/"), Window(first, self._most)) for url in options.urls
        ]
        self._requests = Meter(options.requests_per_minute, self._started_s)
        self._tokens = Meter(options.tokens_per_minute, self._started_s)
        self._fresh: deque[Row] = deque()
        self._again: list[Row] = []
        self._last: deque[Row] = deque()
        self._num_waiting = 0
        self._is_alone = False
        self._trouble_s: float | None = None
        self._num_tried = self._num_failed = self._num_answered = 0
        self._sum_tokens = 0
        self._slowest_s = 0.0
        self._counts = {"num_prompt_tokens": 0, "num_generated_tokens": 0}
        self._beats = 0
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._helpers: set[asyncio.Task[None]] = set()
        self._blamed: list[tuple[Row, RowError]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._known = options.known
        self.facts: EngineFacts | None = None
        self.error: EngineError | ConfigError | None = None

    # From other threads.

    def hand_over(self, requests: Sequence[EngineRequest]) -> None:
        """Take requests."""
        with suppress(RuntimeError):  # Closed: nobody waits for them any more.
            self._loop.call_soon_threadsafe(self._take, list(requests))

    def stop(self) -> None:
        """End the loop."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stopping.set)

    @property
    def stats(self) -> EngineStats:
        """See `OpenAIEngine.stats`. The beat says that it waits for a server, and is alive."""
        num_running = sum(len(one.tasks) for one in self._endpoints)
        num_waiting = len(self._fresh) + len(self._again) + len(self._last)
        return EngineStats(num_running, num_waiting, num_steps=self._beats, **self._counts)

    # In the loop's thread.

    def work(self) -> None:
        """Run the loop until it is stopped."""
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._run())
            except Exception as error:  # noqa: BLE001 - the thread's border: told to the other one
                self.error = EngineDeadError(one_line(error))

    async def _run(self) -> None:
        self._begin(self._open_all())
        self._begin(self._watch())
        for one in self._endpoints:
            self._begin(self._http.widen(one, self._most, self._pump))
        await self._stopping.wait()
        for task in (*self._helpers, *(task for one in self._endpoints for task in one.tasks)):
            task.cancel()
        await self._http.close()

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do something beside the rows."""
        task = self._loop.create_task(work)
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)
        task.add_done_callback(self._note_fault)
        return task

    def _note_fault(self, task: asyncio.Task[None]) -> None:
        """What nobody has thought of ends the engine, lest it wait for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.error = self.error or EngineDeadError(one_line(error))

    def _take(self, requests: Sequence[EngineRequest]) -> None:
        self._fresh.extend(map(Row, requests))
        self._pump()

    # Servers.

    async def _open_all(self) -> None:
        """Open all once; later each by itself, for as long as it takes."""
        found = await asyncio.gather(*(self._open(one) for one in self._endpoints))
        if wrong := [text for text in found if text is not None]:
            self.error = ConfigError(WHERE, wrong)
            return
        await asyncio.gather(*(self._revive(one) for one in self._endpoints if one.is_out))

    async def _open(self, endpoint: Endpoint) -> str | None:
        """Try a server; return what is wrong for good."""
        try:
            await self._http.open(endpoint, self._spec, is_pinned=self._options.is_pinned)
            if self._options.process is None:
                await self._know_again(endpoint)
        except WrongServerError as error:
            self._note_trouble(f"{endpoint.host}: {error}")
            return f"{endpoint.url}: {error}"
        except BusyError as error:
            endpoint.ready_s = time.monotonic() + (error.wait_s or 0)
            self._note_trouble(f"{endpoint.host}: {error}")
        except AttemptError as error:
            self._note_trouble(f"{endpoint.host}: {error}")
        else:
            self._let_in(endpoint)
        return None

    async def _know_again(self, endpoint: Endpoint) -> None:
        """Refuse a server whose model is not that of the others, or of the runs before."""
        answer = await self._http.question(endpoint, self._spec)
        endpoint.served = {**endpoint.served, **answer}
        self._known = self._known or endpoint.served
        if text := difference(self._known, endpoint.served):
            raise WrongServerError(
                f"{text}: another model; {option('--fresh')} has it answer all rows"
            )

    def _let_in(self, endpoint: Endpoint) -> None:
        endpoint.is_out, endpoint.num_bad, endpoint.num_busy = False, 0, 0
        server, window = endpoint.server, endpoint.window
        if self.facts is None:
            lengths = [one.max_model_len for one in self._endpoints if one.max_model_len]
            self.facts = EngineFacts(
                name="openai",
                version=f"vllm {endpoint.served['version']}" if server and server.is_vllm else "",
                device="none",
                max_model_len=min(lengths, default=None),
                max_num_seqs=self._whole,
                startup_s=time.monotonic() - self._started_s,
                settings={"endpoints": [one.host for one in self._endpoints]},
                served=endpoint.served,
            )
        if server is not None and server.is_vllm and not endpoint.answered_s:
            window.size = min(FIRST_AT_VLLM, self._most)
        self._pump()

    async def _revive(self, endpoint: Endpoint) -> None:
        """Try a server that is left out, until it works again."""
        attempt = 0
        while endpoint.is_out and self.error is None:
            wait_s = max(AGAIN_S[min(attempt, len(AGAIN_S) - 1)], endpoint.ready_s - _now())
            await asyncio.sleep(wait_s)
            await self._open(endpoint)
            attempt += 1

    def _leave_out(self, endpoint: Endpoint) -> None:
        if endpoint.is_out or self.error is not None:
            return
        endpoint.is_out = True
        endpoint.window.shrink(_now())
        self._begin(self._revive(endpoint))

    async def _watch(self) -> None:
        """Beat, and look after servers that are silent though they have work."""
        looking: dict[str, asyncio.Task[None]] = {}
        while True:
            await asyncio.sleep(BEAT_S)
            self._beats += 1
            patience_s = max(QUIET_S, 3 * self._slowest_s)
            for one in self._endpoints:
                is_silent = one.tasks and not one.is_out and _now() - one.answered_s > patience_s
                if is_silent and (one.url not in looking or looking[one.url].done()):
                    looking[one.url] = self._begin(self._look(one))

    async def _look(self, endpoint: Endpoint) -> None:
        """Ask a silent server whether it is there; twice no means that its requests are lost."""
        for _ in range(2):
            with suppress(AttemptError, BusyError, WrongServerError):
                await self._http.models(endpoint)
                endpoint.answered_s = max(endpoint.answered_s, _now() - QUIET_S / 2)
                return
        self._note_trouble(f"{endpoint.host}: it hangs")
        self._leave_out(endpoint)
        for task in list(endpoint.tasks):
            task.cancel()

    def _note_trouble(self, text: str) -> None:
        """A server does not do what it should: if for too long none does, it is over."""
        now_s = _now()
        process = self._options.process
        if process is not None and started_at(process[0]) != process[1]:
            self.error = EngineDeadError("the warm server has ended")
        if self._trouble_s is None:
            self._trouble_s = now_s
        ready_s = min(one.ready_s for one in self._endpoints)
        since_s = max(now_s, ready_s) - self._trouble_s
        if since_s <= self._options.endpoint_grace_s or self.error is not None:
            return
        grace_s = self._options.endpoint_grace_s
        self.error = EngineError(
            f"no server has answered, in more than {grace_s:g} s (run.endpoint_grace_s); the last "
            f"one: {text}; what was answered stays, run again to go on"
        )

    # Rows.

    def _pump(self) -> None:
        """Send what there is room for."""
        while self.error is None and self.facts is not None:
            now_s = _now()
            wait_s = max(self._requests.wait_s(now_s), self._tokens.wait_s(now_s))
            if wait_s > 0:
                return self._wake_in(wait_s)
            picked = self._pick(now_s)
            if picked is None:
                return None
            row, endpoint = picked
            num_tokens = self._usual_tokens()
            self._requests.take(1)
            self._tokens.take(num_tokens)
            task = self._loop.create_task(self._attempt(row, endpoint, num_tokens))
            endpoint.tasks.add(task)
            task.add_done_callback(partial(self._end, endpoint))
        return None

    def _end(self, endpoint: Endpoint, task: asyncio.Task[None]) -> None:
        endpoint.tasks.discard(task)
        self._is_alone = False
        self._note_fault(task)
        self._pump()

    def _wake_in(self, wait_s: float) -> None:
        now_s, timer = self._loop.time(), self._timer
        if timer is not None and now_s < timer.when() <= now_s + wait_s:
            return
        if timer is not None:
            timer.cancel()
        self._timer = self._loop.call_later(wait_s, self._pump)

    def _pick(self, now_s: float) -> tuple[Row, Endpoint] | None:
        """Choose a row and its server: who has failed first, and not where it did."""
        usable = [one for one in self._endpoints if not one.is_out]
        num_running = sum(len(one.tasks) for one in self._endpoints)
        if not usable or num_running >= self._whole or self._is_alone:
            return None
        if ready := [one.ready_s for one in usable if one.ready_s > now_s]:
            self._wake_in(min(ready) - now_s)
        roomy = max(usable, key=lambda one: one.room(now_s))
        if roomy.room(now_s) <= 0:
            return None
        is_rest = not self._fresh and not self._again
        if self._last and (is_rest or len(self._last) >= MOST_LAST):
            return self._pick_last(usable, num_running, now_s)
        for at, row in enumerate(self._again):
            best = best_for(row, usable, now_s)
            if best.room(now_s) > 0:
                del self._again[at]
                return row, best
        return (self._fresh.popleft(), roomy) if self._fresh else None

    def _pick_last(
        self, usable: list[Endpoint], num_running: int, now_s: float
    ) -> tuple[Row, Endpoint] | None:
        """Choose of those that are kept back: a few at once, or one with no other."""
        row = self._last[0]
        best, is_alone = best_for(row, usable, now_s), row.num_lost >= LOST_BEFORE_ALONE
        if num_running >= (1 if is_alone else FEW) or best.room(now_s) <= 0:
            return None
        self._is_alone = is_alone
        return self._last.popleft(), best

    async def _attempt(self, row: Row, endpoint: Endpoint, num_tokens: float) -> None:
        """Have a row answered, or see to it that it is asked again."""
        began_s, is_alone, num_spent = _now(), self._is_alone, 0
        row.num_tried += 1
        self._num_tried += 1
        try:
            if row.request.lora is not None and row.request.lora not in self._spec.loras:
                self._settle(row, unknown_adapter(row.request.lora, self._spec.loras))
                return
            reply, asked = await self._http.ask(endpoint, row.request, self._spec)
            num_spent = _tokens_of(reply)
            self._note_answer(endpoint, began_s, num_spent)
            self._answer(row, reply, asked, _now() - began_s)
        except RowRefusedError as error:
            self._note_answer(endpoint, began_s, 0)
            self._settle(row, error.error)
        except Unsuitable as error:
            self._settle(row, RowError("bad_request", str(error)))
        except BusyError as error:
            self._busy(row, endpoint, error)
        except (AttemptError, LackingError, WrongServerError) as error:
            self._fail(row, endpoint, error, began_s, is_alone=is_alone)
        except asyncio.CancelledError:
            if not self._stopping.is_set():
                row.said = f"{endpoint.host}: it hangs"
                row.note_failure(endpoint, is_lost=not is_alone)
                self._ask_again(row)
            raise
        finally:
            self._tokens.take(num_spent - num_tokens)

    def _usual_tokens(self) -> float:
        return self._sum_tokens / self._num_answered if self._num_answered else 100.0

    def _note_answer(self, endpoint: Endpoint, began_s: float, num_tokens: int) -> None:
        now_s = _now()
        self._trouble_s = None
        self._tell_blamed()
        self._slowest_s = max(self._slowest_s, now_s - began_s)
        endpoint.note_answer(began_s, now_s)
        is_full = len(endpoint.tasks) >= endpoint.window.size
        endpoint.window.note(now_s, num_tokens, is_full=is_full)

    def _answer(self, row: Row, reply: Reply, asked: Asked, latency_s: float) -> None:
        self._num_answered += 1
        self._sum_tokens += _tokens_of(reply)
        self._counts["num_prompt_tokens"] += reply.num_prompt_tokens or 0
        self._counts["num_generated_tokens"] += reply.num_output_tokens or 0
        if problem := unsplit(reply.samples, asked):
            self._settle(row, RowError("reasoning_mixed", problem))
        elif any(sample.finish_reason == "content_filter" for sample in reply.samples):
            error = RowError("content_filter", "the server's filter held the answer back")
            self._settle(row, error)
        else:
            self._done.put(
                Completion(
                    row.request.request_id,
                    tuple(reply.samples),
                    reply.num_prompt_tokens,
                    reply.num_cached_tokens,
                    reply.num_output_tokens,
                    latency_s,
                )
            )

    def _settle(self, row: Row, error: RowError) -> None:
        self._done.put(failed(row.request.request_id, error))

    def _busy(self, row: Row, endpoint: Endpoint, error: BusyError) -> None:
        now_s = _now()
        row.num_busy += 1
        row.busy_s = row.busy_s or now_s
        is_long = now_s - row.busy_s > self._options.endpoint_grace_s
        if is_long and row.num_busy > MOST_BUSY and endpoint.answered_s > row.busy_s:
            text = f"{endpoint.host} was busy {row.num_busy} times, and answered others meanwhile"
            return self._settle(row, RowError("endpoint_failed", text))
        self._again.append(row)
        usual_s = BUSY_S[min(endpoint.num_busy, len(BUSY_S) - 1)]
        if now_s >= endpoint.ready_s:
            endpoint.num_busy += 1
        wait_s = max(error.wait_s, BUSY_S[0]) if error.wait_s is not None else usual_s
        endpoint.ready_s = max(endpoint.ready_s, now_s + wait_s)
        endpoint.window.shrink(now_s)
        return self._note_trouble(f"{endpoint.host}: {error}")

    def _fail(
        self, row: Row, endpoint: Endpoint, error: Exception, began_s: float, *, is_alone: bool
    ) -> None:
        now_s = _now()
        row.said = f"{endpoint.host}: {error}"
        self._num_failed += 1
        endpoint.num_bad += 1
        is_from_server = isinstance(error, LackingError) or getattr(error, "is_from_server", False)
        if is_alone or is_from_server:
            is_lost = not is_alone and endpoint.answered_s <= began_s
            row.note_failure(endpoint, is_lost=is_lost)
        else:
            row.doubts.append((endpoint, now_s))
        self._note_trouble(row.said)
        is_gone = isinstance(error, WrongServerError) or str(error).startswith("ClientConnector")
        if is_gone or is_alone or endpoint.num_bad >= BAD_BEFORE_OUT:
            self._leave_out(endpoint)
        elif str(error).startswith(NO_ANSWER):
            endpoint.window.shrink(now_s)
        self._ask_again(row)

    def _ask_again(self, row: Row) -> None:
        """Let a row wait for its next attempt, unless it has had enough of them."""
        self._num_waiting += 1
        self._loop.call_later(AGAIN_S[min(row.num_tried, 3) - 1], self._come_back, row)

    def _come_back(self, row: Row) -> None:
        self._num_waiting -= 1
        row.settle_doubts()
        if row.num_failures >= enough_failures(row, self._num_failed, self._num_tried):
            text = f"{row.num_failures} attempts failed while others succeeded; {row.said}"
            self._blame(row, RowError("endpoint_failed", text))
        elif row.num_lost >= LOST_BEFORE_LAST:
            self._last.append(row)
        else:
            self._again.append(row)
        self._pump()

    def _blame(self, row: Row, error: RowError) -> None:
        """Make a row an error once another is answered: a server that answers none proves nothing.

        Where no other is left, a few are to blame all the same: a trial has been answered.
        """
        self._blamed.append((row, error))
        is_rest = not (self._fresh or self._again or self._last)
        is_rest = is_rest and not any(one.tasks for one in self._endpoints)
        if len(self._blamed) > MOST_BLAMED:
            self.error = self.error or EngineError(
                f"no server has answered any of {len(self._blamed)} rows alone; the last one: "
                f"{row.said}; what was answered stays, run again to go on"
            )
        elif is_rest and self._num_waiting == 0:
            self._tell_blamed()

    def _tell_blamed(self) -> None:
        for row, error in self._blamed:
            self._settle(row, error)
        self._blamed.clear()


def _tokens_of(reply: Reply) -> int:
    return (reply.num_prompt_tokens or 0) + (reply.num_output_tokens or 0)


def _now() -> float:
    return time.monotonic()
