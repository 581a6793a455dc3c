"""`FaultyEngine`: the echo engine with faults, for tests of what stands around an engine.

A job names it by its import path, `model.backend = "tests.faulty:FaultyEngine"`, and its faults
in `[model.engine]`, beside the echo engine's own options:

    faults = [
      {kind = "die", at = 100},           # when the 100th request is admitted
      {kind = "poison", text = "boom"},   # whenever a prompt with this text is admitted
    ]
    once_file = "/tmp/fired"              # each `at` fault fires once over all engines of the job
    in_process = true                     # in the run's process: then it only says that it died

`at` counts the requests that one engine has admitted, from 1; an engine that is built anew counts
anew, so without `once_file` the fault comes back with it. `text` strikes every time.

die            in this process: EngineDeadError, for good; hosted: the process exits
out_of_memory  the same in CUDA's words; hosted: SIGKILL, as from the kernel
hang           no step makes progress any more; hosted: the step never returns
vanish         the request never comes back, and the engine forgets it
duplicate      it is answered twice
wrong_id       it is answered under an id that nobody asked for
poison         as die; with `text`
refuse         the row's error `bad_request`; with `text`
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from batchgen.core.errors import EngineDeadError
from batchgen.core.records import RowError
from batchgen.engine.echo import EchoEngine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, NoReturn

    from batchgen.core.records import Completion, EngineFacts, EngineSpec, WorkLeft
    from batchgen.engine.base import EngineRequest

BACKEND = "tests.faulty:FaultyEngine"
KINDS = (
    "die", "out_of_memory", "hang", "vanish", "duplicate", "wrong_id", "poison", "refuse",
)  # fmt: skip
EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h."""
WRONG_ID = 10**15
"""Added to a request's id: nobody asked for that."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of the table: what happens, and to which request."""

    kind: str
    at: int | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self
        assert (self.at is None) != (self.text is None), self

    def __str__(self) -> str:
        return f"{self.kind} at {self.at if self.text is None else repr(self.text)}"


class FaultTable:
    """Says which faults strike a request; remembers in `once_file` which have struck."""

    def __init__(self, faults: Sequence[Mapping[str, Any]], once_file: str | None) -> None:
        self._faults = [Fault(**fault) for fault in faults]
        self._once_file = Path(once_file) if once_file is not None else None
        self._num_admitted = 0

    def strikes(self, text: str) -> list[Fault]:
        """Count a request in; return the faults that it meets."""
        self._num_admitted += 1
        return [fault for fault in self._faults if self._meets(fault, text)]

    def _meets(self, fault: Fault, text: str) -> bool:
        if fault.text is not None:
            return fault.text in text
        return fault.at == self._num_admitted and self._is_first_time(fault)

    def _is_first_time(self, fault: Fault) -> bool:
        if self._once_file is None:
            return True
        if self._once_file.exists() and str(fault) in self._once_file.read_text().splitlines():
            return False
        # Before the fault, which may leave no time after it.
        fd = os.open(self._once_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, f"{fault}\n".encode())
        os.close(fd)
        return True


class FaultyEngine(EchoEngine):
    """Fails as told."""

    def __init__(self, spec: EngineSpec) -> None:
        options = dict(spec.model_kwargs)
        self._table = FaultTable(options.pop("faults", ()), options.pop("once_file", None))
        super().__init__(replace(spec, model_kwargs=options))
        self._is_hosted = not options.get("in_process", False)
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

    def _prepare(self, request: EngineRequest) -> bytes | RowError:
        prepared = super()._prepare(request)
        if isinstance(prepared, RowError):
            return prepared
        for fault in self._table.strikes(prepared.decode()):
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


class HearingEngine(EchoEngine):
    """Is up once it has heard what is left to do; that it shows as its settings."""

    _work: WorkLeft | None = None

    @property
    def facts(self) -> EngineFacts | None:
        """None before `expect`."""
        found = super().facts
        if self._work is None or found is None:
            return None
        return replace(found, settings=self._work._asdict())

    def expect(self, work: WorkLeft) -> None:
        """Hear."""
        self._work = work


class ForkingEngine(EchoEngine):
    """Forks a process that lives on, as vLLM's core does when its front end is killed."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        if not os.fork():
            time.sleep(600)
            os._exit(0)
