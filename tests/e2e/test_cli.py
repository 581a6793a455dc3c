"""What the commands print and how they end."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from batchgen import cli
from tests.e2e.support import run_cli, write_job, write_rows

if TYPE_CHECKING:
    from pathlib import Path


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from batchgen.cli import cli; cli(['run', '--help'], standalone_mode=False); "
        "heavy = {'vllm', 'torch', 'ray', 'pyarrow', 'polars', 'transformers', 'pydantic'}; "
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", sorted(cli.cli.commands))
def test_every_command_has_a_sentence_and_an_example(name: str) -> None:
    text = cli.cli.commands[name].help or ""
    assert text.split("\n")[0].endswith(".")
    assert f"Example: batchgen {name}" in text


def test_check_shows_columns_and_prompts_and_loads_no_engine(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 60)
    shown = run_cli("check", write_job(tmp_path, "in.jsonl"), "-n", "50")
    assert shown.returncode == 0
    assert "columns  id: int64, text: string" in shown.stdout
    assert "--- row 1\n[user]\nRepeat: row 1 lorem" in shown.stdout
    assert "--- row 49\nbad_json" in shown.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("prompt.user={{ txet }}", "no column 'txet' in the input, did you mean 'text'?"),
        ("prompt.user={{ text ", "template error in line 1"),
        ("input.path=nowhere.jsonl", "nowhere.jsonl"),
        ("input.colums=x", "input.colums: unknown key, did you mean 'columns'?"),
        ("input.where=id +", "where"),
        ("model.engine.max_num_sqs=3", "did you mean 'max_num_seqs'?"),
        ("model.backend=vllm", "name is missing"),
        ("output.prefix=", "text"),
    ],
)
def test_a_wrong_job_is_refused_in_one_message_with_exit_2(
    tmp_path: Path, change: str, message: str
) -> None:
    write_rows(tmp_path / "in.jsonl", 10)
    job = write_job(tmp_path, "in.jsonl")
    done = run_cli("run", job, "--set", change)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_model_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 10)
    job = write_job(tmp_path, "in.jsonl", model={"backend": "vllm", "name": "./no-model"})
    done = run_cli("run", job)
    assert done.returncode == 2
    assert "no-model' does not exist, expected a model's folder or hub id" in done.stderr


def test_status_follows_a_job(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 100)
    job = write_job(tmp_path, "in.jsonl")
    assert "new" in run_cli("status", job).stdout
    run_cli("run", job, "--set", "gate.max_error_rate=0.001")
    held_back = run_cli("status", job, "--json").stdout
    assert '"state": "held_back"' in held_back
    assert '"num_durable": 100' in held_back
    run_cli("run", job)
    complete = run_cli("status", job.parent / "out", "--json").stdout
    assert '"state": "complete"' in complete


def test_show_prints_rows_without_the_ledgers_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 100)
    job = write_job(tmp_path, "in.jsonl")
    run_cli("run", job)
    shown = run_cli("show", job, "-n", "1").stdout
    assert "row 0" in shown
    assert "_batchgen" not in shown
    assert run_cli("show", job, "--errors").stdout.count("bad_json") == 2
    # Rows are the plan's, whatever the job file says by now.
    for source in ([job, "--set", "output.prefix=my_"], [tmp_path / "out"]):
        assert run_cli("show", *source, "--errors").stdout.count("bad_json") == 2


def test_an_unknown_option_is_refused_with_exit_2(tmp_path: Path) -> None:
    done = run_cli("run", tmp_path / "job.toml", "--frehs")
    assert done.returncode == 2
    assert "--fresh" in done.stderr
