"""A world of input files that change from night to night, and what each night must come to.

A row's prompt is its column `text` and nothing else, so an answer may be reused exactly where the
text is one that was answered before. `note` is carried: it must come from the row as it is now.
"""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

import polars as pl

import batchgen
from batchgen.storage import LocalStorage
from batchgen.store.ledger import Ledger
from tests.e2e.support import VOLATILE, write_job

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from batchgen.store.books import Durable

Row = dict[str, Any]
Line = Row | str
"""A row, or a physical line as it is: bad or blank."""
Origins = dict[str, set[tuple[str, float]]]
"""Text of an answered row -> run and latency of its answer, several where several rows have it."""

SCHEMA = {"id": pl.Int64, "text": pl.String, "note": pl.String}
BAD = {"jsonl": '{"id": 1, "text": ', "csv": "1,2,3,4,5"}
TOO_LONG = "long " * 60
"""A prompt that the engine refuses: an error row that has a request key."""
ENGINE = {"max_model_len": 250, "step_s": 0.04, "max_num_seqs": 512}
SLOW = ("--set", "model.engine.max_num_seqs=1")
"""A row takes 40 ms: what happens meanwhile is not outrun on a busy machine."""


def make_rows(start: int, stop: int) -> list[Line]:
    """Rows with unlike texts."""
    return [
        {"id": n, "text": f"row {n} " + "lorem " * (n % 13), "note": f"note {n % 7}"}
        for n in range(start, stop)
    ]


class World:
    """A folder with input files of one format and a job over all of them."""

    def __init__(self, folder: Path, kind: str = "jsonl", **tables: Any) -> None:
        """Make the job; `tables` are as for `write_job`."""
        self.folder = folder
        self.kind = kind
        self.out = folder / "out"
        self.files: dict[str, list[Line]] = {}
        (folder / "data").mkdir()
        self.job = write_job(
            folder,
            f"data/*.{kind}",
            **{
                "model": {"backend": "echo", "engine": ENGINE},
                "sampling": {"max_tokens": 60},
                "gate": {"max_error_rate": 1.0, "max_shrink": 1.0},
                "run": {"flush_rows": 20, **tables.pop("run", {})},
                **tables,
            },
        )
        self._num_recomputed = 0

    def path(self, name: str) -> Path:
        """Of an input file."""
        return self.folder / "data" / f"{name}.{self.kind}"

    def write(self) -> None:
        """Bring the folder to `files`; what is there already is not touched."""
        wanted = {self.path(name): self._encoded(lines) for name, lines in self.files.items()}
        for path in (self.folder / "data").iterdir():
            if path not in wanted:
                path.unlink()
        for path, data in wanted.items():
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)

    def _encoded(self, lines: Sequence[Line]) -> bytes:
        if self.kind == "jsonl":
            texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
            return "".join(f"{text}\n" for text in texts).encode()
        rows = [line for line in lines if isinstance(line, dict)]
        file = io.BytesIO()
        if self.kind == "parquet":
            pl.DataFrame(rows, schema=SCHEMA).write_parquet(file, row_group_size=50)
            return file.getvalue()
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(SCHEMA)
        for line in lines:
            if isinstance(line, str):
                table.write(f"{line}\r\n")
            else:
                writer.writerow(line.values())
        return table.getvalue().encode()

    def first_night(self) -> None:
        """Three files with bad, blank and refused rows, and equal texts with unlike notes."""
        rows = make_rows(0, 220)
        rows[30] = rows[90] = BAD.get(self.kind, rows[30])
        rows[40] = rows[150] = "" if self.kind != "parquet" else rows[40]
        rows[50] = {"id": 50, "text": TOO_LONG, "note": "refused"}
        rows[60] = {"id": 60, "text": "row 0 ", "note": "the text of row 0"}
        rows[160] = {"id": 160, "text": "row 0 ", "note": "the text of row 0 again"}
        self.files = {"a": rows[:100], "b": rows[100:170], "c": rows[170:]}
        self.write()

    def published(self) -> list[Row]:
        """Every published row, volatile columns included."""
        return batchgen.read(self.out).collect().to_dicts()

    def recomputed(self, overrides: Sequence[str] = ()) -> list[Row]:
        """What a first run over the input as it is now publishes."""
        self._num_recomputed += 1
        out = self.folder / f"recomputed-{self._num_recomputed}"
        summary = batchgen.run(self.job, overrides=[f"output.path={out}", *overrides])
        assert summary.state == "complete"
        return batchgen.read(out).collect().to_dicts()

    def durable(self) -> Durable:
        """What the newest plan has, published or not."""
        ledger = Ledger(LocalStorage(self.out))
        plan = ledger.latest_plan()
        assert plan is not None
        return ledger.durable(plan)

    def durable_rows(self) -> list[Row]:
        """Rows of the newest plan's accepted parts."""
        storage = LocalStorage(self.out)
        paths = [storage.path(part.name) for part in self.durable().parts]
        return [row for path in paths for row in pl.read_parquet(path).to_dicts()]


def steady(rows: Iterable[Row]) -> list[Row]:
    """Rows without what may differ between equal snapshots."""
    return [{name: row[name] for name in row if name not in VOLATILE} for row in rows]


def origins(rows: Iterable[Row]) -> Origins:
    """Who answered which text."""
    found: Origins = {}
    for row in rows:
        if row["gen_status"] == "ok":
            origin = (row["gen_run_id"], row["gen_latency_s"])
            found.setdefault(row["text"], set()).add(origin)
    return found


def check_night(
    world: World,
    summary: Mapping[str, Any],
    known: Origins,
    *,
    overrides: Sequence[str] = (),
    new_errors: int | None = None,
    is_deduped: bool = True,
) -> Origins:
    """Compare a night with a full recompute, and what it computed with what was new.

    Args:
        world: After the night.
        summary: Of the run that published.
        known: Answers that the night could reuse; their texts may not be computed again.
        overrides: What the run was told with `--set` that is part of the recipe.
        new_errors: How many errors this run came to; None: from none to all.
        is_deduped: Whether equal texts run once.

    Returns:
        What the next night may reuse.
    """
    now = world.published()
    assert steady(now) == steady(world.recomputed(overrides))
    answered = [row for row in now if row["gen_status"] == "ok"]
    new = [row for row in answered if row["text"] not in known]
    for row in answered:
        if row["text"] in known:
            assert (row["gen_run_id"], row["gen_latency_s"]) in known[row["text"]]
        else:
            assert row["gen_run_id"] == summary["run_id"]
    num_errors = len(now) - len(answered)
    assert summary["state"] == "complete"
    assert (summary["num_ok"], summary["num_errors"]) == (len(answered), num_errors)
    computed = len({row["text"] for row in new}) if is_deduped else len(new)
    assert summary["run"]["num_ok"] == computed
    if new_errors is None:
        assert summary["run"]["num_errors"] <= num_errors
    else:
        assert summary["run"]["num_errors"] == new_errors
    return origins(now)
