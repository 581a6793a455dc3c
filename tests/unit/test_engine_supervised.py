"""One engine over many: who is blamed, who waits, when it is over."""

from __future__ import annotations

import itertools
import random
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.core.errors import ConfigError, EngineDeadError, EngineError
from batchgen.core.records import EngineFacts, EngineSpec, EngineStats
from batchgen.engine.death import MAX_IN_A_ROW, Tally, ask_less, is_out_of_memory
from batchgen.engine.supervised import REBUILD_WAITS_S, SupervisedEngine
from tests.fakes import FakeClock, FakeEngine, ask, completion, finish, finish_all, finish_nothing

SPEC = EngineSpec("echo", "none", {"max_num_seqs": 64}, {}, max_in_flight=100)
DEAD = EngineDeadError("the engine died: boom")


def asks(*request_ids):
    return [ask(request_id) for request_id in request_ids]


class Lab:
    """A supervised engine whose inner engines are given, in order; then plain fakes."""

    def __init__(self, *engines, stall_s=900.0):
        self.clock = FakeClock()
        self.built, self.specs, self.deaths = [], [], []
        self._given = list(engines)
        self.engine = SupervisedEngine(
            self.build, lambda: SPEC, on_death=self.deaths.append, stall_s=stall_s,
            clock=self.clock, sleep=self.clock.advance,
        )  # fmt: skip

    def build(self, spec):
        self.specs.append(spec)
        engine = self._given.pop(0) if self._given else FakeEngine(100)
        if isinstance(engine, Exception):
            raise engine
        self.built.append(engine)
        return engine

    def steps(self, num):
        steps = (self.engine.step(0.1) for _ in range(num))
        return [done for _, done in itertools.chain(*steps)]

    def finish(self, max_steps=10_000):
        done = []
        for _ in range(max_steps):
            if not self.engine.num_in_flight:
                return done
            done += self.steps(1)
        raise AssertionError("never finished")


def answers(completions):
    return sorted(done.request_id for done in completions if done.error is None)


def errors(completions):
    return {done.request_id: done.error.error_type for done in completions if done.error}


def ids(requests):
    return [request.request_id for request in requests]


class PoisonEngine(FakeEngine):
    """Runs up to `width` requests a step, and dies at once when one of them is poison."""

    def __init__(self, poison, width, capacity):
        super().__init__(capacity)
        self.poison, self.width = poison, width
        self.is_dead = False
        self.num_groups = 0

    def add(self, requests):
        assert not self.is_dead, "added to a dead engine"
        super().add(requests)

    def step(self, timeout_s):
        assert not self.is_dead, "stepped a dead engine"
        running = list(self.held)[: self.width]
        if self.poison & set(running):
            self.is_dead = True
            raise EngineDeadError("the engine died: poison")
        return [self.finish(request_id) for request_id in running]


def run_with_poison(num, poison, width, capacity, chunk):
    """Feed as the runner does; return the lab, what came back, and the error it ended with."""
    lab = Lab()
    lab.built.clear()

    def build(_):
        lab.built.append(PoisonEngine(poison, width, capacity))
        return lab.built[-1]

    lab.engine = SupervisedEngine(
        build, lambda: SPEC, on_death=lab.deaths.append, clock=lab.clock, sleep=lab.clock.advance
    )
    waiting, done = list(range(num)), []
    try:
        for num_steps in itertools.count():
            if not waiting and not lab.engine.num_in_flight:
                break
            assert num_steps < 20 * num + 500, "it does not come to an end"
            room = min(lab.engine.capacity - lab.engine.num_in_flight, chunk)
            if waiting and room > 0:
                lab.engine.add(asks(*waiting[:room]))
                waiting = waiting[room:]
            done += lab.steps(1)
            if lab.engine._search.is_on:
                inside = set(lab.built[-1].held)
                group = lab.engine._search._inside
                assert inside <= set(ids(group.requests if group else ()))
    except EngineDeadError as error:
        return lab, done, error
    return lab, done, None


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_exactly_the_poison_rows_crash_and_every_row_ends_once(data):
    num = data.draw(st.integers(1, 300), "rows")
    poison = data.draw(st.sets(st.integers(0, num - 1), max_size=12), "poison")
    width = data.draw(st.integers(1, 64), "width")
    capacity = data.draw(st.integers(1, 128), "capacity")
    chunk = data.draw(st.integers(1, 64), "chunk")
    lab, done, error = run_with_poison(num, poison, width, capacity, chunk)
    crashed = {i for i, kind in errors(done).items() if kind == "engine_crash"}
    assert crashed <= poison
    assert len(done) == len({c.request_id for c in done})
    assert len(lab.deaths) <= 10 + num // 100 + 10 * len(poison)
    assert len(lab.built) - len(lab.deaths) in (0, 1)
    if error is None:
        assert crashed == poison
        assert answers(done) == sorted(set(range(num)) - poison)
    else:
        assert len(poison) > 3


@pytest.mark.parametrize("seed", range(20))
def test_many_poison_rows_among_many_are_all_found(seed):
    chance = random.Random(seed)
    poison = set(chance.sample(range(1000), 25))
    lab, done, error = run_with_poison(1000, poison, 32, 256, 100)
    assert error is None
    assert errors(done) == dict.fromkeys(poison, "engine_crash")
    assert len(answers(done)) == 975
    assert lab.engine.num_deaths <= 10 * 25


def test_neighbours_that_are_all_poison_are_found_too():
    poison = set(range(40, 60))
    _, done, error = run_with_poison(200, poison, 16, 128, 64)
    assert error is None
    assert errors(done).keys() == poison


def test_looking_at_it_builds_nothing():
    lab = Lab()
    engine = lab.engine
    assert (engine.facts, engine.num_in_flight, engine.warnings) == (None, 0, [])
    assert engine.stats == EngineStats()
    assert engine.step(0.1) == []
    assert engine.capacity >= 1  # Or nobody would ever hand it a request.
    assert not engine.is_started
    engine.close()
    assert lab.built == []


def test_it_is_built_once_by_the_first_request_or_before_and_asks_for_its_spec_then():
    lab = Lab()
    lab.engine.start()
    lab.engine.start()
    assert (len(lab.built), lab.engine.is_started, lab.engine.capacity) == (1, True, 100)
    lab.engine.add(asks(0, 1))
    assert lab.engine.num_in_flight == 2
    assert [(request.request_id, done.request_id) for request, done in lab.engine.step(0.1)] == [
        (0, 0),
        (1, 1),
    ]
    assert (len(lab.built), lab.engine.num_in_flight) == (1, 0)
    lab.engine.close()
    assert lab.built[0].is_closed


def test_a_spec_that_cannot_be_made_is_told_where_it_is_started():
    def refuse():
        raise ConfigError("model.engine", ["no such option"])

    engine = SupervisedEngine(lambda _: FakeEngine(), refuse)
    with pytest.raises(ConfigError, match="no such option"):
        engine.add(asks(0))
    assert not engine.is_started


def test_a_death_from_outside_costs_no_row():
    lab = Lab(FakeEngine(100).then(finish(3), DEAD))
    lab.engine.add(asks(*range(10)))
    done = lab.finish()
    assert answers(done) == list(range(10))
    assert [len(engine.added) for engine in lab.built] == [10, 9]
    assert lab.built[0].is_closed


def test_new_rows_wait_while_suspects_are_inside():
    lab = Lab(FakeEngine(100).then(DEAD), FakeEngine(100).then(finish_nothing, finish(0)))
    lab.engine.add(asks(0, 1))
    lab.steps(1)
    lab.engine.add(asks(2, 3))
    lab.steps(2)
    assert ids(lab.built[1].added) == [0, 1]
    assert lab.engine.num_in_flight == 3
    assert answers(lab.finish()) == [1, 2, 3]
    assert ids(lab.built[1].added) == [0, 1, 2, 3]


def test_no_more_than_its_capacity_goes_into_an_engine_after_a_search():
    lab = Lab(FakeEngine(100).then(DEAD), small := FakeEngine(4))
    lab.engine.add(asks(0))
    lab.steps(1)
    lab.engine.add(asks(*range(1, 20)))
    assert answers(lab.finish()) == list(range(20))
    assert small.max_held == 4


def test_an_engine_that_dies_when_added_to_had_nothing_in_it():
    dead = FakeEngine(100)
    dead.refuse_add(DEAD)
    lab = Lab(dead)
    lab.engine.add(asks(0, 1))
    assert lab.deaths[0].num_in_flight == 0
    assert answers(lab.finish()) == [0, 1]


def test_suspects_whose_engine_is_dead_before_they_get_in_stay_suspects():
    dead = FakeEngine(100)
    dead.refuse_add(DEAD)
    lab = Lab(FakeEngine(100).then(DEAD), dead)
    lab.engine.add(asks(0, 1, 2))
    assert answers(lab.finish()) == [0, 1, 2]
    assert [death.num_in_flight for death in lab.deaths] == [3, 0]
    assert ids(lab.built[2].added) == [0, 1, 2]


def test_suspects_go_in_only_when_the_new_engine_is_up():
    slow = FakeEngine(100, facts=None).then(finish_nothing, finish_nothing)
    lab = Lab(FakeEngine(100).then(DEAD), slow)
    lab.engine.add(asks(0))
    lab.steps(3)
    assert slow.added == []
    assert lab.engine.facts is not None
    slow.facts = lab.built[0].facts
    assert answers(lab.finish()) == [0]


def test_at_the_first_start_an_error_is_raised_at_once():
    lab = Lab(FakeEngine(100, facts=None).then(EngineError("no such model")))
    lab.engine.add(asks(0))
    with pytest.raises(EngineError, match="no such model"):
        lab.engine.step(0.1)
    assert len(lab.built) == 1
    lab = Lab(EngineError("no GPU"))
    for use in (lab.engine.start, lambda: lab.engine.add(asks(0))):
        lab._given = [EngineError("no GPU")]
        with pytest.raises(EngineError, match="no GPU"):
            use()
        assert not lab.engine.is_started
    lab.engine.close()


def test_a_rebuild_that_fails_is_tried_again_with_patience():
    in_steps = FakeEngine(100, facts=None).then(EngineError("memory is taken"))
    lab = Lab(FakeEngine(100).then(DEAD), EngineError("memory is taken"), in_steps)
    start_s = lab.clock()
    lab.engine.add(asks(0, 1))
    assert answers(lab.finish()) == [0, 1]
    assert lab.clock() - start_s == pytest.approx(sum(REBUILD_WAITS_S[:2]))
    assert in_steps.is_closed
    assert lab.engine.num_deaths == 1


def test_a_rebuild_that_keeps_failing_ends_the_run():
    lab = Lab(FakeEngine(100).then(DEAD), *[EngineError("memory is taken")] * 9)
    lab.engine.add(asks(0, 1))
    with pytest.raises(EngineDeadError, match=r"died 1 times, and 5 attempts .*memory is taken"):
        lab.steps(10_000)
    assert len(lab.specs) == 6


def test_patience_is_for_each_rebuild_anew():
    taken = EngineError("memory is taken")
    engines = [taken, taken, taken, FakeEngine(9).then(finish(0), DEAD)] * 3
    lab = Lab(FakeEngine(100).then(DEAD), *engines)
    lab.engine.add(asks(0, 1))
    lab.built[0].held.clear()
    assert answers(lab.finish()) == [0, 1]


def test_deaths_in_a_row_without_progress_end_the_run():
    lab = Lab(*[FakeEngine(10**6).then(DEAD) for _ in range(50)])
    lab.engine.add(asks(*range(10**5)))
    text = r"died \d+ times, with any of 4 rows alone.*: the engine died: boom; .*run again"
    with pytest.raises(EngineDeadError, match=text) as caught:
        lab.finish()
    assert len(lab.built) == lab.engine.num_deaths <= 20
    with pytest.raises(EngineDeadError) as again:
        lab.engine.step(0.1)
    assert again.value is caught.value
    with pytest.raises(EngineDeadError):
        lab.engine.add(asks(0))


def test_an_engine_that_answers_nothing_convicts_no_row():
    lab = Lab(*[FakeEngine(100).then(DEAD) for _ in range(50)])
    lab.engine.add(asks(*range(20)))
    done = []

    def step_on():
        while True:
            done.extend(lab.steps(1))

    with pytest.raises(EngineDeadError, match="with any of 4 rows alone"):
        step_on()
    assert done == []


def test_a_lone_row_that_kills_is_an_error_in_the_end():
    lab = Lab(*[FakeEngine(100).then(DEAD) for _ in range(3)])
    lab.engine.add(asks(5))
    (done,) = lab.finish()
    assert done.error.error_type == "engine_crash"
    assert done.error.error == (
        "the engine died 2 times with this row alone in it: the engine died: boom"
    )
    assert [death.blamed is not None for death in lab.deaths] == [False, False, True]
    assert lab.deaths[-1].blamed["request_id"] == 5


def test_the_tally_allows_deaths_in_proportion_to_progress():
    tally = Tally()
    for _ in range(10):
        tally.note_death()
        tally.note_completed(1)
    assert tally.problem() is None
    tally.note_death()
    assert tally.problem() == "too often for the 10 rows that it finished"
    tally.note_completed(90)
    assert tally.problem() is None
    for _ in range(MAX_IN_A_ROW + 1):
        tally.note_completed(10_000)
        tally.note_death()
        assert tally.problem() is None
    for _ in range(MAX_IN_A_ROW):
        tally.note_death()
    assert "without finishing a single row" in tally.problem()


def test_answers_for_unknown_ids_and_second_answers_are_dropped_and_counted():
    lab = Lab(FakeEngine(100).then(finish(0, 77), finish(0), finish(1, 1)))
    lab.engine.add(asks(0, 1, 2))
    assert answers(lab.finish()) == [0, 1, 2]
    assert lab.engine.warnings == ["3 answers that came twice, or unasked, were dropped"]


def lose(*request_ids):
    def act(engine):
        for request_id in request_ids:
            engine.held.pop(request_id, None)
        return finish_all(engine)

    return act


def test_a_lost_request_is_added_once_more_and_then_an_error():
    lab = Lab(inner := FakeEngine(100).then(lose(1, 2), finish_nothing, lose(2), finish_nothing))
    lab.engine.add(asks(0, 1, 2))
    done = lab.finish()
    assert answers(done) == [0, 1]
    assert errors(done) == {2: "engine_lost"}
    assert ids(inner.added) == [0, 1, 2, 1, 2]
    assert lab.engine.num_deaths == 0
    assert lab.engine.warnings == ["2 requests were lost by the engine and added again"]


class Miscounting(FakeEngine):
    """Counts second answers as returns, as `EngineProcess` does."""

    num_off = 0

    @property
    def num_in_flight(self):
        return len(self.held) - self.num_off


def twice(request_id):
    def act(engine):
        engine.num_off += 1
        return [engine.finish(request_id), completion(request_id)]

    return act


def test_a_second_answer_does_not_make_others_lost():
    lab = Lab(inner := Miscounting(100).then(twice(0), *[finish_nothing] * 5))
    inner.stats = EngineStats(num_running=1, num_waiting=0)
    lab.engine.add(asks(0, 1))
    assert answers(lab.finish()) == [0, 1]
    assert ids(inner.added) == [0, 1]


def test_one_answered_under_a_wrong_id_is_lost_when_the_engine_has_been_idle_for_long():
    def wrong(engine):
        engine.held.pop(1)
        return [engine.finish(0), completion(999)]

    lab = Lab(inner := FakeEngine(100).then(wrong, *[finish_nothing] * 3))
    inner.stats = EngineStats(num_running=0, num_waiting=0)
    lab.engine.add(asks(0, 1))
    lab.steps(3)
    assert ids(inner.added) == [0, 1]
    lab.clock.advance(2.5)
    lab.steps(1)
    assert ids(inner.added) == [0, 1, 1]
    assert answers(lab.finish()) == [1]


def test_no_completion_and_no_change_for_stall_s_is_a_death():
    lab = Lab(FakeEngine(100).then(*[finish_nothing] * 99), stall_s=60)
    lab.engine.add(asks(0))
    lab.steps(1)
    lab.clock.advance(59)
    lab.steps(1)
    assert lab.engine.num_deaths == 0
    lab.built[0].stats = EngineStats(num_steps=1)
    lab.steps(1)
    lab.clock.advance(59)
    lab.steps(1)
    assert lab.engine.num_deaths == 0
    lab.clock.advance(1)
    lab.built[0].stats = EngineStats(num_steps=1, gpu_busy=0.7)  # Another job's work on its GPU.
    lab.steps(1)
    assert lab.deaths[0].reason.startswith("the engine hangs: no row finished, nothing changed")
    assert lab.built[0].is_closed
    assert answers(lab.finish()) == [0]


def test_an_idle_engine_or_one_that_starts_does_not_stall():
    lab = Lab(FakeEngine(100, facts=None).then(*[finish_nothing] * 99), stall_s=60)
    lab.engine.add(asks(0))
    for _ in range(5):
        lab.clock.advance(100)
        lab.steps(1)
    lab.built[0].facts = EngineFacts("fake", "7", "none", None, 4, 0.0)
    lab.built[0]._acts.clear()
    lab.finish()
    lab.clock.advance(1000)
    lab.built[0].then(finish_nothing)
    lab.engine.add(asks(1))
    lab.finish()
    assert lab.engine.num_deaths == 0


@pytest.mark.parametrize(
    ("reason", "is_memory"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", True),
        ("what():  std::bad_alloc", True),
        ("its process was killed by SIGKILL, often the kernel out of memory", True),
        ("its process was killed by SIGSEGV", False),
        ("no sign of life for 900 s", False),
    ],
)
def test_out_of_memory_is_known_by_its_words(reason, is_memory):
    assert is_out_of_memory(reason) == is_memory


def test_after_out_of_memory_the_next_engine_runs_half():
    memory = EngineDeadError("the engine died: CUDA out of memory")
    facts = EngineFacts("fake", "7", "none", None, 64, 0.0)
    lab = Lab(FakeEngine(100, facts=facts).then(finish(0), memory), FakeEngine(50).then(DEAD))
    lab.engine.add(asks(0, 1))
    lab.finish()
    assert [spec.model_kwargs["max_num_seqs"] for spec in lab.specs] == [64, 32, 32]
    assert [spec.max_in_flight for spec in lab.specs] == [100, 50, 50]
    assert lab.engine.warnings == ["the engine ran out of memory: max_num_seqs = 32 from then on"]


def test_less_is_never_less_than_one():
    spec = EngineSpec("echo", "none", {"max_num_seqs": 1}, {}, max_in_flight=1)
    assert ask_less(spec, None) == spec
    facts = EngineFacts("fake", "7", "none", None, 9, 0.0)
    less = ask_less(EngineSpec("echo", "none", {}, {}), facts)
    assert (less.model_kwargs, less.max_in_flight) == ({"max_num_seqs": 4}, None)


def test_a_death_is_told_with_rows_and_the_engines_last_lines(tmp_path):
    log = tmp_path / "vllm.log"
    log.write_text("an older engine's line\n")
    told = []

    def speak(_):
        with log.open("a") as file:
            file.write("last words\n")
        return []

    def build(_):
        engine = FakeEngine(5000)
        return engine if told else engine.then(speak, DEAD)

    spec = EngineSpec("echo", "none", {}, {}, log_path=str(log))
    with closing(SupervisedEngine(build, lambda: spec, on_death=told.append)) as engine:
        engine.add(asks(*range(2000)))
        while engine.num_in_flight:
            engine.step(0.1)
    (death,) = told
    assert (death.number, death.reason, death.num_in_flight) == (1, str(DEAD), 2000)
    assert [row["request_id"] for row in death.in_flight] == list(range(1000))
    assert death.log_tail == ["last words"]
    record = death.as_dict()
    assert record["in_flight"][3] == {
        "request_id": 3,
        "ordinal": (0, 3),
        "request_key": f"{3:032x}",
    }
    assert record["blamed"] is None


def test_after_close_there_is_no_other_engine():
    lab = Lab()
    lab.engine.add(asks(0))
    lab.engine.close()
    lab.engine.close()
    assert lab.built[0].is_closed
    assert lab.engine.num_in_flight == 0
    assert lab.engine.facts == lab.built[0].facts
    for act in (lambda: lab.engine.step(0.1), lambda: lab.engine.add(asks(1))):
        with pytest.raises(EngineDeadError, match="the engine is closed"):
            act()
    assert len(lab.built) == 1


def test_settings_that_the_first_engine_refuses_end_it_and_of_a_later_one_are_tried_again():
    refusal = ConfigError("[model]", ["vLLM refuses the settings"])
    lab = Lab(FakeEngine(100, facts=None).then(refusal))
    lab.engine.add(asks(0))
    with pytest.raises(ConfigError):
        lab.engine.step(0.1)
    lab = Lab(FakeEngine(100).then(DEAD), FakeEngine(100, facts=None).then(refusal))
    lab.engine.add(asks(0, 1))
    assert answers(lab.finish()) == [0, 1]
    assert (len(lab.built), lab.engine.num_deaths) == (3, 1)
