"""Docs cannot drift: generated parts are equal, every example loads."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING

import pytest
from jsonschema import Draft202012Validator

from batchgen.core.errors import ExitCode
from batchgen.job.load import json_schema, load_job, parse_job
from tests import docs

if TYPE_CHECKING:
    from pathlib import Path

JOBS = sorted((docs.ROOT / "jobs").rglob("*.toml"))


def test_the_editor_schema_is_up_to_date() -> None:
    assert docs.SCHEMA.read_text() == docs.schema_text(), "run `make docs`"


def test_the_readmes_option_table_is_up_to_date() -> None:
    assert docs.README.read_text() == docs.readme_text(), "run `make docs`"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_shipped_job_loads_and_names_the_schema(path: Path) -> None:
    load_job(path)
    text = path.read_text()
    assert text.startswith("#:schema ")
    assert (path.parent / text.split()[1]).resolve() == docs.SCHEMA
    Draft202012Validator(json_schema()).validate(tomllib.loads(text))


def test_the_readmes_job_loads(tmp_path: Path) -> None:
    first, labels = re.findall(r"```toml\n(.*?)```", docs.README.read_text(), re.DOTALL)
    tables = tomllib.loads(first)
    job = parse_job(tables, base=tmp_path, where="README.md")
    assert job.model.name == "Qwen/Qwen3-8B"
    (tmp_path / "ticket.schema.json").write_bytes(
        (docs.ROOT / "jobs" / "ticket.schema.json").read_bytes()
    )
    job = parse_job(tables | tomllib.loads(labels), base=tmp_path, where="README.md")
    assert len(job.retry) == 2


def test_the_readme_names_every_exit_code() -> None:
    table = docs.README.read_text().partition("## Exit codes")[2]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)] == list(
        ExitCode
    )
