"""What callers and phases of a run share: what it is asked for, where it is, how it ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.core.data import parse_state
from batchgen.core.errors import BatchgenError, ConfigError, StorageError
from batchgen.core.records import Completion, EngineFacts, EngineStats, Request, RowSet
from batchgen.core.runtime import Told, command
from batchgen.engine.order import held_size
from batchgen.engine.vllm.settings import settings_text
from batchgen.job.recipe import diff
from batchgen.pipeline.stats import RunStats, duration
from batchgen.store.books import STATE, Manifest, Plan

if TYPE_CHECKING:
    from batchgen.job.model import JobConfig, Tuned
    from batchgen.job.sampling import SamplingConfig
    from batchgen.pipeline.prepare import Prepared
    from batchgen.storage import LocalStorage
    from batchgen.store.ledger import Ledger
    from batchgen.store.runs import RunLock, RunLog


_NUM_TIMES = 20
SERVED = f"{STATE}/served.json"
_TOLD = ("root", "version", "text")
TEMPLATE_TOKENS = 128


class Stop(StrEnum):
    """How far a run has been asked to stop."""

    NO = "no"
    DRAIN = "drain"
    """Admit nothing more; let what is in flight finish within the grace."""
    NOW = "now"


class StopSwitch:
    """Asked by signal handlers and by the deadline, read by the runner. Only ever moves forward."""

    def __init__(self) -> None:
        self.state = Stop.NO
        self.reason: str | None = None
        """Why, if the run itself has asked."""
        self.is_patient = False
        """Who asked will say when to stop waiting for what is in flight: no grace is counted."""
        self.is_heard = False
        """A runner's loop is looking; nobody else has to act on a second asking."""

    def ask(self) -> None:
        """Ask once: drain. Ask again: now."""
        self.state = Stop.DRAIN if self.state is Stop.NO else Stop.NOW

    def drain(self) -> None:
        """Admit nothing more; `now` will come when it is time."""
        if self.state is Stop.NO:
            self.is_patient = True
            self.state = Stop.DRAIN

    def now(self) -> None:
        """Stop waiting."""
        self.state = Stop.NOW


class Purse:
    """What is left of a budget of tokens, `run.max_tokens_total`.

    A request is let in only if the most that it can cost is there, so that the budget is never
    overdrawn; when it comes back, what it has not used is free again.
    """

    def __init__(self, total: int, sampling: SamplingConfig) -> None:
        """Fill it.

        Args:
            total: Tokens.
            sampling: The job's; says how long answers may be.
        """
        self._left = total
        self._sampling = sampling
        self._set_aside: dict[int, int] = {}

    def pay(self, request: Request) -> bool:
        """Set aside what a request can cost; False if there is not so much."""
        most = (request.params or {}).get("max_tokens", self._sampling.max_tokens)
        # A token is hardly ever less than a character; some come with the chat template.
        cost = held_size(request.prompt) + TEMPLATE_TOKENS + most * self._sampling.n
        if cost > self._left:
            return False
        self._left -= cost
        self._set_aside[request.request_id] = cost
        return True

    def settle(self, completion: Completion) -> None:
        """Take what a request did cost, and give back the rest."""
        cost = (completion.num_prompt_tokens or 0) + (completion.num_output_tokens or 0)
        self._left += self._set_aside.pop(completion.request_id, 0) - cost


def rows_in_flight(grace_s: float) -> str:
    """Say what a stopping run does about them, for `stop_on_signals`."""
    if not grace_s:
        return "rows in flight are left to the next run"
    return f"up to {grace_s:g} s for rows in flight; {{again}} to drop them"


def ask_to_stop(stop: StopSwitch, grace_s: float = 0.0) -> Callable[[], str]:
    """Make what a signal asks: the run drains; asked a second time it stops now.

    Args:
        stop: The run's.
        grace_s: How long the rows in flight have.
    """

    def ask() -> str:
        is_first = stop.state is Stop.NO
        stop.ask()
        if not is_first and not stop.is_heard:
            raise KeyboardInterrupt  # Planning or publishing: nothing that could be drained.
        if not is_first:
            return "stopping now; rows in flight are left to the next run"
        if stop.is_heard:
            return f"stopping: {rows_in_flight(grace_s)}"
        return "stopping after this step; {again} to stop at once"

    return ask


@dataclass(slots=True)
class Notes:
    """Warnings: kept for the summary, and shown at once while there is a progress line."""

    texts: list[str] = field(default_factory=list)
    show: Callable[[str], None] | None = None

    def add(self, text: str) -> None:
        """Tell, once."""
        if text in self.texts:
            return
        self.texts.append(text)
        if self.show is not None:
            self.show(text)

    def show_by(self, show: Callable[[str], None]) -> None:
        """Show what was told already, and from now on each as it comes."""
        for text in self.texts:
            show(text)
        self.show = show


@dataclass(slots=True)
class Taken:
    """Rows of this run that no engine computed."""

    num_rows: int = 0
    """All of them, those that end without a result included."""
    num_copied: int = 0
    """Of these, copies of another row's answer."""
    num_ok: int = 0
    num_errors: int = 0
    num_skipped: int = 0
    known_at_s: float | None = None
    """When it was known which rows can be taken over, on the monotonic clock."""


@dataclass(frozen=True, slots=True)
class RunContext:
    """One run's own."""

    job: JobConfig
    run_id: str
    storage: LocalStorage
    ledger: Ledger
    lock: RunLock
    log: RunLog
    stats: RunStats
    stop: StopSwitch
    notes: Notes = field(default_factory=Notes)
    taken: Taken = field(default_factory=Taken)
    sample: Callable[[Prepared, Plan], RowSet] | None = None
    """Of `batchgen try`: chooses the rows that are asked; the others are skipped."""
    tries: str | None = None
    """Folder of the output with try-outs whose answers this run may use, see `tried_sources`."""
    is_trial: bool = False
    """Of `batchgen tune`: rows are to be alike from one trial to the next, so that the long ones
    are not first."""
    commits_s: list[float] = field(default_factory=list)
    """How long the last commits took; for the deadline."""
    deaths: list[str] = field(default_factory=list)
    """Why engines have died, one after the other."""

    def is_stopped(self) -> bool:
        """Whether the run has been asked to end early."""
        return self.stop.state is not Stop.NO

    def note_commit(self, seconds: float) -> None:
        """A commit took so long."""
        self.commits_s.append(seconds)
        del self.commits_s[:-_NUM_TIMES]

    def known_server(self, prepared: Prepared) -> dict[str, Any]:
        """Return what was kept of the server that has answered rows of this recipe."""
        with suppress(ValueError, TypeError, KeyError, StorageError):
            kept = parse_state(self.storage.read(SERVED) or b"")
            return dict(kept["served"]) if kept["of"] == prepared.recipe_fingerprint else {}
        return {}

    def keep_server(self, prepared: Prepared, facts: EngineFacts | None) -> None:
        """Keep by what a server's model is known again, and say what else it has become."""
        known = self.known_server(prepared)
        if facts is None or not facts.served or facts.served == known:
            return
        was, now = ({key: one.get(key) for key in _TOLD} for one in (known, facts.served))
        for line in diff(was, now) if known else ():
            self.notes.add(f"model.base_url: the server is not what it was, {line}")
        kept = {"of": prepared.recipe_fingerprint, "served": facts.served}
        self.storage.replace(SERVED, json.dumps(kept).encode())

    def note_death(self, death: Mapping[str, Any], whose: str = "") -> None:
        """Keep what is known of an engine's death, and warn of it.

        Args:
            death: `EngineDeath.as_dict`.
            whose: Text behind its number, where there are many engines.
        """
        self.deaths.append(str(death["reason"]))
        number = len(self.deaths)
        path = self.log.engine_death(number, death)
        self.notes.add(f"engine death {number}{whose}: {death['reason']}; see {path}")

    def tell_disk_trouble(self, error: StorageError) -> None:
        """A commit was refused."""
        grace = f"{self.job.run.disk_grace_s:.0f} s"
        self.notes.add(f"a commit was refused and is tried again for {grace}: {error}")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of `batchgen run`."""

    fresh: bool = False
    """Begin a new plan even if the old one is unfinished or another recipe's."""
    steal: bool = False
    """Take the job from a run that holds it and cannot be stopped, a frozen one."""
    retry_errors: bool = False
    """Run the error rows of a finished job again, and take its other rows over."""
    publish_anyway: bool = False
    """Publish although a limit of `[gate]` is exceeded."""

    accept_recipe: bool = False
    """Where the recipe has changed: begin a plan by the new one, and relabel every row."""
    only_errors: bool = False
    """With accept_recipe: take over what is ok; run error, edited and new rows."""
    rerender: bool = False
    """Run rows again that were made with an old rendering, see `rendering`."""
    wait: bool = False
    """Wait for a run that holds the job, and begin when it has ended."""
    until: datetime | None = None
    """Stop in time to have committed by then; aware."""
    max_runtime_s: float | None = None
    """The same as seconds from the start of the run."""

    def check(self) -> None:
        """Refuse what does not go together.

        Raises:
            ConfigError: With all of it.
        """
        wrong = {
            "fresh runs every row again and retry_errors only some, expected one of them": (
                self.fresh and self.retry_errors
            ),
            "fresh runs every row again and rerender only some, expected one of them": (
                self.fresh and self.rerender
            ),
            "fresh begins anew by any recipe, expected it without accept_recipe": (
                self.fresh and self.accept_recipe
            ),
            "wait waits for a run that holds the job and steal takes it, expected one of them": (
                self.wait and self.steal
            ),
            "only_errors says which rows a new recipe is for, expected accept_recipe with it": (
                self.only_errors and not self.accept_recipe
            ),
        }
        if problems := [problem for problem, is_wrong in wrong.items() if is_wrong]:
            raise ConfigError("run", problems)


@dataclass(frozen=True, slots=True)
class Moment:
    """One look. Each figure is right by itself; together they are of nearly one moment."""

    at_s: float
    """On the monotonic clock."""
    facts: EngineFacts | None
    """None until the engine is up."""
    engine: EngineStats
    num_in_flight: int
    """Requests that the engine holds, those that it prepares included."""
    num_ended: int
    """Rows that the engine has answered in this run, or failed to."""
    prompt_tokens: int
    """Of answers that are back."""
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, repr=False)
class Summary(Told):
    """One run. Counts are the job's; `run` has this run's own."""

    state: str
    """complete, nothing_to_do, stopped, over_limit, refused, fault."""
    exit_code: int
    run_id: str = ""
    output: str = ""
    reason: str | None = None
    """For every state but complete."""
    num_planned: int = 0
    num_ok: int = 0
    num_errors: int = 0
    num_skipped: int = 0
    num_left: int = 0
    num_durable: int = 0
    """Rows that no later run does again, while nothing is published."""
    num_carried: int = 0
    """Rows that this run took over from earlier plans, unread."""
    num_copied: int = 0
    """Rows that this run gave the answer of a row with an equal request."""
    num_old_rendering: int = 0
    """Rows that were made with an old rendering, kept or, if asked for, run again."""
    num_leaving: int = 0
    """Rows of the last snapshot that this run's plan has no row for, counted before it began."""
    files: list[str] = field(default_factory=list)
    """Published files, relative to `output`."""
    run: dict[str, Any] = field(default_factory=dict)
    """See `RunStats.totals`."""
    gate: list[dict[str, Any]] = field(default_factory=list)
    """Every figure of the gate, see `publish.Limit.as_dict`, once the job is complete."""
    engine: dict[str, Any] = field(default_factory=dict)
    started_at: str = ""
    run_date: str = ""
    """What `{date}` stands for in the job's paths."""
    planned_s: float = 0.0
    """Until it was known which rows there are and which of them can be taken over."""
    published_s: float | None = None
    """From the start until the snapshot was there to be read; None if this run published none."""
    elapsed_s: float = 0.0
    num_engine_warnings: int = 0
    """Different warnings and errors in the engine's own log, `vllm.log` beside the summary."""
    tuned: dict[str, Any] = field(default_factory=dict)
    """`path` of the tuned file and the `settings` that were used of it; empty without one."""
    warnings: list[str] = field(default_factory=list)
    error_examples: list[str] = field(default_factory=list)
    """A line for each type of error in the job: how many rows have it, and what is wrong with one
    of them. Filled in by the door, where the output can be read."""
    summary_path: str | None = None
    """None where nothing was done: nothing is written then."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    def as_text(self) -> str:
        """The lines that a person reads."""
        head = self.state.replace("_", " ")
        run = self.run
        limited = [entry for entry in self.gate if entry["limit"] is not None]
        limited = [e for e in limited if e["name"] != "max_shrink" or e["figure"] is not None]
        lines = {
            "rows": _counts(self),
            "of them": _origins(self),
            "errors": _ERRORS.join(self.error_examples) or _error_types(run),
            "retries": _retries(run) if run.get("num_retries") else "",
            **(_speed(self) if self.engine else {}),
            "tuned": _tuned(self.tuned) if self.tuned else "",
            "gate": ", ".join(map(_limit, limited)),
            "output": _files(self),
            "report": _report(self),
            "log": _log(self),
            "see": command("show", "--errors") if self.num_errors else "",
        }
        warnings = [f"warning: {text}" for text in self.warnings]
        return "\n".join(
            [*warnings, f"{head}: {self.reason}" if self.reason else head, *table(lines)]
        )


def _counts(summary: Summary) -> str:
    skipped = f", {summary.num_skipped:,} skipped" if summary.num_skipped else ""
    left = f", {summary.num_left:,} left" if summary.num_left else ""
    return f"{summary.num_ok:,} ok, {summary.num_errors:,} errors{skipped}{left}"


_ERRORS = "\n" + " " * 11
"""Each on a line of its own, below the first."""


def _error_types(run: Mapping[str, Any]) -> str:
    return ", ".join(f"{kind} {num:,}" for kind, num in run.get("error_types", {}).items())


def _origins(summary: Summary) -> str:
    """Say where a run's rows come from; empty if it computed them all."""
    if not summary.num_carried and not summary.num_copied:
        return ""
    num_computed = summary.run.get("num_ok", 0) + summary.run.get("num_errors", 0)
    return (
        f"{summary.num_carried:,} taken over, {summary.num_copied:,} copied from equal rows, "
        f"{num_computed:,} computed in this run"
    )


def _retries(run: Mapping[str, Any]) -> str:
    verdicts = run["verdicts"]
    num_asked = sum(verdicts.get("1", {}).values())
    num_at_first = verdicts.get("1", {}).get("ok", 0)
    num_ok = sum(found.get("ok", 0) for found in verdicts.values())
    return (
        f"{run['num_retries']:,} attempts more: {num_at_first / max(num_asked, 1):.1%} of the "
        f"answers ok at first, {num_ok / max(num_asked, 1):.1%} in the end"
    )


def _speed(summary: Summary) -> dict[str, str]:
    run = summary.run
    chosen = settings_text(summary.engine["settings"])
    start, work = duration(summary.engine["startup_s"]), duration(run["working_s"])
    return {
        "time": f"{duration(summary.elapsed_s)}: engine start {start}, work {work}",
        "speed": (
            f"{run['requests_per_s']:,.0f} rows/s, "
            f"{run['num_prompt_tokens'] / run['working_s']:,.0f} tokens/s in, "
            f"{run['output_tokens_per_s']:,.0f} out"
        ),
        "engine": chosen,
    }


def _tuned(tuned: Mapping[str, Any]) -> str:
    used = ", ".join(f"{name} = {value}" for name, value in tuned["settings"].items())
    return f"{used or 'nothing'} by {tuned['path']}"


def _limit(entry: Mapping[str, Any]) -> str:
    most = "least" if entry["name"].startswith("min_") else "most"
    name = entry["name"].removeprefix("max_").removeprefix("min_").replace("_", " ")
    figure = "unknown" if entry["figure"] is None else f"{entry['figure']:.3g}"
    name += f" of {entry['column']}" if entry.get("column") else ""
    return f"{name} {figure} of at {most} {entry['limit']:g}"


def _files(summary: Summary) -> str:
    more = f" and {len(summary.files) - 1} more" if len(summary.files) > 1 else ""
    return f"{summary.output}/{summary.files[0]}{more}" if summary.files else ""


def _report(summary: Summary) -> str:
    """Name the page about the run, if the door has written one beside the summary."""
    path = Path(summary.summary_path).with_name("report.html") if summary.summary_path else None
    return str(path) if path is not None and path.exists() else ""


def _log(summary: Summary) -> str:
    if not summary.num_engine_warnings or not summary.summary_path:
        return ""
    folder = Path(summary.summary_path).parent
    log = folder / "vllm.log"
    place = log if log.exists() else folder
    return f"{place} ({summary.num_engine_warnings} different warnings)"


def table(rows: Mapping[str, str]) -> list[str]:
    """Write lines of a name and a text each; those without a text are left out."""
    return [f"  {name:8} {text}" for name, text in rows.items() if text]


def state_of(error: BatchgenError) -> str:
    """Return the state of a run that ended with an error."""
    return error.exit_code.name.lower()


def job_counts(
    manifest: Manifest | None, stats: RunStats, taken: Taken, resumed: tuple[int, int, int]
) -> dict[str, int]:
    """Count the job's rows: as the snapshot has them, else as this and earlier runs did.

    Args:
        manifest: Of the job's plan.
        stats: Of this run.
        taken: Of this run.
        resumed: ok, errors and skipped rows of earlier runs.
    """
    if manifest is not None:
        return {
            "num_planned": manifest.num_planned,
            "num_ok": manifest.num_ok,
            "num_errors": manifest.num_errors,
            "num_skipped": manifest.num_skipped,
            "num_left": 0,
        }
    return {
        "num_planned": stats.num_rows,
        "num_ok": stats.num_ok + taken.num_ok + resumed[0],
        "num_errors": stats.num_errors + taken.num_errors + resumed[1],
        "num_skipped": stats.num_skipped + taken.num_skipped + resumed[2],
        "num_left": stats.num_left,
    }


def tuned_dict(tuned: Tuned | None) -> dict[str, Any]:
    """Return the tuned file that was used as plain values; empty if none was."""
    if tuned is None or (tuned.note is not None and not tuned.settings):
        return {}
    return {"path": tuned.path, "settings": dict(tuned.settings)}


def engine_dict(facts: EngineFacts | None) -> dict[str, Any]:
    """Return the engine's facts as plain values; empty if it never came up."""
    names = (name for name in facts.__slots__ if name != "served") if facts else ()
    return {name: getattr(facts, name) for name in names}
