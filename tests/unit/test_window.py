"""How a server's window finds itself, on servers that are only formulas."""

import pytest

from batchgen.endpoints.window import Meter, Window


def serve(window, seconds, works_on, latency_s=0.5, *, most=10**9, start_s=1000.0):
    """A server that works on so many at once, each taking its time; beyond `most` it refuses."""
    now_s, sizes = start_s, []
    while now_s < start_s + seconds:
        num = window.size
        if num > most:
            window.shrink(now_s)
            now_s += 0.1
            continue
        round_s = latency_s * max(1.0, num / works_on)
        for at in range(1, num + 1):
            window.note(now_s + round_s * at / num, 100, is_full=True)
        now_s += round_s
        sizes.append(window.size)
    return sizes


@pytest.mark.parametrize("works_on", [1, 7, 40, 300, 5000])
def test_it_grows_to_what_the_server_works_on_and_not_far_beyond(works_on):
    window = Window(8, 2048)
    sizes = serve(window, 120, works_on)
    assert min(2048, works_on) * 0.75 <= sizes[-1] <= max(8, 2.6 * works_on)
    reached = next(at for at, size in enumerate(sizes) if size >= min(works_on, 2048) * 0.75)
    assert reached <= 20


def test_it_stays_below_what_is_refused_and_is_back_soon_after():
    window = Window(8, 2048)
    assert serve(window, 60, 400, most=100)[-1] <= 100
    for at in range(30):
        window.shrink(2000.0 + 3 * at)
    assert window.size == 1
    assert max(serve(window, 15, 400, start_s=3000.0)) >= 50


def test_refusals_at_once_are_one():
    window = Window(64, 2048)
    for _ in range(20):
        window.shrink(10.0)
    assert window.size == 32


def test_rows_that_do_not_fill_it_say_nothing():
    window = Window(64, 2048)
    for at in range(1000):
        window.note(at / 10, 100, is_full=False)
    assert window.size == 64


@pytest.mark.parametrize("per_minute", [6, 60, 600, 60_000])
def test_a_meter_lets_through_what_it_says(per_minute):
    meter, now_s, num = Meter(per_minute, 0.0), 0.0, 0
    while now_s < 60:
        wait_s = meter.wait_s(now_s)
        if wait_s:
            now_s += wait_s
            continue
        meter.take(1)
        num += 1
    assert per_minute * 0.95 <= num <= per_minute + max(1, per_minute / 60) + 1


def test_a_meter_makes_up_for_what_was_more_than_thought():
    meter = Meter(60_000, 0.0)
    meter.take(5000)
    assert meter.wait_s(0.0) == pytest.approx(4.0, abs=0.01)
