"""The shipped jobs on a GPU: schemas, probabilities, retries, votes, adapters.

    python -m tests.gpu.answers

Prints one JSON line a job: what became of the rows, and how many answers are right. The tests do
the same on a CPU; this is for another device and another version of vLLM.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import polars as pl

import batchgen

JOBS = Path(__file__).parents[2] / "jobs"
LABEL = pl.col("gen_label") == pl.col("gold_label")


def quickstart(folder: Path, *overrides: str) -> dict[str, Any]:
    """A schema with enums, and probabilities."""
    frame, told = _run("quickstart", folder, *overrides)
    ok = frame.filter(gen_status="ok")
    chances = ok.select(
        total=pl.sum_horizontal(pl.col("gen_probabilities").struct.field("label").struct.unnest())
    )["total"]
    return told | {
        "labels_right": ok.select(LABEL.mean()).item(),
        "probabilities_sum": [chances.min(), chances.mean(), chances.max()],
    }


def retries(folder: Path, *overrides: str) -> dict[str, Any]:
    """A ladder: verdicts of each attempt are in `verdicts`."""
    frame, told = _run("retries", folder, *overrides)
    return told | {"labels_right": frame.select(LABEL.mean()).item()}


def votes(folder: Path, *overrides: str) -> dict[str, Any]:
    """Five samples of a choice, and their vote."""
    frame, told = _run("vote", folder, *overrides)
    agreed = frame.group_by("gen_agreement").agg(right=LABEL.mean(), rows=pl.len())
    return told | {
        "labels_right": frame.select(LABEL.mean()).item(),
        "right_by_agreement": agreed.sort("gen_agreement").rows(),
    }


def adapters(folder: Path, *overrides: str) -> dict[str, Any]:
    """Two adapters and the model itself in one batch."""
    frame, told = _run("adapters", folder, *overrides)
    right = frame.group_by("adapter").agg(
        right=(pl.col("gen_text") == pl.col("gold")).mean(), rows=pl.len()
    )
    return told | {"right_by_adapter": right.rows()}


def _run(name: str, folder: Path, *overrides: str) -> tuple[pl.DataFrame, dict[str, Any]]:
    output = folder / name
    summary = batchgen.run(JOBS / f"{name}.toml", overrides=[f"output.path={output}", *overrides])
    told = {
        "job": name,
        "state": summary.state,
        "ok": summary.num_ok,
        "errors": summary.num_errors,
        "verdicts": summary.run["verdicts"],
        "engine": summary.engine,
        "working_s": round(summary.run["working_s"], 1),
    }
    return batchgen.read(output).collect(), told


def main() -> None:
    """Run all of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE")
    args = parser.parse_args()
    for job in (quickstart, retries, adapters, votes):
        with tempfile.TemporaryDirectory() as name:
            print(json.dumps(job(Path(name), *args.set), default=str), flush=True)


if __name__ == "__main__":
    main()
