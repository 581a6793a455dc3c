"""Parts to snapshot: every result once, in input order, whatever the parts look like."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchgen.core.errors import AccountingError, DamagedPartError
from batchgen.core.records import Ranges, RowError, RowSet
from batchgen.storage import LocalStorage
from batchgen.store import parts as store_parts
from batchgen.store.books import FILES, PartFooter, Places
from batchgen.store.keys import keys_of
from batchgen.store.parts import Parts
from batchgen.store.published import PublishedRows
from batchgen.store.result_files import ROW, PartContext, PartWriter, part_schema, published_schema
from batchgen.store.reuse import Source, key_prefixes
from batchgen.store.snapshot import SnapshotFormat, cuts, write_snapshot
from tests.fakes import ANSWER, batch, manifest_of, plan, results, write_parts
from tests.harm import overwrite

CARRIED = pa.schema([("id", pa.string())])
BAD = RowError("bad", "it is bad")


def form(carried=CARRIED, **changes) -> SnapshotFormat:
    fields = {
        "schema": part_schema(carried, ANSWER, "gen_"),
        "prefix": "gen_",
        "compression": "zstd",
        "rows_per_file": 1000,
        "metadata": {b"batchgen.plan": b"plan-a"},
        **changes,
    }
    return SnapshotFormat(**fields)


def writer(storage, carried=CARRIED) -> PartWriter:
    schema = part_schema(carried, ANSWER, "gen_")
    return PartWriter(storage, "parts", PartContext("plan-a", 1, 0, "run-1", schema, "gen_"))


def footed(storage, name):
    return name, PartFooter.from_metadata(pq.read_metadata(storage.path(name)).metadata)


def written(storage, parts, how):
    """The entries; what they say of rows is always true."""
    num_rows = [0] * 10
    for _, footer in parts:
        for segment, _, stop in footer.done.spans():
            num_rows[segment] = max(num_rows[segment], stop)
    made = plan(*num_rows)
    files = write_parts(storage, parts, made, how)
    done = RowSet.of_spans(span for _, footer in parts for span in footer.done.spans())
    assert sum(file.num_done for file in files) == made.num_rows
    manifest = manifest_of(files)
    with PublishedRows(storage, manifest, made) as rows:
        seen = [one.rows(group) for one in rows.files() for group in range(one.num_groups)]
        skipped = rows.skipped(made.rows)
    whole = RowSet.of_spans(span for found in seen for span in found.spans())
    assert whole.num_rows == sum(found.num_rows for found in seen)
    assert (whole - done, whole & skipped, whole | skipped) == ({}, {}, made.rows)
    named = ids(storage, files) if "id" in read(storage, files).column_names else None
    told = [f"{segment}/{row}" for segment, row in in_turn(whole)]
    assert named is None or told == named
    return files


def in_turn(rows):
    return [(segment, row) for segment, start, stop in rows.spans() for row in range(start, stop)]


def put(storage, *parts, skipped=None):
    """Write parts; each is a list of ordinals, in finish order."""
    out = writer(storage)
    found = []
    for ordinals in parts:
        done = [result for seg, row in ordinals for result in results(batch([row], segment=seg))]
        found.append(footed(storage, out.commit(done, {}, {}).name))
    if skipped:
        found.append(footed(storage, out.commit([], skipped, {}).name))
    return found


def read(storage, files) -> pa.Table:
    return pa.concat_tables(pq.read_table(storage.path(file.name)) for file in files)


def ids(storage, files):
    return read(storage, files)["id"].to_pylist()


def test_out_of_order_parts_come_out_in_input_order(storage):
    parts = put(
        storage,
        [(1, 0), (0, 7), (0, 0)],
        [(0, 3), (2, 9), (1, 1)],
        [(2, 0), (0, 1), (1, 5)],
    )
    files = written(storage, parts, form())
    assert ids(storage, files) == [
        "0/0", "0/1", "0/3", "0/7", "1/0", "1/1", "1/5", "2/0", "2/9",
    ]  # fmt: skip
    table = read(storage, files)
    assert table["gen_text"].to_pylist() == [at.replace("/", ":") for at in ids(storage, files)]


def test_the_published_file_has_our_schema_without_the_ordinal_and_the_metadata(storage):
    files = written(storage, put(storage, [(0, 0)]), form())
    (file,) = files
    schema = pq.read_schema(storage.path(file.name))
    assert schema.metadata[b"batchgen.plan"] == b"plan-a"
    assert schema.remove_metadata() == published_schema(part_schema(CARRIED, ANSWER, "gen_"))
    assert not [name for name in schema.names if name.startswith("_batchgen")]


def test_an_entry_tells_name_rows_size_and_hash_of_its_file(storage):
    (file,) = written(storage, put(storage, [(0, 0), (0, 1)]), form())
    data = storage.read(file.name)
    digest = hashlib.sha256(data).hexdigest()
    assert file.name == f"snap/e1-00000-{digest[:16]}.parquet"
    assert (file.num_rows, file.size_bytes, file.sha256) == (2, len(data), digest)
    assert (file.num_errors, file.num_skipped, file.order) == (0, 0, 1000)
    assert file.tally == {"verdict": {"ok": 2}, "attempts": {"1": 2}}
    assert hashlib.sha256(data[-file.footer_bytes :]).hexdigest() == file.footer_sha256
    assert file.alias == f"part-00001000-{digest[:8]}.parquet"
    assert storage.list("snap") == [file.name]
    assert not storage.temps("snap")


@pytest.mark.parametrize(
    ("rows_per_file", "sizes"),
    [(1, [1] * 7), (2, [1, 2, 2, 2]), (3, [2, 2, 3]), (6, [3, 4]), (7, [7]), (8, [7])],
)
def test_files_hold_at_most_rows_per_file_across_segments(storage, rows_per_file, sizes):
    parts = put(storage, [(0, 2), (1, 0), (1, 3)], [(0, 0), (0, 1), (1, 1), (1, 2)])
    files = written(storage, parts, form(rows_per_file=rows_per_file))
    assert [file.num_rows for file in files] == sizes
    assert [file.order for file in files] == [1000 * (at + 1) for at in range(len(sizes))]
    for file in files:
        assert pq.read_metadata(storage.path(file.name)).num_rows == file.num_rows
    assert ids(storage, files) == ["0/0", "0/1", "0/2", "1/0", "1/1", "1/2", "1/3"]


def test_a_job_without_a_row_has_one_file_with_the_schema(storage):
    (file,) = written(storage, [], form())
    table = pq.read_table(storage.path(file.name))
    assert (file.num_rows, table.num_rows) == (0, 0)
    assert table.schema.remove_metadata() == published_schema(part_schema(CARRIED, ANSWER, "gen_"))


def test_skipped_rows_leave_no_trace(storage):
    parts = put(storage, [(0, 1)], skipped=RowSet({0: Ranges.of([0, 2]), 3: Ranges.until(4)}))
    assert ids(storage, written(storage, parts, form())) == ["0/1"]


def test_a_job_of_skipped_rows_alone_has_one_empty_file(storage):
    parts = put(storage, skipped=RowSet({0: Ranges.until(3)}))
    (file,) = written(storage, parts, form())
    assert file.num_rows == 0


def test_error_rows_stand_where_their_input_stood(storage):
    done = results(batch([0, 1, 2]), errors={1: BAD})
    name = writer(storage).commit(done[::-1], {}, {}).name
    files = written(storage, [footed(storage, name)], form())
    table = read(storage, files)
    assert table["gen_status"].to_pylist() == ["ok", "error", "ok"]
    assert table["gen_text"].to_pylist() == ["0:0", None, "0:2"]


def test_two_parts_with_the_same_row_are_never_published(storage):
    parts = put(storage, [(0, 0), (0, 1)], [(0, 1), (0, 2)])
    with pytest.raises(AccountingError, match="two accepted parts hold the same row; not pub"):
        written(storage, parts, form())
    assert storage.list("snap") == []
    assert not storage.temps("snap")


def test_one_part_with_the_same_row_twice_is_never_published(storage):
    done = results(batch([1, 1, 2]))
    name = writer(storage).commit(done, {}, {}).name
    claimed = PartFooter("plan-a", 1, "run-1", RowSet({0: Ranges.until(3)}), 3, 0, 0, {})
    with pytest.raises(AccountingError, match="hold the same row; not published"):
        written(storage, [(name, claimed)], form())


def test_a_part_that_lacks_a_row_its_footer_names_is_never_published(storage):
    ((name, _),) = put(storage, [(0, 0), (0, 2)])
    claimed = PartFooter("plan-a", 1, "run-1", RowSet({0: Ranges.until(3)}), 3, 0, 0, {})
    with pytest.raises(
        DamagedPartError, match=r"s000000\.parquet: damaged \(gave 2 rows, its footer says 3\)"
    ):
        written(storage, [(name, claimed)], form())
    assert not storage.temps("snap")


def test_a_part_with_a_row_of_a_segment_its_footer_does_not_name_is_never_published(storage):
    ((name, _),) = put(storage, [(0, 0), (0, 1), (1, 0)])
    claimed = PartFooter("plan-a", 1, "run-1", RowSet({0: Ranges.until(3)}), 3, 0, 0, {})
    with pytest.raises(DamagedPartError, match="gave 2 rows, its footer says 3"):
        written(storage, [(name, claimed)], form())


def test_a_part_with_another_row_than_its_footer_names_is_never_published(storage):
    ((name, _),) = put(storage, [(0, 0), (0, 1), (0, 9)])
    claimed = PartFooter("plan-a", 1, "run-1", RowSet({0: Ranges.until(3)}), 3, 0, 0, {})
    with pytest.raises(DamagedPartError, match="gave 2 rows, its footer says 3"):
        written(storage, [(name, claimed)], form())


def test_what_an_earlier_try_of_this_run_left_is_taken(storage):
    parts = put(storage, [(0, 0)])
    assert written(storage, parts, form()) == (files := written(storage, parts, form()))
    assert ids(storage, files) == ["0/0"]


def test_a_part_that_is_gone_is_named(storage):
    parts = put(storage, [(0, 0)])
    storage.remove(parts[0][0])
    with pytest.raises(DamagedPartError, match=r"s000000\.parquet: damaged .*No such file"):
        written(storage, parts, form())


def flipped(storage):
    """A part with one bit wrong in the middle of its data, and its footer."""
    ((name, footer),) = put(storage, [(0, row) for row in range(50)])
    path = storage.path(name)
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(2)
    data[column.data_page_offset + column.total_compressed_size - 9] ^= 1
    overwrite(path, data)
    return name, footer


def test_a_part_with_a_flipped_bit_is_named_and_never_published(storage):
    with pytest.raises(DamagedPartError, match=r"s000000\.parquet: damaged \(could not"):
        written(storage, [flipped(storage)], form())
    assert storage.list("snap") == []
    assert not storage.temps("snap")


@pytest.mark.parametrize("compression", ["zstd", "snappy", "lz4", "gzip", "none"])
def test_every_compression_that_the_job_file_offers_is_written(storage, compression):
    (file,) = written(storage, put(storage, [(0, 0)]), form(compression=compression))
    column = pq.read_metadata(storage.path(file.name)).row_group(0).column(0)
    wanted = {"none": "UNCOMPRESSED"}.get(compression, compression.upper())
    assert column.compression == wanted


@pytest.mark.parametrize(
    "data_type",
    [
        pa.dictionary(pa.int32(), pa.string()),
        pa.large_string(),
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        pa.map_(pa.string(), pa.int64()),
        pa.timestamp("ns", "UTC"),
    ],
    ids=str,
)
def test_carried_types_are_published_from_several_parts(storage, data_type):
    """Parts are mixed, so that rows are taken across their chunks."""
    values = {
        "list": [[{"role": "user", "content": str(n)}] for n in range(6)],
        "map": [[(str(n), n)] for n in range(6)],
        "timestamp[ns, tz=UTC]": [n * 1000 for n in range(6)],
    }
    texts = [f"v{n}" for n in range(6)]
    kind = next((name for name in values if str(data_type).startswith(name)), None)
    column = pa.array(values[kind] if kind else texts, data_type)
    carried = pa.schema([("x", data_type)])
    out = writer(storage, carried)
    parts = []
    for rows in ([0, 3, 4], [1, 2, 5]):
        part = pa.record_batch({"x": column.take(pa.array(rows))})
        name = out.commit(results(batch(rows, carried=part)), {}, {}).name
        parts.append(footed(storage, name))
    files = written(storage, parts, form(carried))
    table = read(storage, files)
    assert table.schema.field("x").type == data_type
    assert table["x"].to_pylist() == column.to_pylist()


def test_a_dictionary_with_small_indices_is_published(storage):
    """Parquet gives it back with int32 indices."""
    data_type = pa.dictionary(pa.int8(), pa.string())
    carried = pa.record_batch({"x": pa.array(["a", "b"]).cast(data_type)})
    name = (
        writer(storage, carried.schema).commit(results(batch([0, 1], carried=carried)), {}, {}).name
    )
    files = written(storage, [footed(storage, name)], form(carried.schema))
    assert read(storage, files)["x"].to_pylist() == ["a", "b"]


ordinals = st.tuples(st.integers(0, 3), st.integers(0, 30))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(ordinals, max_size=8), max_size=5), st.integers(1, 9))
def test_any_rows_in_any_parts_come_out_once_and_in_order(tmp_path_factory, drawn, rows_per_file):
    storage = LocalStorage(tmp_path_factory.mktemp("out"))
    seen = set()
    disjoint = []
    for part in drawn:
        new = [at for at in dict.fromkeys(part) if at not in seen]
        seen.update(new)
        if new:
            disjoint.append(new)
    parts = put(storage, *disjoint)
    files = written(storage, parts, form(rows_per_file=rows_per_file))
    assert ids(storage, files) == [f"{seg}/{row}" for seg, row in sorted(seen)]
    assert sum(file.num_rows for file in files) == len(seen)


# More rows than one chunk and one row group hold, with stragglers committed at the very end.
CHUNK_ROWS = store_parts._CHUNK_ROWS
NUM_ROWS = CHUNK_ROWS + 9000


def test_rows_over_many_chunks_and_row_groups_come_out_in_order(storage):
    edges = [[4095, 4096], [CHUNK_ROWS - 1], [CHUNK_ROWS - 2, CHUNK_ROWS], [0, NUM_ROWS - 1]]
    late = {row for rows in edges for row in rows}
    on_time = [row for row in range(NUM_ROWS) if row not in late]
    cut = len(on_time) // 2
    out = writer(storage)
    parts = []
    for rows in (on_time[:cut], on_time[cut:], *edges):
        # A row group with rows of two segments has no useful statistics.
        others = results(batch([5], segment=1)) if rows[0] == on_time[cut] else []
        name = out.commit([*others, *results(batch(rows))], {}, {}).name
        parts.append(footed(storage, name))
    files = written(storage, parts, form(rows_per_file=20_000))
    assert max(file.num_rows for file in files) <= 20_000
    assert ids(storage, files) == [*(f"0/{row}" for row in range(NUM_ROWS)), "1/5"]


def test_a_row_group_that_reaches_over_a_border_is_read_once(storage):
    (part,) = put(storage, [(0, row) for row in range(90)])
    read_by = Parts(storage, [part], form().schema)
    before = pa.concat_tables(read_by.chunks([(0, 0, 40)]))
    storage.path(part[0]).unlink()
    rest = pa.concat_tables(read_by.chunks([(0, 40, 90)]))
    assert before.column(ROW).to_pylist() + rest.column(ROW).to_pylist() == [*range(90)]
    read_by.check_all_read()


def test_processes_write_what_one_writes(storage):
    parts = put(
        storage,
        [(0, row) for row in range(0, 90, 2)],
        [(0, row) for row in range(1, 90, 2)],
        [(1, row) for row in range(40) if row != 7],
        skipped={1: Ranges([(7, 8)])},
    )
    how, made = form(rows_per_file=10), plan(90, 40)
    read_by = Parts(storage, parts, how.schema)
    alone = write_snapshot(read_by, made, (), how, "snap/e1")
    together = write_snapshot(Parts(storage, parts, how.schema), made, (), how, "snap/e2", 0)
    assert len(together) >= len(alone) > 10
    assert read(storage, together).equals(read(storage, alone))
    assert ids(storage, together) == [
        *(f"0/{row}" for row in range(90)),
        *(f"1/{row}" for row in range(40) if row != 7),
    ]


@pytest.mark.parametrize("num", [0, 32, 48])
def test_stretches_are_as_many_as_keep_all_cores_at_work(storage, num):
    parts = put(storage, [(0, row) for row in range(960)])
    places = Places(plan(960))
    found = cuts(Parts(storage, parts, form().schema), places, (), 1000, num)
    assert len(found) == max(num, 1)
    assert [start for start, _ in found[1:]] == [stop for _, stop in found[:-1]]
    lengths = [stop - start for start, stop in found]
    assert max(lengths) - min(lengths) <= 2


@pytest.mark.parametrize("worth_bytes", [0, 1 << 40])
def test_a_part_that_lacks_rows_is_told_of_whoever_reads_it(storage, worth_bytes):
    parts = put(storage, [(0, row) for row in range(40)], [(0, row) for row in range(40, 60)])
    name, footer = parts[0]
    told = replace(footer, done=RowSet({0: Ranges.until(41)}), num_ok=41)
    read_by = Parts(storage, [(name, told), parts[1]], form().schema)
    with pytest.raises((DamagedPartError, AccountingError)):
        write_snapshot(
            read_by, plan(60), (), form(rows_per_file=10), "snap/e1", worth_bytes=worth_bytes
        )


def keyed(storage, *, takes_errors):
    """Keys that a snapshot of 60 rows answers, each of its files named beside the folder's keys."""
    error = RowError("bad_output", "x")
    done = [
        result._replace(request_key=f"{at:016x}{0:016x}")
        for at, result in enumerate(results(batch(range(60)), errors={5: error, 50: error}))
    ]
    parts = [footed(storage, writer(storage).commit(done, {}, {}).name)]
    read_by = Parts(storage, parts, form().schema)
    stem = f"{FILES}/e000001"
    files = write_snapshot(read_by, plan(60), (), form(rows_per_file=20), stem)
    sources = [Source(file.name, takes_errors=takes_errors, chunks=file.chunks) for file in files]

    def found():
        known = key_prefixes(storage, sources, "gen_", pytest.fail)
        return sorted(key for prefixes in known for key in prefixes)

    return files, found


@pytest.mark.parametrize("takes_errors", [True, False])
def test_keys_of_published_files_are_known_without_reading_them(storage, takes_errors):
    files, found = keyed(storage, takes_errors=takes_errors)
    expected = [at for at in range(60) if takes_errors or at not in {5, 50}]
    assert found() == expected
    for file in files:
        storage.path(file.name).chmod(0o600)
        overwrite(storage.path(file.name), b"x" * file.size_bytes)
    assert found() == expected


@pytest.mark.parametrize("harm", [None, b"", b"torn", b"\0" * 8 * 22])
def test_where_keys_are_gone_or_torn_the_files_are_read(storage, harm):
    files, found = keyed(storage, takes_errors=False)
    storage.remove(keys_of(files[1].name))
    if harm is not None:
        storage.path(keys_of(files[1].name)).write_bytes(harm)
    assert found() == [at for at in range(60) if at not in {5, 50}]
