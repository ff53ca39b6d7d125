"""The fault cases: where the protocol stands, whom the fault hits, what it is. Pure.

    at a point of a move .... 8    a process stops exactly there (FERRY_FAILPOINTS), so that the moment is not luck
    a fault hits a party .... 6
    and is one of ........... 3    = 144 directed cases

These move a shard; the 48 that kill are there for the move of one actor as well. Random cases choose among all the
points there are, how long a fault lasts, and sometimes strike two parties at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Point(StrEnum):
    """How far the move has come when the fault strikes."""

    PAUSE = "pause"
    COPY_AHEAD = "copy_ahead"
    CAPTURE = "capture"
    SERIALIZE = "serialize"
    SEND = "send"
    AWAIT_ACK = "await_ack"
    BEFORE_COMMIT = "before_commit"
    AFTER_COMMIT = "after_commit"


class Party(StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"
    WORKER = "worker"  # the one that has the step
    COORDINATOR = "coordinator"  # the one that leads
    REDIS = "redis"
    NATS = "nats"


class Fault(StrEnum):
    KILL = "kill"  # SIGKILL; started again after `hold_s`
    STOP = "stop"  # SIGSTOP; SIGCONT after `hold_s`
    RESTART = "restart"  # SIGTERM, and started again as soon as it has ended; a node drains first


@dataclass(frozen=True, slots=True)
class Marker:
    """A failpoint at which a process of one party stops itself: that tells us where the protocol stands."""

    party: Party
    name: str

    @property
    def armed(self) -> str:
        """What the failpoint file of that process says.

        A destination is told after the pause only what was not copied ahead: so it refuses that first.
        """
        refused = "stage_ahead=error*1," if self.name in ("stage", "verify") else ""
        return f"{refused}{self.name}=stop*1"


# Each kind of process marks some points, so that each is also found standing still in the middle of a step.
MARKERS: Mapping[Point, Marker] = {
    Point.PAUSE: Marker(Party.SOURCE, "pause"),  # LOCK is in the map, the gate still open
    Point.COPY_AHEAD: Marker(Party.DESTINATION, "stage_ahead"),  # the gate is still open, and the source waits
    Point.CAPTURE: Marker(Party.SOURCE, "capture"),
    Point.SERIALIZE: Marker(Party.SOURCE, "serialize"),
    Point.SEND: Marker(Party.DESTINATION, "stage"),  # the source waits for it in the middle of its step
    Point.AWAIT_ACK: Marker(Party.DESTINATION, "verify"),
    Point.BEFORE_COMMIT: Marker(Party.SOURCE, "commit"),
    Point.AFTER_COMMIT: Marker(Party.SOURCE, "committed"),
}

# A worker is hit with its next step in hand. Stopped and woken, it takes that step late: a LOCK after others have ended
# the move, for instance. While states are copied ahead, and after COMMIT, it waits for the source's answer.
WORKER_MARKERS: Mapping[Point, Marker] = {
    Point.PAUSE: Marker(Party.WORKER, "pause.begin"),
    Point.COPY_AHEAD: MARKERS[Point.COPY_AHEAD],
    Point.CAPTURE: Marker(Party.WORKER, "capture.begin"),
    Point.SERIALIZE: Marker(Party.WORKER, "serialize.begin"),
    Point.SEND: Marker(Party.WORKER, "send.begin"),
    Point.AWAIT_ACK: Marker(Party.WORKER, "await_ack.begin"),
    Point.BEFORE_COMMIT: Marker(Party.WORKER, "delete.begin"),
    Point.AFTER_COMMIT: MARKERS[Point.AFTER_COMMIT],
}

_STEPS = ("pause", "capture", "serialize", "send", "await_ack", "delete")
_ALL_MARKERS = (
    *(Marker(Party.WORKER, f"{step}.{end}") for step in _STEPS for end in ("begin", "end")),
    *(Marker(Party.SOURCE, name) for name in ("pause", "capture", "serialize", "send", "await_ack")),
    *(Marker(Party.SOURCE, name) for name in ("commit", "committed")),
    *(Marker(Party.DESTINATION, name) for name in ("stage_ahead", "verify_ahead", "stage", "verify", "activate")),
)

# A stopped worker sleeps until another has taken its move on, which a reconciler asks for after three seconds. Anybody
# else sleeps past the node lease and its margin, so that the others act as if it were dead.
_HOLD_S: Mapping[tuple[Party, Fault], float] = {
    (Party.WORKER, Fault.STOP): 6.0,
    (Party.SOURCE, Fault.STOP): 4.0,
    (Party.DESTINATION, Fault.STOP): 4.0,
    (Party.COORDINATOR, Fault.STOP): 4.0,
    (Party.NATS, Fault.STOP): 2.5,  # longer than an append waits: its fate is unknown, and it lands late
    (Party.REDIS, Fault.STOP): 2.5,
}
ALONE = 0.3  # of the random cases
_KILLED_FOR_S = 0.5  # before it is started again, as a supervisor would


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault: whom it hits, what it is, how long until it is undone."""

    party: Party
    fault: Fault
    hold_s: float

    def __str__(self) -> str:
        return f"{self.fault} {self.party}"


@dataclass(frozen=True, slots=True)
class Case:
    """At `marker`, all `strikes` at once. `again` are the command line options that repeat it.

    `alone`: one actor is moved instead of its shard, and let go back to it when everything has come to rest.
    """

    name: str
    marker: Marker
    strikes: tuple[Strike, ...]
    again: str
    alone: bool = False


def directed(
    *, points: tuple[Point, ...] = tuple(Point), parties: tuple[Party, ...] = tuple(Party),
    faults: tuple[Fault, ...] = tuple(Fault), alone: bool = False,
) -> Iterator[Case]:  # fmt: skip
    """Every combination, in an order that visits all parties before the same one again."""
    moved, option = (", of one actor", " --alone") if alone else ("", "")
    for fault in faults:
        for point in points:
            for party in parties:
                marker = (WORKER_MARKERS if party is Party.WORKER else MARKERS)[point]
                hold_s = _HOLD_S.get((party, fault), _KILLED_FOR_S)
                yield Case(
                    name=f"{fault} {party} at {point}{moved}", marker=marker, strikes=(Strike(party, fault, hold_s),),
                    again=f"--party {party} --point {point} --fault {fault}{option}", alone=alone,
                )  # fmt: skip


def by_chance(seed: int, *, first: int, count: int) -> Iterator[Case]:
    """Cases `first` to `first + count - 1` of a seed; each is the same however many there are."""
    for number in range(first, first + count):
        chance = random.Random(f"{seed}/{number}")
        marker = chance.choice(_ALL_MARKERS)
        parties = chance.sample(tuple(Party), k=chance.choice((1, 1, 2)))
        strikes = tuple(_strike(chance, party) for party in parties)
        alone = chance.random() < ALONE
        moved = ", of one actor" if alone else ""
        yield Case(
            name=f"random {seed}/{number}: {' and '.join(map(str, strikes))} at {marker.party} {marker.name}{moved}",
            marker=marker, strikes=strikes, again=f"--random 1 --seed {seed} --first {number}", alone=alone,
        )  # fmt: skip


def _strike(chance: random.Random, party: Party) -> Strike:
    fault = chance.choice(tuple(Fault))
    longest_s = _HOLD_S.get((party, fault), 4.0)
    return Strike(party, fault, round(chance.uniform(0.05, longest_s), 2))
