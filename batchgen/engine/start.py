"""Chooses the engine for a spec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from batchgen.engine.echo import read_options
from batchgen.engine.faulty import echo_engine
from batchgen.engine.process import EngineProcess
from batchgen.engine.supervised import STALL_S, SupervisedEngine

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchgen.core.records import EngineSpec
    from batchgen.engine.base import Engine
    from batchgen.engine.death import EngineDeath


class StartEngine(Protocol):
    """What `start_engine` is."""

    def __call__(
        self, spec: EngineSpec, *, stall_s: float, on_death: Callable[[EngineDeath], None]
    ) -> SupervisedEngine:
        """Start an engine; returns at once."""


def start_engine(
    spec: EngineSpec,
    *,
    stall_s: float = STALL_S,
    on_death: Callable[[EngineDeath], None] = lambda death: None,
) -> SupervisedEngine:
    """Start the engine that `spec.backend` names, supervised.

    vLLM gets a process of its own; echo runs right here unless `in_process = false`.
    Returns at once; `facts` stays None until the engine is up.

    Args:
        spec: What to start.
        stall_s: How long an engine with work may show no sign of life, or no progress.
        on_death: Told of every death of an engine.

    Raises:
        ConfigError: The echo engine does not know one of its options.
        EngineError: The process could not be started.
    """

    def build(spec: EngineSpec) -> Engine:
        if spec.backend == "echo" and read_options(spec.model_kwargs).in_process:
            return echo_engine(spec)
        return EngineProcess(spec, stall_s)

    return SupervisedEngine(build, spec, on_death=on_death, stall_s=stall_s)
