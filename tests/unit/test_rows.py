"""Rows as people ask for them: by kind of error, by columns, with their place in the input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import batchgen
from batchgen.api.endings import look_back
from batchgen.cli import cli
from batchgen.core.errors import ConfigError
from batchgen.job.load import parse_job
from batchgen.store.books import STATE
from batchgen.views.rows import INPUT, LINE, Output, Shown, as_json, error_lines, output_of, rows

BAD = '{"id": 3, "text": '
LINES = [
    *(json.dumps({"id": at, "text": text}) for at, text in enumerate(["a", None, "c"])),
    BAD,
    "",
    *(json.dumps({"id": at, "text": None if at % 2 else "x"}) for at in range(5, 9)),
]
NO_LIMIT = {"checks": {"allow_truncated": True}, "gate": {"max_error_rate": 1.0}}


def tables_of(folder: Path, **tables: Any) -> dict[str, Any]:
    return {
        "input": {"path": str(folder / "in.jsonl")},
        "prompt": {"user": "{{ text }}"},
        "model": {"backend": "echo"},
        "sampling": {"max_tokens": 8, "temperature": 0},
        "output": {"path": str(folder / "out")},
        **NO_LIMIT,
        **tables,
    }


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "in.jsonl").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return tables_of(tmp_path)


@pytest.fixture
def root(job: dict[str, Any]) -> Path:
    """Published."""
    return Path(batchgen.run(job).output)


def shown(root: Path, *args: str) -> list[str]:
    done = CliRunner().invoke(cli, ["show", str(root), *args])
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


def test_a_row_is_named_by_its_place_in_the_input(root: Path) -> None:
    found = rows(root, Shown(100))
    path = root.parent / "in.jsonl"
    assert [row[INPUT] for row in found] == [
        f"row {at} of {path} (line {at + 1})" for at in (0, 1, 2, 3, 5, 6, 7, 8)
    ]
    assert [row["id"] for row in found] == [0, 1, 2, None, 5, 6, 7, 8]
    assert shown(root, "-n", "1", "--errors")[0] == f"--- row 1 of {path} (line 2)"


def test_only_errors_of_a_type_with_their_lines(root: Path) -> None:
    (bad,) = rows(root, Shown(error_type="bad_json", lines=True))
    assert bad[LINE] == BAD
    nulls = rows(root, Shown(error_type="null_value", lines=True))
    assert [row[LINE] for row in nulls] == [LINES[1], LINES[5], LINES[7]]
    assert len(rows(root, Shown(100, errors=True))) == 4
    (root.parent / "in.jsonl").write_text("\n".join(LINES[1:]) + "\n", encoding="utf-8")
    (bad,) = rows(root, Shown(error_type="bad_json", lines=True))
    assert bad[LINE] is None  # The file is another by now.


def test_a_type_or_a_column_that_is_not_there_is_told_with_what_there_is(root: Path) -> None:
    with pytest.raises(ConfigError, match="no error 'nul_value'; did you mean 'null_value'"):
        rows(root, Shown(error_type="nul_value"))
    with pytest.raises(ConfigError, match="no column 'txt'; did you mean 'text'"):
        rows(root, Shown(columns=["id", "txt"]))


def test_columns_in_the_order_asked_for(root: Path) -> None:
    line = shown(root, "--columns", "gen_status, id", "-n", "1", "--json")[0]
    place = f"row 0 of {root.parent / 'in.jsonl'} (line 1)"
    assert line == json.dumps({INPUT: place, "gen_status": "ok", "id": 0})


def test_each_row_is_a_line_of_json_whatever_it_holds(tmp_path: Path) -> None:
    values = [1.5, math.nan, math.inf, None]
    table = pa.table(
        {"text": ["a", "b\u202e\x1b", "c", "d"], "x": values, "y": [[v] for v in values]}
    )
    pq.write_table(table, tmp_path / "in.parquet")
    job = tables_of(tmp_path, input={"path": str(tmp_path / "in.parquet")})
    lines = shown(Path(batchgen.run(job).output), "--json")

    def refuse(text: str) -> None:
        raise ValueError(text)

    found = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["x"] for row in found] == [1.5, None, None, None]
    assert [row["y"] for row in found] == [[1.5], [None], [None], [None]]
    assert found[1]["text"] == "b\u202e\x1b"
    assert found[1][INPUT] == f"row 1 of {tmp_path / 'in.parquet'}"
    assert as_json({1: (math.nan,)}) == {"1": [None]}


def test_rows_of_an_unpublished_output_have_their_places_too(job: dict[str, Any]) -> None:
    with pytest.raises(batchgen.BatchgenError):
        batchgen.run({**job, "gate": {"max_error_rate": 0.0}})
    found = rows(Path(job["output"]["path"]), Shown(error_type="bad_json", lines=True))
    assert [(row["id"], row[LINE]) for row in found] == [(None, BAD)]
    assert "_batchgen_row" not in found[0]


def test_of_many_files_and_row_groups_each_row_is_found_where_it_is(tmp_path: Path) -> None:
    texts = [None if at % 7 == 3 else f"t{at}" for at in range(100)]
    lines = [json.dumps({"id": at, "text": text}) for at, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    job = tables_of(tmp_path, output={"path": str(tmp_path / "out"), "rows_per_file": 9})
    root = Path(batchgen.run(job).output)
    found = rows(root, Shown(100, errors=True, lines=True))
    assert [row["id"] for row in found] == [at for at in range(100) if at % 7 == 3]
    assert [row[LINE] for row in found] == [lines[row["id"]] for row in found]
    output = output_of(root)
    assert isinstance(output, Output)
    spread = [at for at, _, _ in output.groups(["id"], 4)]
    assert spread == [0, 3, 6, 9]


def test_a_run_ends_with_an_example_of_each_kind_of_error(job: dict[str, Any]) -> None:
    summary = batchgen.run(job)
    path = job["input"]["path"]
    null = "the prompt needs a value that is null; null here: text"
    assert summary.error_examples[0] == f"null_value 3: row 1 of {path} (line 2): {null}"
    assert summary.error_examples[1].startswith(f"bad_json 1: {path}:4: invalid JSON")
    text = summary.as_text().splitlines()
    at = text.index(f"  errors   {summary.error_examples[0]}")
    assert text[at + 1] == f"           {summary.error_examples[1]}"
    again = batchgen.run(job)
    assert (again.state, again.error_examples) == ("nothing_to_do", summary.error_examples)


def test_an_example_is_a_line_and_of_bounded_length(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": "b\\n' + "x" * 5000 + '"}\n')
    short = {"max_tokens": 1, "temperature": 0}
    job = tables_of(tmp_path, sampling=short, checks={"allow_truncated": False})
    lines = error_lines(Path(batchgen.run(job).output))
    assert lines
    assert all(len(line) <= 200 and "\n" not in line for line in lines)


def test_what_cannot_be_looked_at_is_a_warning_and_no_end(
    job: dict[str, Any],
) -> None:
    summary = batchgen.run(job)
    root = Path(summary.output)
    (snapshot,) = (root / STATE / "files").glob("*.parquet")
    snapshot.chmod(0o644)
    snapshot.write_bytes(b"x" * snapshot.stat().st_size)
    summary.error_examples.clear()
    look_back(parse_job(job, base=root, where="job"), summary)
    assert summary.error_examples == []
    assert "report could not be written" in summary.warnings[-1]
