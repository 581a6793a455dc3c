"""What the driver knows of its replicas, from made-up looks."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.cli.look import status
from batchgen.cluster.messages import Committed, Look
from batchgen.cluster.workers import ReplicaStats, WorkerHandle
from batchgen.core.records import EngineStats
from batchgen.pipeline.stats import Counts, RunStats
from batchgen.store.runs import RunLock, RunLog
from batchgen.views.status import replica_lines
from tests.fakes import FACTS, FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable

BUSY = EngineStats(
    num_running=4, num_waiting=2, kv_cache_usage=0.5, num_preemptions=1, gpu_busy=0.6
)


def look(num_ok=0, num_errors=0, num_skipped=0, num_retries=0, **changes) -> Look:
    """Each row has had 10 tokens in, 4 of them cached, 3 out, and took so many seconds."""
    num = num_ok + num_errors
    values = {
        "host": "node-a",
        "pid": 77,
        "facts": FACTS,
        "capacity": 8,
        "num_in_flight": 6,
        "engine": BUSY,
        "counts": Counts(num_ok, num_errors, num_skipped, num_retries, 10 * num, 4 * num, 3 * num),
        "error_types": {"prompt_too_long": num_errors} if num_errors else {},
        "verdicts": {1: {"ok": num_ok, "error": num_errors}},
        "rates": {
            "requests_per_s": 2.0,
            "prompt_tokens_per_s": 20.0,
            "output_tokens_per_s": 6.0,
        },
        "latencies_s": [float(at) for at in range(num)],
        "memory_mib": 300.0,
    }
    return Look(**(values | changes))


class Board(ReplicaStats):
    """Knows workers by their numbers."""

    def __init__(self, stats: RunStats, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stats, clock=clock)
        self.workers: dict[int, WorkerHandle] = {}

    def start(self, replica: int, number: int) -> None:
        self.workers[number] = WorkerHandle(number, replica, 0.0)
        self.note_started(self.workers[number])

    def see(self, replica: int, number: int, look: Look) -> None:
        if number not in self.workers:
            self.start(replica, number)
        self.note(self.workers[number], look)

    def commit(self, number: int, committed: Committed) -> None:
        self.note_committed(self.workers[number], committed)

    def lose(self, number: int, reason: str) -> None:
        self.note_gone(self.workers[number], reason)


def part(num_ok=0, num_errors=0, num_skipped=0) -> Committed:
    return Committed("part", {}, Counts(num_ok, num_errors, num_skipped), 0.1)


@pytest.fixture
def clock():
    return FakeClock(100.0)


@pytest.fixture
def stats():
    return RunStats(90.0, 1000)


@pytest.fixture
def board(stats, clock):
    return Board(stats, clock=clock)


def ends(stats):
    return (stats.num_ok, stats.num_errors, stats.num_skipped)


def test_looks_of_several_workers_add_up(board, stats, clock):
    board.see(1, 1, look(3, 1, verdicts={1: {"ok": 3, "truncated": 2}}, num_retries=2))
    clock.advance(1.0)
    board.see(2, 2, look(10))
    board.see(1, 1, look(5, 2, 4, verdicts={1: {"ok": 4}, 2: {"ok": 1}}, num_retries=3))
    assert ends(stats) == (15, 2, 4)
    assert (stats.prompt_tokens, stats.cached_tokens, stats.output_tokens) == (170, 68, 51)
    assert stats.num_retries == 3
    assert stats.error_types == {"prompt_too_long": 2}
    assert stats.totals(120.0)["verdicts"]["1"]["ok"] == 14
    assert stats.verdicts[2] == {"ok": 1}
    assert (stats.engine_ready_s, stats.last_done_s) == (100.0, 101.0)


def test_the_engine_is_ready_once_the_first_is_up(board, stats, clock):
    board.see(1, 1, look(num_skipped=5, facts=None))
    assert (stats.engine_ready_s, stats.last_done_s) == (None, None)
    for worker in (1, 2):
        clock.advance(5.0)
        board.see(worker, worker, look())
    assert stats.engine_ready_s == 105.0


def test_latencies_are_of_rows_that_are_new_and_few_a_look(board, stats):
    board.see(1, 1, look(3))
    board.see(1, 1, look(3))
    board.see(1, 1, look(5))
    assert list(stats.latencies_s) == [0.0, 1.0, 2.0, 3.0, 4.0]
    board.see(1, 1, look(1000))
    assert len(stats.latencies_s) == 55


def test_counts_that_change_at_their_sender_are_not_lost(board, stats):
    found, verdicts = Counter(a=1), {1: Counter(ok=1)}
    board.see(1, 1, look(1, 1, error_types=found, verdicts=verdicts))
    found["a"] += 2
    verdicts[1]["ok"] += 3
    board.see(1, 1, look(4, 3, error_types=found, verdicts=verdicts))
    assert (stats.error_types, stats.verdicts) == ({"a": 3}, {1: {"ok": 4}})


def test_rows_of_a_dead_worker_that_are_not_durable_are_to_be_done_again(board, stats):
    board.see(1, 1, look(8, 2, 3))
    board.commit(1, part(5, 1, 2))
    board.lose(1, "its node left")
    board.see(1, 1, look(9, 9, 9))  # What it says later nobody believes.
    board.lose(1, "again")
    assert ends(stats) == (5, 1, 2)
    assert (stats.num_committed, stats.num_parts, stats.num_left) == (8, 1, 992)
    assert stats.prompt_tokens == 100
    (row,) = board.rows(110.0)
    assert (row["state"], row["restarts"], row["lost"]) == ("gone", 1, "its node left")
    assert (row["num_ok"], row["num_committed"], row["num_in_flight"]) == (5, 8, 0)


def test_a_part_that_is_found_after_its_worker_died_counts(board, stats):
    board.see(1, 1, look(8))
    board.lose(1, "killed")
    assert ends(stats) == (0, 0, 0)
    board.commit(1, part(6, 0, 1))
    assert ends(stats) == (6, 0, 1)
    assert board.rows(100.0)[0]["num_ok"] == 6


def test_a_death_leaves_the_rates_as_they_were(board, stats, clock):
    board.see(1, 1, look(1))
    clock.advance(10.0)
    board.see(1, 1, look(51))
    clock.advance(20.0)
    board.see(1, 1, look(51))  # Nothing is new.
    assert stats.last_done_s == 110.0
    board.lose(1, "killed")
    assert stats.rates(110.0)["requests_per_s"] == pytest.approx(5.0)
    assert stats.eta_s(110.0) == pytest.approx(200.0)


def test_a_row_tells_what_a_replica_does(board, stats, clock):
    board.start(1, 1)
    assert board.rows(100.0)[0]["state"] == "waiting for room"
    board.see(1, 1, look(facts=None, num_in_flight=0))
    assert board.rows(100.0)[0]["state"] == "starting the engine"
    board.see(1, 1, look(num_in_flight=0))
    assert board.rows(100.0)[0]["state"] == "idle"
    board.see(1, 1, look(7, 1))
    clock.advance(4.0)
    (row,) = board.rows(clock())
    assert row == {
        "replica": 1,
        "elapsed_s": 14.0,
        "worker": 1,
        "host": "node-a",
        "pid": 77,
        "state": "running",
        "num_ok": 7,
        "num_errors": 1,
        "num_skipped": 0,
        "num_retries": 0,
        "num_committed": 0,
        "prompt_tokens": 80,
        "cached_tokens": 32,
        "output_tokens": 24,
        "requests_per_s": 2.0,
        "prompt_tokens_per_s": 20.0,
        "output_tokens_per_s": 6.0,
        "num_in_flight": 6,
        "num_running": 4,
        "num_waiting": 2,
        "kv_cache_usage": 0.5,
        "gpu_busy": 0.6,
        "num_preemptions": 1,
        "restarts": 0,
        "memory_mib": 300.0,
        "look_age_s": 4.0,
        "lost": None,
    }


def test_a_replica_keeps_its_counts_when_its_worker_is_replaced(board, stats):
    board.see(3, 3, look(8))
    board.note_engine_death(board.workers[3])
    board.commit(3, part(5))
    board.lose(3, "killed")
    board.start(3, 9)
    board.see(3, 9, look(2))
    (row,) = board.rows(100.0)
    assert (row["replica"], row["worker"], row["state"]) == (3, 9, "running")
    assert (row["num_ok"], row["restarts"], row["lost"]) == (7, 2, "killed")
    assert row["prompt_tokens"] == 100


def test_a_run_without_looks_has_no_figures_of_engines(board, stats):
    whole = board.whole(100.0)
    assert whole == {
        **stats.sample(100.0, 0, EngineStats()),
        "restarts": 0,
        "num_replicas": 0,
        "num_replicas_up": 0,
    }


def test_the_whole_has_sums_and_the_mean_of_the_caches_that_are_known(board, stats):
    board.see(1, 1, look(1))
    board.see(2, 2, look(1, engine=EngineStats(10, 20, 0.9, 3, gpu_busy=1.0)))
    board.see(3, 3, look(0, engine=EngineStats()))
    board.see(4, 4, look(0, facts=None, num_in_flight=0, engine=BUSY))
    board.see(5, 5, look(5))
    board.lose(5, "killed")
    whole = board.whole(100.0)
    assert (whole["num_ok"], whole["num_in_flight"]) == (2, 18)
    assert (whole["num_running"], whole["num_waiting"], whole["num_preemptions"]) == (14, 22, 4)
    assert whole["kv_cache_usage"] == pytest.approx(0.7)
    assert whole["gpu_busy"] == pytest.approx(0.8)
    assert (whole["num_replicas"], whole["num_replicas_up"], whole["restarts"]) == (5, 3, 1)


GROWTH = st.tuples(*[st.integers(0, 5)] * 3)
EVENTS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(["look", "look", "part", "gone"]), GROWTH),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(EVENTS)
def test_whatever_happens_in_whatever_order_the_sums_are_right(events):
    """Ended: rows of the last look of those that live, durable rows of those that are gone."""
    stats = RunStats(0.0, 10**6)
    board = Board(stats, clock=FakeClock())
    worker_at, newest = [0, 1, 2, 3], 3
    seen, durable = Counter(), Counter()
    alive, tokens = {0, 1, 2, 3}, 0
    for at in worker_at:
        board.start(at, at)
    for at, what, growth in events:
        number = worker_at[at]
        if what == "look":
            before = sum(seen[number, kind] for kind in (0, 1))
            seen.update({(number, kind): num for kind, num in enumerate(growth)})
            told = [seen[number, kind] for kind in range(3)]
            board.see(at, number, look(*told))
            tokens += 10 * (told[0] + told[1] - before)
        elif what == "part":  # Its rows may be ahead of the looks.
            durable.update({(number, kind): num for kind, num in enumerate(growth)})
            board.commit(number, part(*growth))
        else:
            board.lose(number, "killed")
            alive.discard(number)
            newest += 1
            worker_at[at] = newest
            alive.add(newest)
            board.start(at, newest)
    numbers = range(newest + 1)
    expected = tuple(
        sum((seen if number in alive else durable)[number, kind] for number in numbers)
        for kind in range(3)
    )
    rows = board.rows(0.0)
    assert ends(stats) == expected
    assert tuple(sum(row[name] for row in rows)
                 for name in ("num_ok", "num_errors", "num_skipped")) == expected  # fmt: skip
    assert stats.num_committed == sum(durable.values()) == sum(row["num_committed"] for row in rows)
    assert stats.prompt_tokens == tokens == sum(row["prompt_tokens"] for row in rows)
    assert sum(row["restarts"] for row in rows) == newest - 3


def fleet(num, changes=None):
    """Rows of so many replicas, 100 rows/s and more; `changes` by replica."""
    board = Board(RunStats(0.0, 0), clock=lambda: 0.0)
    for at in range(1, num + 1):
        board.see(at, at, look(rates={"requests_per_s": 100.0 + at}))
    return [row | (changes or {}).get(row["replica"], {}) for row in board.rows(5.0)]


def test_a_table_shows_each_replica():
    changes = {
        1: {"output_tokens_per_s": 12345.6, "host": "node-" + "x" * 90},
        2: {"state": "starting the engine", "requests_per_s": 0.0, "kv_cache_usage": None,
            "restarts": 3, "look_age_s": None, "host": None},
    }  # fmt: skip
    assert replica_lines(fleet(2, changes)) == [
        "replica  worker  state                rows/s  tok/s in     out  in flight   KV  restarts"
        "  host",
        "      1       1  running                 101         0  12,346          6  50%         0"
        "  node-xxxxx",
        "      2       2  starting the engine       0         0       0          6              3",
    ]


def test_no_replicas_no_table():
    assert replica_lines([]) == []


def test_of_many_replicas_the_slowest_and_those_that_do_not_run_are_shown():
    changes = {
        200: {"state": "gone"},
        100: {"look_age_s": 75.0},
        222: {"requests_per_s": 1.0},
    }
    lines = replica_lines(fleet(256, changes))
    shown = {int(line.split()[0]): line for line in lines[1:-1]}
    assert len(lines) == 26
    assert list(shown) == sorted(shown)
    assert {100, 200, 222} <= set(shown)
    assert set(range(1, 22)) <= set(shown)  # The slowest.
    assert "silent for 1 min 15 s" in shown[100]
    assert lines[-1] == "and 232 more: 232 running; --json has all"


def test_if_most_do_not_run_the_others_are_counted():
    idle = {at: {"state": "idle"} for at in range(1, 101)}
    waiting = {at: {"state": "waiting for room"} for at in range(101, 201)}
    lines = replica_lines(fleet(256, waiting | idle))
    assert sum("waiting for room" in line for line in lines[1:-1]) == 24
    assert lines[-1] == "and 232 more: 100 idle, 76 waiting for room, 56 running; --json has all"


def test_status_shows_the_table_and_json_has_all_of_it(storage):
    log = RunLog(storage, "run-1")
    board = Board(RunStats(0.0, 100), clock=lambda: 0.0)
    board.see(1, 1, look(3))
    lock = RunLock(storage, "run-1")
    lock.acquire()
    try:
        log.live(board.whole(1.0), replicas=board.rows(1.0))
        text = CliRunner().invoke(status, [str(storage.root)]).output
        told = CliRunner().invoke(status, [str(storage.root), "--json"]).output
    finally:
        lock.release()
    head, row = text.splitlines()[-2:]
    assert "1/1 replicas" in text
    assert "look_age_s" not in text
    assert head.split()[:3] == ["replica", "worker", "state"]
    assert row.split()[-1] == "node-a"
    assert json.loads(told)["run"]["replicas"] == board.rows(1.0)


def test_errors_that_were_never_durable_are_not_told():
    stats = RunStats(0.0, 100)
    board = Board(stats)
    board.see(1, 1, look(4, 3, error_types={"bad_json": 2, "odd": 1}))
    board.commit(1, Committed("p", {}, Counts(4, 1), 0.1, {"bad_json": 1}))
    assert stats.error_types == {"bad_json": 2, "odd": 1}
    board.lose(1, "it died")
    assert stats.error_types == {"bad_json": 1}


def test_in_flight_of_a_replica_is_what_its_scheduler_holds():
    changes = {1: {"num_in_flight": 1152, "num_running": 64, "num_waiting": 62}}
    (line,) = replica_lines(fleet(1, changes))[1:]
    assert line.split()[6] == "126"
