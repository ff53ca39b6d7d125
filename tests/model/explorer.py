"""Explores every state that can be reached, breadth first, so that the first violation has a shortest trace.

Safety is checked in each state. Liveness: from *every* state one of rest is reachable without any further fault, which
is found backwards from the states of rest. A step that raises InvariantViolated is a violation as well.
"""

from __future__ import annotations

import gc
import sys
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from routing.errors import InvariantViolated
from tests.model.invariants import at_rest, broken_promise
from tests.model.state import State, first_state
from tests.model.transitions import steps
from tests.model.world import World

STATES_MOST = 4_000_000  # about 2 GB; a scope that needs more is too large to be run by anybody


@dataclass(frozen=True, slots=True, kw_only=True)
class Exploration:
    """What was found. `violation` is empty when nothing was; then every reachable state has been seen."""

    violation: str
    trace: tuple[str, ...]
    states: int
    steps: int
    elapsed_s: float


class Explorable(Protocol):
    """What can be explored: states that hash by value, and their steps (what, whether it needs a fault, the state)."""

    def first(self) -> Any: ...

    def steps(self, state: Any) -> Iterable[tuple[str, bool, Any]]: ...

    def broken(self, state: Any) -> str: ...

    def at_rest(self, state: Any) -> bool: ...


class _OneKey:
    """The large model: one actor in one unit."""

    def __init__(self, world: World) -> None:
        self._world = world

    def first(self) -> State:
        return first_state(self._world.scope)

    def steps(self, state: State) -> Iterable[tuple[str, bool, State]]:
        return steps(self._world, state)

    def broken(self, state: State) -> str:
        return broken_promise(self._world, state)

    def at_rest(self, state: State) -> bool:
        return at_rest(self._world, state)


def explore(world: World | Explorable, *, states_most: int = STATES_MOST) -> Exploration:
    """Explore a world to its end, or to the first violation."""
    collecting = gc.isenabled()
    gc.disable()  # nothing here is a cycle, and looking for some would take most of the time
    try:
        return _Explorer(_OneKey(world) if isinstance(world, World) else world, states_most).run()
    finally:
        if collecting:
            gc.enable()


class _Explorer:
    def __init__(self, world: Explorable, states_most: int) -> None:
        start = world.first()
        self._world, self._states_most = world, states_most
        self._numbers: dict[Any, int] = {start: 0}
        self._states: list[Any] = [start]
        self._parents, self._labels = array("i", [-1]), ["at first"]
        self._sources, self._targets = array("i"), array("i")  # of the steps that need no fault
        self._resting: list[int] = []
        self._steps = 0
        self._began_s = time.perf_counter()

    def run(self) -> Exploration:
        world, states = self._world, self._states
        number = 0
        while number < len(states):
            state = states[number]
            assert state is not None
            violation = world.broken(state)
            if not violation:
                try:
                    self._expand(number, state)
                except InvariantViolated as error:
                    violation = str(error)
            if violation:
                return self._found(violation, number)
            if len(states) > self._states_most:
                return self._found(f"more than {self._states_most:,} states: make the scope smaller", 0)
            states[number] = None
            number += 1
        stuck = self._stuck()
        return self._found("stuck: nothing but a fault leads on from here", stuck) if stuck >= 0 else self._found("", 0)

    def _expand(self, number: int, state: Any) -> None:
        numbers, states = self._numbers, self._states
        if self._world.at_rest(state):
            self._resting.append(number)
        for what, lucky, after in self._world.steps(state):
            self._steps += 1
            target = numbers.get(after)
            if target is None:
                target = numbers[after] = len(states)
                states.append(after)
                self._parents.append(number)
                self._labels.append(sys.intern(what))
            if not lucky and target != number:
                self._sources.append(number)
                self._targets.append(target)

    def _stuck(self) -> int:
        """The first state from which no state of rest can be reached without a fault; -1 when there is none."""
        count = len(self._states)
        first, following = array("i", [-1]) * count, array("i", [-1]) * len(self._sources)
        for edge, target in enumerate(self._targets):
            following[edge] = first[target]
            first[target] = edge
        recovers = bytearray(count)
        waiting = list(self._resting)
        for number in waiting:
            recovers[number] = 1
        while waiting:
            edge = first[waiting.pop()]
            while edge >= 0:
                source = self._sources[edge]
                if not recovers[source]:
                    recovers[source] = 1
                    waiting.append(source)
                edge = following[edge]
        return recovers.find(0)

    def _found(self, violation: str, number: int) -> Exploration:
        trace = []
        while number > 0:
            trace.append(self._labels[number])
            number = self._parents[number]
        return Exploration(
            violation=violation, trace=tuple(reversed(trace)), states=len(self._states), steps=self._steps,
            elapsed_s=time.perf_counter() - self._began_s,
        )  # fmt: skip
