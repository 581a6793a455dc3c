"""What can be told of a job from its folder, without touching it: status and rows."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import OutputError
from batchgen.storage import LocalStorage
from batchgen.store import snapshots
from batchgen.store.books import STATE
from batchgen.store.ledger import Ledger
from batchgen.store.result_files import scan
from batchgen.store.runs import RunLock, utc_now
from batchgen.store.visible import lost_or_cut

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import polars as pl

    from batchgen.store.books import Plan

_KILLED = "it has left no word of its end: killed, or the machine went down; run again to go on"


def status(root: Path) -> dict[str, Any]:
    """The job's state as one flat mapping.

    Returns:
        `state` is one of `new`, `running`, `interrupted`, `held_back` (by the gate), `complete`;
        then counts of the plan, what is durable, and the last live view of the newest run:
        `run`, with a list `replicas` if it has some and `sign_of_life_age_s`, seconds since it
        was written. Of a plan that is not published, `published` is what readers see: number,
        time and counts of the last snapshot, None if there is none. `damaged` lists its files
        that are missing or have another size, if there are such: the others are not read.

    Raises:
        OutputError: The folder was written by another version.
    """
    storage = LocalStorage(root)
    ledger = Ledger(storage)
    plan = ledger.latest_plan()
    lock = RunLock(storage)
    holder = (lock.holder() or {}) if lock.is_held() else {}
    live = _live(storage, holder.get("run_id"))
    facts: dict[str, Any] = {"output": str(root), "state": "running" if holder else "new"}
    if holder:
        facts["run"] = {**holder, **live}
    if plan is None:
        return facts
    facts |= {"plan": plan.number, "num_rows": plan.num_rows, "recipe": plan.recipe_fingerprint}
    if plan.bases:
        facts["based_on"] = [base.plan for base in plan.bases]
        if not plan.takes_errors:
            facts["retries_plan"] = plan.bases[0].plan
    manifest = ledger.manifest(plan.number)
    if manifest is not None:
        facts |= {
            "num_ok": manifest.num_ok,
            "num_errors": manifest.num_errors,
            "num_skipped": manifest.num_skipped,
            "published_at": manifest.created_at,
            "published_by": manifest.run_id,
        }
        if not holder:  # Else a run is planning the next one.
            facts["state"] = "complete"
        if damaged := lost_or_cut(storage, manifest.files):
            facts["damaged"] = damaged
        return facts
    durable = ledger.durable(plan)
    facts |= {
        "num_durable": durable.num_done,
        "num_parts": len(durable.parts),
        "num_rejected_parts": len(durable.rejected),
    }
    facts["published"] = _published(ledger)
    if not holder:
        held_back = live.get("state") == "over_limit"
        facts["state"] = "held_back" if held_back else "interrupted"
        facts["last_run"] = _ended(live)
    return facts


def not_begun(root: Path) -> str | None:
    """Why there is nothing to be seen of a job: it has no plan yet; None if it has one."""
    return Ledger(LocalStorage(root)).why_no_plan()


def _published(ledger: Ledger) -> dict[str, Any] | None:
    """What readers see while the newest plan has no snapshot."""
    manifest = ledger.latest_manifest()
    if manifest is None:
        return None
    return {
        "snapshot": manifest.number,
        "published_at": manifest.created_at,
        "num_ok": manifest.num_ok,
        "num_errors": manifest.num_errors,
    }


def _ended(live: Mapping[str, Any]) -> dict[str, Any]:
    """How a run that nobody is at any more says that it ended; one that says nothing was killed."""
    told = {name: live.get(name) for name in ("run_id", "state", "reason")}
    # A run that ends writes why, were it only null (`JobRun._finish`); one at work has no reason.
    return told if not live or "reason" in live else {**told, "state": "killed", "reason": _KILLED}


def _live(storage: LocalStorage, run_id: str | None) -> dict[str, Any]:
    """The live view of a run, or of the newest run that has one; and how old it is."""
    folders = storage.list(f"{STATE}/runs")
    if run_id is not None:
        folders = [folder for folder in folders if folder.endswith(f"/{run_id}")]
    written_s = {folder: _written_s(storage.path(f"{folder}/live.json")) for folder in folders}
    # Run ids tell the second; of runs that share one, the newest wrote last.
    folders.sort(key=lambda folder: (folder.rpartition("-")[0], written_s[folder]), reverse=True)
    for folder in folders:
        data = storage.read(f"{folder}/live.json")
        if data is not None:
            with suppress(ValueError):  # Never synced: a power loss may have torn it.
                at_s = written_s[folder]  # 0: it came only now.
                age_s = max(0.0, utc_now().timestamp() - at_s) if at_s else 0.0
                return {**json.loads(data), "sign_of_life_age_s": age_s}
    return {}


def _written_s(path: Path) -> float:
    """When a file was written, in seconds of the epoch; 0 if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def rows(root: Path, num_rows: int, *, errors: bool, snapshot: int | None = None) -> pl.DataFrame:
    """The first rows of the snapshot, or of what is durable while nothing is published.

    Args:
        root: The output folder.
        num_rows: At most so many.
        errors: Only rows that are errors.
        snapshot: Number of an old snapshot, whatever has been done since.

    Raises:
        OutputError: There is no such snapshot, or the folder was written by another version.
    """
    import polars as pl

    storage = LocalStorage(root)
    ledger = Ledger(storage)
    found = _files(ledger, snapshot)
    if found is None:
        return pl.DataFrame()
    plan, names = found
    frame = scan(storage, names)
    if errors:
        # The plan's: the job file may have another by now.
        prefix = plan.prefix
        frame = frame.filter(pl.col(f"{prefix}status") == "error")
    try:
        return frame.head(num_rows).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        why = str(error).splitlines()[0]
        msg = f"{root}: its rows cannot be read ({why}); `batchgen verify` tells more"
        raise OutputError(msg) from error


def _files(ledger: Ledger, snapshot: int | None) -> tuple[Plan, list[str]] | None:
    """The plan whose rows are to be seen, and where they are; None if there are none yet."""
    if snapshot is not None:
        manifest = snapshots.snapshot(ledger, snapshot)
        return ledger.plan(snapshot), [file.name for file in manifest.files]
    plan, newest = ledger.latest_plan(), ledger.latest_manifest()
    if plan is None:
        return None
    if newest is not None and newest.number == plan.number:
        names = [file.name for file in newest.files]
    else:
        names = [part.name for part in ledger.durable(plan).parts]
    return (plan, names) if names else None
