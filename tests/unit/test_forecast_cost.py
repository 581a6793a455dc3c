"""Time, GPU-hours and money, from a rate."""

from __future__ import annotations

import pytest

from batchgen.core.errors import ConfigError
from batchgen.engine.vllm.settings import gpus_of
from batchgen.preview.estimate import (
    PastRun,
    Price,
    Rate,
    Work,
    estimate,
    measured_rate,
    read_price,
    read_rate,
)


def past_run(**fields):
    defaults = {
        "run_id": "R1",
        "started_at": "2026-01-01T00:00:00+00:00",
        "is_same_recipe": True,
        "device": "H100",
        "host": "n1",
        "max_model_len": 4096,
        "num_rows": 1_000,
        "prompt_tokens": 200_000,
        "output_tokens": 50_000,
        "working_s": 100.0,
        "startup_s": 60.0,
    }
    return PastRun(**{**defaults, **fields})


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("250", (250, "rows")),
        ("250rows/s", (250, "rows")),
        ("0.5 row", (0.5, "rows")),
        ("12000tokens/s", (12_000, "tokens")),
        ("12000 tok/s", (12_000, "tokens")),
    ],
)
def test_a_rate_is_rows_or_tokens(text, rate):
    found = read_rate(text)
    assert (found.per_s, found.unit, found.source) == (*rate, "--rate")


@pytest.mark.parametrize("text", ["", "fast", "-1", "0", "1e3", "10/h", "5 tokens a second"])
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(ConfigError, match="expected 250rows/s or 12000tokens/s") as caught:
        read_rate(text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "price"),
    [
        ("2.5", Price(2.5)),
        ("2.5eur", Price(2.5, "EUR")),
        ("3 USD", Price(3.0, "USD")),
        ("0", Price(0.0)),
    ],
)
def test_a_price_may_have_a_currency(text, price):
    assert read_price(text) == price


@pytest.mark.parametrize("text", ["", "cheap", "-2", "2.5 EURO", "EUR 2"])
def test_what_is_no_price_is_refused(text):
    with pytest.raises(ConfigError, match=r"expected 2\.5EUR"):
        read_price(text)


def test_rows_as_long_as_before_go_by_rows():
    rate = measured_rate(past_run(), Work(500, 500 * 210, 0))
    assert (rate.per_s, rate.unit, rate.source) == (10.0, "rows", "run R1 on H100")


def test_rows_of_another_length_go_by_tokens():
    rate = measured_rate(past_run(is_same_recipe=False), Work(500, 500 * 400, 0))
    assert (rate.per_s, rate.unit) == (2_500.0, "tokens")
    assert "of another recipe" in rate.source
    assert "its prompts had 200 in the mean" in rate.source


def test_rows_of_unknown_length_go_by_rows():
    assert measured_rate(past_run(), Work(500, None, 0)).unit == "rows"


def test_time_is_engine_start_and_work():
    found = estimate(Work(500, 100_000, 10**9), None, past_run(), 8, Price(3.0, "EUR"))
    assert found is not None
    assert (found.start_s, found.work_s, found.total_s) == (60.0, 50.0, 110.0)
    assert found.output_tokens == 25_000
    assert found.gpu_hours == pytest.approx(8 * 110 / 3600)
    assert found.cost == pytest.approx(3 * 8 * 110 / 3600)
    assert not found.is_upper_bound


def test_a_rate_in_tokens_counts_prompts_and_expected_answers():
    found = estimate(Work(500, 100_000, 10**9), Rate(1_000, "tokens", ""), past_run(), 1, None)
    assert found is not None
    assert found.work_s == 125.0
    assert found.cost is None


def test_no_more_answers_are_expected_than_there_may_be():
    found = estimate(Work(500, 100_000, 4_000), None, past_run(), 1, None)
    assert found is not None
    assert found.output_tokens == 4_000


def test_where_nothing_was_measured_a_rate_in_tokens_gives_an_upper_bound():
    found = estimate(Work(500, 100_000, 20_000), Rate(1_000, "tokens", ""), None, 1, None)
    assert found is not None
    assert (found.work_s, found.is_upper_bound, found.output_tokens) == (120.0, True, None)
    rows = estimate(Work(500, 100_000, 20_000), Rate(10, "rows", ""), None, 1, None)
    assert rows is not None
    assert (rows.work_s, rows.is_upper_bound) == (50.0, False)


def test_without_any_rate_no_time_is_told():
    assert estimate(Work(500, 100_000, 20_000), None, None, 1, None) is None
    assert estimate(Work(500, None, 20_000), Rate(1_000, "tokens", ""), None, 1, None) is None


def test_no_rows_take_no_time():
    found = estimate(Work(0, 0, 0), None, past_run(), 1, None)
    assert found is not None
    assert found.total_s == 0.0


@pytest.mark.parametrize(
    ("engine", "is_cpu", "num"),
    [
        ({}, False, 1),
        ({"tensor_parallel_size": 4, "pipeline_parallel_size": 2}, False, 8),
        ({"data_parallel_size": 2, "tensor_parallel_size": None}, False, 2),
        ({"tensor_parallel_size": 4}, True, 0),
    ],
)
def test_gpus_are_those_of_every_kind_of_parallelism(engine, is_cpu, num):
    assert gpus_of(engine, is_cpu=is_cpu) == num
