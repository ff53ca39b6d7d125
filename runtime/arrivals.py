"""The destination's side of a move: what has been announced, what has arrived, what is ready to take over.

Everything here is inactive and may be lost at any time: the log is the truth, this is a cache that saves replaying
it. It is kept until the map says how the move ended, or until nothing was heard of the move for a lock lease.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import structlog
from msgspec import Meta, Struct
from msgspec.structs import replace

from routing.control import ManifestRow, MigrationRequest
from routing.errors import Busy, InvalidInput, PayloadTooLarge, StateNotPortable, Unavailable
from routing.jsonlike import shown
from routing.settings import Settings
from routing.typed import Count, reader
from runtime.actor import ActorClasses
from runtime.codec import aside, split
from runtime.live_actor import LiveActor
from runtime.memory import Limits
from runtime.portable import Portable
from runtime.turn import Turn

log = structlog.get_logger("ferry.arrivals")

HEADER_ALLOWANCE_BYTES = 32 * 2**20  # the memory of commands and the trail travel beside the state


class _Chunk(Struct):
    """What is in the body of a chunk, in this order: of which actor, from where in its transfer, how many bytes."""

    move: str
    pieces: tuple[tuple[Count, Count, Annotated[int, Meta(ge=1)]], ...]


_read_chunk = reader(_Chunk, "chunk")


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
    announced_bytes: int = 0
    verifying: asyncio.Lock = field(default_factory=asyncio.Lock)  # a step that runs twice decodes once


class StagedActors:
    """All moves that are arriving at this node."""

    def __init__(self, *, classes: ActorClasses, settings: Settings, clock: Callable[[], float]) -> None:
        self._classes, self._settings, self._clock = classes, settings, clock
        self._turn_ahead = Turn(clock)
        self._moves: dict[str, _Staging] = {}

    def __len__(self) -> int:
        return len(self._moves)

    def announce(self, request: MigrationRequest) -> list[int]:
        """Take note of a page of the manifest; returns the indexes of actors still lacking here.

        Raises UnknownActorType and PayloadTooLarge before anything is allocated.
        """
        self._check_room(request)
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
            staging.announced_bytes += row.transfer_bytes - (known.row.transfer_bytes if known is not None else 0)
            if known is None or not _same_state(known.row, row):
                known = staging.actors[row.index] = _Arriving(row)
            known.row = row
            if known.received_bytes < row.transfer_bytes:
                lacking.append(row.index)
        return lacking

    def _check_room(self, request: MigrationRequest) -> None:
        """Raises PayloadTooLarge when the move alone exceeds what may be staged here, Busy when all together do."""
        limit = self._settings.transfer_held_bytes
        staging = self._moves.get(request.move)
        of_move = sum(row.transfer_bytes for row in request.rows)
        if staging is not None:
            known = [staging.actors[row.index] for row in request.rows if row.index in staging.actors]
            of_move += staging.announced_bytes - sum(arriving.row.transfer_bytes for arriving in known)
        if of_move > limit:
            raise PayloadTooLarge(
                f"move {request.move} brings {of_move} bytes: this node takes {limit} (FERRY_TRANSFER_HELD_BYTES)"
            )
        of_others = sum(other.announced_bytes for move, other in self._moves.items() if move != request.move)
        if of_move + of_others > limit:
            raise Busy(f"{of_others} bytes are arriving here already: try again", retry_after_s=0.5)

    def receive(self, payload: bytes) -> None:
        """Store the pieces of one chunk. Repeats are ignored. Raises InvalidInput for what was never announced."""
        line, body = split(payload)
        header = _read_chunk(line)
        move = header.move
        staging = self._moves.get(move)
        if staging is None:
            raise Unavailable(f"move {shown(move)} is not announced here: announce it again")
        staging.heard_at_s = self._clock()
        position = 0
        for index, offset, size in header.pieces:
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

    async def verify(self, move: str, *, until_s: float = math.inf, ahead: bool = False) -> int:
        """Decode what arrived and check it against the manifest; returns how many actors are ready.

        All moves that are copied `ahead` share one turn of the event loop: nobody stands still for them.

        After `until_s` on the clock it stops and returns what there is: ask again. Raises StateNotPortable when
        something is damaged or this node's code cannot take it, Unavailable when something is missing: the source
        sends again.
        """
        staging = self._moves.get(move)
        if staging is None:
            raise Unavailable(f"move {move} is not staged here: send it again")
        staging.heard_at_s = self._clock()
        async with staging.verifying:
            turn = self._turn_ahead if ahead else Turn(self._clock)
            for arriving in list(staging.actors.values()):
                if arriving.live is None:
                    arriving.live = await self._decode(move, arriving)
                    arriving.data = None
                    if self._clock() >= until_s:
                        break
                    if turn.over():  # decoding a large shard must not hold up the commands of others
                        await turn.next()
        return sum(1 for arriving in staging.actors.values() if arriving.live is not None)

    async def _decode(self, move: str, arriving: _Arriving) -> LiveActor:
        row, data = arriving.row, arriving.data
        if arriving.received_bytes < row.transfer_bytes or data is None:
            raise Unavailable(f"{row.actor_id} of move {move} has not arrived whole: send it again")
        portable, state = await aside(row.transfer_bytes, partial(self._unpack, move, row, data))
        return portable.activate(
            self._classes, limits=Limits.of(self._settings), max_state_bytes=self._settings.max_state_bytes,
            state=state,
        )  # fmt: skip

    def _unpack(self, move: str, row: ManifestRow, data: bytearray) -> tuple[Portable, bytes]:
        """Nothing but work on bytes, for which a thread will do."""
        try:
            portable = Portable.decode(data)
        except InvalidInput as error:
            raise StateNotPortable(f"{row.actor_id} of move {move} was damaged on the way: {error}") from error
        frame = portable.frame
        arrived = (str(portable.actor_id), portable.version, frame.digest, frame.state_bytes)
        if arrived != (row.actor_id, row.state_version, row.digest, row.state_bytes):
            raise StateNotPortable(f"{row.actor_id} of move {move} is not what was announced")
        return portable, portable.state(self._settings.max_state_bytes)

    async def catch_up(
        self, move: str, replay_on: Callable[[LiveActor], Awaitable[None]], *, until_s: float = math.inf
    ) -> bool:
        """Bring the actors that have changed since they were copied to the version they are announced at.

        After `until_s` on the clock it stops and returns False: ask again. One that cannot be brought there is lacking
        from then on: half a replay is no state. Raises what reading the log and replaying raise.
        """
        staging = self._moves.get(move)
        if staging is None:
            raise Unavailable(f"move {move} is not staged here: send it again")
        async with staging.verifying:
            for arriving in list(staging.actors.values()):
                live, row = arriving.live, arriving.row
                if live is not None and live.version < row.version:
                    if self._clock() >= until_s:
                        return False
                    arriving.live = None
                    try:
                        await replay_on(live)
                        if live.version < row.version:
                            raise Unavailable(f"log of {row.actor_id} ends before {row.version}: try again")
                    except BaseException:
                        arriving.offsets.clear()
                        arriving.received_bytes = 0
                        raise
                    live.unverified = True
                    arriving.live = live
        return True

    def announced(self, move: str) -> int:
        staging = self._moves.get(move)
        return 0 if staging is None else len(staging.actors)

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


def _same_state(one: ManifestRow, other: ManifestRow) -> bool:
    """Whether two rows announce the same bytes, whatever has come into the log since."""
    return replace(one, version=0, captured_version=one.state_version) == replace(
        other, version=0, captured_version=other.state_version
    )
