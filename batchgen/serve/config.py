"""`serve.toml`: tables of a job, which hold for every batch, and `[serve]`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from batchgen.core.errors import ConfigError
from batchgen.core.runtime import option, read_file
from batchgen.source.openai import CHAT, COMPLETION, EMBEDDING, SCORE, TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_OWN = ("input", "output")
"""Tables that each batch has for itself."""


class Limits(BaseModel):
    """`[serve]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    at_once: int = Field(default=8, ge=1)
    """Batches that share the engine; the others wait, first in, first out."""
    max_file_mb: int = Field(default=200, ge=1)
    """Of one upload, in 1,000,000 bytes."""
    max_requests: int = Field(default=50_000, ge=1)
    """Of one batch."""
    max_batches: int = Field(default=200, ge=1)
    """Of one key, that have not ended."""
    max_files: int = Field(default=10_000, ge=1)
    """Of one key, answers included."""
    max_total_gb: int = Field(default=100, ge=1)
    """Of one key's files, in 1,000,000,000 bytes."""
    keep_days: float = Field(default=30, gt=0)
    """Until a file is removed that says nothing of it."""
    window_h: float = Field(default=24, gt=0)
    """Until a batch expires that is not done, whatever `completion_window` is called."""


@dataclass(frozen=True)
class ServeConfig:
    """What a server serves, and how much of it."""

    limits: Limits
    tables: Mapping[str, Any]
    """Of each batch's job, but for its task, input and output."""

    @property
    def is_vllm(self) -> bool:
        """Whether the model is one that this machine loads by vLLM."""
        return bool(self.tables["model"].get("backend", "vllm") == "vllm")

    @property
    def model(self) -> str:
        """Name of the model, as the job has it."""
        return str(self.tables["model"]["name"])

    @property
    def endpoints(self) -> list[str]:
        """URLs that lines may have: one loaded model does one task."""
        if not self.is_vllm:
            return [CHAT, COMPLETION, EMBEDDING, SCORE]
        task = self.tables.get("task", "generate")
        return [url for url in (CHAT, COMPLETION, EMBEDDING, SCORE) if task_of(url) == task]


def task_of(url: str) -> str:
    """Return the task of a job whose lines have this URL."""
    return TASKS.get(url, "generate")


def load_config(path: Path | None, model: str | None) -> ServeConfig:
    """Read `serve.toml`.

    Args:
        path: None: all as it is by default.
        model: Takes the place of `model.name`.

    Raises:
        ConfigError: With every problem found in `[serve]`; the job's tables are checked with the
            first job.
    """
    where = str(path or "serve")
    try:
        tables = tomllib.loads(read_file(path).decode()) if path is not None else {}
    except ValueError as error:
        raise ConfigError(where, [f"is no TOML: {error}"]) from error
    try:
        limits = Limits(**tables.pop("serve", {}))
    except (ValidationError, TypeError) as error:
        found = error.errors(include_url=False) if isinstance(error, ValidationError) else []
        problems = [f"serve.{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found]
        raise ConfigError(where, problems or ["[serve] is no table"]) from error
    if wrong := [name for name in _OWN if name in tables]:
        raise ConfigError(where, [f"[{name}] is each batch's own; leave it out" for name in wrong])
    own = dict(tables.get("model", {}))
    if model is not None:
        own["name"] = model
    if not own.get("name"):
        raise ConfigError(where, [f"no model: give {option('--model')}, or name in [model]"])
    return ServeConfig(limits, {**tables, "model": own})
