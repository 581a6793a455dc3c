"""What a run says of the tuned file beside its job."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from batchgen.core.errors import ConfigError, EngineError
from batchgen.engine.death import is_out_of_memory
from batchgen.engine.vllm.settings import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchgen.cluster.fleet import Fleet
    from batchgen.engine.lazy import LazyEngine
    from batchgen.job.model import JobConfig


def tuned_notes(job: JobConfig) -> list[str]:
    """Why the tuned file is not used, or what of it is not; empty if all is well."""
    return [job.tuned.note] if job.tuned is not None and job.tuned.note is not None else []


@contextmanager
def naming_tuned(job: JobConfig, engine: LazyEngine | Fleet) -> Iterator[None]:
    """Where the engine does not start, or runs out of memory, name the settings that were tuned.

    They need not be at fault, but whoever reads the job file would look for them there.

    Raises:
        ConfigError, EngineError: The same, with more text.
    """
    try:
        yield
    except (ConfigError, EngineError) as error:
        tuned = job.tuned
        is_startup = engine.facts is None
        if tuned is None or not tuned.settings or not (is_startup or is_out_of_memory(str(error))):
            raise
        told = ", ".join(f"{name} = {value}" for name, value in tuned.settings.items())
        had = f"it had {told} from {tuned.path}: --no-tuned runs without"
        if isinstance(error, ConfigError):
            if error.where != SETTINGS:  # A grammar, say: no settings of these.
                raise
            *before, last = error.problems
            raise ConfigError(error.where, [*before, f"{last}; {had}"]) from error
        msg = f"{error}; {had}"
        raise type(error)(msg) from error
