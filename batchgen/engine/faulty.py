"""`FaultyEchoEngine`: the echo engine with a fault table; see `faults`.

A subclass, so that the echo engine itself, which measures the pipeline, pays nothing for it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from batchgen.core.errors import EngineDeadError
from batchgen.core.records import RowError
from batchgen.engine.echo import EchoEngine, read_options
from batchgen.engine.faults import FaultTable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from batchgen.core.records import Completion, EngineSpec
    from batchgen.engine.base import EngineRequest
    from batchgen.engine.faults import Fault

EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h."""
WRONG_ID = 10**15
"""Added to a request's id: nobody asked for that."""


def echo_engine(spec: EngineSpec, *, is_hosted: bool = False) -> EchoEngine:
    """Build the echo engine that the spec describes.

    Args:
        spec: Of backend echo.
        is_hosted: Whether this process is the engine's alone, to kill and to block.

    Raises:
        ConfigError: With every unknown or impossible option.
    """
    if read_options(spec.model_kwargs).faults:
        return FaultyEchoEngine(spec, is_hosted=is_hosted)
    return EchoEngine(spec)


class FaultyEchoEngine(EchoEngine):
    """Fails as told."""

    def __init__(self, spec: EngineSpec, *, is_hosted: bool) -> None:
        super().__init__(spec)
        options = read_options(spec.model_kwargs)
        self._table = FaultTable(options.faults, options.once_file)
        self._is_hosted = is_hosted
        self._marks: dict[int, str] = {}
        self._death: EngineDeadError | None = None
        self._hangs = False

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """Queue requests.

        Raises:
            EngineDeadError: It has died.
        """
        self._check_alive()
        super().add(requests)

    def step(self, timeout_s: float) -> list[Completion]:
        """Run one step, with its faults.

        Raises:
            EngineDeadError: It dies, or has died.
        """
        self._check_alive()
        try:
            completions = [] if self._hangs else super().step(timeout_s)
        except _HangsError:
            return []
        if self._hangs:
            time.sleep(timeout_s)
        if not self._marks:
            return completions
        return [changed for done in completions for changed in self._change(done)]

    def _check_alive(self) -> None:
        if self._death is not None:
            raise self._death

    def _prepare(self, request: EngineRequest) -> tuple[str, bytes] | RowError:
        prepared = super()._prepare(request)
        if isinstance(prepared, RowError):
            return prepared
        for fault in self._table.strikes(prepared[0]):
            if fault.kind == "refuse":
                return RowError("bad_request", f"refused: the prompt has {fault.text!r}")
            self._strike(fault, request.request_id)
        return prepared

    def _strike(self, fault: Fault, request_id: int) -> None:
        if fault.kind in ("die", "poison", "out_of_memory"):
            self._die(fault)
        elif fault.kind == "hang":
            self._hang(fault)
        else:
            self._marks[request_id] = fault.kind

    def _die(self, fault: Fault) -> NoReturn:
        is_memory = fault.kind == "out_of_memory"
        if self._is_hosted:
            _say(fault)
            if is_memory:
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(EXIT_CODE)
        what = "CUDA out of memory" if is_memory else "as it was told to"
        self._death = EngineDeadError(f"the engine died: {what} ({fault})")
        raise self._death

    def _hang(self, fault: Fault) -> NoReturn:
        self._hangs = True
        while self._is_hosted:
            _say(fault)
            time.sleep(3600)
        raise _HangsError

    def _change(self, done: Completion) -> list[Completion]:
        mark = self._marks.pop(done.request_id, None)
        if mark == "vanish":
            return []
        if mark == "duplicate":
            return [done, done]
        if mark == "wrong_id":
            return [done._replace(request_id=done.request_id + WRONG_ID)]
        return [done]


class _HangsError(Exception):
    """Leaves a step that will not end."""


def _say(fault: Fault) -> None:
    sys.stderr.write(f"fault: {fault}\n")
    sys.stderr.flush()
