"""Arguments that many commands take, and how their results are printed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

JOB = click.argument("job", type=click.Path(path_type=Path))
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Override a key of the job file; may be given often.",
)
TUNED = click.option(
    "--no-tuned",
    "tuned",
    flag_value=False,
    default=True,
    help="Do not use what `batchgen tune` found for this job.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
DATE = click.option(
    "--date",
    "run_date",
    type=click.DateTime(["%Y-%m-%d"]),
    metavar="YYYY-MM-DD",
    help="The date that {date} in paths stands for. Default: today, where this machine is.",
)


class Number(click.FloatRange):
    """A finite number in a range: click's own lets NaN through, which is in no range."""

    def convert(
        self,
        value: Any,  # noqa: ANN401 - as click has it
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> float:
        """See click; refuses what is not finite, too."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def stop_on_signals(ask: Callable[[int, Any], None]) -> None:
    """Have SIGTERM, Ctrl-C and the end of the terminal ask for a stop.

    Args:
        ask: Gets the signal and its frame.
    """
    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # As under nohup.
        signal.signal(signal.SIGHUP, ask)


def say_stopping(text: str, signum: int) -> None:
    """Answer a signal at once: what the run does about it, and what a second one would do.

    Writes to the descriptor: sys.stderr may be in the middle of a line of the progress, and
    refuses to be entered again.

    Args:
        text: `{again}` in it is what the person does once more.
        signum: The signal.
    """
    again = "Ctrl-C again" if signum == signal.SIGINT else f"{signal.Signals(signum).name} again"
    line = f"batchgen: {text.format(again=again)}\n"
    with contextlib.suppress(OSError):  # Nobody reads it, and the run is to drain all the same.
        os.write(2, ("\n" if os.isatty(2) else "").encode() + line.encode())


def rows_in_flight(grace_s: float) -> str:
    """What a stopping run does about them, for `say_stopping`."""
    if not grace_s:
        return "rows in flight are left to the next run"
    return f"up to {grace_s:g} s for rows in flight; {{again}} to drop them"


def print_json(fields: Mapping[str, Any]) -> None:
    """One object on one line of stdout."""
    click.echo(json.dumps(fields, default=str))


def flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested facts as lines, `run.pid` for a fact in another; what is unknown left out."""
    found: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            found += flat(value, f"{prefix}{name}.")
        elif value is not None:
            found.append((f"{prefix}{name}", f"{value:.1f}" if isinstance(value, float) else value))
    return found
