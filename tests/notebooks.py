"""Executes the notebooks of the documentation, in a folder of their own.

    python -m tests.notebooks

rewrites what their cells print; the tests run them and compare what holds on every machine.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from nbclient import NotebookClient

if TYPE_CHECKING:
    from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
FOLDER = "/home/you/tickets"
"""Stands for the folder that a notebook was executed in."""
VOLATILE = re.compile(
    r"\d{8}T\d{6}-\w+|\d{4}-\d\d-\d\dT[\d:+]+|part-[\w.-]+|[\d.,]+ (?:min|s|ms|GiB|MiB|KiB|bytes)\b"
    r"|[\d,.]+ (?:rows|tokens)/s|[\d,.]+ out\b| {2,}"
)
"""What differs from one execution to the next."""


def notebooks() -> list[Path]:
    """All of the documentation's, in one order."""
    return sorted((ROOT / "docs").rglob("*.ipynb"))


def execute(path: Path, folder: Path) -> NotebookNode:
    """Run a notebook's cells there, in order; a cell that raises ends it with that error."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.get("metadata", {}).pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
            cell.outputs = [_moved(out, str(folder)) for out in cell.outputs]
    return notebook


def _moved(value: Any, folder: str) -> Any:
    if isinstance(value, str):
        return value.replace(folder, FOLDER)
    if isinstance(value, dict):
        return type(value)({name: _moved(one, folder) for name, one in value.items()})
    return [_moved(one, folder) for one in value] if isinstance(value, list) else value


def printed(notebook: NotebookNode) -> list[str]:
    """What each cell shows, without what differs from one execution to the next."""
    texts = []
    for cell in notebook.cells:
        for out in cell.get("outputs", ()):
            text = out.get("text") or out.get("data", {}).get("text/plain", "")
            texts.append(VOLATILE.sub("*", text))
    return texts


if __name__ == "__main__":
    for each in notebooks():
        with tempfile.TemporaryDirectory() as there:
            nbformat.write(execute(each, Path(there)), each)
