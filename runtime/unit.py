"""One unit of ownership as a node holds it: its gate, the commands that wait at it, its live actors.

                 judge: BIND, BOOT, OPEN                 pause
    (not held) ──────────► OPENING ──────► OPEN ◄──────────────────► PAUSED
                              ▲               │      judge: RESUME       │
                              └───────────────┴────── judge: RELOAD ─────┤
    (not held) ◄───────────────── judge: NOT_MINE ───────────────────────┘

An actor that goes back to its shard is RETIRING after OPEN: judge says KEEP (open again) or NOT_MINE.

While OPENING, PAUSED or RETIRING every command waits in the buffer, in order of arrival. OPENING and RETIRING end with
the compare-and-set that is retried until the map answers; PAUSED ends only through the map, for which the node itself
writes an ABORT when its pause lease runs out.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass
from enum import StrEnum

from routing.address import ActorId
from routing.errors import Busy
from routing.shard_map import Ownership
from runtime.delivery import Delivery
from runtime.live_actor import LiveActor
from runtime.rules import Held

NAMED_AT_MOST = 3  # actors in a refusal; the rest is counted


class UnitState(StrEnum):
    OPENING = "opening"
    OPEN = "open"
    PAUSED = "paused"
    RETIRING = "retiring"  # an actor's own key: closed, until it is known what became of RETIRE
    DROPPED = "dropped"  # no longer held; only tasks that still run can see it


@dataclass(slots=True, kw_only=True)
class Pause:
    """A closed gate: for which move, since when and until when (both on the node's clock, seconds)."""

    move: str
    epoch: int
    began_s: float
    lease_until_s: float


class Buffer:
    """Commands waiting at a closed gate, bounded by count, bytes and sender; over a bound they are sent back ("busy").

    `per_sender` (None: no such bound) keeps one busy client from taking the room of all others.
    """

    def __init__(self, max_messages: int, max_bytes: int, *, per_sender: int | None = None) -> None:
        self._max_messages, self._max_bytes = max_messages, max_bytes
        self._per_sender = max_messages if per_sender is None else per_sender
        self._waiting: deque[Delivery] = deque()
        self._of_sender: Counter[str] = Counter()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, delivery: Delivery) -> None:
        """Raises Busy when full."""
        if len(self._waiting) >= self._max_messages or self._bytes + delivery.size_bytes > self._max_bytes:
            raise Busy(f"{len(self._waiting)} commands wait for a move already: retry shortly", retry_after_s=0.05)
        if self._of_sender[delivery.sender] >= self._per_sender:
            raise Busy(
                f"{self._per_sender} of your commands wait for a move already: retry shortly", retry_after_s=0.05
            )
        self._waiting.append(delivery)
        self._count(delivery)

    def put_first(self, deliveries: list[Delivery]) -> None:
        """What was queued before the gate closed goes before what came after; it was accepted, so no bound applies."""
        self._waiting.extendleft(reversed(deliveries))
        for delivery in deliveries:
            self._count(delivery)

    def take_all(self) -> list[Delivery]:
        taken, self._bytes = list(self._waiting), 0
        self._waiting.clear()
        self._of_sender.clear()
        return taken

    def _count(self, delivery: Delivery) -> None:
        self._bytes += delivery.size_bytes
        self._of_sender[delivery.sender] += 1


class Unit:
    """A shard, or an actor with a key of its own, on this node."""

    def __init__(self, name: str, buffer: Buffer) -> None:
        self.name = name
        self.state = UnitState.OPENING
        self.ownership: Ownership | None = None  # as last judged; its epoch is the epoch this node appends with
        self.fence = 0  # claims are due for actors whose log ends below this epoch
        self.actors: dict[ActorId, LiveActor] = {}
        self.buffer = buffer
        self.pause: Pause | None = None
        self.locked_since_s: float | None = None  # a lock in the map that no pause has followed yet
        self.rest_at_s = 0.0  # when to look for idle actors again, on the node's clock
        self.running = 0  # mailboxes at work
        self.retire_from_s = 0.0  # not before, on the node's clock: a handler of its actor did not end in time
        self.before: Unit | None = None  # what this one was begun anew from: its handlers may still run
        self._quiet = asyncio.Event()
        self._quiet.set()
        self.settled = asyncio.Event()  # opened at least once, or dropped

    @property
    def epoch(self) -> int:
        return self.ownership.epoch if self.ownership is not None else 0

    @property
    def held(self) -> Held | None:
        if self.state in (UnitState.OPEN, UnitState.RETIRING):
            return Held(self.epoch, None)
        if self.state is UnitState.PAUSED and self.pause is not None:
            return Held(self.pause.epoch, self.pause.move)
        return None

    @property
    def paused_until(self) -> tuple[str, float] | None:
        """(the move it is paused for, the end of the pause lease), for `rules.overdue`."""
        return None if self.pause is None else (self.pause.move, self.pause.lease_until_s)

    @property
    def locked_since(self) -> tuple[str, float] | None:
        """(the move it is locked for, since when that is known here), for `rules.overdue`."""
        move = self.ownership.move if self.ownership is not None else None
        return None if move is None or self.locked_since_s is None else (move, self.locked_since_s)

    def mailbox_started(self) -> None:
        self.running += 1
        self._quiet.clear()

    def mailbox_stopped(self) -> None:
        self.running -= 1
        if self.running == 0:
            self._quiet.set()

    async def quiet(self, timeout_s: float) -> None:
        """Wait until no handler or append runs. Raises Busy when that takes longer: the pause is asked for again."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._quiet.wait()
                while (before := self.before) is not None:
                    await before._quiet.wait()
                    if self.before is before:  # else another pause has waited for the same, and gone on
                        self.before = before.before
        except TimeoutError as error:
            raise Busy(f"{self._still_running()} after {timeout_s:g} s") from error

    def _still_running(self) -> str:
        """`a handler of aircraft/N14228 still runs`: whose handlers, as far as that is known, and how many."""
        total = self.running + (self.before.running if self.before is not None else 0)
        named = [str(live.actor_id) for live in self.actors.values() if live.running][:NAMED_AT_MOST]
        more = f" and {total - len(named)} more" if named and total > len(named) else ""
        if total == 1:
            return f"a handler of {', '.join(named) or self.name} still runs"
        return f"{'' if named else f'{total} '}handlers of {', '.join(named) or self.name}{more} still run"

    def drop(self) -> None:
        """No longer held. What waited has been taken before; handlers that still run see it when they end."""
        self.state, self.pause = UnitState.DROPPED, None
        self.actors.clear()
        self.settled.set()

    def take_waiting(self) -> list[Delivery]:
        """Everything that waits: what was queued for each actor, in its order, then what came to the closed gate."""
        return [*self.take_queued(), *self.buffer.take_all()]

    def take_queued(self) -> list[Delivery]:
        """Empty every actor's inbox: what was accepted but not begun, per actor in order."""
        queued: list[Delivery] = []
        for live in self.actors.values():
            if live.inbox:
                queued.extend(live.inbox)
            live.inbox = None
        return queued
