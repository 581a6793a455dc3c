"""What a run leaves in `_batchgen/runs/<run_id>/`: figures for people, never commit records.

live.json      where the run is, rewritten every few seconds; `batchgen status` reads it
stats.parquet  one row every `run.stats_s` seconds
summary.json   how it ended
vllm.log       the engine's own lines
engine-death-NN.json  what is known of an engine's death, if one died
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.storage import LocalStorage

# vLLM's lines: `WARNING 11-22 18:06:31 [cpu_worker.py:140] text` (vllm/logger.py, 0.26 to 0.33).
_LEVEL = re.compile(r"\b(?:WARNING|ERROR) [\d-]+ [\d:]+ (.*)")
_STATS_SCHEMA = pa.schema(
    [
        ("elapsed_s", pa.float64()),
        ("num_ok", pa.int64()),
        ("num_errors", pa.int64()),
        ("num_skipped", pa.int64()),
        ("num_committed", pa.int64()),
        ("prompt_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("requests_per_s", pa.float64()),
        ("prompt_tokens_per_s", pa.float64()),
        ("output_tokens_per_s", pa.float64()),
        ("num_in_flight", pa.int64()),
        ("num_running", pa.int64()),
        ("num_waiting", pa.int64()),
        ("kv_cache_usage", pa.float64()),
        ("num_preemptions", pa.int64()),
        ("memory_mib", pa.float64()),
    ]
)


class RunLog:
    """One run's folder. Losing it loses no result."""

    def __init__(self, storage: LocalStorage, folder: str, run_id: str) -> None:
        """Bind; the folder is made with the first write."""
        self._storage = storage
        self._folder = f"{folder}/{run_id}"
        self.run_id = run_id
        self._samples: list[dict[str, Any]] = []

    @property
    def engine_log(self) -> str:
        """Where the engine's own lines go; the folder is made."""
        path = self._storage.path(f"{self._folder}/vllm.log")
        self._storage.make_folder(path.parent)
        return str(path)

    @property
    def summary_path(self) -> str:
        """Where `finish` writes."""
        return str(self._storage.path(f"{self._folder}/summary.json"))

    @property
    def samples(self) -> Sequence[Mapping[str, Any]]:
        """The rows of stats.parquet so far."""
        return self._samples

    def live(self, facts: Mapping[str, Any]) -> None:
        """Rewrite the live view."""
        data = {"run_id": self.run_id, "pid": os.getpid(), "host": socket.gethostname(), **facts}
        self._replace("live.json", json.dumps(data).encode())

    def sample(self, row: Mapping[str, Any]) -> None:
        """Keep a row of stats.parquet, and rewrite the file now and then."""
        self._samples.append({**row, "memory_mib": memory_mib()})
        if len(self._samples) % 12 == 0:
            self._write_stats()

    def finish(self, summary: Mapping[str, Any]) -> str:
        """Write the stats and the summary; return the summary's path."""
        self._write_stats()
        self._replace("summary.json", json.dumps(summary, indent=1).encode() + b"\n")
        return self.summary_path

    def engine_death(self, number: int, facts: Mapping[str, Any]) -> str:
        """Write down what is known of an engine's death; return the record's path."""
        name = f"engine-death-{number:02}.json"
        self._replace(name, json.dumps(facts, indent=1).encode() + b"\n")
        return str(self._storage.path(f"{self._folder}/{name}"))

    def num_engine_warnings(self) -> int:
        """How many different warnings and errors the engine's log holds."""
        path = self._storage.path(f"{self._folder}/vllm.log")
        if not path.exists():
            return 0
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found = (_LEVEL.search(line) for line in lines)
        return len({match.group(1) for match in found if match})

    def _write_stats(self) -> None:
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self._samples, _STATS_SCHEMA), out)
        self._replace("stats.parquet", out.getvalue())

    def _replace(self, name: str, data: bytes) -> None:
        """Write a file that may be lost: a full disk must not stop a run for its figures."""
        with suppress(OutputError):
            self._storage.replace(f"{self._folder}/{name}", data)


def new_run_id(now: datetime) -> str:
    """Sorts by time; unique without asking anybody."""
    return f"{now:%Y%m%dT%H%M%S}-{os.urandom(3).hex()}"


def utc_now() -> datetime:
    """For records only; no decision is ever made from wall time."""
    return datetime.now(tz=UTC)


def memory_mib() -> float | None:
    """Resident memory of this process in MiB; None where /proc is missing."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
