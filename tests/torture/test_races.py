"""Proof 4: 70 rounds; `make proof-long` has 1,000."""

from tests.torture.harness import prove


def test_six_runs_at_the_same_moment_publish_one_right_snapshot():
    assert "0 lost, 0 doubled, 0 wrong" in prove("tests.torture.races", "--rounds", "70")
