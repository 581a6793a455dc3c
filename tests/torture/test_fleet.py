"""Proof 9, the short version; `make proof-long` kills 500 times."""

from tests.torture.fleet import torture


def test_a_cluster_killed_at_random_loses_nothing_and_doubles_nothing():
    counts = torture(num_kills=5, seed=3)
    assert counts["jobs: 0 lost, 0 doubled, 0 wrong"] >= 1
    assert sum(num for kind, num in counts.items() if kind.startswith("kills")) >= 5
