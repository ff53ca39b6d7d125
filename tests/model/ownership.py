"""What a node does when it hears of the map, and how the unit changes hands: runtime/host.py, one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from runtime.rules import Verdict
from tests.model import decisions
from tests.model.state import Gate, Node, State
from tests.model.world import Step, Without, World, abandoned, closed, held_epoch, put, spend, write


def ownership(world: World, state: State) -> Iterator[Step]:
    """Every step by which a node hears of the map or takes the unit, dies or comes back."""
    revision, value, budget = state.revision, state.values[-1], state.budget
    owner = decisions.facts(value).owner
    for index, node in enumerate(state.nodes):
        name, latest = name_of(node), index < world.scope.nodes
        if not node.up:
            back = Node(id=index, up=True, life=node.life + 1, view=revision)
            yield f"{name} restarts", False, put(state, index, back)
            continue
        if node.view < revision and not (node.gate is Gate.PAUSED and Without.LOOKING_AT_THE_MAP in world.without):
            yield f"{name} hears the map", False, hear(world, state, index, revision)
            if node.view + 1 < revision:
                yield f"{name} hears revision {node.view + 1}", False, hear(world, state, index, node.view + 1)
        if node.view == revision and node.gate is Gate.CLOSED:
            yield from _taking_over(world, state, index, node)
        if not latest:
            continue
        if index != owner and (budget.failovers or not state.nodes[owner].up):
            given = decisions.failover(value, index)
            if given is not None:
                dead = not state.nodes[owner].up
                paid = state if dead else state._replace(budget=spend(budget, "failovers"))
                yield f"the unit fails over to {name}", not dead, write(paid, given)
        if budget.crashes:
            gone = Node(id=index, up=False, life=node.life, view=0)
            yield (
                f"{name} is killed",
                True,
                put(abandoned(state, node, awaited=False), index, gone)._replace(budget=spend(budget, "crashes")),
            )
        if budget.stops:
            heir = put(state, index, Node(id=index, up=True, life=node.life + 1, view=revision))
            yield (
                f"{name} is stopped, and a successor starts",
                True,
                heir._replace(nodes=(*heir.nodes, node), budget=spend(budget, "stops")),
            )
    for replaced, late in state.writes:
        if replaced == revision:
            yield "a late write of the map lands", False, write(state, late)


def _taking_over(world: World, state: State, index: int, node: Node) -> Iterator[Step]:
    """Host._opening: write BIND or BOOT for the newest value there is, and open on it."""
    value = state.values[-1]
    verdict = _judge(value, node)
    if verdict is Verdict.OPEN:  # a life that has only read the map at its start
        yield f"{name_of(node)} opens", False, hear(world, state, index, state.revision)
        return
    if verdict not in (Verdict.BIND, Verdict.BOOT):
        return
    taking = decisions.bind if verdict is Verdict.BIND else decisions.boot
    taken = taking(value, node.id, node.life)
    if taken is None:
        return
    if index >= world.scope.nodes:  # its lease is its successor's: it writes only if it was stopped after looking
        if not state.budget.timeouts:
            return
        state = state._replace(budget=spend(state.budget, "timeouts"))
    after = write(state, taken)
    opened = hear(world, after, index, after.revision)
    yield f"{name_of(node)} writes {verdict.name}", index >= world.scope.nodes, opened
    if state.budget.timeouts:
        late = state._replace(writes=state.writes | {(state.revision, taken)}, budget=spend(state.budget, "timeouts"))
        yield f"{name_of(node)}'s {verdict.name} times out", True, late


def _judge(value: int, node: Node) -> Verdict:
    return decisions.judge(value, node.id, node.life, held_epoch(node), node.paused_for)


def hear(world: World, state: State, index: int, revision: int) -> State:
    """The node adopts a value of the map and acts on it: Host._on_map."""
    node, value = state.nodes[index], state.values[revision - state.oldest]
    view = decisions.facts(value)
    verdict = _judge(value, node)
    node = node._replace(view=revision)
    if node.staged is not None and node.staged[0] != (view.move or (view.last if view.owner == node.id else 0)):
        node = node._replace(staged=None)
    match verdict:
        case Verdict.NOT_MINE:
            return put(abandoned(state, node, awaited=True), index, _dropped(world, node, fence=0))
        case Verdict.BIND | Verdict.BOOT:
            if node.gate is Gate.CLOSED:
                return put(state, index, node)
            return put(abandoned(state, node, awaited=True), index, _dropped(world, node, fence=view.epoch))
        case Verdict.OPEN:
            return put(state, index, _opened(node, view))
        case Verdict.KEEP:
            return put(state, index, node)
        case Verdict.RESUME:
            return put(state, index, node._replace(gate=Gate.OPEN, epoch=view.epoch, paused_for=0, captured=False))
        case Verdict.RELOAD:
            return put(abandoned(state, node, awaited=True), index, _opened(closed(node, fence=view.epoch), view))
        case _:
            assert_never(verdict)


def _dropped(world: World, node: Node, *, fence: int) -> Node:
    if Without.FORGETTING in world.without:
        return closed(node)._replace(version=node.version)
    return closed(node, fence=fence)


def _opened(node: Node, view: decisions.Facts) -> Node:
    """Host._open: what was staged by the move that brought the unit is taken over, to be verified at its first use."""
    node = node._replace(gate=Gate.OPEN, epoch=view.epoch, fence=max(node.fence, view.fence))
    if node.staged is not None and node.staged[0] == view.last:
        if node.version < 0 <= node.staged[1]:
            node = node._replace(version=node.staged[1], unverified=True)
        node = node._replace(staged=None)
    return node


def name_of(node: Node) -> str:
    """`a`, and `a-2` once it has been started anew."""
    return decisions.NODES[node.id] if node.life == 1 else decisions.incarnation(node.id, node.life)
