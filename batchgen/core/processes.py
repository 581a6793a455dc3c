"""Work in several processes at once, for what Python's one lock would do one after the other.

Each process is a fresh interpreter, so that neither CUDA nor another thread's lock is ever copied
into it, and a program that calls batchgen needs no `if __name__ == "__main__"`. It is given pieces
of work one at a time, a function of a module and its arguments, and sends back what comes of it.
It ends when its parent does: then there is nothing more to read.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from batchgen.core.errors import ProcessDiedError

_WAIT_S = 0.2
_MOST = 32
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
"""There are as many processes as cores. Arrow goes by the first."""
_AHEAD = 4
"""Pieces that may be done, a process, while an earlier one is not."""


def num_processes(num_pieces: int) -> int:
    """How many processes are worth it for so many pieces: a core each."""
    return min(num_pieces, len(os.sched_getaffinity(0)), _MOST)


def child_environment(*modules: str) -> dict[str, str]:
    """Environment of a child that must find the same modules, also of a checkout."""
    roots = dict.fromkeys(map(_folder_of, modules))
    paths = [root for root in roots if not root.endswith(("site-packages", "dist-packages"))]
    python_path = os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": python_path}


def _folder_of(module: str) -> str:
    """Where a module's outermost package was found."""
    outermost = import_module(module.partition(".")[0])
    (place, *_) = getattr(outermost, "__path__", None) or [outermost.__file__]
    return str(Path(place).parent)


def start_guard(script: str, name: str, argument: str) -> subprocess.Popen[bytes] | None:
    """Start a shell that acts once this process is gone: its stdin ends then.

    Told `orderly` it ends and does nothing. None without a shell, as in a bare container.
    """
    with suppress(FileNotFoundError):
        return subprocess.Popen(  # noqa: S603 - fixed text, one number
            ["/bin/sh", "-c", script, name, argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return None


def stat_of(pid: int | str) -> list[str]:
    """Fields of a process from its state on; empty if it is gone (Linux; elsewhere always).

    Source:
        proc_pid_stat(5): the state is field 3, the parent 4, the group 5, the start 22.
    """
    with suppress(OSError):
        # The name, field 2, may hold spaces and parentheses; what follows the last is plain.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


class Crew:
    """Processes that work for this one; a context manager."""

    def __init__(self, num: int) -> None:
        """Start them."""
        self._members: dict[Connection, subprocess.Popen[bytes]] = {}
        self._busy: dict[Connection, int] = {}
        """Who works on which piece."""
        try:
            for _ in range(num):
                connection, process = _start()
                self._members[connection] = process
        except BaseException:
            self._end(is_orderly=False)
            raise

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end(is_orderly=kind is None and not self._busy)

    def _end(self, *, is_orderly: bool) -> None:
        for connection, process in self._members.items():
            connection.close()  # Who waits for work ends by that.
            if not is_orderly:
                process.kill()
        for process in self._members.values():
            process.wait()

    def map(
        self,
        function: Callable[..., Any],
        pieces: Iterable[Sequence[Any]],
        on_wait: Callable[[], object] = int,
    ) -> Iterator[Any]:
        """Yield what a function makes of each piece of work, in their order.

        Args:
            function: Of a module; any process may call it.
            pieces: Its arguments, each time; taken one by one, as processes come free.
            on_wait: Called now and then; what it raises ends the work.

        Raises:
            ProcessDiedError: One was killed.
            Exception: Whatever the function raises, of the piece that raised it first.
        """
        waiting = iter(enumerate(pieces))
        idle, busy, found = list(self._members), self._busy, dict[int, Any]()
        upcoming = 0
        while True:
            has_room = len(found) < _AHEAD * len(self._members)
            while idle and has_room and (piece := next(waiting, None)) is not None:
                at, arguments = piece
                with suppress(OSError):  # It died: told where its answer is read.
                    idle[-1].send((function, tuple(arguments)))
                busy[idle.pop()] = at
            if not busy:
                return
            for connection in wait(list(busy), _WAIT_S):
                assert isinstance(connection, Connection)  # noqa: S101 - we gave no others
                found[busy.pop(connection)] = self._answer(connection)
                idle.append(connection)
            on_wait()
            while upcoming in found:
                yield found.pop(upcoming)
                upcoming += 1

    def _answer(self, connection: Connection) -> Any:  # noqa: ANN401 - the function's
        try:
            is_good, answer = connection.recv()
        except (EOFError, OSError) as error:
            raise ProcessDiedError(self._members[connection].wait()) from error
        if not is_good:
            raise answer
        return answer


def _start() -> tuple[Connection, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # -P: a file of the folder that the job is run from must not replace a module.
        process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-P", "-m", "batchgen.core.processes", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            env={**child_environment("batchgen"), **_ONE_THREAD},
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # Ctrl-C is its parent's to hear.
        )
        return Connection(ours.detach()), process


def main() -> None:
    """Do what the parent asks for, until it asks no more."""
    from batchgen.core.data import spare_pandas

    spare_pandas()
    connection = Connection(int(sys.argv[1]))
    with suppress(EOFError, OSError):
        while True:
            function, arguments = connection.recv()
            try:
                answer = True, function(*arguments)
            except Exception as error:  # noqa: BLE001 - a process's border: it is raised there
                answer = False, error
            connection.send(answer)


if __name__ == "__main__":
    main()
