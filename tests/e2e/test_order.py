"""The order of admission never shows: not in what is published, not after a kill."""

from __future__ import annotations

import json
import random
import subprocess
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest

import batchgen
from batchgen import api
from batchgen.engine.order import Lengths
from batchgen.pipeline.compute import lengths_of
from batchgen.storage import LocalStorage
from batchgen.store.ledger import Ledger
from tests.e2e.support import command, published, wait_until, write_job

if TYPE_CHECKING:
    from pathlib import Path

NUM_ROWS = 3000
RECIPE = ("gen_recipe", "gen_request_key")
SLOW = {"max_num_seqs": 50, "step_s": 0.01, "max_steps": 4}


def write_input(path: Path) -> Path:
    """Groups with a common beginning, interleaved; unlike bounds; bad, blank and equal rows."""
    dice = random.Random(1)
    heads = [f"document {group} " * 40 for group in range(20)]
    lines = []
    for number in range(NUM_ROWS):
        text = f"{dice.choice(heads)} question {number % 2900}"
        bound = dice.choice([4, 8, 60, 400])
        row = {
            "id": number,
            "text": text,
            "tags": ["a"] * (number % 3),
            "own": {"max_tokens": bound},
        }
        good = json.dumps(row)
        lines.append("{bad" if number % 97 == 5 else "" if number % 89 == 3 else good)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_job(folder: Path, order: str, engine: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    return write_job(
        folder,
        str(folder.parent / "in.jsonl"),
        input={"columns": ["id", "tags"]},
        sampling={"column": "own"},
        model={"engine": engine or {}},
        run={"order": order, "flush_rows": 200},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("order")
    write_input(made / "in.jsonl")
    return made


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[dict[str, Any]]:
    batchgen.run(make_job(folder / "input", "input"))
    return answers(folder / "input" / "out")


def answers(out: Path) -> list[dict[str, Any]]:
    """Published rows without what the echo engine's speed has a part in: the recipe."""
    return [
        {name: value for name, value in row.items() if name not in RECIPE} for row in published(out)
    ]


@pytest.mark.parametrize("order", ["auto", "prefix"])
def test_every_order_publishes_the_same(
    folder: Path, expected: list[dict[str, Any]], order: str
) -> None:
    summary = batchgen.run(make_job(folder / order, order))
    assert summary.num_ok == sum(row["gen_status"] == "ok" for row in expected) > 2000
    assert answers(folder / order / "out") == expected


@pytest.mark.parametrize("order", ["auto", "prefix"])
def test_a_kill_costs_no_row_and_long_answers_came_first(
    folder: Path, expected: list[dict[str, Any]], order: str
) -> None:
    job = make_job(folder / f"killed-{order}", order, SLOW)
    out = job.parent / "out"
    with subprocess.Popen(command("run", job), stderr=subprocess.DEVNULL) as run:
        wait_until(lambda: len(list(out.glob("_batchgen/parts/e*.parquet"))) >= 2)
        run.kill()
    lines = (folder / "in.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.startswith('{"')]
    long = {row["id"] for row in rows if row["own"]["max_tokens"] == 400}
    part = pl.read_parquet(out / "_batchgen" / "parts" / "e000001-w00-s000000.parquet")
    first = part.filter(pl.col("gen_status") == "ok")["id"].to_list()
    assert len(first) > 50
    assert set(first) <= long
    batchgen.run(job)
    assert answers(out) == expected


def test_what_was_published_says_how_long_answers_will_be(tmp_path: Path) -> None:
    texts = ["short", "long " * 300] * 20
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "in.jsonl").write_text(rows, encoding="utf-8")
    path = write_job(tmp_path, "in.jsonl", sampling={"max_tokens": 900})
    job, ledger = api.load(path), Ledger(LocalStorage(tmp_path / "out"))
    assert lengths_of(job, ledger) == Lengths(900)
    batchgen.run(path)
    # The echo engine's tokens are bytes, so a prompt of 15 tokens stands for one of 60 characters.
    lengths = lengths_of(job, ledger)
    assert lengths.expect("x" * 60, None) == len("Repeat: short")
    assert lengths.expect("x" * 6000, None) == 900
    assert lengths.expect("x" * 600, None) == 900, "nothing is known of that size"
    manifest = ledger.latest_manifest()
    assert manifest is not None
    for file in manifest.files:
        ledger.storage.path(file.name).unlink()
    assert lengths_of(job, ledger) == Lengths(900)
