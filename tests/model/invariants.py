"""What must hold in every state, and what a state looks like in which everything has come to rest."""

from __future__ import annotations

from tests.model import decisions
from tests.model.state import Fate, Gate, Kind, Node, State, Status
from tests.model.world import World, answered, tail_epoch


def broken_promise(world: World, state: State) -> str:
    """The promise that this state breaks, in words; empty when it breaks none."""
    return (
        state.wrong
        or _of_the_log(state.log, world.scope.commands)
        or _of_the_senders(state)
        or _of_the_activations(world, state)
        or _of_the_records(state)
    )


@decisions.remembered
def _of_the_log(log: tuple[tuple[Kind, int, int], ...], commands: tuple[tuple[int, int], ...]) -> str:
    latest: dict[int, int] = {}
    decided: set[int] = set()
    claimed = epoch = 0
    for kind, subject, at in log:
        if at < epoch:
            return "the epochs of the log fall: a former owner appended after its successor"
        epoch = at
        if kind is Kind.CLAIM:
            if at <= claimed:
                return "two claims at one epoch"
            claimed = at
            continue
        session, number = commands[subject]
        if subject in decided:
            return "a command is decided twice"
        if number != latest.get(session, 0) + 1:
            return "commands of a session are out of order"
        decided.add(subject)
        latest[session] = number
    return ""


@decisions.remembered
def _decided(log: tuple[tuple[Kind, int, int], ...]) -> tuple[int, int]:
    """Bits of the commands that were applied, and of those that were rejected."""
    applied = rejected = 0
    for kind, subject, _ in log:
        if kind is Kind.COMMAND:
            applied |= 1 << subject
        elif kind is Kind.REJECTION:
            rejected |= 1 << subject
    return applied, rejected


def _of_the_senders(state: State) -> str:
    applied, _ = _decided(state.log)
    if state.told & ~applied:
        return "an acknowledged command is not in the log"
    if state.refused & applied:
        return "a command is applied although its sender was told 'no'"
    if state.told & state.refused:
        return "a sender was told both"
    return ""


def _of_the_activations(world: World, state: State) -> str:
    end, value = len(state.log), decisions.facts(state.values[-1])
    able = 0
    for node in state.nodes:
        if not node.up or node.version < 0:
            continue
        able += node.version == end and _may_append(state, node)
        named = (value.owner, value.life, value.epoch) == (node.id, node.life, node.epoch)
        if world.scope.queries and named and node.gate is Gate.OPEN and _may_append(state, node):
            known, _ = _decided(state.log[: node.version])
            if state.told & ~known:
                return "the owner answers queries from a state older than what was acknowledged"
    return "two activations can append" if able > 1 else ""


def _may_append(state: State, node: Node) -> bool:
    return (node.gate is Gate.OPEN or node.serving >= 0) and not node.unverified and not _owes_claim(state, node)


def _owes_claim(state: State, node: Node) -> bool:
    return decisions.must_claim(tail_epoch(state.log[: node.version]), node.fence)


def _of_the_records(state: State) -> str:
    for record, fate in zip(state.records, state.fates, strict=True):
        if record.status is Status.COMPLETED and fate is not Fate.COMMITTED:
            return f"a record says completed, the map says {fate.name.lower()}"
        if record.status is Status.ABORTED and fate in (Fate.LOCKED, Fate.COMMITTED):
            return f"a record has ended without a move, the map says {fate.name.lower()}"
    return ""


def at_rest(world: World, state: State) -> bool:
    """Served by the owner that the map names, every sender answered, every record ended, no pause and no lock left."""
    value = decisions.facts(state.values[-1])
    owner = state.nodes[value.owner]
    return (
        not value.move
        and owner.up
        and (owner.life, owner.epoch, owner.gate) == (value.life, value.epoch, Gate.OPEN)
        and not any(node.gate is Gate.PAUSED for node in state.nodes)
        and answered(state) == (1 << len(world.scope.commands)) - 1
        and not (state.drivers and any(record.status in (Status.PLANNED, Status.LAUNCHED) for record in state.records))
    )
