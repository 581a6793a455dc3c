"""Imports point down, and each big dependency is imported in one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "batchgen"
LAYERS = (
    {"errors"},
    {"ranges", "budget", "words", "deadline", "devices", "collector"},
    {"records", "sandbox", "arrow", "inputs", "storage", "footer", "expressions"},
    {"config", "books", "row_digests"},
    {"seeds", "matching", "known", "names"},
    {
        "admission",
        "source",
        "prompts",
        "answers",
        "engine",
        "ledger",
        "sink",
        "stats",
        "progress",
        "runlog",
        "advice",
        "model_files",
    },
    {"requests", "history", "pairing"},
    {"stages", "frozen", "gate", "job_checks", "pruning", "snapshot_side", "past_lengths"},
    {"planning"},
    {"freezing"},
    {"runner"},
    {"worker"},
    {"fleet"},
    {"executor"},
    {"tuning"},
    {"views", "verify", "forecast", "api", "snapshots", "snapshot_diff"},
    {"doctor"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ONLY_IN = {
    "vllm": {"engine/vllm.py", "engine/vllm_params.py", "engine/vllm_answers.py"},
    "torch": {"engine/vllm.py"},
    "transformers": {"engine/vllm.py", "engine/encoder.py"},
    "fsspec": {"inputs.py"},
    "ray": {"executor/ray.py"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            from_package = node.module == "batchgen"
            found += [f"batchgen.{a.name}" for a in node.names] if from_package else [node.module]
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = part_of(path)
    if here in {"__init__", "__main__"}:
        return
    assert here in LEVEL, f"{here} has no layer yet"
    for name in imports(path):
        package, _, rest = name.partition(".")
        there = rest.partition(".")[0]
        if package == "batchgen" and there in LEVEL and there != here:
            assert LEVEL[there] < LEVEL[here], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_big_dependency_has_one_home(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    for name in imports(path):
        home = ONLY_IN.get(name.partition(".")[0])
        assert home is None or place in home, f"{place} imports {name}"


def test_modules_stay_readable() -> None:
    longest = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in modules()}
    assert {name: lines for name, lines in longest.items() if lines > 350} == {}
