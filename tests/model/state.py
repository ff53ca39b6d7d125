"""The explicit state of the model: one actor in one unit, two or three nodes, its log, its map key, its records.

Everything is a tuple, so that states are compared and hashed by value. Values of the map are numbers of
tests/model/decisions.py, nodes are indexes, moves count from 1 (0: none), commands are indexes into `Scope.commands`.

What the network may do is in the shape of the state. A client's command is nowhere: it may be delivered at any node, at
any time, any number of times. What is asked of a node for a move stays in `messages` until no node could heed it. An
append is under way until it lands, is refused, or its sender gives up on it; then it lingers in `appends` and may still
land. Writes of the map linger in `writes` likewise. A node that takes no step is a stopped one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from tests.model import decisions


class Gate(IntEnum):
    CLOSED = 0  # not held, or just being opened
    OPEN = 1
    PAUSED = 2


class Kind(IntEnum):
    CLAIM = 0  # subject: the node
    COMMAND = 1  # subject: the command
    REJECTION = 2


class Entry(NamedTuple):
    """One message of the actor's log."""

    kind: Kind
    subject: int
    epoch: int


class Node(NamedTuple):
    """One life of a node. `view` is the revision of the map's value that it heard last."""

    id: int
    up: bool
    life: int
    view: int
    gate: Gate = Gate.CLOSED
    epoch: int = 0  # of the unit, as held
    fence: int = 0
    paused_for: int = 0
    captured: bool = False
    version: int = -1  # the actor in memory is the log up to here; -1: not there, or not to be trusted
    unverified: bool = False
    forgotten: int = 0  # without rule T3: what was decided before this version is not remembered
    serving: int = -1  # the command that its mailbox is at and does not let go; -1: none
    append: tuple[Entry, int] | None = None  # under way: the entry and the version it must follow
    staged: tuple[int, int] | None = None  # the move and the version that arrived with it


class Status(IntEnum):
    PLANNED = 0
    LAUNCHED = 1
    COMPLETED = 2
    ABORTED = 3  # rolled back, failed or cancelled


class Record(NamedTuple):
    """What is written down about a move. `lock_revision` 0: not launched. `epoch` is that of the map under its lock."""

    status: Status
    source: int
    destination: int
    lock_revision: int = 0
    epoch: int = 0


class Conclusion(NamedTuple):
    """How somebody will write down that a move has ended, concluded while its record had this `lock_revision`."""

    move: int
    status: Status
    lock_revision: int


class Fate(IntEnum):
    """What has really happened to a move in the map, for the invariants; the protocol does not see it."""

    UNTOUCHED = 0
    LOCKED = 1
    COMMITTED = 2
    ABORTED = 3


class Budget(NamedTuple):
    """How many of each fault may still happen."""

    crashes: int = 0
    stops: int = 0  # a node that is stopped for so long that its successor starts under its id, and then goes on
    failovers: int = 0  # of an owner that lives; a dead one's cost nothing
    timeouts: int = 0  # an append or a write of the map without an answer, which may land later
    moves: int = 0
    losses: int = 0  # Redis with all records and tasks
    stale_reads: int = 0
    slow_settlers: int = 0  # a conclusion about a move that is written down much later


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """How much of the world is explored. A command is (session, number); session c was opened at time c."""

    commands: tuple[tuple[int, int], ...] = ((1, 1), (1, 2))
    nodes: int = 2
    budget: Budget
    conditional: bool = False  # commands of session 2 are refused unless (1, 1) was applied before
    duplicates: bool = True  # an answered command may arrive again
    sessions: int = 9  # that the actor remembers
    queries: bool = True  # whether the owner's memory is asked


class State(NamedTuple):
    oldest: int  # revision of values[0]; older ones nobody can still see
    values: tuple[int, ...]  # of the map, the last one is true now
    log: tuple[Entry, ...]
    nodes: tuple[Node, ...]  # the latest life of each id at its index, then earlier lives that still run
    budget: Budget
    appends: frozenset[tuple[Entry, int, bool]] = frozenset()  # entry, version it follows, whether a mailbox waits
    writes: frozenset[tuple[int, int]] = frozenset()  # (revision it replaces, value)
    messages: frozenset[tuple[str, int, int]] = frozenset()
    records: tuple[Record, ...] = ()
    fates: tuple[Fate, ...] = ()
    conclusions: frozenset[Conclusion] = frozenset()
    told: int = 0  # commands whose senders have their reply, a bit each
    refused: int = 0  # those whose senders have the actor's "no" as their reply
    expired: int = 0  # those whose senders were told that their session is forgotten
    asked: int = 0  # the conditional command: 0 not sent, 1 sent, 2 sent after (1, 1) was acknowledged
    drivers: bool = True  # Redis, workers and reconciler are there
    wrong: str = ""  # a promise that a step itself has broken

    @property
    def revision(self) -> int:
        return self.oldest + len(self.values) - 1


def first_state(scope: Scope) -> State:
    """Node 0 owns the unit and serves it; the log is empty; nothing has gone wrong yet."""
    owner = Node(id=0, up=True, life=1, view=1, gate=Gate.OPEN, epoch=1)
    others = (Node(id=index, up=True, life=1, view=1) for index in range(1, scope.nodes))
    return State(oldest=1, values=(decisions.first_owner(0),), log=(), nodes=(owner, *others), budget=scope.budget)
