"""Imports point down, and each big dependency is imported in one place."""

from __future__ import annotations

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "batchgen"
LAYERS = (
    {"core"},
    {"job", "storage"},
    {"source", "engine", "answers", "prompt"},
    {"store"},
    {"pipeline"},
    {"cluster"},
    {"preview", "tuning", "views", "endpoints"},
    {"quality", "report_page", "serve"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ONLY_IN = {
    "vllm": {
        f"engine/vllm/{name}.py" for name in ("engine", "params", "answers", "pooling", "images")
    },
    "torch": {"engine/vllm/engine.py"},
    "transformers": {"engine/vllm/engine.py", "engine/vllm/encoder.py"},
    "fsspec": {"source/files.py"},
    "ray": {"cluster/ray.py"},
    "obstore": {"storage/remote.py"},
    "botocore": {"storage/remote.py"},
    "sklearn": {"quality/score.py"},
    "aiohttp": {"endpoints/server.py"},
    "fastapi": {"serve/app.py"},
    "uvicorn": {"serve/server.py"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """What it imports, for its types too: `from a.b import c` is `a.b` and `a.b.c`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def name_of(path: Path) -> str:
    return ".".join(("batchgen", *path.relative_to(PACKAGE).with_suffix("").parts))


def part_of(path: Path) -> str:
    """Its room. The two doors, Python's and the shell's, are one."""
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "cli" if part == "api" else part


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = part_of(path)
    if here in {"__init__", "__main__"}:
        return
    assert here in LEVEL, f"{here} has no layer yet"
    for name in imports(path):
        package, _, rest = name.partition(".")
        there = "cli" if rest.startswith("api") else rest.partition(".")[0]
        if package == "batchgen" and there in LEVEL and there != here:
            assert LEVEL[there] < LEVEL[here], f"{path.name} imports {name}"


def test_no_two_modules_need_each_other() -> None:
    paths = {name_of(path): path for path in modules()}
    graph = {name: imports(path) & set(paths) - {name} for name, path in paths.items()}
    TopologicalSorter(graph).prepare()  # CycleError names the circle


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_big_dependency_has_one_home(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    for name in imports(path):
        home = ONLY_IN.get(name.partition(".")[0])
        assert home is None or place in home, f"{place} imports {name}"


def test_modules_stay_readable() -> None:
    longest = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in modules()}
    assert {name: lines for name, lines in longest.items() if lines > 600} == {}
