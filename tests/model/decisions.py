"""The production rules as the model asks them: pure functions of the project, called through their modules.

Nothing is decided here. A value of the map is a number (the model compares and hashes numbers, not dataclasses), a node
is an index, a move counts from 1; every function turns them into what production passes, asks production, and
remembers the answer, which a pure function allows. `replaced` swaps a production function for a mutant of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from routing import shard_map
from routing.errors import NotApplicable
from routing.shard_map import Outcome, Ownership
from runtime import rules
from workflows import settlement

NODES = ("a", "b", "c")
MOVES = ("", "m1", "m2", "m3", "m4")

F = TypeVar("F", bound=Callable[..., Any])

_answers: list[Any] = []  # the caches, to be emptied when a rule is replaced
_values: list[Ownership] = []
_facts: list[Facts] = []
_numbers: dict[Ownership, int] = {}


class Facts(NamedTuple):
    """A value of the map in the model's numbers. `life` is 0 while nobody is bound; no move is 0, no node is -1."""

    owner: int
    life: int
    epoch: int
    move: int
    destination: int
    last: int
    committed: bool  # how `last` ended
    fence: int


def remembered(function: F) -> F:
    """Remember a pure function's answers until a rule is replaced."""
    caching = functools.cache(function)
    _answers.append(caching)
    return caching  # type: ignore[return-value]


@contextmanager
def replaced(mutants: Sequence[tuple[ModuleType, str, Callable[..., Any]]]) -> Iterator[None]:
    """Put mutants in the place of production functions, for the model alone, while the context lasts."""
    originals = [(module, name, getattr(module, name)) for module, name, _ in mutants]
    try:
        for module, name, mutant in mutants:
            setattr(module, name, mutant)
        _forget()
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)
        _forget()


def _forget() -> None:
    for caching in _answers:
        caching.cache_clear()


# -- values of the map -------------------------------------------------------------------------------------------------
def number_of(value: Ownership) -> int:
    number = _numbers.get(value)
    if number is None:
        number = _numbers[value] = len(_values)
        _values.append(value)
        _facts.append(_facts_of(value))
    return number


def facts(view: int) -> Facts:
    return _facts[view]


def _facts_of(value: Ownership) -> Facts:
    last = value.last
    return Facts(
        owner=NODES.index(value.owner),
        life=int(value.incarnation.partition("-")[2]) if value.incarnation else 0,
        epoch=value.epoch,
        move=MOVES.index(value.move or ""),
        destination=NODES.index(value.destination) if value.destination else -1,
        last=MOVES.index(last.move) if last else 0,
        committed=last is not None and last.outcome is Outcome.COMMITTED,
        fence=value.fence,
    )


def incarnation(node: int, life: int) -> str:
    return f"{NODES[node]}-{life}"


def _written(view: int, change: Callable[[Ownership], Ownership]) -> int | None:
    """The number of the value that a transition writes, None where it does not apply. Raises InvariantViolated."""
    before = _values[view]
    try:
        after = change(before)
    except NotApplicable:
        return None
    shard_map.check(before, after)
    return number_of(after)


def first_owner(node: int) -> int:
    """The map at the start: one node has been assigned the unit and has bound itself."""
    assigned = shard_map.assign(NODES[node])
    return number_of(shard_map.bind(assigned, node=NODES[node], incarnation=incarnation(node, 1)))


@remembered
def lock(view: int, move: int, destination: int) -> int | None:
    return _written(view, lambda v: shard_map.lock(v, move=MOVES[move], destination=NODES[destination]))


@remembered
def commit(view: int, move: int, node: int, life: int, destination: int, heir: int) -> int | None:
    """`heir` is the life of the destination that has acknowledged the move."""
    source, bound = incarnation(node, life), incarnation(destination, heir)
    return _written(view, lambda v: shard_map.commit(v, move=MOVES[move], incarnation=source, heir=bound))


@remembered
def abort(view: int, move: int) -> int | None:
    return _written(view, lambda v: shard_map.abort(v, move=MOVES[move]))


@remembered
def boot(view: int, node: int, life: int) -> int | None:
    return _written(view, lambda v: shard_map.boot(v, node=NODES[node], incarnation=incarnation(node, life)))


@remembered
def bind(view: int, node: int, life: int) -> int | None:
    return _written(view, lambda v: shard_map.bind(v, node=NODES[node], incarnation=incarnation(node, life)))


@remembered
def failover(view: int, to: int) -> int | None:
    return _written(view, lambda v: shard_map.failover(v, to=NODES[to]))


# -- verdicts ----------------------------------------------------------------------------------------------------------
@remembered
def judge(view: int, node: int, life: int, epoch: int | None, paused_for: int) -> rules.Verdict:
    """`epoch` None: the node does not hold the unit."""
    held = None if epoch is None else rules.Held(epoch, MOVES[paused_for] or None)
    return rules.judge(_values[view], node=NODES[node], incarnation=incarnation(node, life), held=held)


@remembered
def compare(version: int, epoch: int, tail_version: int, tail_epoch: int) -> rules.Standing:
    return rules.compare(held_version=version, held_epoch=epoch, tail_version=tail_version, tail_epoch=tail_epoch)


@remembered
def applies(view: int, move: int, epoch: int, node: int, life: int) -> bool:
    return rules.applies(
        _values[view], move=MOVES[move], epoch=epoch, node=NODES[node], incarnation=incarnation(node, life)
    )


@remembered
def must_claim(tail_epoch: int, fence: int) -> bool:
    return rules.must_claim(tail_epoch=tail_epoch, fence=fence)


@remembered
def overdue(paused_for: int, locked_for: int) -> int:
    """The move that the source ends by itself once any lease has run out; 0 for none."""
    move = rules.overdue(
        now_s=3.0, lease_s=1.0,
        paused=(MOVES[paused_for], 2.0) if paused_for else None,
        locked=(MOVES[locked_for], 1.0) if locked_for else None,
    )  # fmt: skip
    return MOVES.index(move or "")


@remembered
def admit(number: int, last: int | None, opened: int, floor: int) -> rules.Admission:
    return rules.admit(number, last=last, opened=opened, floor=floor)


@remembered
def settle(view: int, revision: int, move: int, lock_revision: int | None) -> settlement.Settlement:
    return settlement.settlement(_values[view], revision, move=MOVES[move], lock_revision=lock_revision)
