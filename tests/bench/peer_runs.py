"""Start a peer, watch its engine, kill it halfway, start it again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped, unused-ignore]

from tests.bench import peer_marks
from tests.bench.peer_kinds import flags

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.bench.peer_kinds import Order, Peer

POLL_S = 0.01
SERVER_START_S = 600.0
LOG_TAIL = 30
MARKS = "marks"


@dataclass(frozen=True)
class Ran:
    """What one run of a peer took."""

    whole_s: float
    """From the start of its process to its end; of a client without its server's start."""
    ready_s: float
    """From the moment when the engine could take requests to the last write to its files."""
    num_asked: int
    """Requests that the engine finished."""


@dataclass(frozen=True)
class Crash:
    """What a crash cost."""

    num_answered: int
    """Rows that the engine had answered when everything was killed."""
    num_durable: int
    again: Ran
    num_twice: int
    """Rows that are more than once in the output of the second run."""
    num_missing: int
    """Rows that are not in the output of the second run."""


class PeerError(Exception):
    """A peer that is installed and does not run; the end of its log says why."""


@dataclass(frozen=True)
class Stage:
    """Where and with what a peer runs."""

    order: Order
    python: str
    plugin: Path
    limit_s: float

    def environment(self, marks: Path) -> dict[str, str]:
        """The same for all peers, and for their servers."""
        # Packages that lie on this process's own path are there for its own interpreter only.
        inherited = os.environ.get("PYTHONPATH", "") if self.python == sys.executable else ""
        own = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self.plugin), inherited])),
            peer_marks.VARIABLE: str(marks),
            "VLLM_NO_USAGE_STATS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
        if self.order.is_cpu:
            # What batchgen sets for itself there, for all (batchgen/engine/settings.py): with a
            # thread for each core nothing is left for the front end. Async engines keep a process
            # of their own all the same.
            own["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            own["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) - 1))
        return {**os.environ, **own}


def time_once(peer: Peer, stage: Stage) -> tuple[Ran, int]:
    """Run it whole; what it took, and how many rows are answered."""
    with _folder() as folder:
        ran = _run(peer, stage, folder)
        return ran, len(set(peer.answers(folder)))


def crash(peer: Peer, stage: Stage, num_rows: int) -> Crash:
    """Kill it once half of the rows are answered, look, run it again."""
    with _folder() as folder:
        num_answered = _run_and_kill(peer, stage, folder, num_rows // 2)
        num_durable = peer.durable(folder)
        again = _run(peer, stage, folder)
        ids = peer.answers(folder)
        num_twice = len(ids) - len(set(ids))
        return Crash(num_answered, num_durable, again, num_twice, num_rows - len(set(ids)))


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="peers-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _run(peer: Peer, stage: Stage, folder: Path) -> Ran:
    marks = _marks(folder)
    with _endpoint(peer, stage, marks) as endpoint:
        started_at = time.time()
        with _process(peer, stage, folder, marks, endpoint) as process:
            try:
                code = process.wait(stage.limit_s)
            except subprocess.TimeoutExpired as error:
                msg = f"{peer.name}: not done after {stage.limit_s:.0f} s\n{_tail(marks)}"
                raise PeerError(msg) from error
        ended_at = time.time()
    seen = peer_marks.read(marks)
    if code or seen.ready_at is None:
        msg = f"{peer.name}: exit code {code}\n{_tail(marks)}"
        raise PeerError(msg)
    ready_at = max(seen.ready_at, started_at)
    # A process may take seconds to end after its answers can be read: vLLM's workers do.
    written_at = max(path.stat().st_mtime for path in _files(folder))
    return Ran(ended_at - started_at, written_at - ready_at, seen.num_done)


def _run_and_kill(peer: Peer, stage: Stage, folder: Path, num_rows: int) -> int:
    """Kill it, and its server with it, as when the machine goes; answered rows at that moment."""
    marks = _marks(folder)
    with (
        _endpoint(peer, stage, marks) as endpoint,
        _process(peer, stage, folder, marks, endpoint) as process,
    ):
        deadline = time.monotonic() + stage.limit_s
        while peer_marks.read(marks).num_done < num_rows:
            if process.poll() is not None or time.monotonic() > deadline:
                msg = f"{peer.name}: no half of the rows to kill it at\n{_tail(marks)}"
                raise PeerError(msg)
            time.sleep(POLL_S)
        # Client first: else it would see its server die, and could still write that down.
        _kill(process)
    return peer_marks.read(marks).num_done


@contextlib.contextmanager
def _process(
    peer: Peer, stage: Stage, folder: Path, marks: Path, endpoint: str
) -> Iterator[subprocess.Popen[bytes]]:
    """It, in a process group of its own; nothing of it is left afterwards."""
    command = [stage.python, *peer.command(stage.order, folder, endpoint)]
    with _started(command, stage, folder, marks, marks.with_suffix(".log")) as process:
        yield process


@contextlib.contextmanager
def _endpoint(peer: Peer, stage: Stage, marks: Path) -> Iterator[str]:
    """A server for those that need one, fresh, so that its prefix cache is as cold as theirs."""
    if not peer.needs_server:
        yield ""
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(stage.order.model)]
    options = {"host": "127.0.0.1", "port": port, **stage.order.options}
    command = [stage.python, *start, *flags(options)]
    log = marks.with_suffix(".server.log")
    with _started(command, stage, marks.parent, marks, log) as process:
        _await_health(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"


@contextlib.contextmanager
def _started(
    command: list[str], stage: Stage, folder: Path, marks: Path, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=stage.environment(marks),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The whole group, and whatever left the group (Ray's daemons do)."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        # Not SIGTERM: no one gets to save anything.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _await_health(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SERVER_START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.2)
    msg = f"the server did not come up\n{_end_of(log)}"
    raise PeerError(msg)


def _files(folder: Path) -> Iterator[Path]:
    """What the peer has written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return (path for path in files if folder / MARKS not in path.parents)


def _marks(folder: Path) -> Path:
    """A new file for each run; its logs lie beside it, apart from the peer's own files."""
    marks = folder / MARKS / f"{time.time_ns()}.txt"
    marks.parent.mkdir(exist_ok=True)
    return marks


def _tail(marks: Path) -> str:
    return _end_of(marks.with_suffix(".log"))


def _end_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-LOG_TAIL:])
