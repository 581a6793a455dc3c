"""The server as a process: its socket, its log of calls, and how it ends."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import uvicorn

from batchgen.core.runtime import say
from batchgen.serve.app import Served, make_app
from batchgen.serve.runner import Runner
from batchgen.serve.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from batchgen.serve.config import ServeConfig
    from batchgen.serve.keys import Keys

_MOST_CONNECTIONS, _HEADER_BYTES, _END_S = 512, 1 << 14, 10


def run(root: Path, config: ServeConfig, keys: Keys, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C; then end what works on batches in order.

    Raises:
        BusyError: Another server has this root.
    """
    # uvicorn gives the signal back once it has ended; there is something to end then.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    store = Store(root)
    runner = Runner(store, config)
    with (root / "calls.jsonl").open("ab", buffering=0) as calls:
        app = make_app(Served(store, config, keys, runner, calls.write))
        runner.start()
        say(f"serving {config.model} at http://{host}:{port}/v1, from {root}")
        try:
            with suppress(KeyboardInterrupt):
                uvicorn.run(
                    app,
                    host=host,
                    port=port,
                    log_level="warning",
                    access_log=False,
                    limit_concurrency=_MOST_CONNECTIONS,
                    h11_max_incomplete_event_size=_HEADER_BYTES,
                    timeout_graceful_shutdown=_END_S,
                    http="h11",
                )
        finally:
            runner.end()
            runner.join()
