"""The destination's side of a move: what has been announced, what has arrived, what is ready to take over.

Everything here is inactive and may be lost at any time: the log is the truth, this is a cache that saves replaying
it. It is kept until the map says how the move ended, or until nothing was heard of the move for a lock lease.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from routing.control import ManifestRow, MigrationRequest
from routing.errors import InvalidInput, PayloadTooLarge, StateNotPortable, Unavailable
from routing.jsonlike import shown
from routing.settings import Settings
from runtime.actor import ActorClasses
from runtime.codec import sequence, split, text
from runtime.live_actor import LiveActor
from runtime.memory import Limits
from runtime.portable import Portable
from runtime.turn import Turn

log = structlog.get_logger("ferry.arrivals")

HEADER_ALLOWANCE_BYTES = 2**20  # the memory of commands and the trail travel beside the state


@dataclass(slots=True)
class _Arriving:
    """One announced actor: the bytes received so far, by offset, then the inactive actor they decode to."""

    row: ManifestRow
    data: bytearray | None = None
    offsets: set[int] = field(default_factory=set)
    received_bytes: int = 0
    live: LiveActor | None = None


@dataclass(slots=True)
class _Staging:
    unit: str
    heard_at_s: float
    actors: dict[int, _Arriving] = field(default_factory=dict)


class StagedActors:
    """All moves that are arriving at this node."""

    def __init__(self, *, classes: ActorClasses, settings: Settings, clock: Callable[[], float]) -> None:
        self._classes, self._settings, self._clock = classes, settings, clock
        self._moves: dict[str, _Staging] = {}

    def __len__(self) -> int:
        return len(self._moves)

    def announce(self, request: MigrationRequest) -> list[int]:
        """Take note of a page of the manifest; returns the indexes of actors still lacking here.

        Raises UnknownActorType and PayloadTooLarge before anything is allocated.
        """
        staging = self._moves.setdefault(request.move, _Staging(request.unit, self._clock()))
        staging.heard_at_s = self._clock()
        lacking = []
        for row in request.rows:
            self._classes.get(row.actor_id.partition("/")[0])
            limit = self._settings.max_state_bytes
            if row.state_bytes > limit or row.transfer_bytes > limit + HEADER_ALLOWANCE_BYTES:
                raise PayloadTooLarge(
                    f"state of {row.actor_id} is {row.state_bytes} bytes:"
                    f" this node takes {limit} (FERRY_MAX_STATE_BYTES)"
                )
            known = staging.actors.get(row.index)
            if known is None or known.row != row:
                known = staging.actors[row.index] = _Arriving(row)
            if known.received_bytes < row.transfer_bytes:
                lacking.append(row.index)
        return lacking

    def receive(self, payload: bytes) -> None:
        """Store the pieces of one chunk. Repeats are ignored. Raises InvalidInput for what was never announced."""
        header, body = split(payload)
        move = text(header, "move")
        staging = self._moves.get(move)
        if staging is None:
            raise Unavailable(f"move {shown(move)} is not announced here: announce it again")
        staging.heard_at_s = self._clock()
        position = 0
        for index, offset, size in _pieces(header):
            arriving = staging.actors.get(index)
            if arriving is None or offset + size > arriving.row.transfer_bytes or position + size > len(body):
                raise InvalidInput(f"chunk of move {move} does not fit what was announced")
            if offset not in arriving.offsets:
                if arriving.data is None:
                    arriving.data = bytearray(arriving.row.transfer_bytes)
                arriving.data[offset : offset + size] = body[position : position + size]
                arriving.offsets.add(offset)
                arriving.received_bytes += size
            position += size

    async def verify(self, move: str) -> int:
        """Decode everything that arrived and check it against the manifest; returns how many actors are ready.

        Raises StateNotPortable when something is damaged or this node's code cannot take it, Unavailable when
        something is missing: the source sends again.
        """
        staging = self._moves.get(move)
        if staging is None:
            raise Unavailable(f"move {move} is not staged here: send it again")
        staging.heard_at_s = self._clock()
        turn = Turn()
        for arriving in list(staging.actors.values()):
            if arriving.live is None:
                arriving.live = self._decode(move, arriving)
                arriving.data = None
                await turn.over()  # decoding a large shard must not hold up the commands of others
        return len(staging.actors)

    def _decode(self, move: str, arriving: _Arriving) -> LiveActor:
        row = arriving.row
        if arriving.received_bytes < row.transfer_bytes or arriving.data is None:
            raise Unavailable(f"{row.actor_id} of move {move} has not arrived whole: send it again")
        try:
            portable = Portable.decode(bytes(arriving.data))
        except InvalidInput as error:
            raise StateNotPortable(f"{row.actor_id} of move {move} was damaged on the way: {error}") from error
        frame = portable.frame
        arrived = (str(portable.actor_id), portable.version, frame.digest, frame.state_bytes)
        if arrived != (row.actor_id, row.version, row.digest, row.state_bytes):
            raise StateNotPortable(f"{row.actor_id} of move {move} is not what was announced")
        return portable.activate(
            self._classes, limits=Limits.of(self._settings), max_state_bytes=self._settings.max_state_bytes,
            used_at_s=self._clock(),
        )  # fmt: skip

    # -- for the host ------------------------------------------------------------------------------------------------
    def take(self, unit: str, move: str) -> list[LiveActor]:
        """Hand over the verified actors of a move whose unit is now ours; what was not verified is left to the log."""
        staging = self._moves.get(move)
        if staging is None or staging.unit != unit:
            return []
        del self._moves[move]
        return [arriving.live for arriving in staging.actors.values() if arriving.live is not None]

    def forget_unless(self, unit: str, move: str | None) -> None:
        """The map names `move` for this unit, or none: whatever another move staged is of no use any more."""
        for stale in [m for m, staging in self._moves.items() if staging.unit == unit and m != move]:
            del self._moves[stale]
            log.info("staging dropped", unit=unit, move=stale)

    def forget_silent(self) -> None:
        """Drop moves not heard of for a lock lease."""
        silent_since_s = self._clock() - self._settings.lock_lease_s
        for stale in [m for m, staging in self._moves.items() if staging.heard_at_s < silent_since_s]:
            del self._moves[stale]


def _pieces(header: dict[str, Any]) -> list[tuple[int, int, int]]:
    pieces = []
    for piece in sequence(header, "pieces"):
        match piece:
            case [int(index), int(offset), int(size)] if min(index, offset) >= 0 and size > 0:
                pieces.append((index, offset, size))
            case _:
                raise InvalidInput(f"{shown(piece)} is no piece of a chunk: expected [index, offset, size]")
    return pieces
