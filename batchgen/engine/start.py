"""Chooses the engine for a spec."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen.engine.echo import EchoEngine
from batchgen.engine.process import EngineProcess

if TYPE_CHECKING:
    from batchgen.engine.base import Engine
    from batchgen.records import EngineSpec


def start_engine(spec: EngineSpec) -> Engine:
    """Start the engine that `spec.backend` names: vLLM in a process of its own, echo right here.

    Returns at once; `facts` stays None until the engine is up.

    Raises:
        ConfigError: The echo engine does not know one of its options.
        EngineError: The process could not be started.
    """
    return EchoEngine(spec) if spec.backend == "echo" else EngineProcess(spec)
