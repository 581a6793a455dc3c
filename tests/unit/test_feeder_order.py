"""The feeder with an order: what it holds back, for how long, and what becomes of it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from batchgen.core.errors import SourceError
from batchgen.core.records import RowError
from batchgen.engine.order import AdmissionOrder, Lengths, Reach
from batchgen.pipeline.runner import Feeder, feed_batches
from tests.fakes import batch, request_builder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from batchgen.core.records import Request, RowBatch
    from batchgen.engine.order import Mode


def feeder(
    batches: Iterable[RowBatch],
    mode: Mode = "prefix",
    *,
    is_loading: Callable[[], bool] = lambda: False,
    reach: Reach | None = None,
) -> Feeder:
    order = AdmissionOrder(mode, Lengths(), reach)
    return Feeder(feed_batches(batches, request_builder()), order=order, is_loading=is_loading)


def rows_of(feeding: Feeder) -> list[int]:
    """Rows in the order given out, to the end."""
    rows: list[int] = []
    while not feeding.is_done:
        if (fed := feeding.take(5.0)) is not None:
            rows += [request.ordinal.row for request in fed.requests]
            rows += [result.ordinal.row for result in fed.results]
    return rows


def backwards(num_batches: int) -> Iterator[RowBatch]:
    """Batches of ten rows whose prompts sort the other way round."""
    for number in reversed(range(num_batches)):
        yield batch(range(1000 + 10 * number, 1010 + 10 * number))


def test_while_the_engine_loads_the_whole_input_is_looked_at():
    assert rows_of(feeder(backwards(60), is_loading=lambda: True)) == list(range(1000, 1600))


def test_an_engine_that_waits_gets_rows_at_once():
    go_on = threading.Event()

    def slow() -> Iterator[RowBatch]:
        yield batch(range(1000, 1010))
        go_on.wait(30)
        yield batch(range(1010, 1020))

    feeding = feeder(slow())
    fed = feeding.take(5.0)
    assert fed is not None
    assert len(fed.requests) == 10
    assert not feeding.is_done
    go_on.set()
    assert rows_of(feeding) == list(range(1010, 1020))


def test_an_engine_gets_what_is_held_while_the_next_rows_are_long_in_coming():
    go_on = threading.Event()

    def slow() -> Iterator[RowBatch]:
        for number in range(100):
            yield batch(range(1000 + 50 * number, 1050 + 50 * number))
        go_on.wait(30)

    feeding, num_rows = feeder(slow()), 0
    while num_rows < 5000:
        fed = feeding.take(5.0)
        assert fed is not None
        num_rows += len(fed.requests)
    go_on.set()
    assert rows_of(feeding) == []


class Broken(AdmissionOrder):
    def take(self) -> list[Request]:
        raise ZeroDivisionError("a bug")


def test_even_a_bug_in_the_order_ends_the_run():
    order = Broken("prefix", Lengths())
    feeding = Feeder(
        feed_batches(backwards(3), request_builder()), order=order, is_loading=lambda: True
    )
    with pytest.raises(ZeroDivisionError):
        rows_of(feeding)
    feeding.close()


def test_bad_rows_count_with_their_own_share_of_bytes():
    bad = batch(range(100), errors={3: RowError("bad_json", "no")})
    feeding = feeder([bad], is_loading=lambda: True)
    fed = feeding.take(5.0)
    assert fed is not None
    assert fed.num_bytes == bad.carried.nbytes // 100


def test_once_the_engine_is_up_rows_are_held_back_no_longer():
    is_loading = threading.Event()
    is_loading.set()
    has_read = threading.Event()

    def endless() -> Iterator[RowBatch]:
        for number in range(10_000):
            yield batch(range(1000 + 10 * number, 1010 + 10 * number))
            if number == 20:
                has_read.set()
            time.sleep(0.001)

    feeding = feeder(endless(), is_loading=is_loading.is_set)
    assert has_read.wait(10)
    assert feeding.take(0.05) is None
    is_loading.clear()
    fed = feeding.take(5.0)
    assert fed is not None
    assert len(fed.requests) > 10
    feeding.close()


def test_rows_that_need_no_engine_are_not_held_back():
    bad = batch(range(10), errors={3: RowError("bad_json", "no")})
    feeding = feeder([bad, batch(range(10, 20))], is_loading=lambda: True)
    fed = feeding.take(5.0)
    assert fed is not None
    assert [result.ordinal.row for result in fed.results] == [3]
    assert sorted(rows_of(feeding)) == [n for n in range(20) if n != 3]


def test_what_was_read_before_trouble_comes_before_it():
    def broken() -> Iterator[RowBatch]:
        yield batch(range(1000, 1010))
        raise SourceError("in.jsonl", "it is torn")

    feeding = feeder(broken(), is_loading=lambda: True)
    fed = feeding.take(5.0)
    assert fed is not None
    assert len(fed.requests) == 10
    with pytest.raises(SourceError, match="torn"):
        feeding.take(5.0)


def test_the_look_ahead_waits_until_rows_are_taken():
    read = []

    def counted() -> Iterator[RowBatch]:
        for number, made in enumerate(backwards(3000)):
            read.append(number)
            yield made

    feeding = feeder(counted(), "auto", is_loading=lambda: True, reach=Reach(held_rows=500))
    time.sleep(0.3)
    assert len(read) < 3000
    assert sorted(rows_of(feeding)) == list(range(1000, 31_000))
