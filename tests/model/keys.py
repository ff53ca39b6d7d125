"""A second, smaller model: an actor that goes from its shard's key to one of its own and back, by the production rules.

Two nodes, one or two leaders. What the other model has (sessions, records, the steps of a move) is left out: a move is
one COMMIT by a source that has heard the newest value and whose appends for this unit have ended. What counts here is
which of two keys a node, or a leader, believes. Every process hears of each key when it likes; leaders may be answered
by a deposed leader of the map; writes may land after their writer has given up on them, appends after their handler was
let go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import NamedTuple

from routing import shard_map
from routing.errors import NotApplicable
from routing.shard_map import Ownership
from runtime import rules
from runtime.rules import Held, Standing, Verdict

ACTOR = "cart/x"
NAMES = ("a", "b")
LOG_MOST = 4


class Key(IntEnum):
    SHARD = 0
    OWN = 1


class Rule(Enum):
    """What is no function that could be replaced."""

    MAKING_SURE = "TAKE OUT of an actor that was apart before first makes sure of its shard's key"
    CLOSING = "a unit is closed before RETIRE is written"
    FENCING_OFF = "a unit opens again only over a write that a late RETIRE cannot follow"


class Hold(NamedTuple):
    """A unit that a node holds open. `version`: the actor in memory is its log up to here; -1: it is not in memory."""

    epoch: int
    fence: int
    version: int = -1


class Node(NamedTuple):
    """`seen` are indexes into the keys' histories, -1: nothing yet."""

    seen: tuple[int, int]
    held: tuple[Hold | None, Hold | None]
    trusted: bool = True  # its lease; it ends before anything fails over
    retiring: bool = False  # the actor's own unit is closed, until the node knows what became of RETIRE


class Leader(NamedTuple):
    """In the middle of setting the actor apart: what was read or written last of each key; -1: not yet."""

    phase: int = 0
    own: int = -1
    shard: int = -1


class Budget(NamedTuple):
    pins: int = 0
    moves: int = 0
    failovers: int = 0
    stale: int = 0  # reads by a leader that were answered with an older value
    late: int = 0  # writes and appends that land after their sender has given up on them


class Append(NamedTuple):
    """One that is under way: it lands if the log still ends at `follows`."""

    follows: int
    epoch: int
    node: int
    unit: Key


class State(NamedTuple):
    keys: tuple[tuple[int, ...], tuple[int, ...]]  # every value a key has had, as numbers
    log: tuple[tuple[int, int], ...]  # (epoch, node)
    nodes: tuple[Node, ...]
    leaders: tuple[Leader, ...]
    budget: Budget
    writes: frozenset[tuple[Key, int, int]] = frozenset()  # (key, index it replaces, value)
    appends: frozenset[Append] = frozenset()


Step = tuple[str, bool, State]
_values: list[Ownership] = []
_numbers: dict[Ownership, int] = {}


def _number(value: Ownership) -> int:
    number = _numbers.get(value)
    if number is None:
        number = _numbers[value] = len(_values)
        _values.append(value)
    return number


@dataclass(frozen=True, slots=True)
class TwoKeys:
    """A world for tests/model/explorer.py. `without` names rules that a mutant does without."""

    budget: Budget
    leaders: int = 1
    without: frozenset[Rule] = frozenset()

    def first(self) -> State:
        shard = Ownership(owner="a", incarnation="a-1", epoch=1)
        owner = Node(seen=(0, -1), held=(Hold(1, 0), None))
        other = Node(seen=(0, -1), held=(None, None))
        return State(
            keys=((_number(shard),), ()), log=(), nodes=(owner, other), leaders=(Leader(),) * self.leaders,
            budget=self.budget,
        )  # fmt: skip

    # -- promises --------------------------------------------------------------------------------------------------
    def broken(self, state: State) -> str:
        epochs = [epoch for epoch, _ in state.log]
        if epochs != sorted(epochs):
            return "the epochs of the log fall: a former owner appended after its successor"
        if len({*state.log}) > len({*epochs}):
            return "two nodes appended at one epoch"
        able = 0
        for index, node in enumerate(state.nodes):
            hold = _serving(state, index)
            if hold is None or hold.version < 0 or _owes_claim(state, hold):
                continue
            able += hold.version == len(state.log)
            if node.trusted and hold.version < len(state.log):
                return "a node answers queries, although somebody has appended since"
        return "two activations can append" if able > 1 else ""

    def at_rest(self, state: State) -> bool:
        """Served under the key that counts by the node it names, and no leader in the middle of anything."""
        counting = Key.OWN if _apart(_latest(state, Key.SHARD)) else Key.SHARD
        view = _latest(state, counting)
        if view.retired or (counting is Key.OWN and not view.pinned) or any(leader.phase for leader in state.leaders):
            return False
        node = state.nodes[NAMES.index(view.owner)]
        hold = node.held[counting]
        return hold is not None and hold.epoch == view.epoch and hold.version == len(state.log)

    # -- steps -----------------------------------------------------------------------------------------------------
    def steps(self, state: State) -> Iterator[Step]:
        for index in range(len(state.nodes)):
            yield from self._hears(state, index)
            yield from self._serves(state, index)
            yield from self._decides(state, index)
        for index in range(len(state.leaders)):
            yield from self._pins(state, index)
        yield from self._fails_over(state)
        for late in state.writes:
            key, replaced, value = late
            if replaced == len(state.keys[key]) - 1:
                yield f"a late write of {key.name} lands", False, _write(state, key, value)
        for append in state.appends:
            yield f"a late append of {NAMES[append.node]} lands", False, _append(state, append.epoch, append.node)

    def _hears(self, state: State, index: int) -> Iterator[Step]:
        node = state.nodes[index]
        for key in Key:
            newest = len(state.keys[key]) - 1
            for seen in {node.seen[key] + 1, newest}:
                if node.seen[key] < seen <= newest:
                    yield f"{NAMES[index]} hears {key.name} {seen}", False, _hear(state, index, key, seen)
        if not node.trusted and node.seen == _newest(state):
            yield f"{NAMES[index]} renews its lease", False, _put(state, index, node._replace(trusted=True))

    def _serves(self, state: State, index: int) -> Iterator[Step]:
        node, name = state.nodes[index], NAMES[index]
        unit, hold = _unit(state, node), _serving(state, index)
        if hold is None or not node.trusted:
            return
        end = len(state.log)
        if hold.version != end:
            tail = state.log[-1][0] if state.log else 0
            standing = rules.compare(held_version=0, held_epoch=hold.epoch, tail_version=end, tail_epoch=tail)
            if standing is not Standing.FENCED:
                yield f"{name} reads the log", False, _put(state, index, _held(node, unit, hold._replace(version=end)))
            else:  # it looks at the map, and goes on from there
                yield f"{name} is fenced", False, _refresh(state, index)
        if hold.version < 0 or end >= LOG_MOST:
            return
        what = "claims" if _owes_claim(state, hold) else "appends"
        if hold.version == end:
            appended = _append(state, hold.epoch, index)
            yield f"{name} {what}", False, _put(appended, index, _held(node, unit, hold._replace(version=end + 1)))
        if state.budget.late and hold.version == end:
            late = state._replace(
                appends=state.appends | {Append(end, hold.epoch, index, unit)}, budget=_spend(state.budget, "late")
            )
            yield f"{name} {what}, late", True, _put(late, index, _held(node, unit, hold._replace(version=-1)))

    def _decides(self, state: State, index: int) -> Iterator[Step]:
        """What a node writes to the map: COMMIT, BIND, RETIRE, TAKE BACK."""
        node, name = state.nodes[index], NAMES[index]
        shard, own = _view(state, node, Key.SHARD), _view(state, node, Key.OWN)
        for key, view in ((Key.SHARD, shard), (Key.OWN, own)):
            if view is None or view.owner != name:
                continue
            if view.incarnation is None and (key is Key.SHARD or _counts(state, node)):
                bound = shard_map.bind(view, node=name, incarnation=f"{name}-1")
                yield from self._writes(state, index, key, bound, f"{name} binds {key.name}")
            if node.held[key] is None or not node.trusted or node.seen[key] < len(state.keys[key]) - 1:
                continue
            if _busy(state, index, key) or (key is Key.OWN and node.retiring):
                continue  # the gate is closed once they have ended
            home = key is Key.OWN and not view.pinned and _latest(state, Key.SHARD).owner != name
            if home or state.budget.moves:
                paid = state if home else state._replace(budget=_spend(state.budget, "moves"))
                yield f"{name} commits {key.name}", not home, _write(paid, key, _moved(view, 1 - index), index)
        if own is None or shard is None or not node.trusted:
            return
        if node.retiring:
            if not _busy(state, index, Key.OWN):
                yield from self._retires(_refresh(state, index), index)
        elif shard_map.may_retire(own, shard) and node.held[Key.OWN] is not None and _counts(state, node):
            if Rule.CLOSING in self.without:
                retired = shard_map.retire(own, incarnation=f"{name}-1")
                yield from self._writes(state, index, Key.OWN, retired, f"{name} retires")
                return
            yield f"{name} closes its unit", False, _put(state, index, node._replace(retiring=True))
        if own.retired and _counts(state, node) and node.held[Key.SHARD] is not None:
            try:
                back = shard_map.take_back(shard, ACTOR, own, incarnation=f"{name}-1")
            except NotApplicable:
                return
            yield from self._writes(state, index, Key.SHARD, back, f"{name} takes back")

    def _retires(self, state: State, index: int) -> Iterator[Step]:
        """Host._retire, once no handler runs and both keys are read."""
        node, name = state.nodes[index], NAMES[index]
        shard, own = _view(state, node, Key.SHARD), _view(state, node, Key.OWN)
        if own is None or shard is None or not node.retiring:
            yield f"{name} looks", False, state
            return
        if shard_map.may_retire(own, shard):
            value, what = shard_map.retire(own, incarnation=f"{name}-1"), "retires"
        elif Rule.FENCING_OFF in self.without:
            yield f"{name} opens again", False, _put(state, index, node._replace(retiring=False))
            return
        else:
            value, what = own, "fences its RETIRE off"
        yield from self._writes(state, index, Key.OWN, value, f"{name} {what}")

    def _writes(self, state: State, index: int, key: Key, value: Ownership, what: str) -> Iterator[Step]:
        """A compare-and-set on what the node has seen: it lands, or is refused, or perhaps lands later."""
        seen, number = state.nodes[index].seen[key], _number(value)
        if seen == len(state.keys[key]) - 1:
            yield what, False, _write(state, key, number, index)
        if state.budget.late:
            late = state._replace(writes=state.writes | {(key, seen, number)}, budget=_spend(state.budget, "late"))
            yield f"{what}, late", True, late

    # -- leaders ---------------------------------------------------------------------------------------------------
    def _pins(self, state: State, index: int) -> Iterator[Step]:
        leader = state.leaders[index]
        if leader.phase == 0:
            if state.budget.pins:
                paid = state._replace(budget=_spend(state.budget, "pins"))
                for read, cost in self._reads(paid, Key.OWN, -1):
                    after = cost._replace(leaders=_with(state.leaders, index, Leader(1, read, -1)))
                    yield f"leader {index} reads OWN {read}", True, after
            own = _latest(state, Key.OWN) if state.keys[Key.OWN] else None
            if own is not None and own.pinned and not own.retired and _apart(_latest(state, Key.SHARD)):
                yield "a leader unpins", True, _write(state, Key.OWN, _number(shard_map.pin(own, pinned=False)))
            return
        own = _values[state.keys[Key.OWN][leader.own]] if leader.own >= 0 else None
        done = state._replace(leaders=_with(state.leaders, index, Leader()))
        if leader.phase == 1:
            for read, cost in self._reads(state, Key.SHARD, -1):
                after = cost._replace(leaders=_with(state.leaders, index, Leader(2, leader.own, read)))
                yield f"leader {index} reads SHARD {read}", False, after
            return
        shard = _values[state.keys[Key.SHARD][leader.shard]]
        try:
            taken = shard_map.take_out(shard, ACTOR, own)
        except NotApplicable:
            if leader.phase < 4:
                yield f"leader {index} is refused", False, done
                return
        if leader.phase == 2 and own is not None and Rule.MAKING_SURE not in self.without:
            yield from self._leads(
                state, index, Key.SHARD, leader.shard, shard, Leader(3, leader.own, leader.shard + 1)
            )
        elif leader.phase in (2, 3):
            after = Leader(4, leader.own + 1, leader.shard)
            yield from self._leads(state, index, Key.OWN, leader.own, taken, after)
        else:
            apart = shard_map.set_apart(shard, ACTOR, own)
            yield from self._leads(state, index, Key.SHARD, leader.shard, apart, Leader())

    def _reads(self, state: State, key: Key, least: int) -> Iterator[tuple[int, State]]:
        newest = len(state.keys[key]) - 1
        yield newest, state
        if state.budget.stale:
            for old in range(max(least, 0), newest):
                yield old, state._replace(budget=_spend(state.budget, "stale"))

    def _leads(self, state: State, index: int, key: Key, seen: int, value: Ownership, after: Leader) -> Iterator[Step]:
        over = state._replace(leaders=_with(state.leaders, index, Leader()))
        if seen == len(state.keys[key]) - 1:
            written = _write(state, key, _number(value))
            yield (
                f"leader {index} writes {key.name}",
                False,
                written._replace(leaders=_with(state.leaders, index, after)),
            )
        else:
            yield f"leader {index} is too late", False, over
        yield f"leader {index} dies", True, over
        if state.budget.late:
            late = over._replace(
                writes=state.writes | {(key, seen, _number(value))}, budget=_spend(state.budget, "late")
            )
            yield f"leader {index} writes {key.name}, late", True, late

    def _fails_over(self, state: State) -> Iterator[Step]:
        if not state.budget.failovers:
            return
        for key in Key:
            if not state.keys[key] or _latest(state, key).retired:
                continue
            view = _latest(state, key)
            heard = {_values[number].apart_at(ACTOR) for number in state.keys[Key.SHARD]}  # however little it was
            if key is Key.OWN and view.taken_out not in heard:
                continue
            owner = NAMES.index(view.owner)
            given = replace(shard_map.failover(view, to=NAMES[1 - owner]), last=None)
            after = _put(state, owner, state.nodes[owner]._replace(trusted=False))
            paid = after._replace(budget=_spend(state.budget, "failovers"))
            yield f"{key.name} fails over", True, _write(paid, key, _number(given))


# -- what happens to a state -------------------------------------------------------------------------------------------
def _latest(state: State, key: Key) -> Ownership:
    return _values[state.keys[key][-1]]


def _newest(state: State) -> tuple[int, int]:
    return len(state.keys[Key.SHARD]) - 1, len(state.keys[Key.OWN]) - 1


def _view(state: State, node: Node, key: Key) -> Ownership | None:
    return _values[state.keys[key][node.seen[key]]] if node.seen[key] >= 0 else None


def _apart(shard: Ownership | None) -> bool:
    """Whether a value of the shard's key names the actor apart."""
    return shard is not None and shard.apart_at(ACTOR) is not None


def _counts(state: State, node: Node) -> bool:
    """Directory.counts of the actor's own key."""
    shard, own = _view(state, node, Key.SHARD), _view(state, node, Key.OWN)
    return shard is not None and own is not None and of_one_time(shard, own)


def of_one_time(shard: Ownership, own: Ownership) -> bool:
    """Directory.counts for two values."""
    return shard.apart_at(ACTOR) == own.taken_out


def _unit(state: State, node: Node) -> Key:
    """Directory.unit_of the actor."""
    return Key.OWN if _apart(_view(state, node, Key.SHARD)) else Key.SHARD


def _moved(view: Ownership, to: int) -> int:
    """LOCK and COMMIT in one. Which moves there were would make states differ, and nothing else: it is left out."""
    locked = shard_map.lock(view, move="m", destination=NAMES[to])
    gone = shard_map.commit(locked, move="m", incarnation=str(view.incarnation), heir=f"{NAMES[to]}-1")
    return _number(replace(gone, last=None))


def _busy(state: State, index: int, key: Key) -> bool:
    """Whether a node's handlers for this unit still run: what they store may land."""
    return any(append.node == index and append.unit is key for append in state.appends)


def _serving(state: State, index: int) -> Hold | None:
    """What a node serves the actor from; nothing while its unit is closed, or its mailbox waits for an append."""
    node = state.nodes[index]
    unit = _unit(state, node)
    closed = (unit is Key.OWN and node.retiring) or _busy(state, index, unit)
    return None if closed else node.held[unit]


def _owes_claim(state: State, hold: Hold) -> bool:
    tail = state.log[hold.version - 1][0] if hold.version else 0
    return rules.must_claim(tail_epoch=tail, fence=hold.fence)


def _spend(budget: Budget, what: str) -> Budget:
    return budget._replace(**{what: getattr(budget, what) - 1})


def _with(leaders: tuple[Leader, ...], index: int, leader: Leader) -> tuple[Leader, ...]:
    return (*leaders[:index], leader, *leaders[index + 1 :])


def _put(state: State, index: int, node: Node) -> State:
    return state._replace(nodes=(*state.nodes[:index], node, *state.nodes[index + 1 :]))


def _held(node: Node, key: Key, hold: Hold | None) -> Node:
    return node._replace(held=(hold, node.held[1]) if key is Key.SHARD else (node.held[0], hold))


def _append(state: State, epoch: int, by: int) -> State:
    """One lands, and with it all others that followed the same version are refused."""
    return state._replace(log=(*state.log, (epoch, by)), appends=frozenset())


def _write(state: State, key: Key, value: int, index: int | None = None) -> State:
    """The write lands; a node that wrote it hears of it at once. Directory.transition."""
    history = state.keys[key]
    before = _values[history[-1]] if history else None
    shard_map.check(before, _values[value])
    keys = ((*history, value), state.keys[1]) if key is Key.SHARD else (state.keys[0], (*history, value))
    after = state._replace(keys=keys)
    return after if index is None else _hear(after, index, key, len(history))


def _refresh(state: State, index: int) -> State:
    """Directory.refresh of the actor's own key: that one first, then its shard's."""
    for key in (Key.OWN, Key.SHARD):
        if state.nodes[index].seen[key] < len(state.keys[key]) - 1:
            state = _hear(state, index, key, len(state.keys[key]) - 1)
    return state


def _hear(state: State, index: int, key: Key, seen: int) -> State:
    """Directory._adopt, and Host._on_map for the units whose verdict that may change."""
    node = state.nodes[index]
    before = _view(state, node, Key.SHARD)
    node = node._replace(seen=(seen, node.seen[1]) if key is Key.SHARD else (node.seen[0], seen))
    shard = _view(state, node, Key.SHARD)
    node = _judged(state, index, node, key)
    if key is Key.SHARD and _apart(shard):
        hold = node.held[Key.SHARD]
        node = _held(node, Key.SHARD, hold._replace(version=-1) if hold is not None else None)
    renamed = before is None or shard is None or before.apart != shard.apart
    if key is Key.SHARD and renamed and node.seen[Key.OWN] >= 0:
        node = _judged(state, index, node, Key.OWN)
    return _put(state, index, node)


def _judged(state: State, index: int, node: Node, key: Key) -> Node:
    view, hold, name = _view(state, node, key), node.held[key], NAMES[index]
    assert view is not None
    held = Held(hold.epoch, None) if hold is not None else None
    counts = key is Key.SHARD or _counts(state, node)
    verdict = rules.judge(view, node=name, incarnation=f"{name}-1", held=held, counts=counts)
    if key is Key.OWN:
        node = node._replace(retiring=False)
    match verdict:
        case Verdict.OPEN:
            return _held(node, key, Hold(view.epoch, view.fence))
        case Verdict.KEEP:
            return node
        case Verdict.RELOAD:
            return _held(node, key, Hold(view.epoch, max(view.fence, view.epoch)))
        case Verdict.NOT_MINE | Verdict.BIND:
            return _held(node, key, None)
        case _:
            raise AssertionError(verdict)
