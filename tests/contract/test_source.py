"""One suite for every input format, local and memory://, on the same logical rows."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchgen.core.errors import SourceError
from batchgen.core.records import Ranges
from batchgen.source.columns import parse_field
from batchgen.source.formats import find_files, reader_for
from batchgen.source.reading import ReadSpec
from batchgen.source.text import LineIndexes, digest_prefix

if TYPE_CHECKING:
    from batchgen.core.records import RowBatch
    from batchgen.source.reading import Reader

NUM_ROWS = 67
ROWS: list[dict[str, Any]] = [
    {
        "id": f"r{n}",
        "prompt": f'say "{n}",\nplease\u2028 \u00e9\U0001f600 {"x" * (n % 7)}',
        "n": n - 30,
        "score": n / 8,
        "good": n % 3 == 0,
        "note": None if n % 5 == 0 else f"note {n}",
    }
    for n in range(NUM_ROWS)
]
TYPES = {
    "id": "string",
    "prompt": "string",
    "n": "int64",
    "score": "float64",
    "good": "bool",
    "note": "string",
}
SCHEMA = pa.schema([parse_field(name, word) for name, word in TYPES.items()])
KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.gz", "tsv", "parquet")
SERIAL = itertools.count()


def as_jsonl() -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def as_csv(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\r\n")
    writer.writerow(TYPES)
    for row in ROWS:
        shown = {**row, "good": str(row["good"]).lower()}
        writer.writerow(["" if shown[name] is None else shown[name] for name in TYPES])
    return text.getvalue().encode()


def as_parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS, schema=SCHEMA), out, row_group_size=10)
    return out.getvalue()


def content(kind: str) -> bytes:
    base, _, packing = kind.partition(".")
    data = {
        "jsonl": as_jsonl,
        "csv": lambda: as_csv(","),
        "tsv": lambda: as_csv("\t"),
        "parquet": as_parquet,
    }[base]()
    if packing == "gz":  # two members
        return gzip.compress(data[:1000]) + gzip.compress(data[1000:])
    if packing == "zst":  # two frames, sizes not written
        packer = zstandard.ZstdCompressor(write_content_size=False)
        return packer.compress(data[:1000]) + packer.compress(data[1000:])
    return data


@dataclass(frozen=True)
class Case:
    path: str
    reader: Reader
    data: bytes
    spec: ReadSpec


@pytest.fixture(params=[f"{kind} {place}" for kind in KINDS for place in ("local", "memory")])
def case(request, tmp_path) -> Case:
    kind, place = request.param.split()
    data = content(kind)
    if place == "local":
        path = str(tmp_path / f"rows.{kind}")
    else:
        path = f"memory://source-{next(SERIAL)}/rows.{kind}"
    with fsspec.open(path, "wb") as out:
        out.write(data)
    found = find_files([path])
    reader, files = reader_for(found.format), found.paths
    overrides = TYPES if found.format == "csv" else {}
    schema = reader.columns(files, overrides)
    needed = frozenset({"prompt", "note"})
    return Case(files[0], reader, data, ReadSpec(schema, list(TYPES), needed, batch_rows=8))


def read(case: Case, todo: Ranges, **changes) -> list[RowBatch]:
    return list(case.reader.read(case.path, 3, todo, replace(case.spec, **changes)))


def expected(row: dict[str, Any], case: Case) -> dict[str, Any]:
    """CSV cannot tell an empty text from an absent one."""
    is_csv = "csv" in case.path or "tsv" in case.path
    return {name: "" if is_csv and value is None else value for name, value in row.items()}


def test_columns_have_the_planned_types(case):
    assert case.spec.columns == SCHEMA


def test_sniff_accepts_it(case):
    assert case.reader.sniff(case.path) is None


def test_all_rows_come_with_their_ordinals_values_and_columns(case):
    batches = read(case, Ranges.until(NUM_ROWS))
    rows = [expected(row, case) for row in ROWS]
    assert [row for batch in batches for row in batch.rows] == list(range(NUM_ROWS))
    assert [row for batch in batches for row in batch.carried.to_pylist()] == rows
    assert [value for batch in batches for value in batch.values] == [
        {"note": row["note"], "prompt": row["prompt"]} for row in rows
    ]
    assert {batch.segment for batch in batches} == {3}
    assert not any(batch.errors or batch.skipped for batch in batches)


def test_batches_are_bounded(case):
    assert max(len(batch.rows) for batch in read(case, Ranges.until(NUM_ROWS))) == 8
    assert [len(b.rows) for b in read(case, Ranges.until(3), batch_rows=1)] == [1, 1, 1]


def test_carried_columns_come_in_the_asked_order(case):
    (batch,) = read(case, Ranges.until(2), carried=["n", "id"], needed=frozenset())
    assert batch.carried.to_pydict() == {"n": [-30, -29], "id": ["r0", "r1"]}
    assert batch.carried.schema == pa.schema([SCHEMA.field("n"), SCHEMA.field("id")])
    assert batch.values == [{}, {}]


def test_without_carried_columns_the_number_of_rows_is_kept(case):
    (batch,) = read(case, Ranges.until(2), carried=[], needed=frozenset())
    assert (batch.carried.num_rows, batch.carried.num_columns) == (2, 0)
    assert batch.rows == [0, 1]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.sets(st.integers(0, NUM_ROWS - 1)), batch_rows=st.integers(1, 12))
def test_resume_gives_exactly_the_rows_asked_for(case, rows, batch_rows):
    batches = read(case, Ranges.of(rows), batch_rows=batch_rows)
    assert [row for batch in batches for row in batch.rows] == sorted(rows)
    found = [row for batch in batches for row in batch.carried.to_pylist()]
    assert found == [expected(ROWS[row], case) for row in sorted(rows)]
    assert all(len(batch.rows) <= batch_rows for batch in batches)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.sets(st.integers(0, NUM_ROWS - 1)))
def test_where_splits_the_rows_asked_for_into_rows_and_skipped(case, rows):
    batches = read(case, Ranges.of(rows), where="n > 0 AND good", carried=["id"])
    passed = {row for row in rows if ROWS[row]["n"] > 0 and ROWS[row]["good"]}
    assert [row for batch in batches for row in batch.rows] == sorted(passed)
    assert sorted(row for batch in batches for row in batch.skipped) == sorted(rows - passed)
    assert [v for b in batches for v in b.carried.column("id").to_pylist()] == [
        f"r{row}" for row in sorted(passed)
    ]
    assert all(len(b.values) == len(b.rows) == b.carried.num_rows for b in batches)


def test_a_late_row_is_cheap_in_parquet_and_local_plain_lines(case):
    is_plain = case.path.endswith(".jsonl") and not case.path.startswith("memory:")
    assert case.reader.is_seekable(case.path) == (is_plain or case.path.endswith(".parquet"))


def test_marks_are_learnt_of_local_plain_lines_only(case):
    indexes = LineIndexes(every_bytes=1)
    batches = read(case, Ranges.until(NUM_ROWS), line_indexes=indexes)
    assert sum(len(batch.rows) for batch in batches) == NUM_ROWS
    is_learnt = case.path.endswith(".jsonl") and not case.path.startswith("memory:")
    assert (len(indexes.of(case.path)) > 1) == is_learnt


def test_scan_counts_rows_and_hashes_content(case):
    scan = case.reader.scan(case.path)
    assert scan.num_rows == NUM_ROWS
    assert scan.digest == digest_prefix(case.path, len(case.data))
    if "parquet" not in case.path:
        assert scan.digest == hashlib.sha256(case.data).hexdigest()
        assert digest_prefix(case.path, 100) == (hashlib.sha256(case.data[:100]).hexdigest())


def test_digest_of_more_bytes_than_there_are_is_refused(case):
    with pytest.raises(SourceError, match=f"{len(case.data) + 1}"):
        digest_prefix(case.path, len(case.data) + 1)


def test_a_row_beyond_the_end_is_refused(case):
    with pytest.raises(SourceError, match=f"has {NUM_ROWS} rows, expected at least 70$"):
        read(case, Ranges([(60, 70)]))


def test_no_rows_asked_for_gives_no_batches(case):
    assert read(case, Ranges()) == []


def test_an_override_of_an_unknown_column_is_refused(case):
    with pytest.raises(SourceError, match=r"has no column 'promt' .*did you mean 'prompt'"):
        case.reader.columns([case.path], {"promt": "string"})


def test_an_absent_file_is_refused(case):
    with pytest.raises(SourceError, match="does not exist"):
        case.reader.scan(case.path.replace("rows", "none"))
