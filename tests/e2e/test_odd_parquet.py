"""Parquet of every type and any value: the run ends, bad rows are error rows, the rest is exact."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import batchgen
from batchgen.source.values import to_python
from tests.e2e.support import write_job
from tests.odd import arrays

BAD = {"invalid_utf8", "bad_value", "null_value", "empty_prompt"}
OPEN_GATE = {"max_error_rate": 1.0}


def written(folder: Path, table: pa.Table, name: str = "in.parquet") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def run(folder: Path, source: str, user: str, **tables: Any) -> pa.Table:
    """Run a job to its end; what it published."""
    job = write_job(folder, source, prompt={"user": user}, gate=OPEN_GATE, **tables)
    summary = batchgen.run(job)
    assert summary.exit_code == 0
    return published(folder)


def published(folder: Path) -> pa.Table:
    files = sorted((folder / "out").glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files])


def as_read_by(reader: str, path: Path, names: list[str]) -> str:
    """The values of columns as another library reads them, or that it does not."""
    try:
        if reader == "polars":
            return str(pl.read_parquet(path).select(names).rows())
        duckdb = pytest.importorskip("duckdb")
        quoted = ", ".join(f'"{name}"' for name in names)
        return str(duckdb.sql(f"select {quoted} from '{path}'").fetchall())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | pytest.skip.Exception):
            raise
        return f"cannot: {type(error).__name__}"


def check_carried(given_table: pa.Table, source: Path, folder: Path, is_ok: list[bool]) -> None:
    """What was carried is what came in, whoever reads it; of rows without error, all of it."""
    found = published(folder)
    for name in given_table.column_names:
        assert found.schema.field(name).type == given_table.schema.field(name).type
        one, two = given_table[name].combine_chunks(), found[name].combine_chunks()
        # Every bit of a number is in its repr, and NaN is like NaN there.
        pairs = zip(to_python(one), to_python(two), is_ok, strict=True)
        assert not [1 for was, now, good in pairs if good and repr(was) != repr(now)], name
    if all(is_ok):
        (out,) = (folder / "out").glob("part-*.parquet")
        for reader in ("polars", "duckdb"):
            names = given_table.column_names
            assert as_read_by(reader, out, names) == as_read_by(reader, source, names)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.lists(arrays(), min_size=1, max_size=4))
def test_any_table_is_run_to_its_end(columns):
    table = pa.table({f"c{at}": column for at, column in enumerate(columns)})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            source = written(folder, table)
        except pa.ArrowException:  # Parquet lacks the type, or the value: a date in nanoseconds.
            return
        user = " | ".join(f"{{{{ c{at} }}}}" for at in range(len(columns)))
        found = run(folder, "in.parquet", user)
        errors = found["gen_error_type"].to_pylist()
        assert set(errors) <= {None, *BAD}
        # As the file has it: Parquet keeps no dictionary of a list, say.
        check_carried(pq.read_table(source), source, folder, [error is None for error in errors])
        text = found["gen_text"].to_pylist()
        assert not any("b'" in it for it in text if it and "b'" not in str(columns))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(arrays())
def test_any_column_may_be_filtered_by_or_is_refused_beforehand(column):
    """Never may a value end a run that has begun."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            written(folder, pa.table({"x": column, "n": [1, 2, 3]}))
        except pa.ArrowException:
            return
        where = {"path": "in.parquet", "where": "x IS NOT NULL OR n > 1"}
        job = write_job(
            folder, "in.parquet", prompt={"user": "{{ n }}"}, gate=OPEN_GATE, input=where
        )
        try:
            code = batchgen.run(job).exit_code
        except batchgen.BatchgenError as error:
            code = error.exit_code
            is_refused = "where" in str(error)
        assert code == 0 or (code == 2 and is_refused)
