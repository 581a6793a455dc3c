"""Nothing that is printed of data steers a terminal, by one seam that everything goes through."""

from __future__ import annotations

import ast
import io
import sys
import traceback
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import batchgen
from batchgen.core.errors import SourceError
from batchgen.core.runtime import printable, say

PACKAGE = Path(batchgen.__file__).parent
MAY_PRINT = {"core/runtime.py", "cli/common.py"}
"""The seam. Of the others `_streams` says what they write to instead."""
STEERING = {
    "set the title": "\x1b]0;owned\x07",
    "write the clipboard": "\x1b]52;c;aGk=\x1b\\",
    "clear the screen": "\x1b[2J\x1b[H",
    "the same in C1": "\x9b2J\x9d0;owned\x9c",
    "overwrite the line": "fine\rowned",
    "go back": "abc\b\b\bxyz",
    "delete": "\x7f",
    "show it backwards": "\u202etxt.exe\u202c",
    "isolate": "\u2066a\u2069 \u2067b\u2069",
    "a mark": "\u200f\u061c",
    "another line": "a\u2028b\u2029c\x85d\x0be\x0cf",
    "unseen": "a\u200bb\ufeffc\U000e0041",
    "half a pair": "\ud800",
    "null": "\0",
}


def steers(text: str) -> list[str]:
    """Characters that do more than to be shown, but for the line's end and the tab."""
    kinds = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    kept = "\n\t\u200c\u200d"
    return [c for c in text if unicodedata.category(c) in kinds and c not in kept]


@pytest.mark.parametrize("text", STEERING.values(), ids=STEERING.keys())
def test_what_steers_a_terminal_is_escaped(text: str) -> None:
    assert steers(text)
    shown = printable(text)
    assert not steers(shown)
    assert "\\" in shown


@given(text=st.text(st.characters()))
def test_whatever_the_text_nothing_of_it_steers(text: str) -> None:
    shown = printable(text)
    assert not steers(shown)
    if not steers(text):
        assert shown == text
    assert not {"\n", "\t"} & set(printable(text, keep=""))


PLAIN = [
    *(
        "a\tb\nc",
        "caf\u00e9 \u4f60\u597d \u3000 \u00a0",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    ),
    "\U0001f469\u200d\U0001f52c \ue000",
]


@pytest.mark.parametrize("text", PLAIN)
def test_texts_of_every_script_stay(text: str) -> None:
    assert printable(text) == text


def test_what_is_said_on_stderr_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    say("\x1b[2Jx")
    assert sys.stderr.getvalue() == "batchgen: \\x1b[2Jx\n"


def test_an_error_steers_no_terminal_in_python_either() -> None:
    error = SourceError("in\x1b[2J.jsonl", "is\nwrong")
    assert str(error) == "in\\x1b[2J.jsonl: is\nwrong"
    assert error.path == "in\x1b[2J.jsonl"
    assert traceback.format_exception_only(error)[-1].endswith("in\\x1b[2J.jsonl: is\nwrong\n")


def prints_of(path: Path) -> list[str]:
    """Calls by which a module could print."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        owner, _, last = name.rpartition(".")
        if last in {"echo", "secho", "print"} or owner in {"STDERR", "sys.stderr", "sys.stdout"}:
            found.append(name)
    return found


ELSEWHERE = {
    "endpoints/warm.py": ["print"],  # Fixed words, a model's name and a path.
    "engine/vllm/images.py": ["print"],  # Fixed words, into the engine's log.
    "engine/process.py": ["sys.stderr.flush", "sys.stdout.flush", "sys.stderr.flush"],
    "report_page/charts.py": ["sys.stdout.write"],  # JSON, to the process that asked for charts.
    "pipeline/notify.py": ["STDERR.write"],  # What the job's own program says.
    "pipeline/stats.py": ["print"],  # With `printable`.
}


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_nothing_prints_by_another_way(path: Path) -> None:
    place = str(path.relative_to(PACKAGE))
    if place not in MAY_PRINT:
        assert prints_of(path) == ELSEWHERE.get(place, [])


def test_the_test_finds_what_prints(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("click.echo('a')\nprint('b')\nsys.stdout.write('c')\n", encoding="utf-8")
    assert prints_of(path) == ["click.echo", "print", "sys.stdout.write"]
