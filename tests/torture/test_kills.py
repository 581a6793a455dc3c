"""Proof 1, the short version; `make proof-long` kills 10,000 times."""

from tests.torture.harness import prove


def test_runs_killed_and_frozen_at_random_lose_nothing_and_double_nothing():
    assert "0 lost, 0 doubled, 0 wrong" in prove("tests.torture.kills", "--kills", "200")
