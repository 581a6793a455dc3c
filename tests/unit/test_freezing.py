"""A prepared job frozen to a plan: what is read again, what is known, what is left for later."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.core.errors import InputChangedError, SourceError
from batchgen.core.records import Ranges, RowSet
from batchgen.pipeline.frozen import Before, freeze, has_new_rows, read_rows
from batchgen.pipeline.prepare import check, prepare
from batchgen.source.csv import CsvReader
from batchgen.store.books import Base
from batchgen.store.matching import DIGESTS, digest_reader, digests_of, is_same_reading, match
from tests.fakes import write_jsonl


def rows(*numbers):
    return [{"id": f"r{n}", "text": f"say {n}", "n": n} for n in numbers]


@pytest.fixture
def files(tmp_path):
    """Three files of two rows."""
    return [write_jsonl(tmp_path / f"in-{at}.jsonl", rows(2 * at, 2 * at + 1)) for at in range(3)]


@pytest.fixture
def prepared(make_job, files):
    """Prepare a job over the files as they are then."""

    def made(**keys):
        return prepare(make_job(None, input={"path": "in-*.jsonl", **keys}))

    return made


def change_unseen(path):
    """Other content under the same size and time."""
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"say", b"SAY"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def touch(path):
    now = path.stat()
    os.utime(path, ns=(now.st_atime_ns, now.st_mtime_ns + 10**9))


def append(path, *numbers):
    write_jsonl(path.with_suffix(".tmp"), rows(*numbers))
    path.write_bytes(path.read_bytes() + path.with_suffix(".tmp").read_bytes())


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_did_not_move_is_not_read_again(prepared, storage, files):
    seen = freeze(prepared(), 1, storage=storage)
    assert [segment.digest for segment in seen.segments] == [sha256(path) for path in files]
    change_unseen(files[1])  # So whoever reads it finds another hash.
    again = freeze(prepared(), 2, Before(seen=seen), storage)
    assert list(again.segments) == list(seen.segments)
    anew = freeze(prepared(), 2, storage=storage)
    assert anew.segments[1].digest == sha256(files[1]) != seen.segments[1].digest


@pytest.mark.parametrize("change", [touch, lambda path: append(path, 7)])
def test_a_file_that_moved_is_read_again_and_no_other(prepared, storage, files, change):
    seen = freeze(prepared(), 1, storage=storage)
    change_unseen(files[0])
    change_unseen(files[1])
    change(files[1])
    again = freeze(prepared(), 2, Before(seen=seen), storage)
    assert [again.segments[at] == seen.segments[at] for at in range(3)] == [True, False, True]
    assert again.segments[1].digest == sha256(files[1])


def test_files_that_came_are_read_and_files_that_went_are_gone(prepared, storage, files):
    seen = freeze(prepared(), 1, storage=storage)
    files[0].unlink()
    new = write_jsonl(files[0].parent / "in-9.jsonl", rows(9))
    change_unseen(files[1])
    again = freeze(prepared(), 2, Before(seen=seen), storage)
    assert list(again.segments[:2]) == list(seen.segments[1:])
    assert (again.segments[2].path, again.segments[2].num_rows) == (str(new), 1)
    assert again.segments[2].digest == sha256(new)


def test_what_is_known_of_files_of_another_format_is_not_believed(prepared, storage, files):
    seen = replace(freeze(prepared(), 1, storage=storage), input_format="csv")
    change_unseen(files[1])
    again = freeze(prepared(), 2, Before(seen=seen), storage)
    assert again.segments[1].digest == sha256(files[1])


def test_the_last_file_of_a_cut_plan_was_not_counted_and_is_read_again(prepared, storage, files):
    cut = freeze(prepared(limit=3), 1, storage=storage)
    assert cut.is_cut
    assert [segment.num_rows for segment in cut.segments] == [2, 1]
    change_unseen(files[0])
    change_unseen(files[1])
    whole = freeze(prepared(), 2, Before(seen=cut), storage)
    assert [segment.num_rows for segment in whole.segments] == [2, 2, 2]
    assert whole.segments[0].digest == cut.segments[0].digest  # Not read.
    assert whole.segments[1].digest == sha256(files[1])
    assert not whole.is_cut


def test_a_plan_is_cut_again_where_the_limit_is_filled_now(prepared, storage, files):
    seen = freeze(prepared(limit=5), 1, storage=storage)
    assert [segment.num_rows for segment in seen.segments] == [2, 2, 1]
    append(files[0], 7, 8)
    again = freeze(prepared(limit=5), 2, Before(seen=seen), storage)
    assert [segment.num_rows for segment in again.segments] == [4, 1]
    assert again.is_cut


def test_the_digests_of_each_file_that_was_read_are_kept(prepared, storage, files):
    seen = freeze(prepared(), 1, storage=storage)
    assert sorted(storage.list(DIGESTS)) == sorted(digests_of(sha256(path)) for path in files)
    for path, segment in zip(files, seen.segments, strict=True):
        lines = path.read_bytes().splitlines()
        assert digest_reader(storage, segment.digest, 2)(0, 2) == b"".join(
            hashlib.sha256(line).digest()[:16] for line in lines
        )
    append(files[0], 7)
    again = freeze(prepared(), 2, Before(seen=seen), storage)
    assert len(storage.list(DIGESTS)) == 4
    assert [span.length for span in match(storage, seen, again)] == [2, 2, 2]


def test_a_plan_without_an_output_leaves_no_digests(prepared, storage):
    freeze(prepared(), 1)
    assert not storage.path(DIGESTS).exists()


def test_rows_of_parquet_are_not_told_apart_by_digests(tmp_path, make_job, storage):
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "in.parquet")
    plan = freeze(prepare(make_job(None, input={"path": "in.parquet"})), 1, storage=storage)
    assert plan.num_rows == 2
    assert storage.list(DIGESTS) == []
    assert storage.temps(DIGESTS) == []


def test_a_file_that_ends_early_leaves_no_digests_behind(tmp_path, make_job, storage):
    import gzip

    job = make_job(None, input={"path": "in.jsonl.gz"})
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 10_000))
    ready = prepare(job)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SourceError):
        freeze(ready, 1, storage=storage)
    assert list(storage.path(DIGESTS).iterdir()) == []


class MovingReader:
    """A reader under which the file moves."""

    def __init__(self, reader, change):
        self._reader = reader
        self._change = change

    def scan(self, path, on_rows=None, on_block=int):
        found = self._reader.scan(path, on_rows, on_block)
        self._change(Path(path))
        return found


def test_a_file_that_changes_while_it_is_read_stops_the_plan(prepared, storage):
    job = prepared()
    job = replace(job, reader=MovingReader(job.reader, lambda path: append(path, 7)))
    with pytest.raises(InputChangedError, match="changed while it was read; run again when it is"):
        freeze(job, 1, storage=storage)


def test_what_the_plan_goes_back_to_is_in_it(prepared, storage):
    bases = [Base(3, ["a.parquet"]), Base(1)]
    plan = freeze(prepared(), 4, Before(None, bases, takes_errors=False, generation=2), storage)
    assert (plan.bases, plan.takes_errors, plan.generation) == (bases, False, 2)
    plain = freeze(prepared(), 1)
    assert (list(plain.bases), plain.takes_errors, plain.generation) == ([], True, 0)


# --- has_new_rows -----------------------------------------------------------------------------


def now(prepared, seen, **keys):
    return has_new_rows(prepared(**keys).files, seen)


def test_unchanged_files_have_no_new_rows(prepared, files):
    seen = freeze(prepared(), 1)
    assert not now(prepared, seen)
    touch(files[0])
    assert not now(prepared, seen)
    files[1].unlink()
    assert not now(prepared, seen)


def test_a_file_that_is_longer_has_new_rows(prepared, files):
    seen = freeze(prepared(), 1)
    append(files[1], 7)
    assert now(prepared, seen)


def test_a_file_that_is_shorter_has_none_for_sure(prepared, files):
    seen = freeze(prepared(), 1)
    write_jsonl(files[1], rows(2))
    assert not now(prepared, seen)


def test_a_file_that_came_has_new_rows_unless_it_only_has_another_name(prepared, files):
    seen = freeze(prepared(), 1)
    files[1].rename(files[1].with_name("in-8.jsonl"))
    assert not now(prepared, seen)
    write_jsonl(files[1].with_name("in-9.jsonl"), rows(9))
    assert now(prepared, seen)


def test_a_filled_limit_wants_no_new_rows(prepared, files):
    """Files behind the last one that is wanted are none that are new."""
    seen = freeze(prepared(limit=3), 1)
    assert not now(prepared, seen, limit=3)
    touch(files[0])
    assert not now(prepared, seen, limit=3)


def test_a_file_that_is_gone_is_told(prepared, files):
    seen = freeze(prepared(), 1)
    files[1].unlink()
    with pytest.raises(SourceError, match=r"in-1\.jsonl: does not exist"):
        has_new_rows([str(path) for path in files], seen)


# --- plans of before bad records of a CSV counted as many rows as they have lines -----------------

GOOD_CSV = 'id,text\n1,"two\nlines"\n2,x\n'
OPEN_QUOTE = 'id,text\n1,"never closed\n2,x\n3,"y\n4,z\n'


@pytest.mark.parametrize(("content", "is_same"), [(GOOD_CSV, True), (OPEN_QUOTE, False)])
def test_rows_of_an_older_plan_are_where_they_were_only_if_both_count_alike(
    make_job, tmp_path, storage, content, is_same
):
    (tmp_path / "in.csv").write_text(content)
    prepared = prepare(make_job(None, input={"path": "in.csv"}))
    new = freeze(prepared, 2, storage=storage)
    old_reader = CsvReader(counts_lines=False)
    segment = replace(new.segments[0], num_rows=old_reader.scan(new.segments[0].path).num_rows)
    old = replace(new, number=1, counts_lines=False, segments=[segment])
    assert is_same_reading(old, new) is is_same
    assert is_same_reading(replace(old, is_cut=True), new) is False
    # The file has not moved, but what was counted otherwise is counted again.
    assert freeze(prepared, 2, Before(seen=old), storage).segments == new.segments
    change_unseen(tmp_path / "in.csv")
    assert freeze(prepared, 3, Before(seen=new), storage).segments == new.segments


def test_an_older_plan_is_gone_on_with_as_it_was_counted(make_job, tmp_path, storage):
    (tmp_path / "in.csv").write_text(OPEN_QUOTE)
    job = make_job(None, input={"path": "in.csv"})
    new = freeze(prepare(job), 1, storage=storage)
    old = replace(new, counts_lines=False, segments=[replace(new.segments[0], num_rows=2)])
    for plan, num_rows in ((new, 4), (old, 2)):
        prepared = check(job).with_plan(plan)
        todo = RowSet({0: Ranges.until(plan.num_rows)})
        batches = list(read_rows(plan, todo, prepared.reader, prepared.spec()))
        assert [row for batch in batches for row in batch.rows] == list(range(num_rows))
        assert batches[-1].carried.column("id")[-1].as_py() == "4"


def test_large_files_are_read_by_processes_as_small_ones_are_here(prepared, storage, files):
    together, *alone = prepared(), *(prepared(path=str(path)) for path in files)
    for path in files:  # So that reading them is worth processes; they end in a line of zeros now.
        os.truncate(path, 100 << 20)
    blocks = []
    whole = freeze(together, 1, storage=storage, on_block=lambda: blocks.append(1))
    assert [segment.num_rows for segment in whole.segments] == [3, 3, 3]
    for made, segment in zip(alone, whole.segments, strict=True):
        assert freeze(made, 2).segments == [segment]
        assert digest_reader(storage, segment.digest, 3) is not None
    # Each file alone is read here, a block at a time; the three together were not.
    assert len(blocks) < 3 * 100 // 4
