"""What changed between two nights that share files, told without reading what they share."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest

import batchgen
from batchgen.core.errors import OutputError
from batchgen.storage import LocalStorage
from batchgen.store.keys import KEYS, keys_of
from batchgen.store.ledger import Ledger
from batchgen.store.prune import Keep, prune
from batchgen.views.diff import diff
from tests.harm import flip

if TYPE_CHECKING:
    from pathlib import Path

NUM_FILES, NUM_ROWS = 4, 1500
LABELS = ["yes", "no"]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Files of rows that do not compress, so that a snapshot of them is of several files."""
    rng = random.Random(0)
    for number in range(NUM_FILES):
        rows = [
            {
                "id": f"{number}-{row}",
                "text": rng.randbytes(400).hex(),
                "label": rng.choice(LABELS),
            }
            for row in range(NUM_ROWS)
        ]
        write(tmp_path, number, rows)
    return tmp_path


def write(folder: Path, number: int, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"in-{number}.jsonl").write_text(lines, encoding="utf-8")


def read(folder: Path, number: int) -> list[dict[str, Any]]:
    lines = (folder / f"in-{number}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def night(folder: Path) -> None:
    batchgen.run(
        {
            "input": {"path": str(folder / "in-*.jsonl")},
            "prompt": {"user": "{{ label }}"},
            "model": {"backend": "echo"},
            "sampling": {"max_tokens": 20, "temperature": 0},
            "output": {"path": str(folder / "out"), "choice": LABELS},
        }
    )


def test_files_that_two_nights_share_are_not_read_and_counted_all_the_same(world: Path) -> None:
    night(world)
    rows = read(world, 1)
    rows[700]["text"] = "edited"
    del rows[:100]
    write(world, 1, rows)
    write(world, 3, [{"id": "new", "text": "of tonight", "label": "no"}, *read(world, 3)])
    night(world)
    by_place, by_key = diff(world / "out"), diff(world / "out", on=["id"])
    counts = ("num_same", "num_added", "num_removed", "num_input_changed", "num_answer_changed")
    for found in (by_place, by_key):
        assert [getattr(found, name) for name in counts] == [5899, 1, 100, 1, 0]
    assert by_place.labels == by_key.labels
    assert sum(move["num_rows"] for move in by_place.labels[0].moves) == 5900
    assert by_place.examples[0]["where"].endswith("in-1.jsonl row 600")
    old, new = (names(world, number) for number in (1, 2))
    shared = [name for name in new if name in old]
    assert 2 < len(shared) < len(new)
    # Only the answer's column is read of them: a long text of theirs may be damaged.
    for name in shared:
        damage_text(world / "out" / name)
    assert diff(world / "out") == by_place
    with pytest.raises(OutputError, match="cannot be read"):
        diff(world / "out", on=["id"])


def test_keys_of_files_go_with_the_files(world: Path) -> None:
    night(world)
    rows = read(world, 2)
    write(world, 2, [{**row, "label": "no"} for row in rows])
    night(world)
    ledger = Ledger(LocalStorage(world / "out"))
    old, new = (set(map(keys_of, names(world, number))) for number in (1, 2))
    assert old - new
    assert set(ledger.storage.list(KEYS)) == old | new
    prune(ledger, Keep(1))
    assert set(ledger.storage.list(KEYS)) == new


def names(folder: Path, number: int) -> list[str]:
    manifest = Ledger(LocalStorage(folder / "out")).manifest(number)
    assert manifest is not None
    return [file.name for file in manifest.files]


def damage_text(path: Path) -> None:
    """A bit of the first row group's texts, so that their page's checksum is wrong."""
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(at) for at in range(group.num_columns)]
    text = next(column for column in columns if column.path_in_schema == "text")
    flip(path, text.data_page_offset + text.total_compressed_size // 2)
