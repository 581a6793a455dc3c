"""The faulty engine does what its table says: else the tests that use it would prove nothing."""

import pytest

from batchgen.core.errors import EngineDeadError
from batchgen.core.records import EngineSpec
from batchgen.engine.base import HostedRequest
from tests.faulty import BACKEND, FaultyEngine


def make(*faults, **options):
    kwargs = {"faults": list(faults), "max_num_seqs": 4, "in_process": True, **options}
    return FaultyEngine(EngineSpec(BACKEND, "none", kwargs, {"max_tokens": 32}))


def asks(*prompts):
    return [HostedRequest(number, prompt, None) for number, prompt in enumerate(prompts)]


def drain(engine, num_steps=20):
    return [done for _ in range(num_steps) for done in engine.step(0.01)]


@pytest.mark.parametrize("kind", ["die", "out_of_memory"])
def test_it_dies_when_the_request_is_admitted_and_stays_dead(kind):
    engine = make({"kind": kind, "at": 6})
    engine.add(asks(*"abcdefgh"))
    assert [done.request_id for done in engine.step(0.01)] == [0, 1, 2, 3]
    for act in (lambda: engine.step(0.01), lambda: engine.step(0), lambda: engine.add([])):
        with pytest.raises(EngineDeadError, match=f"{kind} at 6"):
            act()


def test_poison_kills_every_engine_that_admits_it():
    for _ in range(2):
        engine = make({"kind": "poison", "text": "boom"})
        engine.add(asks("fine", [{"role": "user", "content": "it goes boom"}]))
        with pytest.raises(EngineDeadError, match="poison at 'boom'"):
            engine.step(0.01)


def test_once_is_once_over_all_engines_of_a_file(tmp_path):
    once_file = str(tmp_path / "fired")
    table = [{"kind": "die", "at": 1}, {"kind": "die", "at": 2}]
    for kinds in ("die at 1", "die at 2"):
        engine = make(*table, once_file=once_file)
        engine.add(asks("a", "b"))
        with pytest.raises(EngineDeadError, match=kinds):
            engine.step(0.01)
    engine = make(*table, once_file=once_file)
    engine.add(asks("a", "b"))
    assert len(engine.step(0.01)) == 2


def test_a_hang_finishes_nothing_and_changes_nothing():
    engine = make({"kind": "hang", "at": 3}, max_num_seqs=1)
    engine.add(asks(*"abcd"))
    assert len(drain(engine, 3)) == 2
    before = engine.stats
    assert drain(engine, 5) == []
    assert engine.stats == before
    assert engine.num_in_flight == 2


def test_what_vanishes_is_forgotten():
    engine = make({"kind": "vanish", "at": 2})
    engine.add(asks(*"abc"))
    assert [done.request_id for done in drain(engine)] == [0, 2]
    assert engine.num_in_flight == 0


def test_a_duplicate_comes_twice_and_a_wrong_id_was_never_asked_for():
    engine = make({"kind": "duplicate", "at": 1}, {"kind": "wrong_id", "text": "b"})
    engine.add(asks(*"abc"))
    assert [done.request_id for done in drain(engine)] == [0, 0, 10**15 + 1, 2]


def test_a_refused_prompt_is_its_rows_error():
    engine = make({"kind": "refuse", "text": "b"})
    engine.add(asks(*"abc"))
    errors = {done.request_id: done.error for done in drain(engine)}
    assert errors[1].error_type == "bad_request"
    assert errors[0] is errors[2] is None
