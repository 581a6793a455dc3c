"""How servers may be used, as the job says."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchgen.core.errors import ConfigError
from batchgen.core.processes import stat_of
from batchgen.core.records import EngineSpec
from batchgen.engine.base import HostedRequest

MOST_AT_ONCE = 2048
"""Of a server, if the job does not say; vLLM runs 1,024 at once on the largest GPUs."""
SPARE_FILES = 128
"""Open files that are left to everything else."""


@dataclass(frozen=True, slots=True)
class Options:
    """How servers may be used, see `EngineSpec.endpoint`."""

    urls: Sequence[str]
    api_key_env: str | None = None
    key_file: str | None = None
    process: tuple[int, str] | None = None
    """Number and start of the server's process, if it is on this machine and without it all is in
    vain."""
    is_pinned: bool = False
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    request_timeout_s: float = 600.0
    endpoint_grace_s: float = 300.0
    known: Mapping[str, Any] = field(default_factory=dict)
    """What was kept of the server that has answered rows; empty: nothing yet."""
    digest: str = ""
    """Of the model and its settings, for `warm`."""
    trial: Sequence[Mapping[str, Any]] | None = ()
    """Messages with the roles that every row's have; empty: any, None: rows are plain texts."""

    def key(self) -> str | None:
        """Read the key.

        Raises:
            ConfigError: The variable is not set, or holds what is no key.
        """
        if self.key_file is not None:
            return Path(self.key_file).read_text(encoding="utf-8").strip()
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not re.fullmatch("[!-~]+", key):
            where = "model.api_key_env"
            what = "is not set" if not key else "holds what cannot be sent as a key"
            raise ConfigError(where, [f"the environment variable {self.api_key_env} {what}"])
        return key

    def request(self, task: str) -> HostedRequest:
        """What a server is tried with."""
        say = "Say yes."
        if task == "score":
            return HostedRequest(0, (say, say), 1)
        chat = [{"role": "user", "content": say}]
        return HostedRequest(0, say if self.trial is None else list(self.trial) or chat, 1)


def most_at_once(spec: EngineSpec, options: Options) -> tuple[int, int]:
    """How many requests a server may have at once, and all of them."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    whole = spec.max_in_flight or MOST_AT_ONCE * len(options.urls)
    whole = max(1, min(whole, files - SPARE_FILES))
    return min(whole, MOST_AT_ONCE), whole


def started_at(pid: int) -> str | None:
    """When a process was started, in ticks since the machine was; None if it is gone."""
    fields = stat_of(pid)
    return fields[19] if fields and fields[0] != "Z" else None
