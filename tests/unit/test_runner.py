"""The loop, on a scripted engine and a clock that stands still unless a test moves it."""

from __future__ import annotations

import gc
import itertools
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.answers.validate import Retries
from batchgen.core.errors import EngineDeadError, EngineError, SourceError, StorageError
from batchgen.core.records import EngineSpec, Ranges, RowError, RowSet
from batchgen.engine.supervised import SupervisedEngine
from batchgen.job.recipe import Seeds
from batchgen.job.run_table import RunConfig
from batchgen.pipeline.context import Stop, StopSwitch
from batchgen.pipeline.runner import Committer, Feeder, OpenPart, Runner, feed_batches
from batchgen.pipeline.stats import RunStats
from tests import fakes
from tests.fakes import (
    FACTS,
    FakeClock,
    FakeEngine,
    batch,
    finish,
    finish_all,
    finish_newest,
    finish_nothing,
    judge_of,
    lose_all,
    request_builder,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from batchgen.core.records import RowBatch
    from batchgen.job.model import JobConfig

SPEC = EngineSpec("echo", "none", {}, {})
BAD = RowError("bad_json", "rows.jsonl:4: not JSON")


@dataclass
class Outcome:
    """What a run did."""

    engine: FakeEngine
    stats: RunStats
    stop: StopSwitch = field(default_factory=StopSwitch)
    parts: list[OpenPart] = field(default_factory=list)
    num_ticks: int = 0
    complete: bool | None = None

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Ordinals in commit order."""
        return [tuple(result.ordinal) for part in self.parts for result in part.results]

    @property
    def sizes(self) -> list[int]:
        return [len(part.results) for part in self.parts]


class Run:
    """One runner with real feeder and committer threads."""

    def __init__(
        self,
        engine: FakeEngine,
        batches: Iterable[RowBatch],
        *,
        clock: FakeClock | None = None,
        on_tick: Callable[[Outcome], None] | None = None,
        commit: Callable[[OpenPart], None] | None = None,
        job: JobConfig | None = None,
        **config: Any,
    ) -> None:
        clock = clock or FakeClock()
        self.outcome = Outcome(engine, RunStats(clock(), 0))
        self._on_tick = on_tick
        made = job or fakes.job()
        ids = itertools.count()
        self.feeder = Feeder(feed_batches(batches, request_builder(made, ids=ids)))
        engines: list[FakeEngine | Exception] = [engine, *[EngineError("no other engine")] * 9]
        wait = FakeClock()
        self.engine = SupervisedEngine(
            lambda _: made_or_raised(engines.pop(0)), lambda: SPEC, clock=wait, sleep=wait.advance
        )
        self.engine.start()
        self.runner = Runner(
            self.engine,
            self.feeder,
            Committer(commit or self.outcome.parts.append, 0.0, lambda _: None),
            self.outcome.stats,
            judge=judge_of(made),
            retries=Retries(made.retry, Seeds(made.sampling), ids),
            config=RunConfig(**{"grace_s": 20.0, **config}),
            clock=clock,
        )

    def _tick(self) -> None:
        self.outcome.num_ticks += 1
        if not self.engine.num_deaths:
            assert self.runner.num_in_flight == len(self.outcome.engine.held)
        if self._on_tick is not None:
            self._on_tick(self.outcome)

    def go(self) -> Outcome:
        try:
            self.outcome.complete = self.runner.run(self.outcome.stop, self._tick)
        finally:
            self.feeder.close()
        return self.outcome


def made_or_raised(engine: FakeEngine | Exception) -> FakeEngine:
    if isinstance(engine, Exception):
        raise engine
    return engine


def settled(thread_name: str) -> None:
    """Wait until a stage's thread has nothing more to do."""
    for thread in threading.enumerate():
        if thread.name == thread_name:
            thread.join(timeout=5)


@pytest.mark.parametrize("capacity", [1, 3, 7, 100])
def test_every_row_ends_once(capacity):
    batches = [batch(range(5)), batch(range(5, 9)), batch(range(3), segment=1)]
    outcome = Run(FakeEngine(capacity), batches).go()
    assert outcome.complete is True
    assert sorted(outcome.rows) == [
        *((0, row) for row in range(9)),
        *((1, row) for row in range(3)),
    ]
    assert len(set(outcome.rows)) == len(outcome.rows)
    assert outcome.stats.num_ok == 12
    assert outcome.engine.max_held <= capacity


def test_an_empty_input_is_complete_and_commits_nothing():
    outcome = Run(FakeEngine(), []).go()
    assert (outcome.complete, outcome.parts, outcome.engine.num_steps) == (True, [], 0)


def test_answers_in_any_order_reach_their_own_rows():
    engine = FakeEngine(6).then(finish(3), finish(5, 0), finish(1), finish(4, 2))
    (part,) = Run(engine, [batch(range(6))]).go().parts
    assert [result.ordinal.row for result in part.results] == [3, 5, 0, 1, 4, 2]
    for result in part.results:
        assert result.completion.text == f"answer {result.ordinal.row}"
        assert result.batch.carried["id"][result.index].as_py() == f"0/{result.ordinal.row}"
        assert len(result.request_key) == 32


def test_the_window_is_topped_up_without_waiting_for_the_slow_row():
    engine = FakeEngine(3).then(*[finish_newest] * 7)
    outcome = Run(engine, [batch(range(8))]).go()
    assert outcome.engine.max_held == 3
    # Row 0 is the slow one: seven others pass it.
    assert [row for _, row in outcome.rows][-1] == 0
    assert outcome.complete is True


def test_the_engine_gets_what_it_can_hold_and_never_more():
    held = []

    def watch(outcome):
        held.append(outcome.engine.num_in_flight)

    engine = FakeEngine(4).then(finish_nothing, finish(0), finish_nothing, finish(1, 2, 3))
    outcome = Run(engine, [batch(range(20))], on_tick=watch).go()
    assert outcome.engine.max_held == 4
    assert held[:4] == [4, 3, 4, 1]


def test_the_collector_of_cycles_is_slower_while_rows_are_in_hand():
    before, seen = gc.get_threshold(), []
    Run(FakeEngine(4), [batch(range(9))], on_tick=lambda _: seen.append(gc.get_threshold()[0])).go()
    assert min(seen) >= 50_000
    assert gc.get_threshold() == before


def test_requests_reach_the_engine_in_input_order_with_ids_from_zero():
    outcome = Run(FakeEngine(2), [batch([4, 6]), batch([7]), batch([0], segment=1)]).go()
    assert [(request.request_id, *request.ordinal) for request in outcome.engine.added] == [
        (0, 0, 4),
        (1, 0, 6),
        (2, 0, 7),
        (3, 1, 0),
    ]
    assert outcome.engine.added[2].prompt == [{"role": "user", "content": "prompt 0/7"}]


def test_a_row_that_could_not_be_read_ends_as_an_error_without_the_engine():
    outcome = Run(FakeEngine(), [batch([0, 1, 2], errors={1: BAD})]).go()
    assert [tuple(request.ordinal) for request in outcome.engine.added] == [(0, 0), (0, 2)]
    by_row = {result.ordinal.row: result for part in outcome.parts for result in part.results}
    assert sorted(by_row) == [0, 1, 2]
    assert (by_row[1].error, by_row[1].completion, by_row[1].request_key) == (BAD, None, None)
    assert outcome.stats.error_types == {"bad_json": 1}
    assert (outcome.stats.num_ok, outcome.stats.num_errors) == (2, 1)


def test_a_request_that_the_engine_refuses_is_an_error_row_that_keeps_its_key():
    refused = RowError("prompt_too_long", "too long")
    engine = FakeEngine().then(lambda e: [e.finish(0, text=None, error=refused), e.finish(1)])
    (part,) = Run(engine, [batch([0, 1])]).go().parts
    assert [(result.error, len(result.request_key)) for result in part.results] == [
        (refused, 32),
        (None, 32),
    ]


def test_skipped_rows_are_in_the_part_and_counted():
    batches = [
        batch([1], skipped=[0, 2]),
        batch([], skipped=[3]),
        batch([], segment=4, skipped=[9]),
    ]
    outcome = Run(FakeEngine(), batches).go()
    skipped: dict[int, Ranges] = {}
    for part in outcome.parts:
        for segment, rows in part.skipped.items():
            skipped[segment] = skipped.get(segment, Ranges()) | rows
    assert skipped == {0: Ranges.of([0, 2, 3]), 4: Ranges.of([9])}
    assert (outcome.stats.num_skipped, outcome.rows, outcome.complete) == (4, [(0, 1)], True)


def test_an_input_of_skipped_rows_alone_is_committed():
    outcome = Run(FakeEngine(), [batch([], skipped=range(5))]).go()
    (part,) = outcome.parts
    assert (part.results, part.skipped) == ([], RowSet({0: Ranges.until(5)}))


def test_parts_are_flushed_by_rows():
    outcome = Run(FakeEngine(2), [batch(range(7))], flush_rows=3).go()
    assert outcome.sizes == [4, 3]
    outcome = Run(FakeEngine(1), [batch(range(7))], flush_rows=3).go()
    assert outcome.sizes == [3, 3, 1]


def test_parts_are_flushed_by_bytes_of_answers():
    def long_answers(engine):
        return [engine.finish(request_id, text="x" * 400_000) for request_id in list(engine.held)]

    engine = FakeEngine(1).then(*[long_answers] * 7)
    assert Run(engine, [batch(range(7))], flush_mib=1).go().sizes == [3, 3, 1]


def test_parts_are_flushed_by_bytes_of_carried_columns():
    import pyarrow as pa

    carried = pa.record_batch({"id": ["x" * 300_000] * 8})
    outcome = Run(FakeEngine(1), [batch(range(8), carried=carried)], flush_mib=1).go()
    assert outcome.sizes == [4, 4]


def test_parts_are_flushed_by_time_a_little_early():
    clock = FakeClock()
    engine = FakeEngine(1)
    engine.on_step = lambda: clock.advance(3.0)
    outcome = Run(engine, [batch(range(9))], clock=clock, flush_s=10.0).go()
    # A part is open from its first result; 8 s later, at 80 % of flush_s, it is due.
    assert outcome.sizes == [4, 4, 1]


def test_time_alone_flushes_what_finished_while_a_slow_row_runs():
    clock = FakeClock()
    engine = FakeEngine(2).then(finish(0), *[finish_nothing] * 5, finish(1))
    engine.on_step = lambda: clock.advance(2.0)
    outcome = Run(engine, [batch(range(2))], clock=clock, flush_s=10.0).go()
    assert outcome.rows == [(0, 0), (0, 1)]
    assert outcome.sizes == [1, 1]


def test_rows_that_never_reach_the_engine_are_flushed_on_the_way():
    batches = [batch([at], errors={at: BAD}) for at in range(200)]
    outcome = Run(FakeEngine(), batches, flush_rows=10).go()
    assert len(outcome.rows) == 200
    assert max(outcome.sizes) <= 60


def test_a_stop_is_heard_while_rows_are_skipped():
    stop = StopSwitch()

    def endless():
        for at in range(3000):
            if at == 50:
                stop.ask()
            yield batch([], skipped=[at])

    run = Run(FakeEngine(), endless())
    run.outcome.stop = stop
    assert run.go().complete is False


def drained(engine, *, after, **config):
    """Ask once after so many ticks."""

    def ask(outcome):
        if outcome.num_ticks == after:
            outcome.stop.ask()

    return Run(engine, [batch(range(50))], on_tick=ask, **config).go()


def test_asking_to_stop_admits_no_more_and_commits_what_finishes_in_the_grace():
    engine = FakeEngine(3).then(finish(1), finish_nothing, finish(2), finish(0))
    outcome = drained(engine, after=1)
    assert outcome.rows == [(0, 1), (0, 2), (0, 0)]
    assert [request.request_id for request in engine.added] == [0, 1, 2]
    assert (outcome.complete, engine.num_steps) == (False, 4)


def test_after_the_grace_the_rest_is_given_up():
    clock = FakeClock()
    engine = FakeEngine(3).then(finish(1), *[finish_nothing] * 100)
    engine.on_step = lambda: clock.advance(3.0)
    outcome = drained(engine, after=1, clock=clock, grace_s=20.0)
    assert outcome.rows == [(0, 1)]
    # One step before the switch was asked, then steps at 0, 3, ..., 18 s of the grace.
    assert outcome.engine.num_steps == 8
    assert len(outcome.engine.held) == 2


def test_a_grace_of_zero_gives_up_at_once():
    engine = FakeEngine(3).then(finish(1), finish_all)
    outcome = drained(engine, after=1, grace_s=0.0)
    assert (outcome.rows, outcome.engine.num_steps) == ([(0, 1)], 1)


def test_asking_twice_gives_up_at_once_and_commits_what_finished():
    engine = FakeEngine(3).then(finish(1), *[finish_nothing] * 100)

    def ask(outcome):
        if outcome.num_ticks in {1, 3}:
            outcome.stop.ask()

    outcome = Run(engine, [batch(range(50))], on_tick=ask).go()
    assert (outcome.complete, outcome.rows, outcome.engine.num_steps) == (False, [(0, 1)], 3)


def test_a_stop_while_the_engine_starts_does_not_wait_for_it():
    engine = FakeEngine(3, facts=None).then(*[finish_nothing] * 100)
    outcome = drained(engine, after=4)
    assert (outcome.complete, outcome.parts, outcome.engine.num_steps) == (False, [], 4)


def test_a_stop_before_the_first_row_does_nothing():
    run = Run(FakeEngine(), [batch(range(5))])
    run.outcome.stop.ask()
    outcome = run.go()
    assert (outcome.complete, outcome.parts, outcome.engine.added) == (False, [], [])


def test_a_stop_that_comes_when_only_the_last_rows_are_in_flight_ends_complete():
    engine = FakeEngine(4).then(finish_nothing, finish_nothing, finish_all)

    def ask(outcome):
        if outcome.num_ticks == 1:
            settled("feeder")  # The next turn finds the input used up.
        if outcome.num_ticks == 2:
            outcome.stop.ask()

    outcome = Run(engine, [batch(range(3))], on_tick=ask).go()
    assert len(outcome.rows) == 3
    assert outcome.complete is True


def test_the_switch_only_moves_forward():
    stop = StopSwitch()
    seen = [stop.state]
    for _ in range(3):
        stop.ask()
        seen.append(stop.state)
    assert seen == [Stop.NO, Stop.DRAIN, Stop.NOW, Stop.NOW]


def test_when_the_engine_dies_what_finished_is_committed():
    engine = FakeEngine(3).then(finish(2), finish(0), EngineDeadError("engine: gone"))
    run = Run(engine, [batch(range(9))])
    with pytest.raises(EngineDeadError, match="attempts to start another one failed"):
        run.go()
    assert run.outcome.rows == [(0, 2), (0, 0)]


def test_when_the_engine_dies_at_add_what_finished_is_committed():
    engine = FakeEngine(2)

    def last(engine):
        engine.refuse_add(EngineDeadError("engine: gone"))
        return finish_all(engine)

    run = Run(engine.then(last), [batch(range(9))])
    with pytest.raises(EngineDeadError, match="attempts to start another one failed"):
        run.go()
    assert run.outcome.rows == [(0, 0), (0, 1)]


@pytest.mark.parametrize(
    ("acts", "warning"),
    [
        ([finish(1, 77)], "1 answers that came twice, or unasked, were dropped"),
        ([finish(1), finish(1)], "1 answers that came twice, or unasked, were dropped"),
        ([finish(1), lose_all], "3 requests were lost by the engine and added again"),
    ],
    ids=["unasked", "twice", "lost"],
)
def test_whatever_the_engine_does_with_them_every_row_ends_once(acts, warning):
    run = Run(FakeEngine(3).then(*acts), [batch(range(9))])
    assert sorted(run.go().rows) == [(0, row) for row in range(9)]
    assert run.engine.warnings == [warning]


def test_an_engine_that_only_takes_its_time_is_not_dead():
    engine = FakeEngine(3).then(*[finish_nothing] * 20)
    assert len(Run(engine, [batch(range(3))]).go().rows) == 3


def test_a_reader_that_fails_is_told_after_what_it_read_is_committed():
    def broken():
        yield batch([0, 1])
        yield batch([2])
        message = "ends early"
        raise SourceError("in.jsonl.gz", message)

    run = Run(FakeEngine(8), broken())
    settled("feeder")
    with pytest.raises(SourceError, match=r"in\.jsonl\.gz: ends early"):
        run.go()
    # All was read before the engine's first step; only what it had finished is durable.
    assert run.outcome.stats.num_results == len(run.outcome.rows)


def test_rows_read_before_the_reader_failed_and_answered_are_committed():
    gate = threading.Event()

    def broken():
        yield batch([0, 1])
        gate.wait(timeout=5)
        message = "ends early"
        raise SourceError("in.jsonl.gz", message)

    def open_gate(engine):
        done = finish_all(engine)
        gate.set()
        return done

    run = Run(FakeEngine(8).then(open_gate), broken())
    with pytest.raises(SourceError, match=r"in\.jsonl\.gz: ends early"):
        run.go()
    assert run.outcome.rows == [(0, 0), (0, 1)]


def test_a_commit_that_fails_stops_the_run_and_is_what_it_raises():
    committed = []

    def commit(part):
        if committed:
            raise StorageError("out", "No space left on device")
        committed.append(part)

    engine = FakeEngine(1)
    engine.on_step = lambda: None
    batches = (batch([at]) for at in range(100_000))
    run = Run(engine, batches, commit=commit, flush_rows=2)
    with pytest.raises(StorageError, match="No space left on device"):
        run.go()
    assert [len(part.results) for part in committed] == [2]
    assert run.outcome.stats.num_results < 100_000


def test_a_commit_that_fails_at_the_very_end_is_raised():
    def commit(_):
        raise StorageError("out", "No space left on device")

    with pytest.raises(StorageError, match="No space left on device"):
        Run(FakeEngine(), [batch([0])], commit=commit).go()


def test_the_first_trouble_is_the_one_told():
    def commit(_):
        raise StorageError("out", "No space left on device")

    engine = FakeEngine(2).then(finish(0), EngineDeadError("engine: gone"))
    with pytest.raises(EngineDeadError, match="attempts to start another one failed"):
        Run(engine, [batch([0, 1])], commit=commit).go()


def test_an_interrupt_in_the_loop_commits_what_finished():
    def interrupt(outcome):
        if outcome.num_ticks == 2:
            raise KeyboardInterrupt

    engine = FakeEngine(2).then(finish(0), finish(1))
    run = Run(engine, [batch(range(9))], on_tick=interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.go()
    assert run.outcome.rows == [(0, 0), (0, 1)]


def test_the_engine_is_ready_from_the_first_step_that_finds_it_up():
    clock = FakeClock(100.0)
    engine = FakeEngine(2, facts=None).then(*[finish_nothing] * 3)

    def come_up():
        clock.advance(5.0)
        if engine.num_steps == 3:
            engine.facts = FACTS

    engine.on_step = come_up
    outcome = Run(engine, [batch(range(2))], clock=clock).go()
    assert outcome.stats.started_s == 100.0
    assert outcome.stats.engine_ready_s == 110.0
    assert outcome.stats.last_done_s == 115.0


def test_the_feeder_reads_only_so_far_ahead():
    read = []

    def endless():
        for at in range(1000):
            read.append(at)
            yield batch([at])

    feeder = Feeder(feed_batches(endless(), request_builder()))
    first = feeder.take(5.0)
    assert [tuple(request.ordinal) for request in first.requests] == [(0, 0)]
    feeder.close()
    settled("feeder")
    assert len(read) <= 7


def test_the_feeder_says_when_it_is_done_and_then_gives_nothing():
    feeder = Feeder(feed_batches([batch([0])], request_builder()))
    assert feeder.take(5.0).num_bytes > 0
    assert not feeder.is_done
    assert feeder.take(5.0) is None
    assert feeder.is_done
    assert feeder.take(5.0) is None


def test_a_result_without_text_adds_nothing_to_the_parts_size():
    part = OpenPart()
    assert not part
    assert not part.is_due(1e9, RunConfig())
    part.since_s = 0.0
    assert part
    assert [part.is_due(now, RunConfig(flush_s=10.0)) for now in (0.0, 7.9, 8.0)] == [
        False,
        False,
        True,
    ]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whatever_finishes_whenever_the_books_balance(data):
    """Any batch sizes, bad and skipped rows, capacity, finish order and flush size."""
    batches, wanted, start = [], Counter(), 0
    for _ in range(data.draw(st.integers(0, 4))):
        size = data.draw(st.integers(0, 6))
        rows = range(start, start + size)
        bad = data.draw(st.sets(st.sampled_from(rows))) if size else set()
        batches.append(batch(rows, errors=dict.fromkeys(bad, BAD), skipped=[start + size]))
        wanted.update((0, row) for row in rows)
        start += size + 1

    chance = data.draw(st.randoms(use_true_random=True))

    def finish_some(engine):
        chosen = chance.sample(sorted(engine.held), chance.randint(0, len(engine.held)))
        return [engine.finish(request_id) for request_id in chosen]

    engine = FakeEngine(data.draw(st.integers(1, 5))).then(*[finish_some] * 15)
    outcome = Run(engine, batches, flush_rows=data.draw(st.integers(1, 5))).go()
    assert outcome.complete is True
    assert Counter(outcome.rows) == wanted
    assert engine.max_held <= engine.capacity
    assert outcome.stats.num_results == len(wanted)
    assert outcome.stats.num_skipped == len(batches)
