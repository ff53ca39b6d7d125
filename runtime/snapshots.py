"""Rolling up the logs of actors, so that recovery reads a bounded number of messages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial

import structlog

from routing.errors import (
    FerryError,
    InDoubt,
    PayloadTooLarge,
    StateNotPortable,
    Unavailable,
    WrongSequence,
)
from routing.settings import Settings
from runtime.codec import aside
from runtime.journal import Journal, Kind, Record, encode_record
from runtime.live_actor import LiveActor
from runtime.unit import Unit, UnitState

log = structlog.get_logger("ferry.snapshots")

TRAIL_ENTRY_BYTES = 4  # that an entry of a log takes in each entry after it, at least


class Snapshots:
    """Tells when an actor's log is long enough, and appends the snapshot that takes its place, with or without a task.

    Whoever asks has the actor to itself until that has ended.
    """

    def __init__(self, *, journal: Journal, settings: Settings, incarnation: str, counters: Counter[str]) -> None:
        self._journal, self._settings, self._incarnation, self._counters = journal, settings, incarnation, counters
        self._piece_bytes = settings.snapshot_piece_bytes

    def due(self, unit: Unit, live: LiveActor) -> bool:
        """Whether the log of an actor that is current is long enough to be rolled up now.

        From what length on that is, is settled when it is first asked.
        """
        if len(live.trail) < live.snapshot_from or not live.is_current(fence=unit.fence):
            return False
        if not live.snapshot_from:
            every = self._every(live)
            times = len(live.trail) // every  # from 2 on nobody before could roll this log up: try at 4, 8 ...
            live.snapshot_from = every if times < 2 else every << times.bit_length()
        if len(live.trail) < live.snapshot_from or unit.state is not UnitState.OPEN:
            return False
        return not self._takes_pieces(live) or _stays(unit)

    def _every(self, live: LiveActor) -> int:
        """How long a log has to be: for a snapshot in pieces so long that its entries weigh as much, see `trail`."""
        every = self._settings.snapshot_every
        return max(every, math.isqrt(live.state_bytes // TRAIL_ENTRY_BYTES)) if self._takes_pieces(live) else every

    def _takes_pieces(self, live: LiveActor) -> bool:
        return live.state_bytes > self._piece_bytes

    async def take(self, unit: Unit, live: LiveActor) -> None:
        try:
            record = await live.snapshot(
                epoch=unit.epoch, incarnation=self._incarnation, max_state_bytes=self._settings.max_state_bytes
            )
            if len(live.trail) < self._every(live):  # only now is it known how large the state is
                live.snapshot_from = self._every(live)
                return
            whole = await aside(live.state_bytes, partial(encode_record, record))
            if len(whole) > self._piece_bytes:
                record = await self._store_pieces(unit, live, record, whole)
                version = await self._journal.append(live.actor_id, record, after=live.version)
            else:
                version = await self._journal.append_snapshot(live.actor_id, whole, after=live.version)
        except FerryError as error:
            self.ended(live, None, error)
            return
        self.ended(live, record, version)
        if record.pieces:
            try:
                await self._journal.forget(live.actor_id, before=record.pieces[0])
            except FerryError as error:  # what is left there harms nobody, and goes with the next snapshot
                log.info("not removed", actor=str(live.actor_id), error=str(error))

    async def _store_pieces(self, unit: Unit, live: LiveActor, snapshot: Record, whole: bytes) -> Record:
        """The snapshot that names the pieces `whole` was stored in. Raises Unavailable when its unit is to move."""
        pieces = []
        for start in range(0, len(whole), self._piece_bytes):
            if not _stays(unit):
                raise Unavailable(f"{unit.name} is about to move: its snapshot waits")
            part = whole[start : start + self._piece_bytes]
            piece = Record(Kind.PIECE, snapshot.epoch, snapshot.incarnation, live.trail, piece=part)
            live.stored(piece, await self._journal.append(live.actor_id, piece, after=live.version))
            pieces.append(live.version)
        return Record(Kind.SNAPSHOT, snapshot.epoch, snapshot.incarnation, pieces=tuple(pieces))

    def send(self, unit: Unit, live: LiveActor, then: Callable[[Record, int | FerryError], None]) -> bool:
        """Capture a small state and send off its snapshot; `then` is called with what `ended` is to be told.

        False when nothing was sent: it is for `take`, which may use a thread, and tells what is wrong.
        """
        if not self._journal.takes_more():
            return False
        try:
            record = live.snapshot_at_once(
                epoch=unit.epoch, incarnation=self._incarnation, max_state_bytes=self._settings.max_state_bytes
            )
            if record is None or self._takes_pieces(live):
                return False
            self._journal.append_then(live.actor_id, record, after=live.version, then=partial(then, record))
        except (StateNotPortable, PayloadTooLarge, Unavailable):
            return False
        return True

    def ended(self, live: LiveActor, snapshot: Record | None, outcome: int | FerryError) -> None:
        """Take note of what became of a snapshot. Raises what is no failure of a snapshot."""
        match outcome:
            case int():
                assert snapshot is not None
                live.stored(snapshot, outcome)
                live.snapshot_from = 0
                self._counters["snapshots"] += 1
            case WrongSequence() | InDoubt():
                live.dirty = True  # the next command reads what the log says
            case Unavailable():
                pass  # nothing was stored: it is due again after the next command
            case StateNotPortable() | PayloadTooLarge():
                live.snapshot_from = 2 * len(live.trail)  # encoding a large state after every command would be in vain
                self._counters["snapshots_failed"] += 1
                log.error("no snapshot", actor=str(live.actor_id), error=str(outcome), entries=len(live.trail))
            case _:
                raise outcome


def _stays(unit: Unit) -> bool:
    """Whether no move is under way: who was sent a copy of a large state replays what came since, if it is there."""
    return unit.state is UnitState.OPEN and (unit.ownership is None or unit.ownership.move is None)
