"""Results to a part file: its rows, its types, its books."""

from __future__ import annotations

import datetime as dt
import decimal
import errno
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.core.errors import BatchgenError, ConfigError, StorageError
from batchgen.core.records import Ordinal, Ranges, Result, RowError, RowSet
from batchgen.storage import LocalStorage
from batchgen.store.books import PartFooter
from batchgen.store.result_files import (
    PartContext,
    PartWriter,
    dictionary_columns,
    part_schema,
    published_schema,
)
from tests.fakes import ANSWER, batch, completion, results

if TYPE_CHECKING:
    from batchgen.store.books import Part

ID = pa.schema([("id", pa.string())])
ORIGIN = {"model": "tiny@7", "recipe": "r" * 32}
BAD = RowError("prompt_too_long", "the prompt has 9 tokens, the model takes fewer than 8")
OURS = [
    "text",
    "status",
    "verdict",
    "finish_reason",
    "error_type",
    "error",
    "attempts",
    "num_prompt_tokens",
    "num_cached_tokens",
    "num_output_tokens",
    "latency_s",
    "request_key",
    "run_id",
    "model",
    "recipe",
    "engine",
]


def writer(storage, carried=ID, *, prefix="gen_", epoch=3, worker=2) -> PartWriter:
    schema = part_schema(carried, ANSWER, prefix)
    return PartWriter(
        storage,
        "parts",
        PartContext("plan-a", epoch, worker, "run-9", schema, prefix, origin=ORIGIN),
    )


def read(storage, part: Part | str) -> tuple[pa.Table, PartFooter]:
    name = part if isinstance(part, str) else part.name
    table = pq.read_table(storage.path(name), page_checksum_verification=True)
    return table, PartFooter.from_metadata(pq.read_metadata(storage.path(name)).metadata)


def test_an_ok_row_and_an_error_row_are_these_values(storage):
    given_batch = batch([4, 5])
    name = writer(storage).commit(results(given_batch, errors={5: BAD}), {}, {})
    table, _ = read(storage, name)
    ok, error = table.to_pylist()
    assert ok == {
        "_batchgen_segment": 0,
        "_batchgen_row": 4,
        "id": "0/4",
        "gen_text": "0:4",
        "gen_status": "ok",
        "gen_verdict": "ok",
        "gen_attempts": 1,
        "gen_model": "tiny@7",
        "gen_recipe": "r" * 32,
        "gen_engine": None,
        "gen_finish_reason": "stop",
        "gen_error_type": None,
        "gen_error": None,
        "gen_num_prompt_tokens": 10,
        "gen_num_cached_tokens": 4,
        "gen_num_output_tokens": 3,
        "gen_latency_s": 0.5,
        "gen_request_key": "00000000000000000000000000000004",
        "gen_run_id": "run-9",
    }
    assert error == dict.fromkeys(ok) | {
        "_batchgen_segment": 0,
        "_batchgen_row": 5,
        "id": "0/5",
        "gen_status": "error",
        "gen_verdict": "error",
        "gen_attempts": 0,
        "gen_model": "tiny@7",
        "gen_recipe": "r" * 32,
        "gen_error_type": "prompt_too_long",
        "gen_error": "the prompt has 9 tokens, the model takes fewer than 8",
        "gen_run_id": "run-9",
    }


def test_a_refused_completion_is_an_error_row_that_keeps_its_key(storage):
    given_batch = batch([0])
    refused = completion(0, text=None, finish_reason=None, num_output_tokens=None, error=BAD)
    result = Result(Ordinal(0, 0), given_batch, 0, "k" * 32, refused, BAD)
    (row,) = read(storage, writer(storage).commit([result], {}, {}))[0].to_pylist()
    assert (row["gen_status"], row["gen_request_key"], row["gen_text"]) == ("error", "k" * 32, None)
    assert row["gen_num_prompt_tokens"] == 10


def test_an_empty_answer_is_an_ok_row(storage):
    given_batch = batch([0])
    empty = completion(0, text="", num_output_tokens=0, num_cached_tokens=0, latency_s=0.0)
    result = Result(Ordinal(0, 0), given_batch, 0, "k" * 32, empty, None, values=[""])
    (row,) = read(storage, writer(storage).commit([result], {}, {}))[0].to_pylist()
    assert row["gen_text"] == ""
    assert row["gen_status"] == "ok"
    assert (row["gen_num_output_tokens"], row["gen_num_cached_tokens"]) == (0, 0)
    assert row["gen_latency_s"] == 0.0


def test_names_count_up_within_epoch_and_worker(storage):
    out = writer(storage)
    found = [out.commit(results(batch([row])), {}, {}).name for row in range(3)]
    assert found == [f"parts/e000003-w02-s{serial:06d}.parquet" for serial in range(3)]
    assert storage.list("parts") == found


def test_the_footer_books_are_the_content(storage):
    given_batch = [*results(batch([9, 2, 3], segment=1), errors={3: BAD}), *results(batch([0]))]
    skipped = RowSet({1: Ranges.of([1, 4]), 5: Ranges.of([7])})
    engine = {"engine": "fake", "version": "7", "device": "none"}
    table, footer = read(storage, writer(storage).commit(given_batch, skipped, engine))
    assert footer == PartFooter(
        plan="plan-a",
        epoch=3,
        run_id="run-9",
        done=RowSet({0: Ranges.of([0]), 1: Ranges.of([1, 2, 3, 4, 9]), 5: Ranges.of([7])}),
        num_ok=3,
        num_errors=1,
        num_skipped=3,
        engine=engine,
        tally={"verdict": {"ok": 3, "error": 1}, "attempts": {"1": 3, "0": 1}},
    )
    # A row that was never asked for was answered by nobody.
    assert table["id"].to_pylist() == ["0/0", "1/2", "1/3", "1/9"]
    assert table["gen_engine"].to_pylist() == ["fake 7", "fake 7", None, "fake 7"]
    assert table.num_rows == footer.num_results == 4


def test_rows_are_in_ordinal_order_whatever_order_they_finished_in(storage):
    first, second = batch([0, 1, 2]), batch([3, 4], segment=0)
    other = batch([0, 1], segment=1)
    done = [*results(other), *results(second), *results(first)]
    done = [done[at] for at in (3, 0, 6, 1, 4, 2, 5)]
    table, _ = read(storage, writer(storage).commit(done, {}, {}))
    assert table["_batchgen_segment"].to_pylist() == [0, 0, 0, 0, 0, 1, 1]
    assert table["_batchgen_row"].to_pylist() == [0, 1, 2, 3, 4, 0, 1]
    assert table["id"].to_pylist() == ["0/0", "0/1", "0/2", "0/3", "0/4", "1/0", "1/1"]
    assert table["gen_text"].to_pylist() == ["0:0", "0:1", "0:2", "0:3", "0:4", "1:0", "1:1"]


def test_only_skipped_rows_make_a_part_without_rows_but_with_the_schema(storage):
    part = writer(storage).commit([], RowSet({0: Ranges.until(5)}), {})
    table, footer = read(storage, part)
    assert table.num_rows == 0
    assert table.schema.remove_metadata() == part_schema(ID, ANSWER, "gen_")
    assert (footer.num_skipped, footer.done) == (5, RowSet({0: Ranges.until(5)}))


def test_a_job_may_carry_no_column_at_all(storage):
    none = pa.record_batch({"id": ["a", "b"]}).select([])
    given_batch = batch([0, 1], carried=none)
    table, _ = read(storage, writer(storage, pa.schema([])).commit(results(given_batch), {}, {}))
    assert table.column_names == ["_batchgen_segment", "_batchgen_row", *(f"gen_{x}" for x in OURS)]
    assert table["gen_text"].to_pylist() == ["0:0", "0:1"]


RICH = {
    "string": (pa.string(), ["a", None, "c"]),
    "large_string": (pa.large_string(), ["a", None, "c"]),
    "binary": (pa.binary(), [b"\x00", None, b"c"]),
    "int8": (pa.int8(), [-128, None, 127]),
    "uint64": (pa.uint64(), [2**64 - 1, None, 0]),
    "float16": (pa.float32(), [1.5, None, -0.0]),
    "bool": (pa.bool_(), [True, None, False]),
    "decimal": (pa.decimal128(20, 3), [decimal.Decimal("1.234"), None, decimal.Decimal("-9.000")]),
    "date": (pa.date32(), [dt.date(2024, 2, 29), None, dt.date(1969, 1, 1)]),
    "timestamp_ns": (pa.timestamp("ns", "UTC"), [1000, None, 3000]),
    "list": (pa.list_(pa.int64()), [[1, 2], None, []]),
    "struct": (
        pa.struct([("a", pa.int64()), ("b", pa.list_(pa.string()))]),
        [{"a": 1, "b": ["x"]}, None, {"a": None, "b": None}],
    ),
    "messages": (
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        [[{"role": "user", "content": "hi"}], None, []],
    ),
    "map": (pa.map_(pa.string(), pa.int64()), [[("a", 1)], None, []]),
    "fixed": (pa.list_(pa.float32(), 2), [[1.0, 2.0], None, [3.0, 4.0]]),
    "dictionary": (pa.dictionary(pa.int32(), pa.string()), ["a", None, "c"]),
    "null": (pa.null(), [None, None, None]),
}


@pytest.mark.parametrize("kind", RICH)
def test_a_carried_column_keeps_its_type_and_values_across_batches(storage, kind):
    """Two batches, finished mixed; a dictionary column has another dictionary in each."""
    data_type, values = RICH[kind]
    first = batch([0, 1, 2], carried=pa.record_batch({"x": pa.array(values, data_type)}))
    second = batch([3, 4], carried=pa.record_batch({"x": pa.array(values[:0:-1], data_type)}))
    mixed = [*results(second), *results(first)]
    schema = pa.schema([pa.field("x", data_type)])
    table, _ = read(storage, writer(storage, schema).commit(mixed[::-1], {}, {}))
    assert table.schema.field("x").type == data_type
    wanted = pa.array([*values, *values[:0:-1]], data_type).to_pylist()
    assert table["x"].to_pylist() == wanted


def test_a_dictionary_with_small_indices_is_carried(storage):
    """Parquet itself knows only int32 indices."""
    data_type = pa.dictionary(pa.int8(), pa.string())
    carried = pa.record_batch({"x": pa.array(["a", "b"], pa.string()).cast(data_type)})
    given_batch = batch([0, 1], carried=carried)
    schema = pa.schema([pa.field("x", data_type)])
    table, _ = read(storage, writer(storage, schema).commit(results(given_batch), {}, {}))
    assert table["x"].to_pylist() == ["a", "b"]


def test_a_column_that_may_not_be_null_is_carried_for_rows_that_could_not_be_read(storage):
    """An error row has nulls in columns that the input's schema says are never null."""
    required = pa.schema([pa.field("n", pa.int64(), nullable=False)])
    carried = pa.record_batch({"n": pa.array([1, None], pa.int64())})
    done = results(batch([0, 1], carried=carried), errors={1: BAD})
    table, _ = read(storage, writer(storage, required).commit(done, {}, {}))
    assert table["n"].to_pylist() == [1, None]


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 12))
def test_any_finish_order_and_batch_size_give_the_same_table(tmp_path_factory, order, size):
    storage = LocalStorage(tmp_path_factory.mktemp("out"))
    batches = [batch(list(range(12))[at : at + size]) for at in range(0, 12, size)]
    done = [result for one in batches for result in results(one)]
    table, footer = read(storage, writer(storage).commit([done[at] for at in order], {}, {}))
    assert table["_batchgen_row"].to_pylist() == list(range(12))
    assert table["id"].to_pylist() == [f"0/{row}" for row in range(12)]
    assert table["gen_text"].to_pylist() == [f"0:{row}" for row in range(12)]
    assert footer.done == {0: Ranges.until(12)}


def test_a_batch_kept_by_two_parts_gives_each_its_rows(storage):
    done = results(batch([0, 1, 2, 3]))
    out = writer(storage)
    names = [out.commit(done[::2], {}, {}), out.commit(done[1::2], {}, {})]
    assert [read(storage, name)[0]["id"].to_pylist() for name in names] == [
        ["0/0", "0/2"],
        ["0/1", "0/3"],
    ]


def test_a_carried_slice_of_a_larger_batch_gives_its_own_rows(storage):
    """Readers hand out slices; the rows before the slice are not theirs."""
    large = pa.record_batch({"id": [f"x{n}" for n in range(10)]})
    done = results(batch([0, 1, 2], carried=large.slice(4, 3)))
    table, _ = read(storage, writer(storage).commit(done, {}, {}))
    assert table["id"].to_pylist() == ["x4", "x5", "x6"]


def test_a_text_of_any_unicode_comes_back(storage):
    text = "a\x00b\u2028\U0001f600\u00e9\r\n"
    given_batch = batch([0])
    result = Result(
        Ordinal(0, 0), given_batch, 0, "k", completion(0, text=text), None, values=[text]
    )
    table, _ = read(storage, writer(storage).commit([result], {}, {}))
    assert table["gen_text"].to_pylist() == [text]


class BrokenOnce(LocalStorage):
    """Fails the first put."""

    broken = True

    def put_if_absent(self, name, data):
        if self.broken:
            self.broken = False
            raise StorageError(name, f"errno {errno.EIO}")
        return super().put_if_absent(name, data)


def test_a_commit_that_failed_may_be_made_again_under_the_same_name(tmp_path):
    storage = BrokenOnce(tmp_path)
    out = writer(storage)
    done = results(batch([0, 1]))
    with pytest.raises(StorageError, match="errno 5"):
        out.commit(done, {}, {})
    assert out.commit(done, {}, {}).name == "parts/e000003-w02-s000000.parquet"
    assert storage.list("parts") == ["parts/e000003-w02-s000000.parquet"]


def test_a_name_that_holds_other_rows_is_not_taken_for_success(storage):
    """Never seen while epochs are exclusive; but silence here would be rows lost."""
    writer(storage).commit(results(batch([0])), {}, {})
    with pytest.raises(BatchgenError, match="s000000"):
        writer(storage).commit(results(batch([1])), {}, {})


@pytest.mark.parametrize("prefix", ["gen_", "", "x."])
def test_our_columns_follow_the_carried_ones_under_the_prefix(prefix):
    schema = part_schema(pa.schema([("id", pa.string()), ("n", pa.int64())]), ANSWER, prefix)
    ours = [prefix + name for name in OURS]
    assert schema.names == ["_batchgen_segment", "_batchgen_row", "id", "n", *ours]
    assert published_schema(schema).names == ["id", "n", *ours]
    assert set(dictionary_columns(prefix)) <= set(ours)


def test_seeds_are_kept_where_they_are_asked_for(storage):
    schema = part_schema(ID, ANSWER, "gen_", with_seed=True)
    out = PartWriter(
        storage, "parts", PartContext("plan-a", 1, 0, "run-9", schema, "gen_", with_seed=True)
    )
    one, two = results(batch([0, 1]))
    table, _ = read(storage, out.commit([one, two._replace(seed=2**62 - 1)], {}, {}))
    assert table["gen_seed"].to_pylist() == [None, 2**62 - 1]
    assert table.column_names.index("gen_seed") == table.column_names.index("gen_attempts") + 1


def test_two_columns_of_one_name_are_refused():
    answer = [*ANSWER, pa.field("status", pa.string())]
    with pytest.raises(ConfigError, match="the schema's field 'status' is a column of batchgen's"):
        part_schema(ID, answer, "gen_")


@pytest.mark.parametrize(
    ("column", "prefix"), [("gen_text", "gen_"), ("status", ""), ("_batchgen_row", "gen_")]
)
def test_a_carried_column_of_our_name_is_refused(column, prefix):
    with pytest.raises(ConfigError, match=f"output.prefix: '{prefix}' makes the column '{column}'"):
        part_schema(pa.schema([("id", pa.string()), (column, pa.string())]), ANSWER, prefix)


def test_a_carried_column_named_like_an_optional_one_of_ours_is_carried(storage):
    carried = pa.record_batch({"id": ["a"], "seed": ["s"]})
    schema = part_schema(carried.schema, ANSWER, "")
    out = PartWriter(storage, "parts", PartContext("plan-a", 1, 0, "run-9", schema, ""))
    table, _ = read(storage, out.commit(results(batch([0], carried=carried)), {}, {}))
    assert (table["seed"].to_pylist(), table["run_id"].to_pylist()) == (["s"], ["run-9"])


def test_an_answer_column_may_be_named_seed(storage):
    answer = [pa.field("seed", pa.string())]
    schema = part_schema(ID, answer, "gen_")
    out = PartWriter(storage, "parts", PartContext("plan-a", 1, 0, "run-9", schema, "gen_"))
    table, _ = read(storage, out.commit(results(batch([0])), {}, {}))
    assert table["gen_seed"].to_pylist() == ["0:0"]


def test_labels_are_counted_whatever_their_fields_are_called(storage):
    kind = pa.struct([("a.b", pa.string()), ("", pa.string())])
    schema = part_schema(ID, [pa.field("output", kind)], "gen_")
    paths = [("output", "a.b"), ("output", "")]
    context = PartContext("plan-a", 1, 0, "run-9", schema, "gen_", labels=paths)
    rows = [row._replace(values=[{"a.b": "x", "": "y"}]) for row in results(batch([0, 1]))]
    name = PartWriter(storage, "parts", context).commit(rows, {}, {})
    _, footer = read(storage, name)
    assert footer.tally["gen_output.a.b"] == {"x": 2}
    assert footer.tally["gen_output."] == {"y": 2}
