"""What there is under an output folder: the state of its job, its snapshots, and which go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from batchgen.core.data import parse_state
from batchgen.core.errors import ExitCode, NoRightError, OutputError, StorageError
from batchgen.core.places import Root
from batchgen.core.runtime import command, option, size_text
from batchgen.pipeline.context import table
from batchgen.pipeline.stats import RUNNING, duration, figures_of, num_inside
from batchgen.storage.remote import storage_at
from batchgen.store.books import STATE, Manifest, Plan, PublishedFile, number_of
from batchgen.store.ledger import Ledger
from batchgen.store.prune import Keep, Outdated, outdated
from batchgen.store.prune import prune as remove_outdated
from batchgen.store.runs import RunLock, new_run_id, utc_now
from batchgen.store.visible import Fault, faults, lost_or_cut

if TYPE_CHECKING:
    from batchgen.storage import LocalStorage


_KILLED = "it has left no word of its end: killed, or the machine went down; run again to go on"
_SILENT_S = 15.0
"""A live view that is older is worth a line: mostly it is rewritten every 2 s."""
_WIDTH = 100
_MOST_REPLICAS = 24
_SILENT_REPLICA_S = 30.0
_COLUMNS = (
    *("replica", "worker", "state", "rows/s", "tok/s in", "out", "in flight", "KV", "restarts"),
    "host",
)
_LEFT = {"state", "host"}
_ENDS = {
    None: ExitCode.STOPPED,
    "stopped": ExitCode.STOPPED,
    "answered": ExitCode.STOPPED,
    "over_limit": ExitCode.OVER_LIMIT,
    "refused": ExitCode.REFUSED,
}
"""State of the last run -> what `status` exits with; the others are faults."""


def status_of(root: Root) -> dict[str, Any]:
    """Look up the job's state, as one flat mapping.

    Returns:
        `state` is one of `new`, `running`, `interrupted`, `held_back` (by the gate), `complete`;
        then counts of the plan, what is durable, and the last live view of the newest run:
        `run`, with a list `replicas` if it has some and `sign_of_life_age_s`, seconds since it
        was written. `sizes` are bytes by kind; `files` are the newest snapshot's own, in order,
        for readers who do not go by what the folder shows. Of a plan that is not published,
        `published` is what readers see: number, time and counts of the last snapshot, None if
        there is none. `damaged` lists its files that are missing or have another size, if there
        are such: the others are not read.

    Raises:
        OutputError: The folder was written by another version.
    """
    storage = storage_at(root)
    ledger = Ledger(storage)
    plan = ledger.latest_plan()
    lock = RunLock(storage)
    holder = (lock.holder() or {}) if lock.is_held() else {}
    live = live_view(storage, holder.get("run_id"))
    facts: dict[str, Any] = {"output": str(root), "state": "running" if holder else "new"}
    if holder:
        facts["run"] = {**holder, **live}
    if plan is None:
        return facts
    facts["sizes"] = _sizes(storage)
    if (newest := ledger.latest_manifest()) is not None:
        facts["files"] = [f"{storage.where}/{file.name}" for file in newest.files]
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
    facts |= _durable(ledger, plan)
    facts["published"] = _published(ledger)
    if not holder:
        held_back = live.get("state") == "over_limit"
        facts["state"] = "held_back" if held_back else "interrupted"
        facts["last_run"] = _ended(live)
    return facts


def _durable(ledger: Ledger, plan: Plan) -> dict[str, int | None]:
    """Count what is done of an unpublished plan; None if the parts are not open to this user."""
    try:
        durable = ledger.durable(plan)
    except NoRightError:
        return dict.fromkeys(("num_durable", "num_parts", "num_rejected_parts"))
    return {
        "num_durable": durable.num_done,
        "num_parts": len(durable.parts),
        "num_rejected_parts": len(durable.rejected),
    }


def _sizes(storage: LocalStorage) -> dict[str, int]:
    """Add up the bytes of what there is, by kind; what is not open to this user is left out."""
    sizes: Counter[str] = Counter()
    kinds = {"snapshots": "published", "files": "published", "rows": "digests", "keys": "digests"}
    for folder in storage.list(STATE):
        name = folder.rpartition("/")[2]
        kind = name if name in {"parts", "runs", "try"} else kinds.get(name, "books")
        with suppress(OSError):  # Gone meanwhile, or private.
            sizes[kind] += storage.num_bytes(folder)
    return dict(sizes)


def exit_code_of(facts: Mapping[str, Any]) -> ExitCode:
    """Return what a monitor goes by: 0, or what the last run ended with."""
    if facts["state"] in {"held_back", "interrupted"}:
        return _ENDS.get(facts["last_run"]["state"], ExitCode.FAULT)
    return ExitCode.FAULT if facts.get("damaged") else ExitCode.COMPLETE


def as_text(root: Root, facts: Mapping[str, Any]) -> str:
    """Write what `status_of` found for people."""
    run = facts.get("run", {})
    age_s = run.get("sign_of_life_age_s") or 0.0
    sizes = (f"{size_text(num)} {kind}" for kind, num in facts.get("sizes", {}).items() if num)
    lines = {
        "state": _state_line(root, facts),
        "rows": _rows_line(facts),
        "speed": ", ".join(figures_of(run)) if "requests_per_s" in run else "",
        "run": _holder_line(run) if run else "",
        "silent": f"for {_silence(run, age_s)}" if age_s >= _SILENT_S else "",
        "snapshot": _published_line(facts["published"]) if "published" in facts else "",
        "damaged": "; ".join(facts.get("damaged", [])),
        "plan": "{plan}, recipe {recipe}".format_map(facts) if "plan" in facts else "",
        "sizes": ", ".join(sizes),
    }
    return "\n".join([str(root), *table(lines), *replica_lines(run.get("replicas", []))])


def _state_line(root: Root, facts: Mapping[str, Any]) -> str:
    state, run, last = facts["state"], facts.get("run", {}), facts.get("last_run", {})
    if state == "running":
        eta_s = run.get("eta_s")
        left = f", {duration(eta_s)} left" if eta_s and run.get("state") == RUNNING else ""
        return f"at work: {run.get('state', 'planning')}{left}"
    if last:
        reason = str(last["reason"] or "").partition("\n")[0]
        words = {"held_back": "held back by the gate", "interrupted": "not complete"}
        return f"{words[state]}; the last run: {last['state']}{reason and f', {reason}'}"
    if state == "complete":
        return "complete, published at {published_at} by run {published_by}".format_map(facts)
    return f"{state}: {why}" if (why := not_begun(root)) else str(state)


def _holder_line(run: Mapping[str, Any]) -> str:
    run_id, pid, host, since = (run.get(name) for name in ("run_id", "pid", "host", "since"))
    return f"{run_id}, process {pid} on {host}, since {since}"


def _rows_line(facts: Mapping[str, Any]) -> str:
    run, num_rows = facts.get("run", {}), facts.get("num_rows", 0)
    if "num_ok" in facts:
        ends = ("num_ok", "ok"), ("num_errors", "errors"), ("num_skipped", "skipped")
        return ", ".join(f"{facts[name]:,} {word}" for name, word in ends)
    num_done = num_rows - run["num_left"] if "num_left" in run else facts.get("num_durable")
    if num_done is None or not num_rows:
        return ""
    durable = facts.get("num_durable")
    told = f"; {durable:,} are durable" if durable is not None else ""
    return f"{num_done / num_rows:.0%}: {num_done:,} of {num_rows:,} ended{told}"


def _published_line(seen: Mapping[str, Any] | None) -> str:
    if seen is None:
        return "nothing is published yet"
    return (
        f"{seen['snapshot']} of {seen['published_at']}: {seen['num_ok']:,} ok, "
        f"{seen['num_errors']:,} errors"
    )


def _silence(run: Mapping[str, Any], age_s: float) -> str:
    """Say for how long a run has not been heard of, and what to make of it."""
    if "elapsed_s" not in run:
        means = f"{run.get('state')}, it gives none until that is done"
    elif run.get("num_left") == 0:
        means = "every row has ended, publishing gives none"
    else:
        means = f"if it is frozen, take the job from it: {command('run', '--steal')}"
    return f"{duration(age_s)} ({means})"


def not_begun(root: Root) -> str | None:
    """Say why there is nothing to be seen of a job, which has no plan yet; None if it has one."""
    return Ledger(storage_at(root)).why_no_plan()


def _published(ledger: Ledger) -> dict[str, Any] | None:
    """Look up what readers see while the newest plan has no snapshot."""
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
    """Say how a run ended that nobody is at any more; one that has not said it was killed."""
    end = {name: live.get(name) for name in ("run_id", "state", "reason")}
    # A run that ends writes why, were it only null (`JobRun._finish`); one at work has no reason.
    return end if not live or "reason" in live else {**end, "state": "killed", "reason": _KILLED}


def live_view(storage: LocalStorage, run_id: str | None) -> dict[str, Any]:
    """Read the live view of a run, or of the newest run that has one, and how old it is."""
    folders: Sequence[str] = ()
    with suppress(NoRightError):  # Another user's: whether there is a run, the lock tells.
        folders = storage.list(f"{STATE}/runs")
    if run_id is not None:
        folders = [folder for folder in folders if folder.endswith(f"/{run_id}")]
    written_s = {folder: _written_s(storage, f"{folder}/live.json") for folder in folders}
    epochs = _epochs(storage)

    def place(folder: str) -> tuple[float, str, float]:
        """By epochs, which a clock that was set back does not disturb.

        A run that ended before it claimed one stands behind those that had begun by then. Run ids
        tell the second; of runs that share one, the newest wrote last.
        """
        run = folder.rpartition("/")[2]
        began = run.rpartition("-")[0]
        before = (at for name, at in epochs.items() if name.rpartition("-")[0] <= began)
        epoch = epochs[run] if run in epochs else max(before, default=0) + 0.5
        return epoch, began, written_s[folder]

    for folder in sorted(folders, key=place, reverse=True):
        # Never synced: a power loss may have torn it.
        with suppress(ValueError, TypeError, StorageError):
            if (data := storage.read(f"{folder}/live.json")) is not None:
                at_s = written_s[folder]  # 0: it came only now.
                age_s = max(0.0, utc_now().timestamp() - at_s) if at_s else 0.0
                return {**parse_state(data), "sign_of_life_age_s": age_s}
    return {}


def _epochs(storage: LocalStorage) -> dict[str, int]:
    """Read which run claimed which epoch; a claim that cannot be read is left out."""
    found = {}
    for name in storage.list(f"{STATE}/epochs"):
        with suppress(ValueError, KeyError, TypeError, StorageError):
            found[str(parse_state(storage.read(name) or b"")["run_id"])] = number_of(name)
    return found


def _written_s(storage: LocalStorage, name: str) -> float:
    """When a file was written, in seconds of the epoch; 0 if it is not there."""
    with suppress(OSError, StorageError):
        if mark := storage.mark(name):
            return mark[1] / 1e9
    return 0.0


def replica_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Make a table of a live view's replicas; of many, those that do not run and the slowest."""
    if not rows:
        return []
    shown = sorted(rows, key=_worth_showing)[:_MOST_REPLICAS]
    shown.sort(key=lambda row: row["replica"])
    lines = _aligned([_COLUMNS, *map(_replica_cells, shown)])
    numbers = {row["replica"] for row in shown}
    if rest := [row for row in rows if row["replica"] not in numbers]:
        states = Counter(map(_state, rest))
        counts = ", ".join(f"{num} {state}" for state, num in states.most_common())
        lines.append(f"and {len(rest)} more: {counts}; {option('--json')} has all")
    return lines


def _worth_showing(row: Mapping[str, Any]) -> tuple[int, float]:
    """Sort those first that do not run, then the slowest; those that have no rows are well."""
    return {"running": 1, "idle": 2}.get(_state(row), 0), row["requests_per_s"]


def _state(row: Mapping[str, Any]) -> str:
    """Name what the replica does; one that is not heard of may do anything."""
    is_silent = (row["look_age_s"] or 0.0) >= _SILENT_REPLICA_S
    return "silent" if is_silent else str(row["state"])


def _replica_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    state = _state(row)
    if state == "silent":
        state = f"silent for {duration(row['look_age_s'])}"
    usage = row["kv_cache_usage"]
    return (
        str(row["replica"]),
        str(row["worker"]),
        state,
        f"{row['requests_per_s']:,.0f}",
        f"{row['prompt_tokens_per_s']:,.0f}",
        f"{row['output_tokens_per_s']:,.0f}",
        f"{num_inside(row):,}",
        "" if usage is None else f"{usage:.0%}",
        str(row["restarts"]),
        row["host"] or "",
    )


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Align the lines of a table; the last column takes what is left of the width."""
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    lines = [
        "  ".join(
            f"{cell:{'<' if name in _LEFT else '>'}{width}}"
            for name, cell, width in zip(table[0], cells, widths, strict=True)
        )
        for cells in table
    ]
    return [line[:_WIDTH].rstrip() for line in lines]


@dataclass(frozen=True, slots=True)
class Listed:
    """What is listed of a snapshot."""

    number: int
    """Number of its plan, which `--snapshot` and `diff` take."""
    published_at: str
    run_id: str
    """The run that published it."""
    num_ok: int
    num_errors: int
    num_files: int
    size_bytes: int
    """Size of its files and its index; hard links in the output folder cost nothing more."""
    recipe: str
    """Fingerprint of the recipe, 32 hex digits."""
    is_shown: bool
    """Whether `part-*.parquet` in the output folder are its files."""
    overridden: list[str]
    """Limits of the gate that it exceeds and was published over."""


def listed(root: Root) -> list[Listed]:
    """List the snapshots under an output folder, newest last.

    Raises:
        OutputError: The folder was written by another version.
    """
    ledger = Ledger(storage_at(root))
    manifests = ledger.manifests()
    return [_line(ledger, one, is_newest=one is manifests[-1]) for one in manifests]


def _entries(manifest: Manifest) -> Sequence[PublishedFile]:
    """All files of a snapshot."""
    return [*manifest.files, *([manifest.index] if manifest.index is not None else [])]


def _line(ledger: Ledger, manifest: Manifest, *, is_newest: bool = False) -> Listed:
    return Listed(
        number=manifest.number,
        published_at=manifest.created_at,
        run_id=manifest.run_id,
        num_ok=manifest.num_ok,
        num_errors=manifest.num_errors,
        num_files=len(manifest.files),
        size_bytes=sum(entry.size_bytes for entry in _entries(manifest)),
        recipe=ledger.plan(manifest.number).recipe_fingerprint,
        is_shown=_is_shown(ledger.storage, manifest) if ledger.storage.shows else is_newest,
        overridden=[entry["name"] for entry in manifest.gate if entry.get("overridden")],
    )


def _is_shown(storage: LocalStorage, manifest: Manifest) -> bool:
    """The manifest is the commit point, but a run may have died before it exposed the files."""
    return not {*faults(storage, manifest.files).values()} - {Fault.FOREIGN}


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed, or would be."""

    removed: list[Listed]
    """Snapshots, the oldest first."""
    runs: list[str]
    """Runs whose logs and figures went."""
    freed_bytes: int
    """Size of the files that no other snapshot shares, and of those runs' folders."""


def prune(
    root: Root, keep: int = 1, *, older_than_s: float | None = None, dry_run: bool = False
) -> Pruned:
    """Remove old snapshots under an output folder, and what only they needed.

    Args:
        root: The output folder.
        keep: So many of the newest stay; at least 1.
        older_than_s: Only what is older than so many seconds goes; None: whatever its age.
        dry_run: Only tell what would go.

    Raises:
        BusyError: A run is at work on the job.
        OutputError: There is no job, or it is of another version.
    """
    storage = storage_at(root)
    if STATE not in storage.list(""):
        raise OutputError(f"{root}: there is no job here to prune")
    ledger = Ledger(storage)
    since = None if older_than_s is None else utc_now() - timedelta(seconds=older_than_s)
    what = Keep(keep, since)
    lock = RunLock(storage, f"prune-{new_run_id(utc_now())}")
    if not dry_run:
        lock.acquire(advice="prune when it has ended")
    try:
        found = outdated(ledger, what)
        pruned = Pruned(
            [_line(ledger, manifest) for manifest in found.manifests],
            [folder.rpartition("/")[2] for folder in found.runs],
            _freed_bytes(ledger, found),
        )
        if not dry_run:
            remove_outdated(ledger, what)
    finally:
        lock.release()
    return pruned


def _freed_bytes(ledger: Ledger, found: Outdated) -> int:
    gone = {one.number for one in found.manifests}
    sizes = {entry.name: entry.size_bytes for one in found.manifests for entry in _entries(one)}
    for manifest in ledger.manifests():
        if manifest.number not in gone:
            for entry in _entries(manifest):
                sizes.pop(entry.name, None)
    freed = sum(sizes.values())
    for run in found.runs:
        with suppress(OSError):  # Gone meanwhile, or another user's.
            freed += ledger.storage.num_bytes(run)
    return freed
