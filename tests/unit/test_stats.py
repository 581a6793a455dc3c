"""Counters to figures, on seconds that tests choose."""

from __future__ import annotations

import pytest

from batchgen.core.records import EngineStats, RowError, Verdict
from batchgen.pipeline.stats import Counts, RunStats
from tests.fakes import batch, results

BAD = RowError("prompt_too_long", "too long")


def noted(num_ok: int, num_errors: int = 0, **fields) -> RunStats:
    stats = RunStats(100.0, 50, **fields)
    note(stats, num_ok, num_errors)
    return stats


def note(stats: RunStats, num_ok: int, num_errors: int = 0) -> None:
    """Each ok result has 10 tokens in, 4 of them cached, and 3 out."""
    rows = range(num_ok + num_errors)
    for result in results(batch(rows), errors=dict.fromkeys(rows[num_ok:], BAD)):
        if result.completion is not None:
            stats.note_attempts([result])
        stats.note_ends([result])


def test_results_are_counted_by_how_they_ended():
    stats = noted(3, 2)
    assert (stats.num_ok, stats.num_errors, stats.num_results) == (3, 2, 5)
    assert (stats.prompt_tokens, stats.cached_tokens, stats.output_tokens) == (30, 12, 9)
    assert stats.error_types == {"prompt_too_long": 2}


def test_an_error_with_a_completion_counts_its_tokens():
    (result,) = results(batch([0]))
    refused = type(result)(
        result.ordinal, result.batch, 0, "k", result.completion, RowError("invalid_answer", "x")
    )
    stats = RunStats(0.0, 1)
    stats.note_attempts([refused])
    stats.note_ends([refused])
    assert (stats.num_ok, stats.num_errors, stats.prompt_tokens) == (0, 1, 10)


def test_answers_are_counted_by_attempt_and_verdict():
    attempts = [(1, "ok"), (1, "truncated"), (2, "ok"), (2, "ok"), (3, "refused")]
    rows = results(batch(range(len(attempts))))
    stats = RunStats(0.0, 5)
    for some in (rows[:4], rows[4:]):
        told = [attempts[row.ordinal.row] for row in some]
        stats.note_attempts(
            [
                row._replace(attempts=attempt, verdict=Verdict(verdict))
                for row, (attempt, verdict) in zip(some, told, strict=True)
            ]
        )
    assert stats.num_retries == 3
    assert stats.verdicts == {1: {"ok": 1, "truncated": 1}, 2: {"ok": 2}, 3: {"refused": 1}}
    assert len(stats.latencies_s) == 5


def test_rows_left_are_those_that_nobody_has_accounted_for():
    stats = noted(3, 2, num_resumed=20)
    stats.num_skipped = 5
    assert stats.num_left == 20


def test_before_anything_ends_rates_are_zero_and_the_end_is_unknown():
    stats = RunStats(100.0, 50)
    assert set(stats.rates(120.0).values()) == {0.0}
    assert stats.eta_s(120.0) is None


def test_rates_are_over_the_window_not_over_the_run():
    stats = RunStats(0.0, 1000)
    for second in range(101):
        note(stats, 2 if second > 70 else 10)
        stats.note_progress(float(second))
    rates = stats.rates(100.0)
    assert rates["requests_per_s"] == pytest.approx(2.0)
    assert rates["prompt_tokens_per_s"] == pytest.approx(20.0)
    assert rates["output_tokens_per_s"] == pytest.approx(6.0)


def test_rates_fall_while_nothing_ends():
    stats = RunStats(0.0, 1000)
    stats.note_progress(0.0)
    note(stats, 10)
    stats.note_progress(10.0)
    assert stats.rates(10.0)["requests_per_s"] == pytest.approx(1.0)
    assert stats.rates(40.0)["requests_per_s"] == pytest.approx(0.25)


def test_the_window_takes_no_more_than_two_looks_a_second_but_the_time_of_the_last_result():
    stats = RunStats(0.0, 1000)
    for at in range(1000):
        stats.note_progress(at / 100)
    assert stats.last_done_s == 9.99
    note(stats, 19)
    # The first look was at 0 s.
    assert stats.rates(9.5)["requests_per_s"] == pytest.approx(2.0)


def test_what_others_did_counts():
    stats = noted(3, 1)
    stats.count(Counts(1, 2, 3, 4, 5, 6, 7).minus(Counts(num_skipped=1)))
    assert (stats.num_ok, stats.num_errors, stats.num_skipped, stats.num_retries) == (4, 3, 2, 4)
    assert (stats.prompt_tokens, stats.cached_tokens, stats.output_tokens) == (35, 18, 16)


def test_a_correction_is_no_work():
    stats = RunStats(0.0, 110)
    stats.note_progress(0.0)
    note(stats, 20)
    stats.note_progress(10.0)
    stats.correct(Counts(num_ok=-8, num_errors=-2, num_skipped=-5))
    assert (stats.num_ok, stats.num_errors, stats.num_skipped) == (12, -2, -5)
    assert stats.rates(10.0)["requests_per_s"] == pytest.approx(2.0)
    assert stats.rates(10.0)["prompt_tokens_per_s"] == pytest.approx(20.0)


def test_the_time_left_is_rows_left_at_the_present_rate():
    stats = RunStats(0.0, 110, num_resumed=10)
    stats.note_progress(0.0)
    note(stats, 20)
    stats.note_progress(10.0)
    assert stats.eta_s(10.0) == pytest.approx(40.0)


def test_a_sample_has_these_columns():
    stats = noted(3, 1)
    stats.num_committed, stats.num_skipped = 2, 7
    engine = EngineStats(num_running=5, num_waiting=6, kv_cache_usage=0.25, num_preemptions=1)
    assert stats.sample(130.0, 9, engine) == {
        "elapsed_s": 30.0,
        "num_ok": 3,
        "num_errors": 1,
        "num_skipped": 7,
        "num_committed": 2,
        "prompt_tokens": 30,
        "cached_tokens": 12,
        "output_tokens": 9,
        "requests_per_s": 0.0,
        "prompt_tokens_per_s": 0.0,
        "output_tokens_per_s": 0.0,
        "num_in_flight": 9,
        "num_running": 5,
        "num_waiting": 6,
        "kv_cache_usage": 0.25,
        "gpu_busy": None,
        "num_preemptions": 1,
    }


def test_totals_are_over_the_time_that_the_engine_worked():
    stats = noted(8, 2, num_resumed=4)
    stats.engine_ready_s = 120.0
    stats.num_parts = 3
    stats.note_progress(125.0)
    assert stats.totals(300.0) == {
        "num_ok": 8,
        "num_errors": 2,
        "num_skipped": 0,
        "num_resumed": 4,
        "error_types": {"prompt_too_long": 2},
        "num_retries": 0,
        "verdicts": {"1": {"ok": 8}},
        "num_prompt_tokens": 80,
        "num_cached_tokens": 32,
        "num_output_tokens": 24,
        "num_parts": 3,
        "elapsed_s": 200.0,
        "ready_after_s": 20.0,
        "working_s": 5.0,
        "requests_per_s": 2.0,
        "output_tokens_per_s": 4.8,
        "total_tokens_per_s": 20.8,
    }


def test_totals_of_a_run_that_did_nothing_are_zeros():
    totals = RunStats(100.0, 0).totals(100.0)
    assert totals["requests_per_s"] == totals["output_tokens_per_s"] == 0.0
    assert totals["error_types"] == {}


def test_error_types_are_told_most_common_first():
    stats = RunStats(0.0, 9)
    for kind, times in [("rare", 1), ("common", 3)]:
        for _ in range(times):
            (result,) = results(batch([0]), errors={0: RowError(kind, "x")})
            stats.note_ends([result])
    assert list(stats.totals(1.0)["error_types"].items()) == [("common", 3), ("rare", 1)]
