"""Jobs in folders whose names look like patterns, URL chains or dates, and inputs full of links."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

import batchgen
from batchgen.cli import cli as commands
from tests.e2e.support import run_cli, summary_of, write_job

if TYPE_CHECKING:
    from pathlib import Path

PLACES = ("data[1]", "a::b", "st*r", "**", "{date}#%25")


def write_lines(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def texts_of(job: Path) -> list[str]:
    rows = batchgen.read(job).collect().to_dicts()
    assert all(row["gen_error"] is None for row in rows)
    return [row["text"] for row in rows]


def cli(*arguments: str | Path) -> int:
    done = CliRunner().invoke(commands, [str(argument) for argument in arguments])
    return 0 if done.exception is None else done.exit_code


@pytest.mark.parametrize("place", PLACES)
def test_the_jobs_own_folder_is_never_a_pattern(tmp_path: Path, place: str) -> None:
    """Every path of the job file, and every command that reads what was written."""
    folder = tmp_path / place
    for other in ("data1", "a", "star", "what", "y", "z/z"):  # What the names would match.
        write_lines(tmp_path / other / "in[1].jsonl", "wrong")
    write_lines(folder / "in[1].jsonl", '{"a": 1}', '{"a": 2}')
    write_lines(folder / "in1.jsonl", "wrong")
    (folder / "prompt*.txt").write_text("{{ text }}")
    (folder / "schema[a].json").write_text(
        json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    )
    job = write_job(
        folder,
        "in[1].jsonl",
        prompt={"user_file": "prompt*.txt"},
        output={"path": "out[1]", "schema": "schema[a].json", "flatten": True},
        run={"metrics_file": "m[1].prom"},
    )
    job.write_text(job.read_text().replace('user = "Repeat: {{ text }}"\n', ""))
    for command in ("check", "plan", "doctor"):
        assert cli(command, job) == 0
    assert batchgen.run(job).num_ok == 2
    assert texts_of(job) == ['{"a": 1}', '{"a": 2}']
    assert (folder / "m[1].prom").exists()
    write_lines(folder / "in[1].jsonl", '{"a": 1}', '{"a": 2}', '{"a": 3}')
    assert batchgen.run(job).num_ok == 3
    assert batchgen.read(job).collect()["gen_a"].to_list() == [1, 2, 3]
    for command in ("status", "show", "verify", "snapshots", "plan"):
        assert cli(command, job) == 0
    assert cli("diff", job) == 0
    assert cli("prune", job, "--keep", "1") == 0


def test_rows_of_a_file_that_becomes_a_link_stay_and_what_is_left_out_is_said(
    tmp_path: Path,
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", "a1", "a2")
    write_lines(tmp_path / "in" / "b.jsonl", "b1")
    write_lines(tmp_path / "in" / "_c.jsonl", "c1")
    write_lines(tmp_path / "in" / "sub" / "d.jsonl", "d1")
    job = write_job(tmp_path, "in")
    said = (
        "_c.jsonl left out: the name begins with . or _ (name it to read it)",
        "sub left out: it is a folder (name it to read the files in it)",
    )
    for command in ("check", "plan", "run"):
        done = run_cli(command, job)
        assert all(text in done.stdout + done.stderr for text in said), command
    assert texts_of(job) == ["a1", "a2", "b1"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "b.jsonl").rename(tmp_path / "elsewhere" / "b.jsonl")
    (tmp_path / "in" / "b.jsonl").symlink_to("../elsewhere/b.jsonl")
    assert summary_of(job)["num_ok"] == 3
    assert texts_of(job) == ["a1", "a2", "b1"]
    (tmp_path / "elsewhere" / "b.jsonl").unlink()
    for command in ("plan", "run"):
        done = run_cli(command, job)
        assert done.returncode == 2
        assert (
            "b.jsonl: is a link to '../elsewhere/b.jsonl', which leads nowhere"
            in done.stdout + done.stderr
        )
    assert texts_of(job) == ["a1", "a2", "b1"]
