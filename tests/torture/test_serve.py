"""A short version of `python -m tests.torture.serve`."""

import pytest

from tests.torture.serve import run

pytestmark = pytest.mark.proof


def test_a_server_that_is_killed_loses_no_batch_and_no_line(tmp_path):
    seen, states = run(tmp_path / "root", 3, seed=7)
    assert not seen.wrong
    assert seen.sizes
    assert set(states) <= {"completed", "cancelled"}
