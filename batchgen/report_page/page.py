"""The report as one HTML file: no script, nothing from elsewhere, a bounded size.

Whatever comes from data goes through `Texts`, which cuts it and shows control and direction
characters as escapes; Jinja escapes it then, for nothing but our own style and charts, which are
made of numbers, is marked as safe. Should that ever fail, the page's Content-Security-Policy
lets no script run, nothing load and no form be sent.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path

from batchgen import __version__
from batchgen.core.errors import OutputError
from batchgen.core.places import Root
from batchgen.core.runtime import printable
from batchgen.job.recipe import flat
from batchgen.pipeline.stats import duration
from batchgen.report_page.charts import charts
from batchgen.report_page.facts import Facts, ReportOptions, gather
from batchgen.storage.remote import storage_at
from batchgen.store.books import STATE

MOST_BYTES = 500_000
_TEXT_BYTES = 300_000
"""Of all texts that come from data, as they stand in the page."""
_MOST_CHARS = 600
_MOST_KEYS = 40
_STATES = {
    "complete": ("good", "Complete"),
    "nothing_to_do": ("good", "Nothing to do"),
    "answered": ("fair", "Answered, not published yet"),
    "running": ("fair", "At work"),
    "stopped": ("fair", "Stopped on purpose, with work left"),
    "over_limit": ("bad", "Held back by the gate, nothing is published"),
    "refused": ("bad", "Refused"),
    "killed": ("bad", "Killed, or the machine went down"),
}
_FAULT = ("bad", "Stopped by a fault")


class Texts:
    """Cuts texts, each and all of them together."""

    def __init__(self, num_bytes: int = _TEXT_BYTES) -> None:
        """Begin; so many bytes are left for all."""
        self._left = num_bytes

    def __call__(self, value: object, most: int = _MOST_CHARS) -> str:
        """Return a text as it may stand in the page, before it is escaped."""
        from markupsafe import escape

        text = str(value)
        shown = printable(text[:most])
        if len(text) > most:
            shown += f"\u2026 ({len(text):,} characters)"
        self._left -= len(escape(shown).encode())
        return shown if self._left >= 0 else "\u2026"


def render(facts: Facts, draw: Callable[..., Mapping[str, str]] = charts) -> str:
    """Write the page; `draw` makes its charts, see `charts`."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files("batchgen.report_page")
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "text": Texts(),
        "num": lambda number: f"{number:,.0f}",
        "percent": lambda share: f"{share:.1%}".replace("%", "\u00a0%"),
        "duration": duration,
    }
    page = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    drawn = draw(facts.samples, [at_s for at_s, _ in facts.deaths])
    state, verdict = _STATES.get(facts.summary["state"], _FAULT)
    return page.render(
        facts=facts,
        summary=facts.summary,
        run=facts.summary.get("run") or {},
        state=state,
        verdict=verdict,
        style=Markup(style),  # noqa: S704 - our own
        digest=digest,
        charts={title: Markup(svg) for title, svg in drawn.items()},  # noqa: S704 - of numbers
        samples=facts.samples[:: max(1, len(facts.samples) // 12)],
        engine=facts.summary.get("engine") or {},
        cost=_cost(facts),
        recipe=_recipe(facts),
        version=__version__,
    )


def _cost(facts: Facts) -> tuple[float, float, str] | None:
    """Work out the cost of 1,000 rows, of all that this run computed, and in what currency."""
    run = facts.summary.get("run") or {}
    num_rows = run.get("num_ok", 0) + run.get("num_errors", 0)
    if facts.options.price is None or not num_rows:
        return None
    hourly, currency = facts.options.price
    cost = hourly * run["elapsed_s"] / 3600
    return 1000 * cost / num_rows, cost, currency


def _recipe(facts: Facts) -> list[tuple[str, object]]:
    """List what decides answers, without hashes of files; examples are data, too."""
    tables = facts.plan.job.get("recipe", {}) if facts.plan is not None else {}
    found = list(flat({name: tables.get(name, {}) for name in ("prompt", "sampling", "model")}))
    hidden = ("model.files.",) if facts.options.with_rows else ("model.files.", "prompt.examples")
    shown = [(name, value) for name, value in found if not name.startswith(hidden)]
    return [(name, value) for name, value in shown if value not in (None, {})][:_MOST_KEYS]


def write_report(
    root: Root, options: ReportOptions, output: Path | None = None, run_id: str | None = None
) -> str:
    """Write the report of a run, and return where.

    Args:
        root: The output folder.
        options: What it tells.
        output: Its file; None: `report.html` in the run's folder.
        run_id: Of which run; None: the newest.

    Raises:
        OutputError: No run has been here, or the file cannot be written.
    """
    facts = gather(root, options, run_id)
    data = render(facts).encode()
    if output is None:
        storage = storage_at(root, temp_tag=f"report-{os.getpid()}")
        name = f"{STATE}/runs/{facts.run_id}/report.html"
        storage.replace(name, data)
        return f"{storage.where}/{name}"
    try:
        output.write_bytes(data)
    except OSError as error:
        msg = f"{output}: cannot be written ({error.strerror}); name another file"
        raise OutputError(msg) from error
    return str(output)
