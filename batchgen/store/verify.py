"""Every byte of a job, read and checked: what is published and shown, what is durable on the way.

Page checksums are verified on reading; plain readers do not, and are silently wrong on most bit
flips (of 300 flips in zstd pages, pyarrow without verification gave wrong values for 262).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from batchgen.core.errors import OutputError, StorageError
from batchgen.core.runtime import command, option
from batchgen.storage.remote import storage_at
from batchgen.store.ledger import Ledger
from batchgen.store.result_files import ResultFile, check_rows
from batchgen.store.visible import bring_back, shown_problems, told_difference

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from pathlib import Path

    import pyarrow as pa

    from batchgen.core.places import Root
    from batchgen.store.books import Manifest, Part, Plan, PublishedFile

_LOOKS = 3
_BRING = "bring the file back from a backup"
_PATIENCE_S = 5.0
"""A run at work that changed nothing for so long is not putting its files there right now."""


@dataclass(slots=True)
class Verdict:
    """What `verify` found."""

    output: str
    num_planned: int = 0
    num_ok: int = 0
    num_errors: int = 0
    num_skipped: int = 0
    num_left: int = 0
    num_files: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    """`file: what is wrong; what happens next`; empty if all is well."""
    older_problems: list[str] = field(default_factory=list)
    """The same of files that only older snapshots have: no reader of what is published meets it."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def verify(root: Root, *, patience_s: float = _PATIENCE_S) -> Verdict:
    """Check all snapshots, what the folder shows of the newest, and parts of an unfinished plan.

    A file that several snapshots have is read once; its damage names all of them, and it is brought
    back for all of them if the folder has one with its bytes, by the name under which it is shown.

    A part that is not what was written is marked, so that the next run redoes its rows; nothing
    else is changed.

    Args:
        root: The output folder.
        patience_s: How long a run at work may stand still while it shows its files.

    Raises:
        OutputError: The job has not been run yet, or it is of another version.
    """
    ledger = Ledger(storage_at(root))
    for _ in range(_LOOKS):
        at = _where(ledger)
        verdict = _look(ledger, patience_s)
        # What a run published meanwhile, it may have tidied up under our eyes.
        if not verdict.problems or at == _where(ledger):
            break
    return verdict


def _where(ledger: Ledger) -> tuple[int, int, int]:
    """How far the job is, in plans and in snapshots, and how many of them there are."""
    numbers = [manifest.number for manifest in ledger.manifests()]
    return ledger.latest_plan_number(), max(numbers, default=0), len(numbers)


def _look(ledger: Ledger, patience_s: float) -> Verdict:
    plan = ledger.latest_plan()
    if plan is None:
        raise OutputError(f"{ledger.storage.where}: nothing to verify, {ledger.why_no_plan()}")
    verdict = Verdict(ledger.storage.where, num_planned=plan.num_rows)
    manifest = ledger.latest_manifest()
    damaged: Collection[str] = ()
    if manifest is not None:
        damaged = _check_snapshot(ledger, manifest, verdict)
    if manifest is None or manifest.number != plan.number:
        _check_parts(ledger, plan, verdict)
    else:
        _note_counts(verdict, manifest.num_ok, manifest.num_errors, manifest.num_skipped)
    verdict.problems += shown_problems(ledger, manifest, damaged, patience_s)
    return verdict


def _note_counts(verdict: Verdict, num_ok: int, num_errors: int, num_skipped: int) -> None:
    verdict.num_ok, verdict.num_errors, verdict.num_skipped = num_ok, num_errors, num_skipped
    verdict.num_left = verdict.num_planned - num_ok - num_errors - num_skipped


def _check_snapshot(ledger: Ledger, manifest: Manifest, verdict: Verdict) -> Collection[str]:
    """Check the snapshot's own files; return the names of those that are damaged."""
    damaged: list[str] = []
    plan = ledger.plan(manifest.number)
    if plan.plan_id != manifest.plan_id:
        verdict.problems.append(f"manifest {manifest.number}: belongs to another plan")
    counted = {"ok": 0, "error": 0}
    numbers_of = _numbers_of(older := ledger.manifests())
    for file in manifest.files:
        try:
            _check_published(ledger, file, plan, counted, verdict)
        except (ValueError, OSError, StorageError) as error:
            why = str(error).splitlines()[0]
            also = _and_of(numbers_of[file.name][:-1])
            again = f"`{command('run', '--retry-errors')}` computes them again, or {_BRING}"
            remedy = _remedy(ledger, file, again)
            if remedy == again:
                damaged.append(file.name)
            told = f"{file.name}: {why}; published rows are damaged{also}: {remedy}"
            verdict.problems.append(told)
    _check_index(ledger, manifest, verdict)
    _check_older(ledger, older, {file.name for file in manifest.files}, verdict)
    if not verdict.problems and (counted["ok"], counted["error"]) != (
        manifest.num_ok,
        manifest.num_errors,
    ):
        verdict.problems.append(
            f"manifest {manifest.number}: says {manifest.num_ok} ok and {manifest.num_errors} "
            f"errors, the files hold {counted['ok']} and {counted['error']}"
        )
    return damaged


def _numbers_of(manifests: Iterable[Manifest]) -> dict[str, list[int]]:
    """Name of each published file -> the snapshots that have it."""
    found: dict[str, list[int]] = {}
    for manifest in manifests:
        for file in manifest.files:
            found.setdefault(file.name, []).append(manifest.number)
    return found


def _and_of(numbers: Sequence[int]) -> str:
    told = ", ".join(map(str, numbers))
    return f", of snapshot{'s' * (len(numbers) > 1)} {told} too" if numbers else ""


def _check_older(
    ledger: Ledger, manifests: Sequence[Manifest], checked: set[str], verdict: Verdict
) -> None:
    """Check the files that only older snapshots have, each once."""
    numbers_of = _numbers_of(manifests)
    files = {file.name: file for manifest in manifests for file in manifest.files}
    for name, file in files.items():
        path = ledger.storage.path(name)
        if name in checked or (why := told_difference(path, file)) is None:
            continue
        of = ", ".join(map(str, numbers_of[name]))
        remedy = _remedy(ledger, file, f"{_BRING}, or prune it")
        verdict.older_problems.append(f"{name}: {why}; damages snapshot {of}: {remedy}")


def _remedy(ledger: Ledger, file: PublishedFile, otherwise: str) -> str:
    """Mend a damaged file if that is possible; return what was done, or is to be done."""
    with suppress(OutputError, StorageError):  # Whoever looks may not write here.
        return bring_back(ledger.storage, file) or otherwise
    return otherwise


def _check_index(ledger: Ledger, manifest: Manifest, verdict: Verdict) -> None:
    """The index is no output, so it is not counted; but its damage is told."""
    if manifest.index is None:
        return
    why = told_difference(ledger.storage.path(manifest.index.name), manifest.index)
    if why is not None:
        verdict.problems.append(
            f"{manifest.index.name}: {why}; no published row is damaged by that, but "
            f"{option('--retry-errors')} needs the index: bring it back from a backup"
        )


def _check_published(
    ledger: Ledger, file: PublishedFile, plan: Plan, counted: dict[str, int], verdict: Verdict
) -> None:
    """Every byte is what was published, and the rows are those that the manifest counts.

    Raises:
        ValueError: They are not.
        OSError: The file cannot be read.
    """
    path = ledger.storage.path(file.name)
    wrong = file.difference(path)
    verdict.num_files += 1
    verdict.num_bytes += path.stat().st_size
    if wrong is not None:
        raise ValueError(wrong)
    num_rows = 0
    for rows in _row_groups(path):
        num_rows += rows.num_rows
        for status in counted:
            matches = pc.sum(pc.equal(rows.column(f"{plan.prefix}status"), status)).as_py()
            counted[status] += matches or 0
    if num_rows != file.num_rows:
        raise ValueError(f"holds {num_rows} rows, the manifest says {file.num_rows}")


def _row_groups(path: Path) -> Iterator[pa.Table]:
    """Every byte of a Parquet file, a row group at a time, page checksums verified.

    Raises:
        ValueError: It is damaged.
        StorageError: It cannot be read right now.
    """
    with ResultFile(path) as file:
        for _, table in file.groups():
            yield table
        if file.problem is not None:
            raise ValueError(file.problem)


def _check_parts(ledger: Ledger, plan: Plan, verdict: Verdict) -> None:
    durable = ledger.durable(plan)
    verdict.problems += [
        f"{name}: {why}; the next run redoes its rows" for name, why in durable.rejected.items()
    ]
    good: list[Part] = []
    for part in durable.parts:
        path = ledger.storage.path(part.name)
        try:
            verdict.num_bytes += path.stat().st_size
            verdict.num_files += 1
            check_rows(_row_groups(path), part.footer)
        except ValueError as error:
            if path.exists():  # Else it does not count anyway, and a run may have tidied it up.
                ledger.reject(part.name, str(error))
            verdict.problems.append(f"{part.name}: {error}; the next run redoes its rows")
        except (OSError, StorageError) as error:
            verdict.problems.append(f"{part.name}: cannot be checked right now ({error})")
        else:
            good.append(part)
    _note_counts(
        verdict,
        sum(part.footer.num_ok for part in good),
        sum(part.footer.num_errors for part in good),
        sum(part.footer.num_skipped for part in good),
    )
