"""`EngineProcess`: an engine in a process of its own, seen through the `Engine` protocol.

Why a process: a crash or a hang of anything under vLLM cannot take the books down; a rebuilt
engine starts with clean GPU memory; Ctrl-C never reaches it (a session of its own); its log lines
go to a file; the parent imports neither vllm nor torch; and reading, rendering and committing
never contend with vLLM's front end for the GIL.

Both ends are here. `Host` is the child's, `python -m batchgen.engine.process FD`. On the parent's
two threads stand between the caller and the socket, so that neither `add` nor `step` ever waits
for the child: one sends, one receives. Completions that arrived before the child died are handed
out before the death is. Over the socket go pickled tuples, whose first item says what they are:

    in   the EngineSpec, once; then ("add", [HostedRequest, ...]), ("expect", WorkLeft), ("close",)
    out  ("ready", EngineFacts, capacity), ("stats", EngineStats), ("done", [Completion, ...]),
         and as the last one ("config", (where, problems)), ("refused", text) or ("dead", text)

Nothing outlives the parent. An orderly close asks the engine to shut down, waits a moment (vLLM's
workers then free their shared memory) and kills the process group. If the parent is killed, the
socket's end makes the child kill its group, and so does a guard: a `sh` that waits on a pipe which
only the parent holds. It needs no help from the engine's process, which may hang in a driver call
at that moment or be dead already while vLLM's core lives on. (PR_SET_PDEATHSIG would do neither: it
kills one process of the group, and fires when the thread that started it ends.)
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NoReturn

from batchgen.core.errors import BatchgenError, ConfigError, EngineDeadError, EngineError, one_line
from batchgen.core.processes import child_environment, start_guard, stat_of
from batchgen.core.records import Completion, EngineFacts, EngineSpec, EngineStats, WorkLeft
from batchgen.core.runtime import collect_rarely, own_streams
from batchgen.engine.base import Engine, EngineRequest, HostedRequest, engine_class, expect
from batchgen.engine.death import find_cause, is_vague, log_size, log_tail
from batchgen.engine.devices import GpuLoad
from batchgen.engine.vllm.settings import gpus_of, is_cpu_build

CLOSE_S = 2.0
LINGER_S, KILL_S = 0.3, 2.0
"""How long an orderly shutdown may take before the group is killed."""
STATS_S = 0.5
EXPECTED_MAX_NUM_SEQS = 1024
"""vLLM's own default on an H100 (0.26); for `capacity` until the engine says."""
EXPECTED_READ_AHEAD = 1024
GUARD = 'read -r orderly && exit 0; kill -KILL "-$1"'
"""No `--` before the group: dash, the `sh` of Debian and Ubuntu, takes it for a number (0.5.12)."""


class _Child:
    """The process, its guard and both ends' threads; holds no reference to its `EngineProcess`."""

    def __init__(self, spec: EngineSpec, on_news: Callable[[], None]) -> None:
        self.started = time.perf_counter()
        self._on_news = on_news
        self.facts: EngineFacts | None = None
        self.capacity: int | None = None
        self.stats = EngineStats()
        self.last_words: tuple[str, Any] | None = None
        self.outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.inbox: queue.SimpleQueue[list[Completion] | None] = queue.SimpleQueue()
        self.log_path = spec.log_path
        self.log_start = log_size(spec.log_path)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.process = _start_host(theirs.fileno(), spec)
            self.connection = Connection(ours.detach())
        # Without a shell the child watches the socket alone.
        self.guard = start_guard(GUARD, "batchgen-guard", str(self.process.pid))
        self.post(spec)
        self._is_stopped = False
        self._owner_pid = os.getpid()
        self._threads = [
            threading.Thread(target=target, name=f"batchgen{target.__name__}", daemon=True)
            for target in (self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()

    def post(self, message: object) -> None:
        """Queue a message; pickled here, so that what cannot travel fails where it came from."""
        self.outbox.put(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))

    def _send(self) -> None:
        with contextlib.suppress(OSError):
            while (message := self.outbox.get()) is not None:
                self.connection.send_bytes(message)

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._hear(*pickle.loads(self.connection.recv_bytes()))  # noqa: S301 - our child
                self._on_news()
        self.inbox.put(None)
        self._on_news()

    def _hear(self, kind: str, payload: Any, *rest: Any) -> None:  # noqa: ANN401
        if kind == "done":
            self.inbox.put(payload)
        elif kind == "stats":
            self.stats = payload
        elif kind == "ready":
            self.facts = replace(payload, startup_s=time.perf_counter() - self.started)
            self.capacity = rest[0]
        else:
            self.last_words = (kind, payload)

    def stop(self, *, orderly: bool) -> None:
        """Leave no process of the group; reap the child and the guard. Idempotent."""
        if self._is_stopped or os.getpid() != self._owner_pid:
            return
        self._is_stopped = True
        if orderly:
            self._close_orderly()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        # A killed worker is gone only when the kernel has taken its (GPU) memory back.
        self._wait_for_group(KILL_S)
        self._dismiss_guard()
        self.outbox.put(None)
        for thread in self._threads:
            thread.join()
        self.connection.close()

    def _close_orderly(self) -> None:
        self.post(("close",))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(CLOSE_S)
            # multiprocessing's resource tracker outlives the leader, to unlink shared memory.
            self._wait_for_group(LINGER_S)

    def _wait_for_group(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while is_group_alive(self.process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _dismiss_guard(self) -> None:
        if self.guard is None:
            return
        # Killed guards are no one's loss: communicate() forgives a broken pipe.
        self.guard.communicate(b"orderly\n")


def _no_news() -> None:
    """Tell nobody."""


def build_engine(spec: EngineSpec, on_news: Callable[[], None] = _no_news) -> Engine:
    """Build the engine that `spec.backend` names; returns at once, `facts` is None until it is up.

    All but echo get a process of their own, unless `[model.engine] in_process` says otherwise;
    vLLM always does, and whoever works beside others.

    Args:
        spec: Of the engine.
        on_news: Called, from another thread, when `step` of one in a process may have something.

    Raises:
        ConfigError: There is no such engine, or it cannot do what `spec` asks for.
        EngineError: The process could not be started.
    """
    is_here = spec.model_kwargs.get("in_process", spec.backend == "echo")
    if is_here and not spec.is_vllm and spec.num_sharing == 1:
        return engine_class(spec.backend)(spec)
    return EngineProcess(spec, on_news)


class EngineProcess:
    """Implements `Engine`; the engine named by the spec runs in a child process."""

    def __init__(self, spec: EngineSpec, on_news: Callable[[], None] = _no_news) -> None:
        self._child = _Child(spec, on_news)
        self._expected_capacity = _expected_capacity(spec)
        self.num_in_flight = 0
        """Requests added and not yet returned."""
        self._death: BatchgenError | None = None
        # Also runs at interpreter exit; bound to the child, so that it does not keep self alive.
        self._stop = weakref.finalize(self, self._child.stop, orderly=False)

    @property
    def pid(self) -> int:
        """The child's process id, which is its group's as well."""
        return self._child.process.pid

    @property
    def facts(self) -> EngineFacts | None:
        """What the engine says of itself; `startup_s` counts from the start of the process."""
        return self._child.facts

    @property
    def capacity(self) -> int:
        """How many requests it wants to hold; a guess from the spec until it is up."""
        return self._child.capacity or self._expected_capacity

    @property
    def stats(self) -> EngineStats:
        """The latest that the child reported, at most half a second old while it works."""
        return self._child.stats

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """Send requests to the engine.

        Raises:
            EngineDeadError: `step` has said so already. Before that a dead engine takes
                requests in silence, so that what it finished is not overlooked.
        """
        if self._death is not None:
            raise EngineDeadError(str(self._death))
        self.num_in_flight += len(requests)
        hosted = [HostedRequest(r.request_id, r.prompt, r.seed, r.params, r.lora) for r in requests]
        self._child.post(("add", hosted))

    def expect(self, work: WorkLeft) -> None:
        """Tell the engine what is left to do; one that is up does not hear of it."""
        self._child.post(("expect", work))

    def step(self, timeout_s: float) -> list[Completion]:
        """Return what has arrived; wait up to `timeout_s` if that is nothing.

        Raises:
            ConfigError, EngineError: It did not start; by the job's fault, or for other reasons.
            EngineDeadError: It died, or was killed.
        """
        if self._death is not None:
            raise self._death
        completions = self._take(timeout_s)
        self.num_in_flight -= len(completions)
        if not completions and self._death is not None:
            raise self._death
        return completions

    def close(self) -> None:
        """Shut the engine down, at most two seconds or so; kill what is left."""
        if self._stop.detach():
            # While it loads it would not hear the request, and has nothing to lose.
            self._child.stop(orderly=self._death is None and self.facts is not None)
        self.num_in_flight = 0
        self._death = self._death or EngineDeadError("the engine is closed")

    def _take(self, timeout_s: float) -> list[Completion]:
        """Collect all that is there; on the end of the stream, note the death."""
        completions: list[Completion] = []
        inbox = self._child.inbox
        with contextlib.suppress(queue.Empty):
            batch = inbox.get(timeout=timeout_s) if timeout_s > 0 else inbox.get_nowait()
            while batch is not None:
                completions += batch
                batch = inbox.get_nowait()
            self._death = self._explain()
        return completions

    def _explain(self) -> BatchgenError:
        """Bury the child and say why it went, in one line."""
        child = self._child
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(1.0)
        code = child.process.returncode
        child.stop(orderly=False)
        kind, text = child.last_words or ("dead", _exit_text(code))
        if kind == "config":
            return ConfigError(*text)
        if kind == "dead" or is_vague(text):
            lines = log_tail(child.log_path, child.log_start)
            last_line = lines[-1][:300] if lines and child.last_words is None else None
            if cause := find_cause(lines) or last_line:
                text = f"{text}; its log says: {cause}"
        if child.log_path is not None:
            text = f"{text}; see {child.log_path}"
        if kind == "refused" or child.facts is None:
            return EngineError(f"the engine did not start: {text}")
        return EngineDeadError(f"the engine died: {text}")


def is_group_alive(pgid: int) -> bool:
    """Whether any process of a group still runs.

    Zombies do not count: in a container nobody may ever reap those that lost their parent, and
    a signal to the group cannot tell (Linux; elsewhere /proc finds nothing, and nobody waits).
    """
    found = (stat_of(path.name) for path in Path("/proc").glob("[0-9]*"))
    return any(one and int(one[2]) == pgid and one[0] not in "ZX" for one in found)


def _start_host(fd: int, spec: EngineSpec) -> subprocess.Popen[bytes]:
    log_path = spec.log_path
    # A checkout that is not installed: the child must find the same batchgen, and the same engine.
    environment = child_environment("batchgen", *spec.backend.split(":")[:-1])
    # -P: a file torch.py in the folder that the job is run from must not replace torch.
    command = [sys.executable, "-P", "-m", "batchgen.engine.process", str(fd)]
    with contextlib.ExitStack() as stack:
        log: IO[bytes] | int = subprocess.DEVNULL
        if log_path is not None:
            try:
                log = stack.enter_context(Path(log_path).open("ab"))
            except OSError as exc:
                problem = f"{log_path}: the engine's log cannot be written: {exc.strerror}"
                raise EngineError(problem) from exc
        return subprocess.Popen(  # noqa: S603 - our own module
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(fd,),
            start_new_session=True,
        )


def _expected_capacity(spec: EngineSpec) -> int:
    max_num_seqs = spec.model_kwargs.get("max_num_seqs") or EXPECTED_MAX_NUM_SEQS
    return (spec.max_in_flight or 2 * int(max_num_seqs)) + EXPECTED_READ_AHEAD


def _exit_text(code: int | None) -> str:
    if code is None:
        return "its process closed the connection and did not exit"
    if code >= 0:
        return f"its process exited with code {code}"
    name = signal.Signals(-code).name
    hint = ", often the kernel out of memory" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{hint}"


class Host:
    """Feeds an engine from a connection and sends what comes out of it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._wake = threading.Event()
        self._closing = False
        self._is_ready = False
        self._stats_at = 0.0
        self._load = GpuLoad(0)

    def serve(self, spec: EngineSpec) -> None:
        """Run until told to close.

        Raises:
            BatchgenError: The engine did not start, or died.
        """
        engine = engine_class(spec.backend)(spec)
        is_cpu = not spec.is_vllm or is_cpu_build()
        self._load = GpuLoad(gpus_of(spec.model_kwargs, is_cpu=is_cpu))
        receiver = threading.Thread(target=self._receive, args=(engine,), daemon=True)
        receiver.start()
        self._report(engine)  # One that is up at once should be known to be before it can die.
        while not self._closing:
            self._wake.clear()
            completions: Sequence[Completion] = ()
            if engine.num_in_flight or not self._is_ready:
                completions = engine.step(STATS_S)
            else:
                self._wake.wait(STATS_S)
            self._report(engine)  # First: who takes an answer may ask what the engine is.
            if completions:
                self.send("done", completions)
        engine.close()

    def send(self, *message: object) -> None:
        """Send one message; the parent reads whatever it is doing, so this does not wait long."""
        self._connection.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))

    def _receive(self, engine: Engine) -> None:
        # A thread of its own, so that the parent's end is seen while a model loads.
        try:
            while True:
                kind, *rest = pickle.loads(self._connection.recv_bytes())  # noqa: S301 - our parent
                if kind == "close":
                    self._closing = True
                elif kind == "expect":
                    expect(engine, rest[0])
                else:
                    engine.add(rest[0])
                self._wake.set()
        except (EOFError, OSError):
            os.killpg(os.getpgrp(), signal.SIGKILL)

    def _report(self, engine: Engine) -> None:
        now = time.monotonic()
        if not self._is_ready and engine.facts is not None:
            self._is_ready = True
            # What loading has left behind stays; 5 % less of this process's time with vLLM.
            collect_rarely(freeze=True)
            self.send("ready", engine.facts, engine.capacity)
        elif now - self._stats_at >= STATS_S:
            self.send("stats", replace(engine.stats, gpu_busy=self._load.busy))
            self._stats_at = now


def last_words(exc: Exception) -> tuple[str, object]:
    """Say why it ends: the job is at fault, the engine cannot be had, or it died."""
    if isinstance(exc, ConfigError):
        return "config", (exc.where, exc.problems)
    if isinstance(exc, BatchgenError) and not isinstance(exc, EngineDeadError):
        return "refused", str(exc)
    return "dead", str(exc) if isinstance(exc, BatchgenError) else one_line(exc)


def _end_with_thread(args: threading.ExceptHookArgs) -> None:
    """End the process with any thread of it: a missing one would leave the parent waiting."""
    traceback.print_exception(args.exc_type, args.exc_value, args.exc_traceback)
    sys.stderr.flush()
    os._exit(1)


def _leave_to_child(connection: Connection) -> None:
    """Make a process that vLLM forks its own: it would hold our socket open after us."""
    connection.close()
    threading.excepthook = threading.__excepthook__


def main() -> NoReturn:
    """Serve the connection whose file descriptor is the first argument."""
    own_streams()
    faulthandler.enable()
    threading.excepthook = _end_with_thread
    # Of the modules that vLLM imports nothing becomes garbage: 10 to 19 % of their time (0.32).
    collect_rarely()
    fd = int(sys.argv[1])
    # No other process must hold the socket open after this one.
    os.set_inheritable(fd, False)  # noqa: FBT003
    connection = Connection(fd)
    os.register_at_fork(after_in_child=partial(_leave_to_child, connection))
    host = Host(connection)
    code = 0
    try:
        host.serve(pickle.loads(connection.recv_bytes()))  # noqa: S301 - our parent
    except (BrokenPipeError, ConnectionResetError):
        # The parent is gone; so is the receiver's socket, and it ends the group.
        code = 1
    except Exception as exc:  # noqa: BLE001 - the process border: told to the parent, then the end
        traceback.print_exc()
        host.send(*last_words(exc))
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: vLLM's threads and exit hooks would hold a broken engine open for seconds.
    os._exit(code)


if __name__ == "__main__":
    main()
