"""Proof 10, the short version."""

from tests.torture.harness import prove


def test_a_killed_run_batch_loses_nothing_and_answers_nothing_twice():
    assert "0 lost, 0 doubled, 0 wrong" in prove(
        "tests.torture.batches", "--kills", "3", "--workers", "1"
    )
