"""`EngineGroup`: several supervised engines as one, so that a GPU need not wait for one's Python.

With a small model a step takes the GPU less time than it takes the engine's own Python to prepare
it; two engines work in turns. The group is used as a `SupervisedEngine` is, and keeps no books of
requests: each of them is in exactly one member, whose own supervision says that it comes back
once. So a death costs the others nothing, and a row that kills engines is looked for in the one
that has it.

- Requests go to whoever has the most room. One that is being replaced or searched gets no new
  ones, one that is not up yet only a share, lest they wait there while another has none.
- All are waited for at once: members ring a bell when they have something to tell.
- One that does not start, or dies too often, is done without, and its requests go to the others.
  When none has started there will be one engine, with all of the memory.
"""

from __future__ import annotations

import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import EngineDeadError, EngineError
from batchgen.core.records import EngineFacts, EngineSpec, EngineStats, Request, WorkLeft
from batchgen.engine.supervised import STALL_S, SupervisedEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from batchgen.engine.base import Engine
    from batchgen.engine.death import EngineDeath
    from batchgen.engine.supervised import Answered

    BuildMember = Callable[[EngineSpec, Callable[[], None]], Engine]

RUN_ROWS = 32
"""Requests that follow each other stay together: they may share a prefix. No more of them, since
all long ones may be at one end."""
LOADING_SHARE = 3
"""A member that is not up yet gets a third of what it holds later: what it runs at once, if it
holds twice that and half as much again."""

_COMBINED_BY: Mapping[str, Callable[[list[Any]], Any]] = {
    "kv_cache_usage": statistics.fmean,
    "gpu_busy": statistics.fmean,
    "max_num_batched_tokens": max,
}


@dataclass(eq=False)
class EngineGroup:
    """One owner thread; others may look at its properties."""

    build: BuildMember
    """Builds a member's engine; returns at once. The engine calls its argument, from any thread,
    when `step` may have something new."""
    make_specs: Callable[[], Sequence[EngineSpec]]
    """Of the members, asked when they are built. One that has all of the devices is made by
    `replace(spec, num_sharing=1)`."""
    _: KW_ONLY
    is_enough: Callable[[WorkLeft], bool] | None = None
    """Whether there is so much to do that all should start. Until it is known how much that is, one
    does. None: all start at once."""
    on_death: Callable[[EngineDeath, str], None] = lambda death, whose: None
    """Told of every death, and of which member."""
    stall_s: float = STALL_S
    """How long an engine with work may show no progress."""

    def __post_init__(self) -> None:
        self._work: WorkLeft | None = None
        self._num_started = 0
        self._bell = threading.Event()
        self._specs: Sequence[EngineSpec] = ()
        self._members: list[SupervisedEngine] = []
        self._notes: list[str] = []
        self._error: EngineError | None = None

    @property
    def is_started(self) -> bool:
        """Whether anything was ever to do."""
        return bool(self._specs)

    @property
    def num_members(self) -> int:
        """Engines that work at once, up or not; at least 1."""
        return len(self._members) or 1

    @property
    def facts(self) -> EngineFacts | None:
        """What the first engine that is up is, and how many there are; None until one is up."""
        found = next((one.facts for one in self._members if one.facts is not None), None)
        if found is None or self.num_members == 1:
            return found
        return replace(found, settings={**found.settings, "engines_per_gpu": self.num_members})

    @property
    def capacity(self) -> int:
        """How many requests all want to hold."""
        return sum(map(_capacity, self._members)) or 1

    @property
    def num_in_flight(self) -> int:
        """Requests added and not yet returned, wherever they are."""
        return sum([one.num_in_flight for one in self._members])

    @property
    def stats(self) -> EngineStats:
        """The latest look at all schedulers."""
        return combined(one.stats for one in self._members)

    @property
    def warnings(self) -> list[str]:
        """What a person should know though the run went on, a line each; not the deaths."""
        numbered = enumerate(self._members, 1)
        told = [f"engine {number}: {text}" for number, one in numbered for text in one.warnings]
        return self._notes + told

    def start(self) -> None:
        """Build the engines, without waiting until they are up. Idempotent.

        Raises:
            ConfigError, EngineError, EngineDeadError: See `SupervisedEngine.start`.
        """
        if not self._specs:
            if self._error is not None:
                raise self._error
            self._specs = self.make_specs()
            if self._is_too_little():
                self._specs = [replace(self._specs[0], num_sharing=1)]
            self._start_next()
            self._start_others()

    def expect(self, work: WorkLeft) -> None:
        """Hear what is left to do: whether that is enough for all engines.

        Raises:
            ConfigError, EngineError: See `SupervisedEngine.start`.
        """
        self._work = work
        if self._is_too_little():
            self._specs = self._specs[: self._num_started]
        self._start_others()

    def _is_too_little(self) -> bool:
        """Whether it is known that there is too little to do for all engines."""
        enough, work = self.is_enough, self._work
        return enough is not None and work is not None and not enough(work)

    def _start_others(self) -> None:
        """Build the other engines, unless it has to be known first how much there is to do."""
        if self._work is not None or self.is_enough is None:
            while 0 < self._num_started < len(self._specs):
                self._start_next()
        if self._work is not None and (num := len(self._specs)):
            for one in self._members:
                one.expect(self._work.share(num)._replace(has_gpu_alone=num == 1))

    def _start_next(self) -> None:
        spec = self._specs[self._num_started]
        self._num_started += 1
        whose = f" of engine {self._num_started}" if spec.num_sharing > 1 else ""
        member = SupervisedEngine(
            lambda spec: self.build(spec, self._bell.set),
            lambda: spec,
            on_death=lambda death: self.on_death(death, whose),
            stall_s=self.stall_s,
        )
        self._members.append(member)
        member.start()

    def add(self, requests: Sequence[Request]) -> None:
        """Deal requests out.

        Raises:
            ConfigError, EngineError, EngineDeadError: See `SupervisedEngine.add`.
        """
        self.start()
        rooms = [_capacity(one) - one.num_in_flight for one in self._members]
        shares: list[list[Request]] = [[] for _ in rooms]
        for start in range(0, len(requests), RUN_ROWS):
            dealt = requests[start : start + RUN_ROWS]
            emptiest = rooms.index(max(rooms))
            shares[emptiest] += dealt
            rooms[emptiest] -= len(dealt)
        for one, share in zip(self._members, shares, strict=True):
            if share:
                one.add(share)

    def step(self, timeout_s: float) -> list[Answered]:
        """Return what finished anywhere; wait up to `timeout_s` if that is nothing.

        Raises:
            ConfigError: See `SupervisedEngine.step`; of any member.
            EngineError, EngineDeadError: The same, of the last one.
        """
        if self._error is not None:
            raise self._error
        self._bell.clear()
        answered = self._take()
        if not answered and self._error is None:
            self._bell.wait(timeout_s)
            answered = self._take()
        if not answered and self._error is not None:
            raise self._error
        return answered

    def _take(self) -> list[Answered]:
        answered: list[Answered] = []
        for one in list(self._members):
            try:
                answered += one.step(0)
            except EngineError as error:
                self._do_without(one, error)
        return answered

    def _do_without(self, member: SupervisedEngine, error: EngineError) -> None:
        """Give the requests of a member that is at its end to the others, or to a last one."""
        was_up = member.facts is not None or member.num_deaths > 0
        if len(self._members) == 1 and (was_up or len(self._specs) == 1):
            self._error = error
            return
        self._members.remove(member)
        left = member.give_up()
        rest = f"{len(self._members)} of {len(self._specs)} engines go on"
        if not self._members:
            rest = "one engine with all of the memory is started instead"
            self._specs, self._num_started = [replace(self._specs[0], num_sharing=1)], 0
            self._start_next()
            self._start_others()  # It hears of the work, too.
        self._notes.append(f"an engine that shared the GPU was given up, {rest}: {error}")
        if left:
            self.add(left)

    def close(self) -> None:
        """Close all engines, at once, and drop everything. Idempotent."""
        self._error = self._error or EngineDeadError("the engine is closed")
        if self._members:
            with ThreadPoolExecutor(len(self._members)) as pool:
                list(pool.map(SupervisedEngine.close, self._members))


Supervised = SupervisedEngine | EngineGroup
"""What a run sees of its engine."""


def supervise(
    build: Callable[..., Engine],
    specs: Sequence[Callable[[], EngineSpec]],
    *,
    on_death: Callable[[EngineDeath, str], None],
    stall_s: float,
    is_enough: Callable[[WorkLeft], bool] | None = None,
) -> Supervised:
    """Make what a run sees of its engine, or of several that share a GPU; nothing is started.

    Args:
        build: Builds each; one of several gets what `EngineGroup` says, too.
        specs: One an engine, asked when it is built.
        on_death: Told of every death, and of whose it was; nothing where there is one engine.
        stall_s: How long an engine with work may show no progress.
        is_enough: See `EngineGroup`; None: all start at once.
    """
    if len(specs) == 1:
        return SupervisedEngine(
            build, specs[0], on_death=lambda death: on_death(death, ""), stall_s=stall_s
        )
    num = len(specs)

    def make_specs() -> Sequence[EngineSpec]:
        return [replace(make(), num_sharing=num) for make in specs]

    return EngineGroup(build, make_specs, is_enough=is_enough, on_death=on_death, stall_s=stall_s)


def _capacity(member: SupervisedEngine) -> int:
    """What a member wants to hold; nothing new while it is replaced or searched."""
    if not member.is_admitting:
        return member.num_in_flight
    return member.capacity if member.facts is not None else -(-member.capacity // LOADING_SHARE)


def combined(engines: Iterable[EngineStats]) -> EngineStats:
    """Sum up many engines; `kv_cache_usage` and `gpu_busy` are means, a step's tokens the most."""
    every = list(engines)

    def of_all(name: str) -> Any:  # noqa: ANN401 - as the field is
        known = [found for one in every if (found := getattr(one, name)) is not None]
        return _COMBINED_BY.get(name, sum)(known) if known else None

    return EngineStats(**{field.name: of_all(field.name) for field in fields(EngineStats)})
