"""Which of vLLM's errors at its start the job file is at fault for: those of its settings.

`LLM(...)` goes three steps: it makes `EngineArgs` of its keywords, `create_engine_config` makes a
`VllmConfig` of these, and only then anything is loaded or a device is touched. What the first two
refuse they refuse every time, so that to run again is of no use. All that comes later (weights,
memory, CUDA, processes) may be better the next time.

Source:
    vllm/entrypoints/llm.py, LLM.__init__, and vllm/v1/engine/llm_engine.py,
    LLMEngine.from_engine_args, alike in 0.26.0, 0.32.0 and 0.33.0. Imports nothing of vLLM.
"""

from __future__ import annotations

import re
import traceback
from reprlib import Repr
from typing import TYPE_CHECKING

from pydantic import ValidationError

from batchgen.core.errors import ConfigError, EngineError
from batchgen.core.suggest import nearest
from batchgen.engine.encoder import one_line
from batchgen.engine.keywords import known_keywords

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

WHERE = "[model]"
SAMPLING = "[sampling]"
MAX_CHARS = 500
_INIT, _START = "LLM.__init__", "LLMEngine.from_engine_args"
_CONFIG = "EngineArgs.create_engine_config"
_PARAMS = "SamplingParams.__post_init__"
_UNKNOWN = re.compile(r"unexpected keyword argument '(\w+)'")
_PREFIX = re.compile(r"^(Value error|Assertion failed), ")
_MACHINES = re.compile(r"available GPUs|device count", re.IGNORECASE)
"""Of a GPU that is gone, not of the job: vllm/config/parallel.py, _verify_args, 0.26 to 0.33."""
_short = Repr()
_short.maxstring = 60


def start_error(exc: Exception) -> ConfigError | EngineError:
    """What a failed start of vLLM's is to the job.

    Args:
        exc: As `LLM(...)` raised it, with its traceback.

    Returns:
        ConfigError: vLLM refuses the job's settings, before anything was loaded, or its sampling.
        EngineError: all else.
    """
    if not isinstance(exc, (TypeError, ValueError)):
        return EngineError(one_line(exc))
    if _PARAMS in _frames(exc):
        return ConfigError(SAMPLING, [f"vLLM refuses it: {one_line(exc)}"])
    if not _is_of_settings(exc):
        return EngineError(one_line(exc))
    if _MACHINES.search(str(exc)) or any(isinstance(one, OSError) for one in _causes(exc)):
        return EngineError(one_line(exc))
    return ConfigError(WHERE, [" ".join(text.split())[:MAX_CHARS] for text in _problems(exc)])


def _frames(exc: Exception) -> dict[str, FrameType]:
    """Of the functions that it came through, by their names."""
    return {frame.f_code.co_qualname: frame for frame, _ in traceback.walk_tb(exc.__traceback__)}


def _is_of_settings(exc: Exception) -> bool:
    """Whether it came out of the making of the configuration."""
    seen = _frames(exc)
    if _CONFIG in seen or _INIT not in seen:
        return _CONFIG in seen
    # Before the engine was begun. Without a traceback into it, it may also be after that.
    return _START not in seen and not hasattr(seen[_INIT].f_locals.get("self"), "llm_engine")


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """It, and what it was raised from; pydantic keeps that of a validator's error for itself."""
    inner = [
        found
        for error in (exc.errors(include_url=False) if isinstance(exc, ValidationError) else ())
        if isinstance(found := error.get("ctx", {}).get("error"), BaseException)
    ]
    yield exc
    for cause in (exc.__cause__ or exc.__context__, *inner):
        if cause is not None:
            yield from _causes(cause)


def _problems(exc: Exception) -> list[str]:
    if found := _UNKNOWN.search(str(exc)):
        name = found[1]
        near = nearest(name, known_keywords() or ())
        hint = f"did you mean {near!r}?" if near else "see the arguments of vLLM's EngineArgs"
        return [f"engine.{name}: vLLM has no such setting; {hint}"]
    if not isinstance(exc, ValidationError):
        return [f"vLLM refuses the settings: {one_line(exc)}"]
    told: dict[str, str] = {}
    for error in exc.errors(include_url=False, include_context=False):
        name = str(error["loc"][0]) if error["loc"] else ""
        what = f"{name} = {_short.repr(error['input'])}" if name else "the settings"
        # Of a field with several types there is an error for each: the first names the values.
        told.setdefault(name or error["msg"], f"vLLM refuses {what}: {_text(error['msg'])}")
    return list(told.values())


def _text(message: str) -> str:
    return _PREFIX.sub("", message)
