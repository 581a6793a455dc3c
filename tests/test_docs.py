"""Docs cannot drift: generated parts are equal, every example loads, every link leads somewhere."""

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
PAGES = sorted((docs.ROOT / "docs").rglob("*.md"))
TEXTS = [docs.README, docs.ROOT / "CONTRIBUTING.md", *PAGES]
NAVIGATION = (docs.ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize("path", docs.generated(), ids=lambda path: path.name)
def test_what_is_generated_is_up_to_date(path: Path) -> None:
    assert path.read_text() == docs.generated()[path], "run `make docs`"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_shipped_job_loads_and_names_the_schema(path: Path) -> None:
    load_job(path)
    text = path.read_text()
    assert text.startswith("#:schema ")
    assert (path.parent / text.split()[1]).resolve() == docs.SCHEMA
    Draft202012Validator(json_schema()).validate(tomllib.loads(text))


def test_the_jobs_in_the_docs_load(tmp_path: Path) -> None:
    (first,) = re.findall(r"```toml\n(.*?)```", docs.README.read_text(), re.DOTALL)
    tables = tomllib.loads(first)
    job = parse_job(tables, base=tmp_path, where="README.md")
    assert job.model.name == "Qwen/Qwen3-8B"
    guide = docs.ROOT / "docs" / "guide" / "labels.md"
    (labels,) = re.findall(r"```toml\n(.*?)```", guide.read_text(), re.DOTALL)
    (tmp_path / "ticket.schema.json").write_bytes(
        (docs.ROOT / "jobs" / "ticket.schema.json").read_bytes()
    )
    job = parse_job(tables | tomllib.loads(labels), base=tmp_path, where=guide.name)
    assert len(job.retry) == 2


def test_the_readme_is_short_and_names_every_exit_code() -> None:
    text = docs.README.read_text()
    assert len(text.split()) <= 1600
    table = text.partition("## Exit codes")[2]
    codes = [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)]
    assert codes == list(ExitCode)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_what_is_linked_or_named_in_the_repository_exists(path: Path) -> None:
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []
    named = re.findall(r"(?<![\w/])((?:batchgen|tests|jobs|sample_data|docs)/[\w/.*-]*[\w*])", text)
    named += [f"{m.replace('.', '/')}.py" for m in re.findall(r"python -m (tests[\w.]+)", text)]
    assert [name for name in named if not any(docs.ROOT.glob(name))] == []


def test_the_rows_way_in_the_internals_goes_through_modules_that_exist() -> None:
    text = (docs.ROOT / "docs" / "internals.md").read_text()
    figure = text.partition("## The way of a row")[2].partition("Read `")[0]
    named = re.findall(r"\b(\w+/[\w/]+\.py)", figure)
    assert len(named) > 15
    assert [name for name in named if not (docs.ROOT / "batchgen" / name).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_page_is_in_the_navigation(path: Path) -> None:
    assert path.relative_to(docs.ROOT / "docs").as_posix() in NAVIGATION
