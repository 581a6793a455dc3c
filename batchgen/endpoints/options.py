"""How servers may be used, as the job says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchgen.core.errors import ConfigError
from batchgen.core.processes import stat_of
from batchgen.engine.base import HostedRequest


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

    def request(self) -> HostedRequest:
        """What a server is tried with."""
        say = [{"role": "user", "content": "Say yes."}]
        return HostedRequest(0, "Say yes." if self.trial is None else list(self.trial) or say, 1)


def started_at(pid: int) -> str | None:
    """When a process was started, in ticks since the machine was; None if it is gone."""
    fields = stat_of(pid)
    return fields[19] if fields and fields[0] != "Z" else None
