"""Answers found by their request: the right one, an ok one, from bytes that can be believed."""

from __future__ import annotations

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.core.errors import StorageError
from batchgen.core.records import RowError
from batchgen.storage import LocalStorage
from batchgen.store import parts as store_parts
from batchgen.store.books import PartFooter
from batchgen.store.keys import KeySet
from batchgen.store.result_files import PartContext, PartWriter, part_schema
from batchgen.store.reuse import AnsweredKeys, Deduper, Source, key_prefixes, published_sources
from batchgen.store.snapshot import SnapshotFormat
from tests.fakes import ANSWER, as_version_1, batch, manifest_of, plan, results, write_parts
from tests.harm import overwrite
from tests.unit.test_known import key, known, requests

SCHEMA = part_schema(pa.schema([("id", pa.string())]), ANSWER, "gen_")
COLUMNS = list(SCHEMA)[3:]
"""All but the ordinal and the carried column."""
BAD = RowError("bad", "it is bad")
ERROR = "error"


class Parts:
    """Writes parts of one row a key; its text is `PART:ROW`."""

    def __init__(self, storage):
        self.storage = storage
        context = PartContext("plan-a", 1, 0, "run-1", SCHEMA, "gen_")
        self._writer = PartWriter(storage, "parts", context)
        self._num = 0

    def put(self, *keys, errors=()):
        """A part; `errors` are the rows that failed, whose key is kept."""
        rows = list(range(len(keys)))
        done = results(batch(rows, segment=self._num), errors=dict.fromkeys(errors, BAD))
        self._num += 1
        keyed = [one._replace(request_key=k) for one, k in zip(done, keys, strict=True)]
        return self._writer.commit(keyed, {}, {"engine": "fake", "version": "7"}).name

    def published(self, *names, rows_per_file=1000):
        """A snapshot of parts."""
        parts = [
            (name, PartFooter.from_metadata(pq.read_metadata(self.storage.path(name)).metadata))
            for name in names
        ]
        form = SnapshotFormat(SCHEMA, "gen_", "zstd", rows_per_file, {})
        rows = [sum(map(len, footer.done.values())) for _, footer in parts]
        self.plan = plan(*rows)
        return manifest_of(write_parts(self.storage, parts, self.plan, form))


@pytest.fixture
def parts(storage):
    return Parts(storage)


def answered(storage, *sources, told=None):
    tell = print if told is None else told.append
    return AnsweredKeys(storage, sources, COLUMNS, "gen_", tell)


def prefixes(storage, *sources):
    found = key_prefixes(storage, sources, "gen_", print)
    return [number for loaded in found for number in loaded.to_list()]


def every(name):
    return Source(name, takes_errors=True)


def ok_only(name):
    return Source(name, takes_errors=False)


def texts(answers, *keys):
    """What each key is answered; an error is `error`, no answer is None."""
    places, table = answers.find(keys)
    assert places == sorted(set(places))
    assert table.schema.equals(pa.schema(COLUMNS))
    rows = table.to_pylist()
    assert [row["gen_request_key"] for row in rows] == [keys[at] for at in places]
    found = {
        at: row["gen_text"] if row["gen_status"] == "ok" else ERROR
        for at, row in zip(places, rows, strict=True)
    }
    return [found.get(at) for at in range(len(keys))]


def test_answers_are_found_in_the_order_of_the_keys(storage, parts):
    first, second = parts.put(key(1), key(2)), parts.put(key(3))
    answers = answered(storage, every(first), every(second))
    assert texts(answers, key(3), key(9), key(1), key(2)) == ["1:0", None, "0:0", "0:1"]
    assert texts(answers, key(9)) == [None]
    assert texts(answers) == []


def test_a_key_may_be_asked_for_often(storage, parts):
    answers = answered(storage, every(parts.put(key(1), key(2))))
    assert texts(answers, key(2), key(1), key(2), key(2)) == ["0:1", "0:0", "0:1", "0:1"]
    assert texts(answers, key(1)) == ["0:0"]


def test_an_answer_brings_all_that_is_known_of_it(storage, parts):
    name = parts.put(key(1), key(2))
    _, table = answered(storage, every(name)).find([key(2)])
    whole = pq.read_table(storage.path(name))
    assert table.to_pylist() == whole.select(table.column_names).slice(1, 1).to_pylist()
    assert table.column_names == SCHEMA.names[3:]


def test_the_earlier_source_answers(storage, parts):
    first, second = parts.put(key(1), key(1)), parts.put(key(1), key(2))
    assert texts(answered(storage, every(first), every(second)), key(1), key(2)) == ["0:0", "1:1"]
    assert texts(answered(storage, every(second), every(first)), key(1), key(2)) == ["1:0", "1:1"]


def test_an_ok_row_answers_before_an_error_however_late_it_comes(storage, parts):
    failed = parts.put(key(1), key(2), errors=[0, 1])
    good = parts.put(key(1))
    assert texts(answered(storage, every(failed), every(good)), key(1), key(2)) == ["1:0", ERROR]


def test_errors_answer_only_where_the_source_says_so(storage, parts):
    failed = parts.put(key(1), key(2), errors=[0])
    assert texts(answered(storage, ok_only(failed)), key(1), key(2)) == [None, "0:1"]
    again = parts.put(key(1), key(3), errors=[0, 1])
    answers = answered(storage, ok_only(failed), every(again))
    assert texts(answers, key(1), key(2), key(3)) == [ERROR, "0:1", ERROR]


def test_rows_without_a_key_answer_nothing(storage, parts):
    name = parts.put(None, key(1), errors=[0])
    assert texts(answered(storage, every(name)), key(1), key(0)) == ["0:1", None]
    assert prefixes(storage, every(name)) == [1]


def test_a_key_that_shares_64_bits_with_another_gets_no_answer_of_it(storage, parts):
    name = parts.put(key(1, 1))
    deduper = Deduper(known(1), KeySet(), "auto")
    assert deduper.passing(requests(key(1, 2))) == []  # It waits, in vain.
    assert texts(answered(storage, every(name)), key(1, 2), key(1, 1)) == [None, "0:0"]


def test_of_two_answers_that_share_64_bits_the_first_is_found_and_the_other_run_again(
    storage, parts
):
    name = parts.put(key(1, 1), key(1, 2))
    assert texts(answered(storage, every(name)), key(1, 1), key(1, 2)) == ["0:0", None]


def test_without_sources_nothing_is_answered(storage):
    assert texts(answered(storage), key(1)) == [None]
    assert prefixes(storage) == []


def test_the_known_keys_are_those_that_have_an_answer(storage, parts):
    first = parts.put(key(1), key(2), key(1), errors=[1])
    second = parts.put(key(3), key(2**64 - 1), errors=[1])
    keys = KeySet()
    for loaded in key_prefixes(storage, [ok_only(first), every(second)], "gen_", print):
        keys.load(loaded)
    asked = [1, 2, 3, 4, 2**64 - 1]
    assert keys.know(asked) == [True, False, True, False, True]


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(store_parts, "_CHUNK_ROWS", 4)


def test_a_snapshot_answers_as_its_parts_do(storage, parts, small_groups):
    names = [parts.put(*map(key, range(at, 30, 3)), errors=[2]) for at in range(3)]
    manifest = parts.published(*names, rows_per_file=11)
    keys = [key(number) for number in range(31)]
    random.Random(3).shuffle(keys)
    for takes_errors in (True, False):
        sources = published_sources(storage, manifest, takes_errors=takes_errors)
        assert len(sources) == 3
        of_parts = [Source(name, takes_errors) for name in names]
        found = texts(answered(storage, *sources), *keys)
        assert found == texts(answered(storage, *of_parts), *keys)
        assert found.count(None) == (1 if takes_errors else 4)


@pytest.mark.parametrize("harm", ["gone", "torn", "flipped"])
def test_a_damaged_part_is_told_of_and_answers_nothing(storage, parts, harm):
    damaged, whole = parts.put(key(1), key(2)), parts.put(key(3))
    path = storage.path(damaged)
    content = path.read_bytes()
    overwrite(path, content[:-60] if harm == "torn" else content)
    if harm == "gone":
        path.unlink()
    elif harm == "flipped":
        pages = pq.ParquetFile(path).metadata.row_group(0)
        names = [pages.column(at).path_in_schema for at in range(pages.num_columns)]
        column = pages.column(names.index("gen_request_key"))
        at = column.data_page_offset + column.total_compressed_size - 9
        overwrite(path, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    told: list[str] = []
    answers = answered(storage, every(damaged), every(whole), told=told)
    assert texts(answers, key(1), key(3)) == [None, "1:0"]
    (text,) = told
    assert text.startswith(f"{path.name}: damaged (")
    assert text.endswith("; its answers are not used again")


def test_damage_in_what_only_the_answer_has_is_found_when_it_is_read(storage, parts):
    name = parts.put(key(1), key(2))
    path = storage.path(name)
    content = path.read_bytes()
    pages = pq.ParquetFile(path).metadata.row_group(0)
    names = [pages.column(at).path_in_schema for at in range(pages.num_columns)]
    column = pages.column(names.index("gen_text"))
    at = column.data_page_offset + column.total_compressed_size - 3
    overwrite(path, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    told: list[str] = []
    answers = answered(storage, every(name), told=told)
    assert told == []
    assert texts(answers, key(1)) == [None]
    assert told[0].startswith(f"{path.name}: damaged (")


@pytest.mark.parametrize("column", ["gen_status", "gen_request_key", "gen_text"])
def test_a_part_whose_columns_have_another_type_is_no_fault(storage, parts, column):
    """A single bit of its footer says so."""
    damaged, whole = parts.put(key(1)), parts.put(key(2))
    table = pq.read_table(storage.path(damaged))
    at = table.column_names.index(column)
    other = table.set_column(at, column, table[column].cast(pa.binary()))
    pq.write_table(other, storage.path(damaged))
    answers = answered(storage, every(damaged), every(whole), told=[])
    first, second = texts(answers, key(1), key(2))
    assert first in {None, "0:0"}
    assert second == "1:0"
    assert 2 in prefixes(storage, every(damaged), every(whole))


def test_wherever_a_published_file_is_flipped_no_wrong_answer_is_found(
    storage, parts, small_groups
):
    """Every byte, also those that page checksums leave out."""
    manifest = parts.published(parts.put(*map(key, range(12))))
    path = storage.path(manifest.files[0].name)
    whole = path.read_bytes()
    keys = [key(number) for number in range(12)]
    sources = published_sources(storage, manifest, takes_errors=True)
    right = texts(answered(storage, *sources), *keys)
    assert None not in right
    num_found = set()
    for at in range(0, len(whole), 41):
        overwrite(path, whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        told: list[str] = []
        found = texts(answered(storage, *sources, told=told), *keys)
        wrong = [(f, r) for f, r in zip(found, right, strict=True) if f not in (None, r)]
        assert wrong == []
        assert told[0].startswith(f"{path.name}: damaged")
        num_found.add(len(found) - found.count(None))
    # A row group is lost, where its keys are hit those behind it too, with the footer all of them.
    assert {8, 0} <= num_found <= {8, 4, 0}


def test_wherever_a_part_is_flipped_the_answer_is_right_or_none(storage, parts):
    name = parts.put(*map(key, range(12)))
    path = storage.path(name)
    whole = path.read_bytes()
    keys = [key(number) for number in range(12)]
    right = texts(answered(storage, every(name)), *keys)
    for at in range(0, len(whole), 17):
        overwrite(path, whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        found = texts(answered(storage, every(name), told=[]), *keys)
        assert [f for f, r in zip(found, right, strict=True) if f not in (None, r)] == []


@pytest.mark.parametrize("harm", ["gone", "flipped"])
def test_a_snapshot_without_its_index_answers_as_parts_do(storage, parts, harm):
    manifest = parts.published(parts.put(key(1), key(2)), parts.put(key(3)))
    manifest = as_version_1(storage, manifest, parts.plan)
    path = storage.path(manifest.index.name)
    content = path.read_bytes()
    overwrite(path, content[:9] + b"?" + content[10:])
    if harm == "gone":
        path.unlink()
    sources = published_sources(storage, manifest, takes_errors=False)
    assert {source.takes_errors for source in sources} == {False}
    assert texts(answered(storage, *sources), key(2), key(3), key(4)) == ["0:1", "1:0", None]


def test_trouble_with_the_disk_is_no_damage(storage, parts):
    name = parts.put(key(1))
    path = storage.path(name)
    path.unlink()
    path.symlink_to(path.name)  # Opening it fails with ELOOP.
    with pytest.raises(StorageError):
        answered(storage, every(name))


entries = st.tuples(st.integers(1, 3), st.integers(1, 2), st.booleans())
"""First and second half of a key, and whether the row is an error."""


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.lists(entries, min_size=1, max_size=5), st.booleans()), max_size=4))
def test_whatever_the_sources_the_answer_is_the_first_and_best(tmp_path_factory, drawn):
    storage = LocalStorage(tmp_path_factory.mktemp("out"))
    writer = Parts(storage)
    sources, places = [], []
    for number, (rows, takes_errors) in enumerate(drawn):
        errors = [at for at, row in enumerate(rows) if row[2]]
        name = writer.put(*(key(*row[:2]) for row in rows), errors=errors)
        sources.append(Source(name, takes_errors))
        places += [
            (is_error, first, second, ERROR if is_error else f"{number}:{at}")
            for at, (first, second, is_error) in enumerate(rows)
            if takes_errors or not is_error
        ]
    best = {}
    for _, first, second, text in sorted(places, key=lambda place: place[0]):
        best.setdefault(first, (second, text))
    keys = [(first, second) for first in (3, 1, 2, 4) for second in (2, 1)]
    assert texts(answered(storage, *sources), *(key(*one) for one in keys)) == [
        best[first][1] if first in best and best[first][0] == second else None
        for first, second in keys
    ]
