"""The engine's process: `python -m batchgen.engine.host FD`, started by `process.EngineProcess`.

Why a process: a crash or a hang of anything under vLLM cannot take the books down; a rebuilt
engine starts with clean GPU memory; Ctrl-C never reaches it (a session of its own); its log lines
go to a file; the parent imports neither vllm nor torch; and reading, rendering and committing
never contend with vLLM's front end for the GIL.

Over the socket go pickled tuples, whose first item says what they are:

    in   the EngineSpec, once; then ("add", [HostedRequest, ...]), ("expect", WorkLeft), ("close",)
    out  ("ready", EngineFacts, capacity), ("stats", EngineStats), ("done", [Completion, ...]),
         and as the last one ("config", (where, problems)), ("refused", text) or ("dead", text)

When the parent is gone, however it went, so is this process group: the socket's end kills it.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from batchgen.core.errors import BatchgenError, ConfigError, EngineDeadError, one_line
from batchgen.core.runtime import collect_rarely, own_streams
from batchgen.engine.base import engine_class, expect
from batchgen.engine.devices import GpuLoad
from batchgen.engine.vllm.settings import gpus_of, is_cpu_build

if TYPE_CHECKING:
    from typing import NoReturn

    from batchgen.core.records import EngineSpec
    from batchgen.engine.base import Engine

STATS_S = 0.5


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
            if engine.num_in_flight or not self._is_ready:
                if completions := engine.step(STATS_S):
                    self.send("done", completions)
            else:
                self._wake.wait(STATS_S)
            self._report(engine)
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


def main() -> NoReturn:
    """Serve the connection whose file descriptor is the first argument."""
    own_streams()
    faulthandler.enable()
    threading.excepthook = _end_with_thread
    # Of the modules that vLLM imports nothing becomes garbage: 10 to 19 % of their time (0.32).
    collect_rarely()
    fd = int(sys.argv[1])
    # A process that vLLM forks must not hold the socket open after this one.
    os.set_inheritable(fd, False)  # noqa: FBT003
    connection = Connection(fd)
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
