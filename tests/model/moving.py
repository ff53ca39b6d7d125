"""How a move goes on and ends: the worker, the source, the destination, and whoever settles it.

As workflows/migration.py, workflows/context.py and runtime/handover.py. Any verb of a move may reach its node at any
time once it can have been sent, as often as one likes: Celery runs tasks twice, late, and days later.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.model import decisions
from tests.model.ownership import name_of
from tests.model.serving import make_current
from tests.model.state import Conclusion, Fate, Gate, Node, Record, State, Status
from tests.model.world import Step, Without, World, closed, put, spend, write
from workflows.settlement import Settlement

RUNNING = (Status.PLANNED, Status.LAUNCHED)
STAGED, VERIFIED, GIVEN = "staged", "verified", "given"  # what the messages of a move say


def moving(world: World, state: State) -> Iterator[Step]:
    if state.drivers:
        yield from _planning(world, state)
        for move, record in enumerate(state.records, start=1):
            if record.status is Status.LAUNCHED:
                yield from _locking(world, state, move, record)
            if record.status in RUNNING:
                yield from _settling(state, move, record)
        for conclusion in state.conclusions:
            what = f"what was concluded of m{conclusion.move} is written down"
            yield what, False, _concluded(world, state, conclusion)
        if state.budget.losses:
            yield "Redis is lost", True, state._replace(drivers=False, budget=spend(state.budget, "losses"))
    for index, node in enumerate(state.nodes):
        if not node.up:
            continue
        yield from _pausing(state, index, node)
        yield from _capturing(world, state, index, node)
        yield from _staging(world, state, index, node)
        yield from _committing(world, state, index, node)
        yield from _giving_up(world, state, index, node)


# -- worker and coordinator --------------------------------------------------------------------------------------------
def _planning(world: World, state: State) -> Iterator[Step]:
    """The planner writes a record, admission launches it on the revision that it reads: two writes of one record."""
    value = decisions.facts(state.values[-1])
    if state.budget.moves:
        paid = spend(state.budget, "moves")
        for destination in range(world.scope.nodes):
            if destination != value.owner:
                record = Record(Status.PLANNED, value.owner, destination)
                planned = state._replace(
                    records=(*state.records, record), fates=(*state.fates, Fate.UNTOUCHED), budget=paid
                )
                if state.budget.slow_settlers:
                    yield f"m{len(planned.records)} is planned", True, planned
                elif value.life and not value.move:
                    move = len(planned.records)
                    yield f"m{move} is launched", True, _launched(planned, move)
    for move, record in enumerate(state.records, start=1):
        if record.status is Status.PLANNED and value.owner == record.source and value.life and not value.move:
            yield f"m{move} is launched", False, _launched(state, move)


def _launched(state: State, move: int) -> State:
    epoch = decisions.facts(state.values[-1]).epoch
    return _record(state, move, status=Status.LAUNCHED, lock_revision=state.revision, epoch=epoch)


def _locking(world: World, state: State, move: int, record: Record) -> Iterator[Step]:
    """StepContext.lock: nothing but the revision that the record names may be replaced."""
    value = state.values[-1]
    last = decisions.facts(value).last
    if state.revision != record.lock_revision or last == move:
        return
    settles_first = Without.SETTLING_THE_PREVIOUS not in world.without
    if last and settles_first and state.records[last - 1].status in RUNNING:
        return  # settling it is a step of its own
    locked = decisions.lock(value, move, record.destination)
    if locked is None:
        return
    yield f"worker LOCKs m{move}", False, write(state, locked)
    if state.budget.timeouts:
        late = state._replace(writes=state.writes | {(state.revision, locked)}, budget=spend(state.budget, "timeouts"))
        yield f"worker's LOCK of m{move} times out", True, late


def _settling(state: State, move: int, record: Record) -> Iterator[Step]:
    """StepContext.settle: the rollback, the reconciler, the next move, an operator. Any of them, at any time."""
    newest = state.revision
    lock_revision = record.lock_revision or None
    match decisions.settle(state.values[-1], newest, move, lock_revision):
        case Settlement.COMMITTED:
            yield from _concluding(state, move, Status.COMPLETED)
        case Settlement.ABORTED:
            yield from _concluding(state, move, Status.ABORTED)
        case Settlement.ABORT:
            aborted = decisions.abort(state.values[-1], move)
            if aborted is not None:
                yield f"m{move} is ABORTed", False, write(state, aborted)
        case Settlement.FENCE:
            yield f"the key is fenced against m{move}", False, write(state, state.values[-1])
    if not state.budget.stale_reads:
        return
    for revision in range(state.oldest, newest):
        stale = decisions.settle(state.values[revision - state.oldest], revision, move, lock_revision)
        if stale in (Settlement.COMMITTED, Settlement.ABORTED):  # what would be written is refused at that revision
            status = Status.COMPLETED if stale is Settlement.COMMITTED else Status.ABORTED
            ended = _record(state, move, status=status)._replace(budget=spend(state.budget, "stale_reads"))
            yield f"m{move} is recorded {status.name} on a stale read of revision {revision}", True, ended


def _concluding(state: State, move: int, status: Status) -> Iterator[Step]:
    yield f"m{move} is recorded {status.name}", False, _record(state, move, status=status)
    if state.budget.slow_settlers:
        drawn = Conclusion(move, status, state.records[move - 1].lock_revision)
        slow = state._replace(conclusions=state.conclusions | {drawn}, budget=spend(state.budget, "slow_settlers"))
        yield f"somebody concludes that m{move} is {status.name}, and is stopped", True, slow


def _concluded(world: World, state: State, conclusion: Conclusion) -> State:
    """StepContext.settle: a record that has ended meanwhile stays as it is; one that has only advanced is ended.

    One that was launched meanwhile is not: the conclusion was about a LOCK that could not come.
    """
    state = state._replace(conclusions=state.conclusions - {conclusion})
    record = state.records[conclusion.move - 1]
    launched = record.lock_revision != conclusion.lock_revision
    if record.status not in RUNNING or (launched and Without.CONCLUDING_ANEW not in world.without):
        return state
    return _record(state, conclusion.move, status=conclusion.status)


def _record(state: State, move: int, **changes: object) -> State:
    records = state.records
    changed = records[move - 1]._replace(**changes)  # type: ignore[arg-type]
    return state._replace(records=(*records[: move - 1], changed, *records[move:]))


# -- source ------------------------------------------------------------------------------------------------------------
def _undriven(state: State, move: int) -> bool:
    """Whether a verb of this move can only be one that was sent earlier."""
    return not state.drivers or state.records[move - 1].status is not Status.LAUNCHED


def _pausing(state: State, index: int, node: Node) -> Iterator[Step]:
    """Handover.pause, once the worker has found its LOCK in the map."""
    if node.gate is not Gate.OPEN:
        return
    view = state.values[node.view - state.oldest]
    for move, record in enumerate(state.records, start=1):
        if record.source != node.id or state.fates[move - 1] is Fate.UNTOUCHED:
            continue  # nobody has asked this node
        if decisions.applies(view, move, record.epoch, node.id, node.life):
            paused = node._replace(gate=Gate.PAUSED, paused_for=move, captured=False)
            yield f"{name_of(node)} pauses for m{move}", _undriven(state, move), put(state, index, paused)


def _capturing(world: World, state: State, index: int, node: Node) -> Iterator[Step]:
    """Handover.capture and send: still, at the end of the log, and ours; an actor that is not in memory stays there."""
    if node.gate is not Gate.PAUSED or node.captured or node.serving >= 0 or node.append is not None:
        return
    move = node.paused_for
    if node.version >= 0:
        current = make_current(world, state, index)
        if current is None:
            return  # fenced: the step fails, and fails again
        node = current
    if node.append is None:
        node = node._replace(captured=True)
        after = put(state, index, node)._replace(messages=state.messages | {(STAGED, move, node.version)})
        yield f"{name_of(node)} captures version {node.version} for m{move}", _undriven(state, move), after
    else:
        yield f"{name_of(node)} claims before m{move} is captured", _undriven(state, move), put(state, index, node)


def _committing(world: World, state: State, index: int, node: Node) -> Iterator[Step]:
    """Handover.commit: with its gate closed and the destination's word, on the newest value of the map."""
    move, value = node.paused_for, state.values[-1]
    heirs = sorted(life for what, verified, life in state.messages if (what, verified) == (VERIFIED, move))
    if node.gate is not Gate.PAUSED or not node.captured or not heirs:
        return
    if Without.COMMIT_IN_THE_MAP in world.without:
        given = state._replace(messages=state.messages | {(GIVEN, move, node.epoch + 1)})
        yield f"{name_of(node)} gives m{move} away in memory", _undriven(state, move), put(given, index, closed(node))
        return
    for heir in heirs:  # whichever life's word arrived last
        committed = decisions.commit(value, move, node.id, node.life, state.records[move - 1].destination, heir)
        if committed is None or node.view != state.revision:
            continue
        yield f"{name_of(node)} COMMITs m{move} to life {heir}", _undriven(state, move), write(state, committed)
        if state.budget.timeouts:
            late = state._replace(
                writes=state.writes | {(state.revision, committed)}, budget=spend(state.budget, "timeouts")
            )
            yield f"{name_of(node)}'s COMMIT of m{move} times out", True, late


def _giving_up(world: World, state: State, index: int, node: Node) -> Iterator[Step]:
    """Host.tick: what nobody drives on, the source aborts by itself. Any timer may fire at any moment."""
    if node.gate is Gate.CLOSED:
        return
    locked = decisions.facts(state.values[node.view - state.oldest]).move if node.gate is Gate.OPEN else 0
    move = decisions.overdue(node.paused_for, locked)
    if move:
        aborted = decisions.abort(state.values[-1], move)
        if aborted is not None:
            yield f"{name_of(node)} ABORTs m{move}, which nobody drives on", False, write(state, aborted)
    if node.gate is Gate.PAUSED and Without.PAUSE_UNTIL_THE_MAP in world.without:
        opened = node._replace(gate=Gate.OPEN, paused_for=0, captured=False)
        yield f"{name_of(node)} resumes on a timer", False, put(state, index, opened)


# -- destination -------------------------------------------------------------------------------------------------------
def _staging(world: World, state: State, index: int, node: Node) -> Iterator[Step]:
    """Reception.handle_migration_request, chunks, verify: only for the move that the map names, and inactive."""
    view = decisions.facts(state.values[node.view - state.oldest])
    for what, move, number in state.messages:
        if state.records[move - 1].destination != node.id:
            continue
        if what == STAGED and view.move == move and view.destination == node.id and node.staged != (move, number):
            staged = put(state, index, node._replace(staged=(move, number)))
            after = staged._replace(messages=state.messages | {(VERIFIED, move, node.life)})
            yield f"{name_of(node)} stages version {number} of m{move}", _undriven(state, move), after
        if what == GIVEN and node.gate is Gate.CLOSED:  # without COMMIT in the map only
            version = node.staged[1] if node.staged is not None else -1
            active = node._replace(gate=Gate.OPEN, epoch=number, version=version, staged=None)
            after = put(state, index, active)._replace(messages=state.messages - {(what, move, number)})
            yield f"{name_of(node)} activates m{move} as told", False, after
            committed = decisions.commit(state.values[-1], move, state.records[move - 1].source, 1, node.id, node.life)
            if committed is not None:
                yield f"worker writes COMMIT of m{move}", False, write(state, committed)
