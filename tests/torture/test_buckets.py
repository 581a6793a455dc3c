"""Proof 9, the short version."""

from tests.torture.harness import prove


def test_runs_on_an_object_store_lose_nothing_and_double_nothing():
    told = prove("tests.torture.buckets", "--kills", "6", "--workers", "1")
    assert "0 lost, 0 doubled, 0 wrong" in told
