"""Several engines as one: who gets what, what a death costs, which start goes wrong."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.core.errors import ConfigError, EngineDeadError, EngineError
from batchgen.core.records import EngineSpec, EngineStats, WorkLeft
from batchgen.engine.group import LOADING_SHARE, RUN_ROWS, EngineGroup, combined, supervise
from batchgen.engine.supervised import SupervisedEngine
from tests.fakes import FACTS, FakeEngine, ask, finish_nothing
from tests.unit.test_engine_supervised import PoisonEngine, answers, asks, errors, ids

SPEC = EngineSpec("echo", "none", {"max_num_seqs": 64}, {})
DEAD = EngineDeadError("the engine died: boom")
NO_MEMORY = EngineError("the engine did not start: CUDA out of memory")


class Lab:
    """A group whose engines are given, in the order of building; then plain fakes."""

    def __init__(self, *engines, num=2, is_enough=None):
        self.built, self.specs, self.deaths, self.bells = [], [], [], []
        self._given = list(engines)
        specs = [lambda at=at: replace(SPEC, log_path=f"/none/{at}") for at in range(num)]
        self.group = supervise(
            self.build,
            specs,
            on_death=lambda death, whose: self.deaths.append((death, whose)),
            stall_s=900.0,
            is_enough=is_enough,
        )

    def build(self, spec, on_news):
        self.specs.append(spec)
        self.bells.append(on_news)
        engine = self._given.pop(0) if self._given else FakeEngine(100)
        if isinstance(engine, Exception):
            raise engine
        self.built.append(engine)
        return engine

    def steps(self, num):
        return [done for _ in range(num) for _, done in self.group.step(0.01)]

    def finish(self):
        done = []
        for _ in range(1000):
            if not self.group.num_in_flight:
                return done
            done += self.steps(1)
        raise AssertionError("never finished")


def test_one_engine_is_no_group():
    engine = supervise(lambda spec: FakeEngine(), [lambda: SPEC], on_death=print, stall_s=1.0)
    assert isinstance(engine, SupervisedEngine)


def test_nothing_is_built_before_there_is_something_to_do():
    lab = Lab()
    assert lab.built == []
    assert (lab.group.is_started, lab.group.facts, lab.group.num_in_flight) == (False, None, 0)
    assert lab.group.capacity == 1
    assert lab.group.step(0.01) == []
    lab.group.add(asks(0))
    assert lab.group.is_started
    assert [spec.num_sharing for spec in lab.specs] == [2, 2]
    assert [spec.log_path for spec in lab.specs] == ["/none/0", "/none/1"]


def test_both_are_filled_alike_and_neighbours_stay_together():
    lab = Lab()
    lab.group.add(asks(*range(6 * RUN_ROWS)))
    first, second = (ids(engine.added) for engine in lab.built)
    assert len(first) == len(second) == 3 * RUN_ROWS
    assert first[:RUN_ROWS] == list(range(RUN_ROWS))
    assert sorted(first + second) == list(range(6 * RUN_ROWS))


def test_whoever_has_more_room_gets_more():
    lab = Lab(FakeEngine(40), FakeEngine(400))
    lab.group.add(asks(*range(200)))
    assert [len(engine.added) for engine in lab.built] == [0, 200]
    assert lab.group.capacity == 440


def test_an_engine_that_is_not_up_wants_only_a_share():
    lab = Lab(FakeEngine(90), FakeEngine(90, facts=None))
    lab.group.start()
    assert lab.group.capacity == 90 + 90 // LOADING_SHARE
    lab.built[1].facts = FACTS
    assert lab.group.capacity == 180


def test_figures_are_those_of_all_engines():
    lab = Lab(FakeEngine(), FakeEngine(facts=None))
    lab.group.add(asks(0, 1))
    lab.built[0].stats = EngineStats(num_running=3, num_steps=5, kv_cache_usage=0.5, gpu_busy=0.2)
    lab.built[1].stats = EngineStats(num_running=4, kv_cache_usage=0.7, gpu_busy=0.4)
    stats = lab.group.stats
    assert (stats.num_running, stats.num_steps, stats.num_waiting) == (7, 5, None)
    assert stats.kv_cache_usage == pytest.approx(0.6)
    assert stats.gpu_busy == pytest.approx(0.3)
    assert lab.group.facts == replace(FACTS, settings={"engines_per_gpu": 2})
    assert lab.group.num_in_flight == 2
    assert combined([]) == EngineStats()


def test_it_waits_for_whoever_has_something_first():
    first, second = FakeEngine(), FakeEngine()
    lab = Lab(first, second)
    lab.group.add(asks(*range(2 * RUN_ROWS)))
    for engine in (first, second):
        engine.then(*[finish_nothing] * 10)
    # Both have been asked when the bell rings: only then the second has something.
    second._acts.popleft()
    threading.Timer(0.05, lambda: (second._acts.clear(), lab.bells[1]())).start()
    answered = lab.group.step(60.0)
    assert {request.request_id for request, _ in answered} == set(ids(second.added))


def test_a_death_costs_only_its_engines_requests():
    first, second = FakeEngine(100), FakeEngine(100)
    lab = Lab(first, second)
    lab.group.add(asks(*range(2 * RUN_ROWS)))
    first.then(DEAD)
    done = lab.steps(1)
    assert answers(done) == sorted(ids(second.added))
    assert [whose for _, whose in lab.deaths] == [" of engine 1"]
    assert lab.deaths[0][0].num_in_flight == RUN_ROWS
    done += lab.finish()
    assert answers(done) == list(range(2 * RUN_ROWS))
    assert len(lab.deaths) == 1


def test_one_that_is_searched_gets_no_new_requests():
    first, second = FakeEngine(100), FakeEngine(100)
    lab = Lab(first, second, FakeEngine(100, facts=None))
    lab.group.add(asks(*range(2 * RUN_ROWS)))
    first.then(DEAD)
    lab.steps(1)
    assert lab.group.capacity == RUN_ROWS + 100
    lab.group.add(asks(*range(100, 150)))
    assert ids(second.added)[-50:] == list(range(100, 150))


def test_what_others_have_finished_comes_before_the_end():
    first, second = FakeEngine(100), FakeEngine(100)
    lab = Lab(first, second)
    lab.group.add(asks(*range(2 * RUN_ROWS)))
    over = EngineError("it is over")
    second.then(lambda engine: [engine.finish(at) for at in list(engine.held)[:RUN_ROWS]], over)
    first.then(over)
    assert len(lab.steps(1)) == RUN_ROWS
    for _ in range(2):
        with pytest.raises(EngineError, match="it is over"):
            lab.group.step(0.01)


def test_one_that_only_dies_is_done_without_and_costs_no_row():
    def dying(spec, on_news):
        built.append(spec)
        # The first engine, and all that are built in its place.
        return FakeEngine(100) if len(built) == 2 else FakeEngine(100).then(DEAD, DEAD)

    built, deaths = [], []
    group = EngineGroup(dying, lambda: [SPEC, SPEC], on_death=lambda *death: deaths.append(death))
    group.add(asks(*range(2 * RUN_ROWS)))
    done = []
    while group.num_in_flight:
        done += [completion for _, completion in group.step(0)]
    assert answers(done) == list(range(2 * RUN_ROWS))
    assert len(deaths) > 1
    assert group.num_members == 1
    assert "1 of 2 engines go on: the engine died" in group.warnings[0]


def test_one_that_does_not_start_is_done_without():
    first, second = FakeEngine(100, facts=None), FakeEngine(100)
    lab = Lab(first, second)
    lab.group.add(asks(*range(2 * RUN_ROWS)))
    first.then(NO_MEMORY)
    done = lab.finish()
    assert answers(done) == list(range(2 * RUN_ROWS))
    assert len(lab.built) == 2
    assert first.is_closed
    assert lab.group.num_members == 1
    assert lab.group.facts == FACTS
    (warning,) = lab.group.warnings
    assert "1 of 2 engines go on: the engine did not start: CUDA out of memory" in warning


def test_when_none_starts_one_gets_all_of_the_memory():
    bad = [FakeEngine(9, facts=None).then(NO_MEMORY) for _ in range(2)]
    lab = Lab(*bad, last := Listening())
    lab.group.expect(WorkLeft(10, 100))
    lab.group.add(asks(*range(10)))
    assert answers(lab.finish()) == list(range(10))
    assert [spec.num_sharing for spec in lab.specs] == [2, 2, 1]
    assert "one engine with all of the memory is started instead" in lab.group.warnings[-1]
    assert last.work == WorkLeft(10, 100, has_gpu_alone=True)


def test_when_that_one_does_not_start_either_the_run_ends():
    bad = [FakeEngine(9, facts=None).then(NO_MEMORY) for _ in range(3)]
    lab = Lab(*bad)
    lab.group.add(asks(*range(10)))
    with pytest.raises(EngineError, match="CUDA out of memory"):
        lab.finish()
    assert len(lab.built) == 3


def test_what_the_job_is_at_fault_for_ends_the_run_at_once():
    wrong = ConfigError("[model]", ["no such option"])
    lab = Lab(FakeEngine(facts=None).then(wrong), FakeEngine(facts=None))
    lab.group.add(asks(0))
    with pytest.raises(ConfigError, match="no such option"):
        lab.steps(1)


@pytest.mark.parametrize(("num_rows", "num_engines"), [(10, 1), (1000, 2)])
def test_the_second_starts_once_it_is_known_that_there_is_enough_to_do(num_rows, num_engines):
    lab = Lab(is_enough=lambda work: work.num_rows > 100)
    lab.group.start()
    assert [spec.num_sharing for spec in lab.specs] == [2]
    lab.group.expect(WorkLeft(num_rows, 100))
    lab.group.add(asks(*range(70)))
    assert len(lab.built) == lab.group.num_members == num_engines
    assert answers(lab.finish()) == list(range(70))


@pytest.mark.parametrize(("num_rows", "shares"), [(10, [1]), (1000, [2, 2])])
def test_what_is_known_before_the_start_decides_on_it(num_rows, shares):
    lab = Lab(is_enough=lambda work: work.num_rows > 100)
    lab.group.expect(WorkLeft(num_rows, 100))
    assert lab.built == []
    lab.group.add(asks(*range(70)))
    assert [spec.num_sharing for spec in lab.specs] == shares


class Listening(FakeEngine):
    """Hears what is left to do."""

    work = None

    def expect(self, work):
        self.work = work


def test_the_first_has_the_gpu_alone_once_it_is_known_that_there_is_too_little_to_do():
    lab = Lab(Listening(facts=None), Listening(facts=None), is_enough=lambda work: False)
    lab.group.start()
    assert lab.specs[0].work is None
    lab.group.expect(WorkLeft(10, 100))
    assert lab.built[0].work == WorkLeft(10, 100, has_gpu_alone=True)
    lab.group.expect(WorkLeft(1000, 100))
    assert len(lab.built) == 1


def test_engines_that_share_a_gpu_hear_of_their_shares():
    lab = Lab(Listening(), Listening(), is_enough=lambda work: True)
    lab.group.start()
    lab.group.expect(WorkLeft(1001, 100, rows_per_s=50.0))
    assert [engine.work for engine in lab.built] == [WorkLeft(501, 100, rows_per_s=25.0)] * 2


def test_a_second_that_starts_later_is_told_of():
    lab = Lab(is_enough=lambda work: True)
    lab.group.start()
    assert lab.group.facts == FACTS
    lab.group.expect(WorkLeft(1000, 100))
    assert lab.group.facts.num_engines == 2


def test_one_that_is_built_anew_starts_for_what_is_left_now():
    lab = Lab(FakeEngine(100), FakeEngine(100), is_enough=lambda work: False)
    lab.group.start()
    lab.group.expect(WorkLeft(10, 100))
    lab.group.add(asks(0))
    lab.built[0].then(DEAD)
    assert answers(lab.finish()) == [0]
    assert lab.specs[1].work.has_gpu_alone


def test_close_closes_all_of_them():
    lab = Lab()
    lab.group.add(asks(*range(70)))
    lab.group.close()
    lab.group.close()
    assert [engine.is_closed for engine in lab.built] == [True, True]
    assert lab.group.num_in_flight == 0
    with pytest.raises(EngineDeadError, match="closed"):
        lab.group.step(0)


def test_nothing_is_built_after_the_end():
    lab = Lab()
    lab.group.close()
    for act in (lab.group.start, lambda: lab.group.add(asks(0))):
        with pytest.raises(EngineDeadError, match="closed"):
            act()
    assert lab.built == []


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_exactly_the_poison_rows_crash_and_every_row_ends_once(data):
    num = data.draw(st.integers(1, 300), "rows")
    poison = data.draw(st.sets(st.integers(0, num - 1), max_size=8), "poison")
    width = data.draw(st.integers(1, 64), "width")
    capacity = data.draw(st.integers(1, 128), "capacity")
    num_engines = data.draw(st.integers(2, 3), "engines")
    engines = (PoisonEngine(poison, width, capacity) for _ in itertools.count())
    group = EngineGroup(lambda spec, on_news: next(engines), lambda: [SPEC] * num_engines)
    waiting, done = list(range(num)), []
    try:
        for num_steps in itertools.count():
            if not waiting and not group.num_in_flight:
                break
            assert num_steps < 20 * num + 500, "it does not come to an end"
            room = group.capacity - group.num_in_flight
            if waiting and room > 0:
                group.add([ask(number) for number in waiting[:room]])
                waiting = waiting[room:]
            done += [completion for _, completion in group.step(0)]
    except EngineDeadError:
        assert len(poison) > 1
        return
    assert sorted(completion.request_id for completion in done) == list(range(num))
    assert {at for at, kind in errors(done).items() if kind == "engine_crash"} == poison
