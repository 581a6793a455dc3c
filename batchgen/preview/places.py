"""The output's folder and disk, and what else of the machine a run leans on."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from batchgen.inputs import is_url, stat_input
from batchgen.preview.findings import Finding, gib, ok, problem, warning
from batchgen.preview.lengths import LARGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchgen.pipeline.prepare import Prepared
    from batchgen.preview.machine import Machine

LEAST_FREE_BYTES = 256 << 20
LEAST_OPEN_FILES = 1024
LEAST_SHM_BYTES = 1 << 30
"""With several GPUs: NCCL's and vLLM's buffers in /dev/shm; containers have 64 MiB by default."""
CLOCK_SLACK_S = 120.0
ANSWER_BYTES_A_TOKEN = 6
"""Text and typed answer, with what goes beside it in the output."""
_NETWORK = ("nfs", "cifs", "smb", "fuse", "9p", "lustre", "ceph", "gpfs", "afs", "glusterfs")


def check_output(root: Path, needed: int | None) -> Iterator[Finding]:
    """Whether the output can be written where it is to go.

    A temporary folder beside the output, or in the first folder above it that exists, is made and
    removed; the output itself is not touched.

    Args:
        root: Of the output.
        needed: Bytes that the job may take there, an estimate; None if it cannot be told.
    """
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not there.is_dir():
        yield problem("output", f"{there} is a file", "choose another output.path")
        return
    where = there if there == root else there.absolute()
    kind = filesystem(where)
    if (why := probe_links(where)) is not None:
        advice = "mend its rights, or choose an output.path on a local disk"
        yield problem("output", f"{where} ({kind}): {why}", advice)
        return
    if kind.startswith(_NETWORK):
        text = f"{where} is on {kind}: fsync may not mean there what batchgen relies on"
        yield warning("output", text, "choose an output.path on a local disk if you can")
    else:
        yield ok("output", f"{where} can be written, with hard links ({kind})")
    yield from _check_space(where, needed)


def probe_links(folder: Path) -> str | None:
    """Try what a commit does: write, sync, link. Why it does not work; None if it does."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".batchgen-doctor-") as name:
            first, second = Path(name) / "a", Path(name) / "b"
            with first.open("xb") as file:
                file.write(b"x")
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(first, second)
            except OSError as error:
                return f"has no hard links, which commits need ({error.strerror})"
    except OSError as error:
        return f"cannot be written to ({error.strerror})"
    return None


def filesystem(folder: Path) -> str:
    """The kind that a folder is on, such as ext4; `unknown` where that cannot be told."""
    best, kind = -1, "unknown"
    with suppress(OSError):
        real = os.path.realpath(folder)
        for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").split("\n"):
            fields = line.split(" ")
            if len(fields) < 3:
                continue
            mount = fields[1].replace("\\040", " ")
            is_above = real == mount or real.startswith(mount.rstrip("/") + "/")
            if is_above and len(mount) >= best:
                best, kind = len(mount), fields[2]
    return kind


def _check_space(folder: Path, needed: int | None) -> Iterator[Finding]:
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    told = f"{gib(free)} free"
    if needed is not None:
        told += f", the job may take about {gib(needed)} (estimate)"
    advice = "free space, or choose another output.path; a run waits when the disk is full"
    if free < LEAST_FREE_BYTES:
        yield problem("disk", told, advice)
    elif needed is not None and free < needed:
        yield warning("disk", told, advice)
    else:
        yield ok("disk", told)


def output_bytes(prepared: Prepared, answer_tokens: float) -> int | None:
    """About what a job leaves on disk: its parts, and the published files beside them.

    The input stands for the carried columns, though Parquet makes them smaller; answers come
    with `ANSWER_BYTES_A_TOKEN`. Rows of large files are not counted, and then no answers either.

    Args:
        prepared: The job.
        answer_tokens: Of a row.
    """
    sizes = [stat_input(path).size_bytes for path in prepared.files]
    if any(size < 0 for size in sizes):
        return None
    answers = 0.0
    if sum(sizes) <= LARGE_BYTES:
        num_rows = sum(prepared.reader.scan(path).num_rows for path in prepared.files)
        answers = num_rows * answer_tokens * prepared.job.sampling.n * ANSWER_BYTES_A_TOKEN
    return round(2 * (answers + (sum(sizes) if prepared.carried else 0)))


def check_host(machine: Machine, num_gpus: int, job_file: Path | None) -> Iterator[Finding]:
    """Limits of the machine that show late in a run.

    Args:
        machine: As it was read.
        num_gpus: That the job holds.
        job_file: For the clock: it was not written in the future.
    """
    files = machine.open_files
    if files is not None and files < LEAST_OPEN_FILES:
        yield warning("limits", f"this process may open {files:,} files", "ulimit -n 65536")
    shm = machine.shm_free_bytes
    if num_gpus > 1 and shm is not None and shm < LEAST_SHM_BYTES:
        text = f"shared memory (/dev/shm) has {gib(shm)} free, and {num_gpus} GPUs talk through it"
        yield warning("shm", text, "start the container with --ipc=host or --shm-size=8g")
    if job_file is not None and not is_url(str(job_file)) and job_file.exists():
        ahead = job_file.stat().st_mtime - machine.now
        if ahead > CLOCK_SLACK_S:
            text = f"the clock is {ahead:,.0f} s behind the job file's time"
            yield warning("clock", text, "set it: dates in paths and deadlines go by it")
