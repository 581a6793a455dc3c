"""A run's own traces: the lock that it holds, and its folder `_batchgen/runs/<run_id>/`.

Neither holds a result. The lock saves GPU time only: correctness rests on epochs. The folder has
figures for people, never commit records:

live.json      where the run is, rewritten every few seconds; `batchgen status` reads it
stats.parquet  one row every `run.stats_s` seconds; with replicas, rows of each of them too
summary.json   how it ended
vllm.log       the engine's own lines; vllm-NN.log those of worker NN
engine-death-NN.json  what is known of an engine's death, if one died
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.core.data import parse_json, parse_state
from batchgen.core.errors import BusyError, OutputError, StorageError
from batchgen.core.runtime import option
from batchgen.store.books import STATE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from batchgen.storage import LocalStorage

_LOCK = f"{STATE}/lock"
_WAIT_S = 0.5


def _advice() -> str:
    return f"wait for it, or take the job from a frozen one with {option('--steal')}"


class RunLock:
    """The job's lock, which its storage lets go of however the process ends."""

    def __init__(self, storage: LocalStorage, run_id: str = "") -> None:
        """Bind; nothing is locked until `acquire`."""
        self._storage = storage
        self._run_id = run_id
        self._let_go: Callable[[], None] | None = None

    def acquire(self, *, steal: bool = False, advice: str | None = None) -> None:
        """Take the lock.

        Args:
            advice: What to do where another run holds it, for the error's text; None: as for a run.
            steal: Go on without it if another run holds it. Safe, since the claim fences that
                run; it only wastes what both compute.

        Raises:
            BusyError: Another run holds it; the text says who, where and since when.
            OutputError: The folder cannot be written to.
        """
        if self._let_go is not None:
            return
        who = {
            "run_id": self._run_id,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": utc_now().isoformat(timespec="seconds"),
        }
        self._let_go = self._storage.lock(_LOCK, json.dumps(who).encode(), steal=steal)
        if self._let_go is None and not steal:
            holder = self.holder() or {}
            msg = (
                f"{self._storage.where}: run {holder.get('run_id')} (process "
                f"{holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}) is at "
                f"work on this job; {advice or _advice()}"
            )
            raise BusyError(msg)

    def wait(self, is_stopped: Callable[[], bool]) -> None:
        """Take the lock as soon as it is free.

        Raises:
            BusyError: Another run still held it when this one was asked to stop.
            OutputError: The folder cannot be written to.
        """
        while True:
            try:
                self.acquire()
            except BusyError:
                if is_stopped():
                    raise
                time.sleep(_WAIT_S)
            else:
                return

    def release(self) -> None:
        """Let go."""
        if self._let_go is not None:
            self._let_go()
            self._let_go = None

    def holder(self) -> dict[str, Any] | None:
        """Who took the lock last, as far as the file tells."""
        with suppress(StorageError, ValueError, TypeError):
            return dict(parse_json(self._storage.read(_LOCK) or b""))
        return None

    def is_held(self) -> bool:
        """Whether some process holds it right now."""
        return self._storage.is_locked(_LOCK)


def figures_in(storage: LocalStorage, name: str) -> dict[str, Any]:
    """Read a claim, or figures of a run's folder; empty if they are gone, torn or closed to us."""
    with suppress(StorageError, ValueError, TypeError):
        return dict(parse_state(storage.read(name) or b"{}"))
    return {}


# vLLM's lines: `WARNING 11-22 18:06:31 [cpu_worker.py:140] text` (vllm/logger.py, 0.26 to 0.33).
_LEVEL = re.compile(r"\b(?:WARNING|ERROR) [\d-]+ [\d:]+ (.*)")
_LOG = re.compile(r"/vllm(-\d+)?\.log$")
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
        ("gpu_busy", pa.float64()),
        ("num_preemptions", pa.int64()),
        ("memory_mib", pa.float64()),
        ("replica", pa.int64()),  # Null: the whole run.
        ("restarts", pa.int64()),  # Null where there are no replicas.
    ]
)
_MOST_ROWS = 50_000
_WRITE_SAMPLES = 12
_REPLICA_ROWS_PER_S = 8.0


class RunLog:
    """One run's folder. Losing it loses no result."""

    def __init__(self, storage: LocalStorage, run_id: str) -> None:
        """Bind; the folder is made with the first write."""
        self._storage = storage
        self._folder = f"{STATE}/runs/{run_id}"
        self.run_id = run_id
        self._whole: list[Mapping[str, Any]] = []
        self._replicas: list[Mapping[str, Any]] = []
        self._logs: set[str] = set()
        self._num_unwritten = 0
        self._next_replicas_s = 0.0

    @property
    def engine_log(self) -> str:
        """Path for the lines of a run's only engine, or the first; the folder is made."""
        return self._log_path("vllm.log")

    def engine_log_of(self, number: int) -> str:
        """Path for the lines of a worker's, or of a further engine here; the folder is made."""
        return self._log_path(f"vllm-{number:02}.log")

    @property
    def summary_path(self) -> str:
        """Path of the file that `finish` writes."""
        return f"{self._storage.where}/{self._folder}/summary.json"

    @property
    def samples(self) -> Sequence[Mapping[str, Any]]:
        """The rows of stats.parquet so far, those of the whole run."""
        return self._whole

    def live(
        self, facts: Mapping[str, Any], replicas: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """Rewrite the live view; `replicas` are those of a fleet, a mapping each."""
        data = {"run_id": self.run_id, "pid": os.getpid(), "host": socket.gethostname(), **facts}
        if replicas is not None:
            data["replicas"] = replicas
        self._replace("live.json", json.dumps(data).encode())

    def sample(self, row: Mapping[str, Any]) -> None:
        """Keep a row of stats.parquet for the whole run, and rewrite the file now and then.

        Every 12 samples at first, then whenever a fiftieth more has come: all that a run writes
        is at most some 50 times its last file, however long it takes.

        Args:
            row: As `RunStats.sample`; `memory_mib` is this process's.
        """
        self._whole.append({**row, "memory_mib": memory_mib()})
        self._whole = _thinned(self._whole)
        self._num_unwritten += 1
        if self._num_unwritten >= max(_WRITE_SAMPLES, len(self._whole) // 50):
            self._write_stats()

    def sample_replicas(self, rows: Sequence[Mapping[str, Any]], *, is_last: bool = False) -> None:
        """Keep a row of stats.parquet for each replica, unless the last ones are too fresh.

        All replicas together get some 8 rows a second at most: 256 of them one each 32 s. To be
        called as often as `sample`, which writes the file; the last look is always kept.

        Args:
            rows: Of one moment, with the columns of stats.parquet; others are left out.
            is_last: There will be none after these.
        """
        if not rows or (rows[0]["elapsed_s"] < self._next_replicas_s and not is_last):
            return
        self._next_replicas_s = rows[0]["elapsed_s"] + len(rows) / _REPLICA_ROWS_PER_S
        self._replicas.extend(rows)
        self._replicas = _thinned(self._replicas)

    def finish(self, summary: Mapping[str, Any]) -> str:
        """Write the stats and the summary; return the summary's path."""
        self._write_stats()
        self._replace("summary.json", json.dumps(summary, indent=1).encode() + b"\n")
        return self.summary_path

    def engine_death(self, number: int, facts: Mapping[str, Any]) -> str:
        """Write down what is known of an engine's death; return the record's path."""
        name = f"engine-death-{number:02}.json"
        self._replace(name, json.dumps(facts, indent=1).encode() + b"\n")
        return f"{self._storage.where}/{self._folder}/{name}"

    def num_engine_warnings(self) -> int:
        """How many different warnings and errors the engines' logs hold, all of them together."""
        texts: set[str] = set()
        with suppress(StorageError, OSError):  # Figures: not worth a run's own error.
            for name in filter(_LOG.search, self._storage.list(self._folder)):
                path = self._storage.path(name)
                with path.open(encoding="utf-8", errors="replace") as lines:
                    texts.update(match.group(1) for match in map(_LEVEL.search, lines) if match)
        return len(texts)

    def _log_path(self, name: str) -> str:
        self._logs.add(f"{self._folder}/{name}")
        path = self._storage.path(f"{self._folder}/{name}")
        self._storage.make_folder(path.parent)
        return str(path)

    def _write_stats(self) -> None:
        self._num_unwritten = 0
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([*self._whole, *self._replicas], _STATS_SCHEMA), out)
        self._replace("stats.parquet", out.getvalue())
        for name in self._logs:
            with suppress(StorageError):
                self._storage.upload(name)

    def _replace(self, name: str, data: bytes) -> None:
        """Write a file that may be lost: a full disk must not stop a run for its figures."""
        with suppress(OutputError, StorageError):
            self._storage.replace(f"{self._folder}/{name}", data)


def _thinned(rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Leave out every other moment of very many: the longer ago, the fewer are left."""
    if len(rows) <= _MOST_ROWS:
        return rows
    moments = list(dict.fromkeys(row["elapsed_s"] for row in rows))
    kept = set(moments[::-2])  # Counted from the last, which stays.
    return [row for row in rows if row["elapsed_s"] in kept]


def new_run_id(now: datetime) -> str:
    """Sorts by time; unique without asking anybody."""
    return f"{now:%Y%m%dT%H%M%S}-{os.urandom(3).hex()}"


def utc_now() -> datetime:
    """The time, for records only; no decision is ever made from wall time."""
    return datetime.now(tz=UTC)


def memory_mib() -> float | None:
    """Resident memory of this process in MiB; None where /proc is missing."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
