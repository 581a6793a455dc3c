"""An engine that is not built before there is something to do."""

from __future__ import annotations

import pytest

from batchgen.core.errors import ConfigError
from batchgen.core.records import EngineSpec, EngineStats
from batchgen.engine.host import HostedRequest
from batchgen.engine.lazy import LazyEngine
from batchgen.engine.supervised import SupervisedEngine
from tests.fakes import FakeClock, FakeEngine

SPEC = EngineSpec("echo", "none", {}, {}, max_in_flight=100)


class Lab:
    """A lazy engine, and what it has built."""

    def __init__(self, capacity=8):
        self.built = []
        self.capacity = capacity
        self.engine = LazyEngine(self.build)

    def build(self):
        inner = FakeEngine(self.capacity)
        self.built.append(inner)
        return SupervisedEngine(lambda _: inner, SPEC, clock=FakeClock())


def ask(request_id):
    return HostedRequest(request_id, f"row {request_id}", None)


def test_looking_at_it_starts_nothing():
    lab = Lab()
    engine = lab.engine
    assert (engine.facts, engine.num_in_flight, engine.warnings) == (None, 0, [])
    assert engine.stats == EngineStats()
    assert engine.step(0.1) == []
    assert engine.capacity >= 1  # Or nobody would ever hand it a request.
    assert not engine.is_started
    engine.close()
    assert lab.built == []


def test_the_first_request_starts_it_and_is_answered():
    lab = Lab()
    lab.engine.add([ask(0), ask(1)])
    assert lab.engine.is_started
    assert lab.engine.num_in_flight == 2
    assert [done.request_id for done in lab.engine.step(0.1)] == [0, 1]
    assert lab.engine.num_in_flight == 0
    assert len(lab.built) == 1


def test_once_started_it_is_the_engine_inside():
    lab = Lab()
    inside = lab.engine.start()
    assert lab.engine.start() is inside
    assert len(lab.built) == 1
    assert (lab.engine.capacity, lab.engine.facts) == (8, inside.facts)
    assert lab.engine.facts is not None
    lab.engine.add([ask(0)])
    assert lab.engine.num_in_flight == inside.num_in_flight == 1
    assert lab.engine.warnings == inside.warnings
    assert lab.engine.stats == inside.stats


def test_closing_closes_the_engine_inside():
    lab = Lab()
    lab.engine.start()
    lab.engine.close()
    lab.engine.close()
    assert [inner.is_closed for inner in lab.built] == [True]


def test_an_engine_that_cannot_be_built_says_so_where_it_is_started():
    problem = ConfigError("model.engine", ["no such option"])

    def build():
        raise problem

    for use in (lambda engine: engine.start(), lambda engine: engine.add([ask(0)])):
        engine = LazyEngine(build)
        with pytest.raises(ConfigError, match="no such option"):
            use(engine)
        assert not engine.is_started
        engine.close()
