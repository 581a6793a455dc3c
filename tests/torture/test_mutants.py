"""Proof 7: each planted bug turns a proof red, and the same proofs are green without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.torture.harness import REPO
from tests.torture.mutants import MUTANTS, Mutant

if TYPE_CHECKING:
    from pathlib import Path

PROCESSES = 2
TIMEOUT_S = 600


def plant(mutant: Mutant, root: Path) -> None:
    """Put a bug in; the text to replace must be there, once for each change."""
    path = root / mutant.file
    text = path.read_text(encoding="utf-8")
    for old, new in mutant.changes:
        found = text.count(old)
        assert found == 1, f"{mutant.name}: found {found} times in {mutant.file}: {old!r}"
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def copy_of_the_code(root: Path) -> Path:
    root.mkdir()
    for name in ("batchgen", "tests"):
        shutil.copytree(REPO / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "pyproject.toml", root)
    return root


def prove(root: Path, proof: tuple[str, ...], only: str) -> tuple[int, str, float]:
    """Run a proof on the copy in `root`: exit code, output, seconds."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        **({"TORTURE_SWEEP": only} if only else {}),
    }
    began_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, *proof],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return done.returncode, done.stdout, time.monotonic() - began_s


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_bug_can_be_planted(mutant: Mutant) -> None:
    text = (REPO / mutant.file).read_text(encoding="utf-8")
    assert [text.count(old) for old, _ in mutant.changes] == [1] * len(mutant.changes)


def test_every_planted_bug_is_caught_and_the_code_without_them_is_green(tmp_path: Path) -> None:
    clean = copy_of_the_code(tmp_path / "clean")

    def mutated(number: int) -> str:
        mutant = MUTANTS[number]
        root = copy_of_the_code(tmp_path / f"mutant-{number}")
        plant(mutant, root)
        code, told, took_s = prove(root, mutant.proof, mutant.only)
        why = next((line for line in told.splitlines() if line.startswith(("BROKEN", "E  "))), "")
        print(f"{took_s:5.0f} s  {mutant.name}: {why[:160]}")
        # A proof that could not even begin proves nothing.
        is_caught = code == 1 and "ImportError" not in told and "SyntaxError" not in told
        return "" if is_caught else f"not caught: {mutant.name}\n{told[-2000:]}"

    def unmutated(proof: tuple[tuple[str, ...], str]) -> str:
        code, told, took_s = prove(clean, *proof)
        print(f"{took_s:5.0f} s  green without a bug: {proof}")
        return f"red without a bug: {proof}\n{told[-2000:]}" if code else ""

    # The others are green, and for longer, in tests/torture.
    ordinary = [mutant for mutant in MUTANTS if "pytest" in mutant.proof]
    proofs = sorted({(mutant.proof, mutant.only) for mutant in ordinary})
    with ThreadPoolExecutor(PROCESSES) as pool:
        red = pool.map(mutated, range(len(MUTANTS)))
        green = pool.map(unmutated, proofs)
        problems = [problem for problem in (*red, *green) if problem]
    assert not problems, "\n\n".join(problems)
