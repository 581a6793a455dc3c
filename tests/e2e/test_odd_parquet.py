"""Parquet of every type and any value: the run ends, bad rows are error rows, the rest is exact."""

from __future__ import annotations

import json
import pickle
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
        # As bytes NaN is like NaN, and each bit of a number counts.
        pairs = zip(to_python(one), to_python(two), is_ok, strict=True)
        assert not [
            1 for was, now, good in pairs if good and pickle.dumps(was) != pickle.dumps(now)
        ], name
    if all(is_ok):
        (out,) = (folder / "out").glob("part-*.parquet")
        for reader in ("polars", "duckdb"):
            names = given_table.column_names
            assert as_read_by(reader, out, names) == as_read_by(reader, source, names)


@settings(
    max_examples=15,
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


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


KINDS = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int8(), pa.binary())]


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        (form, kind)
        for form in ("user", "text", "messages", "row")
        for kind in KINDS
        if (form, kind) != ("messages", pa.binary_view())  # pyarrow cannot write lists of these.
    ],
    ids=str,
)
def test_binary_text_is_text_in_every_form_of_a_prompt(tmp_path, form, kind):
    values = pa.array(["Café".encode(), b"\xff", b"plain"], pa.binary())
    column = values.dictionary_encode() if pa.types.is_dictionary(kind) else values
    column = column.cast(kind)
    if form == "messages":
        roles = pa.array([b"user"] * 3, pa.binary())
        chat = pa.StructArray.from_arrays([roles, column], ["role", "content"])
        column = pa.ListArray.from_arrays([0, 1, 2, 3], chat)
    written(tmp_path, pa.table({"v": column, "unused": [b"\xfe"] * 3}))
    forms = {
        "user": {"user": "{{ v }}"},
        "text": {"text": "v"},
        "messages": {"messages": "v"},
        "row": {"user": "{{ row['v'] }}"},
    }
    job = write_job(tmp_path, "in.parquet", gate=OPEN_GATE)
    text = job.read_text(encoding="utf-8").replace(
        'user = "Repeat: {{ text }}"',
        "\n".join(f"{key} = {json.dumps(value)}" for key, value in forms[form].items()),
    )
    job.write_text(text, encoding="utf-8")
    assert batchgen.run(job).num_ok == 2
    found = published(tmp_path)
    assert found["gen_text"].to_pylist() == ["Café", None, "plain"]
    assert found["gen_error_type"].to_pylist()[1] in {"invalid_utf8", "bad_messages"}
    check_carried(
        pq.read_table(tmp_path / "in.parquet"),
        tmp_path / "in.parquet",
        tmp_path,
        [True, False, True],
    )
