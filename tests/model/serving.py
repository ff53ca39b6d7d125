"""What a node does with a command and with an append: runtime/mailbox.py, one step at a time."""

from __future__ import annotations

from collections.abc import Iterator

from routing.errors import Rejected, to_wire
from runtime.memory import AnsweredSessions
from runtime.rules import Admission, Standing
from tests.model import decisions
from tests.model.ownership import hear, name_of
from tests.model.state import Entry, Gate, Kind, Node, Scope, State
from tests.model.world import Step, Without, World, abandoned, answered, put, spend, tail_epoch

REFUSAL = to_wire(Rejected("not yet"))


def serving(world: World, state: State) -> Iterator[Step]:
    """Every step of a mailbox, and every append that lands."""
    scope = world.scope
    if scope.conditional and not state.asked:
        yield "client 2 sends", False, state._replace(asked=2 if state.told & 1 else 1)
    for index, node in enumerate(state.nodes):
        if not node.up:
            continue
        if node.append is not None:
            yield from _appending(world, state, index, node)
        elif node.serving >= 0:
            after = _serve(world, state, index, node.serving)
            if after is not None:
                yield f"{name_of(node)} goes on with {_command(world, node.serving)}", False, after
        elif node.gate is Gate.OPEN:
            for command, (session, _) in enumerate(scope.commands):
                again = bool(answered(state) >> command & 1)
                if not scope.duplicates and (again or any(other.serving == command for other in state.nodes)):
                    continue
                if scope.conditional and session == 2 and not state.asked:
                    continue
                after = _serve(world, state, index, command)
                if after is not None and after != state:
                    yield f"{_command(world, command)} reaches {name_of(node)}", again, after
    for entry, expected, awaited in state.appends:
        if expected == len(state.log):
            landed = state._replace(log=(*state.log, entry), appends=state.appends - {(entry, expected, awaited)})
            yield f"late {_entry(world, entry)} lands", False, landed
            if awaited and (answered_too := _answer(landed, entry)) != landed:
                yield f"late {_entry(world, entry)} lands and is answered", False, answered_too


def _serve(world: World, state: State, index: int, command: int) -> State | None:
    """One node at one command: make the actor current, then answer from memory or append what is decided."""
    node = state.nodes[index]
    current = make_current(world, state, index)
    if current is None:  # fenced: the map says who owns it now
        node = node._replace(serving=command, version=-1, unverified=False)
        return hear(world, put(state, index, node), index, state.revision)
    node = current
    if node.append is not None:
        return put(state, index, node._replace(serving=command))
    session, number = world.scope.commands[command]
    verdict = _admit(world, state, node, command)
    if verdict in (Admission.GAP, Admission.EXPIRED) and Without.READING_BEFORE_GAP not in world.without:
        again = make_current(world, put(state, index, node._replace(unverified=True)), index)
        if again is None:
            node = node._replace(serving=command, version=-1, unverified=False)
            return hear(world, put(state, index, node), index, state.revision)
        if again.append is not None:
            return put(state, index, again._replace(serving=command))
        node = again
        verdict = _admit(world, state, node, command)
    idle = node._replace(serving=-1)
    match verdict:
        case Admission.NEXT:
            return _decide(world, state, index, idle, command)
        case Admission.SEEN:
            reply = memory(state.log[node.forgotten : node.version], world.scope)[1].get((session, number))
            return put(state, index, idle) if reply is None else _answer(put(state, index, idle), reply)
        case Admission.EXPIRED:
            after = put(state, index, idle)
            return after._replace(expired=after.expired | (1 << command & ~answered(after)))
        case _:
            return put(state, index, idle)  # the sender goes back to the gap


def _decide(world: World, state: State, index: int, node: Node, command: int) -> State:
    kind = Kind.COMMAND
    session, _ = world.scope.commands[command]
    if world.scope.conditional and session == 2:
        known = state.log[: node.version]
        if not any(entry.kind is Kind.COMMAND and entry.subject == 0 for entry in known):
            kind = Kind.REJECTION
    entry = Entry(kind, command, node.epoch)
    if kind is Kind.REJECTION and Without.LOGGED_REJECTIONS in world.without:
        return _answer(put(state, index, node), entry)
    return put(state, index, node._replace(serving=command, append=(entry, node.version)))


def make_current(world: World, state: State, index: int) -> Node | None:
    """The node once its actor is at the end of the log and its own: perhaps it has to append a claim first.

    None when the log is fenced. As CatchUp.make_current, whose reads are of the leader.
    """
    node, log = state.nodes[index], state.log
    end = len(log)
    if node.version < 0 or node.unverified:
        standing = decisions.compare(max(node.version, 0), node.epoch, end, tail_epoch(log))
        if standing is Standing.FENCED:
            return None
        if node.version < 0 or standing is Standing.BEHIND:
            forgotten = end if Without.LOGGED_ANSWERS in world.without else 0
            node = node._replace(version=end, forgotten=forgotten)
        node = node._replace(unverified=False)
    if decisions.must_claim(tail_epoch(log[: node.version]), node.fence):
        node = node._replace(append=(Entry(Kind.CLAIM, node.id, node.epoch), node.version))
    return node


# -- appends -----------------------------------------------------------------------------------------------------------
def _appending(world: World, state: State, index: int, node: Node) -> Iterator[Step]:
    assert node.append is not None
    entry, expected = node.append
    what = _entry(world, entry)
    if expected == len(state.log):
        done = node._replace(append=None, version=expected + 1)
        if entry.kind is not Kind.CLAIM:
            done = done._replace(serving=-1)
        landed = put(state._replace(log=(*state.log, entry)), index, done)
        yield f"{name_of(node)} appends {what}", False, _answer(landed, entry)
    else:
        refused = _again(world, state, node)
        yield f"{name_of(node)}'s {what} is refused", False, put(state, index, refused)
        if refused.append is None and refused.serving >= 0:
            yield (
                f"{name_of(node)}'s {what} is refused, its time is over",
                True,
                put(state, index, refused._replace(serving=-1)),
            )
    if state.budget.timeouts:
        unanswered = abandoned(state, node, awaited=False)._replace(budget=spend(state.budget, "timeouts"))
        yield f"{name_of(node)}'s {what} times out", True, put(unanswered, index, _again(world, state, node))


def _again(world: World, state: State, node: Node) -> Node:
    """A refused or unanswered append: whatever is in memory is not to be trusted, the log decides what comes next."""
    assert node.append is not None
    if Without.EVALUATING_AGAIN in world.without:
        return node._replace(append=(node.append[0], len(state.log)))
    return node._replace(append=None, version=-1, unverified=False)


def _answer(state: State, entry: Entry) -> State:
    """The sender of a command hears how it was decided."""
    bit = 1 << entry.subject
    if entry.kind is Kind.COMMAND:
        return state._replace(told=state.told | bit)
    if entry.kind is Kind.REJECTION:
        if state.asked == 2 and not state.refused & bit:
            state = state._replace(wrong="rejected on a state older than what was acknowledged before it was sent")
        return state._replace(refused=state.refused | bit)
    return state


# -- what an actor remembers -------------------------------------------------------------------------------------------
@decisions.remembered
def memory(log: tuple[Entry, ...], scope: Scope) -> tuple[AnsweredSessions, dict[tuple[int, int], Entry]]:
    """The production memory of sessions after these entries, and the entry that decided each command."""
    sessions, decided = AnsweredSessions(scope.sessions), {}
    for entry in log:
        if entry.kind is not Kind.CLAIM:
            session, number = scope.commands[entry.subject]
            error = REFUSAL if entry.kind is Kind.REJECTION else None
            sessions.add(session_id(session), number, None, error)
            decided[session, number] = entry
    return sessions, decided


def session_id(session: int) -> str:
    return f"{session}-00000000"


def _admit(world: World, state: State, node: Node, command: int) -> Admission:
    session, number = world.scope.commands[command]
    sessions, _ = memory(state.log[node.forgotten : node.version], world.scope)
    return decisions.admit(number, sessions.last(session_id(session)), session, sessions.floor)


# -- names in traces ---------------------------------------------------------------------------------------------------
def _command(world: World, command: int) -> str:
    session, number = world.scope.commands[command]
    return f"command {session}.{number}"


def _entry(world: World, entry: Entry) -> str:
    if entry.kind is Kind.CLAIM:
        return f"claim at epoch {entry.epoch}"
    return ("rejection of " if entry.kind is Kind.REJECTION else "") + _command(world, entry.subject)
