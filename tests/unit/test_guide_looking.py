"""The commands of docs/guide/looking.md work as they are written."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from batchgen.cli import cli

GUIDE = Path(__file__).parents[2] / "docs/guide/looking.md"
COMMANDS = re.findall(r"^    batchgen ([^#\n]+)", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("guide")
    rows = [{"id": 1, "text": "yes"}, {"id": 2, "text": None}]
    (where / "in.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tables = {
        "input": 'path = "in.jsonl"',
        "prompt": 'user = "{{ text }}"',
        "model": 'backend = "echo"',
        "sampling": "max_tokens = 9\ntemperature = 0",
        "output": 'path = "out"\nchoice = ["yes"]',
        "gate": "max_error_rate = 0.5",
    }
    text = "\n".join(f"[{name}]\n{keys}" for name, keys in tables.items())
    (where / "label.toml").write_text(text, encoding="utf-8")
    done = CliRunner().invoke(cli, ["run", str(where / "label.toml")])
    assert done.exit_code == 0, done.output
    return where


def test_there_are_commands_to_run() -> None:
    assert {command.split()[0] for command in COMMANDS} == {"report", "status", "show"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_guide_works(folder: Path, command: str) -> None:
    words = shlex.split(command)
    places = {"label.toml": folder / "label.toml", "report.html": folder / "report.html"}
    done = CliRunner().invoke(cli, [str(places.get(word, word)) for word in words])
    assert done.exit_code == 0, done.output
    assert done.stdout
