"""What every step of the model works with: the scope, the rules switched off, and small changes of a state."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tests.model import decisions
from tests.model.state import Budget, Entry, Fate, Gate, Node, Scope, State


class Without(StrEnum):
    """A rule that lives in effectful code, switched off. Named is the production code that embodies it."""

    LOGGED_ANSWERS = "T3"  # LiveActor.restore: what was decided before comes from the log's records, not from memory
    EVALUATING_AGAIN = "T4"  # Mailboxes._serve: a refused or unanswered append makes the actor dirty, then `_decide`
    COMMIT_IN_THE_MAP = "T5"  # Handover._write_commit: COMMIT is a compare-and-set, before anything is given away
    LOOKING_AT_THE_MAP = "T6"  # Host._on_map: a paused source acts on what it hears of the map, told or not
    SETTLING_THE_PREVIOUS = "T8"  # StepContext.lock: `await self.settle(previous.move)`
    FORGETTING = "T14"  # Host._drop and _begin_anew: of a unit that may come back, no actor is kept
    CONCLUDING_ANEW = "S4"  # StepContext.settle: a record launched meanwhile is settled anew, not ended as concluded
    LOGGED_REJECTIONS = "T11"  # LiveActor.evaluate: a refusal is a record of Kind.REJECTION
    PAUSE_UNTIL_THE_MAP = "T13"  # Host.tick: an overdue pause writes ABORT; only `judge` opens the gate
    READING_BEFORE_GAP = "T15"  # Mailboxes._known_in_session: `look_again` before GAP or EXPIRED is answered


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    scope: Scope
    without: frozenset[Without] = frozenset()


Step = tuple[str, bool, State]  # what happened; whether it takes a fault, or luck, to happen; the state after it


def put(state: State, index: int, node: Node) -> State:
    nodes = state.nodes
    return state._replace(nodes=(*nodes[:index], node, *nodes[index + 1 :]))


def tail_epoch(log: tuple[Entry, ...]) -> int:
    return log[-1].epoch if log else 0


def write(state: State, value: int) -> State:
    """The map's key takes a new value."""
    before, after = decisions.facts(state.values[-1]), decisions.facts(value)
    fates = state.fates
    if after.move and after.move != before.move:
        fates = _with(fates, after.move, Fate.LOCKED)
    if after.last != before.last:
        fates = _with(fates, after.last, Fate.COMMITTED if after.committed else Fate.ABORTED)
    return state._replace(values=(*state.values, value), fates=fates)


def _with(fates: tuple[Fate, ...], move: int, fate: Fate) -> tuple[Fate, ...]:
    return (*fates[: move - 1], fate, *fates[move:])


def spend(budget: Budget, what: str) -> Budget:
    return budget._replace(**{what: getattr(budget, what) - 1})


def abandoned(state: State, node: Node, *, awaited: bool) -> State:
    """The node has no more use for its append, which may land all the same; perhaps its mailbox still answers then."""
    if node.append is None:
        return state
    return state._replace(appends=state.appends | {(*node.append, awaited)})


def closed(node: Node, *, fence: int = 0) -> Node:
    """The node without its unit: only what it has staged and heard is left."""
    return Node(id=node.id, up=True, life=node.life, view=node.view, staged=node.staged, fence=fence)


def tidy(world: World, state: State) -> State:
    """Drop what can have no effect any more, so that equal futures are equal states."""
    revision = state.revision
    end = len(state.log)
    if state.appends and any(expected < end for _, expected, _ in state.appends):
        state = state._replace(appends=frozenset(late for late in state.appends if late[1] >= end))
    if state.writes and any(replaced < revision for replaced, _ in state.writes):
        state = state._replace(writes=frozenset(late for late in state.writes if late[0] >= revision))
    if len(state.values) > 1 and not world.scope.budget.stale_reads:
        seen = min((node.view for node in state.nodes if node.up), default=revision)
        if seen > state.oldest:
            state = state._replace(oldest=seen, values=state.values[seen - state.oldest :])
    if state.messages and Without.COMMIT_IN_THE_MAP not in world.without:
        locked = {decisions.facts(value).move for value in state.values}
        if any(message[1] not in locked for message in state.messages):
            state = state._replace(messages=frozenset(m for m in state.messages if m[1] in locked))
    return state


def answered(state: State) -> int:
    """The commands whose senders wait no more, a bit each."""
    return state.told | state.refused | state.expired


def held_epoch(node: Node) -> int | None:
    return None if node.gate is Gate.CLOSED else node.epoch
