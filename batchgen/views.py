"""What can be told of a job from its folder, without touching it: status and rows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from batchgen.executor.lock import RunLock
from batchgen.ledger import STATE, Ledger
from batchgen.storage import LocalStorage

if TYPE_CHECKING:
    from pathlib import Path

    import polars as pl


def status(root: Path) -> dict[str, Any]:
    """The job's state as one flat mapping.

    Returns:
        `state` is one of `new`, `running`, `interrupted`, `complete`; then counts of the plan,
        what is durable, and the last live view of the newest run.

    Raises:
        OutputError: The folder was written by another version.
    """
    storage = LocalStorage(root)
    ledger = Ledger(storage)
    plan = ledger.latest_plan()
    facts: dict[str, Any] = {"output": str(root), "state": "new"}
    if plan is None:
        return facts
    manifest = ledger.manifest(plan.number)
    facts |= {"plan": plan.number, "num_rows": plan.num_rows, "recipe": plan.recipe_fingerprint}
    if manifest is not None:
        facts |= {
            "state": "complete",
            "num_ok": manifest.num_ok,
            "num_errors": manifest.num_errors,
            "num_skipped": manifest.num_skipped,
            "published_at": manifest.created_at,
            "run_id": manifest.run_id,
        }
        return facts
    durable = ledger.durable(plan)
    lock = RunLock(storage, f"{STATE}/lock", "")
    is_running = lock.is_held()
    facts |= {
        "state": "running" if is_running else "interrupted",
        "num_durable": durable.num_done,
        "num_parts": len(durable.parts),
        "num_rejected_parts": len(durable.rejected),
    }
    live = _live(storage)
    if live and is_running:
        facts["run"] = live
    elif live:
        facts["last_run"] = {name: live.get(name) for name in ("run_id", "state", "reason")}
    return facts


def _live(storage: LocalStorage) -> dict[str, Any] | None:
    for folder in reversed(storage.list(f"{STATE}/runs")):
        data = storage.read(f"{folder}/live.json")
        if data is not None:
            return dict(json.loads(data))
    return None


def rows(root: Path, prefix: str, num_rows: int, *, errors: bool) -> pl.DataFrame:
    """The first rows of the snapshot, or of what is durable while nothing is published.

    Args:
        root: The output folder.
        prefix: The job's column prefix.
        num_rows: At most so many.
        errors: Only rows that are errors.

    Raises:
        OutputError: The folder was written by another version.
    """
    import polars as pl

    storage = LocalStorage(root)
    ledger = Ledger(storage)
    manifest = ledger.latest_manifest()
    plan = ledger.latest_plan()
    names: list[str] = []
    if plan is not None and (manifest is None or manifest.number != plan.number):
        names = [part.name for part in ledger.durable(plan).parts]
    elif manifest is not None:
        names = [file["name"] for file in manifest.files]
    if not names:
        return pl.DataFrame()
    frame = pl.scan_parquet([storage.path(name) for name in names], glob=False)
    if errors:
        frame = frame.filter(pl.col(f"{prefix}status") == "error")
    return frame.head(num_rows).collect()
