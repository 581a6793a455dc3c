"""Offline batch inference: JSONL, CSV or Parquet through vLLM to published Parquet, exactly once.

`run(job)`, `read(job)` and the others do what the shell's commands do, see `batchgen.api`; what
they raise is a `BatchgenError`, see `batchgen.core.errors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchgen.core import errors
from batchgen.core.errors import BatchgenError, ExitCode

__version__ = "0.1.0"
__all__ = [
    "BatchgenError",
    "ExitCode",
    "__version__",
    "check",
    "compare",
    "doctor",
    "errors",
    "plan",
    "read",
    "report",
    "rollback",
    "run",
    "score",
    "show",
    "status",
    "try_out",
]

if TYPE_CHECKING:
    from batchgen.api import (
        check,
        compare,
        doctor,
        plan,
        read,
        report,
        rollback,
        run,
        score,
        show,
        status,
        try_out,
    )


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module's attributes have any type
    """Load the verbs when first used, so that importing batchgen loads no Arrow."""
    if name in __all__:
        from batchgen import api

        return getattr(api, name)
    raise AttributeError(f"module 'batchgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    """With the verbs, which are not loaded yet."""
    return sorted({*globals(), *__all__})
