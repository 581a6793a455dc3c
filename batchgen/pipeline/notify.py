"""Telling others how a run ended: the `on_finish` command, and figures for Prometheus.

Nothing here may fail a run: trouble comes back as the text of a warning.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from batchgen.core.runtime import STDERR, printable, read_file

_STATES = ("complete", "nothing_to_do", "stopped", "over_limit", "refused", "fault")
_LAST_SUCCESS = "batchgen_last_success_timestamp_seconds"
_OLD_SUCCESS = re.compile(rf"^{_LAST_SUCCESS}(?:\{{.*\}})? ([0-9.e+]+)\s*$", re.MULTILINE)


def run_hook(
    command: Sequence[str], summary: Mapping[str, Any], timeout_s: float = 60.0
) -> str | None:
    """Run the `on_finish` command; it gets the summary as one line of JSON on stdin.

    What it writes goes to stderr once it has ended, so that stdout stays what `--json` promises.
    It is a process group of its own: a Ctrl-C that stopped the run does not stop the hook, and
    what hangs is killed with its children.

    Args:
        command: Program and arguments, see `run.on_finish`.
        summary: See `Summary.as_dict`.
        timeout_s: How long it may take.

    Returns:
        A warning if it failed.
    """
    name = f"run.on_finish: {command[0]!r}"
    # Files and no pipes: it may neither read nor write, or leave a child that never ends.
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as said:
        stdin.write(json.dumps(dict(summary), default=str).encode() + b"\n")
        stdin.seek(0)
        try:
            process = subprocess.Popen(  # noqa: S603 - the job's owner says what to run
                command,
                stdin=stdin,
                stdout=said,
                stderr=said,
                env=os.environ | _environment(summary),
                start_new_session=True,
            )
        except FileNotFoundError:
            return f"{name} was not found, expected a program in PATH or a path with a slash"
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            return f"{name} cannot be run ({why}), expected an executable file with a #! line"
        status = _wait(process, timeout_s)
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    STDERR.write(printable(text))
    if status is None:
        return f"{name} took longer than {timeout_s:g} s and was killed"
    if status == 0:
        return None
    last = next((line.strip() for line in reversed(text.split("\n")) if line.strip()), "")
    ended = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
    return f"{name} {ended}" + (f": {last:.300}" if last else "")


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    """Wait for the exit status; kill what hangs with its children, and return None."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:  # Also on a second Ctrl-C.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _environment(summary: Mapping[str, Any]) -> dict[str, str]:
    keys = ("run_id", "state", "exit_code", "output")
    return {f"BATCHGEN_{key.upper()}": str(summary.get(key, "")) for key in keys}


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
        found = _OLD_SUCCESS.findall(read_file(path).decode(errors="replace"))
        return max(map(float, found), default=None)
    except (OSError, ValueError):
        return None


def metrics_text(summary: Mapping[str, Any], last_success: float | None = None) -> str:
    """Write the figures in Prometheus' text format; what the summary does not tell is left out.

    Args:
        summary: See `Summary.as_dict`.
        last_success: Unix time of the last run that succeeded, where this one did not.
    """
    lines: list[str] = []
    for name, meaning, samples in _metrics(summary, last_success):
        told = [(labels, value) for labels, value in samples if value is not None]
        if told:
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} gauge"]
        for labels, value in told:
            every = {"output": str(summary.get("output", "")), **labels}
            pairs = ",".join(f'{key}="{_escaped(label)}"' for key, label in every.items())
            lines.append(f"{name}{{{pairs}}} {_number(value)}")
    return "\n".join(lines) + "\n"


_Samples = Iterable[tuple[dict[str, str], Any]]


def _metrics(
    summary: Mapping[str, Any], last_success: float | None
) -> Iterator[tuple[str, str, _Samples]]:
    """Yield name, meaning and samples of each metric; all are gauges, of the last run."""
    get, run, gate = summary.get, summary.get("run") or {}, summary.get("gate") or []
    state, exit_code = str(get("state")), get("exit_code")
    started = _unix(get("started_at"))
    ended = None if started is None else started + float(get("elapsed_s") or 0.0)
    num_computed = run["num_ok"] + run.get("num_errors", 0) if "num_ok" in run else None
    single = {
        "exit_code": ("exit code", exit_code),
        "start_timestamp_seconds": ("start", started),
        "end_timestamp_seconds": ("end", ended),
        "rows_computed": ("rows that the engine answered, errors included", num_computed),
        "rows_taken_over": ("rows taken over from an earlier plan", get("num_carried")),
        "rows_copied": ("rows given the answer of an equal row", get("num_copied")),
        "prompt_tokens": ("prompt tokens", run.get("num_prompt_tokens")),
        "cached_prompt_tokens": ("of these, from the prefix cache", run.get("num_cached_tokens")),
        "output_tokens": ("output tokens", run.get("num_output_tokens")),
        "retries": ("attempts beyond each row's first", run.get("num_retries")),
        "duration_seconds": ("how long it took", run.get("elapsed_s")),
        "working_seconds": ("of it, with the engine at work", run.get("working_s")),
        "requests_per_second": ("rows, a second of working time", run.get("requests_per_s")),
        "output_tokens_per_second": ("output tokens, likewise", run.get("output_tokens_per_s")),
        "total_tokens_per_second": ("all tokens, likewise", run.get("total_tokens_per_s")),
    }
    for name, (meaning, value) in single.items():
        yield f"batchgen_last_run_{name}", f"Of the last run: {meaning}.", [({}, value)]
    success = ended if exit_code == 0 and ended is not None else last_success
    yield _LAST_SUCCESS, "End of the last run that exited with 0.", [({}, success)]
    yield (
        "batchgen_last_run_state",
        "1 for the state that the last run ended in.",
        (({"state": one}, int(one == state)) for one in dict.fromkeys((*_STATES, state))),
    )
    yield (
        "batchgen_job_rows",
        "Rows of the job as a whole, by what became of them.",
        (({"status": one}, get(f"num_{one}")) for one in _ROWS),
    )
    yield (
        "batchgen_last_run_row_errors",
        "Error rows of the last run, by type.",
        (({"error_type": str(one)}, num) for one, num in (run.get("error_types") or {}).items()),
    )
    # Figures beside their limits, so that an alert may come before the limit.
    labels = [{"name": str(entry.get("name")), **_column(entry)} for entry in gate]
    for key, meaning in (
        ("figure", "Figures of the gate, 0 to 1."),
        ("limit", "Their limits, where one is set."),
    ):
        values = (entry.get(key) for entry in gate)
        yield f"batchgen_gate_{key}", meaning, zip(labels, values, strict=True)


_ROWS = ("planned", "ok", "errors", "skipped", "left", "durable")


def _column(entry: Mapping[str, Any]) -> dict[str, str]:
    return {"column": str(entry["column"])} if entry.get("column") else {}


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
