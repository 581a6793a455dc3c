"""Telling others how a run ended: the `on_finish` command, and figures for Prometheus.

Nothing here may fail a run: trouble comes back as the text of a warning.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from batchgen.core.words import STDERR

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_STATES = ("complete", "nothing_to_do", "stopped", "over_limit", "refused", "fault")
_TAIL_BYTES = 4096
# A child of the hook may keep its stderr open; so long are its last words waited for.
_LAST_WORDS_S = 1.0
_LAST_SUCCESS = "batchgen_last_success_timestamp_seconds"
_OLD_SUCCESS = re.compile(rf"^{_LAST_SUCCESS}(?:\{{.*\}})? ([0-9.e+]+)\s*$", re.MULTILINE)


def run_hook(
    command: Sequence[str], summary: Mapping[str, Any], timeout_s: float = 60.0
) -> str | None:
    """Run the `on_finish` command; it gets the summary as one line of JSON on stdin.

    Its stdout and stderr go to stderr, so that stdout stays what `--json` promises. It is a
    process group of its own: a Ctrl-C that stopped the run does not stop the hook, and what hangs
    is killed with its children.

    Args:
        command: Program and arguments, see `run.on_finish`.
        summary: See `Summary.as_dict`.
        timeout_s: How long it may take.

    Returns:
        A warning if it failed.
    """
    name = f"run.on_finish: {command[0]!r}"
    try:
        process = subprocess.Popen(  # noqa: S603 - the job's owner says what to run
            command,
            stdin=subprocess.PIPE,
            stdout=_stderr(),
            stderr=subprocess.PIPE,
            env=os.environ | _environment(summary),
            start_new_session=True,
        )
    except FileNotFoundError:
        return f"{name} was not found, expected a program in PATH or a path with a slash"
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        return f"{name} cannot be run ({why}), expected an executable file with a #! line"
    assert process.stdin is not None  # noqa: S101 - PIPE
    assert process.stderr is not None  # noqa: S101 - PIPE
    # In threads, as a hook may neither read nor write, or leave a child that never ends.
    text = json.dumps(dict(summary), default=str).encode() + b"\n"
    threading.Thread(target=_feed, args=(process.stdin, text), daemon=True).start()
    tail = bytearray()
    relay = threading.Thread(target=_relay, args=(process.stderr, tail), daemon=True)
    relay.start()
    status: int | None = None
    try:
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(timeout_s)
    finally:
        if process.returncode is None:  # Also on a second Ctrl-C.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    relay.join(_LAST_WORDS_S)
    if status is None:
        return f"{name} took longer than {timeout_s:g} s and was killed"
    if status == 0:
        return None
    lines = bytes(tail).decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    ended = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
    return f"{name} {ended}" + (f": {last:.300}" if last else "")


def _stderr() -> int:
    """Where the hook's stdout goes; nowhere, if stderr is closed or no file."""
    try:
        return int(STDERR.fileno())
    except (AttributeError, OSError, ValueError):
        return subprocess.DEVNULL


def _environment(summary: Mapping[str, Any]) -> dict[str, str]:
    keys = ("run_id", "state", "exit_code", "output")
    return {f"BATCHGEN_{key.upper()}": str(summary.get(key, "")) for key in keys}


def _feed(stdin: IO[bytes], text: bytes) -> None:
    # OSError: it does not read, which is its right; closing then tries once more.
    with suppress(OSError):
        try:
            stdin.write(text)
        finally:
            stdin.close()


def _relay(stderr: IO[bytes], tail: bytearray) -> None:
    """Pass on what the hook says as it comes, and keep the end of it."""
    with stderr:
        while chunk := os.read(stderr.fileno(), 65536):
            tail += chunk
            del tail[:-_TAIL_BYTES]
            STDERR.write(chunk.decode("utf-8", "replace"))
            STDERR.flush()


def write_metrics(path: str | Path, summary: Mapping[str, Any]) -> str | None:
    """Write the figures of a run as Prometheus text, for node_exporter's textfile collector.

    The file is replaced as a whole. One file is one job's; when the last run succeeded is kept
    from the old file where this one did not.

    Args:
        path: Its folder has to exist; the collector reads names that end in `.prom`.
        summary: See `Summary.as_dict`.

    Returns:
        A warning if it cannot be written.

    Source:
        Text format 0.0.4: https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    path = Path(path)
    # Not *.prom: the collector must not read it half written.
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        text = metrics_text(summary, _last_success(path))
        with half.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # Else a power cut may leave an empty file.
        half.replace(path)
    except OSError as error:
        with suppress(OSError):
            half.unlink(missing_ok=True)
        return f"run.metrics_file: {str(path)!r} cannot be written ({error.strerror})"
    return None


def _last_success(path: Path) -> float | None:
    try:
        found = _OLD_SUCCESS.findall(path.read_text(encoding="utf-8", errors="replace"))
        return max(map(float, found), default=None)
    except (OSError, ValueError):
        return None


def metrics_text(summary: Mapping[str, Any], last_success: float | None = None) -> str:
    """The figures in Prometheus' text format; what the summary does not tell is left out.

    Args:
        summary: See `Summary.as_dict`.
        last_success: Unix time of the last run that succeeded, where this one did not.
    """
    output = {"output": str(summary.get("output", ""))}
    lines: list[str] = []
    for name, meaning, samples in _metrics(summary, last_success):
        told = [(labels, value) for labels, value in samples if value is not None]
        if told:
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} gauge"]
        for labels, value in told:
            pairs = ",".join(f'{key}="{_escaped(v)}"' for key, v in {**output, **labels}.items())
            lines.append(f"{name}{{{pairs}}} {_number(value)}")
    return "\n".join(lines) + "\n"


_Samples = list[tuple[dict[str, str], Any]]


def _metrics(
    summary: Mapping[str, Any], last_success: float | None
) -> Iterator[tuple[str, str, _Samples]]:
    """Name, meaning and samples of each metric. All are gauges: they tell of the last run."""
    get, run = summary.get, summary.get("run") or {}
    state, exit_code = get("state"), get("exit_code")
    started = _unix(get("started_at"))
    ended = None if started is None else started + float(get("elapsed_s") or 0.0)
    success = ended if exit_code == 0 and ended is not None else last_success
    states: _Samples = [
        ({"state": name}, int(name == state)) for name in dict.fromkeys((*_STATES, str(state)))
    ]
    yield "batchgen_last_run_exit_code", "Exit code of the last run.", [({}, exit_code)]
    yield "batchgen_last_run_state", "1 for the state that the last run ended in.", states
    yield "batchgen_last_run_start_timestamp_seconds", "Start of the last run.", [({}, started)]
    yield "batchgen_last_run_end_timestamp_seconds", "End of the last run.", [({}, ended)]
    yield _LAST_SUCCESS, "End of the last run that exited with 0.", [({}, success)]
    rows = ("planned", "ok", "errors", "skipped", "left", "durable")
    yield (
        "batchgen_job_rows",
        "Rows of the job as a whole, by what became of them.",
        [({"status": name}, get(f"num_{name}")) for name in rows],
    )
    for name, key, meaning in _FIGURES:
        yield name, meaning, [({}, run.get(key))]
    yield (
        "batchgen_last_run_rows_computed",
        "Rows that the last run had the engine answer, errors included.",
        [({}, run["num_ok"] + run.get("num_errors", 0) if "num_ok" in run else None)],
    )
    yield (
        "batchgen_last_run_rows_taken_over",
        "Rows that the last run took over from an earlier plan.",
        [({}, get("num_carried"))],
    )
    yield (
        "batchgen_last_run_rows_copied",
        "Rows that the last run gave the answer of an equal row.",
        [({}, get("num_copied"))],
    )
    errors = (run.get("error_types") or {}).items()
    yield (
        "batchgen_last_run_row_errors",
        "Error rows of the last run, by type.",
        [({"error_type": str(kind)}, count) for kind, count in errors],
    )
    yield from _gate(get("gate") or [])


_FIGURES = (
    ("batchgen_last_run_prompt_tokens", "num_prompt_tokens", "Prompt tokens of the last run."),
    (
        "batchgen_last_run_cached_prompt_tokens",
        "num_cached_tokens",
        "Of its prompt tokens, those from the prefix cache.",
    ),
    ("batchgen_last_run_output_tokens", "num_output_tokens", "Output tokens of the last run."),
    ("batchgen_last_run_retries", "num_retries", "Attempts beyond each row's first."),
    ("batchgen_last_run_duration_seconds", "elapsed_s", "How long the last run took."),
    ("batchgen_last_run_working_seconds", "working_s", "Of it, with the engine at work."),
    (
        "batchgen_last_run_requests_per_second",
        "requests_per_s",
        "Rows a second of the engine's working time.",
    ),
    (
        "batchgen_last_run_output_tokens_per_second",
        "output_tokens_per_s",
        "Output tokens a second of the engine's working time.",
    ),
    (
        "batchgen_last_run_total_tokens_per_second",
        "total_tokens_per_s",
        "Prompt and output tokens a second of the engine's working time.",
    ),
)
"""Metric, key of `RunStats.totals`, meaning."""


def _gate(entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, _Samples]]:
    """Figures of the gate beside their limits, so that an alert may come before the limit."""
    for name, key, meaning in (
        ("batchgen_gate_figure", "figure", "Figures of the gate, 0 to 1."),
        ("batchgen_gate_limit", "limit", "Their limits, where one is set."),
    ):
        samples: _Samples = []
        for entry in entries:
            column = {"column": str(entry["column"])} if entry.get("column") else {}
            samples.append(({"name": str(entry.get("name")), **column}, entry.get(key)))
        yield name, meaning, samples


def _unix(text: object) -> float | None:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    """Shortest text that reads back the same."""
    number = float(value)
    return str(int(number)) if number.is_integer() else repr(number)
