"""Figures of token counts: lengths, duplicates in a sample."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from batchgen.preview.estimate import bars, estimate_duplicates, lengths_of


def test_lengths_are_summed_up_by_rank_and_by_powers_of_two():
    lengths = lengths_of([17, 1, 3, 3, 4, *[17] * 5])
    assert lengths is not None
    assert (lengths.num, lengths.total, lengths.mean) == (10, 113, 11.3)
    assert (lengths.p50, lengths.p95, lengths.longest) == (17, 17, 17)
    assert lengths.buckets == [(1, 1, 1), (2, 3, 2), (4, 7, 1), (8, 15, 0), (16, 31, 6)]


@pytest.mark.parametrize("num", [1, 2, 19, 20, 21, 100])
def test_a_quantile_is_the_smallest_length_that_enough_prompts_do_not_exceed(num):
    values = [random.Random(n).randrange(1, 50) for n in range(num)]
    lengths = lengths_of(values)
    assert lengths is not None
    for found, share in ((lengths.p50, 0.5), (lengths.p95, 0.95)):
        assert sum(value <= found for value in values) >= share * num
        assert sum(value < found for value in values) < share * num


def test_no_prompts_have_no_lengths():
    assert lengths_of([]) is None


def test_bars_have_a_mark_for_every_bucket_with_a_prompt_in_it():
    lines = bars([(1, 1, 1), (2, 3, 0), (4, 7, 999)])
    assert [line.count("#") for line in lines] == [1, 0, 30]
    assert [line.split()[0] for line in lines] == ["1", "2-3", "4-7"]
    assert [line.split()[-1] for line in lines] == ["0.1%", "0.0%", "99.9%"]
    assert len({len(line) for line in lines}) == 1


GROUPS = {
    "none": [1] * 20_000,
    "pairs": [2] * 10_000,
    "a tenth in pairs": [2] * 1_000 + [1] * 18_000,
    "in fives": [5] * 4_000,
    "a few texts": [2_000] * 10,
    "one text beside others": [10_000] + [1] * 10_000,
}


@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS.keys())
def test_duplicates_are_estimated_from_a_sample(sizes):
    rows = [key for key, size in enumerate(sizes) for _ in range(size)]
    truth = len(rows) - len(sizes)
    found = [
        estimate_duplicates(
            Counter(random.Random(seed).sample(rows, 2_000)).values(), 2_000, 20_000
        )
        for seed in range(40)
    ]
    assert sum(found) / len(found) == pytest.approx(truth, rel=0.1, abs=1)
    assert all(0 <= one <= len(rows) for one in found)


def test_duplicates_are_exact_where_everything_was_drawn():
    assert estimate_duplicates([3, 1, 1], 5, 5) == 2.0


def test_one_row_says_nothing_of_duplicates():
    assert estimate_duplicates([1], 1, 100) == 0.0
