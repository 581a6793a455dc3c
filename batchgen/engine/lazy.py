"""`LazyEngine`: an engine that is not started before there is something for it to do."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from batchgen.core.records import EngineStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from batchgen.core.records import Completion, EngineFacts
    from batchgen.engine.base import EngineRequest
    from batchgen.engine.supervised import SupervisedEngine

# Before it is started: enough to have a reason to.
_FIRST_REQUESTS = 1


class LazyEngine:
    """Starts with the first request, or with `start`. An `Engine`, see there."""

    def __init__(self, build: Callable[[], SupervisedEngine]) -> None:
        """Bind; nothing is started."""
        self._build = build
        self._engine: SupervisedEngine | None = None

    def start(self) -> SupervisedEngine:
        """Begin to start, without waiting for it. Idempotent.

        Raises:
            ConfigError: An option of the engine is unknown.
            EngineError: Its process could not be started.
        """
        if self._engine is None:
            self._engine = self._build()
        return self._engine

    @property
    def is_started(self) -> bool:
        """Whether anything was ever to do."""
        return self._engine is not None

    @property
    def facts(self) -> EngineFacts | None:
        """See `Engine`."""
        return self._engine.facts if self._engine else None

    @property
    def capacity(self) -> int:
        """See `Engine`."""
        return self._engine.capacity if self._engine else _FIRST_REQUESTS

    @property
    def num_in_flight(self) -> int:
        """See `Engine`."""
        return self._engine.num_in_flight if self._engine else 0

    @property
    def stats(self) -> EngineStats:
        """See `Engine`."""
        return self._engine.stats if self._engine else EngineStats()

    @property
    def warnings(self) -> list[str]:
        """What it did that it should not."""
        return self._engine.warnings if self._engine else []

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """See `Engine`."""
        self.start().add(requests)

    def step(self, timeout_s: float) -> list[Completion]:
        """See `Engine`."""
        return self._engine.step(timeout_s) if self._engine else []

    def close(self) -> None:
        """See `Engine`."""
        if self._engine is not None:
            self._engine.close()


@contextmanager
def closing_beside(engine: object) -> Iterator[None]:
    """Close an engine beside other work: it takes seconds to let go of its GPU.

    A fleet is closed later, by the thread that has made it.
    """
    if not isinstance(engine, LazyEngine):
        yield
        return
    closing = threading.Thread(target=engine.close, name="engine-close")
    closing.start()
    try:
        yield
    finally:
        closing.join()
