"""Digest files: what was scanned under the name of the content, or nothing at all."""

from __future__ import annotations

import errno
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.core.errors import StorageError
from batchgen.source.text import DIGEST_BYTES, NO_DIGEST, scan_lines
from batchgen.storage import Disk, LocalStorage
from batchgen.store.matching import DIGESTS, DigestFile, blocks, digest_reader, digests_of
from tests.harm import overwrite

ROWS = [hashlib.sha256(bytes([number])).digest()[:DIGEST_BYTES] for number in range(10)]


def put(storage, rows, digest="abc"):
    file = DigestFile(storage)
    for row in rows:
        file.add(row)
    file.commit(digest)
    return storage.path(digests_of(digest))


def test_the_digests_of_a_scan_are_found_by_the_files_content(storage):
    put(storage, ROWS)
    read = digest_reader(storage, "abc", 10)
    assert read(0, 10) == b"".join(ROWS)
    assert read(3, 5) == ROWS[3] + ROWS[4]
    assert read(4, 4) == b""
    assert storage.list(DIGESTS) == [f"{DIGESTS}/abc.bin"]


def test_a_lines_digest_is_the_first_half_of_its_sha256(tmp_path):
    lines = [b'{"a": 1}', b"", b"{bad", '{"a": "\u00e9"}\r'.encode(), b'{"a": 1}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    told = []
    scan = scan_lines(str(tmp_path / "in.jsonl"), told.append)
    assert b"".join(told) == b"".join(hashlib.sha256(line).digest()[:16] for line in lines)
    assert scan.num_rows == len(lines)
    assert scan.digest == hashlib.sha256(b"\n".join(lines)).hexdigest()


def test_two_files_of_one_content_have_one_digest_file(storage):
    first, second = DigestFile(storage), DigestFile(storage)
    for file in (first, second):
        file.add(ROWS[0])
    first.commit("abc")
    second.commit("abc")
    assert [path.name for path in storage.path(DIGESTS).iterdir()] == ["abc.bin"]


def test_nothing_is_left_of_what_told_no_row_or_was_dropped(storage):
    DigestFile(storage).commit("abc")
    dropped = DigestFile(storage)
    dropped.add(ROWS[0])
    dropped.discard()
    assert list(storage.path(DIGESTS).iterdir()) == []


class FullDisk(Disk):
    """Takes one write."""

    num_writes = 0

    def write(self, file, data):
        self.num_writes += 1
        if self.num_writes > 1:
            raise OSError(errno.ENOSPC, "no space")
        super().write(file, data)


def test_a_disk_that_is_full_is_told_at_the_end_and_nothing_is_left(tmp_path):
    """The scan's own errors are those of the input."""
    disk = FullDisk()
    storage = LocalStorage(tmp_path / "out", disk=disk)
    file = DigestFile(storage)
    for row in ROWS:
        file.add(row)
    assert disk.num_writes == 2  # It is not asked again.
    with pytest.raises(StorageError, match=f"{DIGESTS}: no space"):
        file.commit("abc")
    assert list(storage.path(DIGESTS).iterdir()) == []


@pytest.mark.parametrize("num_bytes", [0, 1, 15, 16, 9 * 16, 10 * 16 - 1])
def test_a_file_that_is_torn_or_gone_tells_nothing(storage, num_bytes):
    assert digest_reader(storage, "abc", 1) is None
    path = put(storage, ROWS)
    overwrite(path, path.read_bytes()[:num_bytes])
    assert digest_reader(storage, "abc", 10) is None


def test_a_file_may_have_more_rows_than_are_planned(storage):
    put(storage, ROWS)
    assert digest_reader(storage, "abc", 3)(0, 3) == b"".join(ROWS[:3])


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_file_that_shrinks_while_it_is_read_leaves_rows_unknown(storage, is_gone):
    path = put(storage, ROWS)
    read = digest_reader(storage, "abc", 10)
    if is_gone:
        path.unlink()
        kept = b""
    else:
        overwrite(path, path.read_bytes()[: 2 * 16 + 5])
        kept = ROWS[1] + ROWS[2][:5]
    assert read(1, 4) == kept.ljust(3 * 16, b"\0")
    assert read(3, 4) == NO_DIGEST


@given(st.integers(0, 40), st.integers(1, 12))
def test_blocks_cover_every_row_once_in_order(num_rows, size):
    found = list(blocks(num_rows, size))
    assert [row for start, stop in found for row in range(start, stop)] == list(range(num_rows))
    assert all(0 < stop - start <= size for start, stop in found)
