"""Small jobs on the echo engine, run through the real command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import polars as pl

import batchgen
from batchgen.storage import LocalStorage
from batchgen.store.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VOLATILE = ("gen_latency_s", "gen_run_id")
"""Columns that may differ between two runs that are equal."""


def write_rows(path: Path, num_rows: int, start: int = 0) -> Path:
    """JSONL rows with unlike texts; every 50th line is bad, every 70th is blank."""
    lines = []
    for number in range(start, start + num_rows):
        if number % 50 == 49:
            lines.append(f'{{"id": {number}, "text": ')
        elif number % 70 == 69:
            lines.append("")
        else:
            text = f"row {number} " + "lorem " * (number % 13)
            lines.append(json.dumps({"id": number, "text": text}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_job(folder: Path, source: str, **tables: Any) -> Path:
    """A job file for the echo engine; `tables` adds to or replaces keys of its tables."""
    job: dict[str, dict[str, Any]] = {
        "input": {"path": source},
        "prompt": {"user": "Repeat: {{ text }}"},
        "model": {"backend": "echo"},
        "sampling": {"max_tokens": 40, "temperature": 0},
        "output": {"path": "out"},
        "checks": {"allow_truncated": True},
        "run": {"flush_rows": 50},
    }
    rungs = tables.pop("retry", [])
    for name, keys in tables.items():
        job[name] = {**job.get(name, {}), **keys}
    lines = []
    for rung in rungs:
        lines += ["[[retry]]", *(f"{key} = {json.dumps(value)}" for key, value in rung.items())]
    for name, keys in job.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items() if key != "engine"]
        if engine := keys.get("engine"):
            lines.append("[model.engine]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in engine.items()]
    path = folder / "job.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def as_vectors(job: str) -> str:
    """The text of a job file with a vector for each row instead of an answer."""
    job = re.sub(r"\[sampling\]\n(\w+ = .*\n)*", "", job).replace("\nuser =", "\ntemplate =")
    return f'task = "embed"\n{job}'


def command(*args: str | Path) -> list[str]:
    """The real command line."""
    return [sys.executable, "-m", "batchgen", *map(str, args)]


def run_cli(*args: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command(*args), capture_output=True, text=True, timeout=timeout, check=False
    )


def summary_of(job: Path, *args: str) -> dict[str, Any]:
    """Run a job; what it says of itself."""
    done = run_cli("run", job, "--json", *args)
    lines = done.stdout.splitlines()
    assert len(lines) == 1, done.stderr
    summary: dict[str, Any] = json.loads(lines[0])
    assert summary["exit_code"] == done.returncode
    return summary


def published(output: Path) -> list[dict[str, Any]]:
    """The published rows without what may differ between equal runs in unlike folders."""
    frame = batchgen.read(output).collect()
    error = pl.col("gen_error").str.replace(str(output.parent), "", literal=True)
    return frame.drop(VOLATILE).with_columns(error).to_dicts()


def shown(output: Path) -> list[str]:
    """Names of the files that the output folder shows, in order."""
    return sorted(path.name for path in output.glob("part-*.parquet"))


def alias_of(output: Path, at: int = 0) -> str:
    """Name that the output folder shows a file of the newest snapshot under."""
    manifest = Ledger(LocalStorage(output)).latest_manifest()
    assert manifest is not None
    return manifest.files[at].alias


def only_shown(output: Path) -> Path:
    """The one file that the output folder shows."""
    (name,) = shown(output)
    return output / name


def wait_until(is_true: Callable[[], bool], timeout_s: float = 60) -> None:
    """Wait for a condition on the file system; fail loudly if it never comes."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
