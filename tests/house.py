"""Measures the package's own build, figure by figure, against the goals: `python -m tests.house`.

`--way` prints the modules that a row passes, and the frames from the command line to `step`.

Sizes are read from the source. What a small job imports, and which modules its rows pass, is taken
from a trace of a real run: three rows on the echo engine, through the command line.
"""

from __future__ import annotations

import ast
import io
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import tokenize
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.test_layering import LAYERS, PACKAGE, modules

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = PACKAGE.parent
_NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    tokenize.ENDMARKER,
}
_ROW_THREADS = {"MainThread", "feeder", "committer"}
_LARGE_ROOMS = {"engine", "pipeline"}


@dataclass(frozen=True)
class Figure:
    """One measure of the house; it is good where it is no more than its goal."""

    name: str
    value: float
    goal: float

    @property
    def is_good(self) -> bool:
        return self.value <= self.goal


@cache
def figures() -> list[Figure]:
    """All of them, in the order of the table."""
    lines = {path: code_lines(path.read_text(encoding="utf-8")) for path in modules()}
    rooms = Counter(path.relative_to(PACKAGE).parts[0] for path in lines)
    lengths = sorted(length for path in lines for length in function_lengths(path))
    trace = traced()
    imported, passed = set(trace["imported"]), set(trace["passed"])
    return [
        Figure("lines of code", sum(map(len, lines.values())), 22_500),
        Figure("modules", len(lines), 110),
        Figure("layers", len(LAYERS), 8),
        Figure("modules of a room", most(rooms, large=False), 14),
        Figure("modules of engine, of pipeline", most(rooms, large=True), 16),
        Figure("lines of a module", max(len(path.read_text().splitlines()) for path in lines), 600),
        Figure("lines of a function, median", statistics.median(lengths), 10),
        Figure("lines of a function, 9 in 10", lengths[int(0.9 * len(lengths))], 25),
        Figure("lines of a function, longest", lengths[-1], 60),
        Figure("modules that an echo job imports", len(imported), 90),
        Figure("modules of the cluster among them", len(of_room("cluster", imported)), 0),
        Figure("modules that a row passes", len(passed), 40),
        Figure("frames from the command line to step", trace["frames"], 10),
        Figure("wrappers of the engine's protocol", trace["wrappers"], 1),
        Figure("isinstance of a kind of engine", len(list(asked_kinds())), 0),
        Figure("modules that open result files", len(list(parquet_readers())), 1),
        Figure("words of the README", len((ROOT / "README.md").read_text().split()), 1_600),
    ]


def most(rooms: Counter[str], *, large: bool) -> int:
    """Modules of the largest room, `__init__` counted in."""
    return max(num for room, num in rooms.items() if (room in _LARGE_ROOMS) == large)


def of_room(room: str, names: set[str]) -> list[str]:
    return sorted(name for name in names if name.split(".")[1:2] == [room])


@cache
def code_lines(source: str) -> set[int]:
    """Numbers of the lines with code: no docstrings, comments or blanks."""
    docs: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_constant and isinstance(node.value.value, str):
            docs.update(range(node.lineno, (node.end_lineno or 0) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docs


def function_lengths(path: Path) -> Iterator[int]:
    """Lines of code of each function, its inner ones counted in."""
    source = path.read_text(encoding="utf-8")
    lines = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield len(lines & set(range(node.lineno, (node.end_lineno or 0) + 1)))


def asked_kinds() -> Iterator[str]:
    """Places that ask `isinstance` of a class that answers requests: by `step`, or by `answer`."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in modules()}
    kinds = {
        node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name in {"step", "answer"}
    }
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                if asked & kinds:
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}"


def parquet_readers() -> Iterator[str]:
    """Modules beside the input's that open Parquet files, which are results there."""
    for path in modules():
        place, text = path.relative_to(PACKAGE), path.read_text(encoding="utf-8")
        calls = ("ParquetFile(", "scan_parquet(", "read_parquet(", "read_table(")
        if place.parts[0] != "source" and any(call in text for call in calls):
            yield str(place)


@cache
def traced() -> dict[str, Any]:
    """A run of three rows, seen from a process of its own; see `_trace`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.dumps({"id": at, "text": f"row {at}"}) for at in range(3)]
        (folder / "in.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        tables = {
            "input": {"path": "in.jsonl"},
            "prompt": {"user": "Repeat: {{ text }}"},
            "model": {"backend": "echo"},
            "sampling": {"max_tokens": 40, "temperature": 0},
            "output": {"path": "out"},
            "run": {"report": "none"},
        }
        lines = []
        for table, keys in tables.items():
            lines += [f"[{table}]", *(f"{key} = {json.dumps(it)}" for key, it in keys.items())]
        (folder / "job.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "tests.house", "--trace", str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        found = folder / "trace.json"
        assert found.exists(), done.stdout + done.stderr
        return json.loads(found.read_text(encoding="utf-8"))


def _trace(folder: Path) -> None:
    """Run the job in a folder and write down what was imported, called and stacked.

    A row's way begins with the first read of rows in the thread that feeds the engine, and ends
    with the run; it is what the threads that rows go through have called by then. The command
    line's own printing is no part of it, nor is the report of what has ended.
    """

    passed: set[str] = set()
    stacks: list[list[tuple[str, str]]] = []
    has_begun = False

    def look(frame: Any, event: str, _: object) -> None:
        nonlocal has_begun
        name = frame.f_globals.get("__name__", "")
        if event != "call" or not name.startswith("batchgen."):
            return
        thread = threading.current_thread().name
        has_begun = has_begun or (thread == "feeder" and name.startswith("batchgen.source."))
        if has_begun and thread in _ROW_THREADS and not name.startswith("batchgen.cli"):
            passed.add(name)
        if not stacks and frame.f_code.co_qualname == "EchoEngine.step":
            stack, at = [], frame
            while at is not None:
                stack.append((at.f_globals.get("__name__", ""), at.f_code.co_name))
                at = at.f_back
            stacks.append([one for one in stack if one[0].startswith("batchgen.")])

    from batchgen.cli import main

    sys.argv = ["batchgen", "run", str(folder / "job.toml")]
    threading.setprofile(look)
    sys.setprofile(look)
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    found = {
        "imported": sorted(name for name in sys.modules if name.startswith("batchgen")),
        "passed": sorted(passed),
        "frames": len(stacks[0]),
        "wrappers": sum(function == "step" for _, function in stacks[0]) - 1,
        "stack": stacks[0],
    }
    (folder / "trace.json").write_text(json.dumps(found), encoding="utf-8")


def table() -> str:
    """The figures for people."""
    lines = [f"{'':40} {'today':>8} {'goal':>8}"]
    for one in figures():
        mark = "" if one.is_good else "  <-"
        lines.append(f"{one.name:40} {one.value:8,.0f} {one.goal:8,.0f}{mark}")
    return "\n".join(lines)


def way() -> str:
    """A row's way for people: modules by room, and the stack."""
    rooms: dict[str, list[str]] = {}
    for name in traced()["passed"]:
        _, room, *rest = name.split(".")
        rooms.setdefault(room, []).append(".".join(rest))
    lines = [f"{room:10} {', '.join(filter(None, names))}" for room, names in rooms.items()]
    frames = (f"  {name}.{function}" for name, function in reversed(traced()["stack"]))
    return "\n".join([*lines, "", *frames])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trace"]:
        _trace(Path(sys.argv[2]))
    elif sys.argv[1:] == ["--way"]:
        print(way())
    else:
        print(table())
