"""Folders and files whose names are bytes that are not UTF-8, as old archives and shares have."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

import batchgen
from tests.e2e.support import command, write_job, write_rows

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [b"caf\xe9", b"a\xed\xa0\x80b"]


@pytest.fixture(params=NAMES, ids=[f"{name!r}" for name in NAMES])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    found = tmp_path / os.fsdecode(request.param)
    found.mkdir()
    return found


def run(folder: Path, *args: str, code: int = 0) -> str:
    done = subprocess.run(command(*args), capture_output=True, check=False, cwd=folder, timeout=120)
    text = (done.stdout + done.stderr).decode()
    assert done.returncode == code, text
    assert "Traceback" not in text
    return text


def summary(folder: Path, *args: str) -> dict[str, Any]:
    text = run(folder, "run", "job.toml", "--json", *args)
    found: dict[str, Any] = json.loads(next(it for it in text.splitlines() if it.startswith("{")))
    return found


def test_a_job_lives_in_such_a_folder_and_reads_such_files(folder):
    """139 rows that are whole, of 140 lines; two are blank, two are no JSON."""
    inputs = folder / "in"
    inputs.mkdir()
    write_rows(inputs / f"{folder.name}.jsonl", 140)
    write_job(folder, "in", gate={"max_error_rate": 0.5})
    assert "row 0" in run(folder, "check", "job.toml")
    assert "140 planned" in run(folder, "plan", "job.toml")
    first = summary(folder)
    assert (first["state"], first["num_ok"], first["num_errors"]) == ("complete", 136, 2)
    assert summary(folder)["state"] == "nothing_to_do"
    with (inputs / f"{folder.name}.jsonl").open("a") as file:
        file.write('{"id": 1000, "text": "new"}\n{bad\n')
    second = summary(folder)
    assert (second["state"], second["run"]["num_ok"], second["num_errors"]) == ("complete", 1, 3)
    for words in ("status", "show", "verify", "diff"):
        run(folder, words, "job.toml")
    errors = batchgen.read(folder / "out").collect()["gen_error"].drop_nulls().to_list()
    assert len(errors) == 3
    assert all(".jsonl:" in text for text in errors)
