"""Proof 8, the short version; `make proof-long` has 3,000 worlds."""

from tests.torture.harness import prove


def test_random_worlds_equal_a_full_recompute_every_night_and_compute_nothing_twice():
    told = prove("tests.torture.nights", "--worlds", "70")
    assert "every night equals a full recompute" in told
