"""Who changes what belongs to the whole process gives it back."""

from __future__ import annotations

import gc

import pytest

from batchgen.core.runtime import collect_rarely, rare_collection


@pytest.fixture(autouse=True)
def same_threshold():
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize(
    ("before", "young"),
    [
        ((700, 10, 10), 50_000),
        ((90_000, 5, 5), 90_000),
        ((0, 10, 10), 0),
    ],
)
def test_the_collector_is_slower_for_a_while_unless_it_is_off_or_slower_already(before, young):
    gc.set_threshold(*before)
    with rare_collection():
        assert gc.get_threshold() == (young, *before[1:])
    assert gc.get_threshold() == before


def test_an_error_gives_the_threshold_back():
    before = gc.get_threshold()
    with pytest.raises(ValueError, match="x"), rare_collection():
        raise ValueError("x")
    assert gc.get_threshold() == before


def test_it_stays_slower_for_a_whole_process_and_what_is_there_is_left_alone():
    gc.set_threshold(700, 10, 10)
    before = gc.get_freeze_count()
    collect_rarely(freeze=True)
    try:
        assert gc.get_threshold() == (50_000, 10, 10)
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
