"""What users see is what `tests/golden` says.

For a change that is meant: `python -m tests.golden.make`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.golden import make

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAMES = [*make.made(make.HERE)]


@pytest.fixture(scope="module")
def makers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], str]]:
    folder: Path = tmp_path_factory.mktemp("golden")
    return make.made(folder)


@pytest.mark.parametrize("name", NAMES)
def test_what_users_see_is_as_it_was(makers: dict[str, Callable[[], str]], name: str) -> None:
    text = (make.HERE / name).read_text(encoding="utf-8")
    assert makers[name]().splitlines() == text.splitlines()
