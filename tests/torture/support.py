"""A small job, its forked runs, and the one question: is the published snapshot the right one?"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec.implementations.local  # noqa: F401 - children are forked warm
import pandas  # noqa: F401 - half a second that pyarrow's first array takes where it is
import polars as pl  # noqa: F401 - its threads begin with its first work, which is a child's
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard  # noqa: F401

import batchgen.source.jsonl  # noqa: F401
from batchgen import cli
from batchgen.api import load
from batchgen.core.errors import BatchgenError
from batchgen.pipeline.context import RunOptions, StopSwitch
from batchgen.pipeline.job_run import JobRun
from batchgen.store.books import STATE, PublishedFile
from tests.e2e.support import as_vectors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from batchgen.storage import Disk

HANG_S = 60.0
CRASHED = 99
"""Exit code of a child that raised what is not a `BatchgenError`."""
VOLATILE = {"gen_latency_s", "gen_run_id"}


class ProofError(AssertionError):
    """The promise is broken."""


@dataclass(frozen=True)
class Job:
    """A job file beside its input; runs of it go to any output folder."""

    path: Path
    num_rows: int
    overrides: tuple[str, ...] = ()

    def flushing(self, num_rows: int) -> Job:
        """The same job with parts of another size."""
        return Job(self.path, self.num_rows, (f"run.flush_rows={num_rows}",))

    def strict(self) -> Job:
        """The same job with a gate that holds it back."""
        return Job(self.path, self.num_rows, (*self.overrides, "gate.max_error_rate=0.01"))

    def argv(self, out: Path, *extra: str) -> list[str]:
        """For the real command line."""
        sets = [f"output.path={out}", *self.overrides]
        return ["run", str(self.path), *(arg for text in sets for arg in ("--set", text)), *extra]


def make_job(
    folder: Path,
    num_rows: int,
    *,
    step_s: float = 0.0,
    flush_rows: int = 20,
    is_vectors: bool = False,
) -> Job:
    """Several parts, finished out of order, published as two files; some rows bad, some blank."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.toml"
    first_day(Job(path, num_rows))
    text = f"""
[input]
path = "in.jsonl"
[prompt]
user = "Repeat: {{{{ text }}}}"
[model]
backend = "echo"
[model.engine]
max_num_seqs = 16
max_steps = 6
step_s = {step_s}
[sampling]
max_tokens = 40
temperature = 0
[checks]
allow_truncated = true
[output]
path = "out"
rows_per_file = {num_rows * 3 // 5}
[run]
flush_rows = {flush_rows}
max_in_flight = 32
disk_grace_s = 20.0
"""
    path.write_text(as_vectors(text) if is_vectors else text, encoding="utf-8")
    return Job(path, num_rows)


def _line(number: int) -> str:
    if number % 17 == 16:
        return f'{{"id": {number}, "text": '
    if number % 23 == 22:
        return ""
    return json.dumps({"id": number, "text": _text(number)})


def _text(number: int) -> str:
    return f"row {number} " + "lorem " * (number % 7)


def first_day(job: Job) -> None:
    """Write the job's input as it is at first."""
    _write_input(job, [_line(number) for number in range(job.num_rows)])


def next_day(job: Job) -> int:
    """Change the input as a day does; return how many texts are new.

    Edits in place, lines inserted, deleted and moved, a bad line that moves, copies of a text with
    another id, old and new.
    """
    lines = [_line(number) for number in range(job.num_rows)]
    lines[5] = json.dumps({"id": 5, "text": "edited"})
    lines[7] = json.dumps({"id": -7, "text": _text(7)})
    lines[10:10] = [_line(number) for number in range(1000, 1004)]
    del lines[25:28]
    lines.insert(2, lines.pop(40))
    lines += [json.dumps({"id": id_, "text": _text(3)}) for id_ in (-1, -2)]
    lines += [json.dumps({"id": id_, "text": "twice"}) for id_ in (-3, -4)]
    lines += [_line(number) for number in range(2000, 2010)]
    _write_input(job, lines)
    whole = [_line(number) for number in (*range(1000, 1004), *range(2000, 2010))]
    return 2 + sum(line.endswith("}") for line in whole)


def _write_input(job: Job, lines: list[str]) -> None:
    path = job.path.parent / "in.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_here(job: Job, out: Path, *, disk: Disk | None = None, **options: bool) -> dict[str, Any]:
    """One run in this process; how it ended, as plain values. Anything unforeseen is raised."""
    try:
        config = load(job.path, (f"output.path={out}", *job.overrides))
        run = JobRun(config, stop=StopSwitch(), options=RunOptions(**options), disk=disk)
        summary = run.run()
    except BatchgenError as error:
        kind = type(error).__name__
        told = {"code": int(error.exit_code), "error": kind, "text": str(error)}
        return {**told, "resumed": 0, "computed": 0}
    return {
        "code": summary.exit_code,
        "error": None,
        "text": summary.state,
        "resumed": summary.run.get("num_resumed", 0),
        "computed": summary.run.get("num_ok", 0),
    }


@dataclass
class Child:
    """A forked run."""

    pid: int
    report: Path
    code: int | None = None
    """Exit code, negative for a signal; None while it runs."""
    told: dict[str, Any] = field(default_factory=dict)

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended within the time."""
        if self.code is not None:
            return True
        descriptor = os.pidfd_open(self.pid)
        try:
            if not select.select([descriptor], [], [], max(0.0, timeout_s))[0]:
                return False
        finally:
            os.close(descriptor)
        return self._reap()

    def _reap(self) -> bool:
        _, status = os.waitpid(self.pid, 0)
        self.code = os.waitstatus_to_exitcode(status)
        if self.report.exists():
            text = self.report.read_text(encoding="utf-8", errors="replace")
            self.told = json.loads(text) if text.startswith("{") else {"text": text, "error": None}
            self.report.unlink()
        if self.code == CRASHED:
            msg = f"a run died of something that is no BatchgenError:\n{self.told.get('text')}"
            raise ProofError(msg)
        return True

    def end(self) -> Child:
        """Wait to the end; a run that hangs is a failure."""
        if not self.wait(HANG_S):
            self.kill()
            msg = f"a run hung for {HANG_S:g} s"
            raise ProofError(msg)
        return self

    def wait_until_frozen(self) -> bool:
        """Wait until it has stopped itself (True) or ended (False)."""
        deadline = time.monotonic() + HANG_S
        while time.monotonic() < deadline:
            if self.wait(0.001):
                return False
            if _state(self.pid) == "T":
                return True
        msg = f"a run neither stopped nor ended within {HANG_S:g} s"
        raise ProofError(msg)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait(HANG_S)

    def thaw(self) -> Child:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)
        return self


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]


def spawn(work: Callable[[], int | None], report: Path) -> Child:
    """Fork a child that does `work` and exits with what it returns; stderr goes to `report`."""
    pid = os.fork()
    if pid:
        return Child(pid, report)
    code = CRASHED
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        code = work() or 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:  # noqa: BLE001 - the parent is told
        os.write(2, traceback.format_exc().encode())
    os._exit(code)


def spawn_run(job: Job, out: Path, *, gate: int | None = None, **how: Any) -> Child:
    """`run_here` in a forked child; it tells in its report how it ended.

    Args:
        job: What to run.
        out: The output folder.
        gate: Pipe to read a byte from before it begins.
        how: For `run_here`.
    """
    report = _report_path(job)

    def work() -> int:
        if gate is not None:
            os.read(gate, 1)
        told = run_here(job, out, **how)
        report.write_text(json.dumps(told), encoding="utf-8")
        return int(told["code"])

    return spawn(work, report)


def spawn_cli(job: Job, out: Path, *extra: str) -> Child:
    """The real command line in a forked child."""

    def work() -> int:
        sys.argv = ["batchgen", *job.argv(out, *extra)]
        cli.main()
        return 0

    return spawn(work, _report_path(job))


_SERIAL = iter(range(10**9))


def _report_path(job: Job) -> Path:
    return job.path.parent / f"report-{os.getpid()}-{next(_SERIAL)}"


def manifest_of(out: Path) -> dict[str, Any] | None:
    """The newest manifest, read without batchgen."""
    found = sorted((out / STATE / "manifests").glob("[0-9]*.json"))
    if not found:
        return None
    manifest = json.loads(found[-1].read_bytes())
    lists = [json.loads((out / name).read_bytes()) for name in manifest["lists"]]
    return {**manifest, "files": [file for one in lists for file in one["files"]]}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a published file, less what may differ; single-threaded, so that we may fork.

    Raises:
        ProofError: The file is not whole.
    """
    try:
        return _rows_of(path)
    except (OSError, pa.ArrowException) as error:
        msg = f"{path}: published, but {error}"
        raise ProofError(msg) from error


def _rows_of(path: Path) -> list[dict[str, Any]]:
    with pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
        names = [name for name in file.schema_arrow.names if name not in VOLATILE]
        return file.read(columns=names, use_threads=False).to_pylist()


def published(out: Path) -> list[dict[str, Any]]:
    """Every published row in order.

    Raises:
        ProofError: Nothing is published, the books do not balance, or the files in the folder
            are not those of the newest manifest.
    """
    manifest = manifest_of(out)
    if manifest is None:
        msg = f"{out}: no manifest"
        raise ProofError(msg)
    names = [file["name"] for file in manifest["files"]]
    counts = {name: manifest[f"num_{name}"] for name in ("planned", "ok", "errors", "skipped")}
    if counts["planned"] != counts["ok"] + counts["errors"] + counts["skipped"]:
        msg = f"{out}: the books do not balance: {counts}"
        raise ProofError(msg)
    shown = sorted(path.name for path in out.glob("part-*.parquet"))
    aliases = [PublishedFile(**file).alias for file in manifest["files"]]
    if shown != aliases:
        msg = f"{out}: shows {shown}, the manifest names {aliases}"
        raise ProofError(msg)
    rows = [row for name in names for row in rows_of(out / name)]
    if not all(map(_is_one, [out / name for name in aliases], [out / name for name in names])):
        msg = f"{out}: the files shown are not those of the manifest"
        raise ProofError(msg)
    if len(rows) != counts["ok"] + counts["errors"]:
        msg = f"{out}: {len(rows)} rows in the files, the manifest says {counts}"
        raise ProofError(msg)
    return rows


def _is_one(shown: Path, own: Path) -> bool:
    return shown.samefile(own)


def check_snapshot(out: Path, expected: list[dict[str, Any]], where: str) -> None:
    """Raise unless what is published is exactly what an uninterrupted run publishes."""
    found = published(out)
    if found == expected:
        return
    ids = [row["id"] for row in found if row["id"] is not None]
    wanted = [row["id"] for row in expected if row["id"] is not None]
    lost = sorted(set(wanted) - set(ids))
    doubled = sorted({id_ for id_ in ids if ids.count(id_) > 1})
    differing = [a["id"] for a, b in zip(found, expected, strict=False) if a != b]
    msg = (
        f"{where}: {len(found)} rows published, {len(expected)} expected; "
        f"lost {lost}, doubled {doubled}, differing {differing[:20]}"
    )
    raise ProofError(msg)


def expected_of(job: Job, out: Path) -> list[dict[str, Any]]:
    """`whole_run` over the input of the first day."""
    rows = whole_run(job, out)
    blank = sum(n % 17 != 16 and n % 23 == 22 for n in range(job.num_rows))
    if len(rows) != job.num_rows - blank:
        msg = f"the uninterrupted run published {len(rows)} of {job.num_rows - blank} rows"
        raise ProofError(msg)
    return rows


def whole_run(job: Job, out: Path) -> list[dict[str, Any]]:
    """What a run that nothing disturbs publishes; in a child, this process stays without threads.

    Raises:
        ProofError: It fails.
    """
    child = spawn_run(job, out).end()
    if child.code != 0:
        msg = f"the uninterrupted run ended with {child.code}: {child.told}"
        raise ProofError(msg)
    return published(out)


def leftovers(out: Path) -> dict[str, int]:
    """What lies about and should not, by kind; harmless, but space."""
    manifest = manifest_of(out)
    named = {file["name"] for file in manifest["files"]} if manifest else set()
    files = (out / STATE / "files").glob("e*")
    return {
        "temp files": sum(1 for _ in out.rglob("*.tmp")),
        "parts": sum(1 for _ in (out / STATE / "parts").glob("*.parquet")),
        "orphan files": sum(f"{STATE}/files/{path.name}" not in named for path in files),
    }


@contextmanager
def replayable(what: str) -> Iterator[None]:
    """Say with any failure how to get it again."""
    try:
        yield
    except ProofError as error:
        msg = f"{error}\n  replay: {what}"
        raise ProofError(msg) from error
