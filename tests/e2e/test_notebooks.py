"""The documentation's notebooks run, and show what they are said to show."""

from __future__ import annotations

from typing import TYPE_CHECKING

import nbformat
import pytest

from tests import notebooks

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("path", notebooks.notebooks(), ids=lambda path: path.name)
@pytest.mark.filterwarnings("default")
def test_a_notebook_shows_what_is_kept_of_it(path: Path, tmp_path: Path) -> None:
    kept = nbformat.read(path, as_version=4)
    done = notebooks.execute(path, tmp_path)
    shown = notebooks.printed(done)
    assert shown == notebooks.printed(kept), "run `python -m tests.notebooks`"
    assert len(shown) > 5
    pages = [
        out["data"]["text/html"]
        for cell in done.cells
        for out in cell.get("outputs", ())
        if "text/html" in out.get("data", {})
    ]
    assert any(page.startswith("<pre>complete\n") for page in pages)
