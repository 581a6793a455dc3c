"""Works on batches, first in, first out: a process for each, several beside each other.

One thread looks at what is on disk and at its processes, and makes the one fit the other: so it
goes on after a crash of the server as after a crash of a process. Batches that are to be cancelled,
or have expired, have their process end in order; another then gives every line that has no answer
its error, and publishes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from openai.types import FileObject

from batchgen.core.errors import ExitCode
from batchgen.core.processes import child_environment
from batchgen.core.runtime import say
from batchgen.endpoints.warm import read_state
from batchgen.job.load import parse_job
from batchgen.job.recipe import engine_digest
from batchgen.pipeline.prepare import check
from batchgen.serve.config import task_of
from batchgen.serve.store import Record, write_whole
from batchgen.serve.work import CHECKED, JOB, RESULT, RUN
from batchgen.storage import LocalStorage
from batchgen.views.status import live_view

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from openai.types import Batch

    from batchgen.serve.config import ServeConfig
    from batchgen.serve.store import Store

_LOOK_S, _TELL_S, _SWEEP_S, _AGAIN_S = 0.5, 2.0, 60.0, 5.0
_ATTEMPTS = 3
"""Of a batch whose process ends by a fault."""
_DAY_S, _HOUR_S = 86_400, 3_600
_ENDS = {RUN: "completed", "batch_cancelled": "cancelled", "batch_expired": "expired"}


@dataclass
class _Worker:
    """A process that works on a batch."""

    process: subprocess.Popen[bytes]
    how: str
    is_asked: bool = False
    """To end."""
    told_s: float = 0.0


class Runner(threading.Thread):
    """See the module."""

    def __init__(self, store: Store, config: ServeConfig) -> None:
        """Check what holds for every batch.

        Raises:
            ConfigError: There can be no such job, or no such model.
        """
        super().__init__(name="batches")
        self._store = store
        self._config = config
        self._workers: dict[str, _Worker] = {}
        self._not_before: dict[str, float] = {}
        self._num_faults: dict[str, int] = {}
        self._is_ending = threading.Event()
        self._swept_s = 0.0
        tables = {
            **config.tables,
            "input": {"path": str(store.root / "none.jsonl"), "format": "openai"},
            "output": {"path": str(store.root / "none")},
        }
        checked = check(parse_job(tables, base=store.root, where="serve"))
        own = config.is_vllm
        self.engine = Engine(store.root, tables, engine_digest(checked.recipe)) if own else None

    @property
    def num_at_work(self) -> int:
        """Batches that have a process now."""
        return len(self._workers)

    def end(self) -> None:
        """Have all processes end in order, then this thread; batches go on at the next start."""
        self._is_ending.set()
        self._store.changed.set()

    def run(self) -> None:
        """Look and act until it is ended."""
        while not self._is_ending.is_set():
            try:
                self.look()
            except OSError as error:  # The disk is full, say; what is written down goes on then.
                say(f"batches wait: {error}")
            self._store.changed.wait(_LOOK_S)
            self._store.changed.clear()
        for worker in self._workers.values():
            worker.process.terminate()
        for worker in self._workers.values():
            worker.process.wait()
        if self.engine is not None:
            self.engine.end()

    def look(self) -> None:
        """Take notice of what has ended, and begin what can be begun."""
        now_s = time.monotonic()
        if now_s - self._swept_s > _SWEEP_S:
            self._swept_s = now_s
            self._store.sweep()
        for name, worker in list(self._workers.items()):
            code = worker.process.poll()
            if code is not None:
                del self._workers[name]
                self._ended(name, worker, code)
            elif now_s - worker.told_s > _TELL_S:
                worker.told_s = now_s
                self._tell(name)
        is_up = self.engine is None or self.engine.is_up()
        for record in list(self._store.live()):
            batch, how = record.thing, _how(record.thing)
            at_work = self._workers.get(batch.id)
            if at_work is not None:
                if at_work.how != how and not at_work.is_asked:
                    at_work.is_asked = True
                    at_work.process.terminate()
                continue
            has_room = len(self._workers) < self._config.limits.at_once
            can_begin = has_room and (is_up or how != RUN)
            if can_begin and now_s >= self._not_before.get(batch.id, 0):
                self._workers[batch.id] = _Worker(self._start(record, how), how)

    def _start(self, record: Record[Batch], how: str) -> subprocess.Popen[bytes]:
        batch, store = record.thing, self._store
        folder = store.batches.folder(batch.id)
        files = [store.content(file_id(batch.id, kind)) for kind in ("answers", "errors")]
        job = {
            "input": str(store.content(batch.input_file_id)),
            "answers": str(files[0]),
            "errors": str(files[1]),
            "rules": {
                "endpoint": batch.endpoint,
                "models": names_of(self._config),
                "max_requests": self._config.limits.max_requests,
            },
            "tables": self._tables(batch, folder),
        }
        write_whole(folder / JOB, json.dumps(job, indent=1).encode())
        command = [sys.executable, "-P", "-m", "batchgen.serve.work", "batch", str(folder), how]
        with (folder / "log").open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own module
                command,
                stdin=subprocess.PIPE,  # Its end is this process's.
                stdout=log,
                stderr=log,
                env=child_environment("batchgen"),
                start_new_session=True,
            )

    def _tables(self, batch: Batch, folder: Path) -> dict[str, Any]:
        tables = {
            name: dict(table) for name, table in self._config.tables.items() if name != "task"
        }
        if self.engine is not None:
            tables["model"] |= {"backend": "openai", "base_url": "auto"}
        content = self._store.content(batch.input_file_id)
        return {
            **tables,
            "task": task_of(batch.endpoint),
            "input": {"path": str(content), "format": "openai"},
            "output": {"path": str(folder / "out")},
        }

    def _tell(self, name: str) -> None:
        """Bring a batch's state and counts up to what its process has written."""
        folder = self._store.batches.folder(name)
        if (checked := _read(folder / CHECKED)) is None or checked["errors"]:
            return
        counts = {"total": checked["total"], "completed": 0, "failed": 0}
        live = live_view(LocalStorage(folder / "out"), None)
        if live.get("num_rows"):
            counts["failed"] = int(live.get("num_errors") or 0)
            done = live["num_rows"] - live["num_left"] - counts["failed"]
            counts["completed"] = max(0, done)
        with self._store.lock:  # Meanwhile it may have been cancelled.
            found = self._store.batches.get(name)
            if found is None:
                return
            changes: dict[str, Any] = {}
            if found.thing.status == "validating":
                changes = {"status": "in_progress", "in_progress_at": int(time.time())}
                changes["model"] = checked["model"]
            told = found.thing.request_counts
            if changes or told is None or told.to_dict() != counts:
                self._store.update(name, request_counts=counts, **changes)

    def _ended(self, name: str, worker: _Worker, code: int) -> None:
        folder = self._store.batches.folder(name)
        result = _read(folder / RESULT) or {}
        if code == ExitCode.COMPLETE and "num_ok" in result:
            self._tell(name)
            self._finalize(name, worker.how, result)
            return
        if code == ExitCode.REFUSED:
            errors = (_read(folder / CHECKED) or {}).get("errors") or [_fault(result)]
            self._fail(name, errors)
            return
        if code != ExitCode.STOPPED and not worker.is_asked and not self._is_ending.is_set():
            self._num_faults[name] = self._num_faults.get(name, 0) + 1
            say(f"{name}: ended with {code}: {result.get('error', '')} (see {folder / 'log'})")
            if self._num_faults[name] >= _ATTEMPTS:
                self._fail(name, [_fault(result)])
                return
        self._not_before[name] = time.monotonic() + (0 if worker.is_asked else _AGAIN_S)

    def _fail(self, name: str, errors: list[dict[str, Any]]) -> None:
        now = int(time.time())
        with self._store.lock:
            found = self._store.batches.get(name)
            if found is not None and found.thing.status == "cancelling":
                self._store.update(name, status="cancelled", cancelled_at=now)
                return
            told = {"object": "list", "data": errors}
            self._store.update(name, status="failed", failed_at=now, errors=told)

    def _finalize(self, name: str, how: str, result: dict[str, Any]) -> None:
        """Make files of the answers; may be done again after a crash."""
        store, now = self._store, int(time.time())
        with store.lock:
            found = store.batches.get(name)
            if found is None:
                return
            is_cancelled = found.thing.status == "cancelling"
            # One that expires does not complete, should this process die here.
            if how == RUN and not is_cancelled:
                store.update(name, status="finalizing", finalizing_at=now)
        ids = {}
        for kind, num in (("answers", result["num_ok"]), ("errors", result["num_errors"])):
            own_id = file_id(name, kind)
            if num:
                self._register(found, own_id, kind)
            else:
                store.files.remove(own_id)
            ids[kind] = own_id if num else None
        state = "cancelled" if is_cancelled else _ENDS[how]
        total = result["num_ok"] + result["num_errors"]
        counts = {"completed": result["num_ok"], "failed": result["num_errors"], "total": total}
        store.update(
            name,
            status=state,
            output_file_id=ids["answers"],
            error_file_id=ids["errors"],
            request_counts=counts,
            usage=result["usage"],
            **{f"{state}_at": int(time.time())},
        )
        for known in (self._not_before, self._num_faults):
            known.pop(name, None)

    def _register(self, found: Record[Batch], own_id: str, kind: str) -> None:
        store, created = self._store, int(time.time())
        keep_s = found.more.get("output_expires_s") or int(self._config.limits.keep_days * _DAY_S)
        label = "output" if kind == "answers" else "error"
        file = FileObject(
            id=own_id,
            object="file",
            bytes=store.content(own_id).stat().st_size,
            created_at=created,
            expires_at=created + keep_s,
            filename=f"{found.thing.id}_{label}.jsonl",
            purpose="batch_output",
            status="processed",
        )
        store.files.put(Record(file, found.owner, time.time_ns()))


def _how(batch: Batch) -> str:
    if batch.status == "cancelling":
        return "batch_cancelled"
    is_over = batch.expires_at is not None and batch.expires_at <= time.time()
    return "batch_expired" if is_over and batch.status != "finalizing" else RUN


def file_id(batch: str, kind: str) -> str:
    """Name the file of a batch's answers or errors: the same however often it is made."""
    return f"file-{sha256(f'{batch} {kind}'.encode()).hexdigest()[:24]}"


def names_of(config: ServeConfig) -> list[str]:
    """Names that a line may call the model by."""
    model = config.tables["model"]
    served = model.get("engine", {}).get("served_model_name", ())
    served = [served] if isinstance(served, str) else served
    own = [config.model, config.model.rstrip("/").rpartition("/")[2], *served]
    return list(dict.fromkeys([*own, *model.get("lora", {})]))


def _fault(result: dict[str, Any]) -> dict[str, Any]:
    message = result.get("error") or "the batch's process ended by a fault"
    return {"code": "server_error", "message": message, "param": None, "line": None}


def _read(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads(path.read_bytes())
        return found
    return None


class Engine:
    """The warm engine of a model that this machine loads; it outlives batches, and the server."""

    def __init__(self, root: Path, tables: Mapping[str, Any], digest: str) -> None:
        self._file = root / "engine.json"
        self._log = root / "engine.log"
        self._tables = tables
        self._digest = digest
        self._process: subprocess.Popen[bytes] | None = None
        self._not_before_s = 0.0
        self._is_up = False
        self._asked_s = 0.0

    def is_up(self) -> bool:
        """Tell whether it can be asked; starts it if it does not run."""
        now_s = time.monotonic()
        if now_s - self._asked_s < _LOOK_S and self._is_up:
            return True
        self._asked_s = now_s
        state = read_state(self._digest)
        self._is_up = state is not None and _is_healthy(state["url"])
        has_none = state is None and (self._process is None or self._process.poll() is not None)
        if has_none and now_s >= self._not_before_s:
            self._not_before_s = now_s + _AGAIN_S
            self._start()
        return self._is_up

    def _start(self) -> None:
        write_whole(self._file, json.dumps(self._tables, indent=1).encode())
        command = [sys.executable, "-P", "-m", "batchgen.serve.work", "engine", str(self._file)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=child_environment("batchgen"),
                start_new_session=True,
            )

    def end(self) -> None:
        """End it, if this server has started it."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(30)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/health", timeout=2):  # noqa: S310
            return True
    except (urllib.error.URLError, OSError):
        return False
