"""Pieces of work that other processes do."""

from __future__ import annotations

import os
import signal
import time

import pytest

from batchgen.core.errors import ProcessDiedError, SourceError, StoppedError
from batchgen.core.processes import Crew


def squared(number: int) -> int:
    return number * number


def late_if_first(number: int) -> tuple[int, int]:
    if number == 0:
        time.sleep(0.3)
    return number, os.getpid()


def refused(number: int) -> int:
    if number == 2:
        raise SourceError("/in/a.jsonl", "has gone")
    return number


def killed(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_what_comes_of_pieces_comes_in_their_order():
    with Crew(2) as crew:
        assert list(crew.map(squared, ((number,) for number in range(50)))) == [
            number * number for number in range(50)
        ]
        assert list(crew.map(squared, [])) == []
        found = list(crew.map(late_if_first, [(number,) for number in range(6)]))
    assert [number for number, _ in found] == [0, 1, 2, 3, 4, 5]
    assert os.getpid() not in {process for _, process in found}


def test_pieces_are_taken_as_processes_come_free():
    taken = []

    def pieces():
        for number in range(20):
            taken.append(number)
            yield (number,)

    with Crew(2) as crew:
        found = crew.map(squared, pieces())
        next(found)
        assert len(taken) < 20
        found.close()


def test_an_error_is_raised_as_it_was():
    with Crew(2) as crew, pytest.raises(SourceError, match="has gone"):
        list(crew.map(refused, [(number,) for number in range(9)]))


def test_a_process_that_is_killed_ends_the_work():
    with (
        Crew(2) as crew,
        pytest.raises(ProcessDiedError, match=r"signal 9; .* memory runs out; .* run again to go"),
    ):
        list(crew.map(killed, [(number,) for number in range(9)]))


def test_who_waits_may_end_the_work():
    def stop() -> None:
        raise StoppedError("stopped")

    begun_s = time.monotonic()
    with Crew(1) as crew, pytest.raises(StoppedError):
        list(crew.map(time.sleep, [(60,)], stop))
    assert time.monotonic() - begun_s < 50
