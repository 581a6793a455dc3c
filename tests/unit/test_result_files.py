"""One policy for damage: what is not what was written is left out, and the file says why."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.core.errors import StorageError
from batchgen.store.result_files import OTHER_BYTES, Chunk, ResultFile
from tests.harm import overwrite

if TYPE_CHECKING:
    from pathlib import Path

TABLE = pa.table({"key": [f"k{number}" for number in range(30)], "row": list(range(30))})
NUM_GROUPS = 3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "part.parquet"
    pq.write_table(TABLE, path, row_group_size=10, write_page_checksum=True, compression="none")
    return path


def chunks_of(path: Path) -> list[Chunk]:
    """As the index keeps them: the row groups, and last the footer."""
    metadata, data = pq.read_metadata(path), path.read_bytes()
    groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
    first = [group.column(0) for group in groups]
    starts = [column.dictionary_page_offset or column.data_page_offset for column in first]
    stops = [*starts[1:], len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data)]
    found, start = [], 0
    for stop in stops:
        found.append(Chunk(stop, hashlib.sha256(data[start:stop]).hexdigest()))
        start = stop
    return found


def damaged(path: Path, at: int) -> Path:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    overwrite(path, bytes(data))
    return path


def rows_of(file: ResultFile) -> list[int]:
    return [row for _, table in file.groups() for row in table["row"].to_pylist()]


def test_a_whole_file_is_read_in_order_and_has_no_problem(path: Path) -> None:
    with ResultFile(path, chunks_of(path)) as file:
        assert file.num_groups == NUM_GROUPS
        assert rows_of(file) == list(range(30))
        assert file.group(1, ["row"]).column_names == ["row"]
        assert file.problem is None


@pytest.mark.parametrize("is_published", [True, False])
def test_of_a_damaged_row_group_the_others_count(path: Path, *, is_published: bool) -> None:
    chunks = chunks_of(path) if is_published else []
    at = chunks_of(path)[0].end + 60  # In a page of the second group.
    with ResultFile(damaged(path, at), chunks) as file:
        assert rows_of(file) == [*range(10), *range(20, 30)]
        assert file.problem


def test_bytes_without_a_page_checksum_are_held_against_the_hash(path: Path) -> None:
    chunks = chunks_of(path)
    page_header = pq.read_metadata(path).row_group(0).column(1).data_page_offset + 1
    with ResultFile(damaged(path, page_header), chunks) as file:
        assert file.group(0) is None
        assert file.problem == OTHER_BYTES


@pytest.mark.parametrize("harm", ["flipped", "cut", "grown", "gone", "empty"])
def test_with_a_damaged_footer_nothing_is_believed(path: Path, harm: str) -> None:
    chunks, data = chunks_of(path), path.read_bytes()
    if harm == "flipped":
        damaged(path, len(data) - 20)
    elif harm == "gone":
        path.unlink()
    else:
        overwrite(path, {"cut": data[:-9], "grown": data + b"x", "empty": b""}[harm])
    with ResultFile(path, chunks) as file:
        assert (file.num_groups, file.footer, dict(file.metadata)) == (0, None, {})
        assert rows_of(file) == []
        assert file.group(0) is None
        assert file.problem


def test_a_column_that_is_not_there_is_damage(path: Path) -> None:
    with ResultFile(path) as file:
        assert file.group(0, ["row", "other"]) is None
        assert file.problem == "lacks the columns ['other']"


def test_what_cannot_be_read_right_now_is_no_damage(path: Path) -> None:
    with ResultFile(path / "x") as file, pytest.raises(StorageError, match="Not a directory"):
        _ = file.num_groups
    assert file.problem is None
