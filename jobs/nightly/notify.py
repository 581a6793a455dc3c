#!/usr/bin/env python3
"""Tells how a run ended, in one line. Gets the run's summary as JSON on stdin, see `on_finish`."""

import json
import sys


def main() -> None:
    """Print the line; put your mail or chat here."""
    summary = json.load(sys.stdin)
    run = summary.get("run", {})
    computed = run.get("num_ok", 0) + run.get("num_errors", 0)
    counts = ", ".join(f"{summary[f'num_{name}']:,} {name}" for name in ("ok", "errors", "left"))
    line = (
        f"nightly: {summary['state']} (exit {summary['exit_code']}): {counts}; "
        f"{computed:,} computed, {summary['num_carried']:,} taken over, "
        f"{summary['elapsed_s']:.0f} s"
    )
    reason = (summary["reason"] or "").partition("\n")[0]
    print(f"{line}; {reason}" if reason else line)


if __name__ == "__main__":
    main()
