"""Physical lines: ends, sizes, compressions and their damage."""

import gzip
import os
import random
import tracemalloc
from contextlib import suppress

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from batchgen.core.errors import SourceError
from batchgen.core.records import Ranges
from batchgen.source import text as blocks
from batchgen.source.text import BOM, LineIndex, LineIndexes, read_lines, scan_blocks, scan_lines

LINES = [f"line {n} {random.Random(n).random()}".encode() for n in range(50_000)]
DATA = b"\n".join(LINES)


def collect(path: str, todo: Ranges, batch_rows: int = 1000, **options):
    """What was yielded before the error, and the error."""
    rows, lines, error = [], [], None
    batches = read_lines(path, todo, batch_rows, **options)
    while error is None:
        try:
            more = next(batches, None)
        except SourceError as raised:
            error = raised
            break
        if more is None:
            break
        rows += [*more.rows, *more.blank]
        lines += [*more.lines, *(b"" for _ in more.blank)]
    return rows, lines, error


def shown(lines):
    """Whether a blank line is told as one of a stretch depends on where reading began."""
    return [line and line.strip() for line in lines]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"\xef\xbb\xbf", []),
        (b"a", [b"a"]),
        (b"a\n", [b"a"]),
        (b"a\n\n", [b"a", b""]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb", [b"a", b"\xef\xbb\xbfb"]),
        (b"a\x0cb\x0b\xe2\x80\xa8\n\rc", [b"a\x0cb\x0b\xe2\x80\xa8", b"\rc"]),
    ],
)
def test_lines_end_at_newlines_and_nowhere_else(tmp_path, content, lines):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert scan_lines(str(path)).num_rows == scan_blocks(str(path)).num_rows == len(lines)
    assert collect(str(path), Ranges.until(len(lines))) == ([*range(len(lines))], lines, None)


def test_the_wanted_lines_are_found_across_blocks(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n".join([line * 60 for line in LINES]))
    wanted = Ranges([(0, 2), (7_000, 7_001), (20_000, 30_000), (49_999, 50_000)])
    rows, lines, error = collect(str(path), wanted)
    assert (rows, error) == (list(wanted), None)
    assert lines == [LINES[row] * 60 for row in wanted]


@pytest.mark.parametrize("limit", [1, 3, 8, 100])
@given(data=st.binary(max_size=60).map(lambda b: bytes(b"\nab\r"[c % 4] for c in b)))
def test_long_lines_keep_their_place(tmp_path_factory, limit, data):
    path = tmp_path_factory.mktemp("long") / "a.txt"
    path.write_bytes(data)
    expected = data.split(b"\n")
    expected = expected[:-1] if not expected[-1] else expected
    found, blank = {}, set()
    for some in read_lines(str(path), Ranges.until(len(expected)), 5, max_line_bytes=limit):
        found |= zip(some.rows, some.lines, strict=True)
        blank |= {*some.blank}
    assert found | dict.fromkeys(blank, b"") == {
        row: b"" if row in blank else line if len(line) <= limit else None
        for row, line in enumerate(expected)
    }
    assert all(not expected[row].strip() for row in blank)
    assert not found.keys() & blank


def test_a_long_line_is_not_held_in_memory(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("wb") as out:
        out.write(b"first\n")
        for _ in range(60):
            out.write(b"x" * (4 << 20))
        out.write(b"\nlast\n")
    tracemalloc.start()
    found = collect(str(path), Ranges.until(3))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ([0, 1, 2], [b"first", None, b"last"], None)
    assert peak < 100 << 20


def test_batches_are_bounded_in_bytes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n".join([b"x" * (5 << 20)] * 10))
    sizes = [len(some.lines) for some in read_lines(str(path), Ranges.until(10), 1000)]
    assert sizes == [7, 3]


def test_nothing_is_read_after_the_last_wanted_line(tmp_path):
    path = tmp_path / "a.txt.gz"
    data = gzip.compress(os.urandom(6 << 20) + b"\n" + os.urandom(6 << 20))
    path.write_bytes(data[: len(data) - 10])  # damaged, but only at its end
    first_row = collect(str(path), Ranges.until(1))
    assert (len(first_row[0]), first_row[2]) == (1, None)


PACK = {"gz": gzip.compress, "zst": zstandard.compress}


@pytest.mark.parametrize(("suffix", "name"), [("gz", "gzip"), ("zst", "zstd")])
def test_a_truncated_file_ends_early(tmp_path, suffix, name):
    path = tmp_path / f"a.jsonl.{suffix}"
    packed = PACK[suffix](DATA)
    path.write_bytes(packed[: len(packed) * 3 // 4])
    *_, error = collect(str(path), Ranges.until(len(LINES)), batch_rows=len(LINES))
    text = f"{path}: input ends early: the {name} stream is cut off; copy it again"
    assert str(error) == text
    with pytest.raises(SourceError, match="input ends early"):
        scan_lines(str(path))


@pytest.mark.parametrize(("suffix", "name"), [("gz", "gzip"), ("zst", "zstd")])
def test_trailing_garbage_is_refused(tmp_path, suffix, name):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(PACK[suffix](DATA) + b"garbage garbage")
    with pytest.raises(SourceError, match=f"is not {name}, or is damaged, or more follows"):
        scan_lines(str(path))


@pytest.mark.parametrize(("suffix", "name"), [("gz", "gzip"), ("zst", "zstd")])
def test_what_is_not_compressed_is_refused(tmp_path, suffix, name):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(b"plain text\n")
    with pytest.raises(SourceError, match=f"is not {name}, or is damaged"):
        scan_lines(str(path))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_an_empty_compressed_file_ends_early(tmp_path, suffix):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(b"")
    with pytest.raises(SourceError, match="input ends early"):
        scan_lines(str(path))


def test_gzip_members_may_be_padded_with_zeros(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"a\n") + b"\0" * 512 + gzip.compress(b"b\n") + b"\0" * 512)
    assert collect(str(path), Ranges.until(2)) == ([0, 1], [b"a", b"b"], None)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_highly_compressed_file_stays_small_in_memory(tmp_path, suffix):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(PACK[suffix]((b"x" * 1023 + b"\n") * (200 << 10)))
    tracemalloc.start()
    num_rows = scan_lines(str(path)).num_rows
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_rows == 200 << 10
    assert peak < 150 << 20


TEXTS = st.lists(st.sampled_from([b"\n", b"\n", b"\r\n", b"a", b"bcdefg", BOM]), max_size=60)
LEASES = st.lists(st.sets(st.integers(0, 40), min_size=1, max_size=8).map(Ranges.of), max_size=8)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@given(data=st.data(), texts=TEXTS, leases=LEASES, limit=st.integers(1, 9))
def test_marks_change_no_line(tmp_path_factory, suffix, data, texts, leases, limit):
    path = str(tmp_path_factory.mktemp("indexes") / f"a.txt{suffix}")
    with (gzip.open if suffix else open)(path, "wb") as out:
        out.write(b"".join(texts))
    every, size = data.draw(st.integers(1, 20)), data.draw(st.integers(3, 20))
    indexes = LineIndexes(every_bytes=every, max_entries=data.draw(st.integers(2, 20)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", size)
        for todo in leases:
            plain = collect(path, todo, 3, max_line_bytes=limit)
            marked = collect(path, todo, 3, max_line_bytes=limit, indexes=indexes)
            assert (marked[0], shown(marked[1])) == (plain[0], shown(plain[1]))
            assert str(marked[2]) == str(plain[2])
            # A read that is given up half way leaves good indexes as well.
            with suppress(SourceError):
                next(read_lines(path, Ranges([(5, 40)]), 1, limit, indexes))


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_only_a_byte_order_mark_at_the_very_start_is_none_of_a_line(tmp_path, monkeypatch, end):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 10)
    path = tmp_path / "a.txt"
    lines = [BOM + b"%d" % row + end[:-1] for row in range(9)]
    path.write_bytes(BOM + b"\n".join(lines))
    indexes = LineIndexes(every_bytes=1)
    for row in [8, *range(9)]:
        assert collect(str(path), Ranges.of([row]), indexes=indexes) == ([row], [lines[row]], None)
    assert len(indexes.of(str(path))) > 5


@pytest.fixture
def learnt(tmp_path):
    """A file of 2,000 lines of 16 KiB, each its number and spaces, and the indexes of all of it."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"".join(f"{row:<16383}\n".encode() for row in range(2000)))
    indexes = LineIndexes()
    assert collect(str(path), Ranges([(1999, 2000)]), indexes=indexes)[2] is None
    return path, indexes


def join_lines(path, start: int, stop: int) -> None:
    """Make one line of some, in place; the file looks as before."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(start << 14)
        file.write(b"x" * ((stop - start) << 14))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("wanted", [[1500], [10, 1500], [10, 1500, 1999]])
def test_what_lies_before_a_mark_is_not_read(learnt, wanted):
    path, indexes = learnt
    join_lines(path, 300, 900)
    rows, lines, _ = collect(str(path), Ranges.of(wanted), indexes=indexes)
    assert (rows, [int(line) for line in lines]) == (wanted, wanted)


def test_a_changed_file_has_no_indexes(learnt):
    path, indexes = learnt
    join_lines(path, 300, 900)
    path.touch()
    _, (line,), _ = collect(str(path), Ranges.of([1200]), indexes=indexes)
    assert int(line) == 1200 + 600


def test_marks_are_bounded():
    indexes = LineIndex(every_bytes=10, max_entries=8)
    for row in range(1000):
        indexes.add(row, row * 5)
    assert len(indexes) <= 8
    found = [indexes.before(row) for row in range(1000)]
    assert all(offset == row * 5 for row, offset in found)
    assert all(row <= asked <= row + 400 for asked, (row, _) in enumerate(found))


def test_marks_are_kept_of_so_many_files(tmp_path):
    indexes = LineIndexes(every_bytes=1, max_files=2)
    paths = [str(tmp_path / name) for name in "abc"]
    for path in paths:
        with open(path, "wb") as out:  # noqa: PTH123
            out.write(b"x\n")
        indexes.of(path).add(1, 2)
        indexes.of(paths[0])
    assert [indexes.of(path).before(1) for path in (paths[0], paths[2])] == [(1, 2), (1, 2)]
    assert indexes.of(paths[1]).before(1) == (0, 0)
