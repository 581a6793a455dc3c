"""When an engine was ready, and when it finished each request: the same clock for every peer.

Each peer tells its progress in its own way, and some not at all. So the count is taken where all
of them meet: a plugin of vLLM (`vllm.general_plugins`), which every process of an engine loads,
adds a line to a file when the scheduler is made (weights are loaded, memory is measured, graphs
are captured: nothing but requests is missing) and when a request ends. One small write a row,
the same for all.

The file is copied out of the repository and imported by whatever interpreter a peer has, so it
imports nothing but vLLM.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "BENCH_MARKS"
PLUGIN = "bench_marks"


@dataclass(frozen=True)
class Marks:
    """What one run's engine told."""

    ready_at: float | None
    """Seconds since the epoch; None if no engine came up."""
    num_done: int
    last_at: float | None
    """When the last request ended."""


def install(folder: Path) -> Path:
    """Make a folder that, on PYTHONPATH, brings the plugin; returns it."""
    told = folder / f"{PLUGIN}-1.0.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 1.0\n")
    entry = f"[vllm.general_plugins]\n{PLUGIN} = {PLUGIN}:register\n"
    (told / "entry_points.txt").write_text(entry)
    (folder / f"{PLUGIN}.py").write_text(Path(__file__).read_text(encoding="utf-8"))
    return folder


def read(path: Path) -> Marks:
    """The marks up to now; a line that is being written does not count yet."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    ready = [float(line.split()[1]) for line in lines if line.startswith("ready")]
    done = [float(line.split()[1]) for line in lines if line.startswith("done")]
    return Marks(ready[0] if ready else None, len(done), done[-1] if done else None)


def register() -> None:
    """Called by vLLM in each of its processes.

    Source:
        vllm/plugins/__init__.py, load_general_plugins, called in EngineCore.__init__ before the
        scheduler is made; vllm/v1/core/sched/scheduler.py, `_free_request`, once for each request
        that ends. 0.26 to 0.33.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return
    from vllm.v1.core.sched.scheduler import Scheduler

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    made, freed = Scheduler.__init__, Scheduler._free_request

    def make(self: Scheduler, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        os.write(file, f"ready {time.time():.3f}\n".encode())

    def free(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        os.write(file, f"done {time.time():.3f}\n".encode())
        return freed(self, *args, **kwargs)

    Scheduler.__init__, Scheduler._free_request = make, free
